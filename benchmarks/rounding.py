"""What rounding costs in quality: tables of bfloat16 against tables of float32 on click rows.

A factorization machine (Rendle 2010) on Criteo-format rows, of which the last are to test on: its
tables learn by Adagrad, those of more than 200 ids at 4 collisions, all by rows. With the same
seeds and the same order of the rows they are of float32, and of bfloat16

  stochastic   rounded up or down by chance
  compensated  what was rounded off is kept, and added to the next update
  nearest      as it comes

The log loss of this model hardly goes by chance, so that small differences show. Updates become
small late in a long training; a low `--table-lr` makes them small in a short one. With `--dlrm` the
same of the model of `qrhash train`, whose small tables are compensated where large ones are rounded
by chance: there one seed's difference is as large as what is looked for.

    python benchmarks/rounding.py criteo_40k.tsv.gz --table-lr 0.05 0.005
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from criteo_quality import fit_quietly
from keys_quality import read_rows
from quality import by_frequency
from rich.console import Console
from rich.progress import track
from rich.table import Table
from training_step import columns

import qrhash
from qrhash.ctr.data.criteo import CATEGORIES, COLUMNS
from qrhash.strings import hash_strings

FEATURES, COLLISIONS, BATCH, DENSE_LR = 16, 4, 128, 1e-3
ROUNDINGS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "float32": optax.identity,
    "stochastic": qrhash.stochastic_rounding,
    "compensated": qrhash.compensated_rounding,
    "nearest": optax.identity,
}
OF_DLRM: dict[str, dict[str, Any]] = {
    "float32": {},
    "stochastic": {"param_dtype": "bfloat16", "rounding": "stochastic"},
    "nearest": {"param_dtype": "bfloat16", "rounding": "nearest"},
}


class Clicks(NamedTuple):
    """Rows in their order, of which the first `split` are trained on.

    Attributes:
      numbers: [n, 13].
      ids: [n, 26], of each column numbered by falling frequency, 0 if not trained on.
      clicks: [n], 0 or 1.
      split: how many rows are trained on.
    """

    numbers: np.ndarray
    ids: np.ndarray
    clicks: np.ndarray
    split: int


def read(data: str, test_rows: int) -> Clicks:
    """The rows of a file in the Criteo format."""
    table = read_rows(data)
    split = len(table) - test_rows
    clicks, *numbers = (table[name].to_numpy() for name in COLUMNS if name not in CATEGORIES)
    counts = np.nan_to_num(np.stack(numbers, axis=1).astype(np.float32))
    hashes = [hash_strings(table[name].to_pylist()) for name in CATEGORIES]
    ids = np.stack([by_frequency(column, split) for column in hashes], axis=1)
    return Clicks(
        np.log1p(np.maximum(counts, 0)), ids.astype(np.int32), clicks.astype(np.float32), split
    )


def factorization_machine(
    data: Clicks, rounding: str, table_lr: float
) -> Callable[[int, int], list[float]]:
    """(seed, epochs) -> the test log loss after each epoch; compiled once for all seeds."""
    dtype = jnp.float32 if rounding == "float32" else jnp.bfloat16
    sizes = (data.ids.max(axis=0) + 1).tolist()
    config = columns(
        sizes, COLLISIONS, FEATURES, param_dtype=dtype, dtype=jnp.float32, large_table_rows=1
    )
    of_tables = optax.chain(qrhash.adagrad(table_lr), ROUNDINGS[rounding]())
    tx = qrhash.touched_rows(
        optax.partition(
            {"tables": of_tables, "dense": optax.adam(DENSE_LR)},
            {"tables": "tables", "weights": "dense", "bias": "dense"},
        )
    )

    def loss(params: Any, numbers: jax.Array, ids: jax.Array, clicks: jax.Array) -> jax.Array:
        of_columns = dict(zip(config.configs, ids.T, strict=True))
        vectors = qrhash.collection.lookup(params["tables"], of_columns, config)
        each = jnp.stack(list(vectors.values()), axis=1)
        pairs = (each.sum(axis=1) ** 2 - (each**2).sum(axis=1)).sum(axis=1) / 2
        linear = params["bias"] + numbers @ params["weights"] + each[..., 0].sum(axis=1)
        return optax.sigmoid_binary_cross_entropy(linear + pairs, clicks).mean()

    large = {"tables": config.large_tables, "weights": False, "bias": False}
    value_and_grad = qrhash.value_and_grad(loss, large)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params: Any, state: Any, *batches: jax.Array) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            _, grads = value_and_grad(params, *batch)
            updates, state = tx.update(grads, state, params)
            return (qrhash.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    test = jax.jit(loss)
    rows = data[:3]

    def run(seed: int, epochs: int) -> list[float]:
        tables = qrhash.collection.init(jax.random.key(seed), config)
        params = {
            "tables": tables,
            "weights": jnp.zeros(data.numbers.shape[1]),
            "bias": jnp.zeros(()),
        }
        state, losses = tx.init(params), []
        for number in range(epochs):
            order = np.random.default_rng((seed, number)).permutation(data.split)
            order = order[: data.split // BATCH * BATCH].reshape(-1, BATCH)
            params, state = epoch(params, state, *(each[order] for each in rows))
            losses.append(float(test(params, *(each[data.split :] for each in rows))))
        return losses

    return run


def dlrm(options: dict[str, Any], config: Path | None) -> Callable[[int, int], list[float]]:
    """(seed, epochs) -> the test log loss of a run of `qrhash train`."""

    def run(seed: int, epochs: int) -> list[float]:
        summary = fit_quietly(config, {**options, "seed": seed, "epochs": epochs, "evaluations": 1})
        return [summary.test.log_loss]

    return run


def losses_of(
    run: Callable[[int, int], list[float]], what: str, arguments: argparse.Namespace
) -> np.ndarray:
    """Test log losses, [seeds, evaluations]."""
    seeds = track(arguments.seeds, what, console=Console(stderr=True))
    return np.array([run(seed, arguments.epochs) for seed in seeds])


def against(losses: np.ndarray, others: np.ndarray) -> list[str]:
    """For each evaluation, mean difference in per cent and its standard error, as cells."""
    if losses is others:
        return [""] * losses.shape[1]
    differences = losses / others - 1
    errors = differences.std(axis=0, ddof=1) / len(losses) ** 0.5
    pairs = zip(differences.mean(axis=0), errors, strict=True)
    return [f"{mean:+.3%} ({error:.3%})" for mean, error in pairs]


def add_rows(table: Table, rate: float, losses: dict[str, np.ndarray]) -> None:
    """The lines of one learning rate."""
    for name, of_name in losses.items():
        mean = f"{of_name.mean(axis=0)[-1]:.5f}"
        table.add_row(f"{rate:g}", name, mean, *against(of_name, losses["float32"]))


def main() -> None:
    """Trains all models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="Criteo-format text, plain or gzip")
    parser.add_argument("--test-rows", type=int, default=8000, help="last lines, to test on")
    parser.add_argument("--table-lr", type=float, nargs="+", default=[0.05, 0.005])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--dlrm", action="store_true", help="the model of qrhash train")
    parser.add_argument("--config", type=Path, help="with --dlrm: TOML file of qrhash train")
    given = parser.parse_args()
    table = Table(title=f"test log loss, {len(given.seeds)} seeds (standard error)")
    evaluations = ["at the end"] if given.dlrm else [f"epoch {n + 1}" for n in range(given.epochs)]
    for header in ("table lr", "tables", "mean", *evaluations):
        table.add_column(header, justify="right")
    data = None if given.dlrm else read(given.data, given.test_rows)
    for rate in given.table_lr:
        runs = {}
        if data is None:
            options = {"data": given.data, "test_rows": given.test_rows, "table_lr": rate}
            runs = {name: dlrm(options | more, given.config) for name, more in OF_DLRM.items()}
        else:
            runs = {name: factorization_machine(data, name, rate) for name in ROUNDINGS}
        losses = {name: losses_of(run, f"{rate:g}, {name}", given) for name, run in runs.items()}
        add_rows(table, rate, losses)
    Console().print(table)


if __name__ == "__main__":
    main()
