"""What the name of a column says of it: words that people name labels, ids and times by."""

import re

_LABELS = {"label", "labels", "click", "clicks", "clicked", "is_click", "is_clicked", "isclick"}
_LABELS |= {"clk", "target", "y", "response", "converted", "conversion"}
_OF_IDS = {"id", "ids", "uid", "uuid", "guid", "hash", "hashed", "code", "zip", "zipcode"}
_OF_IDS |= {"postcode", "type", "category", "categories", "cat", "key", "token", "class", "kind"}
# What has ids: a column of that name, or with "id" behind it.
_THINGS = (
    "("
    "user|visitor|member|account|customer|client|buyer|seller|merchant|vendor|author|artist"
    "|creator|item|product|article|ad|advertiser|publisher|campaign|creative|category|cate"
    "|brand|shop|store|hotel|restaurant|place|venue|location|city|country|movie|video|film|show"
    "|anime|game|song|track|album|playlist|book|news|post|question|document|doc|query|session"
    "|device|site|app|page|channel|content|listing|job|course"
    ")"
)
_OF_TIMES = {"time", "timestamp", "ts", "datetime", "unixtime", "epoch", "created", "date"}
# The first column of all, where it has no name; and as pandas names it, read once more or twice.
_INDEX = re.compile(r"unnamed(1|: 0(\.[0-9]+)*)|__index_level_[0-9]+__", flags=re.IGNORECASE)


def is_label(name: str) -> bool:
    """Whether a column of this name has labels."""
    return name.lower() in _LABELS


def is_index(name: str) -> bool:
    """Whether a column of this name is the index of a data frame."""
    return bool(_INDEX.fullmatch(name))


def is_id(name: str) -> bool:
    """Whether a column of this name has ids."""
    is_of_things = re.fullmatch(_THINGS, name.lower()) or re.search(f"{_THINGS}id$", name.lower())
    return not _OF_IDS.isdisjoint(_words(name)) or bool(is_of_things)


def is_time(name: str) -> bool:
    """Whether a column of this name has times."""
    words = _words(name)
    return not _OF_TIMES.isdisjoint({*words, "".join(words)})


def _words(name: str) -> list[str]:
    words = re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])", name)
    return [word.lower() for word in words if word]
