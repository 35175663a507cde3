"""Look up vectors inside a Spark job: every row of a DataFrame gets its features.

Spark hands the rows to Python as Arrow batches (``mapInArrow``), the form in which embedkit looks them up.
The tables are sent to every executor once. embedkit and pyarrow have to be installed on the executors, torch
does not. Where Python is not wanted there, the join of ``export_sql`` does the same: ``--join`` shows it.

    python pipelines/spark_transform.py stores.embedkit rows.parquet features.parquet
    python pipelines/spark_transform.py stores.embedkit rows.parquet features.parquet --join
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import FloatType, StructField, StructType

from embedkit.serving.sql import export_sql
from embedkit.tables import EmbeddingSet


def transform(frame: DataFrame, embedding_set: EmbeddingSet) -> DataFrame:
    """Add the features of every row: `frame` with float columns behind its own."""
    names = embedding_set.feature_names_out
    schema = StructType([*frame.schema.fields, *(StructField(name, FloatType()) for name in names)])
    sent = frame.sparkSession.sparkContext.broadcast(embedding_set)

    def look_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            features = sent.value.transform_table(batch).combine_chunks()
            arrays = [*batch.columns, *(column.chunk(0) for column in features.columns if column.num_chunks)]
            if batch.num_rows:
                yield pa.RecordBatch.from_arrays(arrays, names=[*batch.schema.names, *names])

    return frame.mapInArrow(look_up, schema)


def join(frame: DataFrame, embedding_set: EmbeddingSet, folder: Path) -> DataFrame:
    """Do the same as a join, with the tables of vectors in a folder that every executor can read."""
    spark = frame.sparkSession
    frame.createOrReplaceTempView("rows")
    export_sql(embedding_set, folder, dialect="spark", keep=frame.columns, location=str(folder))
    for statement in filter(str.strip, (folder / "tables.sql").read_text().split(";\n")):
        spark.sql(statement)
    return spark.sql((folder / "join.sql").read_text().rstrip(";\n"))


def main() -> None:
    """Read, look up, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="path of a stored set")
    parser.add_argument("input", help="Parquet dataset")
    parser.add_argument("output", help="Parquet dataset to write")
    parser.add_argument("--join", action="store_true", help="use SQL instead of Python on the executors")
    arguments = parser.parse_args()
    spark = SparkSession.builder.appName("embedkit").getOrCreate()
    frame = spark.read.parquet(arguments.input)
    embedding_set = EmbeddingSet.load(arguments.store)
    with tempfile.TemporaryDirectory() as folder:
        result = (
            join(frame, embedding_set, Path(folder)) if arguments.join else transform(frame, embedding_set)
        )
        result.write.parquet(arguments.output)
    spark.stop()


if __name__ == "__main__":
    main()
