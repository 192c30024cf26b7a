"""What a trained full table is worth to a compressed one: log loss by what tables start with.

A model with full tables is trained on the ratings of `benchmarks/quality.py`, made ones or those of
`--ratings`. Its tables are then replaced by those of every operation at every `--compression`, and
all is trained for `--epochs` more, with optimizers that start anew, from four starts:

  fitted    tables by `qrhash.fitting.fit`, weighted by how often ids are met; the trained network
  the mean  tables whose vectors are all about the weighted mean of the full ones; the same network
  drawn     tables as `qrhash.init` draws them; the same network
  anew      tables and network as they are drawn

    python benchmarks/fitting.py

prints, for each, the mean test log loss over the seeds, of the fitted ones also before they are
trained on, and the relative squared errors of the fits: of all users and items, and of the third
of the look-ups that goes to the most of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from quality import OPERATIONS, Rater, by_frequency, config_of, losses, model_ratings, read_ratings
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qrhash
from qrhash import fitting
from qrhash.operations import Projection

COLUMNS = ("user", "item")
STARTS = ("fitted", "the mean", "drawn", "anew")

Parameters = Mapping[str, tuple[Any, Projection | None]]  # of each column, tables and projection


class Data(NamedTuple):
    """Ratings in an order of no meaning.

    Attributes:
      ids: users and items by falling frequency, [rows, 2].
      good: whether a rating is good, [rows].
      split: how many rows to train on.
    """

    ids: np.ndarray
    good: np.ndarray
    split: int

    def counts(self, column: str) -> np.ndarray:
        """How often each id is met in training."""
        ids = self.ids[:, COLUMNS.index(column)]
        return np.bincount(ids[: self.split], minlength=ids.max() + 1).astype(float)

    def configs(self, options: dict[str, Any]) -> dict[str, qrhash.EmbedConfig]:
        """The embeddings of users and items."""
        sizes = dict(zip(COLUMNS, (self.ids.max(axis=0) + 1).tolist(), strict=True))
        return {name: config_of(size, options) for name, size in sizes.items()}


def main() -> None:
    """Trains all models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ratings", help="a file of ratings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compression", type=float, nargs="*", default=[4, 15])
    parser.add_argument("--operations", nargs="*", default=OPERATIONS)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    raw = read_ratings(Path(arguments.ratings)) if arguments.ratings else model_ratings()
    data = as_data(*raw)
    trained = []
    for seed in arguments.seeds:
        full = Rater(data.configs({}), seed)
        loss = list(losses(full, data.ids, data.good, data.split, seed))[-1]
        trained.append((seed, full, loss))
    mean = statistics.mean(loss for *_, loss in trained)
    table = Table(title=f"full tables: {mean:.4f}, {len(trained)} seeds")
    for name in ("tables", "error", "of the tail", "seconds", "as fitted", *STARTS):
        table.add_column(name, justify="left" if name == "tables" else "right")
    cases = [(times, name) for times in arguments.compression for name in arguments.operations]
    for times, name in track(cases, "training", console=Console(stderr=True)):
        options = {"operation": name, "compression": times}
        found = [measured(data, options, *each, arguments.epochs) for each in trained]
        figures = [statistics.mean(each) for each in zip(*found, strict=True)]
        shown = [f"{each:.2f}" for each in figures[:3]] + [f"{each:.4f}" for each in figures[3:]]
        table.add_row(f"{times:g}x {name}", *shown)
    Console().print(table)


def as_data(raw: np.ndarray, good: np.ndarray) -> Data:
    """Ratings with ids by falling frequency in the first four fifths."""
    split = len(good) * 4 // 5
    ids = np.stack([by_frequency(column, split) for column in raw.T], axis=1)
    return Data(ids.astype(np.int32), good, split)


def measured(
    data: Data, options: dict[str, Any], seed: int, full: Rater, _: float, epochs: int
) -> Iterator[float]:
    """Error of all and of the tail, seconds, loss as fitted, and that of each start."""
    configs = data.configs(options)
    tables = {name: np.asarray(table) for name, (table,) in full.embed.tables.items()}
    began = time.perf_counter()
    fitted = {
        name: fitting.fit(tables[name], config, weights=data.counts(name))
        for name, config in configs.items()
    }
    seconds = time.perf_counter() - began
    yield statistics.mean(each.error.all for each in fitted.values())
    yield statistics.mean(each.error.tail or 0.0 for each in fitted.values())
    yield seconds
    means = {
        name: np.average(table, axis=0, weights=data.counts(name)) for name, table in tables.items()
    }
    key = jax.random.key(seed + 100)
    starts: dict[str, Callable[[], Rater]] = {
        "fitted": lambda: with_tables(full, configs, {n: f[:2] for n, f in fitted.items()}),
        "the mean": lambda: with_tables(
            full, configs, {n: at_mean(key, c, means[n]) for n, c in configs.items()}
        ),
        "drawn": lambda: with_tables(
            full, configs, {n: drawn(key, config) for n, config in configs.items()}
        ),
        "anew": lambda: Rater(configs, seed + 100),
    }
    yield loss_of(starts["fitted"](), data)
    for name in STARTS:
        model = starts[name]()
        yield list(losses(model, data.ids, data.good, data.split, seed, epochs=epochs))[-1]


def loss_of(model: Rater, data: Data) -> float:
    """Test log loss of a model as it is."""
    logits = nnx.jit(lambda model, ids: model(ids))(model, data.ids[data.split :])
    return float(optax.sigmoid_binary_cross_entropy(logits, data.good[data.split :]).mean())


def with_tables(
    full: Rater, configs: dict[str, qrhash.EmbedConfig], parameters: Parameters
) -> Rater:
    """The network of a trained model with other tables; copies, which training may overwrite."""
    model = Rater(configs, 0)
    for layer, trained in zip(model.layers, full.layers, strict=True):
        nnx.update(layer, jax.tree.map(jnp.copy, nnx.state(trained)))
    model.embed.set_tables(
        {name: tuple(map(jnp.copy, tables)) for name, (tables, _) in parameters.items()}
    )
    for name, (_, projection) in parameters.items():
        for field in configs[name].projection_fields:
            param = getattr(model.embed, f"{name}_{field}")
            param.set_value(jnp.copy(getattr(projection, field)))
    return model


def drawn(key: jax.Array, config: qrhash.EmbedConfig) -> tuple[Any, Projection | None]:
    """Tables and projection as they are drawn."""
    return qrhash.init(key, config), qrhash.init_projection(key, config)


def at_mean(
    key: jax.Array, config: qrhash.EmbedConfig, mean: np.ndarray
) -> tuple[Any, Projection | None]:
    """The same, moved so that all vectors are about the mean."""
    tables, projection = drawn(key, config)
    rows = [np.array(table) for table in tables]
    longest = max(range(len(rows)), key=lambda table: len(rows[table]))
    if projection is not None:
        projection = Projection(projection.kernel, jnp.asarray(mean, jnp.float32))
    elif config.operation == "concat":
        ends = np.cumsum([table.shape[1] for table in rows])[:-1]
        rows = [table + part for table, part in zip(rows, np.split(mean, ends), strict=True)]
    elif config.operation == "path" and len(rows) > 1:
        last = max(table for table in range(len(rows)) if table != longest)
        rows[last][:, -len(mean) :] += mean
    else:
        signs = config.operation == "mult"
        rows = [
            table + mean if number == longest else np.abs(table) if signs else table
            for number, table in enumerate(rows)
        ]
    return qrhash.as_tables([table.astype(np.float32) for table in rows], config), projection


if __name__ == "__main__":
    main()
