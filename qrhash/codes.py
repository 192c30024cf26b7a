"""Codes with a meaning, learned from a log: ids that are met in the same contexts get equal codes.

A log of pairs (id, context), such as place and visitor, or two items of one basket, is counted
chunk by chunk. Of the counts N comes the shifted positive pointwise mutual information,

    M[i, c] = max(0, log(N[i, c] / (N[i] P[c])) - log(shift)),    P[c] ~ N[c]^smoothing

a truncated SVD makes vectors of its rows, and a balanced clustering codes of the vectors: the first
code is the cluster, each next one the cluster of what the codes before leave over (residual
quantisation). Ids of equal codes so far are dealt out evenly to the next, so that few of them have
all codes in common. `qrhash.CodePartition` takes the codes.

Source: Levy and Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization"; residual
quantisation of semantic ids: Rajput et al. 2023, "Recommender Systems with Generative Retrieval".
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qrhash.arithmetic import as_ids, as_size

__all__ = ["from_cooccurrence"]

_DISTANCES_AT_ONCE = 2**24
_ROUNDS = 2  # of assignments, each to the centres of the one before


def from_cooccurrence(
    chunks: Iterable[Sequence[Any]],
    num_embeddings: int,
    *,
    num_codes: Sequence[int] = (256, 256),
    num_dims: int = 64,
    shift: float = 1.0,
    smoothing: float = 0.75,
    slack: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Codes of ids by the contexts that they are met in.

    Needs scikit-learn: `pip install 'qrhash[codes]'`. Memory goes by the distinct pairs and by
    `num_embeddings * num_dims`, not by the length of the log.

    Args:
      chunks: the log, part by part: pairs (ids, contexts) of integer arrays [m], or triples with
        weights [m], numbers from 0 on, such as counts. An iterable that is gone through once.
      num_embeddings: size n of the vocabulary of the ids.
      num_codes: clusters of each of the k levels.
      num_dims: length of the vectors that are clustered.
      shift: what a co-occurrence must exceed chance by, as a factor, to count.
      smoothing: exponent of the frequencies of contexts; below 1, rare ones count less.
      slack: by how much, as a fraction, a cluster may be fuller than all are on average.
      seed: the same seed gives the same codes.
      progress: whether to show a bar.

    Returns:
      Codes [num_embeddings, k], int32. Ids that were never met, or with nothing but chance, get
      codes by their number, evenly spread.

    Raises:
      ValueError: an argument breaks its rule, or a chunk holds no pairs of integers [m], ids
        outside the vocabulary, negative contexts or weights.
      ImportError: scikit-learn is missing.

    >>> log = [(np.array([0, 1, 2, 3]), np.array([7, 7, 9, 9]))]
    >>> codes = from_cooccurrence(log, num_embeddings=4, num_codes=(2,))
    >>> codes[0] == codes[1], codes[2] == codes[3], codes[0] == codes[2]
    (array([ True]), array([ True]), array([False]))
    """
    num_embeddings = as_size("num_embeddings", num_embeddings)
    sizes = _checked_sizes(num_codes)
    num_dims, seed = as_size("num_dims", num_dims), as_size("seed", seed, minimum=0)
    _check_number("shift", shift, 0, is_open=True)
    _check_number("smoothing", smoothing, 0)
    _check_number("slack", slack, 0)
    decompose, cluster = _from_sklearn(seed)
    with _shown(progress) as show:
        counts = _counted(show(chunks, "counting"), num_embeddings)
        information = _information(counts, shift, smoothing)
        is_met = np.diff(information.indptr) > 0
        codes = _spread(np.cumsum(~is_met) - 1, sizes)
        (left,) = (decompose(information[is_met], num_dims) for _ in show(range(1), "vectors"))
        groups = np.zeros(len(left), np.int64)  # ids of equal codes so far
        for level in show(range(len(sizes)), "clustering"):
            found, left = _clustered(left, groups, sizes[level], slack, cluster)
            codes[is_met, level] = found
            _, groups = np.unique(groups * sizes[level] + found, return_inverse=True)
    return codes


