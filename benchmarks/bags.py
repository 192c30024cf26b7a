"""Bags: one training step, and a look-up, of 26 features with ten ids in a bag on average.

A step is forward, backward and Adagrad update, as in `training_step.py`, on fresh bags of
log-uniform ids, of geometric lengths, pooled by a sum. Of the peers FBGEMM pools full tables, one
row for each id: less work for more memory. PyTorch does what qrhash does, with sparse gradients:
gathers from two tables, multiplies, and sums bags by `index_add`. Turns alternate as in
`training_step.py`.

    pip install -e . torch==2.13.0 && pip install --no-deps fbgemm-gpu-cpu==1.8.0
    python benchmarks/bags.py
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from training_step import (
    LEARNING_RATE,
    Comparison,
    Lines,
    System,
    adagrad,
    by_rows,
    command_line,
    cotangents,
    fbgemm_tables,
    has,
    jax_system,
    log_uniform,
    measure,
    report,
    run,
    torch_wait,
)

import qrhash

COLUMNS, BAGS, FEATURES, COLLISIONS = 26, 2048, 16, 4
MEAN_LENGTH = 10
NUM_EMBEDDINGS = 1_000_000
CAPACITY = 22 * 1024  # places for the ids of one feature: 4 standard deviations above the mean


class Bags(NamedTuple):
    """The bags of all columns: ids behind each other, column by column.

    Attributes:
      ids: for each column, [n] of its own.
      lengths: [columns, bags].
    """

    ids: list[np.ndarray]
    lengths: np.ndarray


def bags_of(draws: np.ndarray) -> Bags:
    """Uniform draws [columns, capacity + bags] -> bags."""
    # Geometric from 0 on: the number of failures before a success of chance p.
    p = 1 / (1 + MEAN_LENGTH)
    lengths = np.floor(np.log1p(-draws[:, CAPACITY:]) / np.log1p(-p)).astype(np.int64)
    ids = log_uniform(draws[:, :CAPACITY], NUM_EMBEDDINGS)
    totals = lengths.sum(axis=1)
    return Bags([each[:total] for each, total in zip(ids, totals, strict=True)], lengths)


def qrhash_system(*, forward: bool = False, **options: Any) -> System:
    """A collection of quotient-remainder tables."""
    partition = qrhash.QuotientRemainder(NUM_EMBEDDINGS, COLLISIONS)
    one = qrhash.EmbedConfig(partition, FEATURES, "mult", combiner="sum", **options)
    config = qrhash.CollectionConfig({f"c{column}": one for column in range(COLUMNS)})
    stacks = qrhash.collection.init(jax.random.key(0), config)

    def lookup(stacks: Any, bags: Any) -> jax.Array:
        vectors = qrhash.collection.lookup(stacks, bags, config)
        return jnp.concatenate([vectors[name] for name in config.configs], axis=1)

    def prepare(draws: np.ndarray) -> Any:
        ids, lengths = bags_of(draws)
        made = {
            name: qrhash.Bag.from_ragged(each.astype(np.int32), lengths=of_bags, capacity=CAPACITY)
            for name, each, of_bags in zip(config.configs, ids, lengths, strict=True)
        }
        return jax.block_until_ready(jax.tree.map(jnp.asarray, made))

    if forward:
        return forward_system(lookup, stacks, prepare)

    def loss(stacks: Any, bags: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = lookup(stacks, bags)
        return jnp.sum(vectors * cotangent), vectors

    tx = adagrad()
    update = by_rows(loss, config.large_tables, tx)
    cotangent = cotangents(BAGS, COLUMNS * FEATURES)
    return jax_system(update, stacks, tx.init(stacks), cotangent, prepare)


def forward_system(lookup: Callable[..., Any], stacks: Any, prepare: Callable[..., Any]) -> System:
    """The look-up alone."""
    jitted, vectors = jax.jit(lookup), None

    def step(bags: Any) -> None:
        nonlocal vectors
        vectors = jitted(stacks, bags)

    return System(prepare, step, lambda: jax.block_until_ready(vectors))


def fbgemm_system(*, forward: bool = False) -> System:
    """FBGEMM: full tables of all columns, pooled, the update fused with the backward pass."""
    import torch

    tables = fbgemm_tables([NUM_EMBEDDINGS] * COLUMNS, FEATURES, row_wise=False)
    cotangent = torch.randn(BAGS, COLUMNS * FEATURES) / BAGS

    def prepare(draws: np.ndarray) -> Any:
        ids, lengths = bags_of(draws)
        offsets = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])
        return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets)

    def step(batch: Any) -> None:
        if forward:
            with torch.no_grad():
                tables(*batch)
        else:
            tables(*batch).backward(cotangent)

    return System(prepare, step, torch_wait())


def torch_system(*, forward: bool = False) -> System:
    """PyTorch: what qrhash computes, of stacked tables with sparse gradients."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    quotients = -(-NUM_EMBEDDINGS // COLLISIONS)
    weights = [torch.empty(COLUMNS * rows, FEATURES) for rows in (quotients, COLLISIONS)]
    for weight in weights:
        weight.uniform_(-0.1, 0.1).requires_grad_()
    optimizer = torch.optim.Adagrad(weights, lr=LEARNING_RATE)
    cotangent = torch.randn(COLUMNS * BAGS, FEATURES) / BAGS

    def prepare(draws: np.ndarray) -> Any:
        ids, lengths = bags_of(draws)
        column = np.repeat(np.arange(COLUMNS), lengths.sum(axis=1))
        flat = np.concatenate(ids)
        indices = flat // COLLISIONS + column * quotients, flat % COLLISIONS + column * COLLISIONS
        segments = np.repeat(np.arange(COLUMNS * BAGS), lengths.reshape(-1))
        return tuple(map(torch.from_numpy, (*indices, segments)))

    def lookup(quotient: Any, remainder: Any, segments: Any) -> Any:
        rows = F.embedding(quotient, weights[0], sparse=True)
        rows = rows * F.embedding(remainder, weights[1], sparse=True)
        return torch.zeros(COLUMNS * BAGS, FEATURES).index_add(0, segments, rows)

    def step(batch: Any) -> None:
        if forward:
            with torch.no_grad():
                lookup(*batch)
            return
        optimizer.zero_grad()
        lookup(*batch).backward(cotangent)
        optimizer.step()

    return System(prepare, step, torch_wait())


def compared(rounds: int, *, forward: bool) -> Lines:
    """Everyone that is installed."""
    systems = {"qrhash": qrhash_system(forward=forward)}
    if has("torch"):
        systems["torch"] = torch_system(forward=forward)
    if has("torch") and has("fbgemm_gpu"):
        systems["fbgemm"] = fbgemm_system(forward=forward)
    if forward:
        targets = [Comparison("qrhash", "fbgemm", at_most=3), Comparison("torch", "qrhash")]
    else:
        targets = [
            Comparison("fbgemm", "qrhash", at_least=1.25),
            Comparison("torch", "qrhash", at_least=3.5),
        ]
    systems = {name: dataclasses.replace(each, steps=30) for name, each in systems.items()}
    return report(measure(systems, (COLUMNS, CAPACITY + BAGS), rounds), targets)


def step(rounds: int) -> Lines:
    """A training step."""
    return compared(rounds, forward=False)


def forward(rounds: int) -> Lines:
    """The look-up alone."""
    return compared(rounds, forward=True)


def main() -> None:
    """Measures both, and prints their tables."""
    run({"step": step, "forward": forward}, command_line(__doc__, rounds=5).parse_args())


if __name__ == "__main__":
    main()
