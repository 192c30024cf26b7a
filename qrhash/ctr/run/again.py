"""The data of a run, read once more: its training rows are counted, and others scored."""

from typing import NamedTuple

from qrhash.ctr.data.block import Source
from qrhash.ctr.data.counts import Counts
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.population import Population, population
from qrhash.ctr.data.vocabulary import Vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.rows import shown, splits
from qrhash.ctr.run.trained import Kept, Trained, open_others, open_own

# Keys of a column that are counted at a time, where no vocabulary says which there are.
_MOST_KEYS = 2**22


class Read(NamedTuple):
    """What is read: `counted` up to a line, and `scored` from one line to another."""

    counted: Source
    train: int
    counted_words: str
    scored: Source
    lines: tuple[int, int]
    words: str


def opened(kept: Kept, data: str | None, bad_lines: BadLines, display: Display) -> Read:
    """Opens the data: the run's own, if they are there, and those given.

    Args:
      kept: of the run.
      data: those given; None: none are.
      bad_lines: is told of malformed rows.
      display: is told what is no longer there.

    Raises:
      UserError: there are none that could be read.
    """
    others = None if data is None else open_others(kept, data, bad_lines, display.line)
    try:
        own = open_own(kept, bad_lines, display.line)
    except UserError as error:
        if others is None:
            raise UserError(f"{error} Other data to look at can be named with --data.") from error
        display.line(f"{error} How often ids are met is told by {others.name} alone.")
        end = others.num_lines
        return Read(others, end, f"rows of {others.name}", others, (0, end), others.name)
    train, split = splits(kept.settings, own)
    words = f"training rows of {own.name}"
    if others is None:
        lines = (split, own.num_lines)
        return Read(own, train, words, own, lines, f"the test rows of {own.name}")
    return Read(own, train, words, others, (0, others.num_lines), others.name)


def counted(
    kept: Kept, trained: Trained, read: Read, display: Display
) -> tuple[dict[str, Population], int]:
    """Counts how often ids are met.

    Args:
      kept: of the run.
      trained: its model.
      read: what is counted.
      display: is told how far it is, and where not all was counted.

    Returns:
      Column name -> its ids, of the columns of the model; and how many rows were counted.

    Raises:
      UserError: there are no rows.
    """
    schema = read.counted.schema
    counts = Counts(kept.settings, schema.categories, schema.lists, trained.configs)
    open_ended = [name for name in counts.of if not isinstance(trained.ids[name], Vocabulary)]
    rows, cut = 0, set()
    blocks = trained.goal.source(read.counted).blocks(0, read.train)
    for block in shown(blocks, display, "counting ids", read.train):
        counts.add(block)
        rows += len(block.labels)
        for name in open_ended:
            if counts.of[name].keep(_MOST_KEYS):
                cut.add(name)
    if not rows:
        raise UserError(
            f"{read.counted.name}: none of the {read.train:,} lines {trained.goal.wanted}."
        )
    found = {name: population(trained.ids[name], met) for name, met in counts.of.items()}
    if cut:
        display.line(
            f"{', '.join(sorted(cut))}: of more than {_MOST_KEYS:,} keys the frequent ones were "
            "counted, so that rows may be said to be idle that are not"
        )
    return found, rows
