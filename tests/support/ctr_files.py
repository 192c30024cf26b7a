"""Small Criteo-format files, made from plain Python rows."""

import gzip
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from qrhash.ctr.data.block import CATEGORIES, COLUMNS, INTEGERS

Row = list[str]


def make_row(label: str = "0", integer: str = "3", category: str = "1f") -> Row:
    """Forty equal-looking cells, to be spoilt by a test."""
    return [label, *[integer] * len(INTEGERS), *[category] * len(CATEGORIES)]


def random_rows(count: int, *, categories: int = 50) -> list[Row]:
    """Rows whose label follows their first category, with missing cells here and there."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        keys = [rng.randrange(categories) for _ in CATEGORIES]
        label = rng.random() < (0.95 if keys[0] % 2 else 0.05)
        integers = ["" if rng.random() < 0.2 else str(rng.randrange(-2, 10)) for _ in INTEGERS]
        hexes = ["" if rng.random() < 0.1 else f"{key * 7919:05x}" for key in keys]
        rows.append([str(int(label)), *integers, *hexes])
    return rows


def text_of(rows: list[Row]) -> bytes:
    return b"".join("\t".join(row).encode() + b"\n" for row in rows)


def write_text(path: Path, rows: list[Row]) -> Path:
    path.write_bytes(text_of(rows))
    return path


def write_gzip(path: Path, rows: list[Row]) -> Path:
    path.write_bytes(gzip.compress(text_of(rows)))
    return path


def write_parquet(path: Path, rows: list[Row], *, integer_keys: pa.DataType | None = None) -> Path:
    """Numbers as int64 with nulls; categories as strings, or as the integers they say."""

    def column(name: str, cells: tuple[str, ...]) -> pa.Array:
        if name not in CATEGORIES:
            return pa.array([int(cell) if cell else None for cell in cells], pa.int64())
        if integer_keys is None:
            return pa.array([cell or None for cell in cells], pa.string())
        keys = [int(cell, 16) if cell else None for cell in cells]
        if integer_keys == pa.int64():
            keys = [key if key is None or key < 2**63 else key - 2**64 for key in keys]
        return pa.array(keys, integer_keys)

    cells = zip(COLUMNS, zip(*rows, strict=True), strict=True)
    table = pa.table({name: column(name, values) for name, values in cells})
    pyarrow.parquet.write_table(table, path, row_group_size=37)
    return path
