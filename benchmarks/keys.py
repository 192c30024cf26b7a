"""Raw keys: the bijection on the device, and strings to 64 bits on the host, beside their peers.

    pip install -e ".[bench]" && python benchmarks/keys.py

The bijection is `qrhash.keys.scramble`, jitted, in nanoseconds a key; its peer is
`jax.extend.random.threefry_2x32`, a bijection of 64 bits too. Strings of 20 letters become 64 bits
by `qrhash.strings.hash_strings`, from a Python list and from a column of Arrow; the peers are
`pandas.util.hash_array` (vectorised, and stable by contract) on the same strings, and the xxhash
library called for each. Turns alternate; a ratio is the median over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash

from qrhash.keys import Keys, scramble
from qrhash.strings import hash_strings


def _measure(calls: Mapping[str, Callable[[], Any]], count: int, rounds: int) -> None:
    """Prints nanoseconds an item of each, and how many times as long it takes as the first."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(calls))]
    for name, of_name in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(of_name, first, strict=True))
        print(f"{name:44} {statistics.median(of_name) / count * 1e9:8.2f} ns   {ratio:6.2f}x")


def main() -> None:
    """Measures, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keys", type=int, default=1_048_576)
    parser.add_argument("--strings", type=int, default=1_000_000)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, pandas {pd.__version__}")

    print(f"\n{given.keys:,} keys")
    keys = jax.tree.map(jnp.asarray, Keys.of(rng.integers(0, 2**63, given.keys)))
    scrambled = jax.jit(scramble)
    words = jnp.concatenate((keys.hi, keys.lo))
    threefry = jax.jit(
        lambda words: jax.extend.random.threefry_2x32((jnp.uint32(1), jnp.uint32(2)), words)
    )
    _measure(
        {"qrhash, scramble": lambda: scrambled(keys), "JAX, threefry": lambda: threefry(words)},
        given.keys,
        given.rounds,
    )

    print(f"\n{given.strings:,} strings of 20 letters")
    letters = rng.integers(97, 123, (given.strings, 20)).astype(np.uint8)
    strings = [bytes(row).decode() for row in letters]
    objects, arrow = np.array(strings, object), pa.array(strings)
    _measure(
        {
            "pandas.util.hash_array, objects": lambda: pd.util.hash_array(
                objects, categorize=False
            ),
            "qrhash, a list": lambda: hash_strings(strings),
            "qrhash, a column of Arrow": lambda: hash_strings(arrow),
            "xxhash, one by one": lambda: [xxhash.xxh64_intdigest(s.encode()) for s in strings],
        },
        given.strings,
        max(3, given.rounds // 3),
    )


if __name__ == "__main__":
    main()
