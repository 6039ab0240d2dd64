"""The values that cross a border between stages, and the axis letters.

Axis letters, used as suffixes of local arrays (``history_BL``) and in the comments of fields (``# [B, L]``):

    B batch rows      L history positions   K neighbours   N items, row 0 is padding   U users
    D embedding width M modalities          F raw features E events                    G categories of an item
    P possible donors
    J numbers of a row beside its ids        V views of a history             W positions of a view
    Q retrieval queries                     S slots of borrowed items                  C candidates

Items are numbered 1..N-1 and 0 is padding everywhere. Users are numbered 0..U-1 and -1 is "no user".
All records hold NumPy arrays on the host unless their docstring says otherwise.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # NumPy on the host, jax.Array inside a compiled function

TRAIN, VALID, TEST = 0, 1, 2  # values of Rows.split_E
LOW, MIDDLE, HIGH, NEW = 0, 1, 2, 3  # values of activity groups; NEW users have no training events
GROUP_NAMES = ("low", "middle", "high", "new")
GRADE_MARKS = 5  # marks of history items by grade, where a model reads these


class Problem(NamedTuple):
    """One kind of defect found in the input, and what was done about it."""

    kind: str  # short slug: "unknown_item", "duplicate_event", "nan_feature", ...
    occurrences: int  # how many rows, items or files have it
    # What strict reading refuses: "dropped" (left out), "masked" (a feature that counts as absent), "reordered" (moved
    # to its place), "noted" (nothing was done, but the files should be looked at). What it accepts: "kept" (used as it
    # is, nothing is wrong with it), "filtered" (left out because an option says so), "ignored" (belongs to nothing
    # that is used).
    action: str
    where: tuple[str, ...]  # the first few places, e.g. "ratings.dat:17"


class Modality(NamedTuple):
    """Features of the items in one modality (text, image, ...)."""

    feature_NF: np.ndarray  # [N, F] float32; all-zero where absent
    present_N: np.ndarray  # [N] bool; False at row 0 and for items without (usable) features


class Content(NamedTuple):
    """What items are encoded from, one row an item as the user supplied it. Nothing is checked yet: ids may repeat."""

    raw_id_I: np.ndarray  # [I] str
    # Column -> [I] objects that are str, what a template may name; "" is missing. One may be very long.
    fields: Mapping[str, np.ndarray]
    image_I: Sequence[pathlib.Path | None]  # I image files; None: the item has none


class Items(NamedTuple):
    """The catalogue. Row 0 of every array is padding."""

    raw_id_N: np.ndarray  # [N] str, the ids of the source; "" at row 0
    title_N: np.ndarray  # [N] objects that are str, may be ""; they may be long
    category_NG: np.ndarray  # [N, G] int32 category numbers from 1, 0 is padding
    category_names: tuple[str, ...]  # name of category g at position g, "" at 0
    modalities: Mapping[str, Modality]  # by name, in a fixed order


class Log(NamedTuple):
    """Interactions, grouped by user (CSR), each user's events in time order."""

    start_U1: np.ndarray  # [U + 1] int64; events of user u are start_U1[u]:start_U1[u + 1]
    item_E: np.ndarray  # [E] int32 in 1..N-1
    label_E: np.ndarray  # [E] float32, 0 or 1
    time_E: np.ndarray  # [E] int64, seconds, microseconds or any monotone clock
    raw_user_U: np.ndarray  # [U] str, the ids of the source
    # [E] float32 in 0..1, feedback as fine as the source has it, of which the label is a threshold; None: labels alone
    grade_E: np.ndarray | None = None


class Dataset(NamedTuple):
    """What a source returns: everything is checked, numbered and sorted."""

    name: str
    log: Log
    items: Items
    problems: tuple[Problem, ...]
    fingerprint: str  # sha256 over the content but the grades; equal data have equal fingerprints
    oracle_E: np.ndarray | None = None  # [E] float32, the true click probability (synthetic data only)


