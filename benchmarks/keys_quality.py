"""Quality without a vocabulary on Criteo rows: tables of keys against tables of ids.

The rows are written as Parquet with categories of text, as another system would leave them. For
each of `--key-bits` it trains a model on the keys (`--ids keys`), whose columns share the tables,
and one on ids from a vocabulary whose tables are compressed to the same bytes; and prints the mean
test log loss of each, and the difference of each seed.

    python benchmarks/keys_quality.py criteo_8k.tsv --test-rows 1600 --seeds 0 1 2
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from criteo_quality import fit_quietly
from rich.console import Console
from rich.table import Table

from qrhash.ctr.data.criteo import CATEGORIES, COLUMNS
from qrhash.ctr.run.records import Summary


def main() -> None:
    """Trains all models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="Criteo-format text, plain or gzip")
    parser.add_argument("--test-rows", type=int, default=8000)
    parser.add_argument("--key-bits", type=int, nargs="+", default=[24, 26])
    parser.add_argument("--num-tables", type=int, default=2)
    parser.add_argument("--operation", default="concat", help="of the keys")
    parser.add_argument("--ids-operation", default="mult", help="of the ids of the vocabulary")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, help="TOML file with other options of qrhash train")
    arguments = parser.parse_args()
    table = Table(title=f"test log loss, {len(arguments.seeds)} seeds")
    for column in ("key bits", "bytes", "keys", "vocabulary, as many bytes", "keys against it"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        data = as_text_keys(arguments.data, Path(directory))
        options = {
            "data": str(data),
            "preset": "table",
            "test_rows": arguments.test_rows,
            "operation": arguments.ids_operation,
            "evaluations": 1,
        }
        for bits in arguments.key_bits:
            wanted = {"ids": "keys", "key_bits": bits, "num_tables": arguments.num_tables}
            wanted["operation"] = arguments.operation
            table.add_row(str(bits), *comparison(arguments, options, wanted))
    Console().print(table)


def as_text_keys(data: str, directory: Path) -> Path:
    """The rows as Parquet, with categories as they stand in the text."""
    path = directory / "rows.parquet"
    pyarrow.parquet.write_table(read_rows(data), path)
    return path


def read_rows(data: str) -> pa.Table:
    """The rows of a file in the Criteo format, with categories as they stand in the text."""
    return pyarrow.csv.read_csv(
        data,
        pyarrow.csv.ReadOptions(column_names=COLUMNS),
        pyarrow.csv.ParseOptions(delimiter="\t"),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(CATEGORIES, pa.string())),
    )


def comparison(
    arguments: argparse.Namespace, options: dict[str, Any], keys: dict[str, Any]
) -> tuple[str, ...]:
    """Bytes, log losses and their difference, as cells of the table."""
    of_keys = _fit_all(arguments, options | keys)
    # What full tables take is known from any run with a vocabulary.
    full = fit_quietly(arguments.config, options | {"seed": arguments.seeds[0]}).full_bytes
    assert full is not None
    compression = max(1.0, full / of_keys[0].embedding_bytes)
    of_ids = _fit_all(arguments, options | {"compression": compression, "threshold": 0})
    losses = [[summary.test.log_loss for summary in each] for each in (of_keys, of_ids)]
    keys_loss, ids_loss = map(statistics.mean, losses)
    each = ", ".join(f"{keys / ids - 1:+.2%}" for keys, ids in zip(*losses, strict=True))
    return (
        f"{of_keys[0].embedding_bytes:,}",
        f"{keys_loss:.4f}",
        f"{ids_loss:.4f} in {of_ids[0].embedding_bytes:,} bytes",
        f"{keys_loss / ids_loss - 1:+.2%} ({each})",
    )


def _fit_all(arguments: argparse.Namespace, options: dict[str, Any]) -> list[Summary]:
    return [fit_quietly(arguments.config, options | {"seed": seed}) for seed in arguments.seeds]


if __name__ == "__main__":
    main()
