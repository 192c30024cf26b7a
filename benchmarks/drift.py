"""A stream whose items change every day: what a table of so many bytes makes of it.

Every day some of the items die and others are born, whose keys nobody has seen. Users click on what
they like: an item has a quality, by which it is met more or less often (`--merit`, the correlation
with the logarithm of its frequency), and user and item tastes in 4 respects. One pass over the
stream; each batch is predicted before it is trained on, and the log loss is the mean of the last
half of the days. The model is a product of the user's and the item's vector. At equal bytes, those
of rows, Adagrad's sums, index and candidates:

  a row for every item   as many rows as there are items in all: the reference, of more bytes
  hash trick             the hash of the key is the row
  multi-hash             two rows by two hashes, side by side
  zeros till admitted    rows for items met often enough, the others have vectors of zeros
  compressed newcomers   the same with fewer rows, the others have vectors by two hashes: a
                         sixteenth of the bytes, and `--newcomer-rate` of the learning rate, as
                         what many items share is met by all of their noise

Rows of items that were not met for a day are taken back in the evening.

    python benchmarks/drift.py --seeds 0 1 2
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import qrhash
from qrhash import EmbedConfig, Keys, MultiHash, dynamic

FEATURES = 16
RESPECTS = 4
# A row and its Adagrad sums; of a row with an index, and of a candidate, that besides.
ROW_BYTES, INDEX_BYTES = 8 * FEATURES, 52


class Stream(NamedTuple):
    """A log in the order of time.

    Attributes:
      users: [days, rows].
      items: numbers of items, [days, rows].
      clicks: 0 or 1, [days, rows].
      truth: log loss of the odds that the clicks were drawn with, of the last half of the days.
      num_items: how many items there are in all.
    """

    users: np.ndarray
    items: np.ndarray
    clicks: np.ndarray
    truth: float
    num_items: int


def make_stream(arguments: argparse.Namespace, seed: int) -> Stream:
    """A stream of its own for each seed."""
    rng = np.random.default_rng(seed)
    days, rows, at_once = arguments.days, arguments.rows, arguments.items
    popularity = (np.arange(at_once) + 10.0) ** -1
    ends = np.cumsum(popularity / popularity.sum())
    tastes = rng.normal(size=(arguments.users, RESPECTS))
    fame = np.log(popularity)
    merit = arguments.merit * (fame - fame.mean()) / fame.std()
    alive, num_items = np.arange(at_once), at_once
    born = at_once * days
    quality, of_items = rng.normal(size=born), rng.normal(size=(born, RESPECTS))
    quality *= (1 - arguments.merit**2) ** 0.5
    quality[alive] += merit
    users, items, odds = [], [], []
    for _ in range(days):
        dead = rng.random(at_once) < arguments.turnover
        alive = alive.copy()
        alive[dead] = num_items + np.arange(dead.sum())
        quality[alive[dead]] += merit[dead]
        num_items += int(dead.sum())
        user = rng.integers(arguments.users, size=rows)
        item = alive[np.minimum(np.searchsorted(ends, rng.random(rows)), at_once - 1)]
        liking = np.sum(tastes[user] * of_items[item], axis=1) / RESPECTS**0.5
        users.append(user)
        items.append(item)
        odds.append(1 / (1 + np.exp(1 - quality[item] - liking)))
    chances = np.array(odds)
    clicks = (rng.random(chances.shape) < chances).astype(np.float32)
    late = slice(days // 2, None)
    likely = np.where(clicks[late] > 0, chances[late], 1 - chances[late])
    truth = float(-np.log(likely).mean())
    return Stream(np.array(users), np.array(items), clicks, truth, num_items)


def contenders(num_bytes: int, num_items: int, a_day: int) -> dict[str, dynamic.DynamicConfig]:
    """Configs of so many bytes; all are dynamic, some with hardly a row of their own."""
    rows = num_bytes // ROW_BYTES
    never = dynamic.AdmitByChance(1e-9)

    def by_hashes(rows: int, k: int) -> EmbedConfig:
        partition = MultiHash((rows,) * k, seed=1)
        return EmbedConfig(partition, FEATURES, "concat", large_table_rows=1)

    def growing(num_bytes: int, **options: Any) -> dynamic.DynamicConfig:
        # As many candidates as rows.
        capacity = num_bytes // (ROW_BYTES + 2 * INDEX_BYTES)
        return dynamic.DynamicConfig(
            capacity,
            FEATURES,
            admission=dynamic.ExactCount(2, capacity),
            eviction=dynamic.StepsSinceUse(a_day),
            large_table_rows=1,
            **options,
        )

    def hashed(k: int) -> dynamic.DynamicConfig:
        refused = by_hashes(rows, k)
        return dynamic.DynamicConfig(1, FEATURES, admission=never, refused=refused)

    every = dynamic.DynamicConfig(num_items, FEATURES, large_table_rows=1)
    return {
        "a row for every item": every,
        "hash trick": hashed(1),
        "multi-hash": hashed(2),
        "zeros till admitted": growing(num_bytes),
        "compressed newcomers": growing(num_bytes * 15 // 16, refused=by_hashes(rows // 16, 2)),
    }


def kinds_of(config: dynamic.DynamicConfig) -> dynamic.Parameters:
    """Which tables have rows of keys' own, and which are shared beside such."""
    is_beside = config.eviction is not None
    tables = 0 if config.refused is None else config.refused.num_tables
    return dynamic.Parameters("own", ("shared" if is_beside else "own",) * tables)


