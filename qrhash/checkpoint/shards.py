"""Tables that grow, saved on one number of shards and restored on another.

A file holds of the index of keys a part for each shard. Where the tree to be restored has another
number of them, the parts are read onto the host and dealt anew (`qrhash.dynamic.reshard`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qrhash.checkpoint.leaves import put, signature
from qrhash.checkpoint.metadata import compare
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.embedding import State
from qrhash.dynamic.newcomers import Admission
from qrhash.dynamic.resharding import deal
from qrhash.stacks import CollectionConfig
from qrhash.types import PyTree


class Moved(NamedTuple):
    """Which key has which row, of a table whose index a file holds on another number of shards.

    Attributes:
      state: the `State` of the tree.
      names: those of its leaves, a `State` too.
      names_in_file: those of the leaves that the file holds, a `State` too.
      in_file: by these names arrays of no memory, of the shapes and dtypes in the file.
      admission: the admission of the table.
    """

    state: State
    names: State
    names_in_file: State
    in_file: dict[str, np.ndarray]
    admission: Admission

    @property
    def names_in_tree(self) -> list[str]:
        """Those of the leaves of the tree."""
        return jax.tree.leaves(self.names)

    def dealt(self, where: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of the tree by name, made of those that were read from a file."""
        in_file = jax.tree.map(lambda name: arrays[name], self.names_in_file)
        made = deal(in_file, _num_shards(self.state.index.counts.shape), self.admission)
        ours, theirs = (
            dict(zip(self.names_in_tree, jax.tree.leaves(each), strict=True))
            for each in (self.state, made)
        )
        forms = ({name: signature(leaf) for name, leaf in x.items()} for x in (theirs, ours))
        compare(where, "array", *forms)
        return {name: put(leaf, theirs[name]) for name, leaf in ours.items()}


def admissions_of(config: Any) -> list[Admission]:
    """Those of the tables that grow among a model's configs."""
    if isinstance(config, CollectionConfig):
        config = dict(config.embeddings)
    configs = config.values() if isinstance(config, Mapping) else [config]
    return [each.admission for each in configs if isinstance(each, DynamicConfig)]


def moved_states(
    tree: PyTree, saved: Mapping[str, Any], admissions: Sequence[Admission]
) -> list[Moved]:
    """The states of a tree that a file holds on another number of shards.

    Args:
      tree: the tree to be restored.
      saved: name -> shape and dtype of each array of the file.
      admissions: those of the tables.
    """
    is_state = lambda node: isinstance(node, State)  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state)
    made = (_moved(path, node, saved, admissions) for path, node in nodes if is_state(node))
    return [each for each in made if each is not None]


def _moved(
    path: Any, state: State, saved: Mapping[str, Any], admissions: Sequence[Admission]
) -> Moved | None:
    names = _names(path, state)
    in_file = _names(path, dataclasses.replace(state, home=0))
    if in_file.home not in saved:
        in_file = dataclasses.replace(in_file, home=None)
    counts = saved.get(names.index.counts)
    wanted = _num_shards(state.index.counts.shape)
    if counts is None or _num_shards(counts["shape"]) == wanted:
        return None
    for admission in admissions:
        if _forms(state.admission) == _forms(_start(admission, wanted)):
            forms = {name: saved[name] for name in jax.tree.leaves(in_file) if name in saved}
            arrays = {
                name: np.broadcast_to(np.zeros((), form["dtype"]), form["shape"])
                for name, form in forms.items()
            }
            return Moved(state, names, in_file, arrays, admission)
    return None


def _names(path: Any, state: State) -> State:
    """The names of its leaves in the file."""

    def name(inside: Any, _: Any) -> str:
        return jax.tree_util.keystr((*path, *inside), simple=True, separator=".")

    named: State = jax.tree_util.tree_map_with_path(name, state)
    return named


def _num_shards(shape: Sequence[int]) -> int | None:
    """Over how many shards an index is split, whose counts are of this shape; None: over none."""
    return shape[0] if len(shape) > 1 else None


def _start(admission: Admission, num_shards: int | None) -> PyTree:
    """What it keeps at the start, as shapes."""
    if num_shards is None:
        return jax.eval_shape(admission.init)
    one = jax.eval_shape(admission.split(num_shards).init)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((num_shards, *leaf.shape), leaf.dtype), one
    )


def _forms(tree: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
