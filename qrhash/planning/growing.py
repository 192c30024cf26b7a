"""Tables that grow as candidates: rows of their own for the keys that earn them.

A key gets a row when it has been met `times` times, if one is free; the vectors of all others come
from two small tables that they share by hash, and a row starts as a copy of that. Keys are those of
the log by which the plan is made.

**Who has a row.** The rows that the keys of the log would earn in the end may be more than there
are. Then they are taken after a share x of the log, by the keys that were met `times` times within
it: one that the whole log has c times, with the probability of a binomial distribution,

    P(Binomial(c, x) >= times).

Where rows are taken back from the keys met longest ago, x is the share of the log over which a key
is remembered, and for times = 1 this is Che's approximation of such a cache. So the most frequent
keys have rows, but not they alone.

**What is known.** Of the c meetings of a key with a row it has learnt from the last
m = c - times + 1. It began with what its compressed vector knew, a share s of the variance, and of
the rest m meetings show

    s + (1 - s)**2 m / ((1 - s) m + kappa),

which is c / (c + kappa), a row of its own from the start, if the compressed vector knew of the
meetings before as much as such a row. Of keys without rows what is known is that of rows shared by
hash (`traffic.known_by_hash`), with the traffic of those keys only. Of what is lost so, the part
remains that the operation leaves (`candidates.FACTORS`), but between keys that share a row in both
tables nothing tells.

Source: Che, Tung and Wang 2002, "Hierarchical Web Caching Systems"; `traffic` for the variance.
"""

from typing import Any

import numpy as np

from qrhash.config import EmbedConfig
from qrhash.key_families import KeyDigits
from qrhash.planning.candidates import FACTORS, Candidates, Facts
from qrhash.planning.traffic import Groups, known_by_hash, known_of, whole_counts

OPERATION, _NUM_TABLES = "mult", 2

# Of what is fixed about an embedding, what the rows have in common with the compressed vectors.
_OF_ROWS = ("combiner", "dtype", "param_dtype", "large_table_rows", "layout")

_SHARES = 128  # of the log, for which the rows taken are computed; between them, a line
_FEWEST_ROWS = 8
_MOST_BITS = 30  # of a row number


def growing(facts: Facts, most_bytes: float = np.inf) -> Candidates:
    """A row for each key that is met often enough, and compressed vectors for all others.

    Args:
      facts: about the column; its ids stand for keys.
      most_bytes: candidates that cost more are left out.
    """
    memory, times, features = facts.memory, facts.admit_after, facts.features
    keys = whole_counts(facts.traffic)
    most_bits = min(_MOST_BITS, max(1, (facts.num_embeddings - 1).bit_length()))
    bits = np.arange(1, most_bits + 1)
    of_vectors = np.array([_NUM_TABLES * memory.of_table(2 ** int(b), features) for b in bits])
    configs = [_config(facts, rows) for rows in _capacities(keys, times, facts.per_octave)]
    of_rows = np.array([memory.of_table(c.capacity, features) + memory.index(c) for c in configs])
    costs = of_rows[:, None] + of_vectors
    rows, tables = np.nonzero(costs <= most_bytes)
    shares = share_within(np.array([c.eviction.num_keys for c in configs]), keys, times)
    has_row = admitted(keys.counts, times, shares)
    known = known_of_keys(keys, has_row[rows], 2 ** bits[tables], times, facts.prior_count)
    losses = np.maximum(facts.known - known / max(facts.traffic.total, 1.0), 0.0)

    def make(number: int) -> Any:
        return _config(facts, configs[rows[number]].capacity, int(bits[tables[number]]))

    return Candidates(costs[rows, tables].astype(float), losses, make)


def _config(facts: Facts, capacity: int, bits: int | None = None) -> Any:
    """The `DynamicConfig`, with compressed vectors from tables of 2**bits rows."""
    # Loaded on first use: most plans have no such column.
    from qrhash.dynamic.admission import admit_after
    from qrhash.dynamic.config import DynamicConfig
    from qrhash.dynamic.eviction import longest_unused

    options = {name: value for name, value in facts.options.items() if name in _OF_ROWS}
    of_vectors = {name: value for name, value in facts.options.items() if name != "combiner"}
    refused = None
    if bits is not None:
        digits = KeyDigits(_NUM_TABLES * bits, _NUM_TABLES)
        refused = EmbedConfig(digits, facts.features, OPERATION, **of_vectors)
    return DynamicConfig(
        capacity,
        facts.features,
        admission=admit_after(facts.admit_after, capacity),
        eviction=longest_unused(capacity),
        refused=refused,
        **options,
    )