def run(config: dynamic.DynamicConfig, stream: Stream, arguments: argparse.Namespace) -> float:
    """Log loss of the last half of the days, each batch predicted before it is trained on."""
    adagrad = functools.partial(optax.adagrad, initial_accumulator_value=1e-8)
    rates = {"own": arguments.rate, "shared": arguments.rate * arguments.newcomer_rate}
    kinds = {"items": kinds_of(config), "users": "own", "bias": "own"}
    of_kinds = {kind: adagrad(rate) for kind, rate in rates.items()}
    tx = qrhash.touched_rows(optax.partition(of_kinds, kinds))
    of_users, of_items = jax.random.split(jax.random.key(0))
    users = jax.random.normal(of_users, (arguments.users, FEATURES)) * 0.3
    params: dict[str, Any]
    params = {"items": dynamic.init(of_items, config), "users": users, "bias": jnp.zeros(())}
    state, opt_state = dynamic.init_state(config), tx.init(params)
    large = {"items": dynamic.large(config), "users": False, "bias": False}

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, opt_state: Any, batch: Any, number: Any) -> Any:
        users, keys, clicks = batch
        state, found = dynamic.assign(state, keys, config, number)
        started, new = dynamic.start_rows(params["items"], found, config)
        params = params | {"items": started}
        rows = {"items": new, "users": None, "bias": None}
        opt_state = qrhash.reset_rows(tx, opt_state, params, rows)

        def loss_fn(params: Any) -> Any:
            item = dynamic.lookup(params["items"], found, config)
            logits = params["bias"] + item[:, 0] + jnp.sum(item * params["users"][users], axis=1)
            return optax.sigmoid_binary_cross_entropy(logits, clicks).mean()

        loss, grads = qrhash.value_and_grad(loss_fn, large)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return qrhash.apply_updates(params, updates), state, opt_state, loss

    losses, number = [], 0
    for day in range(arguments.days):
        of_day = []
        for start in range(0, arguments.rows, arguments.batch):
            part = slice(start, start + arguments.batch)
            users_of, items = stream.users[day, part], stream.items[day, part]
            batch = jnp.asarray(users_of), Keys.of(items), jnp.asarray(stream.clicks[day, part])
            params, state, opt_state, loss = step(params, state, opt_state, batch, number)
            of_day.append(loss)
            number += 1
        losses.append(float(jnp.stack(of_day).mean()))
        if config.eviction is not None:
            state, _ = dynamic.evict(state, params["items"], config, number)
    return statistics.mean(losses[arguments.days // 2 :])


def main() -> None:
    """Trains all on the streams of all seeds, prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--rows", type=int, default=60_000, help="of a day")
    parser.add_argument("--items", type=int, default=20_000, help="alive at once")
    parser.add_argument("--turnover", type=float, default=0.2, help="of the items, that die a day")
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of Adagrad")
    parser.add_argument("--newcomer-rate", type=float, default=0.3, help="of the learning rate")
    parser.add_argument("--merit", type=float, default=0.5, help="of items that are met often")
    parser.add_argument("--share", type=float, default=0.15, help="of the bytes of all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        stream = make_stream(arguments, seed)
        num_bytes = int(arguments.share * ROW_BYTES * stream.num_items)
        a_day = -(-arguments.rows // arguments.batch)
        figures.setdefault("the true odds", []).append(stream.truth)
        for name, config in contenders(num_bytes, stream.num_items, a_day).items():
            figures.setdefault(name, []).append(run(config, stream, arguments))
    table = Table(title=f"log loss, {len(arguments.seeds)} seeds")
    for column in ("items by", "mean", "against compressed newcomers, each seed"):
        table.add_column(column, justify="left" if column == "items by" else "right")
    ours = figures["compressed newcomers"]
    for name, values in figures.items():
        each = ", ".join(f"{100 * (a / b - 1):+.2f} %" for a, b in zip(values, ours, strict=True))
        table.add_row(name, f"{statistics.mean(values):.4f}", each)
    Console().print(table)
    if arguments.json:
        of_run = {name: v for name, v in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps(of_run | {"log_loss": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
