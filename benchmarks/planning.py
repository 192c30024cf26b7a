"""Plans against uniform compression at the same bytes, and what was expected to be lost.

Two kinds of data, as `benchmarks/quality.py` has them: clicks, of Criteo-format files, and ratings
of users and items, of files or made. With the same seeds these are trained:

  uniform  the same compression for all columns, by each operation, and the hash trick
  plan     `qrhash.planning.plan` for as many bytes, as `qrhash train --compression` has it
  growing  the same of clicks, where any column may have a table that grows, its index counted

and the mean test log losses printed, against full tables, beside the expected losses: the share of
what full tables would know, over all columns. The factors in `qrhash/planning/candidates.py` are
those by which the expected losses are in proportion to the measured ones of the uniform models.

    python benchmarks/planning.py --criteo criteo_40k.tsv.gz --test-rows 8000 --ratings ratings.tsv

Without files the ratings are made ones.
"""

import argparse
import functools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from quality import FEATURES, GOOD, Score, clicks, model_ratings, ratings, read_ratings
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qrhash import EmbedConfig, FullTable, HashTrick
from qrhash.budget import partition_of
from qrhash.ctr.config_file import load
from qrhash.ctr.data.counts import KeyCounts
from qrhash.ctr.model.columns import embed_configs
from qrhash.ctr.model.planned import planned
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.plan import survey
from qrhash.ctr.settings import Settings
from qrhash.planning import Column, Facts, Memory, plan
from qrhash.planning.candidates import ALONE, FACTORS
from qrhash.planning.traffic import PRIOR_COUNT, of_counts

UNIFORM = {
    "mult": ("quotient-remainder", "mult", 2),
    "project": ("quotient-remainder", "project", 2),
    "path": ("quotient-remainder", "path", 2),
    "concat": ("quotient-remainder", "concat", 2),
    "add": ("quotient-remainder", "add", 2),
    "mult of 3": ("mixed-radix", "mult", 3),
    "hash trick": ("hash-trick", "mult", 1),
}
PLAN, GROWING = "plan", "growing"


class Case(NamedTuple):
    """A model: its name, the options that `quality` trains it by, and what it should lose."""

    name: str
    options: dict[str, Any]
    num_bytes: int
    expected: float


