"""`qrhash export`: a trained model as files that run in a process without qrhash.

The function that gives scores is compiled once, for any number of rows and for every platform, with
the weights as arguments (`jax.export`, StableHLO). Beside it are the weights, how columns become
what it takes, a snapshot of the embeddings alone, and rows with their scores to try it on.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from qrhash import export
from qrhash.ctr.data.vocabulary import Vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.models import Embeddings
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.export_formats import Function, check_formats, write_format
from qrhash.ctr.run.export_inputs import Inputs, example
from qrhash.ctr.run.export_readme import readme
from qrhash.ctr.run.trained import Trained, kept_of, load_trained
from qrhash.ctr.tower_settings import TWO_TOWER
from qrhash.export.saving import save_tensors
from qrhash.keys import Keys

PLATFORMS = ("cpu", "cuda", "tpu")

MODEL, WEIGHTS, EMBEDDINGS = "model.stablehlo", "weights.safetensors", "embeddings.safetensors"
VOCABULARIES, EXAMPLE = "vocabularies.safetensors", "example.safetensors"
DESCRIPTION, README = "model.json", "README.md"

_EXAMPLE_ROWS = 8


@dataclass(frozen=True)
class ExportedRun:
    """What was written.

    Attributes:
      directory: where.
      num_bytes: name of a file -> its size.
    """

    directory: Path
    num_bytes: Mapping[str, int]


def export_run(
    run: Path,
    output: Path,
    display: Display,
    *,
    rows: str = "float32",
    platforms: Sequence[str] = PLATFORMS,
    also: Sequence[str] = (),
    overwrite: bool = False,
) -> ExportedRun:
    """Writes the model of a run as files that need no qrhash.

    Args:
      run: the directory of a run.
      output: a directory that is made.
      display: is told how far it is.
      rows: how the snapshot of the embeddings keeps its rows; see `qrhash.export.save`.
      platforms: that the function is compiled for.
      also: formats of other systems to write the function in too: "savedmodel", "onnx".
      overwrite: whether there may be such a directory, of an earlier export, which is replaced.

    Raises:
      UserError: the run has no checkpoint; the directory exists, or cannot be written; a format
        needs what is not installed, or does not know the model.
    """
    _check_output(output, run, overwrite=overwrite)
    unknown = [each for each in platforms if each not in PLATFORMS]
    if unknown or not platforms:
        got = unknown[0] if unknown else "none"
        raise UserError(f"--platforms must be some of {', '.join(PLATFORMS)}, got {got}.")
    if rows not in export.ROW_FORMATS:
        raise UserError(f"--rows must be one of {', '.join(export.ROW_FORMATS)}, got {rows}.")
    check_formats(also)
    kept = kept_of(run)
    trained = load_trained(kept, display, is_whole=True)
    inputs = Inputs.of(trained, kept.schema, kept.settings.model == TWO_TOWER)
    with _new_directory(output) as part:
        display.phase("compiling the model", 0)
        function = _function(trained, inputs)
        (part / MODEL).write_bytes(_compiled(function, platforms))
        display.phase("writing the weights", 0)
        _write_arrays(part, trained, function, rows)
        for name in also:
            display.phase(f"converting to {name}", 0)
            write_format(name, function, part, platforms)
        description = inputs.described(trained, platforms) | {"also": list(also)}
        (part / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        (part / README).write_text(readme(description))
        sizes = {each.name: _size(each) for each in sorted(part.iterdir())}
    return ExportedRun(output, sizes)


# --- the function ---------------------------------------------------------------------------------


def _function(trained: Trained, inputs: Inputs) -> Function:
    """The function of weights and inputs that gives scores."""
    logits, weights = trained.learner.scoring
    leaves, structure = jax.tree.flatten(weights)
    names = _names(weights)

    def scores(weights: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        given = jax.tree.unflatten(structure, [weights[name] for name in names])
        return inputs.outputs(logits(given, inputs.batch(arrays)))

    rows = inputs.arrays(example(inputs, _EXAMPLE_ROWS))
    return Function(
        run=scores,
        weights=dict(zip(names, map(np.asarray, leaves), strict=True)),
        inputs={name: np.asarray(each) for name, each in rows.items()},
    )


def _compiled(function: Function, platforms: Sequence[str]) -> bytes:
    """The function for any number of rows, as bytes."""
    types = function.of_weights(), function.of_inputs()
    exported = jax_export.export(jax.jit(function.run), platforms=list(platforms))(*types)
    return bytes(exported.serialize())


def _names(weights: Any) -> list[str]:
    """A name for each array of the weights."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(weights)[0]]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    assert len(set(names)) == len(names)
    return names


