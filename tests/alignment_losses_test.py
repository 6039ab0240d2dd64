"""Objectives that stand in for L_align: their definitions, padding, zero vectors, devices, and what they teach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marsjax import alignment, alignment_losses
from marsjax.records import AlignmentBatch

N, D = 9, 4
LOSSES = {name: alignment.OBJECTIVES[name] for name in ("info_nce", "cosine", "mmd")}


def pairs(seed=0, absent=(1, 6)):
    rng = np.random.default_rng(seed)
    key_ND = rng.normal(size=(N, D)).astype(np.float32)
    query_ND = (key_ND + 0.5 * rng.normal(size=(N, D))).astype(np.float32)
    return query_ND, key_ND, ~np.isin(np.arange(N), absent)


def info_nce_by_hand(query_VD, key_VD, temperature=0.07):
    losses = []
    for from_VD, to_VD in ((query_VD, key_VD), (key_VD, query_VD)):
        for own, x_D in enumerate(from_VD):
            raised = [np.exp(x_D @ y_D / np.linalg.norm(x_D) / np.linalg.norm(y_D) / temperature) for y_D in to_VD]
            losses.append(-np.log(raised[own] / sum(raised)))
    return np.mean(losses)


def cosine_by_hand(query_VD, key_VD):
    pair = zip(query_VD, key_VD, strict=True)
    return np.mean([1 - x_D @ y_D / np.linalg.norm(x_D) / np.linalg.norm(y_D) for x_D, y_D in pair])


def mmd_by_hand(query_VD, key_VD):
    pooled_XD = np.concatenate([query_VD, key_VD])
    distances = sorted(np.linalg.norm(x - y) for i, x in enumerate(pooled_XD) for y in pooled_XD[:i])
    gamma = distances[(len(distances) - 1) // 2]  # the lower median

    def mean(x_VD, y_VD):
        return np.mean([np.exp(-(np.linalg.norm(x - y) ** 2) / (2 * gamma**2)) for x in x_VD for y in y_VD])

    return mean(query_VD, query_VD) + mean(key_VD, key_VD) - 2 * mean(query_VD, key_VD)


BY_HAND = {"info_nce": info_nce_by_hand, "cosine": cosine_by_hand, "mmd": mmd_by_hand}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_definition(name):
    query_ND, key_ND, both_N = pairs()
    expected = BY_HAND[name](query_ND[both_N].astype(np.float64), key_ND[both_N].astype(np.float64))
    np.testing.assert_allclose(LOSSES[name](query_ND, key_ND, both_N), expected, rtol=1e-4)


def test_temperature_is_an_argument():
    query_ND, key_ND, both_N = pairs(absent=())
    found = alignment_losses.info_nce(query_ND, key_ND, both_N, temperature=0.5)
    np.testing.assert_allclose(found, info_nce_by_hand(query_ND, key_ND, 0.5), rtol=1e-5)


@pytest.mark.parametrize("name", alignment.OBJECTIVES)
def test_padding_changes_nothing(name):
    query_ND, key_ND, both_N = pairs(absent=())
    loss = jax.jit(jax.value_and_grad(alignment.OBJECTIVES[name], (0, 1)))
    value, gradients = loss(query_ND, key_ND, both_N)
    for rubbish in (0.0, 30.0, *([] if name == "stein" else [np.nan])):
        pad = lambda x, fill=rubbish: np.insert(x, [0, 4, N], fill, axis=0)  # noqa: E731
        padded, padded_gradients = loss(pad(query_ND), pad(key_ND), pad(both_N, False))
        np.testing.assert_allclose(padded, value, rtol=1e-4)
        for found, expected in zip(padded_gradients, gradients, strict=True):
            np.testing.assert_allclose(found, pad(expected, 0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", alignment.OBJECTIVES)
def test_order_of_items_and_of_modalities_changes_nothing(name):
    query_ND, key_ND, both_N = pairs()
    loss, order = jax.jit(alignment.OBJECTIVES[name]), np.random.default_rng(1).permutation(N)
    value = loss(query_ND, key_ND, both_N)
    np.testing.assert_allclose(loss(query_ND[order], key_ND[order], both_N[order]), value, rtol=1e-5)
    np.testing.assert_allclose(loss(key_ND, query_ND, both_N), value, rtol=1e-5)


@pytest.mark.parametrize("name", alignment.OBJECTIVES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_items_are_finite(name, count):
    query_ND, key_ND, _ = pairs()
    value, gradient_ND = jax.jit(jax.value_and_grad(alignment.OBJECTIVES[name]))(query_ND, key_ND, np.arange(N) < count)
    assert np.isfinite(value)
    assert np.isfinite(gradient_ND).all()
    if count == 0:
        assert float(value) == 0.0


@pytest.mark.parametrize("name", alignment.OBJECTIVES)
@pytest.mark.parametrize("zeros", [1, N])
def test_zero_vectors_have_finite_gradients(name, zeros):
    query_ND, key_ND, _ = pairs()
    query_ND[:zeros] = key_ND[:zeros] = 0.0
    value, gradients = jax.jit(jax.value_and_grad(alignment.OBJECTIVES[name], (0, 1)))(
        query_ND, key_ND, np.ones(N, bool)
    )
    assert np.isfinite(value)
    assert all(np.isfinite(gradient_ND).all() for gradient_ND in gradients)


@pytest.mark.parametrize("name", alignment.OBJECTIVES)
def test_equal_modalities_are_best(name):
    query_ND, key_ND, both_N = pairs()
    loss = jax.jit(alignment.OBJECTIVES[name])
    assert float(loss(key_ND, key_ND, both_N)) < float(loss(query_ND, key_ND, both_N))
    best = {"stein": -1.0, "cosine": 0.0, "mmd": 0.0}
    if name in best:
        assert float(loss(key_ND, key_ND, both_N)) == pytest.approx(best[name], abs=1e-6)


@pytest.mark.parametrize("name", alignment.OBJECTIVES)
def test_only_mmd_is_blind_to_who_belongs_to_whom(name):
    query_ND, key_ND, both_N = pairs(absent=())
    loss = jax.jit(alignment.OBJECTIVES[name])
    matched, shuffled = (float(loss(query_ND, other_ND, both_N)) for other_ND in (key_ND, np.roll(key_ND, 1, axis=0)))
    if name == "mmd":
        assert shuffled == pytest.approx(matched, rel=1e-4)
    else:
        assert shuffled > matched + 0.1


# --- in the joint loss

TWO = ("text", "image")


def toy(seed=0, n_items=24, features=4):
    """Text and image of an item are the same latents, away from the origin, drawn apart by random projections."""
    rng = np.random.default_rng(seed)
    latent_NF = (2.0 + rng.normal(size=(n_items, features))).astype(np.float32)
    present_N = np.arange(n_items) > 0
    present_N[3] = False
    tables = alignment.FeatureTables(
        dict.fromkeys(TWO, jnp.asarray(latent_NF)), {"text": jnp.arange(n_items) > 0, "image": jnp.asarray(present_N)}
    )
    history_BT = rng.integers(1, n_items, (4, 3)).astype(np.int32)
    batch = AlignmentBatch(
        history_BT, history_BT, np.ones((4, 3), np.float32), np.ones((4, 3), np.float32),
        np.arange(n_items, dtype=np.int32),
    )  # fmt: skip
    encoder = alignment.MultimodalEncoder(n_items=n_items, modalities=TWO, id_width=4, width=8, hidden=4)
    return encoder, jax.jit(encoder.init)(jax.random.key(seed), batch, tables)["params"], batch, tables


def weights(objective, **changes):
    changes = {"beta": 1.0, "lambda_": 0.01, "entropy_sign": 1.0, "eta": 0.1, "estimator": "stein"} | changes
    return alignment.AlignmentLoss(**changes, objective=objective)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("objective", alignment.OBJECTIVES)
def test_matched_pairs_come_nearer(objective, seed):
    """60 steps of gradient descent on the joint loss; vectors lie on a sphere, so nearer is no shrinking."""
    encoder, params, batch, tables = toy(seed)
    loss = alignment.make_loss(encoder, weights(objective), axis_name=None)
    optimizer = optax.adam(0.03)

    @jax.jit
    def distance(params):
        (text_ND, _), (image_ND, both_N) = (
            alignment.apply(encoder, params, name, batch.stein_item_N, tables, method="modality") for name in TWO
        )
        return jnp.sum((text_ND - image_ND) ** 2 * both_N[:, None]) / jnp.sum(both_N)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(lambda p: loss(p, batch, tables)[0])(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=60)[0][0]

    before, after = float(distance(params)), float(distance(run(params)))
    assert after < 0.5 * before


@pytest.mark.parametrize("objective", alignment.OBJECTIVES)
def test_objective_stands_in_the_place_of_l_align(objective):
    """The joint loss is the click loss + beta (objective + lambda sign entropy); the entropy is the same for all."""
    encoder, params, batch, tables = toy()
    (text_ND, text_N), (image_ND, image_N) = (
        alignment.apply(encoder, params, name, batch.stein_item_N, tables, method="modality") for name in TWO
    )

    def joint(**changes):
        value, metrics = jax.jit(alignment.make_loss(encoder, weights(**changes), axis_name=None))(
            params, batch, tables
        )
        return float(value), float(metrics["click_loss"])

    without, click = joint(objective=objective, beta=0.3, lambda_=0.0)
    expected = 0.3 * float(alignment.OBJECTIVES[objective](image_ND, text_ND, text_N & image_N))
    assert without - click == pytest.approx(expected, rel=1e-4)
    entropy = joint(objective="stein", beta=0.3, lambda_=0.5)[0] - joint(objective="stein", beta=0.3, lambda_=0.0)[0]
    assert abs(entropy) > 0.1
    assert joint(objective=objective, beta=0.3, lambda_=0.5)[0] - without == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize("objective", alignment.OBJECTIVES)
def test_devices_agree(objective):
    """Values of four emulated devices add up to that of one, and so do the gradients of their shares."""
    encoder, params, batch, tables = toy()
    one = alignment.make_loss(encoder, weights(objective), axis_name=None)
    share = alignment.make_loss(encoder, weights(objective), axis_name="device")
    parts = jax.tree.map(lambda x: jnp.reshape(x, (4, -1, *x.shape[1:])), batch)

    def several(params):
        of_device = functools.partial(share, params, tables=tables)
        return jnp.sum(jax.vmap(lambda part: of_device(part)[0], axis_name="device")(parts))

    value, gradient = jax.jit(jax.value_and_grad(lambda p: one(p, batch, tables)[0]))(params)
    found, found_gradient = jax.jit(jax.value_and_grad(several))(params)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), found_gradient, gradient)


@pytest.mark.parametrize("changes", [{"objective": "triplet"}, {"objective": "stein", "estimator": "kde"}])
def test_unknown_names_are_refused(changes):
    field, name = list(changes.items())[-1]
    with pytest.raises(ValueError, match=f"alignment.{field}: expected one of .*'stein'.*, found '{name}'"):
        alignment.make_loss(toy()[0], weights(**changes), axis_name=None)


# --- W_V of Eq. 9


def test_kept_values_start_at_the_projected_text():
    """Nothing else of the parameters moves, and equal text and image of a lone item stay equal in what Eq. 10 adds."""
    encoder, params, batch, tables = toy()
    kept = encoder.clone(keep_values=True)
    kept_params = jax.jit(kept.init)(jax.random.key(0), batch, tables)["params"]
    value_DD = kept_params["modal_attention"]["to_value"].pop("kernel")
    np.testing.assert_array_equal(value_DD, np.eye(8))
    assert not np.allclose(params["modal_attention"]["to_value"].pop("kernel"), np.eye(8))
    jax.tree.map(np.testing.assert_array_equal, kept_params, params)

    kept_params["modal_attention"]["to_value"]["kernel"] = value_DD
    kept_params["project_image"] = kept_params["project_text"]
    item_N1 = np.arange(4, 9, dtype=np.int32)[:, None]
    fused = alignment.apply(kept, kept_params, item_N1, tables, method=lambda net, *x: net.fused(*x, alone=False))
    text_ND, _ = alignment.apply(kept, kept_params, "text", item_N1[:, 0], tables, method="modality")
    expected_ND = (2 * text_ND - jnp.mean(2 * text_ND, axis=1, keepdims=True)) / jnp.std(2 * text_ND, axis=1)[:, None]
    np.testing.assert_allclose(fused[:, 0], expected_ND, rtol=1e-4, atol=1e-4)
