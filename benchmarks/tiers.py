"""A table whose rows are in a store, and a cache of them: against one that is all on the device.

    python benchmarks/tiers.py

A step is forward, backward and Adagrad update of a table of 2^22 rows, float32, features 16, on
16,384 ids: most are of rows used often, log-uniform, which fit into half of the cache, and some are
of any rows. The cache holds one row in sixteen, a worker looks two batches ahead, and the store is
in the host's memory. Resident and tiered steps take turns in blocks; times are of whole blocks, the
loop and the worker included. A ratio is the median over rounds.

Then a file of records four times as large as the memory that is allowed for it is trained in a
process of its own, in which every row is touched. What is counted is the growth of its own memory,
without the pages of the file that the system keeps (RssAnon).
"""

import argparse
import functools
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qrhash
from qrhash import dynamic

FEATURES, BATCH = 16, 16_384
STEPS, UNCOUNTED = 40, 60
TARGETS = {0.90: 1.6, 0.97: 1.5}


def batches(num_rows: int, cache_rows: int, hit_rate: float, seed: int) -> Iterator[np.ndarray]:
    """Ids, of which about this fraction finds its row in the cache."""
    rng = np.random.default_rng(seed)
    often = cache_rows // 2
    while True:
        ids = np.minimum(np.exp(rng.random(BATCH) * np.log1p(often)).astype(np.int64) - 1, often)
        ids = ids * 2654435761 % num_rows
        yield np.where(rng.random(BATCH) < hit_rate, ids, rng.integers(0, num_rows, BATCH))


def training_step(config: qrhash.EmbedConfig, tx: Any) -> Callable[..., tuple[Any, Any, Any]]:
    """A step of the embedding part: forward, backward, update."""
    cotangent = jax.random.normal(jax.random.key(0), (BATCH, FEATURES)) / BATCH

    def loss(tables: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = qrhash.lookup(tables, ids, config)
        return jnp.sum(vectors * cotangent), vectors

    gradient = qrhash.value_and_grad(loss, config.large_tables, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tables: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        (_, vectors), grads = gradient(tables, ids)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, vectors

    return step


class Resident:
    """All rows are there."""

    def __init__(self, config: qrhash.EmbedConfig, tx: Any) -> None:
        self.tables = qrhash.init(jax.random.key(0), config)
        self.state, self.step = tx.init(self.tables), training_step(config, tx)

    def run(self, given: list[np.ndarray]) -> None:
        """Trains."""
        for ids in given:
            self.tables, self.state, vectors = self.step(
                self.tables, self.state, jnp.asarray(ids, jnp.int32)
            )
            jax.block_until_ready(vectors)
        jax.block_until_ready(self.tables)


class Cached:
    """Some rows are there, the others in a store."""

    def __init__(self, config: qrhash.EmbedConfig, cache_rows: int, tx: Any, store: Any) -> None:
        small = dynamic.cached(config, cache_rows)
        self.tables = qrhash.init(jax.random.key(0), small)
        self.state, self.step = tx.init(self.tables), training_step(small, tx)
        self.tier = dynamic.Tiered(config, self.tables, tx, store)

    def run(self, given: Any) -> None:
        """Trains."""
        for slots, fetched in self.tier.ahead(given):
            self.tables, self.state = self.tier.swap(self.tables, self.state, fetched)
            self.tables, self.state, vectors = self.step(self.tables, self.state, slots)
            jax.block_until_ready(vectors)
        jax.block_until_ready(self.tables)


def optimizer() -> Any:
    """Adagrad, whose accumulators are as large as the rows."""
    return qrhash.touched_rows(optax.adagrad(0.05))


def compare(num_rows: int, rounds: int) -> None:
    """Prints how many times as long a tiered step takes as a resident one."""
    config = qrhash.EmbedConfig(qrhash.FullTable(num_rows), FEATURES)
    cache_rows = num_rows // 16
    print(f"{num_rows:,} rows, {cache_rows:,} of them in the cache, batches of {BATCH:,}")
    resident = Resident(config, optimizer())
    for wanted, target in TARGETS.items():
        stream = batches(num_rows, cache_rows, wanted, seed=int(wanted * 100))
        cached = Cached(config, cache_rows, optimizer(), dynamic.MemoryStore)
        # Until the cache is full, and records come back that were written before.
        cached.run([next(stream) for _ in range(4 * UNCOUNTED)])
        hits, looked_up = cached.tier.traffic.hits, cached.tier.traffic.looked_up
        seconds: dict[str, list[float]] = {"resident": [], "tiered": []}
        for _ in range(rounds):
            given = [next(stream) for _ in range(STEPS)]
            for name, run in (("resident", resident.run), ("tiered", cached.run)):
                run(given[:5])
                start = time.perf_counter()
                run(given[5:])
                seconds[name].append((time.perf_counter() - start) / (STEPS - 5) * 1e3)
        rate = (cached.tier.traffic.hits - hits) / (cached.tier.traffic.looked_up - looked_up)
        both = [statistics.median(of_name) for of_name in seconds.values()]
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        ratio = statistics.median(ratios)
        print(
            f"hit rate {rate:.3f}: resident {both[0]:.2f} ms, tiered {both[1]:.2f} ms, "
            f"{ratio:.2f}x ({min(ratios):.2f}-{max(ratios):.2f}), asked: at most {target}x: "
            f"{'met' if ratio <= target else 'MISSED'}",
            flush=True,
        )


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def train_a_file(path: str, allowed: int) -> None:
    """Prints the memory that it takes to touch all rows of a file of four times the allowed."""
    record_width = 1 + 2 * 4 * FEATURES
    num_rows = 4 * allowed // record_width
    config = qrhash.EmbedConfig(qrhash.FullTable(num_rows), FEATURES)
    store = functools.partial(dynamic.FileStore, path)
    cached = Cached(config, 2 * BATCH, optimizer(), store)
    rows = np.random.default_rng(0).permutation(num_rows)
    parts = np.array_split(rows, -(-num_rows // BATCH))
    given = [np.resize(part, BATCH) for part in parts]
    cached.run(given[:4])  # compiled
    cached.tier.flush(cached.tables, cached.state)
    before = most = own_memory()
    start = time.perf_counter()
    for number in range(0, len(given), 16):
        cached.run(given[number : number + 16])
        most = max(most, own_memory())
    cached.tier.flush(cached.tables, cached.state)
    most = max(most, own_memory())
    seconds = (time.perf_counter() - start) / len(given)
    written = cached.tier.store.read(rows[: 2**16])[:, 0].all()
    size, taken, asked = (n / 2**20 for n in (num_rows * record_width, most - before, allowed))
    print(
        f"a file of {size:,.0f} MB of records, {num_rows:,} rows, every one trained: "
        f"{taken:,.0f} MB of memory, asked: at most {asked:,.0f} MB: "
        f"{'met' if taken <= asked and written else 'MISSED'}; "
        f"{seconds * 1e3:.0f} ms a step, in which every id is another row"
    )


def main() -> None:
    """Measures, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2**22)
    parser.add_argument("--allowed-mb", type=int, default=256)
    given = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    compare(given.rows, given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "rows"), given.allowed_mb * 2**20)
        process = multiprocessing.get_context("spawn").Process(target=train_a_file, args=arguments)
        process.start()
        process.join()


if __name__ == "__main__":
    main()
