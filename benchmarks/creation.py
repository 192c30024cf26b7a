"""How long it takes to create a table: against the one of Flax, and that of PyTorch.

Every row is drawn from a key of its own, so that it starts the same wherever it is; the peers draw
the table in one go. Times are medians of turns taken one after another, memory included.

    pip install -e '.[bench]' && python benchmarks/creation.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from training_step import limit_processors, machine

import qrhash

FEATURES = 16


def creators(num_rows: int) -> dict[str, Callable[[], object]]:
    """By name, what creates a table of so many rows, of uniform entries."""
    config = qrhash.EmbedConfig(qrhash.FullTable(num_rows), FEATURES)
    limit = 3**0.5 * config.stddev
    uniform = nn.initializers.uniform(2 * limit)
    of_flax = nn.Embed(num_rows, FEATURES, embedding_init=uniform)
    ids = jnp.zeros(1, jnp.int32)

    def of_torch() -> torch.Tensor:
        return torch.nn.init.uniform_(torch.empty(num_rows, FEATURES), -limit, limit)

    return {
        "qrhash": lambda: qrhash.init(jax.random.key(0), config),
        "Flax": jax.jit(lambda: of_flax.init(jax.random.key(0), ids)),
        "PyTorch": of_torch,
    }


def main() -> None:
    """Prints a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="processors")
    given = parser.parse_args()
    limit_processors(given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for num_rows in given.rows:
        seconds = turns(creators(num_rows), given.rounds)
        own = statistics.median(seconds["qrhash"])
        line = [f"{num_rows:>12,} rows: {own:.3f} s"]
        for name in ("Flax", "PyTorch"):
            line.append(f"{name} {statistics.median(seconds[name]) / own:.2f} times as long")
        print(", ".join(line), flush=True)


def turns(create: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after another, behind a first round that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in create}
    for number in range(rounds + 1):
        for name, made in create.items():
            start = time.perf_counter()
            jax.block_until_ready(made())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
