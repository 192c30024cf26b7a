"""The embeddings of a snapshot, of ids or keys and of keys that come and go: NumPy alone.

What ids mean is computed by the lines that the model computes it with: `qrhash.policies`, the
partition, `qrhash.operations`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from qrhash.delta_files import NOTHING, Delta
from qrhash.export.pooling import Bags
from qrhash.export.row_formats import Rows
from qrhash.operations import Projection, combine
from qrhash.partitions import Partition
from qrhash.policies import PADDING, fill_value, indices_of
from qrhash.words import Keys, cross


class Embedding(Protocol):
    """What looks vectors up."""

    @property
    def features(self) -> int:
        """Width of the vectors."""

    def lookup(self, ids: Any, offsets: Any, weights: Any) -> np.ndarray:
        """The vectors of ids; see `Snapshot.lookup`."""


@dataclass(frozen=True)
class Fixed:
    """Tables that ids or keys have their rows in, whatever was met.

    Attributes:
      partition: id -> indices.
      operation: see `qrhash.combine`.
      id_policy: see `qrhash.EmbedConfig`.
      padding_id: see there.
      combiner: see there.
      pool_rows: see there.
      features: width of the vectors.
      tables: the rows of each table.
      projection: for operation "project".
    """

    partition: Partition
    operation: str
    id_policy: str
    padding_id: int | None
    combiner: str
    pool_rows: bool
    features: int
    tables: tuple[Rows, ...]
    projection: Projection | None = None

    @classmethod
    def of(
        cls, said: Mapping[str, Any], tables: tuple[Rows, ...], projection: Projection | None
    ) -> Self:
        """The embedding, given what a header says of it."""
        names = ("operation", "id_policy", "padding_id", "combiner", "pool_rows", "features")
        partition = Partition.from_dict(said["partition"])
        shapes = tuple(table.shape for table in tables)
        if tuple(rows for rows, _ in shapes) != partition.num_rows:
            raise KeyError(f"{partition.num_rows} rows")
        values = {name: said[name] for name in names}
        return cls(partition=partition, tables=tables, projection=projection, **values)

    def lookup(self, ids: Any, offsets: Any = None, weights: Any = None) -> np.ndarray:
        """The vectors of ids; see `Snapshot.lookup`."""
        ids = Keys.of(ids) if self.partition.takes_keys else _host_ids(ids)
        indices = indices_of(ids, self.partition, self.id_policy, self.padding_id)
        if offsets is None:
            rows, fill = self._rows(indices)
            return self._combined(rows, fill)
        bags = Bags.of(offsets, weights, len(indices[0]), self.combiner)
        if self.padding_id is not None:
            bags = bags.without(indices[0] == PADDING)
            indices = tuple(index[indices[0] != PADDING] for index in indices)
        rows, fill = self._rows(indices)
        if not self.pool_rows:
            return bags.pool(self._combined(rows, fill))
        pooled = [bags.pool(_filled(row, fill)) for row in rows]
        vectors: np.ndarray = combine(pooled, self.operation, self.projection)
        # The bias of a projection, say, is not to stand for an empty bag.
        vectors[bags.is_empty] = 0
        return vectors

    def _rows(self, indices: tuple[np.ndarray, ...]) -> tuple[list[np.ndarray], Any]:
        """Rows of each table; and what is filled in, [*shape, 1] where, or None for nowhere."""
        found = (indices[0] >= 0) & (indices[0] < self.tables[0].shape[0])
        is_all = bool(found.all())
        rows = [
            table.take(index if is_all else np.where(found, index, 0))
            for table, index in zip(self.tables, indices, strict=True)
        ]
        if is_all:
            return rows, None
        fill = fill_value(indices[0], self.id_policy, self.padding_id, np.float32)
        return rows, (found[..., None], np.broadcast_to(fill, (*found.shape, 1)))

    def _combined(self, rows: list[np.ndarray], fill: Any) -> np.ndarray:
        vectors: np.ndarray = combine(rows, self.operation, self.projection)
        if fill is not None and self.operation == "features":
            fill = tuple(each[..., None] for each in fill)
        return _filled(vectors, fill)


def _filled(vectors: np.ndarray, fill: Any) -> np.ndarray:
    """Vectors, with something else where nothing was found."""
    if fill is None:
        return vectors
    found, value = fill
    return np.where(found, vectors, value.astype(np.float32))


@dataclass(frozen=True)
class Growing:
    """A row for each key that has one, and a compressed vector, or a constant, for all others.

    Attributes:
      keys: those with a row, in rising order, uint64 [n].
      rows: their rows.
      refused: the compressed vectors; None: there are none.
      refused_value: what the vector of a key without a row holds then.
      combiner: see `qrhash.EmbedConfig`.
      version: of the training.
      above: what has changed since the file was written.
    """

    keys: np.ndarray
    rows: Rows
    refused: Fixed | None
    refused_value: float
    combiner: str
    version: int
    above: "Layer | None" = None

    @property
    def features(self) -> int:
        """Width of the vectors."""
        return self.rows.shape[1]

    def lookup(self, ids: Any, offsets: Any = None, weights: Any = None) -> np.ndarray:
        """The vectors of keys; see `Snapshot.lookup`."""
        keys = Keys.of(ids)
        flat = keys.reshape(-1)
        vectors = self._vectors(flat)
        if offsets is None:
            return vectors.reshape(*keys.shape, self.features)
        return Bags.of(offsets, weights, len(flat), self.combiner).pool(vectors)

    def _vectors(self, keys: Keys) -> np.ndarray:
        """The vectors of keys [n]."""
        above, place = self._places(keys.to_numpy())
        vectors = np.empty((keys.size, self.features), np.float32)
        vectors[place >= 0] = self.rows.take(place[place >= 0])
        if self.above is not None:
            vectors[above >= 0] = self.above.rows[above[above >= 0]]
        missing = (above < 0) & (place < 0)
        if missing.any():
            vectors[missing] = (
                self.refused_value if self.refused is None else self.refused.lookup(keys[missing])
            )
        return vectors

    def _places(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of keys [n] are, in the layer or in the file; -1: not there."""
        place = _places(self.keys, keys)
        if self.above is None:
            return np.full(keys.shape, -1), place
        above = _places(self.above.keys, keys)
        place[above >= 0] = -1
        return np.where(self.above.is_gone[above] & (above >= 0), -1, above), place

    def has_row(self, keys: Any) -> np.ndarray:
        """Which keys [*shape] have a row."""
        keys = Keys.of(keys)
        above, place = self._places(keys.reshape(-1).to_numpy())
        return ((above >= 0) | (place >= 0)).reshape(keys.shape)

    def with_delta(self, delta: Delta) -> "Growing":
        """The embedding of the next version; see `Snapshot.apply`."""
        otherwise = "take a new snapshot"
        if not delta.goes_on_from(self.version, of="snapshot", otherwise=otherwise):
            return self
        changed = replace(self, version=int(delta.to_version), refused=self._refused_by(delta))
        vectors = np.asarray(delta.vectors, np.float32)
        if vectors.shape[1:] != (self.features,):
            raise ValueError(
                f"delta must hold vectors of width {self.features}, as the snapshot does, got "
                f"{vectors.shape[1:]}."
            )
        layer = Layer.of(np.asarray(delta.keys), vectors, np.asarray(delta.removed))
        if int(delta.from_version) == NOTHING:
            # Everything: what is not in it has no row.
            rows = Rows({"rows": layer.rows}, self.features)
            return replace(changed, keys=layer.keys, rows=rows, above=None)
        above = layer if self.above is None else self.above.below(layer)
        return replace(changed, above=above)

    def _refused_by(self, delta: Delta) -> Fixed | None:
        """The compressed vectors with the tables of a delta."""
        ours = () if self.refused is None else self.refused.tables
        shapes = tuple(table.shape for table in ours)
        theirs = tuple(np.asarray(table, np.float32) for table in delta.refused)
        if shapes != tuple(table.shape for table in theirs):
            raise ValueError(
                f"delta must hold the compressed tables of the snapshot, {shapes}, got "
                f"{tuple(table.shape for table in theirs)}."
            )
        if self.refused is None:
            return None
        tables = tuple(Rows({"rows": table}, table.shape[1]) for table in theirs)
        projection = delta.projection
        if projection is not None:
            kernel, bias = (
                None if each is None else np.asarray(each, np.float32) for each in projection
            )
            projection = Projection(kernel, bias)
        return replace(self.refused, tables=tables, projection=projection)


