"""What a gather of rows costs on its own, and in one kernel with arithmetic on them.

For rows of several widths, from a table of 128 MB: nanoseconds a row to gather 65,536 random ones,
to gather them and add one to every entry, and to look them up by `qrhash.lookup`, as one compiled
program each.

    pip install -e . && python benchmarks/gathers.py
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import qrhash

ROWS = 65_536
ENTRIES = 32_000_000  # of the table


def gathered(table: jax.Array, index: jax.Array) -> jax.Array:
    """The rows."""
    return table.at[index].get(mode="promise_in_bounds")


def gathered_and_added(table: jax.Array, index: jax.Array) -> jax.Array:
    """The rows plus one."""
    return gathered(table, index) + 1


def looked_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """The vectors of a full table's ids."""
    config = qrhash.EmbedConfig(qrhash.FullTable(len(table)), table.shape[1])
    return qrhash.lookup((table,), index, config)


def nanoseconds(
    fun: Callable[..., jax.Array], table: jax.Array, rounds: int, rng: np.random.Generator
) -> float:
    """The median for a row; every round with other rows."""
    jitted, seconds = jax.jit(fun), []
    for _ in range(rounds + 1):
        index = jax.block_until_ready(jnp.asarray(rng.integers(0, len(table), ROWS), jnp.int32))
        start = time.perf_counter()
        jitted(table, index).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])) / ROWS * 1e9  # the first one compiles


def main() -> None:
    """Prints a line for each width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 24, 32, 48, 64, 96, 128])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, nanoseconds a row")
    print(f"{'width':>5}{'gathered':>12}{'and added':>12}{'looked up':>12}")
    for width in args.widths:
        table = jnp.zeros((ENTRIES // width, width)) + 1
        print(f"{width:5}", end="", flush=True)
        for fun in (gathered, gathered_and_added, looked_up):
            print(f"{nanoseconds(fun, table, args.rounds, rng):12.1f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
