"""What is wrong with a checkpoint that cannot be read, in a few words.

Orbax and TensorStore say it with all that they know of their files, and name the array, if at all,
in a path of theirs.
"""

import json
import re
from pathlib import Path

from qrhash.checkpoint.writing import DUMPS, first_line

# In their words: "<array>/<chunk>" in OCDBT database at local file "<path>": <reason>
_ARRAY = re.compile(r'"([^"]*)/[^"/]*" in OCDBT database at local file "[^"]*"(?:: (.*)|$| )')
_MOST = 300  # characters


def reason(error: Exception, checkpoint: Path) -> str:
    """Why a checkpoint cannot be read: the array or the file where it is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"{_file_of(error.doc, checkpoint)} is no whole JSON"
    if DUMPS.search(str(error)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # What Orbax says of it names no array.
    said = first_line(error)
    if found := _ARRAY.search(said):
        said = f"array {found[1]!r} cannot be read: {found[2] or 'it is not there'}"
    return said[:_MOST].rstrip(". ")


def _file_of(text: str, checkpoint: Path) -> str:
    """The file of a checkpoint that holds this text."""
    content = text.encode()
    for path in sorted(checkpoint.rglob("*")):
        is_as_long = path.is_file() and path.stat().st_size == len(content)
        if is_as_long and path.read_bytes() == content:
            return str(path.relative_to(checkpoint))
    return "a file of it"
