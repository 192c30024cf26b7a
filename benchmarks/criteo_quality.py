"""Quality at 4 collisions on Criteo rows: against full tables, and against none.

Trains four models with the same settings and seeds, and prints the mean test log loss of each:

  compressed  the columns longer than the threshold at `--collisions`
  full        full tables for all columns
  short       without the columns longer than the threshold
  constant    the training click rate for every row

    python benchmarks/criteo_quality.py criteo_40k.tsv.gz --test-rows 8000 --seeds 0 1 2
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qrhash.ctr.config_file import load
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.records import Keeper, Summary
from qrhash.ctr.run.train import fit

PARTITIONS = {"compressed": "quotient-remainder", "full": "full", "short": "drop"}


def main() -> None:
    """Trains all models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="Criteo-format file")
    parser.add_argument("--test-rows", type=int, default=8000)
    parser.add_argument("--collisions", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, help="TOML file with other options of qrhash train")
    arguments = parser.parse_args()
    losses = log_losses(
        arguments.config,
        arguments.seeds,
        data=arguments.data,
        test_rows=arguments.test_rows,
        collisions=arguments.collisions,
        evaluations=1,
    )
    Console().print(comparison(losses))


def log_losses(config: Path | None, seeds: list[int], **options: Any) -> dict[str, list[float]]:
    """Test log loss of every model, one for each seed."""
    losses: dict[str, list[float]] = {name: [] for name in (*PARTITIONS, "constant")}
    for name, partition in PARTITIONS.items():
        for seed in seeds:
            summary = fit_quietly(config, {"partition": partition, "seed": seed, **options})
            losses[name].append(summary.test.log_loss)
            if name == "full":
                losses["constant"].append(summary.constant.log_loss)
    return losses


def comparison(losses: dict[str, list[float]]) -> Table:
    """Means, spreads over the seeds, and differences to full tables."""
    table = Table(title=f"test log loss, {len(losses['full'])} seeds")
    for column in ("model", "mean", "smallest to largest", "against full"):
        table.add_column(column, justify="left" if column == "model" else "right")
    full = statistics.mean(losses["full"])
    for name, values in losses.items():
        mean = statistics.mean(values)
        spread = f"{min(values):.4f} to {max(values):.4f}"
        table.add_row(name, f"{mean:.4f}", spread, f"{mean / full - 1:+.2%}")
    return table


def fit_quietly(config: Path | None, given: dict[str, Any]) -> Summary:
    """What comes of a run that leaves nothing behind."""
    # A bar on a terminal; elsewhere the lines of dozens of runs would bury what came of them.
    with Display(Console(stderr=True, quiet=not sys.stderr.isatty())) as display:
        return fit(load(config, given), display, Keeper())


if __name__ == "__main__":
    main()
