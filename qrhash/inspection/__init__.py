"""What became of tables: ids that collide, rows that are hot or idle, vectors that are alike."""

from qrhash.inspection.frequency import BANDS, frequency_bands
from qrhash.inspection.similarity import NearTwins, Neighbours, Pair, near_twins, neighbours, norms
from qrhash.inspection.traffic import HotRow, TableTraffic, table_traffic
from qrhash.inspection.twins import Twins, twins

__all__ = [
    "BANDS",
    "HotRow",
    "NearTwins",
    "Neighbours",
    "Pair",
    "TableTraffic",
    "Twins",
    "frequency_bands",
    "near_twins",
    "neighbours",
    "norms",
    "table_traffic",
    "twins",
]
