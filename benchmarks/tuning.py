"""The choices of `qrhash.tuning`, each against its alternative, on this machine.

    python benchmarks/tuning.py
    python benchmarks/tuning.py --only merge slots

Every line is a ratio: how many times as long the alternative takes as what `qrhash.tuning` chooses
for the platform, the median of rounds that take turns. Above 1 the choice is right.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qrhash
from qrhash import tuning
from qrhash.merge import distinct_rows, merge_rows

LOOKUPS = 16_384
FEATURES = 16
PER_BAG = 8


def _ids(vocabulary: int, count: int, seed: int = 0) -> jax.Array:
    """Log-uniform ids, as frequent things come."""
    drawn = np.exp(np.random.default_rng(seed).uniform(0, np.log(vocabulary), count))
    return jnp.asarray(np.minimum(drawn.astype(np.int64), vocabulary) - 1, jnp.int32)


def _spread(vocabulary: int, count: int) -> jax.Array:
    """Uniform ids: their rows are in no cache."""
    return jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, count), jnp.int32)


def _ratio(chosen: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float:
    """How many times as long the other takes."""
    ratios = []
    for fun in (chosen, other):
        jax.block_until_ready(fun())
    for _ in range(rounds):
        times = []
        for fun in (chosen, other):
            start = time.perf_counter()
            for _ in range(5):
                jax.block_until_ready(fun())
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def _compiled(choices: dict[str, Any], fun: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A function compiled under these choices."""
    patches = [mock.patch.object(tuning, name, value) for name, value in choices.items()]
    for patch in patches:
        patch.start()
    try:
        compiled = jax.jit(lambda *args: fun(*args)).lower(*args).compile()
    finally:
        for patch in patches:
            patch.stop()
    return lambda: compiled(*args)


