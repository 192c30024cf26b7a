"""The index of a dynamic table, keys to rows, beside its peers; and what it adds to a step.

    pip install -e ".[bench]" && python benchmarks/dynamic.py
    python benchmarks/dynamic.py --only soak --operations 10_000_000

An index of 2**19 rows in 2**20 slots finds keys of 64 bits, gives rows to new ones, counts them
and notes the step (`qrhash.dynamic.index.assign`, jitted and donated). A turn is eight batches of
16,384 keys; of a cold start 32 batches, into what is empty. The peers:

  dictionary   Python's, of a list of integers, counts and steps in lists beside
  numba        the same loop over open addressing, compiled, one thread
  pandas       `Index.get_indexer`, and `append` of keys not found; it counts nothing
  xtructure    the cuckoo hash table in JAX, `parallel_insert`, donated; it counts nothing
  sorted       what TorchRec's sorted collision module does, in PyTorch: `searchsorted` in sorted
               keys for each batch, and after eight batches new keys, counts and steps merged in.
               It is written here after TorchRec 1.9.2, which sorts all keys at each merge.

Turns alternate, and ratios are taken, as in `training_step.py`. A peer is measured if installed.
On a machine that is busy with other things, a long turn is interrupted more often than a short one:
`--processor-time` takes the time of processors, of all threads together, instead of the clock's.
"""

import functools
import json
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from training_step import (
    INSTALL,
    UNCOUNTED,
    Comparison,
    Lines,
    System,
    adagrad,
    by_rows,
    command_line,
    cotangents,
    has,
    in_fresh_process,
    jax_system,
    limit_processors,
    machine,
    measure,
    report,
    single_loss,
)

import qrhash
from qrhash.dynamic.index import KeyIndex, assign, create, lookup_rows
from qrhash.dynamic.upkeep import evict, grow, lowest
from qrhash.keys import Keys, scramble

CAPACITY, BATCH, BATCHES = 2**19, 16_384, 8
FEATURES = 16
ZIPF = 1.05

INSTALL.update(
    numba="pip install numba",
    pandas="pip install pandas",
    xtructure="pip install --no-deps xtructure==0.1.1 chex tabulate toolz",
)


# Keys


def key_of(number: np.ndarray) -> np.ndarray:
    """The key of a thing, uint64: neighbours have nothing in common."""
    return scramble(Keys.of(number), seed=1).to_numpy()


def zipf(draws: np.ndarray) -> np.ndarray:
    """Uniform draws -> the number of a thing, of 2**19, of chance (1 + number)**-1.05."""
    power = 1 - ZIPF
    numbers = (1 + draws * ((CAPACITY + 1.0) ** power - 1)) ** (1 / power) - 1
    return np.minimum(numbers.astype(np.int64), CAPACITY - 1)


def uniform(draws: np.ndarray) -> np.ndarray:
    """Uniform draws -> the number of a thing, of 2**19."""
    return (draws * CAPACITY).astype(np.int64)


# In which order they are met first: frequent ones all over the table.
ROW_OF = np.random.default_rng(3).permutation(CAPACITY)


@functools.cache
def known() -> np.ndarray:
    """All keys; the one at a place has that row, if it is asked for in this order."""
    return key_of(np.argsort(ROW_OF))


# The contenders: each is given a batch, and has its state with it


class Dictionary:
    """Python's dictionary."""

    prepare = staticmethod(lambda keys: keys.tolist())

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.counts, self.steps, self.step = [0] * CAPACITY, [-1] * CAPACITY, 0

    def assign(self, keys: list[int]) -> list[int]:
        """Rows; counts and steps in lists beside."""
        rows, counts, steps, step, given = self.rows, self.counts, self.steps, self.step, []
        for key in keys:
            row = rows.get(key, CAPACITY)
            if row == CAPACITY and len(rows) < CAPACITY:
                row = rows[key] = len(rows)
            if row < CAPACITY:
                counts[row] += 1
                steps[row] = step
            given.append(row)
        self.step += 1
        return given


