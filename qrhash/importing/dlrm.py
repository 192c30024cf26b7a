"""DLRM's embeddings, and the whole of its model, from the weights of its checkpoints.

`emb_l.I.weight` is a full table; `emb_l.I.weight_q` and `emb_l.I.weight_r` are those of its
QREmbeddingBag; `emb_l.I.embs.weight` and `emb_l.I.proj.weight` of its mixed dimensions. `bot_l` and
`top_l` are the layers of its two MLPs.

Source: facebookresearch/dlrm, dlrm_s_pytorch.py and tricks/.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.carried_families import DLRMQuotientRemainder
from qrhash.config import EmbedConfig
from qrhash.families import FullTable, QuotientRemainder
from qrhash.importing.carried import Carried, as_table
from qrhash.operations import OPERATIONS, Projection
from qrhash.partitions import Partition

_EMBEDDING = re.compile(r"(?:.*\.)?(?P<name>emb_l\.(?P<number>\d+))\.(?P<part>.+)$")
_LAYER = re.compile(r"(?:.*\.)?(?P<mlp>bot_l|top_l)\.(?P<number>\d+)\.(?P<part>weight|bias)$")

_KINDS = ({"weight"}, {"weight_q", "weight_r"}, {"embs.weight", "proj.weight"})


def from_dlrm(
    arrays: Mapping[str, Any],
    *,
    operation: str = "mult",
    mode: str = "sum",
    num_embeddings: Sequence[int] | None = None,
    float32_division: bool = False,
) -> dict[str, Carried]:
    """The embeddings of a DLRM.

    Args:
      arrays: name -> array, of its `state_dict`.
      operation: its --qr-operation, which no checkpoint says: "mult", "add" or "concat".
      mode: of its bags: "sum", as DLRM has them, or "mean".
      num_embeddings: how many ids each embedding has, in the order of their numbers; by default as
        many as there are rows for.
      float32_division: whether quotients are divided in float32, as DLRM does it, so that ids above
        2**24 get the same wrong rows as there; see `DLRMQuotientRemainder`.

    Returns:
      {"emb_l.0": `Carried`, ...}, in the order of the numbers. Their bags pool the rows of each
      table first, and combine them then, as DLRM does.

    Raises:
      ValueError: there is no embedding, or one lacks an array, or the sizes do not fit.
    """
    if operation not in OPERATIONS[:3] or mode not in ("sum", "mean"):
        raise ValueError(
            "operation must be mult, add or concat, and mode sum or mean, got "
            f"{operation!r} and {mode!r}."
        )
    found: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        if match := _EMBEDDING.match(name):
            found.setdefault(int(match["number"]), {})[match["part"]] = array
    if not found:
        raise ValueError(
            f"arrays must hold emb_l.0.weight or the like, got {', '.join(list(arrays)[:8])}."
        )
    if num_embeddings is not None and len(num_embeddings) != len(found):
        raise ValueError(
            f"num_embeddings must hold a size for each of {len(found)} embeddings, got "
            f"{len(num_embeddings)}."
        )
    carried = {}
    for place, (number, parts) in enumerate(sorted(found.items())):
        name = f"emb_l.{number}"
        if set(parts) not in _KINDS:
            raise ValueError(
                f"{name} must have weight, or weight_q and weight_r, or embs.weight and "
                f"proj.weight, got {', '.join(parts)}."
            )
        tables = {part: as_table(f"{name}.{part}", array) for part, array in parts.items()}
        size = None if num_embeddings is None else num_embeddings[place]
        if "weight_q" in tables:
            quotients, remainders = tables["weight_q"], tables["weight_r"]
            most = quotients.shape[0] * remainders.shape[0]
            family: Any = DLRMQuotientRemainder if float32_division else QuotientRemainder
            partition: Partition = family(size or most, remainders.shape[0])
            carried[name] = _quotient_remainder(
                name, partition, (quotients, remainders), operation, mode
            )
        else:
            carried[name] = _single(name, tables, size, mode)
    return carried


def _quotient_remainder(
    name: str,
    partition: Partition,
    tables: tuple[np.ndarray, ...],
    operation: str,
    mode: str,
) -> Carried:
    widths = tuple(table.shape[1] for table in tables)
    rows = tuple(table.shape[0] for table in tables)
    if partition.num_rows != rows:
        raise ValueError(
            f"num_embeddings of {name} must be of tables of {rows} rows, got "
            f"{partition.num_embeddings}, of {partition.num_rows}."
        )
    features = sum(widths) if operation == "concat" else widths[0]
    config = EmbedConfig(
        partition,
        features,
        operation,
        widths=widths if operation == "concat" else None,
        combiner=mode,
        pool_rows=True,
    )
    return Carried(config, tables)


def _single(name: str, tables: Mapping[str, np.ndarray], size: int | None, mode: str) -> Carried:
    """A full table, also one of narrow rows that a matrix widens."""
    table = tables["weight"] if "weight" in tables else tables["embs.weight"]
    if size not in (None, table.shape[0]):
        raise ValueError(f"num_embeddings of {name} must be {table.shape[0]}, got {size}.")
    partition = FullTable(table.shape[0])
    if "weight" in tables:
        return Carried(EmbedConfig(partition, table.shape[1], combiner=mode), (table,))
    kernel = np.ascontiguousarray(tables["proj.weight"].T)
    config = EmbedConfig(
        partition,
        kernel.shape[1],
        "project",
        widths=(table.shape[1],),
        use_bias=False,
        combiner=mode,
    )
    return Carried(config, (table,), Projection(kernel))


# --- the whole model ------------------------------------------------------------------------------


class DLRMLayers(NamedTuple):
    """The dense layers of a DLRM: a tree of arrays, to be trained on.

    Attributes:
      bottom: (kernel [inputs, outputs], bias [outputs]) of each layer of the bottom MLP.
      top: those of the top MLP.
    """

    bottom: tuple[tuple[Any, Any], ...]
    top: tuple[tuple[Any, Any], ...]


def layers_of_dlrm(arrays: Mapping[str, Any]) -> DLRMLayers:
    """The dense layers of a DLRM.

    Args:
      arrays: name -> array, of its `state_dict`.

    Raises:
      ValueError: an MLP is missing, or a layer of it has no bias.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {"bot_l": {}, "top_l": {}}
    for name, array in arrays.items():
        if match := _LAYER.match(name):
            of_layer = found[match["mlp"]].setdefault(int(match["number"]), {})
            of_layer[match["part"]] = np.asarray(array, np.float32)
    for mlp, layers in found.items():
        if not layers or any(len(parts) < 2 for parts in layers.values()):
            raise ValueError(f"arrays must hold weight and bias of each layer of {mlp}.")
    bottom, top = (
        tuple(
            (jnp.asarray(parts["weight"].T), jnp.asarray(parts["bias"]))
            for _, parts in sorted(layers.items())
        )
        for layers in found.values()
    )
    return DLRMLayers(bottom, top)


def dlrm_logits(layers: DLRMLayers, numbers: jax.Array, vectors: Sequence[jax.Array]) -> jax.Array:
    """The logits of a DLRM with its default interaction, dot products without those of themselves.

    Args:
      layers: its dense layers.
      numbers: [batch, num_numbers], as it was trained on them: Criteo's as log(1 + x).
      vectors: of each embedding [batch, features], in the order of their numbers.

    Returns:
      [batch]; the probability is their sigmoid.
    """
    x = numbers
    for kernel, bias in layers.bottom:
        x = jax.nn.relu(x @ kernel + bias[None])
    every = jnp.stack([x, *vectors], axis=1)
    products = jnp.einsum("bif,bjf->bij", every, every)
    # The lower triangle, row by row.
    pairs = [(i, j) for i, j in itertools.product(range(every.shape[1]), repeat=2) if j < i]
    above, below = (np.array(each) for each in zip(*pairs, strict=True))
    x = jnp.concatenate([x, products[:, above, below]], axis=1)
    *hidden, (kernel, bias) = layers.top
    for each, of_each in hidden:
        x = jax.nn.relu(x @ each + of_each[None])
    return (x @ kernel + bias[None])[:, 0]
