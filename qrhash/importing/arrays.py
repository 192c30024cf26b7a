"""Files of other systems -> {name: array}, by their own libraries."""

import contextlib
import importlib.util
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by name.

    Args:
      path: a file ending in .npz, .safetensors, .pt, .pth, .bin or .ckpt (PyTorch, of which code is
        not run: weights alone are read), .h5, .weights.h5 or .keras (Keras); or the prefix of a
        checkpoint of TensorFlow.

    Returns:
      {name: array}. Dictionaries in dictionaries are joined by dots, and of what PyTorch saved the
      `state_dict` is taken if there is one. Of Keras the name of a layer stands behind its class,
      `layers/embedding/NAME/vars/0`. Of TensorFlow what is no numbers is left out.

    Raises:
      ImportError: the library of the format is not installed.
      OSError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    is_tensorflow = path.with_name(f"{path.name}.index").exists()
    read, library = (_tensorflow, "tensorflow") if is_tensorflow else _reader(path)
    if not is_tensorflow and not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there, nor a checkpoint of TensorFlow of that name."
        )
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{path} needs {library}, which is not installed: pip install {library}")
    try:
        return read(path)
    # Whatever the libraries make of a file that is damaged, or another.
    except Exception as error:
        raise OSError(f"{path} cannot be read by {library}: {error}") from error


# What TensorFlow 2 puts behind the name of a variable.
_OF_VALUES = "/.ATTRIBUTES/VARIABLE_VALUE"

_Read = Callable[[Path], dict[str, np.ndarray]]


def _reader(path: Path) -> tuple[_Read, str]:
    by_suffix: dict[str, tuple[_Read, str]] = {
        ".npz": (_numpy, "numpy"),
        ".safetensors": (_safetensors, "safetensors"),
        **dict.fromkeys((".h5", ".keras"), (_hdf5, "h5py")),
        **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (_torch, "torch")),
    }
    if path.suffix not in by_suffix:
        raise OSError(f"{path} must end in {', '.join(by_suffix)}, or be one of TensorFlow.")
    return by_suffix[path.suffix]


def _numpy(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as stream, np.load(stream) as file:
        return dict(file)


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.flax import load_file

    return {name: np.asarray(array) for name, array in load_file(path).items()}


def _torch(path: Path) -> dict[str, np.ndarray]:
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    return {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in _flat(state)
        if isinstance(tensor, torch.Tensor)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _hdf5(path: Path) -> dict[str, np.ndarray]:
    import h5py

    found: dict[str, np.ndarray] = {}

    def visit(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset):
            layer = each.parent.attrs.get("name")
            if layer is not None and each.parent.name.endswith("/vars"):
                name = re.sub(r"vars/\d+$", rf"{layer}/\g<0>", name)
            found[name] = np.asarray(each)

    with contextlib.ExitStack() as opened:
        file: Any = path
        if path.suffix == ".keras":
            archive = opened.enter_context(zipfile.ZipFile(path))
            file = opened.enter_context(archive.open("model.weights.h5"))
        opened.enter_context(h5py.File(file, "r")).visititems(visit)
    return found


def _tensorflow(path: Path) -> dict[str, np.ndarray]:
    import tensorflow

    reader = tensorflow.train.load_checkpoint(str(path))
    return {
        name.removesuffix(_OF_VALUES): reader.get_tensor(name)
        for name, dtype in reader.get_variable_to_dtype_map().items()
        if dtype.is_floating or dtype.is_integer
    }
