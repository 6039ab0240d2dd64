"""Item and user tables: chunks, buckets and padding leave what the encoder says of one user at a time."""

import jax
import numpy as np
import pytest

from marsjax import alignment, embeddings
from marsjax.records import Histories

N, D, CAP = 40, 8, 70
LENGTHS = [0, 1, 5, 16, 17, 64, 65, 70, 90]  # around the bounds 16, 64 and the cap


@pytest.fixture(scope="module")
def space():
    """An encoder, its parameters and its tables; item 3 has no image."""
    rng = np.random.default_rng(0)
    feature = {name: rng.normal(size=(N, 6)).astype(np.float32) for name in ("text", "image")}
    present = {"text": np.arange(N) > 0, "image": ~np.isin(np.arange(N), [0, 3])}
    tables = alignment.FeatureTables(feature, present)
    encoder = alignment.MultimodalEncoder(N, ("text", "image"), id_width=6, width=D, hidden=4)
    one = np.ones((1, 1), np.int32)
    batch = alignment.AlignmentBatch(one, one, one, one, one[0])
    params = jax.jit(encoder.init)(jax.random.key(0), batch, tables)["params"]
    return encoder, params | {"item": 20 * params["item"]}, tables


def histories(seed=0):
    start_U1 = np.concatenate([[0], np.cumsum(LENGTHS)])
    item_H = np.random.default_rng(seed).integers(1, N, start_U1[-1]).astype(np.int32)
    zero_H = np.zeros(len(item_H), np.int64)
    return Histories(
        start_U1, item_H, zero_H, zero_H.astype(np.float32), np.zeros(0, np.int64), start_U1[1:], np.zeros(0, np.int64)
    )


def alone(space, history):
    """Item vectors [L, D] and the user vector [D] of one history without padding."""
    encoder, params, tables = space
    item_1LD, user_1D = jax.jit(lambda p: encoder.apply({"params": p}, history[None], tables, method="encode"))(params)
    return np.asarray(item_1LD[0]), np.asarray(user_1D[0])


def test_user_vectors_equal_one_user_at_a_time(space):
    """Whole histories, and the prefix of 30 that the last user had; longer ones keep their last `cap` items."""
    past = histories()
    user_Q = np.array([5, 0, 8, 3, 1, 8, 2, 7, 4, 6])
    end_Q = past.train_end_U[user_Q]
    end_Q[5] = past.start_U1[8] + 30
    found_QD = embeddings.user_vectors(*space, past, user_Q, end_Q, cap=CAP, size=4)
    assert found_QD.dtype == np.float32
    for row, (user, end) in enumerate(zip(user_Q, end_Q, strict=True)):
        history = past.item_H[past.start_U1[user] : end][-CAP:]
        expected_D = alone(space, history)[1] if len(history) else np.zeros(D)
        np.testing.assert_allclose(found_QD[row], expected_D, atol=2e-6)
    np.testing.assert_array_equal(found_QD[1], 0)
    assert (np.linalg.norm(np.delete(found_QD, 1, axis=0), axis=1) > 0.1).all()


@pytest.mark.parametrize("size", [1, 5, 128])
def test_chunk_size_changes_nothing(space, size):
    past, user_Q = histories(), np.arange(len(LENGTHS))
    done = []
    found_QD = embeddings.user_vectors(
        *space, past, user_Q, past.train_end_U, cap=CAP, size=size, advance=done.append
    )  # fmt: skip
    expected_QD = embeddings.user_vectors(*space, past, user_Q, past.train_end_U, cap=CAP, size=4)
    np.testing.assert_allclose(found_QD, expected_QD, atol=2e-6)
    assert sum(done) == len(LENGTHS)
    found_ND, expected_ND = (embeddings.item_vectors(*space, n_items=N, size=each) for each in (size, 16))
    np.testing.assert_allclose(found_ND, expected_ND, atol=2e-6)


def test_no_users_have_no_vectors(space):
    nobody = np.zeros(0, np.int64)
    assert embeddings.user_vectors(*space, histories(), nobody, nobody, cap=CAP).shape == (0, D)


def test_item_vectors_are_histories_of_one(space):
    found_ND = embeddings.item_vectors(*space, n_items=N, size=16)
    assert found_ND.shape == (N, D)
    np.testing.assert_array_equal(found_ND[0], 0)
    encoder, params, tables = space
    static_ND = encoder.apply({"params": params}, np.arange(N, dtype=np.int32), tables, method="static")
    np.testing.assert_allclose(found_ND, static_ND, atol=2e-6)
    for item in (1, 3, N - 1):
        np.testing.assert_allclose(found_ND[item], alone(space, np.int32([item]))[1], atol=2e-6)


