"""Deltas, and their files: NumPy's own format, whole or not there, and refused when damaged.

They are made in `qrhash.dynamic.deltas`, and applied without JAX as well.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qrhash.operations import Projection

# The version of those who know nothing.
NOTHING = -1

_FORMAT = "qrhash delta 1"

_ARRAYS = ("from_version", "to_version", "keys", "vectors", "counts", "last_steps", "removed")


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """What changed from one version to another: NumPy arrays.

    Attributes:
      from_version: the version that it is applied to; -1: it holds everything, and is applied to
        any older one.
      to_version: the one that it makes of it.
      keys: those whose rows have changed, or are new, uint64 [n].
      vectors: what their rows hold, [n, features].
      counts: how often they were met, int32 [n].
      last_steps: when they were met last, int32 [n].
      removed: keys that have lost their row, uint64 [r]; none of them is in `keys`.
      refused: the tables of compressed vectors, whole.
      projection: their `Projection`, whole.
      name: of the table.
    """

    from_version: Any
    to_version: Any
    keys: Any
    vectors: Any
    counts: Any
    last_steps: Any
    removed: Any
    refused: Any = ()
    projection: Projection | None = None
    name: str = ""

    def goes_on_from(self, version: int, *, of: str, otherwise: str) -> bool:
        """Whether it brings a version further; if not, it has been applied already.

        Args:
          version: of what it is to be applied to.
          of: what that is, in words.
          otherwise: what helps where deltas are lost, in words.

        Raises:
          ValueError: one in between is missing.
        """
        since, to = int(self.from_version), int(self.to_version)
        if to <= version:
            return False
        if since not in (NOTHING, version):
            raise ValueError(
                f"delta must be from version {version}, that of the {of}, got one from {since} to "
                f"{to}: apply those between first, or {otherwise}."
            )
        return True


def save_delta(path: str | Path, delta: Delta) -> None:
    """Writes a delta to a file, an `.npz` with a checksum: under its name once it is whole.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    arrays = {name: np.asarray(getattr(delta, name)) for name in _ARRAYS}
    arrays |= {f"refused.{j}": np.asarray(table) for j, table in enumerate(delta.refused)}
    projection = {} if delta.projection is None else delta.projection._asdict()
    arrays |= {f"projection.{k}": np.asarray(v) for k, v in projection.items() if v is not None}
    header = {
        "format": _FORMAT,
        "name": delta.name,
        "dtypes": {name: array.dtype.name for name, array in arrays.items()},
    }
    header["checksum"] = _checksum(header, arrays)
    # NumPy's files know no bfloat16 and the like: these go as integers of their width.
    plain = {
        name: array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array
        for name, array in arrays.items()
    }
    plain["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **plain)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_delta(path: str | Path) -> Delta:
    """Reads a delta.

    Raises:
      OSError: there is no such file, or it is damaged.
    """
    try:
        # NumPy leaves a file open that it has opened and cannot read.
        with Path(path).open("rb") as stream, np.load(stream) as file:
            arrays = dict(file)
        header = json.loads(arrays.pop("header").tobytes())
        checksum = header.pop("checksum")
        arrays = {
            name: array.view(np.dtype(header["dtypes"][name])) for name, array in arrays.items()
        }
        is_whole = header["format"] == _FORMAT and checksum == _checksum(header, arrays)
    except FileNotFoundError:
        raise
    # Whatever NumPy and zlib make of a file that is not as it was written.
    except Exception as error:
        raise OSError(f"{path} is damaged, or no delta: {error}; send it anew.") from error
    if not is_whole:
        raise OSError(f"{path} is damaged: its checksum is another; send it anew.")
    refused = tuple(arrays[f"refused.{j}"] for j in range(_count(arrays, "refused.")))
    projection = None
    if "projection.kernel" in arrays:
        projection = Projection(arrays["projection.kernel"], arrays.get("projection.bias"))
    values = {name: arrays[name] for name in _ARRAYS}
    return Delta(**values, refused=refused, projection=projection, name=header["name"])


def _count(arrays: Mapping[str, Any], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in arrays)


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of everything that a delta says."""
    of_all = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        of_all.update(f"{name} {array.dtype.name} {array.shape}".encode())
        of_all.update(np.ascontiguousarray(array).tobytes())
    return of_all.hexdigest()
