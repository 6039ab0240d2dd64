"""The paper's tables against one another: what follows from what it prints, and what does not."""

import itertools

import pytest

from marsjax.evaluation import paper
from marsjax.evaluation.metrics import relative_improvement

HALF = 0.5e-4  # AUCs are printed to 4 digits

# Cells that do not follow from the AUCs, whatever digits these lost in print: none.
ERRORS: set[tuple[str, str]] = set()

# Cells that follow, but only from AUCs of more digits: the printed AUCs give another last digit. All are one off, and
# most are nearer to zero, as if cut and not rounded; those of RepPad on MovieLens-1M and Beauty are farther from it.
FROM_MORE_DIGITS = {
    ("reppad", "ml1m"), ("reppad", "amazon_beauty"), ("reppad", "amazon_toys"), ("cmr", "ml1m"),
    ("cmr", "amazon_beauty"), ("cmrsi", "amazon_toys"), ("mars", "amazon_beauty"), ("cl4srec", "ml1m"),
    ("cl4srec", "amazon_beauty"), ("coserec", "amazon_toys"), ("basrec", "amazon_toys"),
    ("mars_without_image", "amazon_beauty"), ("mars_without_image", "amazon_toys"), ("mars_without_stein", "ml1m"),
}  # fmt: skip


def cells():
    for rows, base in ((paper.METHODS, "base"), (paper.ABLATIONS, "mars")):
        for method, by_dataset in rows.items():
            for dataset, cell in by_dataset.items():
                if cell.auc is not None:
                    yield method, dataset, cell, rows[base][dataset]


def bounds(auc, base):
    """The least and the greatest RelaImpr of AUCs that print as these: Eq. 20 is monotone in each of the two."""
    corners = [relative_improvement(auc + a, base + b) for a, b in itertools.product((-HALF, HALF), repeat=2)]
    return min(corners), max(corners)


def test_the_tables_are_whole():
    """27 cells of Table 2 beside the base's 3, and 6 of Table 3 beside MARS's 3; one more is readable by half."""
    assert len(list(cells())) == 27 + 3 + 6 + 3
    assert all(list(by_dataset) == list(paper.DATASETS) for by_dataset in paper.METHODS.values())
    assert list(paper.STATISTICS) == list(paper.DATASETS)
    for dataset in paper.DATASETS:
        assert paper.ABLATIONS["mars"][dataset].auc == paper.METHODS["mars"][dataset].auc


def test_relative_improvements_follow_from_the_aucs():
    """Eq. 20 within what rounding hides: 4 digits of the AUCs, and 2 of the percentage (half a digit, if rounded)."""
    wrong = set()
    for method, dataset, cell, base in cells():
        low, high = bounds(cell.auc, base.auc)
        if not low - 0.005 <= cell.rela_impr <= high + 0.005:
            wrong.add((method, dataset))
    assert wrong == ERRORS


def test_which_cells_need_more_digits_than_are_printed():
    found = set()
    for method, dataset, cell, base in cells():
        difference = abs(relative_improvement(cell.auc, base.auc) - cell.rela_impr)
        assert difference < 0.01
        if difference > 0.005:
            found.add((method, dataset))
    assert found == FROM_MORE_DIGITS


def test_a_cell_without_an_auc_is_one_of_a_weak_model():
    """-20.36% of MARS's 0.1149 above a coin is an AUC of 0.5915, below the base's 0.6092."""
    (cell,) = paper.ABLATIONS["mars_without_text"].values()
    implied = 0.5 + (paper.METHODS["mars"]["amazon_beauty"].auc - 0.5) * (1 + cell.rela_impr / 100)
    assert round(implied, 4) == 0.5915
    assert relative_improvement(implied, 0.6149) == pytest.approx(cell.rela_impr)


def test_mars_is_best_and_its_parts_are_needed():
    """What the paper says of its own numbers: every ablation is worse than the base, which MARS beats."""
    for dataset in paper.DATASETS:
        best = max(paper.METHODS, key=lambda method: paper.METHODS[method][dataset].auc)
        assert best == "mars"
        for part in ("image", "stein"):
            assert paper.ABLATIONS[f"mars_without_{part}"][dataset].auc < paper.METHODS["base"][dataset].auc


# Statistics that do not follow from the counts printed beside them.
WRONG_STATISTICS = {
    ("ml1m", "mean_length"): 165.57,  # printed 165
    ("ml1m", "sparsity"): 95.15,  # printed 94.95; 95.15 also with one user and one item fewer
    ("amazon_beauty", "mean_length"): 13.94,  # printed 13.95, which is that of 4,322 users: one fewer, for padding
}


def test_statistics_follow_from_the_counts():
    """Mean length = interactions / users, sparsity = 1 - interactions / (users * items), as rounded in print."""
    wrong = {}
    for dataset, printed in paper.STATISTICS.items():
        digits = {"mean_length": 1 if dataset == "amazon_toys" else 2, "sparsity": 2}
        values = {
            "mean_length": printed.interactions / printed.users,
            "sparsity": 100 * (1 - printed.interactions / (printed.users * printed.items)),
        }
        for name, value in values.items():
            if round(value, digits[name]) != getattr(printed, name):
                wrong[dataset, name] = round(value, 2)
    assert wrong == WRONG_STATISTICS