@dataclass(frozen=True)
class Crossed:
    """The keys of one of several features that share a table that grows.

    Attributes:
      table: the embedding of the table.
      key: of the feature: keys are crossed with it; None: they are not.
      combiner: see `qrhash.EmbedConfig`.
    """

    table: Growing
    key: Keys | None
    combiner: str

    @property
    def features(self) -> int:
        """Width of the vectors."""
        return self.table.features

    def lookup(self, ids: Any, offsets: Any = None, weights: Any = None) -> np.ndarray:
        """The vectors of keys; see `Snapshot.lookup`."""
        crossed = ids if self.key is None else cross(self.key, ids)
        return replace(self.table, combiner=self.combiner).lookup(crossed, offsets, weights)


@dataclass(frozen=True)
class Layer:
    """What deltas have changed, above the rows of a file.

    Attributes:
      keys: those that have changed, in rising order, uint64 [n].
      rows: their vectors, float32 [n, features].
      is_gone: which of them have lost their row, bool [n].
    """

    keys: np.ndarray
    rows: np.ndarray
    is_gone: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, rows: np.ndarray, removed: np.ndarray) -> "Layer":
        """The layer of one delta."""
        none = np.zeros((removed.size, rows.shape[1]), np.float32)
        is_gone = np.arange(keys.size + removed.size) >= keys.size
        layer = cls(np.concatenate([keys, removed]), np.concatenate([rows, none]), is_gone)
        return layer._at(np.argsort(layer.keys))

    def below(self, newer: "Layer") -> "Layer":
        """Both layers in one: of a key in both the newer's."""
        pairs = ((self.keys, newer.keys), (self.rows, newer.rows), (self.is_gone, newer.is_gone))
        both = Layer(*map(np.concatenate, pairs))
        order = np.argsort(both.keys, kind="stable")
        keys = both.keys[order]
        is_last = np.append(keys[1:] != keys[:-1], True)
        return both._at(order[is_last])

    def _at(self, places: np.ndarray) -> "Layer":
        return Layer(self.keys[places], self.rows[places], self.is_gone[places])


def _places(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where keys [m] stand among others in rising order [n]; -1: nowhere."""
    if not keys.size:
        return np.full(wanted.shape, -1)
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[place] == wanted, place, -1)


def _host_ids(ids: Any) -> Any:
    """Ids of NumPy, also where they are JAX's."""
    return ids if isinstance(ids, (list, tuple, int, Keys)) else np.asarray(ids)
