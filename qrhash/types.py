"""The aliases that all rooms use, and in which dtype is drawn and summed."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray  # on the device or on the host
Scalar: TypeAlias = Array | float | int
Key: TypeAlias = jax.Array  # a random key, [] or [n]
PyTree: TypeAlias = Any  # of arrays
Initializer: TypeAlias = Callable[..., Any]  # Flax's: (key, shape, dtype) -> array


def wide_dtype(dtype: Any) -> Any:
    """The dtype to draw and to sum in: float32 at least."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)
