"""What became of the embeddings of a run, as a picture: a line of four panels for each column."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from qrhash.ctr.run.inspected import ColumnReport, Inspected
from qrhash.inspection import BANDS

_MOST_COLUMNS = 4
_HOT_ROWS = 5
_BANDS = ("#4a98c9", "#94c4df", "#d0e1f2", "#d9d9d9")  # of the head, middle, tail, never met
_FIRST, _OTHERS = "#1f77b4", "#ff9f4a"


def draw(found: Inspected, path: Path) -> None:
    """Draws the columns of most ids, as a PNG.

    Args:
      found: what became of them.
      path: where the picture goes.
    """
    # Slow to import, and used here only.
    from matplotlib.figure import Figure

    drawn = found.columns[:_MOST_COLUMNS]
    figure = Figure(figsize=(15, 0.7 + 3.1 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), 4, squeeze=False, width_ratios=(4, 4, 4, 3))
    for column, (of_norms, of_rows, of_losses, of_shares) in zip(drawn, panels, strict=True):
        _norms(of_norms, column)
        _hot_rows(of_rows, column, found)
        _losses(of_losses, column, found)
        _shares(of_shares, column)
    more = len(found.columns) - len(drawn)
    also = f"; {more} columns of fewer ids are not drawn" if more else ""
    figure.suptitle(_plain(f"{found.run}: ids by how often training met them{also}"), size=11)
    figure.savefig(path, dpi=110, format="png")


def _norms(axes: Any, column: ColumnReport) -> None:
    """Lengths of vectors over how often their ids were met: the median, and where most are."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    counts = column.population.counts[column.sampled]
    edges = np.unique(np.geomspace(1, max(2, counts.max(initial=1) + 1), 16).astype(int))
    middles, quantiles = [], []
    for first, last in itertools.pairwise(edges):
        inside = (counts >= first) & (counts < last)
        if inside.any():
            middles.append((first * (last - 1)) ** 0.5)
            quantiles.append(np.quantile(column.norms[inside], (0.1, 0.5, 0.9)))
    if middles:
        low, median, high = np.array(quantiles).T
        axes.fill_between(middles, low, high, color=_BANDS[1], alpha=0.4, label="most ids")
        axes.plot(middles, median, "o-", color=_FIRST, markersize=3, label="half of the ids")
    never = column.norms[counts == 0]
    if len(never):
        axes.axhline(np.median(never), color="gray", ls="--", lw=1, label="never met")
    axes.set(xscale="log", xlabel="times an id was met", ylabel="length of its vector")
    axes.set_title(_plain(f"{column.name}: {len(column.population.counts):,} ids"), size=10)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _hot_rows(axes: Any, column: ColumnReport, found: Inspected) -> None:
    """The hottest rows of the longest table, and how much of each is of its most frequent id."""
    from matplotlib.ticker import PercentFormatter

    table = column.longest
    if table is None or not table.hot:
        _instead(axes, "every row is one key's own" if table is None else "no row was met")
        return
    rows = table.hot[:_HOT_ROWS]
    shares = np.array([hot.lookups for hot in rows]) / table.lookups
    first = np.array([column.population.counts[hot.places[0]] for hot in rows]) / table.lookups
    at = np.arange(len(rows))
    axes.barh(at, first, color=_FIRST, label="its most frequent id")
    axes.barh(at, shares - first, left=first, color=_OTHERS, label="others that share it")
    for place, (hot, share) in enumerate(zip(rows, shares, strict=True)):
        name = found.names[column.name][int(hot.places[0])]
        more = f" + {hot.num_ids - 1:,}" if hot.num_ids > 1 else ""
        axes.text(share, place, _plain(f" {_short(name)}{more}"), va="center", size=8)
    axes.set_yticks(at, [f"row {hot.row:,}" for hot in rows], size=8)
    axes.set_ylim(len(rows) + 0.4, -0.6)
    axes.set_xlim(0, max(shares) * 1.5)
    axes.set(xlabel="of all look-ups")
    axes.set_title(f"hottest of {table.num_rows:,} rows", size=10)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(axis="x", alpha=0.3)


def _losses(axes: Any, column: ColumnReport, found: Inspected) -> None:
    """The log loss of each band, with its AUC and how many look-ups it has."""
    if found.scores is None:
        _instead(axes, f"not scored: {found.scored}")
        return
    judged = found.scores.bands[column.name]
    some = [band for band in range(len(BANDS)) if judged[band].scores.rows]
    losses = [judged[band].scores.log_loss for band in some]
    axes.bar(range(len(some)), losses, color=[_BANDS[band] for band in some], width=0.7)
    for place, band in enumerate(some):
        auc = judged[band].scores.auc
        text = f"{losses[place]:.3f}" + ("" if np.isnan(auc) else f"\nAUC {auc:.3f}")
        axes.text(place, losses[place] / 2, text, ha="center", va="center", size=8, color="black")
    every = found.scores.rows.scores.log_loss
    axes.axhline(every, color="gray", ls="--", lw=1, label="all rows")
    names = [f"{BANDS[band]}\n{judged[band].scores.rows:,}" for band in some]
    axes.set_xticks(range(len(some)), names, size=8)
    axes.set_ylim(0, max([every, *losses]) * 1.3)
    axes.set(xlabel="look-ups")
    axes.set_title("log loss of rows, by their ids", size=10)
    axes.legend(fontsize=7, loc="upper left")
    axes.grid(axis="y", alpha=0.3)


def _shares(axes: Any, column: ColumnReport) -> None:
    """What part of ids collide, and what part of rows nothing trained."""
    from matplotlib.ticker import PercentFormatter

    ids, table, near = column.population, column.longest, column.near
    never = len(ids.counts) - ids.num_met
    shares = {
        "ids never met": never / max(1, len(ids.counts)),
        "near twins": near.num_near / max(1, near.num_ids),
    }
    if column.twins is not None:
        shares["twins"] = column.twins.num_twins / max(1, column.twins.num_ids)
    if table is not None:
        shares["idle rows"] = table.untouched / max(1, table.num_rows)
    if column.has_row is not None:
        shares["keys with a row"] = float(column.has_row.mean()) if len(column.has_row) else 0.0
    at = np.arange(len(shares))
    axes.barh(at, list(shares.values()), color="#7f7f7f", height=0.6)
    for place, share in enumerate(shares.values()):
        axes.text(share, place, f" {share:.1%}", va="center", size=8)
    axes.set_yticks(at, list(shares), size=8)
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("collisions, and what is idle", size=10)
    axes.grid(axis="x", alpha=0.3)


def _instead(axes: Any, words: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", size=9, wrap=True)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _plain(text: str) -> str:
    """What stands between two dollars would be drawn as mathematics."""
    return text.replace("$", r"\$")
