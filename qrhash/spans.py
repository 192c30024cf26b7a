"""Which tables of many features share an array, and where each of them stands in it.

All tables of one width, dtype and kind (large and trained by rows, or small and dense) are put on
top of each other: a stack.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qrhash.arithmetic import INT32_MAX
from qrhash.config import EmbedConfig
from qrhash.layout import MeshLayout


class Span(NamedTuple):
    """Where a table of a feature stands.

    Attributes:
      feature: name of the feature.
      table: number of the table among the feature's.
      offset: its first row in the stack.
      num_rows: its number of rows.
    """

    feature: str
    table: int
    offset: int
    num_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A table made of other tables, on top of each other.

    Attributes:
      name: "large_" or "small_", width and dtype, such as "large_16_float32".
      is_large: whether it is trained by rows: what `qrhash.value_and_grad` asks for.
      width: width of its rows.
      dtype: of its entries.
      axes: axis names of its array, or None, see `EmbedConfig.table_axes`.
      spans: the tables in it, from the first row on.
      layout: how the batch is split over a mesh and, if it is large, the stack.
    """

    name: str
    is_large: bool
    width: int
    dtype: np.dtype
    axes: tuple[Any, ...] | None
    spans: tuple[Span, ...]
    layout: MeshLayout | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, width]."""
        return (self.spans[-1].offset + self.spans[-1].num_rows, self.width)


def stacks_of(owned: Mapping[str, EmbedConfig]) -> Iterator[Stack]:
    """The stacks of features that have tables of their own, given their configs."""
    groups: dict[str, list[tuple[str, int]]] = {}
    sizes: collections.Counter[str] = collections.Counter()
    for name, config in owned.items():
        for j, (rows, width) in enumerate(config.table_shapes):
            kind = "large" if config.large_tables[j] else "small"
            key = base = f"{kind}_{width}_{config.param_dtype.name}"
            # Row numbers are 32 bits wide: what grows beyond that starts another stack.
            for count in itertools.count(2):
                if not sizes[key] or sizes[key] + rows <= INT32_MAX:
                    break
                key = f"{base}_{count}"
            groups.setdefault(key, []).append((name, j))
            sizes[key] += rows
    for key, members in sorted(groups.items()):
        first, j = members[0]
        axes = {owned[name].table_axes(i) for name, i in members}
        layouts = {owned[name].layout for name, _ in members}
        if len(layouts) > 1:
            raise ValueError(
                f"layout must agree for the tables of one stack, {key}, got "
                f"{' and '.join(sorted(map(repr, layouts)))}."
            )
        if len(axes) > 1:
            raise ValueError(
                f"logical_axes must agree for the tables of one stack, {key}, got "
                f"{' and '.join(map(str, sorted(axes, key=str)))}."
            )
        spans, offset = [], 0
        for name, i in members:
            spans.append(Span(name, i, offset, owned[name].partition.num_rows[i]))
            offset += spans[-1].num_rows
        yield Stack(
            name=key,
            is_large=owned[first].large_tables[j],
            width=owned[first].table_shapes[j][1],
            dtype=owned[first].param_dtype,
            axes=axes.pop(),
            spans=tuple(spans),
            layout=layouts.pop(),
        )
