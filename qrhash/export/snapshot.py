"""`Snapshot`: the vectors of a file, looked up by NumPy alone.

A snapshot that is read is never changed in its place: what a delta changes stands in a layer above
the file, and a new state takes the place of the old one at once. Whoever looks up meanwhile goes on
with the state that he began with, so that nobody waits, and nobody sees half of a delta.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qrhash.delta_files import Delta, load_delta
from qrhash.export.embeddings import Crossed, Embedding, Fixed, Growing
from qrhash.export.header import NAME, Header, checksum
from qrhash.export.row_formats import Rows
from qrhash.export.tensors import Tensors, read_tensors
from qrhash.operations import Projection
from qrhash.words import Keys


class Snapshot:
    """The embeddings of a file that `qrhash.export.save` wrote.

    Any number of threads may look up while another one applies deltas.

    Attributes:
      path: of the file.

    Args:
      path: of the file.
      verify: whether to read all of it first, and compare checksums.

    Raises:
      OSError: there is no such file; or it is damaged, or no snapshot.
      ValueError: it is of another version of qrhash, whose hashes are others.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        tensors = read_tensors(self.path)
        if NAME not in tensors.metadata:
            raise OSError(
                f"{self.path} is no snapshot of qrhash: it has no {NAME!r} in its header."
            )
        header = Header.from_json(tensors.metadata[NAME], self.path)
        if verify:
            _verify(self.path, tensors, header)
        try:
            said = header.embeddings
            self._crossed = {name: each for name, each in said.items() if "table" in each}
            self._embeddings = {
                name: _embedding(name, each, tensors.arrays)
                for name, each in said.items()
                if name not in self._crossed
            }
        except (KeyError, TypeError) as error:
            raise OSError(
                f"{self.path} is damaged: {error!r} of an embedding is missing."
            ) from error
        self._writing = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the embeddings; one that stands alone may be called ""."""
        return (*self._embeddings, *self._crossed)

    def features(self, name: str = "") -> int:
        """Width of the vectors of an embedding."""
        return self._named(name, self._embeddings).features

    def version(self, name: str = "") -> int | None:
        """The version of a table that grows; None for one that does not."""
        return getattr(self._named(name, self._embeddings), "version", None)

    def lookup(
        self, ids: Any, name: str = "", *, offsets: Any = None, weights: Any = None
    ) -> np.ndarray:
        """The vectors of ids or keys.

        Args:
          ids: integers [*shape] of any rank; for an embedding of keys `qrhash.Keys`, integers of 64
            bits, or text.
          name: of the embedding.
          offsets: where each bag begins in ids [n], and their end, integers [num_bags + 1], as in
            `Bag.from_ragged`: then the vectors of its ids are pooled, as the embedding's combiner
            says.
          weights: of the ids in their bags, [n].

        Returns:
          float32 [*shape, features]; of bags [num_bags, features]; for operation "features"
          [*shape, k, features]. An id outside of the vocabulary gives what its policy says, a key
          without a row its compressed vector, or the constant; neither is remembered.

        Raises:
          ValueError: an unknown name; ids of another kind, or outside under policy "raise"; or
            offsets that are none.

        The vectors are the model's to the last bit where rows are kept as float32, but for the
        rounding of sums of products, in operations "project" and "path" and in bags.
        """
        return self._named(name, self._embeddings).lookup(ids, offsets, weights)

    def lookup_all(self, ids: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The vectors of several embeddings, all of the same version of the snapshot.

        Args:
          ids: name -> ids or keys, see `lookup`; a pair (ids, offsets) for bags.

        Returns:
          name -> vectors.
        """
        embeddings = self._embeddings
        found = {}
        for name, each in ids.items():
            ids_of, offsets = each if isinstance(each, tuple) else (each, None)
            found[name] = self._named(name, embeddings).lookup(ids_of, offsets, None)
        return found

    def has_row(self, keys: Any, name: str = "") -> np.ndarray:
        """Which keys [*shape] have a row of their own in a table that grows.

        Raises:
          ValueError: an unknown name, or a table that does not grow.
        """
        return self._growing(name).has_row(keys)

    def apply(self, delta: Delta | str | Path) -> int | None:
        """Applies what a training has changed.

        Args:
          delta: or the path of one, see `qrhash.dynamic.save_delta`. The table's name in it says
            which embedding it is of. One that makes a version no newer than the embedding's does
            nothing.

        Returns:
          The version that the embedding has now.

        Raises:
          OSError: the file is damaged.
          ValueError: one in between is missing; or it is of another table or config. The snapshot
            is as it was.
        """
        if not isinstance(delta, Delta):
            delta = load_delta(delta)
        with self._writing:
            embedding = self._growing(delta.name).with_delta(delta)
            # One reference takes the place of another: whoever looks up has the old or the new.
            self._embeddings = {**self._embeddings, delta.name: embedding}
        return embedding.version

    def _growing(self, name: str) -> Growing:
        found = self._named(name, self._embeddings)
        if not isinstance(found, Growing):
            raise ValueError(f"the embedding {name!r} of {self.path} does not grow.")
        return found

    def _named(self, name: str, embeddings: Mapping[str, Embedding]) -> Embedding:
        if name in self._crossed:
            said = self._crossed[name]
            # Of the table as it is now: deltas are of that.
            table = self._named(said["table"], embeddings)
            assert isinstance(table, Growing)
            key = None if said["key"] is None else Keys.of(np.uint64(said["key"]))
            return Crossed(table, key, said["combiner"])
        if name not in embeddings:
            names = ", ".join(map(repr, self.names))
            raise ValueError(f"name must be one of {names}, those of {self.path}, got {name!r}.")
        return embeddings[name]


def _verify(path: Path, tensors: Tensors, header: Header) -> None:
    for name, array in tensors.arrays.items():
        if checksum(array) != header.checksums.get(name):
            raise OSError(f"{path} is damaged: the checksum of {name} is another; copy it anew.")


def _embedding(name: str, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Embedding:
    """An embedding, given what the header says of it."""
    if "partition" in said:
        return _fixed(said["owner"], said, arrays)
    of_refused = said["refused"]
    return Growing(
        keys=arrays[f"{name}/keys"],
        rows=_rows(f"{name}/table", said["features"], arrays),
        refused=_fixed(f"{name}/refused", of_refused, arrays) if of_refused else None,
        refused_value=said["refused_value"],
        combiner=said["combiner"],
        version=said["version"],
    )


def _fixed(owner: str, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Fixed:
    tables = tuple(
        _rows(f"{owner}/table_{j}", width, arrays) for j, width in enumerate(said["widths"])
    )
    kernel, bias = arrays.get(f"{owner}/kernel"), arrays.get(f"{owner}/bias")
    return Fixed.of(said, tables, None if kernel is None else Projection(kernel, bias))


def _rows(name: str, width: int, arrays: Mapping[str, np.ndarray]) -> Rows:
    parts = {part: arrays.get(f"{name}/{part}") for part in ("rows", "scale")}
    return Rows({part: array for part, array in parts.items() if array is not None}, width)
