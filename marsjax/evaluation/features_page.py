"""What features of items know: neighbours, genre probes, how far text is from images, and a map."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from marsjax.evaluation.metrics import auc
from marsjax.evaluation.page import Case, ItemCard, Table
from marsjax.evaluation.plots import Plot, Series
from marsjax.records import Items

NEIGHBOURS = 8  # that are shown, and over which shares are counted
LEAST = 30  # items that a probe needs in each half, of a category and of others
PROBES = (  # what the report says of `probe_tables`
    "A linear model tells the categories of items from their features (one random half of the items that have both "
    "fits, the other judges, and the other way round), and neighbours are counted that share a category, beside the "
    f"same features dealt out to other items. A category is told where each half holds {LEAST} items of it or more, "
    f"and {LEAST} or more that are not of it (-: there is no such category)."
)
SHOWN_CATEGORIES = 6  # of the map
SHOWN_ITEMS = 600


def cosines(feature_NF: np.ndarray, present_N: np.ndarray) -> np.ndarray:
    """Unit vectors of features, moved to the mean of the present ones, [N, F] float32; zero where absent.

    Most encoders have a large part that all items share; without the move all cosines are near 1.
    """
    centred_NF = (feature_NF - feature_NF[present_N].mean(axis=0)) * present_N[:, None]
    length_N1 = np.linalg.norm(centred_NF, axis=1, keepdims=True)
    return (centred_NF / np.maximum(length_N1, 1e-12)).astype(np.float32)


def nearest(
    unit_NF: np.ndarray, present_N: np.ndarray, query_Q: np.ndarray, *, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other items that are present, [Q, K] int, and their cosines; most similar first."""
    cosine_QN = unit_NF[query_Q] @ unit_NF.T
    cosine_QN[:, ~present_N] = -np.inf
    cosine_QN[np.arange(len(query_Q)), query_Q] = -np.inf
    near_QK = np.argsort(-cosine_QN, axis=1, kind="stable")[:, :k]
    return near_QK, np.take_along_axis(cosine_QN, near_QK, axis=1)


def has_category(items: Items) -> np.ndarray:
    """[N, categories] bool, without padding."""
    member_NC = np.zeros((len(items.raw_id_N), len(items.category_names)), bool)
    np.put_along_axis(member_NC, items.category_NG.astype(np.int64), True, axis=1)
    return member_NC[:, 1:]


def shared_category(
    unit_NF: np.ndarray, present_N: np.ndarray, member_NC: np.ndarray, *, seed: int
) -> tuple[float, float]:
    """The share of the nearest neighbours that have a category in common with the item, and that of random items."""
    known = np.flatnonzero(present_N & member_NC.any(axis=1))
    query_Q = np.random.default_rng(seed).permutation(known)[:1000]
    near_QK, _ = nearest(unit_NF, present_N, query_Q, k=min(NEIGHBOURS, int(present_N.sum()) - 1))
    random_QK = np.random.default_rng([seed, 1]).choice(np.flatnonzero(present_N), near_QK.shape)
    shares = [
        float((member_NC[query_Q][:, None] & member_NC[other_QK]).any(axis=2).mean())
        for other_QK in (near_QK, random_QK)
    ]
    return shares[0], shares[1]


