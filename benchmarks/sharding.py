"""What a training step moves between devices, read off the compiled program.

One feature of 4e6 ids in tables of 1e6 rows and of 4, features 16, operation mult, a fixed global
batch. A step is forward, backward and Adagrad update, float32. It is compiled for 2 to 32 pretended
devices, not run: shapes are static, the bytes do not depend on the ids. The large table's rows and
the batch are split over one axis, "data", or the batch over "data" = 2 and the rows over "model".

"reduce" and "all_to_all" are the two exchanges, with touched rows; "overflow" is an "all_to_all"
step with too little room, which goes by "reduce"; "dense" is what XLA's own partitioner makes of a
plain array split by rows, `jax.grad` and optax. In KB, 1000 bytes that one device receives, each
collective a ring. "largest" is the largest operand of one over a shard of the table: from 100% on,
a table or its gradient would be moved. The last columns are distinct rows on the busiest device
over the mean, of 4 batches of Zipf(1.05) rows, split row by row (as here) or in blocks.

"keys" is what travels besides, before the step, where the table is dynamic and the batch is of
keys: to the shards that own them, and row numbers back, by either exchange.

    python benchmarks/sharding.py --devices 2 4 8
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import qrhash

PARTITION = qrhash.QuotientRemainder(4_000_000, 4)
FEATURES = 16

# Bytes received in a group of g devices, for one byte of operands.
RECEIVED: dict[str, Callable[[int], float]] = {
    "all-gather": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program; a collective's opcode is without its -start."""

    opcode: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        fields = r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)"
        return re.findall(r"%([\w.-]+)", " ".join(re.findall(fields, self.attributes)))

    @property
    def group_size(self) -> int:
        """Devices among which a collective runs, of replica_groups in any of three forms."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", self.attributes):
            return listed[1].count(",") + 1
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", self.attributes):
            return int(iota[1])
        by_axes = r"replica_groups=mesh\[(.*?)\] \{((?:'\w+',? ?)+)\}"
        if axes := re.search(by_axes, self.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
            return math.prod(int(sizes[name]) for name in re.findall(r"\w+", axes[2]))
        if self.opcode == "collective-permute":
            return 2
        raise ValueError(f"replica_groups in a form unknown here: {self.attributes}")


class Program:
    """A compiled program, given its text, and the collectives in it."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[Instruction]] = {}
        self._types: dict[str, str] = {}
        self._entry = ""
        instruction = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)")
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                lines = self._computations[header[2]] = []
                self._entry = header[2] if header[1] else self._entry
            elif parts := instruction.match(line):
                self._types[parts[1]] = parts[2]
                operands = re.findall(r"%([\w.-]+)", parts[4])
                attributes = parts[5].split(", metadata=")[0]
                lines.append(Instruction(parts[3].removesuffix("-start"), operands, attributes))

    def received(self, *, overflows: bool = False) -> float:
        """Bytes that one device receives in a step."""
        return self._received(self._entry, overflows)

    def largest_operand(self) -> float:
        """Bytes of the largest operand of a collective, of either exchange."""
        lines = [line for lines in self._computations.values() for line in lines]
        return max(self._operand_bytes(line) for line in lines if line.opcode in RECEIVED)

    def _received(self, computation: str, overflows: bool) -> float:
        """Bytes received in one computation, and in those it calls."""
        total = 0.0
        for line in self._computations[computation]:
            if line.opcode in RECEIVED:
                total += self._operand_bytes(line) * RECEIVED[line.opcode](line.group_size)
            elif line.opcode == "conditional":
                total += max(self._received(b, overflows) for b in self._taken(line, overflows))
            elif not line.opcode.endswith(("-update", "-done")):
                inside = sum(self._received(name, overflows) for name in line.called)
                if inside and line.opcode == "while" and not self._has_loops_by_exchange():
                    raise ValueError(f"collectives in a loop of unknown turns in {computation}")
                total += (
                    inside if line.opcode != "while" or self._is_usual(line) != overflows else 0
                )
        return total

    def _taken(self, line: Instruction, overflows: bool) -> list[str]:
        """The branches with an all-to-all, or on overflow those without; all if none has it."""
        usual = [name for name in line.called if self._has_all_to_all(name)]
        others = [name for name in line.called if name not in usual]
        return others if overflows or not usual else usual

    def _has_loops_by_exchange(self) -> bool:
        """Whether it has loops of one turn or none, one for each exchange, as keys travel."""
        lines = itertools.chain.from_iterable(self._computations.values())
        return any(line.opcode == "while" and self._is_usual(line) for line in lines)

    def _is_usual(self, line: Instruction) -> bool:
        """Whether there is an all-to-all in what it calls."""
        return any(map(self._has_all_to_all, line.called))

    def _has_all_to_all(self, computation: str) -> bool:
        """Whether there is an all-to-all in a computation or in those it calls."""
        return any(
            line.opcode == "all-to-all" or any(map(self._has_all_to_all, line.called))
            for line in self._computations[computation]
        )

    def _operand_bytes(self, line: Instruction) -> float:
        """Bytes of all operands, whose types are like f32[8,16]{1,0}."""
        types = " ".join(self._types[name] for name in line.operands)
        total = 0.0
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            total += bits / 8 * math.prod(int(size) for size in shape.split(",") if size)
        return total


