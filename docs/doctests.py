"""Doctests of docstrings as blocks of code: to Markdown, `>>>` is a quotation in a quotation."""

import re
from typing import Any

import griffe

# From a prompt on, up to an empty line.
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences the doctests of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See `griffe.Extension`."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
