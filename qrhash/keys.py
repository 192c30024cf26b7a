"""64-bit keys for JAX: a pytree of two words, and what is computed of them.

`Keys` go through `jax.jit`, `jax.vmap`, `jax.shard_map` and exports as any other arrays do. They
are made, scrambled and crossed in `qrhash.words`, which needs no JAX.
"""

import jax

from qrhash.words import Keys, check_seed, cross, scramble, unscramble

__all__ = ["Keys", "check_seed", "cross", "scramble", "unscramble"]

jax.tree_util.register_dataclass(Keys, data_fields=["hi", "lo"], meta_fields=[])