def _counted(chunks: Iterable[Sequence[Any]], num_embeddings: int) -> Any:
    """The weights of pairs, a sparse matrix [num_embeddings, contexts], summed up."""
    from scipy import sparse

    # Sums of sums of about equal length: no chunk is added to the whole more than log times.
    sums: list[Any] = []
    for number, chunk in enumerate(chunks):
        sums.append(_of_chunk(chunk, num_embeddings, f"chunks[{number}]"))
        while len(sums) > 1 and sums[-2].nnz <= 2 * sums[-1].nnz:
            sums.append(_added(sums.pop(), sums.pop()))
    while len(sums) > 1:
        sums.append(_added(sums.pop(), sums.pop()))
    return sums[0] if sums else sparse.csr_array((num_embeddings, 1))


def _added(a: Any, b: Any) -> Any:
    shape = (a.shape[0], max(a.shape[1], b.shape[1]))
    for each in (a, b):
        each.resize(shape)
    return a + b


def _of_chunk(chunk: Sequence[Any], num_embeddings: int, name: str) -> Any:
    """A checked chunk as a sparse matrix of its weights."""
    from scipy import sparse

    if not isinstance(chunk, Sequence) or len(chunk) not in (2, 3):
        raise ValueError(
            f"{name} must be (ids, contexts) or (ids, contexts, weights), got {chunk!r}."
        )
    ids, contexts = (np.asarray(as_ids(each, f"{name}[{j}]")) for j, each in enumerate(chunk[:2]))
    weights = np.asarray(chunk[2], np.float64) if len(chunk) == 3 else np.ones(ids.shape)
    if ids.ndim != 1 or not ids.shape == contexts.shape == weights.shape:
        raise ValueError(
            f"{name} must hold arrays of one shape [m], got {ids.shape}, {contexts.shape} and "
            f"{weights.shape}."
        )
    if ids.size == 0:
        return sparse.csr_array((num_embeddings, 1))
    if ids.min() < 0 or ids.max() >= num_embeddings:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name} must hold ids in [0, {num_embeddings}), got {wrong}.")
    if contexts.min() < 0 or contexts.max() >= 2**31 - 1:
        wrong = contexts.min() if contexts.min() < 0 else contexts.max()
        raise ValueError(f"{name} must hold contexts in [0, 2**31 - 1), got {wrong}.")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"{name} must hold finite weights from 0 on, got {weights.min()}.")
    shape = (num_embeddings, int(contexts.max()) + 1)
    return sparse.coo_array((weights, (ids, contexts)), shape).tocsr()


def _information(counts: Any, shift: float, smoothing: float) -> Any:
    """The shifted positive pointwise mutual information, a sparse matrix of its entries above 0."""
    of_id, of_context = counts.sum(axis=1), counts.sum(axis=0) ** smoothing
    pairs = counts.tocoo()
    # Zero weights may stand in it, and have no logarithm.
    kept = pairs.data > 0
    ids, contexts, weights = pairs.row[kept], pairs.col[kept], pairs.data[kept]
    chance = shift * of_id[ids] * (of_context[contexts] / of_context.sum())
    above = np.maximum(0, np.log(weights / chance)).astype(np.float32)
    information = type(pairs)((above, (ids, contexts)), counts.shape).tocsr()
    information.eliminate_zeros()
    return information