def main() -> None:
    """Trains all models on all data and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--criteo", nargs="*", default=[], help="Criteo-format files")
    parser.add_argument("--ratings", nargs="*", default=[], help="files of ratings")
    parser.add_argument("--good-from", type=float, default=GOOD, help="ratings that are good")
    parser.add_argument("--test-rows", type=int, default=8000, help="last lines, to test on")
    parser.add_argument("--compression", type=float, nargs="+", default=[4, 15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*UNIFORM, PLAN, GROWING], help="which models")
    arguments = parser.parse_args()
    for file in arguments.criteo:
        cases = functools.partial(of_clicks, file, arguments.test_rows)
        score = functools.partial(clicks, file, arguments.test_rows)
        compare(file, score, [c for x in arguments.compression for c in cases(x)], arguments)
    rated = {file: read_ratings(Path(file), arguments.good_from) for file in arguments.ratings}
    if not (arguments.criteo or arguments.ratings):
        rated["ratings of a model"] = model_ratings()
    for name, data in rated.items():
        found = [c for x in arguments.compression for c in of_ratings(*data, x)]
        compare(name, functools.partial(ratings, *data), found, arguments)


def compare(data: str, score: Score, cases: list[Case], arguments: argparse.Namespace) -> None:
    """Prints the table of one data set."""
    table = Table(title=f"{data}, {len(arguments.seeds)} seeds")
    for header in ("model", "bytes", "mean", "smallest to largest", "against full", "expected"):
        table.add_column(header, justify="left" if header == "model" else "right")
    full = None
    wanted = [case for case in cases if case.name.partition(" at ")[0] in arguments.only]
    for case in track([Case("full", {}, 0, 0.0), *wanted], data, console=Console(stderr=True)):
        losses = [score(case.options, seed) for seed in arguments.seeds]
        mean = statistics.mean(losses)
        full = full or mean
        table.add_row(
            case.name,
            f"{case.num_bytes:,}" if case.num_bytes else "",
            f"{mean:.4f}",
            f"{min(losses):.4f} to {max(losses):.4f}",
            f"{mean / full - 1:+.2%}",
            f"{case.expected:.2%}",
        )
    Console().print(table)


def of_clicks(file: str, test_rows: int, compression: float) -> Iterator[Case]:
    """The models of clicks at a compression."""
    given = {"data": file, "test_rows": test_rows}
    with Display(Console(quiet=True)) as display:
        columns, _ = survey(load(None, given), display)
    sizes = {name: column.num_embeddings for name, column in columns.items()}
    for name, (partition, operation, num_tables) in UNIFORM.items():
        options = {"partition": partition, "operation": operation, "compression": compression}
        options |= {"num_tables": num_tables} if num_tables > 2 else {}
        configs: Mapping[str, Any] = embed_configs(load(None, {**given, **options}), sizes)
        yield _case(name, options, compression, columns, configs)
    budget = int(sum(sizes.values()) * Settings.features * 4 / compression)
    for name, dynamic in ((PLAN, "no"), (GROWING, "may")):
        may = {column: each._replace(dynamic=dynamic) for column, each in columns.items()}
        found, sections = planned(load(None, given), may, budget, optimizer="none")
        # Of a plan that grows all columns have sections: "compression" says nothing of any.
        grows = {"columns": sections, "compression": 1}
        options = {"compression": compression} if name == PLAN else grows
        taken = found.table_bytes + found.index_bytes
        yield Case(f"{name} at {compression:g}x", options, taken, found.loss)


def of_ratings(ids: np.ndarray, good: np.ndarray, compression: float) -> Iterator[Case]:
    """The models of ratings at a compression."""
    columns = {}
    split = len(good) * 4 // 5
    for name, keys in zip(("user", "item"), ids[:split].T.astype(np.uint64), strict=True):
        met, liked = KeyCounts(), KeyCounts()
        for each, rows in ((met, keys), (liked, keys[good[:split] > 0])):
            each.add(rows, np.zeros(len(rows), bool))
        counts = met.counts(1)
        columns[name] = Column(len(counts), counts, 1.0, 1 / met.variance_between(liked))
    sizes = [column.num_embeddings for column in columns.values()]
    for name, way in UNIFORM.items():
        try:
            uniform = [_uniform(size, way, compression) for size in sizes]
        except ValueError:  # the smallest there are take more
            continue
        configs = dict(zip(columns, uniform, strict=True))
        yield _case(name, _by_size(configs), compression, columns, configs)
    budget = int(sum(sizes) * FEATURES * 4 / compression)
    found = plan(columns, budget, features=FEATURES, optimizer="none")
    yield Case(
        f"{PLAN} at {compression:g}x", _by_size(found.configs), found.table_bytes, found.loss
    )


def _uniform(size: int, way: tuple[str, str, int], compression: float) -> EmbedConfig:
    family, operation, num_tables = way
    if family == "hash-trick":
        return EmbedConfig(HashTrick(size, max(1, int(size / compression))), FEATURES)
    of_rows = functools.partial(partition_of, family, num_tables=num_tables)
    return EmbedConfig.fit(size, FEATURES, operation, compression=compression, family=of_rows)


def _by_size(configs: Mapping[str, EmbedConfig]) -> dict[str, Any]:
    return {"configs": {config.num_embeddings: config for config in configs.values()}}


def _num_bytes(configs: Mapping[str, EmbedConfig]) -> int:
    return sum(config.num_params * 4 for config in configs.values())


def _case(
    name: str,
    options: dict[str, Any],
    compression: float,
    columns: Mapping[str, Column],
    configs: Mapping[str, EmbedConfig],
) -> Case:
    """A uniform model, with what its configs are expected to lose of what full ones would know."""
    lost = known = 0.0
    memory = Memory(optimizer="none", devices=1, large_table_rows=1, itemsize=4)
    for column, config in configs.items():
        prior_count = columns[column].prior_count or PRIOR_COUNT
        facts = Facts(
            num_embeddings=config.num_embeddings,
            features=config.features,
            traffic=of_counts(columns[column].counts),
            prior_count=prior_count,
            memory=memory,
            options={},
        )
        rows, width = max(config.table_shapes)
        factors = ALONE if isinstance(config.partition, FullTable) else FACTORS[UNIFORM[name]]
        lost += float(facts.lost(rows, width, factors)) / prior_count
        known += facts.known / prior_count
    return Case(f"{name} at {compression:g}x", options, _num_bytes(configs), lost / known)


if __name__ == "__main__":
    main()
