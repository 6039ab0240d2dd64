"""The alignment stage: no leakage, padding, missing modalities, and what the sign of the entropy does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marsjax import alignment
from marsjax.records import AlignmentBatch

N, F, L, T = 30, 6, 7, 3


def tables(seed=0, missing=()):
    rng = np.random.default_rng(seed)
    feature, present = {}, {}
    for name in ("text", "image"):
        feature_NF = rng.normal(size=(N, F)).astype(np.float32)
        present_N = np.arange(N) > 0
        for modality, item in missing:
            present_N[item] &= modality != name
        feature[name] = jnp.asarray(feature_NF * present_N[:, None])
        present[name] = jnp.asarray(present_N)
    return alignment.FeatureTables(feature, present)


def encoder(**changes):
    return alignment.MultimodalEncoder(
        **({"n_items": N, "modalities": ("text", "image"), "id_width": 8, "width": 16, "hidden": 8} | changes)
    )


def batch(seed=0, b=4):
    rng = np.random.default_rng(seed)
    history_BL = rng.integers(1, N, (b, L)).astype(np.int32)
    history_BL[0, 4:] = 0
    history_BL[1] = 0
    stein_item_N = np.concatenate([rng.permutation(np.arange(1, N))[:20], [0, 0, 0, 0]]).astype(np.int32)
    return AlignmentBatch(
        history_BL,
        rng.integers(1, N, (b, T)).astype(np.int32),
        rng.integers(0, 2, (b, T)).astype(np.float32),
        np.ones((b, T), np.float32),
        stein_item_N,
    )


@pytest.fixture(scope="module")
def model():
    net = encoder()
    return net, net.init(jax.random.key(0), batch(), tables())["params"]


WEIGHTS = alignment.AlignmentLoss(beta=0.1, lambda_=0.1, entropy_sign=1.0, eta=0.1, estimator="stein")


def test_user_vector_never_sees_target(model):
    """Neither the value nor the gradient of a user vector depends on the target: it takes no target at all, and the
    logit of one target does not depend on another."""
    net, params = model
    first = batch()
    other = first._replace(target_BT=np.where(np.arange(T) == 0, first.target_BT, first.target_BT % (N - 1) + 1))
    logit_BT = net.apply({"params": params}, first.history_BL, first.target_BT, tables(), method="logits")
    changed_BT = net.apply({"params": params}, other.history_BL, other.target_BT, tables(), method="logits")
    np.testing.assert_allclose(logit_BT[:, 0], changed_BT[:, 0], rtol=1e-6)
    assert not np.allclose(logit_BT[:, 1:], changed_BT[:, 1:])


def test_padding_of_history_changes_nothing(model):
    net, params = model
    history_BL = batch().history_BL
    item_BLD, user_BD = net.apply({"params": params}, history_BL, tables(), method="encode")
    wide_BL = np.pad(history_BL, [(0, 0), (0, 5)])
    wide_BLD, wide_BD = net.apply({"params": params}, wide_BL, tables(), method="encode")
    np.testing.assert_allclose(wide_BD, user_BD, atol=1e-6)
    np.testing.assert_allclose(wide_BLD[:, :L], item_BLD, atol=1e-6)
    np.testing.assert_array_equal(wide_BLD[:, L:], 0)


def test_empty_history_gives_zero_vector_and_finite_gradient(model):
    net, params = model
    _, user_BD = net.apply({"params": params}, batch().history_BL, tables(), method="encode")
    np.testing.assert_array_equal(user_BD[1], 0)
    loss = alignment.make_loss(net, WEIGHTS, axis_name=None)
    gradient = jax.grad(lambda p: loss(p, batch(), tables())[0])(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_missing_modalities_are_masked(model):
    """An item without an image, or without text, or without both gives finite values and gradients, and its missing
    features are not read."""
    net, params = model
    gaps = tables(missing=[("image", 3), ("text", 4), ("image", 5), ("text", 5)])
    row = batch()._replace(history_BL=np.tile(np.int32([3, 4, 5, 6, 0, 0, 0]), (4, 1)))
    loss = alignment.make_loss(net, WEIGHTS, axis_name=None)
    value, gradient = jax.value_and_grad(lambda p: loss(p, row, gaps)[0])(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    scribbled = gaps._replace(feature_NF=gaps.feature_NF | {"image": gaps.feature_NF["image"].at[3].set(9.0)})
    np.testing.assert_allclose(loss(params, row, scribbled)[0], value, rtol=1e-6)


def test_one_key_makes_attention_trivial():
    """A3.3: with a single position the softmax is 1, so query and key of Eq. 9 get no gradient."""
    net = encoder()
    one_BL = np.int32([[4]])
    params = net.init(jax.random.key(0), batch(), tables())["params"]
    gradient = jax.grad(lambda p: jnp.sum(net.apply({"params": p}, one_BL, tables(), method="encode")[1] ** 2))(params)
    np.testing.assert_allclose(gradient["modal_attention"]["to_query"]["kernel"], 0, atol=1e-7)
    assert np.abs(gradient["modal_attention"]["to_value"]["kernel"]).max() > 0


def test_without_residual_items_are_mixes_of_ids():
    """Eq. 11 as printed: with equal projected ids, text and image cannot tell two items apart."""
    net = encoder(residual=False)
    params = net.init(jax.random.key(0), batch(), tables())["params"]
    params = params | {"item": jnp.ones_like(params["item"])}
    vector_ND = net.apply({"params": params}, np.arange(1, N, dtype=np.int32), tables(), method="static")
    np.testing.assert_allclose(vector_ND, jnp.broadcast_to(vector_ND[:1], vector_ND.shape), atol=1e-5)


@pytest.mark.parametrize("modalities", [(), ("text",), ("image",), ("text", "image")])
def test_any_number_of_modalities_trains(modalities):
    net = encoder(modalities=modalities)
    params = net.init(jax.random.key(0), batch(), tables())["params"]
    loss = alignment.make_loss(net, WEIGHTS, axis_name=None)
    assert np.isfinite(loss(params, batch(), tables())[0])


def test_three_modalities_are_refused():
    with pytest.raises(ValueError, match="at most two"):
        encoder(modalities=("text", "image", "audio")).init(jax.random.key(0), batch(), tables())


def train(sign, lambda_, seed, steps=150):
    """The Stein loss alone (beta large) on projections of shared latents; returns the effective rank of the images."""
    rng = np.random.default_rng(seed)
    latent_NF = rng.normal(size=(N, F))
    feature = {name: jnp.asarray(latent_NF @ rng.normal(size=(F, F)), jnp.float32) for name in ("text", "image")}
    present = {name: jnp.arange(N) > 0 for name in ("text", "image")}
    shared = alignment.FeatureTables(feature, present)
    net = encoder(width=8)
    weights = WEIGHTS._replace(beta=1.0, lambda_=lambda_, entropy_sign=sign)
    loss = alignment.make_loss(net, weights, axis_name=None)
    data = batch()._replace(stein_item_N=np.arange(1, N, dtype=np.int32))
    params = net.init(jax.random.key(seed), data, shared)["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(lambda p: loss(p, data, shared)[0])(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return float(
        alignment.diagnostics(net, run(params), shared, np.arange(1, N, dtype=np.int32))["effective_rank_image"]
    )


@pytest.mark.parametrize("seed", range(5))
def test_dispersive_sign_spreads_and_printed_sign_contracts(seed):
    none = train(1.0, 0.0, seed)
    assert train(1.0, 0.1, seed) > none
    assert train(-1.0, 0.1, seed) < none


def test_diagnostics_of_known_spaces():
    """Identical modalities: L_align and recall are 1 and the gap is 0; an isotropic cloud has full effective rank."""
    net = encoder(width=4)
    rng = np.random.default_rng(0)
    feature_NF = jnp.asarray(rng.normal(size=(4000, 4)), jnp.float32)
    same = alignment.FeatureTables(
        dict.fromkeys(("text", "image"), feature_NF), {name: jnp.ones(4000, bool) for name in ("text", "image")}
    )
    net = encoder(n_items=4000, width=4, normalise=False)
    params = net.init(jax.random.key(0), batch(), same)["params"]
    eye = {"kernel": jnp.eye(4)}
    params = params | {"project_text": eye, "project_image": eye}
    out = alignment.diagnostics(net, params, same, np.arange(1, 1001, dtype=np.int32))
    assert float(out["l_align"]) == pytest.approx(1.0)
    assert float(out["matched_recall"]) == pytest.approx(1.0)
    assert float(out["modality_gap"]) == pytest.approx(0.0, abs=1e-6)
    assert float(out["effective_rank_image"]) == pytest.approx(4.0, abs=0.05)
