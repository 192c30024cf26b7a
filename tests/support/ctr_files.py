"""Small files of events, made from plain Python values: in the Criteo format, and any tables."""

import csv
import gzip
import io
import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from qrhash.ctr.data.block import Block
from qrhash.ctr.data.criteo import CATEGORIES, COLUMNS, INTEGERS

Row = list[str]


def make_row(label: str = "0", integer: str = "3", category: str = "1f") -> Row:
    """Forty equal-looking cells, to be spoilt by a test."""
    return [label, *[integer] * len(INTEGERS), *[category] * len(CATEGORIES)]


def random_rows(count: int, *, categories: int = 50) -> list[Row]:
    """Rows whose label follows their first category, with missing cells here and there."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        keys = [rng.randrange(categories) for _ in CATEGORIES]
        label = rng.random() < (0.95 if keys[0] % 2 else 0.05)
        integers = ["" if rng.random() < 0.2 else str(rng.randrange(-2, 10)) for _ in INTEGERS]
        hexes = ["" if rng.random() < 0.1 else f"{key * 7919:05x}" for key in keys]
        rows.append([str(int(label)), *integers, *hexes])
    return rows


def text_of(rows: list[Row]) -> bytes:
    return b"".join("\t".join(row).encode() + b"\n" for row in rows)


def write_text(path: Path, rows: list[Row]) -> Path:
    path.write_bytes(text_of(rows))
    return path


def write_gzip(path: Path, rows: list[Row]) -> Path:
    path.write_bytes(gzip.compress(text_of(rows)))
    return path


def write_parquet(path: Path, rows: list[Row], *, integer_keys: pa.DataType | None = None) -> Path:
    """Numbers as int64 with nulls; categories as strings, or as the integers they say."""

    def column(name: str, cells: tuple[str, ...]) -> pa.Array:
        if name not in CATEGORIES:
            return pa.array([int(cell) if cell else None for cell in cells], pa.int64())
        if integer_keys is None:
            return pa.array([cell or None for cell in cells], pa.string())
        keys = [int(cell, 16) if cell else None for cell in cells]
        if integer_keys == pa.int64():
            keys = [key if key is None or key < 2**63 else key - 2**64 for key in keys]
        return pa.array(keys, integer_keys)

    cells = zip(COLUMNS, zip(*rows, strict=True), strict=True)
    table = pa.table({name: column(name, values) for name, values in cells})
    pyarrow.parquet.write_table(table, path, row_group_size=37)
    return path


# --- tables of any columns ------------------------------------------------------------------------

Events = dict[str, list[object]]


def events(count: int, *, users: int = 60) -> Events:
    """Rows in time order: a click that follows its user, whose id has 64 bits and a sign, and more.

    `user` and `ad` are categories, `price` and `age` numbers, and `when` is a time.
    """
    rng = random.Random(1)
    ids = [rng.randrange(-(2**63), 2**63) for _ in range(users)]
    taste = [rng.random() < 0.5 for _ in ids]
    who = [rng.randrange(users) for _ in range(count)]
    clicks = [int(rng.random() < (0.95 if taste[i] else 0.05)) for i in who]
    start = datetime(2024, 1, 1)
    return {
        "clicked": clicks,
        "when": [start + timedelta(minutes=i) for i in range(count)],
        "user": [ids[i] for i in who],
        "ad": [rng.choice(["red, big", 'a "blue" one', "two\nlines", "späte", None]) for _ in who],
        "price": [rng.choice([None, rng.uniform(-5, 50)]) for _ in who],
        "age": [rng.randrange(200) for _ in who],
    }


def tagged(count: int, *, tags: int = 30, longest: int = 5) -> Events:
    """Rows of which only a list, `tags`, tells the label: whether most of them are even.

    It may be empty, or missing; an integer is 64 bits and a sign. `hour` tells nothing.
    """
    rng = random.Random(2)
    ids = [rng.randrange(-(2**63), 2**63) // 2 * 2 + number % 2 for number in range(tags)]
    lists = [[rng.choice(ids) for _ in range(rng.randrange(longest + 1))] for _ in range(count)]
    lists[0], lists[1] = [], ids[:longest]
    balance = [sum(1 - 2 * (tag % 2) for tag in each) for each in lists]
    rates = [0.5 if each == 0 else 0.95 if each > 0 else 0.05 for each in balance]
    return {
        "clicked": [int(rng.random() < rate) for rate in rates],
        "hour": [rng.randrange(24) for _ in lists],
        "tags": [each or rng.choice([[], None]) for each in lists],
    }


def write_csv(
    path: Path, columns: Events, *, delimiter: str = ",", header: bool = True, end: str = "\n"
) -> Path:
    """As Python writes it: quotation marks where they must be; gzip by the name."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    if header:
        writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_table(path: Path, columns: Events, **types: pa.DataType) -> Path:
    """Parquet, with the types that arrow gives the values, or those given."""
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pa.table(arrays), path, row_group_size=41)
    return path