class Qrhash:
    """This library's index."""

    @staticmethod
    def prepare(keys: np.ndarray) -> Any:
        """Words on the device."""
        return jax.block_until_ready(jax.tree.map(jnp.asarray, Keys.of(keys)))

    _assign = staticmethod(jax.jit(assign, donate_argnums=0))

    def __init__(self) -> None:
        self.index, self.step = create(CAPACITY), 0

    def assign(self, keys: Any) -> Any:
        """Rows."""
        self.index, given, _ = self._assign(self.index, keys, np.int32(self.step))
        self.step += 1
        return given.rows


@functools.cache
def numba_loop() -> Callable[..., Any]:
    """The dictionary's loop over open addressing."""
    import numba

    @numba.njit
    def loop(
        slots: Any, rows: Any, used: int, counts: Any, steps: Any, step: int, keys: Any
    ) -> Any:
        given = np.empty(keys.size, np.int32)
        mask, capacity = np.uint64(slots.size - 1), counts.size
        for place in range(keys.size):
            key = keys[place]
            mixed = key ^ (key >> np.uint64(33))
            mixed *= np.uint64(0xFF51AFD7ED558CCD)
            mixed ^= mixed >> np.uint64(33)
            slot = mixed & mask
            while rows[slot] >= 0 and slots[slot] != key:
                slot = (slot + np.uint64(1)) & mask
            if rows[slot] < 0 and used < capacity:
                slots[slot], rows[slot] = key, used
                used += 1
            row = rows[slot] if rows[slot] >= 0 else capacity
            if row < capacity:
                counts[row] += 1
                steps[row] = step
            given[place] = row
        return given, used

    return loop


class Numba:
    """A loop that is compiled."""

    prepare = staticmethod(lambda keys: keys)

    def __init__(self) -> None:
        self.slots = np.zeros(2 * CAPACITY, np.uint64), np.full(2 * CAPACITY, -1, np.int32)
        self.counts, self.steps = np.zeros(CAPACITY, np.int32), np.full(CAPACITY, -1, np.int32)
        self.used = self.step = 0

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """Rows."""
        beside = self.counts, self.steps, self.step
        given, self.used = numba_loop()(*self.slots, self.used, *beside, keys)
        self.step += 1
        return given


class Pandas:
    """`get_indexer`."""

    prepare = staticmethod(lambda keys: keys)

    def __init__(self) -> None:
        import pandas as pd

        self.index = pd.Index(np.zeros(0, np.uint64))

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """Rows; where keys are new, all are hashed again."""
        import pandas as pd

        rows = self.index.get_indexer(keys)
        if (rows < 0).any():
            self.index = self.index.append(pd.Index(pd.unique(keys[rows < 0])))
            rows = self.index.get_indexer(keys)
        return rows


class Xtructure:
    """The cuckoo hash table."""

    def __init__(self) -> None:
        self.table = _xtructure()[1]()

    @staticmethod
    def prepare(keys: np.ndarray) -> Any:
        """Its own structure of words, on the device."""
        words = np.stack((keys >> np.uint64(32), keys & np.uint64(2**32 - 1)), -1)
        return jax.block_until_ready(_xtructure()[0](words=jnp.asarray(words.astype(np.uint32))))

    def assign(self, keys: Any) -> Any:
        """Places in the table."""
        self.table, rows = _xtructure()[2](self.table, keys)
        return rows


@functools.cache
def _xtructure() -> tuple[Any, ...]:
    from xtructure import FieldDescriptor, HashTable, xtructure_dataclass

    fields = {"__annotations__": {"words": FieldDescriptor[jnp.uint32, (2,)]}}
    structure = xtructure_dataclass(type("Words", (), fields))

    def insert(table: Any, keys: Any) -> Any:
        table, _, _, places = HashTable.parallel_insert(table, keys)
        return table, places.index

    build = functools.partial(HashTable.build, structure, 1, CAPACITY)
    return structure, build, jax.jit(insert, donate_argnums=0)