class Histories(NamedTuple):
    """Which earlier items a model may see for each event, without copying them per row."""

    start_U1: np.ndarray  # [U + 1] int64 into item_H
    item_H: np.ndarray  # [H] int32, history items of all users, in time order
    time_H: np.ndarray  # [H] int64
    label_H: np.ndarray  # [H] float32, the feedback given to the history item
    end_E: np.ndarray  # [E] int64; event e sees item_H[start_E[e]:end_E[e]]
    train_end_U: np.ndarray  # [U] int64; training history of u is item_H[start_U1[u]:train_end_U[u]]
    start_E: np.ndarray  # [E] int64, the start of its user unless histories are cut
    grade_H: np.ndarray | None = None  # [H] float32, as `Log.grade_E`


class Rows(NamedTuple):
    """A log made ready for learning: splits, histories and activity groups."""

    user_E: np.ndarray  # [E] int32
    split_E: np.ndarray  # [E] int8: TRAIN, VALID or TEST; -1 is not used
    histories: Histories
    group_U: np.ndarray  # [U] int8: LOW, MIDDLE, HIGH or NEW, by the number of training events
    train_length_U: np.ndarray  # [U] int64


class Embeddings(NamedTuple):
    """The aligned space: static item vectors and user vectors (Eq. 13)."""

    item_ND: np.ndarray  # [N, D] float32, the item alone (a history of one); row 0 is zero
    user_UD: np.ndarray  # [U, D] float32 from the training history; zero where it is empty


class Neighbours(NamedTuple):
    """Result of a search. Always [B, K], whatever B and K; padding is -1, -inf, False."""

    user_BK: np.ndarray  # [B, K] int64
    similarity_BK: np.ndarray  # [B, K] float32, cosine, descending
    valid_BK: np.ndarray  # [B, K] bool


class Queries(NamedTuple):
    """Who borrows, and from which prefix of the own history the donor was looked up."""

    user_Q: np.ndarray  # [Q] int32
    end_Q: np.ndarray  # [Q] int64, the query saw item_H[start of user:end_Q]
    query_E: np.ndarray  # [E] int32, the query event e borrows through; -1 borrows nothing


class Borrowed(NamedTuple):
    """What each query borrows (CSR by query), in the order in which it is prepended to the own history."""

    start_Q1: np.ndarray  # [Q + 1] int64
    item_S: np.ndarray  # [S] int32
    time_S: np.ndarray  # [S] int64, when the donor met the item
    donor_S: np.ndarray  # [S] int32
    similarity_S: np.ndarray  # [S] float32, cosine of item and query user, Eq. 16
    feedback_S: np.ndarray | None = None  # [S] int8, what donors thought: 2 liked, 1 not, 0 not known; None: all are 0


class Donors(NamedTuple):
    """Training histories of the possible donors (the high-active users)."""

    user_P: np.ndarray  # [P] int32, ascending
    item_PL: np.ndarray  # [P, L] int32, time order, 0 is padding
    time_PL: np.ndarray  # [P, L] int64


class Augmentation(NamedTuple):
    """Who borrows what, and which borrowed entries are blanked for a row."""

    queries: Queries
    borrowed: Borrowed
    time_safe: bool = False  # blank what the donor met later than the target
    drop_target: bool = False  # blank the target itself


class Inputs(NamedTuple):
    """What a CTR model reads of an event beside the ids of user, target and history."""

    mark_H: np.ndarray | None = None  # [H] int8, the mark of each history entry (`histories.feedback`); None: no marks
    dense_EJ: np.ndarray | None = None  # [E, J] float32, numbers about user, target and what others thought of it
    hidden_E: np.ndarray | None = None  # [E] bool, events whose user id the model does not see


