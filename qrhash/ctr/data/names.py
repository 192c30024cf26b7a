"""Keys by name: the cells of the data that have them, and the key of a value that a user gives.

Text is hashed, and nothing keeps it: whose keys a report speaks of are looked for in the data, in
one pass over their columns that ends when all are found. Integers are their own names.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from qrhash.ctr.data import lists
from qrhash.ctr.data.block import Source
from qrhash.ctr.data.decode import keys_of
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.data.sources import FileSource


def names_of(
    source: Source, wanted: Mapping[str, np.ndarray], start: int, stop: int
) -> dict[str, dict[int, str]]:
    """What keys are called in the data.

    Args:
      source: the data.
      wanted: column name -> keys [n] uint64.
      start: the first line to look at.
      stop: behind the last one.

    Returns:
      Column name -> {key: name}; a key that was not found is named by its digits.
    """
    columns = {column.name: column for column in source.schema.columns}
    is_hex = source.schema.preset == "criteo"
    found = {name: _by_digits(keys, columns[name], is_hex) for name, keys in wanted.items()}
    # What is looked for: all that is no integer by its type.
    left = {
        name: np.unique(keys)
        for name, keys in wanted.items()
        if len(keys) and (is_hex or not _is_integer(columns[name]))
    }
    if not isinstance(source, FileSource):
        return found
    for table in source.tables(list(left), start, stop) if left else ():
        for name in list(left):
            values = table[name].combine_chunks()
            if name in source.schema.lists:
                values = lists.elements(columns[name], values)
            values = values.unique()
            keys, none = keys_of(name, values, source.schema)
            here = np.flatnonzero(np.isin(keys, left[name]) & ~none)
            for key, value in zip(keys[here], values.take(pa.array(here)).to_pylist(), strict=True):
                found[name][int(key)] = _text(value)
            left[name] = left[name][~np.isin(left[name], keys[here])]
            if not len(left[name]):
                del left[name]
        if not left:
            break
    return found


def key_named(value: str, name: str, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """The key of a value as the data have it, empty for a missing one.

    Args:
      value: as a cell of text would have it.
      name: of the column.
      schema: what the columns are used as.

    Returns:
      Its key [1] uint64, and whether there is none, [1] bool.
    """
    return keys_of(name, pa.array([value]), schema)


def _is_integer(column: Column) -> bool:
    return column.type.startswith(("int", "uint")) and column.type[-1].isdigit()


def _by_digits(keys: np.ndarray, column: Column, is_hex: bool) -> dict[int, str]:
    """Keys by their digits: of the Criteo format, or with a sign, if the column's type has one."""
    if is_hex:
        return {int(key): f"{key:x}" for key in keys}
    signed = column.type.startswith("int")
    return {int(key): str(int(key.astype(np.int64) if signed else key)) for key in keys}


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return str(value)
