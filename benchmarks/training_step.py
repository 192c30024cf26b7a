"""One training step of the embedding part against its peers, side by side in one run.

A step is forward, backward and Adagrad update of the tables, float32, on fresh log-uniform ids: it
gives the vectors, and takes their gradient, fixed random numbers, back from there. The turns
alternate in blocks, each after a pause and some steps that do not count: threads of other
libraries spin for a while after their work, and caches must settle, which takes qrhash about ten
steps and the peers one or two; a training has thousands. Times are medians over all
counted steps; a ratio is the median over rounds of the ratio of two block medians. Everyone gets
`--threads` processors, each scenario a fresh process. On a machine that is busy with other things
the figures mean little. Two processors of a virtual machine may for a while be one of the host's:
what needs both takes twice as long then. A block before or after which that is so, by a loop that
runs on one of them and then on both, is measured again, up to four times; how often is printed.

    pip install -e . torch==2.13.0 && pip install --no-deps fbgemm-gpu-cpu==1.8.0
    python benchmarks/training_step.py --scenario one criteo

The scenarios:

  one        one feature of 1e7 ids, 4 collisions: 2.5M + 4 rows
  criteo     the 26 Criteo columns, those with more than 200 ids at 4 collisions
  square     one feature of 1e8 ids in two tables of 10,000 rows
  growth     full tables of 1e5 to 5e7 rows: a step's time must not depend on the rows
  memory     peak memory of creating and training one full table of 5e7 rows
  remainder  the gradient alone: a table of 4 rows against one of 1e6 rows
  narrow     a table of 1e6 rows of bfloat16: rounded by chance against rounded to the nearest
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qrhash

CRITEO_SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
CRITEO_THRESHOLD = 200
ONE = qrhash.EmbedConfig(qrhash.QuotientRemainder(10_000_000, 4), 64, "mult")
LEARNING_RATE = 0.05
INITIAL_ACCUMULATOR = 1e-8
STEPS, UNCOUNTED = 40, 12
PAUSE = 0.3  # seconds
MOST_REPEATED = 4
INSTALL = {
    "torch": "pip install torch==2.13.0",
    "fbgemm_gpu": "pip install --no-deps fbgemm-gpu-cpu==1.8.0",
}

Lines = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class System:
    """One library's tables and optimizer, and its training step.

    Attributes:
      prepare: turns uniform draws, [batch] or [columns, batch], into the ids that a step takes.
        Not timed.
      step: runs a training step, or starts it.
      wait: returns when all steps that were started are done.
      steps: steps in a block.
    """

    prepare: Callable[[np.ndarray], Any]
    step: Callable[[Any], None]
    wait: Callable[[], Any]
    steps: int = STEPS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A system's time over another's, and the bound that ratio is held to, if any."""

    system: str
    over: str
    at_least: float | None = None
    at_most: float | None = None


# Measuring


def log_uniform(draws: np.ndarray, num_embeddings: int | np.ndarray) -> np.ndarray:
    """Uniform draws from [0, 1) -> int64 ids, log-uniform in [0, num_embeddings)."""
    ids = np.exp(draws * np.log1p(num_embeddings)).astype(np.int64) - 1
    return np.minimum(ids, num_embeddings - 1)


