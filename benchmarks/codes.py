"""What codes with a meaning are worth: log loss of tables by codes and by number, at equal bytes.

Check-ins of visitors at places, of a model in which the best loss is known: places are of clusters,
a visitor loves a few of these, and the popularity of places falls as a power. Half of the rows are
check-ins; the others pair a visitor with a place by its popularity alone. Codes come from the
check-ins of the training rows, by `qrhash.codes.from_cooccurrence` with visitors as contexts, and
ids of equal codes are told apart by their rank. The model and its training are those of the ratings
of `benchmarks/quality.py`; visitors have full tables.

    python benchmarks/codes.py

prints the mean test log loss over the seeds, each of which has a log of its own (scikit-learn is
needed: `pip install 'qrhash[codes]'`).
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from quality import FEATURES, least_loss
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qrhash

SPLIT = 0.8  # of the rows, to train on
LOVED = 3  # clusters of a visitor
FAITHFUL = 0.8  # share of the check-ins at places of these
COARSE = 64  # clusters of the first level


class Log(NamedTuple):
    """Rows of check-ins.

    Attributes:
      ids: visitors and places, [rows, 2], places by falling popularity.
      is_visit: whether it is a check-in, [rows].
      chance: of that, given visitor and place, [rows].
      clusters: of the places.
      seed: of the draw.
    """

    ids: np.ndarray
    is_visit: np.ndarray
    chance: np.ndarray
    clusters: np.ndarray
    seed: int

    @property
    def split(self) -> int:
        """Rows to train on."""
        return int(SPLIT * len(self.ids))

    @property
    def best_loss(self) -> float:
        """Log loss on the other rows of the model that drew them."""
        chance, is_visit = self.chance[self.split :], self.is_visit[self.split :]
        return float(-np.log(np.where(is_visit, chance, 1 - chance)).mean())


Make = Callable[[Log], qrhash.EmbedConfig]


def main() -> None:
    """Trains all models on all logs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compression", type=float, nargs="*", default=[4, 15])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--visitors", type=int, default=2_000)
    parser.add_argument("--places", type=int, default=5_000)
    parser.add_argument("--clusters", type=int, default=50)
    arguments = parser.parse_args()
    shape = arguments.rows, arguments.visitors, arguments.places, arguments.clusters
    logs = [draw(*shape, seed) for seed in arguments.seeds]
    table = Table(title=f"check-ins, {len(logs)} seeds")
    for column in ("tables of places", "parameters", "mean log loss", "smallest to largest"):
        table.add_column(column, justify="left" if column == "tables of places" else "right")
    table.add_row("the model of the log", "", *_figures([log.best_loss for log in logs]))
    visitors = qrhash.EmbedConfig(qrhash.FullTable(arguments.visitors), FEATURES)
    every = list(cases(arguments.places, arguments.compression))
    for name, make in track(every, "training", console=Console(stderr=True)):
        losses = []
        for log in logs:
            configs = {"user": visitors, "item": make(log)}
            target = log.is_visit.astype(np.float32)
            losses.append(least_loss(log.ids, target, log.split, configs, log.seed))
        table.add_row(name, f"{configs['item'].num_params:,}", *_figures(losses))
    Console().print(table)


def _figures(losses: list[float]) -> tuple[str, str]:
    return f"{statistics.mean(losses):.4f}", f"{min(losses):.4f} to {max(losses):.4f}"


