"""DeepRec's options of an embedding variable, and what each says in the words of `qrhash.dynamic`.

Named, ordered and defaulted as DeepRec's. What means nothing here is refused when it is given.
"""

import dataclasses
import enum
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qrhash.arithmetic import as_size
from qrhash.dynamic import (
    Admission,
    AdmitAll,
    DynamicConfig,
    Eviction,
    ExactCount,
    FileStore,
    MemoryStore,
    SketchCount,
    SmallNorm,
    StepsSinceUse,
    Store,
)
from qrhash.types import Initializer

# Arguments that mean nothing here: the value that says nothing, and the reason.
NoMeaning = Mapping[str, tuple[Any, str]]


def refuse(no_meaning: NoMeaning, **arguments: Any) -> None:
    """Raises a ValueError for an argument that means nothing here, unless it says nothing."""
    for name, value in arguments.items():
        silent, reason = no_meaning[name]
        if value is not silent and value != silent:
            raise ValueError(f"{name}={value!r} has no meaning here: {reason}.")


@dataclasses.dataclass(frozen=True)
class CounterFilter:
    """Keys get a row in the call that brings them to `filter_freq` occurrences: `ExactCount`.

    DeepRec remembers every key without a row for ever; here it is `num_candidates` of them.

    Attributes:
      filter_freq: how many occurrences it takes; 0 or 1: every key gets a row at once.
      num_candidates: how many keys without a row are remembered; None: as many as have one.
    """

    filter_freq: int = 0
    num_candidates: int | None = None

    def __post_init__(self) -> None:
        as_size("filter_freq", self.filter_freq, minimum=0)

    def admission(self, capacity: int) -> Admission:
        """Of a table of so many rows."""
        if self.filter_freq < 2:
            return AdmitAll()
        candidates = capacity if self.num_candidates is None else self.num_candidates
        return ExactCount(self.filter_freq, candidates)


@dataclasses.dataclass(frozen=True)
class CBFFilter:
    """The same by a counting Bloom filter: `SketchCount.for_keys`.

    DeepRec's tests the count before the call, and so admits a key one call later than its
    `CounterFilter`; here both admit it in the call that brings it there.

    Attributes:
      filter_freq: how many occurrences it takes; 0 or 1: every key gets a row at once.
      max_element_size: how many distinct keys there will be.
      false_positive_probability: how many of them may be admitted too early.
      counter_type: an unsigned integer type that holds `filter_freq`. Counters stop there, so they
        are of one byte or two, whatever wider type is asked for.
    """

    filter_freq: int = 0
    max_element_size: int = 0
    false_positive_probability: float = -1.0
    counter_type: Any = np.uint64

    def __post_init__(self) -> None:
        as_size("filter_freq", self.filter_freq, minimum=0)
        counter = np.dtype(self.counter_type)
        if counter.kind != "u" or np.iinfo(counter).max < self.filter_freq:
            raise ValueError(
                f"counter_type must be an unsigned integer type that holds filter_freq, "
                f"{self.filter_freq}, got {self.counter_type!r}."
            )
        if (self.max_element_size > 0) != (self.false_positive_probability != -1.0):
            raise ValueError(
                "max_element_size and false_positive_probability must be given together, got "
                f"{self.max_element_size!r} and {self.false_positive_probability!r}."
            )

    def admission(self, capacity: int) -> Admission:
        """Of a table of so many rows."""
        if self.filter_freq < 2:
            return AdmitAll()
        if self.max_element_size == 0:
            return CounterFilter(self.filter_freq).admission(capacity)
        rate = self.false_positive_probability
        return SketchCount.for_keys(self.filter_freq, self.max_element_size, rate)


@dataclasses.dataclass(frozen=True)
class GlobalStepEvict:
    """Keys lose their row that were not met for more than so many steps: `StepsSinceUse`.

    Attributes:
      steps_to_live: how many; None or 0: no key does.
    """

    steps_to_live: int | None = None

    def eviction(self) -> Eviction | None:
        """None where nothing is evicted."""
        return StepsSinceUse(self.steps_to_live) if self.steps_to_live else None


