"""The options of retrieval with two towers.

The default of the temperature was measured: on events of a latent model of 8 factors, 1,000 users
and 2,000 items the recall at 10 is 0.55 with 0.05 and 0.1 (the best there can be: 0.58), less with
0.02 and 0.2, and 0.52 of vectors as they are.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from qrhash.ctr.errors import UserError
from qrhash.ctr.options import Option

TWO_TOWER = "two-tower"
NO_LABEL = "none"

_model, _output = (partial(Option, panel) for panel in ("Model", "Output"))


@dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """What only the model 'two-tower' takes."""

    items: Annotated[
        str | None,
        _model(
            "Two-tower: the categories, or lists of them, that describe the item to be found: "
            "a,b. All other columns describe the query."
        ),
    ] = None
    tower_mlp: Annotated[
        str, _model("Two-tower: widths of each tower's layers; the last one is its vector's.")
    ] = "128-64"
    temperature: Annotated[
        float,
        _model(
            "Two-tower: scores are the dot products of vectors of length 1, divided by this. 0: "
            "of the vectors as they are.",
            least=0,
        ),
    ] = 0.1
    recall_at: Annotated[
        str, _output("Two-tower: k of the recall at k, the first one being that of the picture.")
    ] = "10,100"


def check_towers(settings: TowerOptions, model: str) -> None:
    """Raises a UserError if options are of another model, or cannot be read."""
    for name in ("items", "tower_mlp", "temperature", "recall_at"):
        if model != TWO_TOWER and getattr(settings, name) != getattr(TowerOptions, name):
            raise UserError(f"{name} goes with model '{TWO_TOWER}', not {model!r}.")
    if not settings.tower_mlp:
        raise UserError("tower_mlp must name the width of a tower's vector at least, got ''.")
    recall_ranks(settings)


def recall_ranks(settings: TowerOptions) -> tuple[int, ...]:
    """The k of the recall at k."""
    parts = [part.strip() for part in settings.recall_at.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"recall_at must be positive integers such as 10,100, got {settings.recall_at!r}."
        )
    return tuple(dict.fromkeys(map(int, parts)))
