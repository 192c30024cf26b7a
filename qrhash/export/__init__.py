"""Out of the training: vectors in a file that NumPy alone looks up.

A snapshot is one safetensors file: the tables, projections, keys and rows of embeddings, and what
their ids and keys mean, as JSON in its header. `save` writes it where the model was trained;
`Snapshot` looks vectors up where it serves, in memory that is mapped from the file, without JAX.

>>> import jax, numpy, qrhash
>>> from qrhash import export
>>> config = qrhash.EmbedConfig(qrhash.QuotientRemainder(1_000_000), 16)
>>> tables = qrhash.init(jax.random.key(0), config)
>>> path = getfixture("tmp_path") / "items.safetensors"
>>> export.save(path, export.of_feature(config, tables))
>>> ids = numpy.array([5, 999_999])
>>> found = export.Snapshot(path).lookup(ids)
>>> bool((found == qrhash.lookup(tables, ids, config)).all())
True
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrhash.export.row_formats import ROW_FORMATS
    from qrhash.export.saving import (
        Exported,
        of_collection,
        of_crossed,
        of_dynamic,
        of_feature,
        save,
    )
    from qrhash.export.snapshot import Snapshot

__all__ = [
    "ROW_FORMATS",
    "Exported",
    "Snapshot",
    "of_collection",
    "of_crossed",
    "of_dynamic",
    "of_feature",
    "save",
]

_HOMES = {"ROW_FORMATS": "row_formats", "Snapshot": "snapshot"}


def __getattr__(name: str) -> Any:
    """Loads what saves on first use: it needs JAX, where looking up does not."""
    if name not in __all__:
        raise AttributeError(f"module 'qrhash.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qrhash.export.{_HOMES.get(name, 'saving')}"), name)
