"""How the look-ups of a batch go to the stacks of a collection.

It depends on the config and the shapes of the ids alone, and is planned once for each.
"""

import collections
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash.arithmetic import INT32_MAX
from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.kinds import as_table
from qrhash.policies import fill_kind
from qrhash.protocol import LookUps, Segment, Table
from qrhash.rows import device_index, is_within
from qrhash.spans import Span, Stack
from qrhash.stacks import CollectionConfig
from qrhash.take import take
from qrhash.types import Array


class Block(NamedTuple):
    """Look-ups of the features of a group in one of their tables, next to each other in a stack.

    Attributes:
      group: number of the group.
      table: number of the table, of each of its features.
      reads: for each feature its name, and where its table stands in the stack.
    """

    group: int
    table: int
    reads: tuple[tuple[str, Span], ...]


class Plan(NamedTuple):
    """How the look-ups of a batch go to the stacks.

    Attributes:
      groups: names of features that are alike, and are read and combined in one go.
      blocks: stack name -> what is read from it.
    """

    groups: tuple[tuple[str, ...], ...]
    blocks: dict[str, list[Block]]


def plan_for(
    config: CollectionConfig,
    indices: Mapping[str, Sequence[Array]],
    bags: Mapping[str, Bag | None],
) -> Plan:
    """The plan for indices of these features, some of them of bags."""
    configs = config.configs
    kinds = ((name, of[0].shape, _kind(bags[name], configs[name])) for name, of in indices.items())
    return _plan(config, tuple(kinds))


def _kind(bag: Bag | None, config: EmbedConfig) -> tuple[Any, ...] | None:
    """What features of bags must have in common to be pooled in one go."""
    if bag is None:
        return None
    is_weighted = bag.weights is not None
    return bag.shape, bag.length, is_weighted, config.combiner, config.pool_rows


@functools.lru_cache(maxsize=256)
def _plan(config: CollectionConfig, kinds: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Plan:
    """The plan for ids of these features, shapes and kinds of bags."""
    configs, owner_of = config.configs, config.owner_of
    alike: dict[Any, list[str]] = collections.defaultdict(list)
    for name, shape, kind in kinds:
        alike[shape, kind, *_group_of(config, name, configs[name])].append(name)
    groups = tuple(map(tuple, alike.values()))
    blocks: dict[str, list[Block]] = collections.defaultdict(list)
    for number, names in enumerate(groups):
        for table in range(configs[names[0]].num_tables):
            spans = [config.spans[owner_of[name], table] for name in names]
            stack = spans[0][0]  # of all of them
            reads = tuple((name, span) for name, (_, span) in zip(names, spans, strict=True))
            blocks[stack].append(Block(number, table, reads))
    return Plan(groups, dict(blocks))


def _group_of(collection: CollectionConfig, name: str, config: EmbedConfig) -> tuple[Any, ...]:
    """What features must have in common, besides their ids' shape, to be combined in one go."""
    owner = collection.owner_of[name]
    return (
        tuple(collection.spans[owner, table][0] for table in range(config.num_tables)),
        config.operation,
        config.vector_dtype,
        fill_kind(config.id_policy, config.padding_id),
        owner if config.operation == "project" else None,
    )


class Read(NamedTuple):
    """What is read for the features of a group from the stack of one of their tables.

    Attributes:
      table: the stack.
      index: rows of it, [features, *shape].
    """

    table: Table
    index: Any

    @property
    def found(self) -> jax.Array:
        """Which ids have a row, [features, *shape]."""
        return self.index < self.table.shape[0]


def reads_of(
    config: CollectionConfig,
    stacks: Mapping[str, Any],
    plan: Plan,
    indices: Mapping[str, Sequence[Array]],
) -> list[list[Read]]:
    """For each group, what is read for each of its tables."""
    reads: list[dict[int, Read]] = [{} for _ in plan.groups]
    for each in config.stacks:
        table = as_table(stacks[each.name], each.layout)
        for block in plan.blocks.get(each.name, ()):
            reads[block.group][block.table] = Read(table, _in_stack(each, block, indices))
    return [[of_group[table] for table in sorted(of_group)] for of_group in reads]


def _in_stack(stack: Stack, block: Block, indices: Mapping[str, Sequence[Array]]) -> jax.Array:
    """Rows of the stack, [features, *shape], for the indices of a block."""
    num_rows = stack.shape[0]
    dtype = jnp.int32 if num_rows <= INT32_MAX else jnp.int64

    def shifted(index: Array, span: Span) -> jax.Array:
        index = device_index(index, span.num_rows).astype(dtype)
        has_row = is_within(index, span.num_rows)
        return jnp.where(has_row, index + span.offset, num_rows)

    return jnp.stack([shifted(indices[name][block.table], span) for name, span in block.reads])


def gather(
    config: CollectionConfig,
    plan: Plan,
    reads: Sequence[Sequence[Read]],
    *,
    leaving_out: Collection[int],
) -> dict[tuple[int, int], jax.Array]:
    """Rows [features, *shape, width] by group and table: one gather for each stack."""
    rows: dict[tuple[int, int], jax.Array] = {}
    for each in config.stacks:
        of_stack = plan.blocks.get(each.name, ())
        blocks = [block for block in of_stack if block.group not in leaving_out]
        if not blocks:
            continue
        together = [reads[block.group][block.table] for block in blocks]
        segments = tuple(
            Segment(span.offset, span.num_rows, read.index.size // read.index.shape[0])
            for block, read in zip(blocks, together, strict=True)
            for _, span in block.reads
        )
        # [features, batch, ...]: the batch is the second axis.
        look_ups = LookUps(segments=segments, batch_axis=1)
        taken = take(together[0].table, [read.index for read in together], look_ups)
        rows |= {(b.group, b.table): of_block for b, of_block in zip(blocks, taken, strict=True)}
    return rows
