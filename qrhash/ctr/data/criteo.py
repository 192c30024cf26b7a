"""The names of the Criteo format: a click, 13 integers, 26 categories of hex digits."""

LABEL = "label"
INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = (LABEL, *INTEGERS, *CATEGORIES)
