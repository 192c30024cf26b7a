"""One array for many features: their ids as columns, their vectors side by side.

What follows the embeddings of a model mostly takes [batch, sum of the widths]. The vectors of
features that are alike come as one array, and neighbours among them stay together on their way: a
program has one piece for each run of neighbours, and one concatenation of all pieces.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qrhash import tuning
from qrhash.stacks import CollectionConfig
from qrhash.types import Array


def by_feature(ids: Any, config: CollectionConfig) -> Any:
    """The ids by name of their feature, in the order of the config.

    That of a mapping is not kept by `jax.jit`, which sorts the keys of a dictionary it is given:
    vectors in that order would be other ones inside and outside of it.

    Args:
      ids: a mapping of names; or an array [*shape, embeddings], whose columns they are.
      config: the `CollectionConfig`.

    Raises:
      ValueError: an array that has not one column for each of the embeddings, or where one of them
        has keys.
    """
    names = [name for name, _ in config.embeddings]
    if isinstance(ids, Mapping):  # with those that are unknown, to be refused
        return {name: ids[name] for name in names if name in ids} | dict(ids)
    if not isinstance(ids, Array):
        return ids
    configs, composites = config.configs, config.composites
    of_keys = [n for n in names if n in composites or configs[n].partition.takes_keys]
    if of_keys:
        raise ValueError(
            f"ids must be a mapping of feature names where a feature has keys, as {of_keys[0]!r} "
            f"has, got one array of shape {ids.shape}."
        )
    if ids.shape[-1:] != (len(names),):
        raise ValueError(
            f"ids as one array must have shape [*shape, {len(names)}], a column for each of the "
            f"embeddings, got {ids.shape}."
        )
    return {name: ids[..., column] for column, name in enumerate(names)}


def side_by_side(
    groups: Sequence[tuple[Sequence[str], jax.Array]], names: Sequence[str]
) -> jax.Array:
    """The vectors of all features next to each other.

    Args:
      groups: names of features, in their order in `names`, and their vectors [features, *shape,
        width].
      names: of all of them.

    Returns:
      [*shape, sum of the widths], in the order of the names, of the dtype that JAX promotes those
      of the groups to.

    Raises:
      ValueError: the features differ in [*shape].
    """
    _check_shapes(groups)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(vectors.dtype for _, vectors in groups))
    groups = [(of, _with_whole_width(vectors)) for of, vectors in groups]
    pieces = _pieces(groups, names)
    parts = [
        iter(jax.lax.split(vectors.astype(dtype), [size for of, size in pieces if of == group]))
        for group, (_, vectors) in enumerate(groups)
    ]
    in_order = [jnp.moveaxis(next(parts[group]), 0, -2) for group, _ in pieces]
    # Flat at the very end: a loop over features and entries is vectorized, one over both is not.
    blocks = []
    for width, neighbours in itertools.groupby(in_order, lambda part: part.shape[-1]):
        block = jnp.concatenate(list(neighbours), axis=-2)
        blocks.append(block.reshape(*block.shape[:-2], block.shape[-2] * width))
    return jnp.concatenate(blocks, axis=-1)


def _with_whole_width(vectors: jax.Array) -> jax.Array:
    """On explicit axes: the vectors with their width on every device, to be joined with others."""
    sharding = jax.typeof(vectors).sharding
    if sharding.mesh.empty or sharding.spec[-1] is None:
        return vectors
    whole = PartitionSpec(*sharding.spec[:-1], None)
    return jax.sharding.reshard(vectors, NamedSharding(sharding.mesh, whole))


def _pieces(
    groups: Sequence[tuple[Sequence[str], jax.Array]], names: Sequence[str]
) -> list[tuple[int, int]]:
    """Numbers of groups, and how many neighbours of each come next in the order of the names.

    Of vectors of one width there are always several pieces, if of several features: one alone would
    be written by a loop that is not vectorized.
    """
    group_of = {name: number for number, (of, _) in enumerate(groups) for name in of}
    width_of = [vectors.shape[-1] for _, vectors in groups]
    pieces: list[tuple[int, int]] = []
    for _, alike in itertools.groupby(names, lambda name: width_of[group_of[name]]):
        runs = [
            (group, len(list(run))) for group, run in itertools.groupby(alike, group_of.__getitem__)
        ]
        most = tuning.NEIGHBOURS_AT_ONCE
        if len(runs) == 1:
            most = min(most, -(-runs[0][1] // 2))
        pieces += [
            (group, min(most, length - first))
            for group, length in runs
            for first in range(0, length, most)
        ]
    return pieces


def _check_shapes(groups: Sequence[tuple[Sequence[str], jax.Array]]) -> None:
    """Raises a ValueError unless there are vectors, and all features have them of one [*shape]."""
    if not groups:
        raise ValueError("ids must be of at least one feature to be joined, got none.")
    shape_of = {of[0]: vectors.shape[1:-1] for of, vectors in groups}
    first, *others = shape_of
    for name in others:
        if shape_of[name] != shape_of[first]:
            raise ValueError(
                f"ids must have one shape for all features to be joined, got {shape_of[first]} for "
                f"{first!r} and {shape_of[name]} for {name!r}."
            )