class Viewed(NamedTuple):
    """One view of each of some histories: what an augmentation made of it."""

    history_BL: np.ndarray  # [B, L] int32, entries 0..length-1, then zeros
    length_B: np.ndarray  # [B] int64
    column_BL: np.ndarray  # [B, L] int64, the entry of the history that stands here; -1: none of them, or no entry
    rate_B: np.ndarray | None = None  # [B] float64, the share of the history to change, where it was drawn


class Viewing(NamedTuple):
    """How views of the own histories of training rows are made, and what for."""

    # (history_BL, length_B, rng) -> the views; each as wide as what it is given.
    make: Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[Viewed, ...]]
    length: int  # L; a view is made of the last L own entries, and is of at most L
    replaces: bool  # the one view stands in the place of what it was made of; else views are for a loss beside it
    row_E: np.ndarray | None = None  # [E] bool, events that have views for a loss; None: all


class Objective(NamedTuple):
    """A loss on views, beside the click loss. Hashable: a step that was compiled for it is found again."""

    kind: str  # "contrastive": of two views; "mixup": of the history and of views that are mixed with it, and of rows
    weight: float  # of the contrastive loss; of the mixture of a history with its view
    temperature: float = 1.0  # contrastive
    cross_weight: float = 0.0  # mixup: of the mixture of rows
    alpha: float = 1.0  # mixup: shares are drawn from Beta(alpha, alpha)
    levels: int = 1  # mixup: how often rows are mixed, each time by one share a row and by one a channel
    mode: str = "paper"  # mixup: or "as_released"


class Predictions(NamedTuple):
    """Scores of one method and seed on evaluation rows."""

    user_B: np.ndarray  # [B] int32
    item_B: np.ndarray  # [B] int32
    label_B: np.ndarray  # [B] float32
    score_B: np.ndarray  # [B] float32, probability
    group_B: np.ndarray  # [B] int8, activity group of the row's user
    lent_B: np.ndarray | None = None  # [B] int64, borrowed items in the row's history; None: none


class Views(NamedTuple):
    """Views of the last own entries of rows' histories, W of them at most."""

    item_BVW: Array  # [B, V, W] int32; the highest id, beyond the catalogue, is a mask
    feedback_BVW: Array | None  # [B, V, W] int8, the marks as of a history
    rate_BV: Array  # [B, V] float32, the share of the history to change; 0 where none was drawn
    weight_B: Array  # [B] float32, 1 where the row has views that count
    rows: CtrBatch | None = None  # the B rows, where only some of the batch's can have views; None: all of them


class CtrBatch(NamedTuple):
    """One batch of CTR rows. Rows of weight 0 are padding; history entries of id 0 are padding."""

    user_B: Array  # [B] int32, the user's number + 1; 0 is padding
    target_B: Array  # [B] int32
    label_B: Array  # [B] float32
    weight_B: Array  # [B] float32, 1 or 0
    history_BL: Array  # [B, L] int32, borrowed items first, then the own ones in time order
    borrowed_BL: Array  # [B, L] bool, True where the entry was borrowed
    feedback_BL: Array | None = None  # [B, L] int8: 2 liked, 1 not liked, or 1 to 5 of grades; 0 not known or padding
    dense_BJ: Array | None = None  # [B, J] float32
    views: Views | None = None  # for a loss beside the click loss; training only


class AlignmentBatch(NamedTuple):
    """One batch of the alignment stage: T targets for each history, and the items the Stein loss is computed over."""

    history_BL: Array  # [B, L] int32
    target_BT: Array  # [B, T] int32, all of them later than the history
    label_BT: Array  # [B, T] float32
    weight_BT: Array  # [B, T] float32, 1 or 0
    stein_item_N: Array  # [N'] int32, distinct items of the whole batch; 0 is padding


class ItemTables(NamedTuple):
    """Constants of the items that a CTR model reads beside their ids."""

    category_NG: Array  # [N, G] int32, 0 is padding
    feature_NF: Array | None = None  # [N, F] float32, content of the items
    vector_ND: Array | None = None  # [N, D] float32, what `objective.with_vectors` embedded; to score only
