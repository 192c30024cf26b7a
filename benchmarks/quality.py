"""What a byte budget buys: log loss of each operation at equal bytes, and of each start.

Two kinds of data. Clicks: Criteo-format files, with the models and defaults of `qrhash train`, ids
numbered on the training lines, the last lines to test on. Ratings: users, items and whether the
rating is good, with the vectors of both, and their product, under a small network; tables learn by
Adagrad, all else by Adam, and the best of three epochs counts. Without a file of ratings (tab-
separated: user, item, rating from 1 to 5, further columns unread) they come from a model of users
and items with tastes, of falling popularity.

    python benchmarks/quality.py --criteo clicks.tsv.gz --test-rows 8000 --ratings ratings.tsv

prints, for each data set, the mean test log loss over the seeds and its difference to full tables:

  operations  each of `--operations` at every `--compression` in bytes
  starts      full tables for each `--init-stddev`, the default among them
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qrhash
from qrhash.ctr.config_file import load
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.records import Keeper
from qrhash.ctr.run.train import fit
from qrhash.types import Array

OPERATIONS = ("mult", "concat", "project", "path", "add", "hash trick")
FEATURES = 32  # of ratings; of clicks what `qrhash train` has
GOOD = 4.0  # a rating of at least so much
EPOCHS, BATCH = 3, 256
TABLE_LR, DENSE_LR = 0.05, 1e-3

Score = Callable[[dict[str, Any], int], float]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to be compared: its name, and what it is compressed by.

    Attributes:
      name: what to call it.
      options: operation, compression, init_stddev; as far as they are not the defaults.
    """

    name: str
    options: dict[str, Any]


