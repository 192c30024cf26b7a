"""The options of `qrhash compare`: which embeddings, at which sizes, over how many seeds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from qrhash.ctr.dynamic_settings import OF_DYNAMIC
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import Option, check_values, split_names
from qrhash.ctr.settings import Settings

FULL = "full"

_output, _embeddings, _training = (
    partial(Option, panel) for panel in ("Output", "Embeddings", "Training")
)


def _operation(name: str) -> Callable[[float, int], Mapping[str, Any]]:
    return lambda times, _: {"operation": name, "compression": times}


# Name -> the settings of so many times fewer bytes than full tables, which take so many.
METHODS: Mapping[str, Callable[[float, int], Mapping[str, Any]]] = {
    FULL: lambda times, full_bytes: {"partition": "full"},
    "hash-trick": lambda times, _: {"partition": "hash-trick", "compression": times},
    **{name: _operation(name) for name in ("add", "mult", "concat", "project", "path")},
    "mixed-radix": lambda times, _: {
        "partition": "mixed-radix",
        "num_tables": 3,
        "compression": times,
    },
    "plan": lambda times, _: {"compression": times},
    "dynamic": lambda times, full_bytes: {"dynamic": f"{max(1, int(full_bytes / times))}B"},
}

# What a comparison says itself, or has no use for.
NOT_COMPARED = {
    *("partition", "operation", "compression", "collisions", "num_tables", "dynamic", "seed"),
    *(
        *OF_DYNAMIC,
        "evict_every",
        "ids",
        "key_bits",
        "hash_size",
        "output_dir",
        "resume",
        "checkpoint_every",
    ),
    *("keep_checkpoints", "coordinator", "num_processes", "process_id", "coordinator_timeout"),
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared."""

    output_dir: Annotated[
        str,
        _output(
            "Directory of the comparison, its runs, table and picture. What is finished there is "
            "taken over."
        ),
    ] = "comparison"
    methods: Annotated[
        str, _embeddings(f"Which embeddings, of {', '.join(METHODS)}: full ones always.")
    ] = ",".join(METHODS)
    compressions: Annotated[
        str, _embeddings("How many times fewer bytes than full tables they have: 4,16.")
    ] = "4,16"
    seeds: Annotated[
        int, _training("Trainings of each, with the seeds 0, 1, ...", least=1, most=1000)
    ] = 3
    jobs: Annotated[
        int | None,
        _training(
            "Trainings at the same time. Default: as many as memory allows, one for two cores.",
            least=1,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_values(self)
        self.chosen  # noqa: B018 - as they are to be known
        self.times  # noqa: B018

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods, full tables first."""
        names = split_names(self.methods)
        for name in names:
            if name not in METHODS:
                raise UserError(f"methods must be of {', '.join(METHODS)}, got {name!r}.")
        return tuple(dict.fromkeys([FULL, *names]))

    @property
    def times(self) -> tuple[float, ...]:
        """The compressions, from the lowest on."""
        try:
            found = sorted({float(text) for text in self.compressions.split(",")})
        except ValueError:
            found = []
        if not found or not all(1 <= each < float("inf") for each in found):
            raise UserError(
                "compressions must be numbers of at least 1 such as 4,16, got "
                f"{self.compressions!r}."
            )
        return tuple(found)


def check_base(settings: Settings) -> None:
    """Raises a UserError if settings say what a comparison says itself."""
    plain = Settings()
    given = [name for name in NOT_COMPARED if getattr(settings, name) != getattr(plain, name)]
    if given:
        raise UserError(
            f"{min(given)} is what qrhash compare says itself, run by run: leave it out."
        )
    if settings.columns:
        for name, section in settings.columns.items():
            if section.keys() & NOT_COMPARED and section.get("partition") != "drop":
                unfit = min(section.keys() & NOT_COMPARED)
                raise UserError(f"columns.{name}: {unfit} is what qrhash compare says itself.")
