"""`qrhash plan`: from the data to the plan, and the file by which the trainer builds it."""

import json
import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from qrhash.ctr.data.counts import Counts
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.sizes import read_sizes
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.data.vocabulary import has_no_vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.planned import SAID, known_of, planned
from qrhash.ctr.options import split_names
from qrhash.ctr.plan_settings import PlanOptions
from qrhash.ctr.run.devices import mesh_sizes
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.goals import make_goal
from qrhash.ctr.run.plan_report import draw_plan, plan_table, summary
from qrhash.ctr.run.rows import shown, splits
from qrhash.ctr.settings import Settings
from qrhash.planning import BudgetError, Column, Plan

# Settings that a plan leaves to whoever trains by it.
_NOT_PLANNED = {"output_dir", "resume", "coordinator", "num_processes", "process_id"}

Sections = Mapping[str, Mapping[str, Any]]


def run(
    settings: Settings, options: PlanOptions, display: Display
) -> tuple[RenderableType, RenderableType]:
    """Plans, and writes what is to be written.

    Args:
      settings: where the data are, if there are any, and what their columns are used as.
      options: what is planned.
      display: is told how far it is.

    Returns:
      The plan as a table and in a sentence.

    Raises:
      UserError: the data or the options cannot be used; the budget is too small; a file that would
        be written is there already.
    """
    budget = options.budget
    output, picture = (path and Path(path) for path in (options.output, options.picture))
    for path in (output, picture):
        if path and path.exists() and not options.overwrite:
            raise UserError(f"{path} is there already: choose another file, or --overwrite it.")
    if (settings.data is None) == (options.sizes is None):
        raise UserError("Either --data or --sizes must be given, to know the columns by.")
    devices = devices_of(settings, options.devices)
    if options.sizes is not None:
        columns, examples = read_sizes(Path(options.sizes)), options.num_examples
    else:
        with display:
            columns, examples = survey(settings, display, split_names(options.dynamic_columns))
    try:
        plan, sections = planned(
            settings,
            with_growth(columns, options),
            budget,
            devices=devices,
            optimizer=options.optimizer,
            num_examples=examples,
        )
    except BudgetError as error:
        raise UserError(str(error)) from error
    if output:
        write_config(output, settings, sections, plan)
        display.line(f"{output} is for qrhash train --config {output}")
    if picture:
        draw_plan(plan, picture)
        display.line(f"the picture is in {picture}")
    return plan_table(plan), Text(summary(plan))


def survey(
    settings: Settings, display: Display, growing: Collection[str] = ()
) -> tuple[dict[str, Column], int]:
    """What the training rows say of the columns that have ids: sizes, counts and lengths.

    Args:
      settings: where the data are, and what their columns are used as.
      display: is told of the pass.
      growing: columns whose tables are to grow: their keys are counted, whatever the settings say.

    Returns:
      Column name -> `Column`, without others that are dropped or take keys as they are, with how
      much the click rates of their ids differ; and the number of rows.

    Raises:
      UserError: the data or the options cannot be used.
    """
    display.phase("counting the rows", 0)
    bad_lines = BadLines(settings.max_bad_lines, display.line)
    source = open_source(settings, bad_lines, display.line)
    train, _ = splits(settings, source)
    schema = source.schema
    counted = [
        name
        for name in schema.embedded
        if name in growing or not has_no_vocabulary(settings.column(name))
    ]
    counts = Counts(settings, schema.categories, schema.lists, counted, with_clicks=True)
    blocks = make_goal(settings, schema).source(source).blocks(0, train)
    for block in shown(blocks, display, "vocabulary", train):
        counts.add(block)
    if counts.of and not counts.rows:
        raise UserError(f"{source.name}: none of the {train} training lines can be read.")
    columns = known_of(counts)
    for name, each in counts.columns.items():
        if name not in columns and each.partition != "drop":
            display.line(f"column {name} takes keys as they are, and is no part of the plan")
    return columns, counts.rows


def with_growth(columns: Mapping[str, Column], options: PlanOptions) -> dict[str, Column]:
    """The columns, with whether their tables are to grow, or may.

    Raises:
      UserError: a column that is to grow is not among them.
    """
    named = split_names(options.dynamic_columns)
    unknown = [name for name in named if name not in columns]
    if unknown:
        raise UserError(
            f"--dynamic-columns must be of those planned for, {', '.join(columns)}, got "
            f"{unknown[0]}."
        )
    others = "may" if options.allow_dynamic else "no"
    return {
        name: each._replace(
            dynamic="must" if name in named else others, admit_after=options.admit_after
        )
        for name, each in columns.items()
    }


def write_config(path: Path, settings: Settings, sections: Sections, plan: Plan) -> None:
    """Writes the file by which `qrhash train --config` builds what was planned."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_text(settings, sections, plan))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def config_text(settings: Settings, sections: Sections, plan: Plan) -> str:
    """The file by which `qrhash train` builds a plan.

    Args:
      settings: those that were planned by.
      sections: from `planned`, in place of theirs.
      plan: says what the columns get, in comments.
    """
    if plan.devices > 1 and settings.mesh is None:
        settings = replace(settings, mesh=f"data={plan.devices}")
    lines = [
        f"# {line}" for line in textwrap.wrap("By qrhash plan: " + summary(plan) + ".", width=95)
    ]
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name not in {*_NOT_PLANNED, *SAID, "columns"} and value not in (None, each.default):
            lines.append(_assigned(each.name, value))
    of_plan = dict(plan.columns)
    for name, section in sections.items():
        lines += ["", f"[columns.{_toml_key(name)}]"]
        if name in of_plan:
            lines[-1] += f"  # {of_plan[name].why}"
        lines += [_assigned(key, value) for key, value in section.items()]
    return "\n".join(lines) + "\n"


def _assigned(name: str, value: Any) -> str:
    # JSON's numbers, texts, booleans and lists are TOML's too.
    value = list(value) if isinstance(value, tuple) else value
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def devices_of(settings: Settings, given: int | None) -> int:
    """How many devices large tables are split over: as given, or by the mesh of the settings."""
    if settings.mesh is None:
        return given or 1
    sizes: Mapping[str, int] = mesh_sizes(settings.mesh)
    over = sizes.get("model", sizes.get("data", 1))
    if given not in (None, over):
        raise UserError(
            f"--devices must be {over}, over which mesh {settings.mesh} splits large tables, got "
            f"{given}."
        )
    return over
