"""Models of other systems, carried over: DLRM's, DeepRec's, and full tables of any.

What is carried over is `{name: array}`, as `read_arrays` reads it from a file of PyTorch,
TensorFlow, Keras, safetensors or NumPy, or as its owner has it. Of each embedding comes a config,
and tables of that config, which give the very vectors that the other system gave.

>>> import numpy as np
>>> import qrhash
>>> from qrhash import importing
>>> weights = {
...     "emb_l.0.weight_q": np.full((25, 4), 2.0, np.float32),
...     "emb_l.0.weight_r": np.full((4, 4), 3.0, np.float32),
... }
>>> carried = importing.from_dlrm(weights)["emb_l.0"]
>>> carried.config.partition
QuotientRemainder(num_embeddings=100, num_collisions=4)
>>> qrhash.lookup(carried.tables, np.array([99]), carried.config).tolist()
[[6.0, 6.0, 6.0, 6.0]]
"""

from qrhash.importing.arrays import read_arrays
from qrhash.importing.carried import Carried, CarriedKeys
from qrhash.importing.deeprec import from_deeprec
from qrhash.importing.dlrm import DLRMLayers, dlrm_logits, from_dlrm, layers_of_dlrm
from qrhash.importing.full import from_full_tables

__all__ = [
    "Carried",
    "CarriedKeys",
    "DLRMLayers",
    "dlrm_logits",
    "from_deeprec",
    "from_dlrm",
    "from_full_tables",
    "layers_of_dlrm",
    "read_arrays",
]