class Sorted:
    """What TorchRec's sorted collision module does, without its scores for an eviction."""

    def __init__(self) -> None:
        import torch

        self.keys = torch.full((CAPACITY,), 2**63 - 1)  # those that are none, at the end
        self.rows = torch.arange(CAPACITY)
        self.counts, self.steps = (torch.zeros(CAPACITY, dtype=torch.int64) for _ in range(2))
        self.history: list[Any] = []
        self.used = self.step = 0

    @staticmethod
    def prepare(keys: np.ndarray) -> Any:
        """A tensor."""
        import torch

        return torch.from_numpy(keys.view(np.int64))

    def assign(self, keys: Any) -> Any:
        """Rows: of keys that were there at the last merge."""
        import torch

        self.history.append(keys)
        self.step += 1
        if len(self.history) == BATCHES:
            self._merge()
        places, is_here = self._places(keys)
        return torch.where(is_here, self.rows[places], CAPACITY)

    def _places(self, keys: Any) -> tuple[Any, Any]:
        import torch

        places = torch.searchsorted(self.keys, keys).clamp_(max=CAPACITY - 1)
        return places, self.keys[places] == keys

    def _merge(self) -> None:
        import torch

        keys, counts = torch.unique(torch.cat(self.history), return_counts=True)
        self.history = []
        places, is_here = self._places(keys)
        new = keys[~is_here][: CAPACITY - self.used]
        ends = torch.arange(self.used, self.used + len(new))
        self.keys[ends], self.counts[ends] = new, counts[~is_here][: len(new)]
        self.counts[places[is_here]] += counts[is_here]
        self.steps[torch.cat((places[is_here], ends))] = self.step
        self.used += len(new)
        order = torch.argsort(self.keys, stable=True)
        self.keys, self.rows = self.keys[order], self.rows[order]
        self.counts, self.steps = self.counts[order], self.steps[order]


CONTENDERS = {
    "dictionary": (Dictionary, None),
    "numba": (Numba, "numba"),
    "pandas": (Pandas, "pandas"),
    "xtructure": (Xtructure, "xtructure"),
    "sorted": (Sorted, "torch"),
}


# Scenarios


def warm_system(contender: Any, numbers: Callable[[np.ndarray], np.ndarray]) -> System:
    """Batches of keys that all have been met once."""
    held, given = contender(), None
    for keys in known().reshape(-1, BATCH):
        given = jax.block_until_ready(held.assign(held.prepare(keys)))

    def prepare(draws: np.ndarray) -> Any:
        return [held.prepare(key_of(numbers(batch))) for batch in draws]

    def step(batches: Any) -> None:
        nonlocal given
        for keys in batches:
            given = held.assign(keys)

    return System(prepare, step, lambda: jax.block_until_ready(given), UNCOUNTED + 6)


def cold_system(contender: Any) -> System:
    """An index that is made, and filled: all keys are new."""
    batches = [contender.prepare(keys) for keys in known().reshape(-1, BATCH)]
    given = None

    def step(_: Any) -> None:
        nonlocal given
        held = contender()
        for keys in batches:
            given = held.assign(keys)

    return System(lambda _: None, step, lambda: jax.block_until_ready(given), UNCOUNTED + 4)


def compared(
    make: Callable[[Any], System], rounds: int, dictionary: float, *, others: bool = True
) -> Lines:
    """Everyone that is installed."""
    systems = {"qrhash": make(Qrhash)}
    for name, (contender, module) in CONTENDERS.items():
        if module is None or has(module):
            systems[name] = make(contender)
    five = 5 if others else None
    targets = [
        Comparison("dictionary", "qrhash", at_least=dictionary),
        Comparison("qrhash", "numba", at_most=4.5 if others else None),
        Comparison("pandas", "qrhash"),
        Comparison("xtructure", "qrhash", at_least=five),
        Comparison("sorted", "qrhash", at_least=five),
    ]
    return report(measure(systems, (BATCHES, BATCH), rounds), targets)


def zipf_keys(rounds: int) -> Lines:
    """Keys by Zipf's law, all met before."""
    return compared(functools.partial(warm_system, numbers=zipf), rounds, 4)


