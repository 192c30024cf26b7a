"""The exported function in the formats of other systems: TensorFlow's SavedModel, and ONNX.

Both are written by libraries made for that (orbax-export, jax2onnx), and read again by the system
itself, which must give the scores of the model: what does not is not handed out.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jax.extend.core import jaxpr_as_fun

from qrhash.ctr.errors import UserError
from qrhash.plain import in_plain_operations

SAVED_MODEL, ONNX = "saved_model", "model.onnx"

_NEEDED = {
    "savedmodel": ("tensorflow", "orbax.export"),
    "onnx": ("jax2onnx", "onnxruntime"),
}
FORMATS = tuple(_NEEDED)

# Of a score, against that of JAX.
RELATIVE, ABSOLUTE = 1e-5, 1e-6
# Protocol buffers, of which a file of ONNX is one, hold less than 2 GiB.
_ONNX_BYTES = 2**31 - 2**20


@dataclass(frozen=True)
class Function:
    """What is exported: a function of weights and inputs, dictionaries of arrays both.

    Attributes:
      run: the function; its result is a dictionary of arrays [rows].
      weights: name -> array.
      inputs: name -> array [rows, ...], an example.
    """

    run: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    weights: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]

    @functools.cached_property
    def wanted(self) -> dict[str, np.ndarray]:
        """What it gives for the example."""
        found: dict[str, np.ndarray] = jax.device_get(jax.jit(self.run)(self.weights, self.inputs))
        return found

    def of_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The types of the weights."""
        return {
            name: jax.ShapeDtypeStruct(each.shape, each.dtype)
            for name, each in self.weights.items()
        }

    def of_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The types of the inputs, of any number of rows."""
        (rows,) = jax_export.symbolic_shape("rows")
        return {
            name: jax.ShapeDtypeStruct((rows, *each.shape[1:]), each.dtype)
            for name, each in self.inputs.items()
        }


def check_formats(formats: Sequence[str]) -> None:
    """Raises UserError if one is unknown, or what it takes is not installed."""
    for name in formats:
        if name not in _NEEDED:
            raise UserError(f"--also must be some of {', '.join(FORMATS)}, got {name}.")
        missing = [each for each in _NEEDED[name] if not _is_installed(each)]
        if missing:
            raise UserError(
                f"--also {name} needs {' and '.join(missing)}; "
                f"install what it takes with: pip install 'qrhash[{name}]'"
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def write_format(name: str, function: Function, directory: Path, platforms: Sequence[str]) -> None:
    """Writes a function as "savedmodel" or "onnx", and checks what that gives for the example.

    Args:
      name: one of `FORMATS`.
      function: what to write.
      directory: where; the name of the file is `SAVED_MODEL` or `ONNX`.
      platforms: that a SavedModel is compiled for.

    Raises:
      UserError: the converter does not know an operation of the model, or what it wrote does not
        give the model's scores.
    """
    example, wanted = function.inputs, function.wanted
    with _quiet():
        try:
            if name == "onnx":
                read = _onnx(function, directory / ONNX, list(wanted))
            else:
                read = _saved_model(function, directory / SAVED_MODEL, platforms)
            for count in (len(next(iter(example.values()))), 3):
                found = read({name: each[:count] for name, each in example.items()})
                for output, each in wanted.items():
                    np.testing.assert_allclose(
                        found[output], each[:count], rtol=RELATIVE, atol=ABSOLUTE
                    )
        except UserError:
            raise
        except AssertionError as error:
            raise UserError(f"--also {name}: it does not give the model's scores.") from error
        except Exception as error:  # whatever a converter raises for what it does not know
            raise UserError(
                f"--also {name}: this model cannot be converted ({_first_line(error)})."
            ) from error


def _saved_model(function: Function, path: Path, platforms: Sequence[str]) -> Callable[..., Any]:
    """Writes a SavedModel; and what it gives, read again, as a function of the inputs."""
    import tensorflow as tf
    from orbax.export import ExportManager, JaxModule, ServingConfig

    module = JaxModule(
        dict(function.weights),
        function.run,
        trainable=False,
        input_polymorphic_shape=dict.fromkeys(function.inputs, "rows, ..."),
        jax2tf_kwargs={"native_serialization_platforms": tuple(platforms)},
    )
    signature = {
        name: tf.TensorSpec((None, *each.shape[1:]), each.dtype, name)
        for name, each in function.inputs.items()
    }
    serving = ServingConfig("serving_default", input_signature=[signature])
    ExportManager(module, [serving]).save(str(path))
    call = tf.saved_model.load(str(path)).signatures["serving_default"]

    def read(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = call(**{name: tf.constant(each) for name, each in inputs.items()})
        return {name: each.numpy() for name, each in outputs.items()}

    return read


def _onnx(function: Function, path: Path, outputs: Sequence[str]) -> Callable[..., Any]:
    """Writes a model of ONNX; and what it gives, read again, as a function of the inputs."""
    size = sum(each.nbytes for each in function.weights.values())
    if size > _ONNX_BYTES:
        raise UserError(
            f"--also onnx: a file of ONNX holds 2 GiB, and the weights take {size:,} bytes."
        )
    import jax2onnx
    import onnxruntime

    names = list(function.inputs)

    def flat(*arrays: Any) -> list[Any]:
        given = jax.tree.map(jax.numpy.asarray, dict(function.weights))
        found = function.run(given, dict(zip(names, arrays, strict=True)))
        return [found[name] for name in outputs]

    types = list(function.of_inputs().values())
    # Traced before the converter is at work, which then replaces functions of JAX by its own.
    program = in_plain_operations(flat, *types)
    jax2onnx.to_onnx(
        jaxpr_as_fun(program),
        inputs=types,
        input_names=names,
        output_names=list(outputs),
        return_mode="file",
        output_path=str(path),
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def read(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(list(outputs), dict(inputs)), strict=True))

    return read


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what converters have to say about themselves off the terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
