"""The numbers that the paper prints (arXiv 2509.01184, Tables 1-3), to set ours beside them.

They are what is printed, also where other printed numbers contradict them; tests/evaluation_paper_test.py lists where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

DATASETS = ("ml1m", "amazon_beauty", "amazon_toys")  # the order of the columns of Tables 2 and 3


class Statistics(NamedTuple):
    """A row of Table 1."""

    users: int
    items: int
    interactions: int
    mean_length: float
    sparsity: float  # percent


class Quality(NamedTuple):
    """A method on a data set: one cell of Table 2 or 3."""

    auc: float | None  # None: unreadable in the text we have
    rela_impr: float  # Eq. 20 in percent, relative to the base in Table 2 and to MARS in Table 3


def _row(*cells: tuple[float | None, float]) -> dict[str, Quality]:
    return {dataset: Quality(*cell) for dataset, cell in zip(DATASETS, cells, strict=True)}


# Table 1. MovieLens-1M has 6,040 users; the users and the items of all three data sets may count one for padding.
STATISTICS: Mapping[str, Statistics] = {
    "ml1m": Statistics(6_041, 3_417, 1_000_210, 165, 94.95),
    "amazon_beauty": Statistics(4_323, 2_424, 60_276, 13.95, 99.42),
    "amazon_toys": Statistics(19_412, 11_924, 167_597, 8.6, 99.93),
}

# Table 2: method -> data set. The paper marks all three AUCs of MARS as better than the best trainable method (t-test,
# p < 0.05, over an unstated number of runs).
METHODS: Mapping[str, Mapping[str, Quality]] = {
    "base": _row((0.7772, 0.00), (0.6092, 0.00), (0.5802, 0.00)),
    "ran": _row((0.7738, -1.23), (0.5913, -16.39), (0.5841, 4.86)),
    "reppad": _row((0.7711, -2.21), (0.5962, -11.91), (0.5844, 5.23)),
    "ran_s": _row((0.7745, -0.97), (0.6064, -2.56), (0.5801, -0.12)),
    "cmr": _row((0.7754, -0.64), (0.6108, 1.46), (0.5843, 5.11)),
    "cmrsi": _row((0.7798, 0.94), (0.6066, -2.38), (0.5827, 3.11)),
    "mars": _row((0.7813, 1.48), (0.6149, 5.21), (0.5901, 12.34)),
    "cl4srec": _row((0.7783, 0.39), (0.6104, 1.09), (0.5894, 11.47)),
    "coserec": _row((0.7789, 0.61), (0.6123, 2.84), (0.5816, 1.74)),
    "basrec": _row((0.7793, 0.76), (0.6112, 1.83), (0.5874, 8.97)),
}

# Table 3: MARS without a part -> data set. In the text that we have the row "w/o txt" is lost: its AUC and RelaImpr on
# MovieLens-1M and Toys and its AUC on Beauty are unreadable. Its RelaImpr on Beauty stands in the cell of MARS, behind
# the 0.00 that is MARS's own; that it is of this row follows, for every other row has its own number there.
ABLATIONS: Mapping[str, Mapping[str, Quality]] = {
    "mars": _row((0.7813, 0.00), (0.6149, 0.00), (0.5901, 0.00)),
    "mars_without_text": {"amazon_beauty": Quality(None, -20.36)},
    "mars_without_image": _row((0.7503, -11.02), (0.5977, -14.96), (0.5793, -11.98)),
    "mars_without_stein": _row((0.7565, -8.81), (0.6068, -7.05), (0.5746, -17.20)),
}
