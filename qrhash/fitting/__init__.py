"""Full tables and compressed ones: from one to the other, and to more ids.

`fit` finds the tables of a config whose vectors are nearest to those of a trained full table,
weighted by how often each id is met; `expand` makes a full table of any config's tables; `grow` and
`grow_tables` give a vocabulary more ids, and every old one keeps its vector.

It is arithmetic of the host, in float64, some thousand rows at a time: a full table may be a file
that is larger than the memory.
"""

from qrhash.fitting.errors import Errors
from qrhash.fitting.expanding import expand
from qrhash.fitting.fits import Fitted, fit
from qrhash.fitting.growing import grow, grow_tables

__all__ = ["Errors", "Fitted", "expand", "fit", "grow", "grow_tables"]