def uniform_keys(rounds: int) -> Lines:
    """Keys that are equally frequent, all met before."""
    return compared(functools.partial(warm_system, numbers=uniform), rounds, 7)


def cold_start(rounds: int) -> Lines:
    """An index that is made, and filled with 2**19 keys, all new."""
    return compared(cold_system, rounds, 2, others=False)


def training_step(rounds: int) -> Lines:
    """A step of one table [2**19, 16], Adagrad of touched rows: keys, against row numbers."""
    config = qrhash.EmbedConfig(qrhash.FullTable(CAPACITY), FEATURES)
    tx, cotangent = adagrad(), cotangents(BATCH, FEATURES)
    update = by_rows(single_loss(config), config.large_tables, tx)

    def with_keys(tables: Any, state: Any, keys: Any, cotangent: jax.Array) -> Any:
        index, step, state = state
        index, given, _ = assign(index, keys, step)
        tables, state, vectors = update(tables, state, given.rows, cotangent)
        return tables, (index, step + 1, state), vectors

    def made() -> tuple[Any, Any]:
        tables = qrhash.init(jax.random.key(0), config)
        return tables, tx.init(tables)

    filled = Qrhash()
    for keys in known().reshape(-1, BATCH):
        filled.assign(filled.prepare(keys))
    step = jnp.int32(filled.step)

    def rows(draws: np.ndarray) -> Any:
        return jax.block_until_ready(jnp.asarray(ROW_OF[zipf(draws)], jnp.int32))

    def raw(draws: np.ndarray) -> Any:
        return Qrhash.prepare(key_of(zipf(draws)))

    tables, state = made()
    systems = {
        "row numbers": jax_system(update, *made(), cotangent, rows),
        "keys": jax_system(with_keys, tables, (filled.index, step, state), cotangent, raw),
    }
    return report(
        measure(systems, (BATCH,), rounds), [Comparison("keys", "row numbers", at_most=2)]
    )


# A long run against a dictionary


class Checked:
    """An index and a dictionary that must agree."""

    def __init__(self, capacity: int) -> None:
        self.index: KeyIndex = create(capacity)
        self.rows: dict[int, int] = {}
        self.free = list(range(capacity))[::-1]
        self.counts, self.steps = np.zeros(capacity, np.int64), np.full(capacity, -1)

    _assign = staticmethod(jax.jit(assign, donate_argnums=0))
    _evict = staticmethod(jax.jit(evict, donate_argnums=0))
    _lookup = staticmethod(jax.jit(lookup_rows))
    _lowest = staticmethod(jax.jit(lowest))

    def assign(self, keys: np.ndarray, step: int) -> None:
        """Both, and the rows compared."""
        self.index, given, _ = self._assign(self.index, Keys.of(keys), np.int32(step))
        refused, is_new = set(), []
        for key in keys.tolist():
            new = key not in self.rows and bool(self.free)
            if new:
                self.rows[key] = self.free.pop()
                self.counts[self.rows[key]] = 0
            elif key not in self.rows:
                refused.add(key)
            is_new.append(new)
        rows = self._rows_of(keys)
        np.add.at(self.counts, rows[rows < self.index.capacity], 1)
        self.steps[rows[rows < self.index.capacity]] = step
        np.testing.assert_array_equal(given.rows, rows)
        np.testing.assert_array_equal(given.is_new, is_new)
        assert int(given.no_room) == len(refused)

    def look_up(self, keys: np.ndarray) -> None:
        """Both, compared."""
        given = self._lookup(self.index, Keys.of(keys))
        np.testing.assert_array_equal(given.rows, self._rows_of(keys))

    def evict(self, gone: Any) -> None:
        """Both."""
        self.index, gone = self._evict(self.index, gone), np.asarray(gone)
        for key in [key for key, row in self.rows.items() if gone[row]]:
            del self.rows[key]
        self.free += np.flatnonzero(gone & (self.steps >= 0)).tolist()
        self.counts[gone], self.steps[gone] = 0, -1

    def oldest(self, count: int) -> Any:
        """The rows that were not met for the longest time."""
        return self._lowest(self.index.last_steps, self.index.is_live, count)

    def grow(self, capacity: int) -> None:
        """Both."""
        more = capacity - self.index.capacity
        self.free = list(range(self.index.capacity, capacity))[::-1] + self.free
        self.index = grow(self.index, capacity)
        self.counts = np.concatenate((self.counts, np.zeros(more, np.int64)))
        self.steps = np.concatenate((self.steps, np.full(more, -1)))

    def check(self) -> None:
        """Nothing is lost, and nothing is doubled."""
        keys, live = self.index.keys.to_numpy(), np.asarray(self.index.is_live)
        assert dict(zip(keys[live].tolist(), np.flatnonzero(live).tolist(), strict=True)) == (
            self.rows
        )
        assert int(self.index.num_keys) == len(self.rows) == len(set(self.rows.values()))
        np.testing.assert_array_equal(self.index.counts, self.counts)
        np.testing.assert_array_equal(self.index.last_steps, self.steps)

    def _rows_of(self, keys: np.ndarray) -> np.ndarray:
        capacity = self.index.capacity
        return np.array([self.rows.get(key, capacity) for key in keys.tolist()])