@dataclasses.dataclass(frozen=True)
class L2WeightEvict:
    """Keys lose their row whose vector has half its sum of squares below this: `SmallNorm`.

    Attributes:
      l2_weight_threshold: the threshold; -1.0: no key does.
    """

    l2_weight_threshold: float = -1.0

    def eviction(self) -> Eviction | None:
        """None where nothing is evicted."""
        return None if self.l2_weight_threshold == -1.0 else SmallNorm(self.l2_weight_threshold)


class StorageType(enum.Enum):
    """Where DeepRec keeps rows.

    Here `DRAM` and `HBM` say the same: all rows are in the memory of the device. With the others
    those in use are there, and the rest in a store: of `HBM_DRAM` in the host's memory, of all
    that name PMEM, SSDHASH or LEVELDB in a file.
    """

    DRAM = "DRAM"
    HBM = "HBM"
    PMEM_MEMKIND = "PMEM_MEMKIND"
    PMEM_LIBPMEM = "PMEM_LIBPMEM"
    SSDHASH = "SSDHASH"
    LEVELDB = "LEVELDB"
    DRAM_PMEM = "DRAM_PMEM"
    DRAM_SSDHASH = "DRAM_SSDHASH"
    HBM_DRAM = "HBM_DRAM"
    DRAM_LEVELDB = "DRAM_LEVELDB"
    DRAM_PMEM_SSDHASH = "DRAM_PMEM_SSDHASH"
    HBM_DRAM_SSDHASH = "HBM_DRAM_SSDHASH"


_RESIDENT = (None, StorageType.DRAM, StorageType.HBM)
_MOST_TIERS = 4
_TIER_BYTES = 2**30

_OF_STORAGE: NoMeaning = {
    "cache_strategy": (None, "where some rows are cached, those used longest ago make room"),
    "layout": (None, "rows and counts are arrays of their own"),
}
_NO_FILE: NoMeaning = {"storage_path": (None, "no rows are kept in files")}
_ONE_TIER: NoMeaning = {
    "storage_size": (None, "give get_embedding_variable the capacity, in rows"),
}


