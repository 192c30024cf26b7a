"""Which ordinary features the embeddings of a collection come down to.

An ordinary feature has tables of its own, or shares those of another. A composite one, such as of a
`qrhash.dynamic.DynamicConfig`, is made of ordinary ones, its parts: what is looked up in it is ids
for each of them, and its vectors are put together from theirs. Stacks, plans, gradients and meshes
know ordinary features alone.
"""

import abc
import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

import jax

from qrhash.arithmetic import as_fields
from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.partitions import Partition
from qrhash.types import Array

# Where the composites are, for configs that come as JSON.
_COMPOSITES = ("dynamic.config",)


class Composite(abc.ABC):
    """The config of a feature that is made of parts; frozen and hashable, as configs are.

    Attributes:
      given: in words, what is looked up in it.
    """

    given: ClassVar[str]

    @property
    @abc.abstractmethod
    def parts(self) -> Mapping[str, EmbedConfig]:
        """Name of a part -> its config; "" is the one that goes by the feature's own name."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it."""

    @classmethod
    @abc.abstractmethod
    def from_dict(cls, values: Mapping[str, Any], *, devices: Sequence[Any] | None = None) -> Self:
        """The config of which `to_dict` made these values."""


class PartIds(abc.ABC):
    """What is looked up in a composite feature, in place of ids."""

    @abc.abstractmethod
    def by_part(self, config: Any) -> Mapping[str, Array | Bag]:
        """What is looked up in each of the parts of its config."""

    @abc.abstractmethod
    def vectors(self, of_parts: Mapping[str, jax.Array], config: Any) -> jax.Array:
        """The vectors [*shape, features], of those of the parts."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """The tables and projection of another feature, with a partition of one's own.

    Attributes:
      owner: name of the feature that has them.
      partition: id -> rows of theirs; None: the owner's.
      combiner: how the vectors of a bag become one; None: the owner's.
    """

    owner: str
    partition: Partition | None = None
    combiner: str | None = None

    def of(self, config: Any) -> Any:
        """The config, given the owner's."""
        given = {"partition": self.partition, "combiner": self.combiner}
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(config, **changes) if changes else config


Own: TypeAlias = EmbedConfig | Composite


def checked(embeddings: Mapping[Any, Any]) -> dict[str, Own | Shared]:
    """The embeddings of a collection by name, with `Shared` in place of names.

    Raises:
      ValueError: one of them is no config, or shares what it cannot.
    """
    made = {name: Shared(v) if isinstance(v, str) else v for name, v in embeddings.items()}
    for name, value in made.items():
        if not isinstance(name, str):
            raise ValueError(f"embeddings must have names, got {name!r}.")
        own = made.get(value.owner) if isinstance(value, Shared) else value
        if not isinstance(own, Own):
            raise ValueError(
                f"embeddings[{name!r}] must be an EmbedConfig, a qrhash.dynamic.DynamicConfig, or "
                f"the name of a feature that has one, got {value!r}."
            )
        if isinstance(value, Shared):
            _check_shared(name, value, own)
    return made


def _check_shared(name: str, value: Shared, own: Own) -> None:
    if isinstance(own, Composite):
        if value.partition is not None:
            raise ValueError(
                f"embeddings[{name!r}] must share {value.owner!r} without a partition: rows are "
                f"given to its keys, got {value.partition!r}."
            )
        value.of(own)  # raises for another combiner
    elif value.of(own).table_shapes != own.table_shapes:
        raise ValueError(
            f"embeddings[{name!r}] must share tables of the same shapes, {own.table_shapes}, got a "
            f"partition for {value.of(own).table_shapes}."
        )


def part_name(feature: str, part: str) -> str:
    """The name of an ordinary feature that is a part of another."""
    return f"{feature}:{part}" if part else feature


def ordinary(embeddings: Mapping[str, Own | Shared]) -> Iterator[tuple[str, EmbedConfig | Shared]]:
    """The embeddings of a collection, with the parts of composite ones in their places.

    Raises:
      ValueError: a feature has the name of a part of another.
    """
    for name, value in embeddings.items():
        own = embeddings[value.owner] if isinstance(value, Shared) else value
        if not isinstance(own, Composite):
            assert not isinstance(value, Composite)
            yield name, value
            continue
        for part, config in own.parts.items():
            named = part_name(name, part)
            if part and named in embeddings:
                raise ValueError(
                    f"embeddings[{named!r}] must have another name: it is that of a part of "
                    f"{name!r}."
                )
            owner = value.owner if isinstance(value, Shared) else name
            yield named, config if owner == name else Shared(part_name(owner, part))


def ids_of_parts(name: str, given: Any, config: Composite | None) -> dict[str, Any]:
    """What is looked up in the ordinary features that a feature comes down to, by their names.

    Args:
      name: of the feature.
      given: what is looked up in it.
      config: of a composite one.

    Raises:
      ValueError: it is not what such a feature takes.
    """
    if isinstance(given, PartIds) != (config is not None):
        wanted = "ids, as it is not dynamic" if config is None else config.given
        raise ValueError(f"ids[{name!r}] must be {wanted}, got {type(given).__name__}.")
    if not isinstance(given, PartIds):
        return {name: given}
    return {part_name(name, part): each for part, each in given.by_part(config).items()}


def vectors_of_parts(
    name: str, given: Any, config: Composite | None, vectors: Mapping[str, jax.Array]
) -> jax.Array:
    """The vectors of a feature, of those of what `ids_of_parts` gave."""
    if config is None:
        return vectors[name]
    of_parts = {part: vectors[part_name(name, part)] for part in config.parts}
    made: jax.Array = given.vectors(of_parts, config)
    return made


def as_plain(value: Own | Shared) -> Any:
    """One of the embeddings as JSON has it."""
    if isinstance(value, EmbedConfig):
        return value.to_dict()
    if isinstance(value, Composite):
        return {"type": type(value).__name__, **value.to_dict()}
    if value == Shared(value.owner):
        return value.owner
    partition = None if value.partition is None else value.partition.to_dict()
    return {"owner": value.owner, "partition": partition, "combiner": value.combiner}


def from_plain(value: Any, devices: Sequence[Any] | None) -> Own | str | Shared:
    """One of the embeddings, of which `as_plain` made this."""
    if isinstance(value, str):
        return value
    values = as_fields("config", value)
    if "owner" in values:
        of_own = values.get("partition")
        partition = None if of_own is None else Partition.from_dict(of_own)
        return Shared(values["owner"], partition, values.get("combiner"))
    if "type" not in values:
        return EmbedConfig.from_dict(values, devices=devices)
    for room in _COMPOSITES:
        importlib.import_module(f"qrhash.{room}")
    types = {each.__name__: each for each in Composite.__subclasses__()}
    if values["type"] not in types:
        raise ValueError(f"type must be one of {', '.join(types)}, got {values['type']!r}.")
    made: Composite = types[values.pop("type")].from_dict(values, devices=devices)
    return made