def _against(
    name: str, other: Any, fun: Callable[..., Any], *args: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A function compiled under the choices as they are, and with another one."""
    return _compiled({}, fun, *args), _compiled({name: other}, fun, *args)


def one_hot_rows(rounds: int) -> Iterator[tuple[str, float]]:
    """The gradient of a small table: a product with one-hot rows, or a scatter-add."""
    platform = tuning.traced_for()
    for rows in (4, 64, 512, 2048):
        chosen = tuning.one_hot_rows(platform)
        other = 0 if rows <= chosen else rows
        config = qrhash.EmbedConfig(qrhash.FullTable(rows), FEATURES)
        (table,) = qrhash.init(jax.random.key(0), config)
        gradient = jax.grad(lambda table, ids: qrhash.gather((table,), (ids,))[0].sum())
        pair = _against(
            "one_hot_rows", lambda _, other=other: other, gradient, table, _ids(rows, LOOKUPS)
        )
        yield f"{rows} rows, {LOOKUPS} look-ups", _ratio(*pair, rounds)


def merge_method(rounds: int) -> Iterator[tuple[str, float]]:
    """Duplicates: found by hashing, or by sorting."""
    other = {"hash": "sort", "sort": "hash"}[tuning.merge_method(tuning.traced_for())]
    for lookups in (2048, LOOKUPS, 131_072):
        values = jnp.ones((lookups, FEATURES))
        merge = lambda ids, values: merge_rows(ids, values, 10**6)  # noqa: E731
        pair = _against("merge_method", lambda _: other, merge, _ids(10**6, lookups), values)
        yield f"{lookups} look-ups, {other} instead", _ratio(*pair, rounds)


def slots_per_lookup(rounds: int) -> Iterator[tuple[str, float]]:
    """The scratch for hashing: slots for each look-up."""
    for slots in (1, 2, 8, 16):
        values = jnp.ones((LOOKUPS, FEATURES))
        with mock.patch.object(tuning, "merge_method", return_value="hash"):
            merge = lambda ids, values: merge_rows(ids, values, 10**6)  # noqa: E731
            pair = _against("SLOTS_PER_LOOKUP", slots, merge, _ids(10**6, LOOKUPS), values)
            yield f"{slots} in place of {tuning.SLOTS_PER_LOOKUP}", _ratio(*pair, rounds)


def rows_per_lookup(rounds: int) -> Iterator[tuple[str, float]]:
    """Duplicates found by a slot for every row, or by hashing."""
    for lookups in (2_048, LOOKUPS, 524_288):
        for per_lookup in (4, 8, 12, 16):
            rows = per_lookup * lookups
            is_hashed = per_lookup > tuning.ROWS_PER_LOOKUP
            find = functools.partial(distinct_rows, num_rows=rows)
            other = per_lookup if is_hashed else 0
            pair = _against("ROWS_PER_LOOKUP", other, find, _ids(rows, lookups))
            what = "a slot for each" if is_hashed else "hashed"
            yield f"{rows} rows, {lookups} look-ups, {what} instead", _ratio(*pair, rounds)


def gathers_again(rounds: int) -> Iterator[tuple[str, float]]:
    """A step of Adagrad on small tables: rows gathered again in the backward pass, or kept."""
    chosen = tuning.gathers_again(tuning.traced_for())
    for rows in (1_000, 10_000):
        config = qrhash.EmbedConfig(qrhash.QuotientRemainder(rows * rows, rows), 64)
        step = _step(config, _ids(config.num_embeddings, LOOKUPS), large=False)
        with mock.patch.object(tuning, "gathers_again", return_value=not chosen):
            other = _step(config, _ids(config.num_embeddings, LOOKUPS), large=False)
        yield f"two tables of {rows} rows, features 64", _ratio(step, other, rounds)


def large_table_rows(rounds: int) -> Iterator[tuple[str, float]]:
    """A step of Adagrad on one table: the whole of it, or the rows touched."""
    for lookups in (2_048, LOOKUPS):
        for rows in (2_048, 8_192, 16_384, 65_536, 262_144):
            config = qrhash.EmbedConfig(qrhash.FullTable(rows), FEATURES)
            ids = _ids(rows, lookups)
            steps = {is_large: _step(config, ids, large=is_large) for is_large in (True, False)}
            is_large = rows >= tuning.LARGE_TABLE_ROWS
            what = "rows touched" if is_large else "whole table"
            ratio = _ratio(steps[is_large], steps[not is_large], rounds)
            yield f"{rows} rows, {lookups} look-ups, {what}", ratio


def updates_in_blocks(rounds: int) -> Iterator[tuple[str, float]]:
    """A step of Adagrad on bags: the rows touched updated block by block, or all at once."""
    for places in (65_536, 98_304, 131_072, 524_288):
        chosen = tuning.updates_in_blocks(tuning.traced_for(), places)
        step = _bag_step(places)
        with mock.patch.object(tuning, "updates_in_blocks", return_value=not chosen):
            other = _bag_step(places)
        what = "in blocks" if chosen else "at once"
        yield f"{places} ids in bags of {PER_BAG}, {what}", _ratio(step, other, rounds)


def sums_at_once(rounds: int) -> Iterator[tuple[str, float]]:
    """A step of Adagrad on bags: summed up some places at a time, or from rows of all of them."""
    for places in (LOOKUPS, 32_768, 65_536, 131_072, 524_288):
        chosen = tuning.sums_at_once(tuning.traced_for(), places)
        step = _bag_step(places)
        with mock.patch.object(tuning, "sums_at_once", return_value=not chosen):
            other = _bag_step(places)
        what = "at a time" if chosen else "all"
        yield f"{places} ids in bags of {PER_BAG}, {what}", _ratio(step, other, rounds)


def places_at_once(rounds: int) -> Iterator[tuple[str, float]]:
    """A step of Adagrad on bags: fewer or more of its places summed up at once."""
    step = _bag_step(524_288)
    for places in (tuning.PLACES_AT_ONCE // 2, 2 * tuning.PLACES_AT_ONCE):
        with mock.patch.object(tuning, "PLACES_AT_ONCE", places):
            other = _bag_step(524_288)
        yield f"{places} places in place of {tuning.PLACES_AT_ONCE}", _ratio(step, other, rounds)


def multiplies_gathered(rounds: int) -> Iterator[tuple[str, float]]:
    """A look-up in one table: its rows multiplied by 1, or by nothing."""
    for width in (32, 48, 64, 72, 80, 128):
        chosen = tuning.multiplies_gathered(tuning.traced_for(), width)
        config = qrhash.EmbedConfig(qrhash.FullTable(32_000_000 // width), width)
        tables, ids = qrhash.init(jax.random.key(0), config), _spread(config.num_embeddings, 65_536)
        look_up = functools.partial(qrhash.lookup, config=config)
        pair = _against("multiplies_gathered", lambda *_, c=chosen: not c, look_up, tables, ids)
        what = "multiplied" if chosen else "as they are"
        yield f"65536 rows of {width} entries, {what}", _ratio(*pair, rounds)


def gathers_apart(rounds: int) -> Iterator[tuple[str, float]]:
    """A look-up of bags: the rows of two tables gathered one after another, or as multiplied."""
    for width in (8, FEATURES, 32, 48, 64, 128):
        chosen = tuning.gathers_apart(tuning.traced_for(), width)
        config, bags = _bags(524_288, width)
        tables = qrhash.init(jax.random.key(0), config)
        look_up = functools.partial(qrhash.lookup, config=config)
        pair = _against("gathers_apart", lambda *_, c=chosen: not c, look_up, tables, bags)
        what = "apart" if chosen else "as multiplied"
        yield f"524288 ids in bags of {PER_BAG}, features {width}, {what}", _ratio(*pair, rounds)


def neighbours_at_once(rounds: int) -> Iterator[tuple[str, float]]:
    """A look-up of 26 features, joined, and its gradient: so many neighbours at once."""
    full = {f"full{n}": qrhash.FullTable(100 + n) for n in range(13)}
    split = {f"split{n}": qrhash.QuotientRemainder(200_000 + n, 4) for n in range(13)}
    config = qrhash.CollectionConfig(
        {name: qrhash.EmbedConfig(each, FEATURES) for name, each in (full | split).items()}
    )
    stacks = qrhash.collection.init(jax.random.key(0), config)
    of_features = [_ids(each.num_embeddings, 2048) for each in config.configs.values()]
    look_up = functools.partial(qrhash.collection.lookup_joined, config=config)
    gradient = qrhash.value_and_grad(
        lambda stacks, ids: (look_up(stacks, ids) ** 2).sum(), config.large_tables
    )
    for what, fun in (("look-up", look_up), ("gradient", gradient)):
        for other in (1, 2, 8):
            pair = _against("NEIGHBOURS_AT_ONCE", other, fun, stacks, jnp.stack(of_features, 1))
            yield f"{what}, {other} in place of {tuning.NEIGHBOURS_AT_ONCE}", _ratio(*pair, rounds)


def _bags(places: int, width: int) -> tuple[qrhash.EmbedConfig, qrhash.Bag]:
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(16_000_000, 4), width, combiner="sum")
    bags = qrhash.Bag(
        _ids(config.num_embeddings, places),
        jnp.arange(places, dtype=jnp.int32) // PER_BAG,
        shape=(places // PER_BAG,),
    )
    return config, bags


def _bag_step(places: int) -> Callable[[], Any]:
    config, bags = _bags(places, FEATURES)
    return _step(config, bags, large=config.large_tables)


def _step(config: Any, ids: Any, *, large: Any) -> Callable[[], Any]:
    """A donated training step that goes on from where it is; compiled here and now.

    It hands out the vectors, and takes their gradient from elsewhere, as a model around it does.
    """
    tx = qrhash.touched_rows(optax.adagrad(0.05))
    cotangents = jax.random.normal(jax.random.key(1), (*ids.shape, config.features))

    def update(tables: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(tables: Any) -> tuple[jax.Array, jax.Array]:
            vectors = qrhash.lookup(tables, ids, config)
            return (vectors * cotangents).sum(), vectors

        (_, vectors), grads = qrhash.value_and_grad(loss, large=large, has_aux=True)(tables)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, vectors

    compiled = jax.jit(update, donate_argnums=(0, 1))
    tables = qrhash.init(jax.random.key(0), config)
    *now, _ = compiled(tables, tx.init(tables), ids)

    def step() -> Any:
        *now[:], vectors = compiled(*now, ids)
        return now[0], vectors

    return step


CHOICES = {
    "one-hot": one_hot_rows,
    "merge": merge_method,
    "slots": slots_per_lookup,
    "rows": rows_per_lookup,
    "again": gathers_again,
    "large": large_table_rows,
    "blocks": updates_in_blocks,
    "bags": sums_at_once,
    "places": places_at_once,
    "apart": gathers_apart,
    "multiplied": multiplies_gathered,
    "joined": neighbours_at_once,
}


def main() -> None:
    """Measures, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name in given.only:
        for what, ratio in CHOICES[name](given.rounds):
            print(f"{name:8} {what:48} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
