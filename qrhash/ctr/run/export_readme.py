"""The page that an exported model comes with: how it is run without qrhash."""

from collections.abc import Iterable, Mapping
from typing import Any

_PAGE = """# A trained model

A function from rows to {outputs}, for any number of rows at once, on {platforms}. It runs where JAX
is installed, and needs no qrhash:

    pip install jax flatbuffers safetensors

```python
import pathlib

import jax
import numpy as np
from jax import export
from safetensors.flax import load_file

model = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
weights = load_file("weights.safetensors")
example = load_file("example.safetensors")
inputs = {{name: array for name, array in example.items() if not name.startswith("wanted/")}}
outputs = jax.jit(model.call)(weights, inputs)
np.testing.assert_allclose(outputs["score"], example["wanted/score"], rtol=1e-5, atol=1e-6)
```
{also}
## What it takes

A dictionary of arrays, of as many rows each; `example.safetensors` holds {rows} rows, drawn at
random, and what the function gives for them under `wanted/`. `model.json` says all of this for a
program.

{inputs}

## How a row becomes that

{columns}

## The embeddings alone

`embeddings.safetensors` is a snapshot: `qrhash.export.Snapshot` looks up the vectors of ids and
keys in it by NumPy alone.
"""

_ALSO = {
    "savedmodel": """
As a SavedModel, with its weights, for TensorFlow:

```python
import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file

example = load_file("example.safetensors")
inputs = {name: array for name, array in example.items() if not name.startswith("wanted/")}
model = tf.saved_model.load("saved_model").signatures["serving_default"]
outputs = model(**{name: tf.constant(array) for name, array in inputs.items()})
np.testing.assert_allclose(outputs["score"], example["wanted/score"], rtol=1e-5, atol=1e-6)
```
""",
    "onnx": """
As a model of ONNX, with its weights, for ONNX Runtime:

```python
import numpy as np
import onnxruntime
from safetensors.numpy import load_file

example = load_file("example.safetensors")
inputs = {name: array for name, array in example.items() if not name.startswith("wanted/")}
(scores,) = onnxruntime.InferenceSession("model.onnx").run(["score"], inputs)
np.testing.assert_allclose(scores, example["wanted/score"], rtol=1e-5, atol=1e-6)
```
""",
}

_KEYS = """an integer from -2**63 to 2**64 - 1 is its 64 bits, negative ones in two's complement.
  So is text that is such an integer as Python writes it (`42`, not `042` or `+42`), also with `.0`
  behind it (`42.0`), and so is a float that is whole and smaller than 2**53. All other text is its
  XXH64, of seed 0, in UTF-8; `true` and `false`, whatever their case, in lower case, as which truth
  values are hashed too. An empty cell is a missing one"""

_OF_INPUTS = {
    "numbers": "`numbers`, {shape} of {dtype}: the columns {names}, in this order; {how}, 0 for a "
    "missing one.",
    "ids": "`ids`, {shape} of {dtype}: the columns {names}, in this order.",
    "keys": "`keys_hi` and `keys_lo`, {shape} of {dtype} each: the upper and the lower 32 bits of "
    "the keys of the columns {names}, in this order.",
}


def readme(said: Mapping[str, Any], example_rows: int = 8) -> str:
    """The page, given what `model.json` says."""
    return _PAGE.format(
        outputs=" and ".join(f"`{name}`" for name in said["outputs"]),
        platforms=", ".join(said["platforms"]),
        also="".join(_ALSO[name] for name in said["also"]),
        rows=example_rows,
        inputs="\n".join(f"* {line}" for line in _inputs(said)),
        columns="\n".join(f"* {line}" for line in _columns(said)),
    )


def _inputs(said: Mapping[str, Any]) -> list[str]:
    """A line for each array, or pair of them."""
    lines = []
    is_criteo = said["schema"]["preset"] == "criteo"
    how = "log(1 + max(x, 0)) of x" if is_criteo else "sign(x) log(1 + |x|) of x"
    for kind, text in _OF_INPUTS.items():
        columns = said["columns_of"][kind]
        if columns:
            of = said["inputs"]["keys_hi" if kind == "keys" else kind]
            lines.append(
                text.format(shape=_shape(of), dtype=of["dtype"], names=_names(columns), how=how)
            )
    for name, length in said["lists"].items():
        takes = "ids" if f"{name}/ids" in said["inputs"] else "keys_hi`, `keys_lo"
        lines.append(
            f"`{name}/{takes}` and `{name}/mask`, [rows, {length}]: the elements of the list, and "
            "which places are taken, the first ones."
        )
    return lines


def _shape(of: Mapping[str, Any]) -> str:
    return f"[{', '.join(map(str, of['shape']))}]"


def _columns(said: Mapping[str, Any]) -> list[str]:
    """How values become keys, and keys what the function takes, by groups of columns."""
    text = (
        "hex digits are the number that they write"
        if said["schema"]["preset"] == "criteo"
        else _KEYS
    )
    lines = [f"A value becomes a key of 64 bits: {text}."]
    groups: dict[str, list[str]] = {}
    for name, how in said["columns"].items():
        missing = how["missing"]
        by = {
            "vocabulary": "the id stands in `NAME/ids` where the key stands in `NAME/keys`, in "
            "`vocabularies.safetensors`; 0 if it does not; for a missing cell see `model.json`",
            "key": f"the key itself; {missing} for a missing cell",
        }.get(how["by"], f"the id is {how['by']}, see `model.json`; {missing} for a missing cell")
        groups.setdefault(by, []).append(name)
    return lines + [f"{_names(names)}: {by}." for by, names in groups.items()]


def _names(columns: Iterable[str]) -> str:
    """Names in the marks of code, those with line ends or nothing in them as Python writes them."""
    shown = (repr(name) if not name.strip() or not name.isprintable() else name for name in columns)
    return ", ".join(f"`{name}`" for name in shown)
