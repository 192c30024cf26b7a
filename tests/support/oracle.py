"""What the core must compute, by loops and dictionaries over Python integers: obviously right.

Row numbers follow the definitions of the paper (and DeepRec's own arithmetic); look-up and gradient
walk the ids one by one in float64. Nothing here calls the library's arithmetic.
"""

import collections
import functools
import itertools
import math

import numpy as np

import qrhash


def num_rows(p):
    """Rows of each table, by definition."""
    n = p.num_embeddings
    match p:
        case qrhash.FullTable():
            return (n,)
        case qrhash.HashTrick():
            return (p.num_buckets,)
        case qrhash.QuotientRemainder():
            m = p.num_collisions or math.isqrt(n - 1) + 1
            return (-(-n // m), m)
        case qrhash.MixedRadix():
            return tuple(p.radices)
        case qrhash.ChineseRemainder():
            return tuple(p.moduli)
        case qrhash.deeprec.DeepRecQuotientRemainder():
            return (p.num_quotients, p.num_remainders)
        case qrhash.CodePartition():
            codes = p.codes.tolist()
            most_equal = max(map(codes.count, codes))
            return (
                *(max(of) + 1 for of in zip(*codes, strict=True)),
                *[most_equal] * p.tie_breaker,
            )
    raise TypeError(p)


def code(p, x):
    """Row numbers of the id `x`, one per table, or None when it has no row."""
    if not 0 <= x < p.num_embeddings:
        return None
    rows = num_rows(p)
    match p:
        case qrhash.FullTable():
            return (x,)
        case qrhash.HashTrick():
            return (x % rows[0],)
        case qrhash.QuotientRemainder():
            return (x // rows[1], x % rows[1])
        case qrhash.MixedRadix():
            return tuple(x // math.prod(rows[:j]) % rows[j] for j in range(len(rows)))
        case qrhash.ChineseRemainder():
            return tuple(x % m for m in rows)
        case qrhash.deeprec.DeepRecQuotientRemainder():
            quotient = x // rows[0]
            return (quotient, x % rows[1]) if quotient < rows[0] else None
        case qrhash.CodePartition():
            codes = p.codes.tolist()
            return (*codes[x], *[codes[:x].count(codes[x])] * p.tie_breaker)
    raise TypeError(p)


def indices(p, ids):
    """`code` over an array: one array of Python integers per table, one past the end for no row."""
    ids = np.asarray(ids)
    columns = [code(p, int(x)) or num_rows(p) for x in ids.reshape(-1)]
    out = np.array(columns, dtype=object).reshape(-1, len(num_rows(p)))
    return tuple(out[:, j].reshape(ids.shape) for j in range(len(num_rows(p))))


def is_complementary(p):
    """Whether every id has a row in every table and no two ids share all of them."""
    codes = [code(p, x) for x in range(p.num_embeddings)]
    return None not in codes and len(set(codes)) == len(codes)


def inverse(p):
    """The dictionary from codes back to ids."""
    return {code(p, x): x for x in range(p.num_embeddings)}


def smallest_rows(n, k, coprime):
    """The fewest rows k tables can have in all for n ids, trying every k-tuple of sizes."""
    sizes = itertools.combinations_with_replacement(range(1, n + 1), k)
    fits = (s for s in sizes if math.prod(s) >= n)
    if coprime:
        fits = (s for s in fits if all(math.gcd(*p) == 1 for p in itertools.combinations(s, 2)))
    return min(map(sum, fits))


def effective(x, n, policy):
    """The id that `x` is read as under a policy, or None for no id."""
    if 0 <= x < n:
        return x
    return {"clip": min(max(x, 0), n - 1), "wrap": x % n}.get(policy)


def _combine(rows, operation, projection):
    match operation:
        case "add":
            return sum(rows)
        case "mult":
            return math.prod(rows)
        case "concat":
            return np.concatenate(rows)
        case "project":
            return _inputs(rows) @ projection[0] + (0 if projection[1] is None else projection[1])
        case "path":
            return _path(rows)[-1]
        case "features":
            return np.concatenate(rows)
    raise ValueError(operation)


def _inputs(rows):
    return np.concatenate([*rows, *([math.prod(rows)] if len(rows) > 1 else [])])


def _path(rows):
    """The narrowest row, and what it becomes by one map after the other."""
    narrowest = min(range(len(rows)), key=lambda j: len(rows[j]))
    vectors = [rows[narrowest]]
    for j, row in enumerate(rows):
        if j != narrowest:
            lines = row.reshape(len(vectors[-1]) + 1, -1)
            mapped = [
                sum(x * line[o] for x, line in zip([*vectors[-1], 1.0], lines, strict=True))
                for o in range(lines.shape[1])
            ]
            vectors.append(np.array(mapped))
    return vectors


def _path_gradients(rows, w):
    """Gradients of all rows, from the last map back to the narrowest row."""
    narrowest = min(range(len(rows)), key=lambda j: len(rows[j]))
    maps = [j for j in range(len(rows)) if j != narrowest]
    grads = [None] * len(rows)
    for j, before in reversed(list(zip(maps, _path(rows)[:-1], strict=True))):
        grads[j] = np.outer([*before, 1.0], w).ravel()
        w = rows[j].reshape(len(before) + 1, -1)[:-1] @ w
    grads[narrowest] = w
    return grads


def _f64(arrays):
    return [None if a is None else np.asarray(a).astype(np.float64) for a in arrays]


def combine(rows, operation, projection=None):
    """`rows` [*batch, width_j] per table -> [*batch, features], entry by entry."""
    rows = _f64(rows)
    projection = projection and _f64(projection)
    batch = rows[0].shape[:-1]
    out = [_combine([r[i] for r in rows], operation, projection) for i in np.ndindex(batch)]
    return np.array(out).reshape(*batch, -1)


def lookup(tables, ids, cfg, projection=None):
    """[*ids.shape, features] in float64; an id without a row gives zeros under "zero", else NaN."""
    tables, projection = _f64(tables), projection and _f64(projection)
    ids = np.asarray(ids)
    out = np.full((ids.size, cfg.features), 0.0 if cfg.id_policy == "zero" else np.nan)
    for i, x in enumerate(ids.reshape(-1)):
        rows = _rows(tables, int(x), cfg)
        if rows is not None:
            out[i] = _combine([row for _, row in rows], cfg.operation, projection)
    return out.reshape(*ids.shape, cfg.features)


def _rows(tables, x, cfg):
    x = effective(x, cfg.partition.num_embeddings, cfg.id_policy)
    numbers = None if x is None else code(cfg.partition, x)
    return numbers and [(r, table[r]) for r, table in zip(numbers, tables, strict=True)]


def pooled(vectors, weights, combiner):
    """The vector of one bag, of its ids' vectors (a list) and weights (a list, or None: all 1)."""
    given = [1.0] * len(vectors) if weights is None else weights
    total = sum(w * v for w, v in zip(given, vectors, strict=True))
    match combiner:
        case "sum":
            return total
        case "mean":
            return total / sum(given) if sum(given) else 0 * total
        case "sqrtn":
            squares = sum(w**2 for w in given)
            return total / math.sqrt(squares) if squares else 0 * total
        case "max":
            return functools.reduce(np.maximum, vectors)
    raise ValueError(combiner)


def lookup_bags(tables, bags, cfg, projection=None, weights=None):
    """[bags, features] in float64 of bags given as lists of ids, with weights as lists alike."""
    out = np.zeros((len(bags), cfg.features))
    for i, ids in enumerate(bags):
        kept = [j for j, x in enumerate(ids) if x != cfg.padding_id]
        of_bag = None if weights is None else [float(weights[i][j]) for j in kept]
        if not kept:
            continue
        if cfg.pool_rows:
            rows = [_rows(_f64(tables), int(ids[j]), cfg) for j in kept]
            each_table = zip(*([row for _, row in of_id] for of_id in rows), strict=True)
            means = [pooled(list(of_table), of_bag, cfg.combiner) for of_table in each_table]
            out[i] = _combine(means, cfg.operation, projection and _f64(projection))
        else:
            vectors = lookup(tables, [ids[j] for j in kept], cfg, projection)
            out[i] = pooled(list(vectors), of_bag, cfg.combiner)
    return out


def gradient(tables, ids, weights, cfg, projection=None):
    """Gradients of sum(weights * lookup(ids)), collected id by id.

    Returns (tables' gradients, projection's gradients or None). `ids` and `weights` are lists of
    arrays, [*shape] and [*shape, features].
    """
    tables, projection = _f64(tables), projection and _f64(projection)
    sums = [collections.defaultdict(float) for _ in tables]
    kernel = bias = 0.0
    pairs = [
        (int(x), w)
        for i, ws in zip(ids, weights, strict=True)
        for x, w in zip(np.ravel(i), np.reshape(ws, (-1, cfg.features)), strict=True)
    ]
    for x, w in pairs:
        numbered = _rows(tables, x, cfg)
        if numbered is None:
            continue
        w = np.asarray(w, np.float64)
        rows = [row for _, row in numbered]
        if cfg.operation == "project":
            kernel, bias = kernel + np.outer(_inputs(rows), w), bias + w
            w = projection[0] @ w
        for j, (number, _) in enumerate(numbered):
            sums[j][number] = sums[j][number] + _row_gradient(rows, j, w, cfg.operation)
    grads = [np.zeros(t.shape) for t in tables]
    for grad, collected in zip(grads, sums, strict=True):
        for number, value in collected.items():
            grad[number] = value
    return tuple(grads), projection and (kernel, bias)


def _row_gradient(rows, j, w, operation):
    """Gradient of row j, given that of the combined vector (project: of [r_1; ...; r_k; prod])."""
    others = [row for i, row in enumerate(rows) if i != j]
    start = sum(len(row) for row in rows[:j])
    part = w[start : start + len(rows[j])]
    match operation:
        case "add":
            return w
        case "mult":
            return w * math.prod(others)
        case "concat":
            return part
        case "project":
            return part + (w[-len(rows[j]) :] * math.prod(others) if len(rows) > 1 else 0.0)
        case "path":
            return _path_gradients(rows, w)[j]
    raise ValueError(operation)
