"""`qrhash inspect`: what became of the embeddings of a run.

The training rows are counted once more: which ids were met how often, which nothing keeps. Then of
every embedded column: ids that collide, in all their rows or nearly in their vectors; lengths of
vectors; rows that are hot, and rows that nothing trained; and how good the model is for ids that
are met often, and seldom.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from qrhash import EmbedConfig, inspection
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.inference import listed
from qrhash.ctr.data.names import key_named, names_of
from qrhash.ctr.data.population import Population
from qrhash.ctr.data.vocabulary import Vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.growing import of_column
from qrhash.ctr.model.models import column_vectors
from qrhash.ctr.model.pools import pools
from qrhash.ctr.model.room import ColumnConfig
from qrhash.ctr.options import split_names
from qrhash.ctr.run.again import Read, counted, opened
from qrhash.ctr.run.by_frequency import by_frequency
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.inspected import MOST_NAMED, Asked, ColumnReport, Inspected, Room
from qrhash.ctr.run.trained import Kept, Trained, kept_of, load_trained
from qrhash.ctr.tower_settings import TWO_TOWER
from qrhash.inspection import Neighbours, TableTraffic, Twins

_Vectors: TypeAlias = Callable[[Any], tuple[Any, Any]]

# Ids that are looked at where there are more: for twins, and the lengths of vectors.
_MOST_IDS = 2**20


def inspect(
    run: Path,
    display: Display,
    *,
    data: str | None = None,
    columns: str = "",
    neighbours: Sequence[str] = (),
    top: int = 10,
    compared: int = 10_000,
) -> Inspected:
    """Looks at the embeddings of a run.

    Args:
      run: its directory.
      display: is told how far it is.
      data: what to score, as in `Settings`; None: the run's test rows.
      columns: which columns to look at, with commas between them; "": all that are embedded.
      neighbours: ids whose neighbours are asked for, each as COLUMN=VALUE.
      top: how many neighbours of each.
      compared: how many ids of a column are compared, each with each: the most frequent ones.

    Raises:
      UserError: there is no such run, or it has no checkpoint; the data are gone, or not as they
        were, and no others are given; there is no such column, or no such value in it.
    """
    kept = kept_of(run)
    display.phase("counting the rows", 0)
    bad_lines = BadLines(kept.settings.max_bad_lines, display.line)
    read = opened(kept, data, bad_lines, display)
    trained = load_trained(kept, display, is_whole=True)
    pairs = [_asked(text, trained) for text in neighbours]
    wanted = _columns(columns, trained, {name for name, _ in pairs})
    populations, num_counted = counted(kept, trained, read, display)
    asked = [(*pair, _place(*pair, kept, trained, populations)) for pair in pairs]
    # Compiled once for all that is asked of a column.
    vectors = {name: _vectors(trained, name) for name in wanted}
    reports = []
    display.phase("looking at the vectors", len(wanted))
    sharing = {name: names for names in pools(trained.configs).values() for name in names}
    for number, name in enumerate(wanted):
        others = [other for other in sharing.get(name, ()) if other != name]
        given = trained.configs[name], vectors[name], populations[name], compared, others
        reports.append(_report(name, *given))
        display.move(number + 1)
    scores, scored = None, f"a run of {TWO_TOWER} has no clicks to score"
    if kept.settings.model != TWO_TOWER:
        some = {name: populations[name] for name in wanted}
        scores = by_frequency(
            trained, read.scored, read.lines, some, kept.settings.batch_size, display
        )
        scored = read.words
        if not scores.rows.scores.rows:
            scores, scored = None, f"no row of {read.scored.name} has a label"
    found = [
        Asked(name, value, place, _neighbours(place, vectors[name], populations[name], top))
        for name, value, place in asked
    ]
    display.phase("looking up names", 0)
    display.done()
    return Inspected(
        run=run,
        steps=trained.learner.steps,
        columns=tuple(sorted(reports, key=lambda each: -len(each.population.counts))),
        rooms=_rooms(trained),
        scores=scores,
        neighbours=tuple(found),
        names=_names(reports, found, populations, read),
        counted=read.counted_words,
        num_counted=num_counted,
        scored=scored,
    )


def _columns(columns: str, trained: Trained, asked: Collection[str]) -> list[str]:
    """The columns to look at; those that something is asked about are among them."""
    named = split_names(columns)
    for name in named:
        _check_column(name, "--columns", trained)
    return [name for name in trained.configs if not named or name in {*named, *asked}]


def _check_column(name: str, option: str, trained: Trained) -> None:
    if name not in trained.configs:
        raise UserError(
            f"{option}: the model has no embedded column {name!r}; it has "
            f"{listed(trained.configs)}."
        )


def _asked(text: str, trained: Trained) -> tuple[str, str]:
    """The column and the value of COLUMN=VALUE; either may have more of these signs."""
    names = [name for name in trained.configs if text.startswith(f"{name}=")]
    if not names:
        name, sign, _ = text.partition("=")
        if not sign:
            raise UserError(f"--neighbours must be COLUMN=VALUE, such as user=17, got {text!r}.")
        _check_column(name, "--neighbours", trained)
    name = max(names, key=len)
    return name, text[len(name) + 1 :]


def _place(
    name: str, value: str, kept: Kept, trained: Trained, populations: Mapping[str, Population]
) -> int:
    """The place of a value among the ids of its column."""
    key, none = key_named(value, name, kept.schema)
    if none.any() and value:
        raise UserError(f"--neighbours: {value!r} is no value that column {name} could have.")
    of_keys = trained.ids[name]
    taken = of_keys(key, none)
    is_known = not isinstance(of_keys, Vocabulary) or bool(none.any() or np.isin(key, of_keys.keys))
    place = populations[name].place_of(taken) if is_known else -1
    if place < 0:
        rarely = " often enough" if kept.settings.column(name).min_count > 1 else ""
        raise UserError(f"--neighbours: {name} was {value!r}{rarely} in no row that was counted.")
    return place


def _vectors(trained: Trained, name: str) -> _Vectors:
    """What gives the vectors of a column, and whether they are of rows of their own."""
    return trained.learner.compiled(lambda model, taken, _: column_vectors(model, name, taken))


def _report(
    name: str,
    config: ColumnConfig,
    both: _Vectors,
    ids: Population,
    compared: int,
    others: Sequence[str],
) -> ColumnReport:
    notes: tuple[str, ...] = ()
    if others:
        shared = f"its tables are those of {listed(others)} too"
        notes += (f"{shared}: rows that none of its own look-ups goes to may be theirs",)

    def vectors(taken: Any) -> Any:
        return both(taken)[0]

    met = ids.ids[: min(ids.num_met, _MOST_IDS)]
    counts = ids.counts[: len(met)]
    if len(met) < ids.num_met:
        notes += (f"twins are those of the {len(met):,} most frequent ids",)
    some = min(len(met), compared)
    if some < ids.num_met:
        notes += (f"near twins are those of the {some:,} most frequent ids",)
    n = len(ids.counts)
    sampled = np.unique(np.linspace(0, max(0, n - 1), min(n, _MOST_IDS)).astype(np.int64))
    has_row: np.ndarray | None = None
    tables: tuple[TableTraffic, ...] = ()
    equal: Twins | None = None
    if isinstance(config, EmbedConfig):
        equal = inspection.twins(config.partition, met, counts)
        every = ids.ids[: ids.num_met]
        tables = inspection.table_traffic(config.partition, every, ids.counts[: ids.num_met])
    else:
        has_row = inspection.norms(lambda taken: np.asarray(both(taken)[1])[:, None], met) > 0
        notes += ("each key with a row has it for itself: no row is shared, and none hot",)
        if config.refused is None:
            notes += ("keys without a row all have the same vector",)
        else:
            without = of_column(name, met[~has_row])
            equal = inspection.twins(config.refused.partition, without, counts[~has_row])
            places = np.flatnonzero(~has_row)
            equal = equal._replace(sets=tuple(places[each] for each in equal.sets))
            notes += ("twins are those of the keys without a row",)
    return ColumnReport(
        name=name,
        config=config,
        population=ids,
        twins=equal,
        near=inspection.near_twins(vectors, met[:some], counts[:some]),
        tables=tables,
        sampled=sampled,
        norms=inspection.norms(vectors, ids.ids[sampled]),
        has_row=has_row,
        notes=notes,
    )


def _neighbours(place: int, both: _Vectors, ids: Population, top: int) -> Neighbours:
    met = ids.ids[: ids.num_met]
    return inspection.neighbours(lambda taken: both(taken)[0], met, place, top=top)


def _rooms(trained: Trained) -> tuple[Room, ...]:
    """The tables that grow."""
    rooms = []
    for table in trained.learner.model.growing:
        index = jax.device_get(table.table.state.get_value().index)
        rooms.append(
            Room(
                columns=table.names,
                capacity=table.table.config.capacity,
                num_keys=int(index.num_keys),
                counts=index.counts[index.is_live],
            )
        )
    return tuple(rooms)


def _names(
    reports: Sequence[ColumnReport],
    asked: Sequence[Asked],
    populations: Mapping[str, Population],
    read: Read,
) -> dict[str, dict[int, str]]:
    """What the ids that are spoken of are called."""
    places: dict[str, set[int]] = {name: set() for name in populations}
    for each in reports:
        some = [hot.places for table in each.tables for hot in table.hot]
        some += [of_set[:MOST_NAMED] for of_set in each.twins.sets] if each.twins else []
        some += [np.array([pair[:2] for pair in each.near.pairs], np.int64).reshape(-1)]
        places[each.name] |= {int(place) for of in some for place in of}
    for one in asked:
        places[one.column] |= {one.place, *one.found.places.tolist()}
    keys = {
        name: np.array([ids.keys[place] for place in places[name] if ids.has_key(place)], np.uint64)
        for name, ids in populations.items()
    }
    names = names_of(read.counted, keys, 0, read.train)
    return {
        name: {
            place: names[name][int(ids.keys[place])] if ids.has_key(place) else ids.nameless(place)
            for place in places[name]
        }
        for name, ids in populations.items()
    }
