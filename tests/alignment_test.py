"""The alignment stage: the equations, no leakage, padding, missing modalities, what the sign of the entropy does."""

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


GAPS = [("image", 3), ("text", 4), ("image", 5), ("text", 5)]
WEIGHTS = alignment.AlignmentLoss(beta=0.1, lambda_=0.1, entropy_sign=1.0, eta=0.1, estimator="stein")


class Equations:
    """Eqs. 3-4 and 9-13 in float64 NumPy, for one history without padding at a time."""

    def __init__(self, params, data, *, normalise, residual):
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.data, self.normalise, self.residual = jax.tree.map(np.asarray, data), normalise, residual

    def project(self, name, item):
        """Eq. 3; None where the item lacks the modality."""
        if not self.data.present_N[name][item]:
            return None
        emb_D = self.data.feature_NF[name][item] @ self.params[f"project_{name}"]["kernel"]
        return emb_D / np.sqrt((emb_D**2).mean()) if self.normalise else emb_D

    def attend(self, name, query_TD, key_LD):
        """softmax(Q K^T / sqrt(d)) V; zero without keys."""
        query, key, value = (self.params[name][f"to_{part}"]["kernel"] for part in ("query", "key", "value"))
        if not len(key_LD):
            return np.zeros((len(query_TD), value.shape[1]))
        exp_TL = np.exp((query_TD @ query) @ (key_LD @ key).T / np.sqrt(key.shape[1]))
        return exp_TL / exp_TL.sum(axis=1, keepdims=True) @ (key_LD @ value)

    def layer_norm(self, name, x_TD):
        centred_TD = x_TD - x_TD.mean(axis=1, keepdims=True)
        unit_TD = centred_TD / np.sqrt((centred_TD**2).mean(axis=1, keepdims=True) + 1e-6)
        return unit_TD * self.params[name]["scale"] + self.params[name]["bias"]

    def fused(self, items, text_items):
        """Eqs. 9-10: images are the queries, the texts of `text_items` are keys and values."""
        width = self.params["project_text"]["kernel"].shape[1]
        image = [self.project("image", item) for item in items]
        query_TD = np.stack([np.zeros(width) if emb_D is None else emb_D for emb_D in image])
        key_LD = [emb_D for item in text_items if (emb_D := self.project("text", item)) is not None]
        return self.layer_norm("fuse_norm", query_TD + self.attend("modal_attention", query_TD, np.array(key_LD)))

    def items(self, fused_TD, history):
        """Eq. 4, then Eq. 11."""
        id_LD = self.params["item"][history]
        attended_TD = self.attend("id_attention", fused_TD, self.attend("self_attention", id_LD, id_LD))
        return self.layer_norm("residual_norm", fused_TD + attended_TD) if self.residual else attended_TD

    def encode(self, history):
        return self.items(self.fused(history, history), history)

    def logit(self, history, target):
        """Eq. 12; the target attends to its own text and to the ids of the history."""
        item_1D = self.items(self.fused([target], [target]), history)
        x, y = (self.params[name] for name in ("score_hidden", "score_out"))
        hidden_1D = np.asarray(jax.nn.gelu(item_1D @ x["kernel"] + x["bias"]))
        return (hidden_1D @ y["kernel"] + y["bias"])[0, 0]