def known_of_keys(
    keys: Groups, has_row: np.ndarray, num_rows: np.ndarray, times: int, prior_count: float
) -> np.ndarray:
    """What tables that grow explain, times all meetings.

    Args:
      keys: how often they are met.
      has_row: the probability that a key of a group has a row of its own, [m, groups].
      num_rows: of each of the tables of compressed vectors, [m].
      times: how often a key is met before it has a row, this time included.
      prior_count: kappa.

    Returns:
      [m].
    """
    start = np.zeros(len(num_rows))
    if times > 1:
        before = Groups(keys.sizes, np.minimum(keys.counts, times - 1))
        alone = before.sizes @ known_of(before.counts, prior_count)
        sizes, places = np.unique(num_rows, return_inverse=True)
        share = _told_apart(before, sizes, prior_count) / max(alone, np.finfo(float).tiny)
        start = share[places] * ((times - 1) / (times - 1 + prior_count))
    unknown = 1 - start[:, None]
    met = np.maximum(keys.counts - times + 1, 0.0)
    learnt = 1 - unknown + unknown**2 * met / (unknown * met + prior_count)
    of_rows = (has_row * learnt) @ (keys.sizes * keys.counts)
    refused = Groups(keys.sizes * (1 - has_row), keys.counts)
    known: np.ndarray = of_rows + _told_apart(refused, num_rows, prior_count)
    return known


def _told_apart(keys: Groups, num_rows: np.ndarray, prior_count: float) -> np.ndarray:
    """What the compressed vectors of keys explain, with tables of so many rows each."""
    factors = FACTORS["quotient-remainder", OPERATION, _NUM_TABLES]
    rows = num_rows.astype(float)
    apart = known_by_hash(keys, rows**_NUM_TABLES, prior_count)
    shared = known_by_hash(keys, rows, prior_count)
    told: np.ndarray = apart - factors.sharing * np.maximum(apart - shared, 0.0)
    return told


def admitted(counts: np.ndarray, times: int, shares: np.ndarray) -> np.ndarray:
    """The probability that a key is met so often within a share of the log.

    Args:
      counts: how often the whole log has it, whole numbers [groups].
      times: how often at least.
      shares: [m], above 0.

    Returns:
      [m, groups].
    """
    within = np.minimum(shares, 1 - np.finfo(float).eps)[:, None]
    tiny = np.finfo(float).tiny
    term = counts * np.log1p(-within)  # log of the probability of none, and of one, two, ...
    fewer = np.exp(term)
    for j in range(1, times):
        odds = np.log(within) - np.log1p(-within)
        term = term + odds + np.log(np.maximum(counts - j + 1, tiny) / j)
        fewer = fewer + np.exp(term)
    # Of the whole log it is known.
    partly = np.where(shares[:, None] < 1, 1 - np.minimum(fewer, 1.0), 1.0)
    return np.where(counts >= times, partly, 0.0)


def share_within(num_rows: np.ndarray, keys: Groups, times: int) -> np.ndarray:
    """The share of the log within which so many keys are met often enough, or all of it.

    Args:
      num_rows: of the keys' own, [m].
      keys: how often they are met.
      times: how often is enough.

    Returns:
      [m].
    """
    shares = np.geomspace(0.1 / max(1.0, keys.counts.max(initial=0.0)), 1.0, _SHARES)
    taken = admitted(keys.counts, times, shares) @ keys.sizes
    return np.exp(np.interp(num_rows, taken, np.log(shares)))


def _capacities(keys: Groups, times: int, per_octave: int) -> list[int]:
    """Numbers of rows, at most as many as the keys of the log earn, and those kept free."""
    from qrhash.dynamic.eviction import longest_unused

    earned = int(np.ceil(keys.sizes @ (keys.counts >= times)))
    most = max(1, earned)
    while longest_unused(most).num_keys < earned:
        most += max(1, (earned - longest_unused(most).num_keys) // 2)
    most = min(most, 2**_MOST_BITS - 1)
    octaves = np.arange(np.log2(_FEWEST_ROWS) * per_octave, np.log2(most) * per_octave)
    sizes = np.unique(np.append(2 ** (octaves / per_octave), most).round().astype(np.int64))
    return [int(size) for size in sizes if size <= most]