def soak(operations: int, batch: int = 4096) -> Lines:
    """Keys assigned, looked up, evicted at random, beside a dictionary; tables often full."""
    rng, capacity = np.random.default_rng(11), 2**14
    both, done, step, evictions, start = Checked(capacity), 0, 0, 0, time.perf_counter()
    for third in range(3):
        while done < operations * (third + 1) // 3:
            universe = 2 * both.index.capacity
            numbers = (universe ** rng.random(batch)).astype(np.int64) + 8 * step
            if rng.random() < 0.5:
                numbers = rng.integers(0, universe, batch) + 8 * step
            both.assign(key_of(numbers), step)
            done, step = done + batch, step + 1
            if rng.random() < 0.3:
                both.look_up(key_of(rng.integers(0, universe, batch) + 8 * step))
                done += batch
            if rng.random() < 0.1:
                is_at_random = rng.random() < 0.3
                count = int(rng.integers(1, both.index.capacity // 2))
                both.evict(
                    rng.random(both.index.capacity) < 0.3 if is_at_random else both.oldest(count)
                )
                evictions += 1
            if step % 50 == 0:
                both.check()
        both.check()
        if third < 2:
            both.grow(both.index.capacity * 2 - third * 777)
    seconds = time.perf_counter() - start
    line = {"operations": done, "batches": step, "evictions": evictions, "seconds": seconds}
    print(f"{done:,} operations on keys in {step:,} batches, {evictions} evictions, two growths, ")
    print(f"{len(both.rows):,} keys at the end: nothing lost, nothing doubled ({seconds:.0f} s)")
    return [line]


def in_processor_time(amount: int, scenario: Callable[[int], Lines]) -> Lines:
    """A scenario, in seconds of processors."""
    with mock.patch.object(time, "perf_counter", time.process_time):
        return scenario(amount)


SCENARIOS = {
    "zipf": zipf_keys,
    "uniform": uniform_keys,
    "cold": cold_start,
    "step": training_step,
}


def main() -> None:
    """Runs the scenarios and prints their tables."""
    parser = command_line(__doc__, rounds=7)
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS, "soak"], default=list(SCENARIOS))
    parser.add_argument("--operations", type=int, default=10_000_000, help="of the soak")
    parser.add_argument("--processor-time", action="store_true", help="not the clock's")
    args = parser.parse_args()
    limit_processors(args.threads)
    figures: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for name in args.only:
        scenario = SCENARIOS.get(name, soak)
        print(f"\n{name}: {scenario.__doc__}", flush=True)
        amount = args.operations if name == "soak" else args.rounds
        if args.processor_time:
            scenario = functools.partial(in_processor_time, scenario=scenario)
        figures[name] = in_fresh_process(scenario, amount)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
