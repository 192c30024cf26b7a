"""Retrieval by two towers on a made log: recall against popularity's, and what log q does.

Users and items have tastes in 8 respects, and item r has a popularity of (r + 10) ** -skew: a user
meets an item with odds of its popularity times exp(2 / sqrt(8) taste of user . taste of item). All
rows are positive. The last tenth of the log is tested on: whether the item of a row is among the
first 10 of all items, by

  true odds    what the log was drawn by: nobody can do better
  by counts    `qrhash train --model two-tower`, items' frequencies from the vocabulary
  estimated    the same, frequencies estimated as the batches go by
  uncorrected  the same without them: the loss hides what is popular
  popularity   the most popular items of the training rows for everybody

    python benchmarks/retrieval.py --seeds 0 1 2

Each seed makes a log of its own and trains on it, with the defaults of the trainer.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from criteo_quality import fit_quietly
from rich.console import Console
from rich.table import Table

from qrhash.ctr.model.ranks import Retrieved, retrieved
from qrhash.ctr.run.records import Summary
from qrhash.ctr.run.retrieval import Retrieval

K = 10
RESPECTS = 8
TESTED = 0.1

# How often each id of the items comes, in place of what the trainer counts.
_Counts = Callable[[Retrieval], np.ndarray | None]
_counted: _Counts = Retrieval._counts
FREQUENCIES: dict[str, _Counts] = {
    "by counts": _counted,
    "estimated": lambda goal: None,
    "uncorrected": lambda goal: np.ones_like(_counted(goal)),
}


def main() -> None:
    """Trains all models on all logs, prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--skew", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, help="TOML file with other options of qrhash train")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    found = [recalls(arguments, seed) for seed in arguments.seeds]
    figures = {name: [each[name] for each in found] for name in found[0]}
    Console().print(comparison(figures))
    if arguments.json:
        of_run = {name: getattr(arguments, name) for name in ("users", "items", "rows", "skew")}
        of_run |= {"epochs": arguments.epochs, "seeds": arguments.seeds, f"recall_{K}": figures}
        arguments.json.write_text(json.dumps(of_run, indent=1) + "\n")


def recalls(arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Recall at K on the log of a seed, by all there is to compare."""
    users, items, odds = log(arguments.users, arguments.items, arguments.rows, arguments.skew, seed)
    tested = max(1, round(len(users) * TESTED))
    known = np.isin(np.arange(arguments.items), items[:-tested])
    found = {"true odds": recall(best(odds, users[-tested:], items[-tested:], known))}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "log.parquet"
        pyarrow.parquet.write_table(pa.table({"user_id": users, "item_id": items}), data)
        options = {
            "data": str(data),
            "label": "none",
            "model": "two-tower",
            "items": "item_id",
            "recall_at": f"{K}",
            "test_rows": tested,
            "epochs": arguments.epochs,
            "evaluations": 1,
            "seed": seed,
        }
        for name, counts in FREQUENCIES.items():
            with mock.patch.object(Retrieval, "_counts", counts):
                summary: Summary = fit_quietly(arguments.config, options)
            found[name] = recall(summary.test)
    return found | {"popularity": recall(summary.constant)}


def log(
    num_users: int, num_items: int, rows: int, skew: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users [rows], the items that they met [rows], and the odds [users, items]."""
    rng = np.random.default_rng(seed)
    users, items = (rng.normal(size=(size, RESPECTS)) for size in (num_users, num_items))
    popularity = (np.arange(num_items) + 10.0) ** -skew
    odds = popularity * np.exp(users @ items.T * (2 / RESPECTS**0.5))
    ends = np.cumsum(odds, axis=1)
    who = rng.integers(num_users, size=rows)
    drawn = rng.random(rows) * ends[who, -1]
    met = [np.searchsorted(ends[user], at) for user, at in zip(who, drawn, strict=True)]
    return who, np.array(met), odds


def best(odds: np.ndarray, users: np.ndarray, items: np.ndarray, known: np.ndarray) -> Retrieved:
    """The scores of the true odds among the items known; others are misses, as for a model."""
    among = np.where(known, odds, 0)[users]
    ranks = 1.0 + (among > odds[users, items][:, None]).sum(axis=1)
    return retrieved(np.where(known[items], ranks, np.inf), (K,))


def recall(scores: Any) -> float:
    """The one recall that was asked for."""
    return float(scores.recall[K])


def comparison(figures: dict[str, list[float]]) -> Table:
    """Means, spreads over the seeds, and how many times that of popularity."""
    table = Table(title=f"recall at {K}, {len(figures['popularity'])} seeds")
    for column in ("items by", "mean", "smallest to largest", "times popularity's"):
        table.add_column(column, justify="left" if column == "items by" else "right")
    least = statistics.mean(figures["popularity"])
    for name, values in figures.items():
        mean = statistics.mean(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        table.add_row(name, f"{mean:.3f}", spread, f"{mean / least:.2f}")
    return table


if __name__ == "__main__":
    main()
