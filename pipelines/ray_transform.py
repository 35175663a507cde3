"""Look up vectors inside a Ray Data job: every row of a dataset gets its features.

An actor holds the tables, and gets the rows as Arrow tables, the form in which embedkit looks them up.

    python pipelines/ray_transform.py stores.embedkit rows.parquet features.parquet
"""

import argparse

import pyarrow as pa
import ray

from embedkit.tables import EmbeddingSet


class Lookup:
    """Adds the features to the rows of a table; the stored set is read once per actor."""

    def __init__(self, store: str) -> None:
        self.embedding_set = EmbeddingSet.load(store)

    def __call__(self, rows: pa.Table) -> pa.Table:
        features = self.embedding_set.transform_table(rows)
        return pa.table(
            [*rows.columns, *features.columns], names=[*rows.column_names, *features.column_names]
        )


def transform(dataset: ray.data.Dataset, store: str, actors: int = 8) -> ray.data.Dataset:
    """Add the features of every row; the pool grows to so many actors if there are processors for them."""
    # A pool of a fixed size can take every processor, and wait for ever for the tasks that read and write.
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
    return dataset.map_batches(
        Lookup, fn_constructor_args=[store], batch_format="pyarrow", batch_size=131_072, compute=pool
    )


def main() -> None:
    """Read, look up, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="path of a stored set")
    parser.add_argument("input", help="Parquet dataset")
    parser.add_argument("output", help="Parquet dataset to write")
    arguments = parser.parse_args()
    ray.init(include_dashboard=False)
    transform(ray.data.read_parquet(arguments.input), arguments.store).write_parquet(arguments.output)
    ray.shutdown()


if __name__ == "__main__":
    main()
