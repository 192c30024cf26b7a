"""What an exported model takes and gives: a dictionary of arrays, [rows, ...] each."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qrhash
from qrhash.ctr.data.block import no_rows
from qrhash.ctr.data.pipeline import Batch, Padded, encode
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.data.vocabulary import MISSING_KEY, HashedIds, Ids, Vocabulary
from qrhash.ctr.run.trained import Trained
from qrhash.keys import Keys


@dataclass(frozen=True)
class Inputs:
    """What the exported function takes: a dictionary of arrays [rows, ...].

    Attributes:
      schema: the columns of the data.
      ids: of the columns of the model, in its order.
      is_towers: whether a score is that of a query and an item, and no probability.
      lists: the columns of lists, and how long they are.
    """

    schema: Schema
    ids: Mapping[str, Ids]
    is_towers: bool
    lists: Mapping[str, int]

    @classmethod
    def of(cls, trained: Trained, schema: Schema, is_towers: bool) -> "Inputs":
        """Those of a trained model."""
        lists = {
            column.name: column.length
            for column in schema.of_use("list")
            if column.name in trained.ids and column.length is not None
        }
        return cls(schema, trained.ids, is_towers, lists)

    def arrays(self, batch: Batch) -> dict[str, Any]:
        """The arrays of a batch, by name; those of no column are left out."""
        named = {
            "numbers": batch.numbers,
            "ids": batch.ids,
            "keys_hi": batch.keys.hi,
            "keys_lo": batch.keys.lo,
        }
        found = {name: array for name, array in named.items() if array.shape[1]}
        for name, padded in zip(self.lists, batch.lists, strict=True):
            if isinstance(padded.ids, Keys):
                found |= {f"{name}/keys_hi": padded.ids.hi, f"{name}/keys_lo": padded.ids.lo}
            else:
                found[f"{name}/ids"] = padded.ids
            found[f"{name}/mask"] = padded.mask
        return found

    def batch(self, arrays: Mapping[str, Any]) -> Batch:
        """The batch of which `arrays` made these."""
        rows = next(iter(arrays.values())).shape[0]

        def named(name: str, dtype: Any) -> Any:
            return arrays[name] if name in arrays else jnp.zeros((rows, 0), dtype)

        lists = []
        for name in self.lists:
            if f"{name}/ids" in arrays:
                ids = arrays[f"{name}/ids"]
            else:
                ids = Keys(arrays[f"{name}/keys_hi"], arrays[f"{name}/keys_lo"])
            lists.append(Padded(ids, arrays[f"{name}/mask"]))
        nothing: Any = None
        return Batch(
            labels=nothing,
            weights=nothing,
            numbers=named("numbers", jnp.float32),
            ids=named("ids", jnp.int32),
            keys=Keys(named("keys_hi", jnp.uint32), named("keys_lo", jnp.uint32)),
            lists=tuple(lists),
        )

    def outputs(self, logits: Any) -> dict[str, Any]:
        """What the function gives: of clicks logits and probabilities, of towers scores."""
        if self.is_towers:
            return {"score": logits}
        return {"logit": logits, "score": jax.nn.sigmoid(logits)}

    def described(self, trained: Trained, platforms: Sequence[str]) -> dict[str, Any]:
        """All that there is to know of it, as JSON has it."""
        single = [name for name in self.ids if name not in self.lists]
        with_ids = [name for name in single if self.ids[name].num_embeddings is not None]
        columns = {name: _described_ids(ids) for name, ids in self.ids.items()}
        return {
            "qrhash": qrhash.__version__,
            "platforms": list(platforms),
            "inputs": {
                name: {"dtype": str(array.dtype), "shape": ["rows", *array.shape[1:]]}
                for name, array in self.arrays(example(self, 1)).items()
            },
            "outputs": list(self.outputs(np.zeros(1, np.float32))),
            "columns_of": {
                "numbers": list(self.schema.numbers),
                "ids": with_ids,
                "keys": [name for name in single if name not in with_ids],
            },
            "lists": dict(self.lists),
            "columns": columns,
            "schema": asdict(self.schema),
            "num_params": trained.learner.num_params,
        }


def _described_ids(ids: Ids) -> dict[str, Any]:
    """How keys of 64 bits become what the function takes."""
    if isinstance(ids, Vocabulary):
        return {"by": "vocabulary", "missing": ids.missing_id, "unseen": 0}
    if isinstance(ids, HashedIds):
        return {"by": "1 + key mod (size - 1)", "size": ids.num_embeddings, "missing": 0}
    return {"by": "key", "missing": MISSING_KEY}


def example(inputs: Inputs, rows: int) -> Batch:
    """A batch that shows what there is in it: ids, keys and numbers drawn at random."""
    rng = np.random.default_rng(0)
    nothing = encode(no_rows(inputs.schema), inputs.schema, inputs.ids)

    def drawn(array: Any) -> Any:
        shape = (rows, *array.shape[1:])
        if array.dtype == np.uint32:
            return rng.integers(0, 2**32, shape, np.uint32)
        if array.dtype == bool:
            return rng.random(shape) < 0.5
        return np.abs(rng.normal(size=shape)).astype(array.dtype)

    batch: Batch = jax.tree.map(drawn, nothing)
    with_ids = [
        ids.num_embeddings
        for name, ids in inputs.ids.items()
        if name not in inputs.lists and ids.num_embeddings is not None
    ]
    ids = rng.integers(0, np.array(with_ids, np.int64), (rows, len(with_ids)))
    lists = tuple(
        padded
        if isinstance(padded.ids, Keys)
        else padded._replace(
            ids=rng.integers(0, inputs.ids[name].num_embeddings, padded.mask.shape, np.int32)
        )
        for name, padded in zip(inputs.lists, batch.lists, strict=True)
    )
    return batch._replace(ids=ids.astype(np.int32), lists=lists)
