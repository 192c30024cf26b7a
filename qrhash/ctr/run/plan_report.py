"""How a plan is shown: in a sentence, as a table, as a picture."""

import textwrap
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from qrhash import EmbedConfig, HashTrick, MixedRadix
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.room import ColumnConfig
from qrhash.planning import Plan

_MOST_DRAWN = 40  # columns in the picture


def summary(plan: Plan) -> str:
    """A plan in a sentence."""
    devices = "one device" if plan.devices == 1 else f"each of {plan.devices} devices"
    share = (plan.table_bytes + plan.index_bytes) / plan.full_bytes
    of_keys = f" and indexes of keys of {megabytes(plan.index_bytes)}" if plan.index_bytes else ""
    state = "without state" if plan.optimizer == "none" else f"with {plan.optimizer} state"
    return (
        f"{megabytes(plan.bytes_per_device)} of {megabytes(plan.num_bytes)} on {devices} {state}; "
        f"tables of {megabytes(plan.table_bytes)}{of_keys} in all, "
        f"{share:.2%} of full ones; {plan.loss:.2%} of what full tables would know is expected to "
        "be lost"
    )


def megabytes(count: int) -> str:
    """Bytes for people.

    >>> megabytes(63_950_000), megabytes(1200)
    ('64.0 MB', '1.2 kB')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def described(config: ColumnConfig) -> str:
    """An embedding in a word or two.

    Args:
      config: of a column.
    """
    if not isinstance(config, EmbedConfig):
        return "rows that grow"
    partition = config.partition
    if isinstance(partition, HashTrick):
        return "hash trick"
    if partition.takes_keys:
        return f"{config.operation} of keys"
    if isinstance(partition, MixedRadix):
        return f"{config.operation} of {config.num_tables}"
    is_combined = config.num_tables > 1 or config.operation == "project"
    return config.operation if is_combined else "full"


def plan_table(plan: Plan) -> Table:
    """A plan as a table: a row for each column, with its bytes on a device."""
    table = Table(title="what each column gets", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for header in ("column", "ids", "embedding", "", "bytes", "of full", "lost"):
        is_text = header in ("column", "embedding", "")
        table.add_column(header, justify="left" if is_text else "right", no_wrap=header != "")
    for name, each in plan.columns:
        table.add_row(
            Text(name),
            f"{each.num_embeddings:,}",
            described(each.config),
            each.why,
            megabytes(each.bytes_per_device),
            f"{each.share:.1%}",
            f"{each.loss:.2%}" if each.loss else "",
        )
    return table


def draw_plan(plan: Plan, path: Path) -> None:
    """Draws, as a PNG, what each column would take as a full table, takes, and loses."""
    # Slow to import, and used here only.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    ordered = sorted(plan.columns, key=lambda named: named[1].full_bytes, reverse=True)
    drawn, more = ordered[:_MOST_DRAWN], len(ordered) - _MOST_DRAWN
    # What stands between two dollars would be drawn as mathematics.
    drawn = [(name.replace("$", r"\$"), each) for name, each in drawn]
    names = [name for name, _ in drawn]
    ways = dict.fromkeys(described(each.config) for _, each in ordered)
    colours = dict(zip(sorted(ways, key=lambda way: way != "full"), _colours(), strict=False))
    figure = Figure(figsize=(12, 2.5 + 0.26 * len(drawn)), layout="constrained")
    sizes, losses = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    sizes.barh(
        names, [each.full_bytes for _, each in drawn], color="#dddddd", label="as a full table"
    )
    for way, colour in colours.items():
        of_way = {name: each for name, each in drawn if described(each.config) == way}
        taken = [each.table_bytes + each.index_bytes for each in of_way.values()]
        sizes.barh(list(of_way), taken, height=0.5, color=colour, label=f"as planned: {way}")
        losses.barh(list(of_way), [each.loss for each in of_way.values()], color=colour)
    for name, each in drawn:
        share = "full" if not each.is_compressed else f"{each.share:.1%} of full"
        share += f"\n  {each.why}" if each.is_dynamic else ""
        if each.loss:
            losses.text(each.loss, name, f"  {each.loss:.1%}, in {share}", va="center", size=7.5)
        else:
            losses.text(0, name, f"  {share}", va="center", size=8, color="gray")
    sizes.set(xscale="log", xlabel="bytes of tables and their keys, all devices together")
    sizes.xaxis.set_minor_formatter(NullFormatter())
    sizes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: megabytes(int(value))))
    sizes.set_ylim(len(drawn) - 0.4, -0.6)
    named = sizes.get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, fontsize=8)
    most = max((each.loss for _, each in drawn), default=0.0)
    losses.set(xlabel="expected to be lost of what a full table would know")
    # Room for the words behind the bars.
    wide = 4.0 if any(each.is_dynamic for _, each in drawn) else 1.5
    losses.set_xlim(0, max(0.01, most) * wide)
    losses.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in (sizes, losses):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    also = f" ({more} smaller columns are not drawn)" if more > 0 else ""
    figure.suptitle("\n".join(textwrap.wrap(summary(plan) + also, width=120)), size=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def _colours() -> list[str]:
    """Of ways: full tables first."""
    return ["#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2"]