@pytest.mark.parametrize("size", [7, 1024])
def test_features_are_projected_once(space, size):
    """Vectors are the same, whatever the features say once they are projected."""
    encoder, params, tables = space
    made = encoder, params, embeddings.with_vectors(encoder, params, tables, size=size)
    assert not made[2].feature_NF
    np.testing.assert_array_equal(made[2].vector_ND["image"][3], 0)  # which has none
    past, user_Q = histories(), np.arange(len(LENGTHS))
    found_QD, expected_QD = (
        embeddings.user_vectors(*each, past, user_Q, past.train_end_U, cap=CAP, size=4) for each in (made, space)
    )
    np.testing.assert_allclose(found_QD, expected_QD, atol=2e-6)
    found_ND, expected_ND = (embeddings.item_vectors(*each, n_items=N, size=16) for each in (made, space))
    np.testing.assert_allclose(found_ND, expected_ND, atol=2e-6)


def test_units_are_moved_and_of_length_one():
    vector_XYD = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
    centre_D = np.arange(D, dtype=np.float32)
    vector_XYD[1, 2] = centre_D  # no length is left
    before = vector_XYD.copy()
    unit_XYD = embeddings.units(vector_XYD, centre_D)
    np.testing.assert_array_equal(vector_XYD, before)
    for x, y in np.ndindex(2, 3):
        moved_D = vector_XYD[x, y] - centre_D
        expected_D = moved_D / np.linalg.norm(moved_D) if (x, y) != (1, 2) else 0 * moved_D
        np.testing.assert_allclose(unit_XYD[x, y], expected_D, atol=1e-6)


def test_donor_units_in_their_context_or_alone(space):
    """Contextual vectors are those of the donor's own history, static ones those of the table; the two differ."""
    past = histories()
    item_PL = np.zeros((3, 20), np.int32)
    for row, user in enumerate((2, 3, 4)):
        item_PL[row, : LENGTHS[user]] = past.item_H[past.start_U1[user] :][: LENGTHS[user]]
    item_ND = embeddings.item_vectors(*space, n_items=N, size=16)
    position_X = np.array([2, 0, 2])
    centre_D = np.full(D, 0.01, np.float32)
    contextual, static = (
        embeddings.donor_units(kind, *space, item_PL, item_ND, centre_D)(position_X)
        for kind in ("contextual", "static")
    )
    np.testing.assert_allclose(static, embeddings.units(item_ND[item_PL[position_X]], centre_D), atol=1e-6)
    for row, position in enumerate(position_X):
        length = LENGTHS[2 + position]
        history = item_PL[position, :length]
        expected_LD = embeddings.units(np.asarray(alone(space, history)[0]), centre_D)
        np.testing.assert_allclose(contextual[row, :length], expected_LD, atol=2e-5)
        assert np.abs(contextual[row, :length] - static[row, :length]).max() > 0.01
    with pytest.raises(ValueError, match="contextual or static.*found 'both'"):
        embeddings.donor_units("both", *space, item_PL, item_ND, centre_D)


def test_many_donors_are_embedded_when_they_are_asked_for(space, monkeypatch):
    item_PL = np.random.default_rng(0).integers(1, N, (5, 7)).astype(np.int32)
    position_X, asked = np.array([3, 0]), []
    given = np.zeros((N, D), np.float32), np.full(D, 0.01, np.float32)
    before = embeddings.donor_units("contextual", *space, item_PL, *given)
    made = embeddings.contextual_vectors
    monkeypatch.setattr(
        embeddings, "contextual_vectors", lambda *of, **named: asked.append(len(of[3])) or made(*of, **named)
    )
    later = embeddings.donor_units("contextual", *space, item_PL, *given, most_bytes=0)
    assert not asked
    np.testing.assert_allclose(later(position_X), before(position_X), atol=2e-6)
    assert asked == [2]


def test_users_are_embedded_some_at_a_time(space):
    past = histories()
    user_Q = np.arange(600) % len(LENGTHS)
    found_QD = embeddings.user_vectors(*space, past, user_Q, past.train_end_U[user_Q], cap=CAP, size=1)
    few_QD = embeddings.user_vectors(*space, past, user_Q[: len(LENGTHS)], past.train_end_U[: len(LENGTHS)], cap=CAP)
    np.testing.assert_allclose(found_QD, few_QD[user_Q], atol=2e-6)


def test_compiled_once_for_each_length(space):
    """However many users are asked for, there is one compiled encoder for each of the lengths 16, 64 and the cap."""
    past = histories(seed=1)
    before = embeddings.encode._cache_size(), embeddings._static._cache_size()
    for count in (1, 2, 3, 7, 9, 23):
        user_Q = np.arange(count) % len(LENGTHS)
        embeddings.user_vectors(*space, past, user_Q, past.train_end_U[user_Q], cap=CAP, size=6)
        embeddings.item_vectors(*space, n_items=count, size=6)
    assert embeddings.encode._cache_size() - before[0] <= 3
    assert embeddings._static._cache_size() - before[1] <= 1
