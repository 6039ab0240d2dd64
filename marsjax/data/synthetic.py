"""Planted data: users of a few types, items of a few topics, text and images that show an item's latent vector."""

from __future__ import annotations

import numpy as np

from marsjax.data.cleaning import RawFeatures, RawItems, build_dataset
from marsjax.records import Dataset


def make_synthetic(
    *,
    n_users: int = 2000,
    n_items: int = 1500,
    n_types: int = 40,
    n_topics: int = 30,
    topics_per_type: int = 3,
    latent: int = 16,
    low_fraction: float = 0.5,
    low_events: tuple[int, int] = (4, 10),
    high_events: tuple[int, int] = (60, 120),
    item_spread: float = 0.6,
    user_spread: float = 0.2,
    taste_scale: float = 4.0,
    on_topic: float = 0.5,
    feature_noise: float = 0.3,
    feature_width: int = 32,
    missing: float = 0.03,
    shuffle_features: bool = False,
    seed: int = 0,
) -> Dataset:
    """Draws a log whose best possible scores are known.

    A user has a type and likes the type's topics, with a personal deviation; types share topics, so that one topic
    does not tell the type. An item has a topic and a deviation of its own. Users meet distinct items, a share
    `on_topic` of them from topics of their type, and click with probability sigmoid(taste_scale * (affinity -
    typical affinity)). Text and image features are two fixed random maps of the item's latent vector, through tanh,
    plus noise. Categories are coarse: each lumps three topics together.

    A few events of a low-active user tell the type to who can compare users by content; the ids of the items are too
    rare for a model to learn that from the log alone. That is what MARS claims to exploit.

    Args:
        low_fraction: share of users with `low_events` (from, to) events; the others have `high_events`.
        missing: share of items that lack one modality.
        shuffle_features: gives each item the features of another one (a control: borrowing by content must not help).

    `Dataset.oracle_E` holds the true click probabilities.
    """
    rng = np.random.default_rng(seed)
    topic_TD = rng.normal(size=(n_topics, latent)) / np.sqrt(latent)
    topic_I = rng.integers(n_topics, size=n_items)
    item_ID = topic_TD[topic_I] + item_spread * rng.normal(size=(n_items, latent)) / np.sqrt(latent)
    likes_YT = np.zeros((n_types, n_topics))
    chosen_YK = np.argsort(rng.random((n_types, n_topics)), axis=1)[:, :topics_per_type]
    np.put_along_axis(likes_YT, chosen_YK, 1.0, axis=1)
    type_U = rng.integers(n_types, size=n_users)
    deviation_UD = rng.normal(size=(n_users, latent)) / np.sqrt(latent)
    user_UD = (likes_YT @ topic_TD)[type_U] + user_spread * deviation_UD

    affinity_UI = user_UD @ item_ID.T
    affinity_UI = (affinity_UI - affinity_UI.mean()) / affinity_UI.std()
    quality_I = 0.3 * rng.normal(size=n_items)
    click_UI = 1.0 / (1.0 + np.exp(-(taste_scale * affinity_UI / 2 + quality_I - 0.2)))

    # Exposure without replacement: the largest of log-weight plus Gumbel noise are a draw by weight.
    popularity_I = rng.zipf(1.6, size=n_items).clip(max=50) + 5.0
    liked_UI = likes_YT[type_U][:, topic_I]
    share = on_topic / max(topics_per_type / n_topics, 1e-9)
    weight_UI = popularity_I * (liked_UI * share + (1 - liked_UI) * (1 - on_topic))
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
    label_R = (rng.random(len(item_R)) < probability_R).astype(np.float64)
    begin_U, pace_U = rng.integers(0, 10_000, n_users), rng.integers(1, 30, n_users)
    time_R = begin_U[user_R] + number_R * pace_U[user_R]

    given = rng.permutation(n_items) if shuffle_features else np.arange(n_items)
    features = {}
    for modality in ("text", "image"):
        map_DF = rng.normal(size=(latent, feature_width))
        seen_IF = np.tanh(item_ID @ map_DF) + feature_noise * rng.normal(size=(n_items, feature_width))
        has = np.flatnonzero(rng.random(n_items) >= missing)
        features[modality] = RawFeatures(_ids("i", has), seen_IF[given[has]].astype(np.float32), modality)
    items = RawItems(
        _ids("i", np.arange(n_items)), np.char.add("item of topic ", topic_I.astype(str)),
        [(f"group {topic // 3}",) for topic in topic_I],
    )  # fmt: skip
    return build_dataset(
        name="synthetic",
        user_R=_ids("u", user_R),
        item_R=_ids("i", item_R),
        label_R=label_R,
        time_R=time_R,
        where=lambda row_R: [f"row {row}" for row in row_R],
        items=items,
        features=features,
        oracle_R=probability_R,
    )


def _ids(letter: str, number: np.ndarray) -> np.ndarray:
    """Ids of one width, so that their order as strings is the order of the numbers."""
    return np.char.add(letter, np.char.zfill(number.astype(str), 6))
