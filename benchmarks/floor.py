"""What a step cannot do without, and how long ours takes beside it.

A step of the scenarios "one" and "criteo" of `training_step.py` has to read the rows of every id
and write its vector, and to read and write every distinct row and its accumulator once, given a
gradient. That is the floor: two loops, compiled by numba, on as many threads, that do this and no
arithmetic to speak of. Which rows are distinct is told them, and nobody sums up gradients. Turns
alternate, and ratios are taken, as in `training_step.py`; beside them stands what one copy of as
many bytes takes, all in one piece.

    pip install -e . "numba>=0.62" && python benchmarks/floor.py
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from training_step import (
    CRITEO_SIZES,
    ONE,
    Comparison,
    Lines,
    System,
    columns,
    command_line,
    copy_bandwidth,
    log_uniform,
    many,
    measure,
    report,
    run,
    single,
)

import qrhash

NONE = -1  # of an id whose column has one table: it has no second row


@functools.cache
def loops() -> tuple[Callable[..., None], Callable[..., None]]:
    """The two loops: over ids, and over distinct rows."""
    import numba

    @numba.njit(parallel=True)
    def look_up(table: Any, first: Any, second: Any, vectors: Any) -> None:
        for n in numba.prange(first.size):
            if second[n] == NONE:
                for c in range(table.shape[1]):
                    vectors[n, c] = table[first[n], c]
            else:
                for c in range(table.shape[1]):
                    vectors[n, c] = table[first[n], c] * table[second[n], c]

    @numba.njit(parallel=True)
    def update(table: Any, accumulators: Any, distinct: Any, gradients: Any) -> None:
        for n in numba.prange(distinct.size):
            row, last = distinct[n], accumulators.shape[1] - 1
            for c in range(table.shape[1]):
                accumulators[row, min(c, last)] += gradients[n, c]
                table[row, c] += gradients[n, c]

    return look_up, update


def floor(configs: Sequence[qrhash.EmbedConfig], batch: int, *, row_wise: bool = False) -> System:
    """The loops on the tables of some columns, all in one array."""
    import numba

    numba.set_num_threads(len(os.sched_getaffinity(0)))
    width = configs[0].features
    heights = [config.partition.num_rows for config in configs]
    starts = np.cumsum([0, *(rows for of_column in heights for rows in of_column)])
    table = np.ones((starts[-1], width), np.float32)
    accumulators = np.ones((starts[-1], 1 if row_wise else width), np.float32)
    vectors = np.ones((len(configs) * batch, width), np.float32)
    gradients = np.full((2 * len(vectors), width), 1e-9, np.float32)
    look_up, update = loops()

    def prepare(draws: np.ndarray) -> tuple[np.ndarray, ...]:
        offsets, first, second = iter(starts), [], []
        for config, of_column in zip(configs, np.atleast_2d(draws), strict=True):
            ids = log_uniform(of_column, config.num_embeddings)
            rows = [index + next(offsets) for index in config.partition.indices(ids)]
            first.append(rows[0])
            second.append(rows[1] if len(rows) > 1 else np.full(batch, NONE))
        both = [np.concatenate(each).astype(np.int32) for each in (first, second)]
        named = np.unique(np.concatenate(both))
        return *both, named[named != NONE]

    def step(of_batch: tuple[np.ndarray, ...]) -> None:
        *both, distinct = of_batch
        look_up(table, *both, vectors)
        update(table, accumulators, distinct, gradients)

    return System(prepare, step, lambda: None)


def compared(
    ours: dict[str, System], configs: Sequence[qrhash.EmbedConfig], shape: Any, rounds: int
) -> Lines:
    """Our steps over the floor."""
    batch = shape[-1]
    systems = ours | {
        "floor": floor(configs, batch),
        "floor row-wise": floor(configs, batch, row_wise=True),
    }
    targets = [
        Comparison("qrhash", "floor", at_most=2),
        Comparison("qrhash row-wise", "floor row-wise", at_most=2),
    ]
    lines = report(measure(systems, shape, rounds), targets)
    *_, distinct = systems["floor"].prepare(np.random.default_rng(0).random(shape))
    width, ids = configs[0].features, len(configs) * batch
    moved = 4 * width * (4 * len(distinct) + 2 * ids)
    copied = moved / copy_bandwidth()
    print(f"{ids} ids, {len(distinct)} distinct rows, {moved / 1e6:.1f} MB: ", end="")
    print(f"a copy of as many bytes takes {copied * 1e3:.2f} ms")
    return [*lines, {"bytes": moved, "copy_ms": copied * 1e3}]


def one(rounds: int) -> Lines:
    """One feature of 1e7 ids, 4 collisions."""
    batch = 16384
    ours = {"qrhash": single(ONE, batch), "qrhash row-wise": single(ONE, batch, row_wise=True)}
    return compared(ours, [ONE], (batch,), rounds)


def criteo(rounds: int) -> Lines:
    """The 26 Criteo columns."""
    batch = 2048
    config = columns(CRITEO_SIZES, 4, 16)
    ours = {"qrhash": many(config, batch), "qrhash row-wise": many(config, batch, row_wise=True)}
    return compared(ours, list(config.configs.values()), (len(CRITEO_SIZES), batch), rounds)


def main() -> None:
    """Measures both, and prints their tables."""
    if jax.default_backend() != "cpu":
        raise SystemExit("floor.py measures the CPU: on an accelerator a copy is the floor.")
    run({"one": one, "criteo": criteo}, command_line(__doc__, rounds=10).parse_args())


if __name__ == "__main__":
    main()
