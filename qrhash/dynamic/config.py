"""`DynamicConfig`: everything that is fixed about a table that grows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from qrhash.arithmetic import as_fields, as_size, build, build_typed, typed_fields
from qrhash.config import INIT_STDDEV, EmbedConfig
from qrhash.dynamic.eviction import Eviction
from qrhash.dynamic.newcomers import Admission, AdmitAll
from qrhash.families import FullTable
from qrhash.fields import as_plain, checked_init, without_init
from qrhash.keys import check_seed
from qrhash.layout import MeshLayout
from qrhash.parts import Composite
from qrhash.tuning import LARGE_TABLE_ROWS
from qrhash.types import Initializer

_ADMIT_ALL = AdmitAll()

# Name of the part of compressed vectors; keys' own rows go by the name of the feature.
REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class DynamicConfig(Composite):
    """The embedding of one feature whose keys come and go.

    A key that has earned a row has the vector in it. One that has not has its *compressed* vector,
    from the few small tables of `refused`, which is trained for as long; when the key is admitted,
    its row starts as a copy of that, so that nothing learnt is lost and no vector jumps.

    Attributes:
      capacity: how many keys can have a row of their own.
      features: width of the vectors.
      admission: which keys get a row: `AdmitAll`, `ExactCount`, `SketchCount`, `AdmitByChance`.
      eviction: which ones lose it, when `evict` is called: `StepsSinceUse`, `SmallNorm`,
        `LeastUsed`; None: none.
      refused: the `EmbedConfig`, of a family on keys, of the vectors of keys without a row.
      refused_value: or, without it, what every entry of such a vector is.
      embedding_init: without `refused`, the Flax initializer of a new row [features], which is
        drawn from a key of its own, by the hash of its key. Default: uniform around zero.
      init_stddev: standard deviation of the default initializer; default 0.03.
      seed: another one, other new rows.
      combiner: how the vectors of a `qrhash.Bag` of keys become one: "sum", "mean", "sqrtn", "max".
      dtype: dtype of the maths and the vectors. Default: `param_dtype`.
      param_dtype: dtype of the rows.
      large_table_rows: from so many rows on the table is trained by rows, see `EmbedConfig`.
      layout: how table and batch are split over a mesh; None: they are not.

    Raises:
      ValueError: an argument breaks its rule; the message names it, the rule and the value.

    >>> from qrhash.dynamic.admission import ExactCount
    >>> from qrhash.key_families import KeyDigits
    >>> compressed = EmbedConfig(KeyDigits(32, num_tables=2), 16, "concat")
    >>> config = DynamicConfig(100_000, 16, admission=ExactCount(3, 50_000), refused=compressed)
    >>> config.num_params == 100_000 * 16 + compressed.num_params
    True
    """

    given: ClassVar[str] = "keys with rows, as qrhash.dynamic.assign_all or find_all gives them"

    capacity: int
    features: int
    _: dataclasses.KW_ONLY
    admission: Admission = _ADMIT_ALL
    eviction: Eviction | None = None
    refused: EmbedConfig | None = None
    refused_value: float = 0.0
    embedding_init: Initializer | None = None
    init_stddev: float | None = None
    seed: int = 0
    combiner: str = "mean"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    large_table_rows: int = LARGE_TABLE_ROWS
    layout: MeshLayout | None = None

    def __post_init__(self) -> None:
        for name in ("capacity", "features", "large_table_rows"):
            self._set(name, as_size(name, getattr(self, name)))
        for name, kind in (("admission", Admission), ("eviction", Eviction)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (name, value) != ("eviction", None):
                raise ValueError(f"{name} must be one of qrhash.dynamic's, got {value!r}.")
        checked_init(self.embedding_init, self.init_stddev, 1)
        self._set("seed", check_seed(self.seed))
        self._set("param_dtype", self.own.param_dtype)
        self._set("dtype", self.own.dtype)
        if self.refused is not None:
            self._check_refused()

    def _check_refused(self) -> None:
        refused = self.refused
        if not isinstance(refused, EmbedConfig) or not refused.partition.takes_keys:
            raise ValueError(
                "refused must be an EmbedConfig of a family on keys, KeyDigits or MultiHash, got "
                f"{refused!r}."
            )
        if (refused.features, refused.layout) != (self.features, self.layout):
            raise ValueError(
                f"refused must have the features, {self.features}, and the layout of the rows, got "
                f"{refused.features} and {refused.layout}."
            )
        if len(refused.vector_shape) > 1:
            raise ValueError(
                "refused must have an operation that makes one vector, as a row is, got "
                f"{refused.operation!r}."
            )
        given = {"embedding_init": self.embedding_init, "init_stddev": self.init_stddev}
        extra = [name for name, value in given.items() if value is not None]
        if extra or self.refused_value:
            raise ValueError(
                f"{(*extra, 'refused_value')[0]} must be left out with refused: a new row starts "
                "as its compressed vector."
            )

    @property
    def own(self) -> EmbedConfig:
        """The config of the keys' own rows: of ids that are row numbers."""
        return EmbedConfig(
            FullTable(self.capacity),
            self.features,
            id_policy="zero",
            combiner=self.combiner,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=jax.nn.initializers.zeros,
            large_table_rows=self.large_table_rows,
            layout=self.layout,
        )

    @property
    def parts(self) -> dict[str, EmbedConfig]:
        """The two look-ups of a key: in the keys' own rows, "", and in the tables of `refused`.

        Bags are summed in both, whatever becomes of the sums.
        """
        parts = {"": self.own} | ({} if self.refused is None else {REFUSED: self.refused})
        return {name: dataclasses.replace(part, combiner="sum") for name, part in parts.items()}

    @property
    def stddev(self) -> float:
        """Standard deviation of the entries of a new row, under the default initializer."""
        return INIT_STDDEV if self.init_stddev is None else self.init_stddev

    @property
    def num_params(self) -> int:
        """How many parameters rows and compressed vectors have."""
        return self.own.num_params + (0 if self.refused is None else self.refused.num_params)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it; see `EmbedConfig.to_dict`.

        Raises:
          ValueError: there is an `embedding_init`, here or in `refused`, which is a function.

        >>> config = DynamicConfig(100, 8)
        >>> DynamicConfig.from_dict(config.to_dict()) == config
        True
        """
        values = without_init(self)
        for name in ("admission", "eviction"):
            values[name] = None if values[name] is None else typed_fields(values[name])
        values["refused"] = None if self.refused is None else self.refused.to_dict()
        return {name: as_plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        embedding_init: Initializer | None = None,
        devices: Sequence[Any] | None = None,
    ) -> Self:
        """The config of which `to_dict` made these values.

        Args:
          values: a mapping, also one that was JSON in between.
          embedding_init: as in `DynamicConfig`.
          devices: those of the mesh, where there is one; see `MeshLayout.from_dict`.

        Raises:
          ValueError: values that make no config.
        """
        values = as_fields("config", values)
        for name, kind in (("admission", Admission), ("eviction", Eviction)):
            if values.get(name) is not None:
                values[name] = build_typed(name, kind, values[name])
        if values.get("refused") is not None:
            values["refused"] = EmbedConfig.from_dict(values["refused"], devices=devices)
        if values.get("layout") is not None:
            values["layout"] = MeshLayout.from_dict(values["layout"], devices)
        return build(cls, values | {"embedding_init": embedding_init})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def check_dynamic_config(config: Any) -> None:
    """Raises a ValueError unless it is a `DynamicConfig`."""
    if not isinstance(config, DynamicConfig):
        raise ValueError(
            "config must be a qrhash.dynamic.DynamicConfig, such as "
            f"DynamicConfig(capacity, features=16), got {config!r}."
        )
