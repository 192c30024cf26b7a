"""Full tables of any system: a row for every id."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qrhash.config import EmbedConfig
from qrhash.families import FullTable
from qrhash.importing.carried import Carried, as_table

# What Keras, TorchRec and PyTorch put around the name of a table.
_AROUND = (
    r"(?:.*[./])?embedding_bags\.(.+)\.weight$",
    r"(?:.*[./])?embeddings\.(.+)\.weight$",
    r"(?:.*/)?embedding(?:_\d+)?/([^/]+)/vars/0$",
    r"(?:.*/)?(?!layers/)([^/]+)/embedding(?:_\d+)?/vars/0$",  # an attribute of a model
    r"(?:.*/)?(embedding(?:_\d+)?)/vars/0$",
    r"(?:.*/)?([^/]+)/embeddings(?::0)?$",
    r"(.+)\.weight$",
)


def from_full_tables(
    arrays: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> dict[str, Carried]:
    """Full tables, such as TorchRec, Keras and PyTorch have them.

    Args:
      arrays: name -> array, as from `read_arrays`.
      names: name of an embedding -> name of its array; by default every array of floats with two
        axes whose name says that it is one of embeddings: `embedding_bags.NAME.weight`,
        `embeddings.NAME.weight`, `NAME/embeddings`, `embedding/NAME/vars/0`.

    Raises:
      ValueError: a name that is not there, an array that is no table, or no table at all.
    """
    if names is None:
        names = _found(arrays)
    missing = [of for of in names.values() if of not in arrays]
    if missing or not names:
        given = ", ".join(list(arrays)[:8])
        what = f"{missing[0]!r} is not" if missing else "no table of embeddings is"
        how = "by names, or --name NAME=ARRAY of qrhash convert"
        raise ValueError(f"{what} among the arrays, {given}: say which are, {how}.")
    carried = {}
    for name, of in names.items():
        table = as_table(of, arrays[of])
        carried[name] = Carried(EmbedConfig(FullTable(table.shape[0]), table.shape[1]), (table,))
    return carried


def _found(arrays: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for of, array in arrays.items():
        if np.ndim(array) != 2 or "embedding" not in of:
            continue
        found = next((match for way in _AROUND if (match := re.match(way, of))), None)
        name = of if found is None else found[1]
        names[of if name in names else name] = of
    return names