def compiled(mesh: Mesh, batch_size: int, exchange: str | None) -> Program:
    """A training step by touched rows; without an exchange, what JAX does on its own."""
    layout = qrhash.MeshLayout(mesh=mesh, exchange=exchange) if exchange else None
    config = qrhash.EmbedConfig(PARTITION, FEATURES, "mult", layout=layout)

    def loss(tables: Any, ids: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = qrhash.lookup(tables, ids, config)
        return jnp.sum(vectors * cotangent), vectors

    def step(tables: Any, state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        (_, vectors), grads = gradient(tables, *batch)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, vectors

    def place(tree: Any) -> Any:
        if layout:
            return layout.shardings(tree)
        split = {config.table_shapes[0]: PartitionSpec("data")}
        return jax.tree.map(lambda x: NamedSharding(mesh, split.get(x.shape, no_axes)), tree)

    no_axes, tx = PartitionSpec(), optax.adagrad(0.05)
    gradient = jax.value_and_grad(loss, has_aux=True)
    if layout:
        gradient = qrhash.value_and_grad(loss, config.large_tables, has_aux=True)
        tx = qrhash.touched_rows(tx)

    tables = jax.eval_shape(lambda: qrhash.init(jax.random.key(0), config))
    trained = (tables, jax.eval_shape(tx.init, tables))
    ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    cotangent = jax.ShapeDtypeStruct((batch_size, FEATURES), jnp.float32)
    to, batch = place(trained), NamedSharding(mesh, PartitionSpec("data"))
    jitted = jax.jit(
        step, in_shardings=(*to, batch, batch), out_shardings=(*to, batch), donate_argnums=(0, 1)
    )
    text = jitted.lower(*trained, ids, cotangent).compile().as_text()
    assert text is not None
    return Program(text)


def compiled_keys(mesh: Mesh, batch_size: int, exchange: str) -> Program:
    """What a step with keys does first: `qrhash.dynamic.assign`, for a table of as many rows."""
    layout = qrhash.MeshLayout(mesh=mesh, exchange=exchange)
    config = qrhash.dynamic.DynamicConfig(PARTITION.num_rows[0], FEATURES, layout=layout)
    words = jax.ShapeDtypeStruct((batch_size,), jnp.uint32)
    state = jax.eval_shape(lambda: qrhash.dynamic.init_state(config))
    of_shards = NamedSharding(mesh, PartitionSpec(layout.row_axes))
    jitted = jax.jit(
        lambda state, keys: qrhash.dynamic.assign(state, keys, config, 0),
        in_shardings=(of_shards, NamedSharding(mesh, layout.batch_spec(1))),
        donate_argnums=0,
    )
    text = jitted.lower(state, qrhash.Keys(words, words)).compile().as_text()
    assert text is not None
    return Program(text)


def imbalance(devices: int, count: int) -> tuple[float, float]:
    """Distinct rows on the busiest device over the mean: split row by row, and in blocks."""
    num_rows = PARTITION.num_rows[0]
    ends = np.cumsum(np.arange(1, num_rows + 1) ** -1.05)
    draws = np.random.default_rng(0).random(count) * ends[-1]
    rows = np.unique(np.searchsorted(ends, draws, side="right"))
    loads = (np.bincount(owner) for owner in (rows % devices, rows // -(-num_rows // devices)))
    row_by_row, in_blocks = (float(load.max() / load.sum() * devices) for load in loads)
    return row_by_row, in_blocks


def report(devices: int, batch_size: int) -> None:
    """Prints a line for each mesh of so many devices."""
    meshes = {"data": {"data": devices}, "data=2": {"data": 2, "model": devices // 2}}
    for name, sizes in meshes.items():
        kinds = (AxisType.Auto,) * len(sizes)
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
        shard = 4 * FEATURES * PARTITION.num_rows[0] / mesh.devices.shape[-1]
        by_reduce, sent = (compiled(mesh, batch_size, e) for e in ("reduce", "all_to_all"))
        received = (by_reduce.received(), sent.received(), sent.received(overflows=True))
        largest = max(by_reduce.largest_operand(), sent.largest_operand()) / shard
        print(f"{devices:7} {name:8}", *(f"{size / 1e3:10.1f}" for size in received), end="")
        print(f"{received[0] / received[1]:11.2f}x{largest:9.1%}", end="")
        keys = (compiled_keys(mesh, batch_size, e) for e in ("reduce", "all_to_all"))
        print(*(f"{each.received() / 1e3:12.1f}" for each in keys), end="")
        if name == "data":
            dense = compiled(mesh, batch_size, None)
            print(f"{dense.received() / 1e3:11.1f}{dense.largest_operand() / shard:9.1%}", end="")
            row_by_row, in_blocks = imbalance(devices, 4 * batch_size)
            print(f"{row_by_row:12.3f}{in_blocks:11.3f}", end="")
        print(flush=True)


def main() -> None:
    """Prints the table, for each number of devices from a process that has so many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--batch", type=int, default=16384, help="global batch")
    args = parser.parse_args()
    for devices in args.devices:
        if devices < 2 or devices % 2 or args.batch % devices:
            parser.error(f"--devices must be even and divide --batch, got {devices}")

    print(f"jax {jax.__version__}, qrhash {qrhash.__version__}, batch {args.batch}, KB")
    heads = f"{'reduce':>11}{'all_to_all':>11}{'overflow':>11}{'red. / a2a':>12}{'largest':>9}"
    heads += f"{'keys, reduce':>13}{'all_to_all':>13}"
    print(f"devices mesh    {heads}{'dense':>11}{'largest':>9}{'row by row':>12}{'in blocks':>11}")
    spawn = multiprocessing.get_context("spawn")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for devices in args.devices:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
            executor.submit(report, devices, args.batch).result()


if __name__ == "__main__":
    main()
