"""Files of safetensors, mapped into memory: what is read of them is read when it is used.

The format is eight bytes of length, a header of JSON, and the arrays behind it. It is written by
its own library (`qrhash.export.saving`); to read it takes NumPy alone.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

_MOST_HEADER = 100_000_000  # bytes, by the format


class Tensors(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: name -> array, mapped from the file, read only.
      metadata: name -> text.
    """

    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]


def read_tensors(path: str | Path) -> Tensors:
    """Maps a file of safetensors into memory.

    Args:
      path: of the file.

    Raises:
      OSError: there is no such file, or it is not whole, or none of safetensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length).decode())
            metadata = header.pop("__metadata__", {})
            data = _mapped(file, 8 + length)
        arrays = {name: _array(data, **each) for name, each in header.items()}
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is damaged, or no file of safetensors: {error}.") from error
    return Tensors(arrays, metadata)


def _mapped(file: Any, offset: int) -> np.ndarray:
    """The bytes behind the header; a file of none cannot be mapped."""
    size = file.seek(0, 2) - offset
    if size < 0:
        raise ValueError("the file ends in its header")
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(file, np.uint8, "r", offset, (size,)).view(np.ndarray)


def _array(data: np.ndarray, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Any:
    start, stop = data_offsets
    kind = _DTYPES[dtype]
    if stop - start != math.prod(shape) * kind.itemsize or not 0 <= start <= stop <= data.size:
        raise ValueError(f"an array {dtype}{shape} at {data_offsets} of {data.size} bytes")
    return data[start:stop].view(kind).reshape(shape)