def main() -> None:
    """Trains all models on all data and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--criteo", nargs="*", default=[], help="Criteo-format files")
    parser.add_argument("--test-rows", type=int, help="last lines of each, to test on")
    parser.add_argument("--ratings", nargs="*", default=[], help="files of ratings")
    parser.add_argument("--good-from", type=float, default=GOOD, help="ratings that are good")
    parser.add_argument("--operations", nargs="*", choices=OPERATIONS, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compression", type=float, nargs="*", default=[4, 8, 15])
    parser.add_argument("--init-stddev", type=float, nargs="*", default=[0.01, 0.03, 0.06, 0.18])
    arguments = parser.parse_args()
    data: dict[str, functools.partial[float]] = {
        Path(file).name: functools.partial(clicks, file, arguments.test_rows)
        for file in arguments.criteo
    }
    for file in arguments.ratings:
        data[Path(file).name] = functools.partial(
            ratings, *read_ratings(Path(file), arguments.good_from)
        )
    if not arguments.ratings:
        data["ratings of a model"] = functools.partial(ratings, *model_ratings())
    for name, score in data.items():
        if arguments.init_stddev:
            compare(name, "starts", starts(arguments.init_stddev), score, arguments.seeds)
        names = arguments.operations or OPERATIONS
        cases = operations(arguments.compression, names)
        compare(name, "operations", cases, score, arguments.seeds)


def starts(stddevs: Sequence[float]) -> Iterator[Case]:
    """Full tables, by the standard deviation that they start with."""
    yield Case("full tables", {})
    for stddev in stddevs:
        yield Case(f"full tables, {stddev}", {"init_stddev": stddev})


def operations(compressions: Sequence[float], names: Sequence[str]) -> Iterator[Case]:
    """Full tables, and every operation at every compression."""
    yield Case("full tables", {})
    for compression in compressions:
        for operation in names:
            options = {"operation": operation, "compression": compression}
            yield Case(f"{compression:g}x {operation}", options)


def compare(
    data: str, title: str, cases: Iterator[Case], score: Score, seeds: Sequence[int]
) -> None:
    """Prints the table of some cases on one data set; the first one is the yardstick."""
    table = Table(title=f"{data}: {title}, {len(seeds)} seeds")
    for column in ("model", "mean log loss", "smallest to largest", "against full tables"):
        table.add_column(column, justify="left" if column == "model" else "right")
    full = None
    for case in track(list(cases), f"{data}, {title}", console=Console(stderr=True)):
        try:
            losses = [score(case.options, seed) for seed in seeds]
        except (UserError, ValueError) as error:  # a budget below the smallest tables there are
            table.add_row(case.name, str(error).partition(":")[0])
            continue
        mean = statistics.mean(losses)
        full = full or mean
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        table.add_row(case.name, f"{mean:.4f}", spread, f"{mean / full - 1:+.2%}")
    Console().print(table)


def clicks(file: str, test_rows: int | None, options: dict[str, Any], seed: int) -> float:
    """Test log loss of `qrhash train` on a Criteo-format file."""
    given = {"data": file, "seed": seed, "evaluations": 1, **options}
    given |= {} if test_rows is None else {"test_rows": test_rows}
    if given.get("operation") == "hash trick":
        given |= {"operation": "mult", "partition": "hash-trick"}
    if "compression" not in given:
        given["partition"] = "full"
    with Display(Console(quiet=True)) as display:
        return fit(load(None, given), display, Keeper()).test.log_loss


def read_ratings(path: Path, good_from: float = GOOD) -> tuple[np.ndarray, np.ndarray]:
    """Users and items [n, 2], and whether each rating is good [n], in an order of no meaning."""
    cells = np.loadtxt(path, usecols=(0, 1, 2), skiprows=1)
    cells = np.random.default_rng(0).permutation(cells)
    return cells[:, :2].astype(np.int64), (cells[:, 2] >= good_from).astype(np.float32)


def model_ratings(
    users: int = 4000, items: int = 2500, number: int = 300_000
) -> tuple[np.ndarray, np.ndarray]:
    """The same of users and items with tastes in 12 respects, some of them met far more often."""
    rng = np.random.default_rng(0)
    activity = rng.lognormal(0.0, 1.1, users)
    popularity = (np.arange(1, items + 1) + 20.0) ** -1.1
    ids = np.stack(
        [
            rng.choice(users, number, p=np.sort(activity)[::-1] / activity.sum()),
            rng.choice(items, number, p=popularity / popularity.sum()),
        ],
        axis=1,
    )
    weight = np.arange(1.0, 13.0) ** -0.5
    tastes = [rng.normal(size=(size, 12)) * weight for size in (users, items)]
    liking = (tastes[0][ids[:, 0]] * tastes[1][ids[:, 1]]).sum(1) / np.linalg.norm(weight**2)
    biases = rng.normal(size=users)[ids[:, 0]] * 0.5 + rng.normal(size=items)[ids[:, 1]] * 0.7
    chance = 1 / (1 + np.exp(-1.1 * (0.7 * liking + biases + 0.1)))
    return ids, (rng.random(number) < chance).astype(np.float32)


class Rater(nnx.Module):
    """The vectors of a user and an item, and their product, under a small network."""

    def __init__(self, configs: dict[str, qrhash.EmbedConfig], seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = qrhash.nnx.EmbedCollection(configs, rngs=rngs)
        self.layers = nnx.List(
            nnx.Linear(m, n, rngs=rngs) for m, n in ((3 * FEATURES, 128), (128, 64), (64, 1))
        )

    def __call__(self, ids: Array) -> jax.Array:
        """Users and items [batch, 2] -> logits [batch]."""
        vectors = self.embed({"user": ids[:, 0], "item": ids[:, 1]})
        user, item = vectors["user"], vectors["item"]
        x = jnp.concatenate([user, item, user * item], axis=1)
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)[:, 0]


def ratings(ids: np.ndarray, good: np.ndarray, options: dict[str, Any], seed: int) -> float:
    """Least test log loss of three epochs on ratings, of which the last fifth is to test on."""
    split = len(good) * 4 // 5
    ids = np.stack([by_frequency(column, split) for column in ids.T], axis=1).astype(np.int32)
    sizes = dict(zip(("user", "item"), ids.max(axis=0) + 1, strict=True))
    configs = {name: config_of(int(size), options) for name, size in sizes.items()}
    return least_loss(ids, good, split, configs, seed)


def least_loss(
    ids: np.ndarray,
    good: np.ndarray,
    split: int,
    configs: dict[str, qrhash.EmbedConfig],
    seed: int,
) -> float:
    """Least test log loss of three epochs on ids [n, 2] up to `split`, the others to test on."""
    return min(losses(Rater(configs, seed), ids, good, split, seed))


def losses(
    model: Rater,
    ids: np.ndarray,
    good: np.ndarray,
    split: int,
    seed: int,
    *,
    epochs: int = EPOCHS,
    table_lr: float = TABLE_LR,
) -> Iterator[float]:
    """Trains a model, in place, and yields its test log loss after each epoch."""
    is_table = lambda _, value: isinstance(value, qrhash.nnx.Table)  # noqa: E731
    labels = nnx.map_state(
        lambda path, v: "table" if is_table(path, v) else "dense", nnx.state(model)
    )
    steps = epochs * (split // BATCH)
    optimizer = qrhash.nnx.Optimizer(
        model,
        optax.partition(
            {
                "table": optax.adagrad(table_lr, initial_accumulator_value=1e-8),
                "dense": optax.adam(optax.linear_schedule(DENSE_LR, 0.0, steps)),
            },
            labels,
        ),
    )

    def loss(model: Rater, ids: Array, good: Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(model(ids), good).mean()

    def step(model: Rater, optimizer: Any, ids: Array, good: Array) -> None:
        optimizer.update(model, qrhash.nnx.grad(loss)(model, ids, good))

    step = nnx.cached_partial(nnx.jit(step, donate_argnums=(0, 1)), model, optimizer)
    test = nnx.jit(loss)
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(split)
        for batch in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            step(ids[batch], good[batch])
        yield float(test(model, ids[split:], good[split:]))


def by_frequency(column: np.ndarray, split: int) -> np.ndarray:
    """Ids by falling frequency in the first rows, from 1 on; 0 for those not met there."""
    known, counts = np.unique(column[:split], return_counts=True)
    numbers = np.empty(len(known), np.int64)
    numbers[np.argsort(-counts, kind="stable")] = np.arange(1, len(known) + 1)
    places = np.searchsorted(known, column).clip(max=len(known) - 1)
    return np.where(known[places] == column, numbers[places], 0)


def config_of(size: int, options: dict[str, Any]) -> qrhash.EmbedConfig:
    """The embedding of a feature; or the one given for its size, in "configs"."""
    if "configs" in options:
        given: qrhash.EmbedConfig = options["configs"][size]
        return given
    options = dict(options)
    compression, operation = options.pop("compression", 1.0), options.pop("operation", "mult")
    if operation == "hash trick":
        buckets = max(1, int(size / compression))
        return qrhash.EmbedConfig(qrhash.HashTrick(size, buckets), FEATURES, **options)
    return qrhash.EmbedConfig.fit(size, FEATURES, operation, compression=compression, **options)


if __name__ == "__main__":
    main()
