"""Planted data: users of a few types, items of a few topics, text and images that show an item's latent vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from marsjax.data.cleaning import RawFeatures, RawItems, build_dataset
from marsjax.records import Dataset


def make_synthetic(
    features: Mapping[str, RawFeatures] | None = None,
    /,
    *,
    n_users: int = 2000,
    n_items: int = 400,
    n_types: int = 80,
    n_topics: int = 60,
    topics_per_type: int = 8,
    latent: int = 48,
    low_fraction: float = 0.7,
    low_events: tuple[int, int] = (12, 16),
    high_events: tuple[int, int] = (70, 100),
    item_spread: float = 0.15,
    user_spread: float = 0.5,
    taste_scale: float = 6.0,
    on_topic: float = 0.5,
    feature_noise: float = 0.1,
    feature_width: int = 64,
    missing: float = 0.03,
    shuffle_features: bool = False,
    seed: int = 0,
) -> Dataset:
    """Draws a log whose best possible scores are known.

    An item has a topic, and a latent vector near its topic's. A user has a type, and likes the topics of the type. A
    user meets distinct items, a share `on_topic` of them from liked topics, and clicks with probability
    sigmoid(taste_scale * (liked - 1/2) + personal deviation + item quality). Text and image features are two fixed
    random maps of the item's latent vector, through tanh, plus noise. Categories are coarse: each lumps three topics.

    The few clicks of a low-active user show some topics of the type, not all. There are many types, each pair of
    topics is in several of them, and no pair tells a third: what else the user would like cannot be read off
    co-occurrence of items. It can be read off the history of another user of the same type, who is found by comparing
    users in a space where items of one topic are near one another. That is what MARS claims to do.

    Args:
        features: stand in the place of the drawn ones, such as what encoders made of the drawings of the items.
        low_fraction: share of users with `low_events` (from, to) events; the others have `high_events`.
        missing: share of items that lack one modality.
        shuffle_features: gives each item the features of another one (a control: content then tells nothing).

    `Dataset.oracle_E` holds the true click probabilities.
    """
    rng = np.random.default_rng(seed)
    topic_I, deviation_ID, item_ID = _items(rng, n_items, n_topics, latent, item_spread)
    likes_YT = np.zeros((n_types, n_topics))
    chosen_YK = np.argsort(rng.random((n_types, n_topics)), axis=1)[:, :topics_per_type]
    np.put_along_axis(likes_YT, chosen_YK, 1.0, axis=1)
    type_U = rng.integers(n_types, size=n_users)
    liked_UI = likes_YT[type_U][:, topic_I]
    personal_UI = rng.normal(size=(n_users, latent)) @ deviation_ID.T / max(item_spread, 1e-9)
    quality_I = 0.3 * rng.normal(size=n_items)
    click_UI = 1.0 / (1.0 + np.exp(-(taste_scale * (liked_UI - 0.5) + user_spread * personal_UI + quality_I)))

    # Exposure without replacement: the largest of log-weight plus Gumbel noise are a draw by weight.
    popularity_I = rng.zipf(1.6, size=n_items).clip(max=50) + 5.0
    share = topics_per_type / n_topics
    weight_UI = popularity_I * np.where(liked_UI > 0, on_topic / share, (1 - on_topic) / (1 - share))
    shown_UI = np.argsort(-(np.log(weight_UI) + rng.gumbel(size=weight_UI.shape)), axis=1)
    is_low_U = rng.random(n_users) < low_fraction
    count_U = np.where(is_low_U, rng.integers(*low_events, n_users, endpoint=True),
                       rng.integers(*high_events, n_users, endpoint=True))  # fmt: skip
    count_U = np.minimum(count_U, n_items)
    user_R = np.repeat(np.arange(n_users), count_U)
    number_R = np.arange(count_U.sum()) - np.repeat(np.cumsum(count_U) - count_U, count_U)
    # The order of what was drawn goes with the weight; a user meets it in random order.
    place_UI = np.where(np.arange(n_items)[None, :] < count_U[:, None], rng.random((n_users, n_items)), np.inf)
    shown_UI = np.take_along_axis(shown_UI, np.argsort(place_UI, axis=1), axis=1)
    item_R = shown_UI[user_R, number_R]
    probability_R = click_UI[user_R, item_R]
    # How much an item is liked: its log odds and logistic noise, which are above 0 with this very probability.
    drawn_R = rng.random(len(item_R))
    liking_R = np.log(probability_R / (1 - probability_R)) - np.log(np.maximum(drawn_R, 1e-300) / (1 - drawn_R))
    begin_U, pace_U = rng.integers(0, 10_000, n_users), rng.integers(1, 30, n_users)
    time_R = begin_U[user_R] + number_R * pace_U[user_R]

    given = rng.permutation(n_items) if shuffle_features else np.arange(n_items)
    drawn = {}
    for modality in ("text", "image"):
        map_DF = rng.normal(size=(latent, feature_width))
        seen_IF = np.tanh(item_ID @ map_DF) + feature_noise * rng.normal(size=(n_items, feature_width))
        has = np.flatnonzero(rng.random(n_items) >= missing)
        drawn[modality] = RawFeatures(_ids("i", has), seen_IF[given[has]].astype(np.float32), modality)
    items = RawItems(
        _ids("i", np.arange(n_items)), np.char.add("item of topic ", topic_I.astype(str)),
        [(f"group {topic // 3}",) for topic in topic_I],
    )  # fmt: skip
    return build_dataset(
        name="synthetic",
        user_R=_ids("u", user_R),
        item_R=_ids("i", item_R),
        label_R=liking_R,
        label_threshold=0.0,
        time_R=time_R,
        where=lambda row_R: [f"row {row}" for row in row_R],
        items=items,
        features=drawn if features is None else features,
        oracle_R=probability_R,
    )


def latent_items(
    *, n_items: int, n_topics: int, latent: int, item_spread: float, shuffle_features: bool, seed: int, **_: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [I] and latent vectors [I, D] of the items that `make_synthetic` plants with the same arguments.

    With `shuffle_features` each id has the vector of another item.
    """
    item_ID = _items(np.random.default_rng(seed), n_items, n_topics, latent, item_spread)[2]
    given = np.random.default_rng([seed, 1]).permutation(n_items) if shuffle_features else np.arange(n_items)
    return _ids("i", np.arange(n_items)), item_ID[given]


def _items(
    rng: np.random.Generator, n_items: int, n_topics: int, latent: int, item_spread: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Topics [I], deviations from them [I, D] and latent vectors [I, D]: the first draws."""
    topic_TD = rng.normal(size=(n_topics, latent)) / np.sqrt(latent)
    topic_I = rng.integers(n_topics, size=n_items)
    deviation_ID = item_spread * rng.normal(size=(n_items, latent)) / np.sqrt(latent)
    return topic_I, deviation_ID, topic_TD[topic_I] + deviation_ID


def _ids(letter: str, number: np.ndarray) -> np.ndarray:
    """Ids of one width, so that their order as strings is the order of the numbers."""
    return np.char.add(letter, np.char.zfill(number.astype(str), 6))