def rows_of(columns: Events, start: int, stop: int) -> Events:
    return {name: values[start:stop] for name, values in columns.items()}


def ratings(count: int, *, users: int = 40, items: int = 60, skew: float = 1.0) -> Events:
    """Ratings of movies, of which a few are seen by most: by users who like one of four genres.

    A rating is 4 or more if the movie is of the genre that its user likes. `movie_id` is popular by
    Zipf's law in each genre: the r-th has a weight of r ** -skew.
    """
    rng = random.Random(2)
    genres = ["drama", "comedy", "horror", "western"]
    taste = [rng.randrange(4) for _ in range(users)]
    weights = [(1 + i // 4) ** -skew for i in range(items)]
    who = [rng.randrange(users) for _ in range(count)]
    seen = []
    for user in who:
        liked = [w if i % 4 == taste[user] else w / 20 for i, w in enumerate(weights)]
        (movie,) = rng.choices(range(items), liked)
        seen.append(movie)
    likes = [movie % 4 == taste[user] for user, movie in zip(who, seen, strict=True)]
    return {
        "user_id": [7 * user - 100 for user in who],
        "movie_id": [1000 + 13 * movie for movie in seen],
        "genre": [genres[movie % 4] for movie in seen],
        "hour": [rng.uniform(0, 24) for _ in who],
        "rating": [rng.choice([4.0, 5.0]) if good else rng.choice([1.0, 3.5]) for good in likes],
    }


def films(count: int, *, users: int = 40, items: int = 300) -> Events:
    """What users watched, each row a positive: mostly films of the genre that a user likes.

    Of `movie_id` there are many, each with `genres` of its own, written in any order; some have
    none. `hour` tells nothing.
    """
    rng = random.Random(4)
    names = ["drama", "comedy", "horror", "western", "crime", "war", "music", "noir"]
    genres = [rng.sample(names, rng.randrange(1, 4)) for _ in range(items)]
    genres[::25] = [[] for _ in genres[::25]]
    likes = [rng.choice(names) for _ in range(users)]
    of_genre = {name: [n for n, each in enumerate(genres) if name in each] for name in names}
    who = [rng.randrange(users) for _ in range(count)]
    seen = [
        rng.choice(of_genre[likes[user]]) if rng.random() < 0.9 else rng.randrange(items)
        for user in who
    ]
    return {
        "user_id": [7 * user - 100 for user in who],
        "movie_id": [1000 + 13 * film for film in seen],
        "genres": [rng.sample(genres[film], len(genres[film])) or None for film in seen],
        "hour": [rng.uniform(0, 24) for _ in who],
    }


def joined(blocks: Iterable[Block]) -> Block:
    """Blocks without lists as one, of the columns that are there."""
    columns = zip(*(block._replace(lists=()) for block in blocks), strict=True)
    return Block(
        *(None if each[0] is None else np.concatenate(each) for each in list(columns)[:-1])
    )
