"""`ReplicatedTable`: a small table that is on every device of a mesh."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

import jax
from jax.sharding import PartitionSpec

from qrhash.layout import MeshLayout
from qrhash.local import LocalTable
from qrhash.protocol import LookUps


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True, eq=False)
class ReplicatedTable(LocalTable):
    """A table that is on every device of a mesh: each reads for its part of the batch.

    Attributes:
      array: [num_rows, width].
      layout: how the batch is split.
    """

    layout: MeshLayout

    def take(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """See `Table`."""
        layout, mine, specs = self._on_mesh(indices, look_ups)

        def on_device(array: jax.Array, indices: Sequence[jax.Array]) -> list[jax.Array]:
            return LocalTable(array).take(indices, mine)

        return layout.run(on_device, (PartitionSpec(), specs), specs)(self.array, list(indices))

    def take_from_many(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """See `Table`."""
        return LocalTable(self.array).take_from_many(indices, look_ups)

    def gradient(
        self, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array], look_ups: LookUps
    ) -> Self:
        """See `Table`: the sum of what the devices have."""
        layout, mine, specs = self._on_mesh(indices, look_ups)
        # On a device no axis is explicit, of which the array's own type may tell.
        table = LocalTable(jax.core.ShapedArray(self.array.shape, self.array.dtype))

        def on_device(indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> jax.Array:
            gradient = table.gradient(indices, cotangents, mine).array
            return jax.lax.psum(gradient, layout.batch_axes) if layout.batch_axes else gradient

        run = layout.run(on_device, (specs, specs), PartitionSpec())
        return self.with_array(run(list(indices), list(cotangents)))

    def _on_mesh(
        self, indices: Sequence[jax.Array], look_ups: LookUps
    ) -> tuple[MeshLayout, LookUps, list[PartitionSpec]]:
        """The layout of these look-ups, what of them a device does, and specs of the indices."""
        axis = look_ups.batch_axis
        layout = self.layout.for_batch(indices, axis)
        specs = [layout.batch_spec(index.ndim, axis) for index in indices]
        return layout, look_ups.over(layout.size(layout.batch_axes)), specs