def draw(rows: int, visitors: int, places: int, clusters: int, seed: int) -> Log:
    """The rows of a seed."""
    rng = np.random.default_rng(seed)
    popularity = 1 / (np.arange(places) + 10.0)
    popularity /= popularity.sum()
    of_place = rng.integers(0, clusters, places)
    of_cluster = np.bincount(of_place, popularity, clusters)
    loved = rng.permuted(np.tile(np.arange(clusters), (visitors, 1)), axis=1)[:, :LOVED]
    activity = rng.lognormal(0.0, 1.0, visitors)
    visitor = rng.choice(visitors, rows, p=activity / activity.sum())
    is_visit = rng.random(rows) < 0.5
    place = rng.choice(places, rows, p=popularity)
    wanted = loved[visitor, rng.integers(0, LOVED, rows)]
    is_loved = is_visit & (rng.random(rows) < FAITHFUL)
    for cluster in range(clusters):
        members = np.flatnonzero(of_place == cluster)
        at = np.flatnonzero(is_loved & (wanted == cluster))
        chances = popularity[members] / of_cluster[cluster]
        place[at] = rng.choice(members, len(at), p=chances)
    within = (loved[visitor] == of_place[place][:, None]).any(axis=1)
    odds = FAITHFUL / LOVED / of_cluster[of_place[place]] * within + 1 - FAITHFUL
    ids = np.stack([visitor, place], axis=1).astype(np.int32)
    return Log(ids, is_visit, odds / (1 + odds), of_place, seed)


def cases(places: int, compressions: list[float]) -> Iterator[tuple[str, Make]]:
    """Names, and from a log to the config of the places."""
    fit = functools.partial(qrhash.EmbedConfig.fit, places, FEATURES)
    yield "full", always(fit(compression=1))
    for times in compressions:
        for operation in ("mult", "concat"):
            by_number = always(fit(operation, compression=times))
            yield f"{times:g}x {operation}, by number", by_number
            by_codes = functools.partial(by_fine_codes, operation, times)
            yield f"{times:g}x {operation}, by codes", by_codes
        for operation in ("project", "path"):
            by_number = always(fit(operation, compression=times))
            yield f"{times:g}x {operation}, by number", by_number
    for operation in ("mult", "add"):
        shortest = qrhash.EmbedConfig(qrhash.QuotientRemainder(places), FEATURES, operation)
        times = places * FEATURES / shortest.num_params
        yield f"{times:.0f}x {operation}, by number", always(shortest)
        yield f"{times:.0f}x {operation}, by codes", functools.partial(by_levels, operation)
        yield f"{operation}, by the clusters", functools.partial(by_clusters, operation)


def always(config: qrhash.EmbedConfig) -> Make:
    """The same config for every log."""
    return lambda log: config


def by_fine_codes(operation: str, compression: float, log: Log) -> qrhash.EmbedConfig:
    """One table of as many clusters as the bytes allow, and one of the rank in a cluster."""
    places = len(log.clusters)
    width = FEATURES // 2 if operation == "concat" else FEATURES
    num_rows = int(places * FEATURES / compression) // width
    fine = (num_rows - 2 * places // num_rows - 2) // COARSE
    codes = learned(log, (COARSE, fine))
    partition = qrhash.CodePartition(codes[:, :1] * fine + codes[:, 1:], tie_breaker=True)
    assert sum(partition.num_rows) <= num_rows
    return qrhash.EmbedConfig(partition, FEATURES, operation)


def by_levels(operation: str, log: Log) -> qrhash.EmbedConfig:
    """Two levels of codes and the rank, in as many rows as the shortest tables by number have."""
    shortest = sum(qrhash.QuotientRemainder(len(log.clusters)).num_rows)
    each = (shortest - 10) // 2
    partition = qrhash.CodePartition(learned(log, (each, each)), tie_breaker=True)
    assert sum(partition.num_rows) <= shortest
    return qrhash.EmbedConfig(partition, FEATURES, operation)


def by_clusters(operation: str, log: Log) -> qrhash.EmbedConfig:
    """The clusters of the model, which nobody knows, and the rank among their places."""
    partition = qrhash.CodePartition(log.clusters[:, None], tie_breaker=True)
    return qrhash.EmbedConfig(partition, FEATURES, operation)


def learned(log: Log, num_codes: tuple[int, int]) -> np.ndarray:
    """Codes of places by the visitors of the training rows."""
    visits = log.ids[: log.split][log.is_visit[: log.split]]
    chunks = [(visits[:, 1], visits[:, 0])]
    return qrhash.codes.from_cooccurrence(
        chunks, len(log.clusters), num_codes=num_codes, seed=log.seed
    )


if __name__ == "__main__":
    main()