def _from_sklearn(seed: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(sparse matrix, dims) -> vectors of length 1; (points, clusters) -> their centres."""
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.decomposition import TruncatedSVD
    except ImportError as error:
        raise ImportError(
            "qrhash.codes.from_cooccurrence needs scikit-learn; install it with: "
            "pip install 'qrhash[codes]'"
        ) from error

    def decompose(matrix: Any, num_dims: int) -> np.ndarray:
        if not matrix.nnz:
            return np.zeros((matrix.shape[0], 1), np.float32)
        matrix.resize(matrix.shape[0], max(2, matrix.shape[1]))  # fewer are refused
        svd = TruncatedSVD(min(num_dims, *matrix.shape), random_state=seed)
        # U S^(1/2): of the singular values half goes to the ids, half to the contexts.
        vectors = svd.fit_transform(matrix) / np.sqrt(np.maximum(svd.singular_values_, 1e-12))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def cluster(points: np.ndarray, num_clusters: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct points than clusters are no matter
            found = MiniBatchKMeans(
                num_clusters, random_state=seed, n_init=1, batch_size=max(1024, 8 * num_clusters)
            ).fit(points)
        return found.cluster_centers_

    return decompose, cluster


def _clustered(
    points: np.ndarray,
    groups: np.ndarray,
    num_clusters: int,
    slack: float,
    cluster: Callable[..., Any],
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each point [n], and what its centre leaves over.

    Of each group, numbered [n], the clusters have about equally many points.
    """
    from scipy import sparse

    if len(points) <= num_clusters:
        return np.arange(len(points)), np.zeros_like(points)
    even = -(-np.bincount(groups) // num_clusters)  # rounded up
    room = np.maximum(even, (even * (1 + slack)).astype(int))
    centres = cluster(points, num_clusters)
    for _ in range(_ROUNDS):
        codes = _balanced(points, groups, centres, room)
        members = (np.ones(len(points), points.dtype), (codes, np.arange(len(points))))
        sums = sparse.coo_array(members, (num_clusters, len(points))).tocsr() @ points
        sizes = np.bincount(codes, minlength=num_clusters)[:, None]
        centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
    return codes, points - centres[codes]


def _balanced(
    points: np.ndarray, groups: np.ndarray, centres: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """The nearest centre of each point [n] that has room for its group: `room[group]` of it.

    Every point asks for the nearest centre with room; a centre takes the nearest that ask.
    """
    k = len(centres)
    codes = np.full(len(points), -1)
    left = np.repeat(room[:, None], k, axis=1)
    asking = np.arange(len(points))
    while len(asking):
        nearest, distance = _nearest(points, asking, centres, left, groups)
        wanted = groups[asking] * k + nearest
        order = np.lexsort((distance, wanted))
        starts = np.searchsorted(wanted[order], wanted[order])
        is_taken = np.arange(len(order)) - starts < left.ravel()[wanted[order]]
        taken = order[is_taken]
        codes[asking[taken]] = nearest[taken]
        left -= np.bincount(wanted[taken], minlength=left.size).reshape(left.shape)
        asking = np.sort(asking[order[~is_taken]])
    return codes


def _nearest(
    points: np.ndarray,
    asking: np.ndarray,
    centres: np.ndarray,
    left: np.ndarray,
    groups: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre with room of some points, and the square of its distance."""
    at_once = max(1, _DISTANCES_AT_ONCE // len(centres))
    nearest, distance = np.empty(len(asking), np.int64), np.empty(len(asking), points.dtype)
    squares = (centres**2).sum(axis=1)
    for start in range(0, len(asking), at_once):
        part = asking[start : start + at_once]
        at = points[part]
        distances = squares - 2 * at @ centres.T + (at**2).sum(axis=1, keepdims=True)
        distances[left[groups[part]] == 0] = np.inf
        nearest[start : start + at_once] = distances.argmin(axis=1)
        distance[start : start + at_once] = distances.min(axis=1)
    return nearest, distance


def _spread(numbers: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes [n, k] of running numbers [n]: their digits, so that all codes are as often."""
    codes = np.empty((len(numbers), len(sizes)), np.int32)
    for level, size in enumerate(sizes):
        numbers, codes[:, level] = np.divmod(numbers, size)
    return codes


def _checked_sizes(num_codes: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(as_size(f"num_codes[{j}]", size) for j, size in enumerate(num_codes))
    except TypeError:
        sizes = ()
    if not sizes:
        raise ValueError(
            f"num_codes must name the number of clusters of each level, got {num_codes!r}."
        )
    return sizes


def _check_number(name: str, value: Any, least: float, *, is_open: bool = False) -> None:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value) or value < least or (is_open and value == least):
        rule = "above" if is_open else "of at least"
        raise ValueError(f"{name} must be a number {rule} {least}, got {value!r}.")


@contextlib.contextmanager
def _shown(progress: bool) -> Iterator[Callable[..., Iterable[Any]]]:
    """(iterable, what) -> the same, with a bar on the error stream if wanted."""
    if not progress:
        yield lambda steps, what: steps
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        yield lambda steps, what: bar.track(steps, description=what)
