"""What a comparison shows: a table, a picture, and the figures as JSON.

Losses are compared seed by seed with those of full tables, since what a seed does to both is no
difference: the mean of these differences, and its standard error.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from qrhash.ctr.compare_settings import FULL
from qrhash.ctr.run.compare import Outcome

PICTURE, FIGURES = "comparison.png", "figures.json"


class Compared(NamedTuple):
    """An embedding at a size, over all seeds.

    Attributes:
      method: of `METHODS`.
      times: how many times fewer bytes than full tables were asked for.
      num_bytes: how many there are, of tables, projections and indices of keys.
      log_loss: of the test rows, mean over seeds; nan, if there can be none.
      excess: how much more that is than with full tables, in per cent, mean over seeds.
      error: the standard error of the excess; nan of one seed.
      auc: mean over seeds; nan, where there is none.
      reason: why there can be none.
    """

    method: str
    times: float
    num_bytes: float
    log_loss: float
    excess: float
    error: float
    auc: float
    reason: str


def compared(outcomes: Sequence[Outcome]) -> list[Compared]:
    """Outcomes of all seeds, one for each method and size, in their order."""
    full = {each.trial.seed: each.summary for each in outcomes if each.trial.method == FULL}
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.trial.method, outcome.trial.times), []).append(outcome)
    return [_compared(*key, group, full) for key, group in groups.items()]


def _compared(method: str, times: float, group: Sequence[Outcome], full: Any) -> Compared:
    reasons = [each.reason for each in group if each.reason]
    if reasons:
        nothing = math.nan
        return Compared(method, times, nothing, nothing, nothing, nothing, nothing, reasons[0])
    losses = np.array([each.summary["test_log_loss"] for each in group])
    before = np.array([full[each.trial.seed]["test_log_loss"] for each in group])
    excess = 100 * (losses / before - 1)
    aucs = [each.summary.get("test_auc") for each in group]
    taken = [each.summary["embedding_bytes"] + each.summary["index_bytes"] for each in group]
    error = float(np.std(excess, ddof=1)) / len(group) ** 0.5 if len(group) > 1 else math.nan
    return Compared(
        method,
        times,
        float(np.mean(taken)),
        float(losses.mean()),
        float(excess.mean()),
        error,
        math.nan if None in aucs else float(np.mean(np.array(aucs, float))),
        "",
    )


def table_of(rows: Sequence[Compared], seeds: int) -> Table:
    """The comparison as a table: of each size the best one first."""
    over = "1 seed" if seeds == 1 else f"{seeds} seeds"
    table = Table(title=f"test log loss against full tables, {over}")
    for column in ("bytes", "embedding", "log loss", "against full tables", "AUC"):
        table.add_column(column, justify="left" if column == "embedding" else "right")
    for times in sorted({each.times for each in rows}):
        of_size = [each for each in rows if each.times == times]
        of_size.sort(key=lambda each: (math.isnan(each.log_loss), each.log_loss))
        for each in of_size:
            if each.reason:
                table.add_row("", each.method, "none", each.reason, "")
                continue
            times_fewer = "" if each.method == FULL else f", {times:g} x fewer"
            size = f"{each.num_bytes:,.0f}{times_fewer}"
            auc = "" if math.isnan(each.auc) else f"{each.auc:.4f}"
            table.add_row(size, each.method, f"{each.log_loss:.4f}", _excess(each), auc)
        table.add_section()
    return table


def _excess(each: Compared) -> str:
    if each.method == FULL:
        return ""
    error = "" if math.isnan(each.error) else f" ± {each.error:.2f}"
    return f"{each.excess:+.2f}{error} %"


def draw(rows: Sequence[Compared], path: Path) -> None:
    """The comparison as a picture: the loss over the bytes, a line for each embedding."""
    # Slow to import, and used here only.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(each.method for each in rows if each.method != FULL))
    for number, method in enumerate(methods):
        some = [each for each in rows if each.method == method and not each.reason]
        some.sort(key=lambda each: each.num_bytes)
        errors = [each.error for each in some]  # Of one seed none is drawn.
        axes.errorbar(
            [each.num_bytes for each in some],
            [each.excess for each in some],
            None if any(map(math.isnan, errors)) else errors,
            marker="osD^vP*X"[number % 8],
            markersize=5,
            capsize=3,
            label=method,
        )
    (full,) = [each for each in rows if each.method == FULL]
    axes.axhline(0, color="gray", linestyle="--", linewidth=1)
    axes.plot(
        [full.num_bytes], [0], "o", color="black", label=f"full, log loss {full.log_loss:.4f}"
    )
    axes.set(
        xscale="log",
        xlabel="bytes of all embeddings",
        ylabel="test log loss against full tables, % (lower is better)",
    )
    # Of sizes there are few, and decades between them may be none.
    sizes = {each.times: each.num_bytes for each in rows if not each.reason}
    axes.set_xticks(sorted(sizes.values()), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", places=1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def write(outcomes: Sequence[Outcome], rows: Sequence[Compared], directory: Path) -> None:
    """Writes the figures and the picture, each whole or not at all."""
    plain = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row._asdict().items()}
        for row in rows
    ]
    runs = [each.trial._asdict() | {"summary": each.summary} for each in outcomes]
    for name, put in (
        (FIGURES, lambda path: path.write_text(json.dumps({"compared": plain, "runs": runs}))),
        (PICTURE, lambda path: draw(rows, path)),
    ):
        part = directory / f"part-{name}"
        put(part)
        part.replace(directory / name)
