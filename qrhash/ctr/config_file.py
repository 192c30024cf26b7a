"""The settings of a run: defaults, under those of a file, under those of the command line.

A file may hold the names of `Settings` at its top level, and a section for each column that
differs:

    collisions = 8
    [columns.C3]
    partition = "mixed-radix"
    radices = [100, 120]
"""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from qrhash.ctr.errors import UserError
from qrhash.ctr.options import as_meant, build, options_of
from qrhash.ctr.settings import Settings

# What a run that is resumed does not take over: it may be on another machine by now.
_ANEW = {name for name, _, option in options_of(Settings) if option.panel == "Devices"}
_ANEW |= {"output_dir", "resume"}

# What it may be given anew. It keeps its numbers so long as the data are the same, if elsewhere.
_FREE = _ANEW | {"data", "max_bad_lines", "checkpoint_every", "keep_checkpoints"}
_FIXED = {each.name for each in fields(Settings)} - _FREE


def load(
    config: Path | None, given: Mapping[str, Any], begun: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a run: defaults, under the file's, under the ones given.

    Args:
      config: a TOML file, or None.
      given: option name -> value, from the command line.
      begun: `Settings.as_dict` of the run to be resumed: stands in place of the defaults. Without
        it, of a run that resumes, only what it does not take over is there.

    Raises:
      UserError: the file cannot be read; an option is unknown or has a value it cannot have; a
        run that is resumed is asked for other numbers than it began with.
    """
    contents: dict[str, Any] = {}
    if config is not None:
        try:
            contents = tomllib.loads(config.read_text())
        except OSError as error:
            raise UserError(f"{config} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise UserError(f"{config} is not TOML: {error}.") from error
    wanted = contents | dict(given)
    if begun is None:
        if wanted.get("resume"):  # What the others may be, the run that it goes on with says.
            wanted = {name: wanted[name] for name in wanted.keys() & _ANEW}
        return build(Settings, wanted, str(config))
    before = build(Settings, begun, "the run to be resumed")
    # Before they are put together, so that no rule between options speaks of ones never given.
    kinds = get_type_hints(Settings)
    for name, value in wanted.items():
        if name in _FIXED:
            _check_same(name, getattr(before, name), as_meant(value, kinds[name]))
    kept = {name: getattr(before, name) for name in begun if name not in _ANEW}
    return build(Settings, kept | wanted, str(config))


def _check_same(name: str, before: Any, wanted: Any) -> None:
    """Raises a UserError if an option is not what a run began with."""
    if wanted == before:
        return
    was = "not given" if before is None else repr(before)
    raise UserError(
        f"A run is resumed with the options that it began with: {name} was {was}, got {wanted!r}; "
        "leave it out to go on, or begin a new run with it in another --output-dir."
    )