def measure(systems: Mapping[str, System], shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds of every counted step of every system, [rounds, steps], their blocks interleaved."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[list[float]]] = {name: [] for name in systems}
    repeated = 0
    for _ in range(rounds):
        draws = rng.random((STEPS, *shape))
        for name, system in systems.items():
            of_block, repeats = block(system, draws[: system.steps])
            seconds[name].append(of_block)
            repeated += repeats
    if repeated:
        print(f"{repeated} blocks not counted: the processors were not apart")
    return {name: np.array(blocks) for name, blocks in seconds.items()}


def block(system: System, draws: np.ndarray) -> tuple[list[float], int]:
    """Seconds of the counted steps of a block, and how many blocks before it do not count.

    Before and after one that counts the processors are apart, unless it is the last that is tried.
    """
    batches = [system.prepare(draw) for draw in draws]
    system.wait()
    for repeats in itertools.count():
        time.sleep(PAUSE)
        were_apart = processors_are_apart()
        seconds = seconds_of(system, batches)[UNCOUNTED:]
        time.sleep(PAUSE)
        if repeats == MOST_REPEATED or (were_apart and processors_are_apart()):
            break
    return seconds, repeats


def processors_are_apart() -> bool:
    """Whether two threads take about as long as one alone for the same work each."""
    if len(os.sched_getaffinity(0)) < 2:
        return True
    entries = np.ones(50_000, np.float32)  # they stay in a cache of the processor's own

    def work(_: int) -> None:
        own = entries.copy()
        for _ in range(20):
            np.sqrt(own, out=own)

    def seconds(threads: int) -> float:
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
        return time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        alone, together = (min(seconds(threads) for _ in range(5)) for threads in (1, 2))
    return together < 1.5 * alone


def seconds_of(system: System, batches: Sequence[Any]) -> list[float]:
    """Of each step."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        system.step(batch)
        system.wait()
        seconds.append(time.perf_counter() - start)
    return seconds


def report(seconds: Mapping[str, np.ndarray], comparisons: Sequence[Comparison]) -> Lines:
    """Prints a scenario's table, and returns its lines."""
    print(f"{'':16}{'median ms':>10}{'block medians':>18}  {'ratio':42}target")
    compared = {comparison.system: comparison for comparison in comparisons}
    lines = []
    for name, steps in seconds.items():
        milliseconds = np.median(steps, axis=1) * 1e3
        line: dict[str, Any] = {"system": name, "median_ms": float(np.median(steps)) * 1e3}
        line["block_medians_ms"] = milliseconds.tolist()
        span = f"{milliseconds.min():.2f} to {milliseconds.max():.2f}"
        print(f"{name:16}{line['median_ms']:10.2f}{span:>18}", end="")
        if name in compared and compared[name].over in seconds:
            line |= compare(seconds, compared[name])
        print()
        lines.append(line)
    return lines


def compare(seconds: Mapping[str, np.ndarray], comparison: Comparison) -> dict[str, Any]:
    """Prints the ratio of two systems' times over the rounds, and its target."""
    times, others = seconds[comparison.system], seconds[comparison.over]
    ratios = np.median(times, axis=1) / np.median(others, axis=1)
    low, ratio, high = (float(x) for x in np.percentile(ratios, [0, 50, 100]))
    span = f"{ratio:.2f}x {comparison.over} ({low:.2f}-{high:.2f})"
    print(f"  {span:42}{verdict(ratio, comparison)}", end="")
    return {"ratio": ratio, "lowest": low, "highest": high} | dataclasses.asdict(comparison)


def verdict(ratio: float, target: Comparison) -> str:
    """A target in words, and whether it is met."""
    if target.at_least is not None:
        met, words = ratio >= target.at_least, f"at least {target.at_least:g}x"
    elif target.at_most is not None:
        met, words = ratio <= target.at_most, f"at most {target.at_most:g}x"
    else:
        return ""
    return f"{words}: {'met' if met else 'MISSED'}"


# qrhash, and dense optax


def jax_system(
    update: Callable[..., tuple[Any, Any, jax.Array]],
    tables: Any,
    state: Any,
    cotangent: Any,
    prepare: Callable[[np.ndarray], Any],
    steps: int = STEPS,
) -> System:
    """A system of `update(tables, state, ids, cotangent) -> (tables, state, vectors)`, jitted."""
    jitted = jax.jit(update, donate_argnums=(0, 1))
    carry = (tables, state, jnp.zeros(()))

    def step(ids: Any) -> None:
        nonlocal carry
        carry = jitted(*carry[:2], ids, cotangent)

    return System(prepare, step, lambda: jax.block_until_ready(carry), steps)


def by_rows(
    loss: Callable[..., Any], large_tables: Any, tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """A training step with qrhash: large tables get gradients and updates of touched rows."""
    value_and_grad = qrhash.value_and_grad(loss, large_tables, has_aux=True)

    def update(tables: Any, state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        (_, vectors), grads = value_and_grad(tables, *batch)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, vectors

    return update


def adagrad(row_wise: bool = False) -> optax.GradientTransformation:
    """Adagrad of touched rows, with one accumulator per entry or per row."""
    make = qrhash.rowwise_adagrad if row_wise else optax.adagrad
    return qrhash.touched_rows(make(LEARNING_RATE, initial_accumulator_value=INITIAL_ACCUMULATOR))


def single(
    config: qrhash.EmbedConfig,
    batch_size: int,
    *,
    row_wise: bool = False,
    tx: optax.GradientTransformation | None = None,
) -> System:
    """Qrhash on one feature."""
    tx = adagrad(row_wise) if tx is None else tx
    tables = qrhash.init(jax.random.key(0), config)
    update = by_rows(single_loss(config), config.large_tables, tx)
    cotangent = cotangents(batch_size, config.features)
    return jax_system(update, tables, tx.init(tables), cotangent, single_ids(config))


def dense_optax(config: qrhash.EmbedConfig, batch_size: int) -> System:
    """What JAX does on its own: `jax.grad` through the look-up, and optax on whole tables."""
    tx = optax.adagrad(LEARNING_RATE, initial_accumulator_value=INITIAL_ACCUMULATOR)
    tables = qrhash.init(jax.random.key(0), config)
    grad = jax.grad(single_loss(config), has_aux=True)

    def update(tables: Any, state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        grads, vectors = grad(tables, *batch)
        updates, state = tx.update(grads, state, tables)
        return optax.apply_updates(tables, updates), state, vectors

    cotangent = cotangents(batch_size, config.features)
    state = tx.init(tables)
    return jax_system(update, tables, state, cotangent, single_ids(config), steps=UNCOUNTED + 2)


def many(config: Any, batch_size: int, *, row_wise: bool = False) -> System:
    """Qrhash on a collection of features."""
    tx = adagrad(row_wise)
    stacks = qrhash.collection.init(jax.random.key(0), config)
    names = list(config.configs)
    sizes = np.array([config.configs[name].num_embeddings for name in names])

    def loss(stacks: Any, ids: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_features = dict(zip(names, ids, strict=True))
        vectors = qrhash.collection.lookup_joined(stacks, of_features, config)
        return jnp.sum(vectors * cotangent), vectors

    def prepare(draws: np.ndarray) -> jax.Array:
        return jax.block_until_ready(jnp.asarray(log_uniform(draws, sizes[:, None]), jnp.int32))

    cotangent = cotangents(batch_size, sum(each.features for each in config.configs.values()))
    update = by_rows(loss, config.large_tables, tx)
    return jax_system(update, stacks, tx.init(stacks), cotangent, prepare)


def gradient(config: qrhash.EmbedConfig, batch_size: int) -> System:
    """Qrhash on one feature of one table: its gradient, duplicates merged, and no more."""
    tables = qrhash.init(jax.random.key(0), config)
    cotangent = cotangents(batch_size, config.features)

    @jax.jit
    def backward(tables: Any, ids: jax.Array, cotangent: jax.Array) -> Any:
        gradient = qrhash.value_and_grad(single_loss(config), config.large_tables, has_aux=True)
        _, (grad,) = gradient(tables, ids, cotangent)
        return grad.merge() if isinstance(grad, qrhash.RowGrads) else grad

    grad = None

    def step(ids: jax.Array) -> None:
        nonlocal grad
        grad = backward(tables, ids, cotangent)

    return System(single_ids(config), step, lambda: jax.block_until_ready(grad))


def single_loss(config: qrhash.EmbedConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A function of tables and ids with the gradient given, and the vectors beside.

    Its value, which nobody asks for, is not computed.
    """

    def loss(tables: Any, ids: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = qrhash.lookup(tables, ids, config)
        return jnp.sum(vectors * cotangent), vectors

    return loss


def single_ids(config: qrhash.EmbedConfig) -> Callable[[np.ndarray], jax.Array]:
    """What turns draws into a batch of one feature's ids on the device."""

    def prepare(draws: np.ndarray) -> jax.Array:
        ids = log_uniform(draws, config.num_embeddings)
        return jax.block_until_ready(jnp.asarray(ids, jnp.int32))

    return prepare


def cotangents(batch_size: int, features: int) -> jax.Array:
    """The gradient of the vectors, [batch, features]."""
    return jax.random.normal(jax.random.key(0), (batch_size, features)) / batch_size


# PyTorch and FBGEMM


@functools.cache
def has(module: str) -> bool:
    """Whether a peer can be measured here; if not, prints why, once."""
    if importlib.util.find_spec(module) is None:
        print(f"skipping {module}: not installed, try: {INSTALL[module]}")
        return False
    on_cpu = jax.default_backend() == "cpu"
    if module == "torch" and not on_cpu and not importlib.import_module(module).cuda.is_available():
        print("skipping torch: it finds no GPU, and JAX computes on one")
        return False
    if module == "fbgemm_gpu" and not on_cpu:
        print("skipping fbgemm_gpu: the build compared with is the one for the CPU")
        return False
    return True


def torch_device() -> str:
    """PyTorch's name of the device that JAX computes on."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def torch_wait() -> Callable[[], None]:
    """What waits for PyTorch: on the CPU it has always finished."""
    import torch

    return torch.cuda.synchronize if torch_device() == "cuda" else lambda: None


def torch_adagrad(config: qrhash.EmbedConfig, batch_size: int) -> System:
    """PyTorch: sparse gradients of `F.embedding` on id // m and id % m, `torch.optim.Adagrad`."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    device, collisions = torch_device(), config.partition.num_rows[1]
    weights = [torch.empty(*shape, device=device) for shape in config.table_shapes]
    for weight in weights:
        weight.uniform_(-0.1, 0.1).requires_grad_()
    optimizer = torch.optim.Adagrad(weights, lr=LEARNING_RATE)
    cotangent = torch.randn(batch_size, config.features, device=device) / batch_size

    def step(ids: Any) -> None:
        optimizer.zero_grad()
        quotient = F.embedding(ids // collisions, weights[0], sparse=True)
        remainder = F.embedding(ids % collisions, weights[1], sparse=True)
        (quotient * remainder).backward(cotangent)
        optimizer.step()

    def prepare(draws: np.ndarray) -> Any:
        return torch.from_numpy(log_uniform(draws, config.num_embeddings)).to(device)

    return System(prepare, step, torch_wait())


def fbgemm(
    sizes: Sequence[int],
    collisions: int,
    features: int,
    batch_size: int,
    *,
    threshold: int = 0,
    row_wise: bool = False,
) -> System:
    """FBGEMM: one table-batched embedding of all tables, its update fused with the backward pass.

    Its tables are the quotients of all columns with more ids than the threshold, then their
    remainders, then the full tables of the other columns. The ids come in that order, so that
    a step needs slices only to find the two factors.
    """
    import torch

    split = np.array([size for size in sizes if size > threshold])
    full = np.array([size for size in sizes if size <= threshold], np.int64)
    rows = [*(-(-split // collisions)).tolist(), *[collisions] * len(split), *full.tolist()]
    tables = fbgemm_tables(rows, features, row_wise)
    offsets = torch.arange(len(rows) * batch_size + 1)
    columns, width = len(split), len(split) * features
    factor_cotangent = torch.randn(batch_size, width) / batch_size
    full_cotangent = torch.randn(batch_size, len(full) * features) / batch_size

    def step(ids: Any) -> None:
        parts = [ids[:columns] // collisions, ids[:columns] % collisions, ids[columns:]]
        out = tables(torch.cat(parts).view(-1), offsets)
        vectors = [out[:, :width] * out[:, width : 2 * width], out[:, 2 * width :]]
        torch.autograd.backward(vectors, [factor_cotangent, full_cotangent])

    ordered = np.concatenate([split, full])[:, None]
    return System(lambda draws: torch.from_numpy(log_uniform(draws, ordered)), step, torch_wait())


def fbgemm_tables(rows: Sequence[int], features: int, row_wise: bool) -> Any:
    """FBGEMM's embedding of several tables with exact Adagrad, per entry or per row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
        from fbgemm_gpu.split_embedding_configs import EmbOptimType

    place = (training.EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    exact, exact_row_wise = EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD
    tables = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(count, features, *place) for count in rows],
        optimizer=exact_row_wise if row_wise else exact,
        learning_rate=LEARNING_RATE,
        eps=1e-8,
    )
    tables.init_embedding_weights_uniform(-0.1, 0.1)
    # Fresh zeros are not in memory until written: the first steps would pay for the page faults.
    for state in tables.split_optimizer_states():
        state[0].zero_()
    return tables


# Scenarios


def one(rounds: int) -> Lines:
    """One feature of 1e7 ids, 4 collisions."""
    batch_size = 16384
    systems = {
        "qrhash": single(ONE, batch_size),
        "qrhash row-wise": single(ONE, batch_size, row_wise=True),
        "optax, dense": dense_optax(ONE, batch_size),
    }
    if has("torch"):
        systems["torch"] = torch_adagrad(ONE, batch_size)
    if has("torch") and has("fbgemm_gpu"):
        column = ([ONE.num_embeddings], ONE.partition.num_rows[1], ONE.features, batch_size)
        systems["fbgemm"] = fbgemm(*column)
        systems["fbgemm row-wise"] = fbgemm(*column, row_wise=True)
    comparisons = [
        Comparison("optax, dense", "qrhash", at_least=40),
        Comparison("torch", "qrhash", at_least=2.5),
        Comparison("fbgemm", "qrhash", at_least=3),
        Comparison("fbgemm row-wise", "qrhash row-wise", at_least=2.5),
    ]
    lines = report(measure(systems, (batch_size,), rounds), comparisons)
    return [*lines, bandwidth(systems["qrhash"], ONE, batch_size)]


def columns(
    sizes: Sequence[int], collisions: int, features: int, **options: Any
) -> qrhash.CollectionConfig:
    """Columns of vocabularies of these sizes, those beyond the threshold at so many collisions."""
    configs = {}
    for column, size in enumerate(sizes):
        partition: qrhash.Partition = qrhash.FullTable(size)
        if size > CRITEO_THRESHOLD:
            partition = qrhash.QuotientRemainder(size, collisions)
        configs[f"c{column + 1}"] = qrhash.EmbedConfig(partition, features, "mult", **options)
    return qrhash.CollectionConfig(configs)


def criteo(rounds: int) -> Lines:
    """The 26 Criteo columns."""
    collisions, features, batch_size = 4, 16, 2048
    config = columns(CRITEO_SIZES, collisions, features)
    systems = {
        "qrhash": many(config, batch_size),
        "qrhash row-wise": many(config, batch_size, row_wise=True),
    }
    if has("torch") and has("fbgemm_gpu"):
        same = (CRITEO_SIZES, collisions, features, batch_size)
        systems["fbgemm"] = fbgemm(*same, threshold=CRITEO_THRESHOLD)
        systems["fbgemm row-wise"] = fbgemm(*same, threshold=CRITEO_THRESHOLD, row_wise=True)
    comparisons = [
        Comparison("fbgemm", "qrhash", at_least=3),
        Comparison("fbgemm row-wise", "qrhash row-wise", at_least=2),
    ]
    return report(measure(systems, (len(CRITEO_SIZES), batch_size), rounds), comparisons)


def square(rounds: int) -> Lines:
    """One feature of 1e8 ids in two tables of 10,000 rows."""
    batch_size = 16384
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(10**8, 10**4), 64, "mult")
    systems = {"qrhash": single(config, batch_size)}
    if has("torch"):
        systems["torch"] = torch_adagrad(config, batch_size)
    comparisons = [Comparison("torch", "qrhash", at_least=2.5)]
    return report(measure(systems, (batch_size,), rounds), comparisons)


def growth(rounds: int) -> Lines:
    """Full tables of 1e5 to 5e7 rows, features 16."""
    batch_size = 16384
    sizes = {"1e5 rows": 10**5, "1e6 rows": 10**6, "1e7 rows": 10**7, "5e7 rows": 5 * 10**7}
    systems = {
        name: single(qrhash.EmbedConfig(qrhash.FullTable(size), 16), batch_size)
        for name, size in sizes.items()
    }
    comparisons = [
        Comparison("1e5 rows", "1e6 rows"),
        Comparison("1e7 rows", "1e6 rows"),
        Comparison("5e7 rows", "1e6 rows", at_most=2),
    ]
    return report(measure(systems, (batch_size,), rounds), comparisons)


def memory(rounds: int) -> Lines:
    """Peak memory of a process that creates and trains one table of 5e7 rows, features 16."""
    del rounds  # A peak is a peak.
    rows, features, batch_size = 5 * 10**7, 16, 16384
    system = single(qrhash.EmbedConfig(qrhash.FullTable(rows), features), batch_size)
    rng = np.random.default_rng(0)
    for _ in range(20):
        system.step(system.prepare(rng.random(batch_size)))
    system.wait()
    peak = peak_memory()
    limit = 1.15 * (2 * 4 * rows * features + 10**9)
    target = Comparison("peak memory", "limit", at_most=1)
    ratio = peak / limit
    print(f"peak {peak / 1e9:.2f} GB of {limit / 1e9:.2f} GB: {ratio:.2f}x, ", end="")
    print(verdict(ratio, target))
    return [{"peak_bytes": peak, "limit_bytes": limit, "ratio": ratio}]


def remainder(rounds: int) -> Lines:
    """The gradient of a look-up in 4 rows against one in 1e6 rows, of the same ids."""
    batch_size, size = 16384, 10**6
    partitions = {"4 rows": qrhash.HashTrick(size, 4), "1e6 rows": qrhash.FullTable(size)}
    systems = {
        name: gradient(qrhash.EmbedConfig(partition, 64), batch_size)
        for name, partition in partitions.items()
    }
    comparisons = [Comparison("4 rows", "1e6 rows", at_most=2)]
    return report(measure(systems, (batch_size,), rounds), comparisons)


def narrow(rounds: int) -> Lines:
    """A full table of 1e6 rows, features 64, by qrhash's own Adagrad."""
    batch_size, full = 16384, qrhash.FullTable(10**6)
    config = qrhash.EmbedConfig(full, 64, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    plain = qrhash.adagrad(LEARNING_RATE, initial_accumulator_value=INITIAL_ACCUMULATOR)
    by_chance = optax.chain(plain, qrhash.stochastic_rounding())
    systems = {
        "float32": single(qrhash.EmbedConfig(full, 64), batch_size, tx=qrhash.touched_rows(plain)),
        "to the nearest": single(config, batch_size, tx=qrhash.touched_rows(plain)),
        "by chance": single(config, batch_size, tx=qrhash.touched_rows(by_chance)),
    }
    comparisons = [
        Comparison("by chance", "to the nearest", at_most=1.1),
        Comparison("to the nearest", "float32"),
    ]
    return report(measure(systems, (batch_size,), rounds), comparisons)


def peak_memory() -> int:
    """Peak memory of this process, or of its GPU, in bytes."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # On Linux in KiB.


def bandwidth(
    system: System, config: qrhash.EmbedConfig, batch_size: int, steps: int = 50
) -> dict[str, Any]:
    """Prints the bytes a step must move over its time, the steps queued, beside a copy's.

    A step must read and write table and accumulator of each distinct row, and read or write a
    row and its gradient for each look-up.
    """
    rng = np.random.default_rng(1)
    draws = rng.random((steps, batch_size))
    batches = [system.prepare(draw) for draw in draws]
    system.wait()
    start = time.perf_counter()
    for batch in batches:
        system.step(batch)
    system.wait()
    seconds = (time.perf_counter() - start) / steps

    indices = config.partition.indices(log_uniform(draws[0], config.num_embeddings))
    moved = sum(
        (4 * len(np.unique(index)) + 2 * batch_size) * width * 4
        for index, (_, width) in zip(indices, config.table_shapes, strict=True)
    )
    rate, copy = moved / seconds, copy_bandwidth()
    print(f"qrhash moves {moved / 1e6:.1f} MB in {seconds * 1e3:.3f} ms (steps queued): ", end="")
    print(f"{rate / 1e9:.1f} GB/s, {rate / copy:.0%} of a copy's {copy / 1e9:.1f} GB/s")
    return {"bytes_per_step": moved, "bytes_per_second": rate, "copy_bytes_per_second": copy}


def copy_bandwidth(size: int = 2**30, repeats: int = 10) -> float:
    """Bytes per second, read and written, of adding one to an array of `size` bytes."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(add_one(jnp.zeros(size // 4)))
    start = time.perf_counter()
    for _ in range(repeats):
        array = add_one(array)
    array.block_until_ready()
    return 2 * size * repeats / (time.perf_counter() - start)


SCENARIOS = {
    "one": one,
    "criteo": criteo,
    "square": square,
    "growth": growth,
    "memory": memory,
    "remainder": remainder,
    "narrow": narrow,
}


def main() -> None:
    """Runs the scenarios and prints their tables."""
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    args = parser.parse_args()
    run({name: SCENARIOS[name] for name in args.scenario}, args)


def command_line(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark of several scenarios: `run` takes them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="processors for everyone")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def run(scenarios: Mapping[str, Callable[[int], Any]], args: argparse.Namespace) -> None:
    """Runs each scenario in a process of its own, and writes their figures where it is told."""
    limit_processors(args.threads)
    figures: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for name, scenario in scenarios.items():
        print(f"\n{name}: {scenario.__doc__}", flush=True)
        figures[name] = in_fresh_process(scenario, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def in_fresh_process(scenario: Callable[..., Any], *args: Any) -> Any:
    """Runs a scenario where no other one's memory and threads are in its way."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(scenario, *args).result()


def limit_processors(count: int) -> None:
    """Gives this process `count` processors, before anyone starts a pool of threads."""
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, processors[:count])
    # PyTorch and others beside JAX need room on a GPU too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def machine() -> dict[str, str]:
    """Device and versions."""
    found = {
        "device": jax.devices()[0].device_kind,
        "processors": str(len(os.sched_getaffinity(0))),
        "qrhash": qrhash.__version__,
        "jax": jax.__version__,
    }
    packages = importlib.metadata.packages_distributions()
    for module in INSTALL:
        found |= {name: importlib.metadata.version(name) for name in packages.get(module, ())}
    return found


if __name__ == "__main__":
    main()
