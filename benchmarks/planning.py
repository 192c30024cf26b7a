"""Plans against uniform compression at the same bytes, and what was expected to be lost.

Trains the model of `qrhash train` on a Criteo-format file, with the same seeds:

  uniform  `--compression` with each `--operation`, and the hash trick
  plan     `qrhash.planning.plan`, whose tables have at most as many bytes as "mult" has there

and prints mean test log losses against full tables, beside the expected losses: the share of what
full tables would know, over all columns. From the uniform ones the factors in
`qrhash/planning/candidates.py` are: those for which expected and measured losses go together, here
and on `benchmarks/quality.py`'s ratings.

    python benchmarks/planning.py criteo_40k.tsv.gz --test-rows 8000
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from criteo_quality import fit_quietly
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qrhash import EmbedConfig, FullTable
from qrhash.ctr.config_file import load
from qrhash.ctr.model.columns import embed_configs
from qrhash.ctr.model.planned import planned
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.plan import survey
from qrhash.planning import Column, Facts, Memory
from qrhash.planning.candidates import ALONE, FACTORS
from qrhash.planning.traffic import PRIOR_COUNT, of_counts

UNIFORM = {
    "mult": ("quotient-remainder", "mult", 2),
    "project": ("quotient-remainder", "project", 2),
    "concat": ("quotient-remainder", "concat", 2),
    "add": ("quotient-remainder", "add", 2),
    "mult of 3": ("mixed-radix", "mult", 3),
    "hash trick": ("hash-trick", "mult", 1),
}


def main() -> None:
    """Trains all models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="Criteo-format file")
    parser.add_argument("--test-rows", type=int, default=8000)
    parser.add_argument("--compression", type=float, nargs="+", default=[4, 15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*UNIFORM, "plan"], help="which models")
    arguments = parser.parse_args()
    given = {"data": arguments.data, "test_rows": arguments.test_rows, "evaluations": 1}
    with Display(Console(quiet=True)) as display:
        columns, _ = survey(load(None, given), display)
    table = Table(title=f"test log loss, {len(arguments.seeds)} seeds")
    for header in ("model", "bytes", "mean", "smallest to largest", "against full", "expected"):
        table.add_column(header, justify="left" if header == "model" else "right")
    full = None
    cases = [("full", {"partition": "full"}, 0.0)]
    for compression in arguments.compression:
        cases += [
            case
            for case in _cases(given, columns, compression)
            if case[0].split(" at ")[0] in arguments.only
        ]
    for name, options, expected in track(cases, console=Console(stderr=True)):
        runs = [fit_quietly(None, given | options | {"seed": seed}) for seed in arguments.seeds]
        losses = [run.test.log_loss for run in runs]
        mean = statistics.mean(losses)
        full = full or mean
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        taken = f"{runs[0].embedding_bytes:,}"
        table.add_row(
            name, taken, f"{mean:.4f}", spread, f"{mean / full - 1:+.2%}", f"{expected:.2%}"
        )
    Console().print(table)


def _cases(
    given: Mapping[str, Any], columns: Mapping[str, Column], compression: float
) -> Iterator[tuple[str, dict[str, Any], float]]:
    """(name, options, expected loss) of every model at a compression."""
    sizes = {name: column.num_embeddings for name, column in columns.items()}
    for name, (partition, operation, num_tables) in UNIFORM.items():
        options = {"partition": partition, "operation": operation, "compression": compression}
        options |= {"num_tables": num_tables} if num_tables > 2 else {}
        configs: Mapping[str, Any] = embed_configs(load(None, {**given, **options}), sizes)
        if name == "mult":
            budget = sum(config.num_params * 4 for config in configs.values())
        yield name, options, _expected(columns, configs, UNIFORM[name])
    # Without state: projections count three times, so the tables take no more than the others'.
    plan, sections = planned(load(None, given), columns, budget, optimizer="sgd")
    yield "plan", {"columns": sections}, plan.loss


def _expected(
    columns: Mapping[str, Column], configs: Mapping[str, EmbedConfig], way: tuple[str, str, int]
) -> float:
    """What configs are expected to lose, of what full tables would know."""
    lost = known = 0.0
    memory = Memory(optimizer="sgd", devices=1, large_table_rows=1, itemsize=4)
    for name, config in configs.items():
        prior_count = columns[name].prior_count or PRIOR_COUNT
        facts = Facts(
            num_embeddings=config.num_embeddings,
            features=config.features,
            traffic=of_counts(columns[name].counts),
            prior_count=prior_count,
            memory=memory,
            options={},
        )
        rows, width = max(config.table_shapes)
        is_shared = not isinstance(config.partition, FullTable)
        lost += float(facts.lost(rows, width, FACTORS[way] if is_shared else ALONE)) / prior_count
        known += facts.known / prior_count
    return lost / known


if __name__ == "__main__":
    main()