@dataclasses.dataclass(frozen=True)
class StorageOption:
    """Where the rows are.

    Attributes:
      storage_type: a `StorageType`; None, `StorageType.DRAM` and `StorageType.HBM` say the same:
        all in the memory of the device.
      storage_path: of rows in a file, the folder that it is made in; else refused. The file goes
        when the process ends: what is to be kept, `TieredEmbeddingVariable.save` writes.
      storage_size: of rows in a store, bytes for each tier, a list of 1 to 4 sizes; None: 1 GiB
        each. The first is what the rows on the device may take, without the optimizer's state. The
        others limit nothing: the store has room for the capacity. Else refused.
      cache_strategy: no meaning here; refused.
      layout: no meaning here; refused.

    Raises:
      ValueError: an argument that breaks its rule or has no meaning here.

    >>> StorageOption(StorageType.HBM_DRAM, storage_size=[6400]).cache_rows(DynamicConfig(1000, 16))
    100
    """

    storage_type: StorageType | None = None
    storage_path: Any = None
    storage_size: Sequence[int] | None = None
    cache_strategy: Any = None
    layout: Any = None

    def __post_init__(self) -> None:
        if self.storage_type is not None and not isinstance(self.storage_type, StorageType):
            raise ValueError(
                f"storage_type must be a StorageType or None, got {self.storage_type!r}."
            )
        refuse(_OF_STORAGE, cache_strategy=self.cache_strategy, layout=self.layout)
        if not self._is_in_file:
            refuse(_NO_FILE, storage_path=self.storage_path)
        elif not isinstance(self.storage_path, (str, os.PathLike)):
            raise ValueError(
                f"storage_path must be given for {self.storage_type}: the folder that the file of "
                f"the rows is made in, got {self.storage_path!r}."
            )
        if not self.is_tiered:
            refuse(_ONE_TIER, storage_size=self.storage_size)
        elif self.storage_size is not None:
            object.__setattr__(self, "storage_size", _sizes(self.storage_size))

    @property
    def is_tiered(self) -> bool:
        """Whether the rows are in a store, and only those in use on the device."""
        return self.storage_type not in _RESIDENT

    @property
    def _is_in_file(self) -> bool:
        return self.is_tiered and self.storage_type is not StorageType.HBM_DRAM

    def cache_rows(self, config: DynamicConfig) -> int:
        """How many rows of a table are on the device: at least 1, and no more than it has."""
        first = _TIER_BYTES if self.storage_size is None else self.storage_size[0]
        row_bytes = config.features * np.dtype(config.param_dtype).itemsize
        return max(1, min(first // row_bytes, config.capacity))

    def store(self, num_rows: int, record_width: int) -> Store:
        """Makes the store.

        Args:
          num_rows: how many rows.
          record_width: bytes of a record.

        Raises:
          ValueError: no file can be made in `storage_path`.
        """
        if not self._is_in_file:
            return MemoryStore(num_rows, record_width)
        try:
            os.makedirs(self.storage_path, exist_ok=True)
            return FileStore.unnamed(self.storage_path, num_rows, record_width)
        except OSError as error:
            raise ValueError(
                "storage_path must be a folder in which a file of the rows can be made, got "
                f"{self.storage_path!r}: {error.strerror or error}."
            ) from error


def _sizes(storage_size: Any) -> tuple[int, ...]:
    """Bytes of each tier."""
    is_list = isinstance(storage_size, Sequence) and not isinstance(storage_size, str)
    if not is_list or not 1 <= len(storage_size) <= _MOST_TIERS:
        raise ValueError(
            f"storage_size must be a list of 1 to {_MOST_TIERS} sizes in bytes, one for each tier, "
            f"got {storage_size!r}."
        )
    return tuple(as_size(f"storage_size[{n}]", size) for n, size in enumerate(storage_size))


@dataclasses.dataclass(frozen=True)
class InitializerOption:
    """What new rows start with, and the vector of keys without one.

    Attributes:
      initializer: a Flax initializer of one row (key, shape, dtype). DeepRec draws 4096 rows once
        and gives a new key the one of its remainder; here each row is drawn by the hash of its key.
      default_value_dim: no meaning here; refused.
      default_value_no_permission: every entry of the vector of a key that was not admitted.
    """

    initializer: Initializer | None = None
    default_value_dim: int = 4096
    default_value_no_permission: float = 0.0

    def __post_init__(self) -> None:
        of_dim = (4096, "each row is drawn by the hash of its key, not taken from so many")
        refuse({"default_value_dim": of_dim}, default_value_dim=self.default_value_dim)


_OF_OPTION: NoMeaning = {
    "ht_type": ("", "there is one hash table, of arrays"),
    "ht_partition_num": (1000, "the hash table has no locks to share out"),
    "ckpt": (None, "qrhash.checkpoint restores"),
}


@dataclasses.dataclass(frozen=True)
class EmbeddingVariableOption:
    """The options of an embedding variable, in DeepRec's order.

    Attributes:
      ht_type: no meaning here; refused.
      ht_partition_num: no meaning here; refused.
      evict_option: a `GlobalStepEvict` or an `L2WeightEvict`; None: no key loses its row.
      ckpt: no meaning here; refused.
      filter_option: a `CounterFilter` or a `CBFFilter`; None: every key gets a row at once.
      storage_option: a `StorageOption`.
      init_option: an `InitializerOption`.
    """

    ht_type: str = ""
    ht_partition_num: int = 1000
    evict_option: GlobalStepEvict | L2WeightEvict | None = None
    ckpt: Any = None
    filter_option: CounterFilter | CBFFilter | None = None
    storage_option: StorageOption = StorageOption()
    init_option: InitializerOption = InitializerOption()

    def __post_init__(self) -> None:
        refuse(_OF_OPTION, **{name: getattr(self, name) for name in _OF_OPTION})
        kinds = {
            "evict_option": (GlobalStepEvict, L2WeightEvict, type(None)),
            "filter_option": (CounterFilter, CBFFilter, type(None)),
            "storage_option": (StorageOption,),
            "init_option": (InitializerOption,),
        }
        for name, of in kinds.items():
            if not isinstance(getattr(self, name), of):
                names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in of)
                raise ValueError(f"{name} must be one {names}, got {getattr(self, name)!r}.")
