"""How often the ids of a column are met, and what is known of them from rows that they share.

Ids are numbered by falling frequency. Their counts are kept as some hundred pieces of neighbouring
ids with one count each: single ids first, then pieces that grow with the number of the id.

**What a row knows.** Say that every id has an effect of its own, drawn with variance 1, that every
time it is met shows it with a noise of variance kappa, and that a row learns the best multiple of
the mean of what its ids show. Of c meetings of one id the row then explains c**2 / (c + kappa): of
kappa meetings half of the variance. Of several ids with counts c_i in one row it explains

    u**2 / (u + kappa),    u = sum c_i**2 / sum c_i,

where the sum over ids with rows of their own is that of c_i**2 / (c_i + kappa). Divided by all
meetings, this is the share of the column's variance that the table knows; with kappa = 0 it is
the mean share of a row's traffic that is the id's own. What is met once is nothing to lose.
"""

from typing import NamedTuple

import numpy as np

# Exponent of the frequencies where none are given: the count of the r-th id falls as r**-1.05.
ZIPF_EXPONENT = 1.05

# Meetings after which half of the variance of an id's effect is known, kappa above. Of Criteo's
# columns of more than 1,000 ids it is 10 to 17, by their clicks.
PRIOR_COUNT = 10.0

_SINGLE_IDS = 32  # pieces of one id each
_GROWTH = 1.2  # how much longer a piece after them is than the one before
_SIZES_OF_TABLES = 48  # numbers of rows for which the share is computed; between them, a line


class Traffic(NamedTuple):
    """Counts of ids by falling frequency, in pieces.

    Attributes:
      edges: [pieces + 1] int64, rising from 0 to the number of ids: piece p has the ids from
        edges[p] up to edges[p + 1].
      counts: [pieces] float64, how often each id of a piece is met, on average.
    """

    edges: np.ndarray
    counts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """How many ids each piece has, [pieces] int64."""
        return np.diff(self.edges)

    @property
    def total(self) -> float:
        """How often all ids are met."""
        return float(self.sizes @ self.counts)


class Groups(NamedTuple):
    """Ids in groups of one count each, from the most frequent on.

    Attributes:
      sizes: how many ids each group has, [..., groups]; need not be whole numbers.
      counts: how often each of them is met, [groups], falling, above 0.
    """

    sizes: np.ndarray
    counts: np.ndarray


def whole_counts(traffic: Traffic) -> Groups:
    """The same traffic with whole counts: those of a piece are the two next to their mean."""
    low = np.floor(traffic.counts)
    above = traffic.counts - low
    counts = np.concatenate([low + 1, low])
    sizes = np.concatenate([traffic.sizes * above, traffic.sizes * (1 - above)])
    counts, places = np.unique(-counts[sizes > 0], return_inverse=True)
    sizes = np.bincount(places, sizes[sizes > 0], len(counts))
    return Groups(sizes[counts < 0], -counts[counts < 0])


def of_counts(counts: np.ndarray) -> Traffic:
    """The traffic of ids whose counts [n] are known, in falling order."""
    edges = _edges(len(counts))
    sums = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    return Traffic(edges, np.diff(sums[edges]) / np.diff(edges))


def of_zipf(num_embeddings: int, total: float, exponent: float = ZIPF_EXPONENT) -> Traffic:
    """The traffic of so many ids whose counts fall as r**-exponent, r = 1, 2, ...

    Args:
      num_embeddings: number of ids.
      total: how often all of them are met.
      exponent: above 0, but not 1.
    """
    edges = _edges(num_embeddings)
    # The mean over a piece, by the integral from half a place before it to half a place after.
    power = 1.0 - exponent
    integrals = (edges + 0.5) ** power / power
    counts = np.diff(integrals) / np.diff(edges)
    counts[:_SINGLE_IDS] = np.arange(1, len(counts[:_SINGLE_IDS]) + 1, dtype=float) ** -exponent
    return Traffic(edges, counts * (total / (np.diff(edges) @ counts)))


