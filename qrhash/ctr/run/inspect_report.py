"""What became of the embeddings of a run, as tables; and the files that are left of it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qrhash.ctr.errors import UserError
from qrhash.ctr.run.by_frequency import Judged
from qrhash.ctr.run.inspect_figures import as_figures
from qrhash.ctr.run.inspect_picture import draw
from qrhash.ctr.run.inspected import Asked, ColumnReport, Inspected, Room
from qrhash.ctr.run.plan_report import described
from qrhash.inspection import BANDS, HotRow

FIGURES, PICTURE = "inspect.json", "inspect.png"

_MOST_COLUMNS = 6  # whose rows, pairs and scores are shown; the figures have all
_HOT_ROWS, _PAIRS, _NAMED = 3, 3, 3


def shown(found: Inspected) -> Iterator[RenderableType]:
    """The tables."""
    rows = f"{found.num_counted:,} {found.counted}"
    yield _title(f"{found.run} after {found.steps:,} steps, and the ids met by its {rows}")
    yield _of_columns(found)
    for room in found.rooms:
        yield Text(_of_room(room))
    for each in found.columns[:_MOST_COLUMNS]:
        if each.has_row is not None:
            yield Text(_of_keys(each))
    if found.scores is None:
        yield Text(f"Not scored: {found.scored}.")
    else:
        rows = f"{found.scores.rows.scores.rows:,} of {found.scored}"
        yield _title(f"{rows}, by how often training met their ids")
        yield _of_bands(found)
    if any(map(_is_shared, found.columns[:_MOST_COLUMNS])):
        yield _title("the rows that most look-ups go to, in the longest table of each column")
        yield _of_rows(found)
    if any(each.twins and each.twins.sets for each in found.columns[:_MOST_COLUMNS]):
        yield _title("ids that share all their rows, and so their vector")
        yield _of_twins(found)
    if any(map(_has_pairs, found.columns[:_MOST_COLUMNS])):
        yield _title("the nearest vectors of two ids, where none share all their rows")
        yield _of_pairs(found)
    for asked in found.neighbours:
        (column,) = (each for each in found.columns if each.name == asked.column)
        met = f"met {column.population.counts[asked.place]:,} times"
        name = found.names[asked.column][asked.place]
        shared = "" if name == asked.value else f", which has the id of {name}"
        yield _title(f"nearest to {asked.column} {asked.value}{shared}, {met}")
        yield _of_neighbours(asked, column, found)
    notes: dict[str, list[str]] = {}
    for column in found.columns:
        for note in column.notes:
            notes.setdefault(note, []).append(column.name)
    for note, names in notes.items():
        yield Text(f"{', '.join(names)}: {note}.")
    if len(found.columns) > _MOST_COLUMNS:
        yield Text(f"The {_MOST_COLUMNS} columns of most ids are shown; {FIGURES} has all.")


def check_output(directory: Path) -> None:
    """Raises a UserError if something that is no directory is in the way."""
    first = next((each for each in (directory, *directory.parents) if each.exists()), directory)
    if first.exists() and not first.is_dir():
        raise UserError(f"{first} is no directory: choose another --output-dir.")


def write(found: Inspected, directory: Path) -> None:
    """Writes the figures and the picture, each whole or not at all."""
    text = json.dumps(as_figures(found), ensure_ascii=False, indent=1)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, put in (
            (FIGURES, lambda path: path.write_text(text)),
            (PICTURE, lambda path: draw(found, path)),
        ):
            part = directory / f"part-{name}"
            put(part)
            part.replace(directory / name)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}.") from error


_LONG, _TWINS = "the most frequent of them", "the most frequent"  # cells of several lines


def _title(words: str) -> Text:
    return Text(f"\n{words}", style="italic")


def _table(*headers: str, text: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for header in headers:
        is_text, is_long = header in text, header in (_LONG, _TWINS)
        justify: Any = "left" if is_text else "right"
        table.add_column(header, justify=justify, no_wrap=not is_long)
    return table


def _of_columns(found: Inspected) -> Table:
    table = _table(
        *("column", "embedding", "ids", "unmet", "twins", "near twins", "idle rows", "hottest"),
        text=("column", "embedding"),
    )
    for each in found.columns:
        ids, longest = each.population, each.longest
        idle = hottest = ""
        if longest is not None:
            idle = _share(longest.untouched, longest.num_rows)
            hottest = _share(longest.hot[0].lookups, longest.lookups) if longest.hot else ""
        table.add_row(
            Text(each.name),
            described(each.config),
            f"{len(ids.counts):,}",
            _share(len(ids.counts) - ids.num_met, len(ids.counts)),
            "" if each.twins is None else _share(each.twins.num_twins, each.twins.num_ids),
            _share(each.near.num_near, each.near.num_ids),
            idle,
            hottest,
        )
    return table


def _of_room(room: Room) -> str:
    met = " / ".join(f"{count:,.0f}" for count in room.count_quantiles)
    return (
        f"Rows that grow, of {', '.join(room.columns)}: {room.num_keys:,} of {room.capacity:,} "
        f"have a key ({_share(room.num_keys, room.capacity)}); nine of ten of these keys were met "
        f"at least, half of them, one of ten: {met} times."
    )


def _of_keys(column: ColumnReport) -> str:
    has_row, share = column.with_row or (0, 0.0)
    met = f"{column.population.num_met:,} keys that training met"
    return f"{column.name}: {has_row:,} of {met} have a row, {share:.1%} of look-ups are of these."


def _of_bands(found: Inspected) -> Table:
    assert found.scores is not None
    rows = found.scores.rows
    table = _table(
        *("column", "its ids", "ids", "norm", "look-ups"),
        *("clicked", "predicted", "log loss", "AUC"),
        text=("column", "its ids"),
    )
    table.add_row("all rows", "", "", "", *_scores(rows))
    for each in found.columns[:_MOST_COLUMNS]:
        table.add_section()
        for band, judged in enumerate(found.scores.bands[each.name]):
            ids = int((each.population.bands == band).sum())
            first, norm = Text(each.name if not band else ""), each.norm_quantiles(band)
            length = "" if norm is None else f"{norm[1]:.3g}"
            table.add_row(first, BANDS[band], f"{ids:,}", length, *_scores(judged))
    return table


def _scores(judged: Judged) -> tuple[str, ...]:
    rates = (_percent(judged.clicked), _percent(judged.predicted))
    of_scores = (judged.scores.log_loss, judged.scores.auc)
    numbers = ("" if math.isnan(each) else f"{each:.4f}" for each in of_scores)
    return (f"{judged.scores.rows:,}", *rates, *numbers)


def _of_rows(found: Inspected) -> Table:
    table = _table(
        *("column", "row", "of look-ups", "ids that share it", _LONG),
        text=("column", _LONG),
    )
    for each in found.columns[:_MOST_COLUMNS]:
        if each.longest is None or not _is_shared(each):
            continue
        table.add_section()
        for number, hot in enumerate(each.longest.hot[:_HOT_ROWS]):
            table.add_row(
                Text(each.name if not number else ""),
                f"{hot.row:,}",
                _share(hot.lookups, each.longest.lookups),
                f"{hot.num_ids:,}",
                Text(", ".join(_named_with_share(found, each, hot))),
            )
    return table


def _is_shared(column: ColumnReport) -> bool:
    """Whether ids share the rows of its longest table."""
    hot = () if column.longest is None else column.longest.hot
    return any(row.num_ids > 1 for row in hot)


def _named_with_share(found: Inspected, column: ColumnReport, hot: HotRow) -> Iterator[str]:
    for place in hot.places[:_NAMED]:
        share = column.population.counts[place] / hot.lookups
        yield f"{found.names[column.name][int(place)]} {share:.0%}"


def _of_twins(found: Inspected) -> Table:
    table = _table("column", "ids", "met", _TWINS, text=("column", _TWINS))
    for each in found.columns[:_MOST_COLUMNS]:
        names, counts = found.names[each.name], each.population.counts
        table.add_section()
        for number, places in enumerate(each.twins.sets[:_PAIRS] if each.twins else ()):
            some = [f"{names[int(place)]} ({counts[place]:,})" for place in places[:_NAMED]]
            table.add_row(
                Text(each.name if not number else ""),
                f"{len(places):,}",
                f"{counts[places].sum():,}",
                Text(", ".join(some)),
            )
    return table


def _has_pairs(column: ColumnReport) -> bool:
    """Whether vectors are nearly equal that need not be."""
    return bool(column.near.pairs) and not (column.twins and column.twins.sets)


def _of_pairs(found: Inspected) -> Table:
    table = _table(
        *("column", "id", "met", "and id", "met ", "distance", "cosine"),
        text=("column", "id", "and id"),
    )
    for each in filter(_has_pairs, found.columns[:_MOST_COLUMNS]):
        names, counts = found.names[each.name], each.population.counts
        table.add_section()
        for number, pair in enumerate(each.near.pairs[:_PAIRS]):
            table.add_row(
                Text(each.name if not number else ""),
                Text(names[pair.first]),
                f"{counts[pair.first]:,}",
                Text(names[pair.second]),
                f"{counts[pair.second]:,}",
                f"{pair.distance:.3f}",
                "" if math.isnan(pair.cosine) else f"{pair.cosine:.4f}",
            )
    return table


def _of_neighbours(asked: Asked, column: ColumnReport, found: Inspected) -> Table:
    names, counts = found.names[asked.column], column.population.counts
    table = _table("id", "cosine", "met", text=("id",))
    for place, cosine in zip(*asked.found, strict=True):
        table.add_row(Text(names[int(place)]), f"{cosine:.4f}", f"{counts[place]:,}")
    return table


def _share(part: float, whole: float) -> str:
    return _percent(part / whole) if whole else ""


def _percent(share: float) -> str:
    if math.isnan(share):
        return ""
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"