def probe(feature_NF: np.ndarray, present_N: np.ndarray, member_NC: np.ndarray, *, seed: int) -> np.ndarray:
    """The AUC with which a linear model tells each category from the features, [C]; NaN where it is too rare.

    A ridge regression is fitted on a random half of the items and scored on the other, and the other way round. The
    penalty is as large as the mean eigenvalue of what is solved, so that wide and narrow features are treated alike.
    """
    known = np.random.default_rng(seed).permutation(np.flatnonzero(present_N & member_NC.any(axis=1)))
    halves = known[: len(known) // 2], known[len(known) // 2 :]
    score_NC = np.full(member_NC.shape, np.nan)
    for fit, judge in (halves, halves[::-1]):
        mean_F, deviation_F = feature_NF[fit].mean(axis=0), feature_NF[fit].std(axis=0)
        x_IF, x_JF = ((feature_NF[at] - mean_F) / np.maximum(deviation_F, 1e-6) for at in (fit, judge))
        x_IF, x_JF = x_IF.astype(np.float64), x_JF.astype(np.float64)
        gram_II = x_IF @ x_IF.T  # as many items as features or fewer, mostly
        gram_II[np.diag_indices(len(fit))] += np.trace(gram_II) / len(fit)
        target_IC = member_NC[fit] - member_NC[fit].mean(axis=0)
        score_NC[judge] = x_JF @ (x_IF.T @ np.linalg.solve(gram_II, target_IC))
    enough_C = (
        np.min([[member_NC[half].sum(axis=0), (~member_NC[half]).sum(axis=0)] for half in halves], axis=(0, 1)) >= LEAST
    )
    # Each half has scores of its own model, so each is judged by itself.
    return np.array(
        [
            np.mean([auc(member_NC[half, c].astype(np.float32), score_NC[half, c]) for half in halves])
            if enough
            else np.nan
            for c, enough in enumerate(enough_C)
        ]
    )


def probe_tables(items: Items, *, seed: int) -> tuple[Table | Plot, ...]:
    """Probes and neighbours of every modality, beside the same features of other items (the control)."""
    member_NC = has_category(items)
    lines, series = [], []
    known = np.array([], int)
    for number, (name, (feature_NF, present_N)) in enumerate(items.modalities.items()):
        shuffled_NF = feature_NF.copy()
        has = np.flatnonzero(present_N)
        shuffled_NF[has] = feature_NF[np.random.default_rng([seed, number]).permutation(has)]
        for told, feature in ((name, feature_NF), (f"{name}, of other items", shuffled_NF)):
            auc_C = probe(feature, present_N, member_NC, seed=seed)
            near, random = shared_category(cosines(feature, present_N), present_N, member_NC, seed=seed)
            known = np.flatnonzero(np.isfinite(auc_C))
            mean = f"{auc_C[known].mean():.3f}" if len(known) else "-"
            lines.append((told, str(feature.shape[1]), str(int(present_N.sum())), mean, f"{near:.3f}", f"{random:.3f}"))
            series.append(Series(told, tuple(map(float, range(len(known)))), tuple(map(float, auc_C[known]))))
    header = (
        "features", "width", "items", "AUC of a category, mean", f"{NEIGHBOURS} nearest that share a category",
        "random items that do",
    )  # fmt: skip
    table = Table("What the features know of the categories", header, tuple(lines))
    if not len(known):
        return (table,)
    names = tuple(items.category_names[c + 1] for c in known)
    return table, Plot("Categories told by a linear probe", "points", "category", "AUC", tuple(series), x_names=names)


def gap_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Diagnostics of the space (`alignment.diagnostics`) before the alignment was trained and after."""
    meaning = {
        "modality_gap": "distance of the mean text from the mean image, unit vectors: lower is nearer",
        "matched_recall": "share of items whose nearest text, by image, is their own: higher is better",
        "l_align": "mean kernel of an item's text and image (Eq. 6), 0 to 1: higher is nearer",
        "gamma": "bandwidth of the kernel (Eq. 5), the median distance of a text from an image",
        **{
            f"{name}_{modality}": text
            for modality in ("text", "image")
            for name, text in (
                ("effective_rank", "how many directions the items take up: low is a space that has collapsed"),
                ("uniformity", "of items on the unit sphere: lower is more even"),
            )
        },
    }
    told = [name for name in (*meaning, *sorted(set(before) - set(meaning))) if name in before and name in after]
    lines = tuple((name, f"{before[name]:.4f}", f"{after[name]:.4f}", meaning.get(name, "")) for name in told)
    return Table("The aligned space, untrained and trained", ("diagnostic", "untrained", "trained", "meaning"), lines)


def map_of(item_ND: np.ndarray, items: Items, *, seed: int) -> Plot:
    """The two main directions of the item vectors, some items of the most frequent categories by colour.

    An item counts for the rarest of its categories that are shown.
    """
    member_NC = has_category(items)
    order_C = np.argsort(-member_NC.sum(axis=0), kind="stable")[:SHOWN_CATEGORIES]
    centred_ND = item_ND[1:] - item_ND[1:].mean(axis=0)
    _, _, direction_DD = np.linalg.svd(centred_ND, full_matrices=False)
    place_N2 = np.concatenate([np.zeros((1, 2)), centred_ND @ direction_DD[:2].T])
    shown = np.random.default_rng(seed).permutation(np.arange(1, len(item_ND)))[:SHOWN_ITEMS]
    of_N = np.full(len(item_ND), -1)
    for category in order_C:  # rarer ones last, so they stay
        of_N[member_NC[:, category]] = category
    groups = {items.category_names[category + 1]: shown[of_N[shown] == category] for category in order_C}
    groups = {name: at for name, at in groups.items() if len(at)} or {"items": shown}  # these have no categories
    series = []
    for name, at in groups.items():
        x, y = (tuple(map(float, np.round(place_N2[at, axis], 4))) for axis in (0, 1))
        series.append(Series(name, x, y))
    return Plot(
        "Items in the aligned space, by category", "points", "first direction", "second direction", tuple(series)
    )


def neighbour_cases(
    items: Items,
    spaces: Mapping[str, tuple[np.ndarray, np.ndarray]],
    image_of: Mapping[str, pathlib.Path],
    *,
    seed: int,
    count: int = 6,
) -> tuple[Case, ...]:
    """Some items with their nearest neighbours in each space, as pictures with titles.

    Args:
        spaces: name -> features [N, F] and who has them [N].
        image_of: id -> image file.
    """
    everywhere_N = np.logical_and.reduce([present_N for _, present_N in spaces.values()])
    everywhere_N[0] = False
    query_Q = np.random.default_rng(seed).permutation(np.flatnonzero(everywhere_N))[:count]

    def card(item: int, note: str) -> ItemCard:
        name = str(items.raw_id_N[item])
        return ItemCard(str(items.title_N[item]) or name, note, image_of.get(name))

    def categories(item: int) -> str:
        return ", ".join(items.category_names[c] for c in items.category_NG[item] if c) or "none"

    strips: list[list[tuple[str, tuple[ItemCard, ...]]]] = [[("the item", (card(int(q), ""),))] for q in query_Q]
    for name, (feature_NF, present_N) in spaces.items():
        k = min(NEIGHBOURS, int(present_N.sum()) - 1)
        near_QK, cosine_QK = nearest(cosines(feature_NF, present_N), present_N, query_Q, k=k)
        for strip, near_K, cosine_K in zip(strips, near_QK, cosine_QK, strict=True):
            cards = tuple(card(int(i), f"{c:+.2f}; {categories(i)}") for i, c in zip(near_K, cosine_K, strict=True))
            strip.append((f"nearest by {name}", cards))
    return tuple(
        Case(str(items.title_N[q]) or str(items.raw_id_N[q]), f"categories: {categories(q)}", tuple(strip))
        for q, strip in zip(query_Q, strips, strict=True)
    )