def known_alone(traffic: Traffic, prior_count: float = PRIOR_COUNT) -> float:
    """The share of a column's variance that is known from rows of one id each."""
    if not traffic.total:
        return 0.0
    return float(traffic.sizes @ known_of(traffic.counts, prior_count)) / traffic.total


def known_by_rows(
    traffic: Traffic, prior_count: float = PRIOR_COUNT
) -> tuple[np.ndarray, np.ndarray]:
    """The same from a table that ids share, indexed by the number of the id mod rows.

    Args:
      traffic: of the ids.
      prior_count: kappa.

    Returns:
      Numbers of rows [m] int64, rising from 1 to the number of ids, and the shares [m] float64
      known from tables of so many, which do not fall.
    """
    most = int(traffic.edges[-1])
    sizes = np.unique(np.geomspace(1, most, _SIZES_OF_TABLES).round().astype(np.int64))
    known = np.array([_known_of_rows(traffic, int(rows), prior_count) for rows in sizes])
    return sizes, np.maximum.accumulate(known) / max(traffic.total, 1.0)


def _known_of_rows(traffic: Traffic, num_rows: int, prior_count: float) -> float:
    """What a table of so many rows explains, times all meetings."""
    edges = np.minimum(traffic.edges, num_rows)
    groups = np.diff(edges)  # of rows that are about alike
    first = ((edges[:-1] + edges[1:] - 1) // 2)[groups > 0]
    groups = groups[groups > 0]
    # Of ids first, first + num_rows, ... so many are below each edge.
    below = -((first[:, None] - traffic.edges) // num_rows)
    ids = np.diff(np.maximum(below, 0), axis=1)
    met, squares = ids @ traffic.counts, ids @ traffic.counts**2
    effective = np.divide(squares, met, out=np.zeros_like(met), where=met > 0)
    return float(groups @ known_of(effective, prior_count))


def known_by_hash(groups: Groups, num_rows: np.ndarray, prior_count: float) -> np.ndarray:
    """What a table explains, times all meetings, that ids share by hash.

    The ids of a row are a sample: of each group a number with a Poisson distribution. The most
    frequent of them decides what the row knows; those that are rarer are taken at their expected
    traffic and squares of counts, as u above is of sums.

    Args:
      groups: of the ids, of sizes [..., groups].
      num_rows: of the table, [...].
      prior_count: kappa.

    Returns:
      [...], expected over all hashes.
    """
    of_row = groups.sizes / num_rows[..., None]
    is_first = np.exp(of_row - np.cumsum(of_row, axis=-1)) * -np.expm1(-of_row)
    # Of the group of the first, how many are in the row: one at least.
    alike = np.divide(of_row, -np.expm1(-of_row), out=np.ones_like(of_row), where=of_row > 1e-9)
    met, squares = of_row * groups.counts, of_row * groups.counts**2
    met = _behind(met) + alike * groups.counts
    squares = _behind(squares) + alike * groups.counts**2
    known: np.ndarray = num_rows * (is_first * known_of(squares / met, prior_count)).sum(-1)
    return known


def _behind(each: np.ndarray) -> np.ndarray:
    """The sums of what comes behind, along the last axis."""
    sums = np.cumsum(each[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([sums[..., 1:], np.zeros_like(sums[..., :1])], axis=-1)


def known_of(counts: np.ndarray, prior_count: float) -> np.ndarray:
    """What rows explain, times their meetings, whose ids have these effective counts."""
    known: np.ndarray = np.divide(
        counts**2, counts + prior_count, out=np.zeros_like(counts), where=counts > 0
    )
    return known


def _edges(num_embeddings: int) -> np.ndarray:
    """Where the pieces of so many ids begin, and their end."""
    edges = list(range(min(_SINGLE_IDS, num_embeddings) + 1))
    while edges[-1] < num_embeddings:
        step = round(edges[-1] * (_GROWTH - 1))
        edges.append(min(num_embeddings, edges[-1] + max(1, step)))
    return np.array(edges, np.int64)
