"""What became of the embeddings of a run, as JSON has it: for other programs, and for later."""

import math
from typing import Any

from qrhash.ctr.run.by_frequency import Judged
from qrhash.ctr.run.inspected import MOST_NAMED, Asked, ColumnReport, Inspected
from qrhash.ctr.run.overview import kind_of
from qrhash.inspection import BANDS, TableTraffic, Twins


def as_figures(found: Inspected) -> dict[str, Any]:
    """All of it, as JSON has it."""
    scores = found.scores
    return {
        "run": str(found.run),
        "steps": found.steps,
        "counted": found.counted,
        "counted_rows": found.num_counted,
        "scored": found.scored,
        "all_rows": None if scores is None else _judged(scores.rows),
        "columns": {each.name: _column(each, found) for each in found.columns},
        "growing": [
            {
                "columns": list(room.columns),
                "capacity": room.capacity,
                "keys": room.num_keys,
                "met": room.count_quantiles,
            }
            for room in found.rooms
        ],
        "neighbours": [_asked(each, found) for each in found.neighbours],
    }


def _column(column: ColumnReport, found: Inspected) -> dict[str, Any]:
    ids, names, near = column.population, found.names[column.name], column.near
    bands = {}
    for band, name in enumerate(BANDS):
        quantiles = column.norm_quantiles(band)
        bands[name] = {
            "ids": int((ids.bands == band).sum()),
            "norms": None if quantiles is None else quantiles.tolist(),
        }
        if found.scores is not None:
            bands[name] |= _judged(found.scores.bands[column.name][band])
    with_row = column.with_row and dict(zip(("ids", "share"), column.with_row, strict=True))
    return {
        "embedding": kind_of(column.config, in_full=True),
        "ids": len(ids.counts),
        "met": ids.num_met,
        "with_row": with_row,
        "twins": None if column.twins is None else _twins(column.twins, column, names),
        "near_twins": {
            "compared": near.num_ids,
            "ids": near.num_near,
            "pairs": near.num_pairs,
            "share": near.share,
            "nearest": [
                {
                    "ids": [names[pair.first], names[pair.second]],
                    "met": ids.counts[[pair.first, pair.second]].tolist(),
                    "distance": pair.distance,
                    "cosine": _number(pair.cosine),
                }
                for pair in near.pairs
            ],
        },
        "tables": [_traffic(table, column, names) for table in column.tables],
        "bands": bands,
        "notes": list(column.notes),
    }


def _twins(twins: Twins, column: ColumnReport, names: Any) -> dict[str, Any]:
    return {
        "compared": twins.num_ids,
        "ids": twins.num_twins,
        "sets": twins.num_sets,
        "share": twins.share,
        "most_met": [
            {
                "ids": len(places),
                "met": int(column.population.counts[places].sum()),
                "first": [names[int(place)] for place in places[:MOST_NAMED]],
            }
            for places in twins.sets
        ],
    }


def _traffic(table: TableTraffic, column: ColumnReport, names: Any) -> dict[str, Any]:
    counts = column.population.counts
    return {
        "rows": table.num_rows,
        "untouched": table.untouched,
        "hot": [
            {
                "row": hot.row,
                "share": hot.lookups / max(1.0, table.lookups),
                "sharing": hot.num_ids,
                "ids": [{"id": names[int(p)], "met": int(counts[p])} for p in hot.places],
            }
            for hot in table.hot
        ],
    }


def _asked(asked: Asked, found: Inspected) -> dict[str, Any]:
    names = found.names[asked.column]
    return {
        "column": asked.column,
        "value": asked.value,
        "nearest": [
            {"id": names[int(place)], "cosine": float(cosine)}
            for place, cosine in zip(*asked.found, strict=True)
        ],
    }


def _judged(judged: Judged) -> dict[str, Any]:
    return {
        "lookups": judged.scores.rows,
        "log_loss": _number(judged.scores.log_loss),
        "auc": _number(judged.scores.auc),
        "clicked": _number(judged.clicked),
        "predicted": _number(judged.predicted),
    }


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else float(value)