def moved(params, seed=0):
    """Parameters away from their start: ids that attention tells apart, norms that scale and shift."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_encoder_equals_the_equations(normalise, residual):
    net = encoder(normalise=normalise, residual=residual)
    data, rows = tables(missing=GAPS), batch()
    rows.history_BL[2] = [3, 9, 4, 5, 3, 0, 0]
    rows.target_BT[2] = [3, 4, 5]
    params = moved(jax.jit(net.init)(jax.random.key(0), rows, data)["params"])

    @jax.jit
    def run(params):
        apply = lambda method, *arguments: net.apply({"params": params}, *arguments, data, method=method)  # noqa: E731
        static_ND = apply("static", jnp.arange(N))
        return *apply("encode", rows.history_BL), static_ND, apply("logits", rows.history_BL, rows.target_BT)

    item_BLD, user_BD, static_ND, logit_BT = run(params)
    by_hand = Equations(params, data, normalise=normalise, residual=residual)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for row, padded_L in enumerate(rows.history_BL):
        history = padded_L[padded_L > 0]
        if len(history):
            expected_LD = by_hand.encode(history)
            np.testing.assert_allclose(item_BLD[row, : len(history)], expected_LD, **close)
            np.testing.assert_allclose(user_BD[row], expected_LD.mean(axis=0), **close)  # Eq. 13
            expected_T = [by_hand.logit(history, target) for target in rows.target_BT[row]]
            np.testing.assert_allclose(logit_BT[row], expected_T, **close)
    np.testing.assert_allclose(static_ND[1:], [by_hand.encode([item])[0] for item in range(1, N)], **close)


def test_modality_vectors_lie_on_a_sphere(model):
    """With `normalise` the root mean square is 1 whatever the scale of the features; absent vectors are zero."""
    data = tables(missing=GAPS)
    data = data._replace(feature_NF=data.feature_NF | {"image": 50 * data.feature_NF["image"]})
    net, params = model
    emb_ND, present_N = net.apply({"params": params}, "image", jnp.arange(N), data, method="modality")
    np.testing.assert_array_equal(present_N, ~np.isin(np.arange(N), [0, 3, 5]))
    np.testing.assert_allclose(np.sqrt((np.asarray(emb_ND) ** 2).mean(axis=1)), present_N, rtol=1e-4)


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
    gaps = tables(missing=GAPS)
    row = batch()._replace(history_BL=np.tile(np.int32([3, 4, 5, 6, 0, 0, 0]), (4, 1)))
    loss = alignment.make_loss(net, WEIGHTS, axis_name=None)
    value, gradient = jax.value_and_grad(lambda p: loss(p, row, gaps)[0])(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    scribbled = gaps._replace(feature_NF=gaps.feature_NF | {"image": gaps.feature_NF["image"].at[3].set(9.0)})
    np.testing.assert_allclose(loss(params, row, scribbled)[0], value, rtol=1e-6)


def test_nothing_is_learnt_through_vectors(model):
    """Tables for encoding have no features, whose projection would get no gradient."""
    net, params = model
    made = tables()._replace(vector_ND={"text": jnp.zeros((N, 16)), "image": jnp.zeros((N, 16))})
    loss = alignment.make_loss(net, WEIGHTS, axis_name=None)
    with pytest.raises(ValueError, match="expected tables of features, found vectors"):
        loss(params, batch(), made)


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


def test_diagnostics_by_hand():
    """Three items with both modalities, projected by the identity; item 4 has no text, item 0 is padding."""
    text_NF = np.float32([[9, 9], [2, 0], [0, 3], [-3, 0], [0, 0]])
    image_NF = np.float32([[9, 9], [0, 4], [0, 5], [-1, 0], [5, 5]])
    present = {"text": np.array([0, 1, 1, 1, 0], bool), "image": np.array([0, 1, 1, 1, 1], bool)}
    data = alignment.FeatureTables({"text": text_NF, "image": image_NF}, present)
    eye = {"kernel": jnp.eye(2)}
    params = {"item": jnp.zeros((5, 8)), "project_text": eye, "project_image": eye}
    net = encoder(n_items=5, width=2, normalise=False)
    out = alignment.diagnostics(net, params, data, np.int32([1, 2, 3, 4, 0]))
    # Squared distances of texts on the unit circle: right angles and a half turn. The images: 0, 90 and 45 degrees.
    e, root2 = np.exp, np.sqrt(2)
    assert float(out["uniformity_text"]) == pytest.approx(np.log((2 * e(-4) + e(-8)) / 3), rel=1e-5)
    images = 1 + 2 * e(-4) + 2 * e(-2 * (2 - root2)) + e(-2 * (2 + root2))
    assert float(out["uniformity_image"]) == pytest.approx(np.log(images / 6), rel=1e-5)
    # Means on the unit circle: texts (0, 1) / 3, the images of the same items (-1, 2) / 3.
    assert float(out["modality_gap"]) == pytest.approx(root2 / 3, rel=1e-5)
    # Squared distances, images by texts: 20 1 25, 29 4 34, 9 10 4. So the nearest texts are 2, 2, 3 (and the nearest
    # images 3, 1, 3); the median is 10, and the matched pairs are at 20, 4, 4.
    assert float(out["matched_recall"]) == pytest.approx(2 / 3)
    assert float(out["gamma"]) == pytest.approx(np.sqrt(10), rel=1e-5)
    assert float(out["l_align"]) == pytest.approx((e(-1) + 2 * e(-0.2)) / 3, rel=1e-5)
    # The images' covariance over its trace has eigenvalues p and 1 - p: the rank is the exponential of their entropy.
    p, q = np.linalg.eigvalsh(np.cov(image_NF[1:].T)) / np.trace(np.cov(image_NF[1:].T))
    assert float(out["effective_rank_image"]) == pytest.approx(e(-p * np.log(p) - q * np.log(q)), rel=1e-4)