# --- the files ------------------------------------------------------------------------------------


def _write_arrays(part: Path, trained: Trained, function: Function, rows: str) -> None:
    """Weights, vocabularies, the snapshot and the example."""
    from safetensors.flax import save_file

    weights = {name: jnp.asarray(each) for name, each in function.weights.items()}
    save_tensors(save_file, weights, part / WEIGHTS)
    vocabularies: dict[str, np.ndarray] = {}
    for name, ids in trained.ids.items():
        if isinstance(ids, Vocabulary):
            vocabularies |= {f"{name}/keys": ids.keys, f"{name}/ids": ids.ids}
    _write_numpy(part / VOCABULARIES, vocabularies)
    export.save(part / EMBEDDINGS, embeddings_of(trained), rows=rows)
    wanted = {f"wanted/{name}": each for name, each in function.wanted.items()}
    _write_numpy(part / EXAMPLE, {**function.inputs, **wanted})


def _write_numpy(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_tensors(save_file, whole, path)


def embeddings_of(trained: Trained) -> dict[str, export.Exported]:
    """The embeddings of a trained model, as a snapshot has them: column name -> embedding.

    Columns that share a table that grows have it under the names of all of them, joined.
    """
    found: dict[str, export.Exported] = {}
    for each in trained.learner.model.all_embeddings:
        found |= _embeddings_of(each, trained.learner.steps)
    return found


def _embeddings_of(embeddings: Embeddings, steps: int) -> dict[str, export.Exported]:
    found: dict[str, export.Exported] = {}
    if embeddings.fixed:
        columns = embeddings.columns
        found |= export.of_collection(columns.config, columns.stacks, columns.projections)
    for growing in embeddings.growing:
        table, combiners = growing.table, dict(growing.of_lists)
        name = "+".join(growing.names)
        shared = f"{name}/table"
        found[shared] = export.of_dynamic(
            table.config, table.parameters, table.state.get_value(), steps
        )
        for column in growing.names:
            combiner = combiners.get(column, table.config.combiner)
            found[column] = export.of_crossed(shared, Keys.of([column])[0], combiner)
    return found


def _check_output(output: Path, run: Path, *, overwrite: bool) -> None:
    if output.exists() and output.resolve() in (run.resolve(), *run.resolve().parents):
        raise UserError(f"{output} is the run, or holds it; choose another directory.")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is no directory; choose another.")
    if not overwrite:
        raise UserError(f"{output} exists; choose another directory, or --overwrite it.")
    if any(output.iterdir()) and not (output / DESCRIPTION).is_file():
        raise UserError(f"{output} is no earlier export, and is not overwritten.")


@contextlib.contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory that is there when it is whole, and not before."""
    part = output.with_name(f"{output.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if output.exists():
            shutil.rmtree(output)
        part.replace(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


def report(result: ExportedRun) -> str:
    """What was written, in a few lines."""
    width = max(map(len, result.num_bytes))
    lines = [f"  {name:<{width}}  {size:>13,} bytes" for name, size in result.num_bytes.items()]
    return "\n".join([f"{result.directory}:", *lines])
