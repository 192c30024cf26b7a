"""How long it takes to the first training step, and how much memory it has taken by then.

For collections of 26, 104 and 520 columns, and for one table of 1e8 rows: seconds to create the
tables, to trace the step, to compile it, and to run it once; kernels of the program, bytes between
them, and the peak memory of the process over that of tables and accumulators. Every scenario is a
fresh process; with --cache DIR the programs are kept there, so that a second run shows what JAX's
persistent cache of compiled programs is worth.

    pip install -e . && python benchmarks/first_step.py
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from training_step import (
    CRITEO_SIZES,
    adagrad,
    by_rows,
    columns,
    in_fresh_process,
    limit_processors,
    machine,
    peak_memory,
)

import qrhash

NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}

SCENARIOS = {"26 columns": 1, "104 columns": 4, "520 columns": 20, "1e8 rows": 0}


def collection(times: int) -> tuple[Any, Any, Any, int]:
    """Criteo's columns, so many times, their long ones shorter by as much."""
    sizes = sorted((-(-size // times) for size in CRITEO_SIZES * times), reverse=True)
    config = columns(sizes, 4, 16)

    def look_up(stacks: Any, ids: jax.Array) -> jax.Array:
        of_features = {name: ids[:, number] for number, name in enumerate(config.configs)}
        vectors = qrhash.collection.lookup(stacks, of_features, config)
        return jnp.concatenate([vectors[name] for name in of_features], axis=1)

    return config, lambda: qrhash.collection.init(jax.random.key(0), config), look_up, len(sizes)


def one_table() -> tuple[Any, Any, Any, int]:
    """A row for each of 1e8 ids."""
    config = qrhash.EmbedConfig(qrhash.FullTable(10**8), 16)

    def look_up(tables: Any, ids: jax.Array) -> jax.Array:
        return qrhash.lookup(tables, ids[:, 0], config)

    return config, lambda: qrhash.init(jax.random.key(0), config), look_up, 1


def measure(times: int) -> dict[str, Any]:
    """Seconds and bytes of one scenario."""
    config, init, look_up, count = collection(times) if times else one_table()
    before, start = peak_memory(), time.perf_counter()
    tables = jax.block_until_ready(init())
    tx = adagrad()
    state = jax.block_until_ready(tx.init(tables))
    created = time.perf_counter()

    def loss(tables: Any, ids: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = look_up(tables, ids)
        return jnp.sum(vectors * cotangent), vectors

    step = jax.jit(by_rows(loss, config.large_tables, tx), donate_argnums=(0, 1))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2048, count)), jnp.int32)
    batch = ids, jnp.zeros((2048, 16 * count))
    begun = time.perf_counter()
    lowered = step.lower(tables, state, *batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((tables, state)))
    jax.block_until_ready(compiled(tables, state, *batch))
    done = time.perf_counter()
    entry = (compiled.as_text() or "").split("ENTRY", 1)[1]
    memory = compiled.memory_analysis()
    operations = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(", entry, re.MULTILINE)
    return {
        "create": created - start,
        "trace": traced - begun,
        "compile": ready - traced,
        "first": done - ready,
        "kernels": sum(operation not in NOTHING for operation in operations),
        "temporary_bytes": memory.temp_size_in_bytes if memory is not None else 0,
        "held_bytes": held,
        "peak_bytes": peak_memory() - before,
    }


def main() -> None:
    """Prints a line for each scenario."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--threads", type=int, default=2, help="processors")
    parser.add_argument("--cache", type=Path, help="folder to keep compiled programs in")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    limit_processors(args.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"{'':12}{'create':>8}{'trace':>8}{'compile':>9}{'first':>8}  s{'kernels':>9}"
        f"{'between':>10}{'held':>10}{'peak':>10}  MB"
    )
    figures = {}
    for name in args.scenario:
        found = in_fresh_process(_with_cache, SCENARIOS[name], args.cache)
        figures[name] = found
        seconds = "".join(f"{found[key]:>{width}.2f}" for key, width in _WIDTHS.items())
        megabytes = [found[key] / 1e6 for key in ("temporary_bytes", "held_bytes", "peak_bytes")]
        print(f"{name:12}{seconds}{found['kernels']:>12}", end="")
        print("".join(f"{each:10,.0f}" for each in megabytes), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


_WIDTHS = {"create": 8, "trace": 8, "compile": 9, "first": 8}


def _with_cache(times: int, cache: Path | None) -> dict[str, Any]:
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    return measure(times)


if __name__ == "__main__":
    main()
