"""The page of one user: own history, who lends, what was borrowed and left out, and what it changes."""

from __future__ import annotations

import pathlib

import numpy as np

from marsjax.data.content import IMAGES
from marsjax.evaluation import page
from marsjax.records import GROUP_NAMES
from marsjax.serving import scoring
from marsjax.serving.engine import Snapshot
from marsjax.serving.lending import NOTHING, find_candidates, lend
from marsjax.serving.people import Known

SHOWN = 12  # items of a strip, and of the table


def make_page(snapshot: Snapshot, user: str, known: Known, image_folder: pathlib.Path | None) -> page.Page:
    """What the service would answer for this user, and why. Pictures are files named by item id."""
    bundle, config = snapshot.bundle, snapshot.bundle.manifest["config"]
    profile, rejected = known.profile, []
    if known.vector_D is not None and len(snapshot.lenders.user_index.user_P):
        vector_1D = known.vector_D[None]
        candidates = find_candidates(snapshot.lenders, config, vector_1D)
        profile = profile._replace(lent=lend(snapshot.lenders, config, vector_1D)[0])
        left_S = np.flatnonzero((candidates.item_QS[0] > 0) & ~candidates.kept_QS[0])
        left_S = left_S[np.argsort(candidates.similarity_QS[0, left_S], kind="stable")]
        rejected = [(int(candidates.item_QS[0, s]), float(candidates.similarity_QS[0, s])) for s in left_S]
    lent = profile.lent
    order_S = np.argsort(-lent.similarity_S, kind="stable")

    def card(item: int, note: str) -> page.ItemCard:
        name, image = str(bundle.items.raw_id_N[item]), None
        if image_folder is not None and "/" not in name and not name.startswith("."):
            paths = (image_folder / f"{name}{ending}" for ending in IMAGES)
            image = next((path for path in paths if path.is_file()), None)
        title = str(bundle.items.title_N[item])
        return page.ItemCard(title or name, f"{name}, {note}".strip(", ") if title else note, image)

    notes = {0: "", 1: "not liked", 2: "liked"}
    own = [
        card(int(item), notes[int(mark)])
        for item, mark in zip(profile.item_L[-SHOWN:], profile.mark_L[-SHOWN:], strict=True)
    ]
    borrowed = [card(int(lent.item_S[s]), f"similarity {lent.similarity_S[s]:+.2f}") for s in order_S[:SHOWN]]
    dropped = [card(item, f"similarity {value:+.2f}") for item, value in rejected[:SHOWN]]
    donors = [str(bundle.users.raw_user_U[d]) for d in np.unique(lent.donor_S) if 0 <= d < len(bundle.users.raw_user_U)]
    group = GROUP_NAMES[int(bundle.users.group_U[profile.user])] if profile.user >= 0 else "unknown to the model"
    facts = f"{len(profile.item_L)} items in the history; donor {', '.join(donors) or 'none'}; {len(lent.item_S)} lent"
    case = page.Case(
        f"User {user}",
        facts,
        (
            ("own history, the last of it", tuple(own)),
            (f"borrowed, most similar first: {len(borrowed)} of {len(lent.item_S)}", tuple(borrowed)),
            (f"rejected, least similar first: {len(dropped)} of {len(rejected)}", tuple(dropped)),
        ),
    )
    target_C = _targets(bundle.items.raw_id_N, [int(lent.item_S[s]) for s in order_S], [item for item, _ in rejected])
    with_C, without_C = scoring.score_rows(
        bundle,
        [scoring.Row(profile, target_C), scoring.Row(profile._replace(lent=NOTHING), target_C)],
    )
    lines = tuple(
        (str(bundle.items.title_N[item]) or str(bundle.items.raw_id_N[item]), f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}")
        for item, a, b in zip(target_C, with_C, without_C, strict=True)
    )
    table = page.Table("Scores", ("item", "with augmentation", "without", "difference"), lines)
    text = "Items that the donor knows, and some others: the probability of a click with and without what is borrowed."
    return page.Page(
        f"User {user}",
        (
            ("version", snapshot.version),
            ("lenders", snapshot.lenders_version),
            ("activity", group),
            ("fallback", known.fallback or "none"),
        ),
        (page.Section("Borrowing", "", (case,)), page.Section("What it changes", text, (table,))),
    )


def _targets(raw_id_N: np.ndarray, lent: list[int], rejected: list[int]) -> np.ndarray:
    """Some borrowed items, some rejected ones, and some of the rest of the catalogue, [C] int32."""
    chosen = [*lent[: SHOWN // 2], *rejected[: SHOWN // 4]]
    step = max((len(raw_id_N) - 1) // SHOWN, 1)
    chosen += [item for item in range(1, len(raw_id_N), step) if item not in chosen]
    return np.array(list(dict.fromkeys(chosen))[:SHOWN], np.int32)
