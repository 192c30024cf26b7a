"""How the rows of a table are kept in a file: as they are, or in fewer bits with a scale per row.

    float32    4 bytes an entry
    bfloat16   2 bytes: 8 bits of mantissa, off by at most 2**-9 of an entry
    int8       1 byte, and 4 a row: off by at most 1/254 of the row's greatest entry
    int4       half a byte, and 4 a row: off by at most 1/14 of the row's greatest entry

Whole numbers q stand for q * scale, with a scale for each row by which its greatest entry, without
its sign, is 127 or 7.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

ROW_FORMATS = ("float32", "bfloat16", "int8", "int4")

_GREATEST = {"int8": 127, "int4": 7}

_BLOCK = 1 << 16  # rows that are made at once


def encode(table: np.ndarray, row_format: str) -> dict[str, np.ndarray]:
    """The arrays that keep a table.

    Args:
      table: [rows, width] of floats.
      row_format: one of `ROW_FORMATS`.

    Returns:
      {"rows": [rows, width], or for int4 [rows, ceil(width / 2)]; "scale": float32 [rows], for
      int8 and int4}.

    Raises:
      ValueError: an entry is not finite, and the format is of whole numbers.
    """
    if row_format not in _GREATEST:
        return {"rows": np.ascontiguousarray(table, _dtype_of(row_format))}
    num_rows, width = table.shape
    greatest = _GREATEST[row_format]
    is_packed = row_format == "int4"
    rows = np.empty((num_rows, -(-width // 2) if is_packed else width), np.int8)
    scale = np.empty(num_rows, np.float32)
    for start in range(0, num_rows, _BLOCK):
        part = slice(start, start + _BLOCK)
        block = np.asarray(table[part], np.float32)
        most = np.abs(block).max(axis=1, initial=0)
        if not np.isfinite(most).all():
            row = start + int(np.flatnonzero(~np.isfinite(most))[0])
            raise ValueError(
                f"rows must be finite to be kept as {row_format}, got one in row {row} that is not."
            )
        scale[part] = most / np.float32(greatest)
        by = np.where(scale[part] > 0, scale[part], 1)[:, None]
        whole = np.clip(np.rint(block / by), -greatest, greatest).astype(np.int8)
        rows[part] = _packed(whole) if is_packed else whole
    return {"rows": rows.view(np.uint8) if is_packed else rows, "scale": scale}


def _dtype_of(row_format: str) -> Any:
    return np.dtype(np.float32 if row_format == "float32" else ml_dtypes.bfloat16)


def _packed(whole: np.ndarray) -> np.ndarray:
    """Two entries of four bits in a byte, the first in the lower half."""
    even = np.zeros((whole.shape[0], -(-whole.shape[1] // 2) * 2), np.int8)
    even[:, : whole.shape[1]] = whole
    return (even[:, 0::2] & np.int8(15)) | (even[:, 1::2] << np.int8(4))


def _unpacked(packed: np.ndarray, width: int) -> np.ndarray:
    """Entries [n, width] of bytes [n, ceil(width / 2)]."""
    signed = packed.view(np.int8)
    both = np.stack([(signed << np.int8(4)) >> np.int8(4), signed >> np.int8(4)], axis=-1)
    return both.reshape(packed.shape[0], -1)[:, :width]


class Rows:
    """The rows of a table as they are kept; read as float32.

    Attributes:
      shape: [rows, width].
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], width: int) -> None:
        self._rows, self._scale = arrays["rows"], arrays.get("scale")
        self._is_packed = self._scale is not None and self._rows.dtype == np.uint8
        self.shape = (self._rows.shape[0], width)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows of indices.

        Args:
          indices: integers in [0, rows), [*shape].

        Returns:
          float32 [*shape, width].
        """
        flat = indices.reshape(-1)
        rows = self._rows[flat]
        if self._is_packed:
            rows = _unpacked(rows, self.shape[1])
        found = rows.astype(np.float32, copy=False)
        if self._scale is not None:
            found *= self._scale[flat, None]
        return found.reshape(*indices.shape, self.shape[1])
