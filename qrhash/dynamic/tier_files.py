"""A file of all rows in a store that were ever in use, and of which key has which.

A zip file of arrays as NumPy writes them, each with a checksum: `keys/<n>.npy`, the leaves of a
dynamic table's state, and for each piece of the table with rows in use `<piece>/rows.npy`, their
numbers, and `<piece>/records.npy`.
"""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from qrhash.dynamic.numbering import Numbering
from qrhash.dynamic.store import Store

_AT_ONCE = 2**16
_HEAD = "table.json"
_FORMAT = 1


def write_tier(path: Path, numbering: Numbering, store: Store) -> None:
    """Writes what is in a store.

    Args:
      path: of the file.
      numbering: which rows are in use, and which key has which.
      store: the store, flushed.
    """
    keys = numbering.saved()
    pieces = []
    with zipfile.ZipFile(path, "w") as file:
        for number, array in enumerate(keys):
            _write(file, f"keys/{number}.npy", array)
        for start in range(0, store.num_rows, _AT_ONCE):
            rows = start + np.flatnonzero(
                numbering.in_use(start, min(start + _AT_ONCE, store.num_rows))
            )
            records = store.read(rows)
            is_written = records[:, 0] > 0
            if is_written.any():
                pieces.append(start)
                _write(file, f"{start}/rows.npy", rows[is_written])
                _write(file, f"{start}/records.npy", records[is_written])
        head = {"format": _FORMAT, "num_keys": len(keys), "pieces": pieces} | _of(store)
        file.writestr(_HEAD, json.dumps(head))


def read_tier(path: Path, numbering: Numbering, store: Store) -> None:
    """Reads what `write_tier` wrote, into a new store.

    Raises:
      ValueError: the file is of another table, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            head = json.loads(file.read(_HEAD))
            of_file = {name: head[name] for name in _of(store)}
            if head["format"] != _FORMAT or of_file != _of(store):
                raise ValueError(f"it is of a table of {of_file}, not of {_of(store)}")
            numbering.take_over([_read(file, f"keys/{n}.npy") for n in range(head["num_keys"])])
            for start in head["pieces"]:
                rows = _read(file, f"{start}/rows.npy")
                store.write(rows, _read(file, f"{start}/records.npy"))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as rows of this table: {error}.") from error
    store.flush()


def _of(store: Store) -> dict[str, int]:
    """What a store and a file of it have in common."""
    return {"num_rows": store.num_rows, "record_width": store.record_width}


def _write(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with file.open(name, "w", force_zip64=True) as part:
        np.lib.format.write_array(part, array, allow_pickle=False)


def _read(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with file.open(name) as part:
        array: np.ndarray = np.lib.format.read_array(part, allow_pickle=False)
        part.read()  # To the end: only there is the checksum compared.
        return array
