"""CTR backbones: padding changes nothing, and the attention equals its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marsjax.ctr import objective
from marsjax.ctr.activations import Activation
from marsjax.ctr.backbones import make_backbone
from marsjax.ctr.din import TargetAttention, masked_softmax
from marsjax.records import CtrBatch, ItemTables

N, G, U = 20, 4, 6
TABLES = ItemTables(np.random.default_rng(0).integers(0, G, (N, 2)).astype(np.int32) * (np.arange(N) > 0)[:, None])
SETTINGS = {
    "user_id": True,
    "embedding": 4,
    "tower": (8, 4),
    "attention": (6, 3),
    "softmax": True,
    "apart": False,
    "activation": "prelu",
}


def batch(b=5, length=7, seed=0):
    rng = np.random.default_rng(seed)
    history_BL = rng.integers(1, N, (b, length)).astype(np.int32)
    history_BL[0, 3:] = 0
    history_BL[1] = 0
    return CtrBatch(
        rng.integers(1, U, b).astype(np.int32),
        rng.integers(1, N, b).astype(np.int32),
        rng.integers(0, 2, b).astype(np.float32),
        np.ones(b, np.float32),
        history_BL,
        np.zeros_like(history_BL, bool),
    )


def build(**changes):
    model = make_backbone(SETTINGS | {"backbone": "din"} | changes, n_items=N, n_categories=G, n_users=U)
    variables = objective.init_model(model, TABLES, seed=0)
    # Statistics and slopes away from their start, so that a wrong use of them shows.
    return model, jax.tree.map(lambda leaf: leaf + 0.1, variables)


ALL = [
    {"backbone": backbone, "activation": activation, "softmax": softmax, "user_id": user_id, "apart": not user_id}
    for backbone, softmax in (("din", True), ("din", False), ("dnn", True))
    for activation in ("prelu", "dice")
    for user_id in (True, False)
]


@pytest.mark.parametrize("changes", ALL)
def test_padding_changes_nothing(changes):
    """Neither longer histories nor more rows of weight 0 change a logit, in training or in evaluation."""
    model, variables = build(**changes)
    small = batch()
    large = CtrBatch(
        *(np.pad(leaf, [(0, 3)] + ([(0, 4)] if leaf.ndim == 2 else []), constant_values=0) for leaf in small)
    )
    for train in (False, True):
        kwargs = {"train": train, "mutable": ["statistics"]}
        (small_B, small_state), (large_B, large_state) = (
            model.apply(variables, each, TABLES, **kwargs) for each in (small, large)
        )
        np.testing.assert_allclose(large_B[:5], small_B, atol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), small_state, large_state)


@pytest.mark.parametrize("changes", ALL)
def test_history_order_does_not_matter(changes):
    model, variables = build(**changes)
    small = batch()
    turned = small._replace(history_BL=small.history_BL[:, ::-1])
    first_B, second_B = (model.apply(variables, each, TABLES, train=False) for each in (small, turned))
    np.testing.assert_allclose(first_B, second_B, atol=1e-5)


@pytest.mark.parametrize("changes", ALL)
def test_empty_histories_have_finite_gradients(changes):
    model, variables = build(**changes)
    empty = batch()._replace(history_BL=np.zeros((5, 7), np.int32))
    loss = objective.make_loss(model, axis_name=None)
    gradient = jax.grad(lambda p: loss(p, variables["statistics"], empty, TABLES, jax.random.key(0)).loss)(
        variables["params"]
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_attention_equals_mlp_over_concatenated_input():
    """The folded first layer is the MLP over [t, h, t - h, t * h] that DIN defines."""
    rng = np.random.default_rng(1)
    target_BD, history_BLD = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 8), (3, 5, 8)))
    module = TargetAttention((6, 3), "prelu")
    variables = module.init(jax.random.key(0), target_BD, history_BLD, jnp.ones((3, 5)), train=False)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, variables["params"])
    found_BL = module.apply({"params": params}, target_BD, history_BLD, jnp.ones((3, 5)), train=False)

    def prelu(x, name):
        return np.where(x >= 0, x, params[name]["alpha"] * x)

    target_BD, history_BLD = np.asarray(target_BD), np.asarray(history_BLD)
    t_BLD = np.broadcast_to(target_BD[:, None], history_BLD.shape)
    x = np.concatenate([t_BLD, history_BLD, t_BLD - history_BLD, t_BLD * history_BLD], axis=-1)
    x = prelu(x @ params["kernel"] + params["bias"], "Activation_0")
    x = prelu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], "Activation_1")
    expected_BL = (x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])[..., 0]
    np.testing.assert_allclose(found_BL, expected_BL, rtol=1e-4, atol=1e-5)


def test_masked_softmax():
    logit_BL = jnp.asarray([[1.0, 2.0, 500.0], [0.0, 0.0, 0.0], [-jnp.inf, 3.0, 1e4]])
    mask_BL = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    e = np.exp(1.0)
    expected = [[1 / (1 + e), e / (1 + e), 0], [0, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(masked_softmax(logit_BL, mask_BL), expected, atol=1e-6)


def test_repeating_a_history_leaves_softmax_attention_alone():
    """Why repeated padding cannot change a softmax DIN, while it scales a sum-pooled one."""
    small = batch()._replace(history_BL=batch().history_BL[:, :3], borrowed_BL=np.zeros((5, 3), bool))
    twice = small._replace(history_BL=np.tile(small.history_BL, 2), borrowed_BL=np.zeros((5, 6), bool))
    for softmax, same in ((True, True), (False, False)):
        model, variables = build(softmax=softmax)
        first_B, second_B = (model.apply(variables, each, TABLES, train=False) for each in (small, twice))
        assert np.allclose(first_B, second_B, atol=1e-5) == same


def test_dice_normalises_by_valid_entries():
    """p = sigmoid((x - mean) / std) over the entries of weight 1; x (p + (1 - p) alpha) with alpha 0 at the start."""
    x_BD = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    weight_B = np.float32([1, 1, 1, 1, 0, 0])
    x_BD[4:] = 100.0
    module = Activation("dice")
    variables = module.init(jax.random.key(0), x_BD, weight_B, train=False)
    found_BD, state = module.apply(variables, x_BD, weight_B, train=True, mutable=["statistics"])
    mean_D, variance_D = x_BD[:4].mean(axis=0), x_BD[:4].var(axis=0)
    gate_BD = 1 / (1 + np.exp(-(x_BD[:4] - mean_D) / np.sqrt(variance_D + 1e-8)))
    np.testing.assert_allclose(found_BD[:4], x_BD[:4] * gate_BD, rtol=1e-4)
    np.testing.assert_allclose(state["statistics"]["mean"], 0.01 * mean_D, rtol=1e-4)
    np.testing.assert_allclose(state["statistics"]["variance"], 0.99 + 0.01 * variance_D, rtol=1e-4)


def test_loss_is_mean_cross_entropy_over_weighted_rows():
    model, variables = build()
    rows = batch()._replace(weight_B=np.float32([1, 1, 0, 1, 1]))
    logit_B = np.asarray(model.apply(variables, rows, TABLES, train=True, mutable=["statistics"])[0], np.float64)
    p_B = 1 / (1 + np.exp(-logit_B))
    row_B = -(rows.label_B * np.log(p_B) + (1 - rows.label_B) * np.log(1 - p_B))
    loss = objective.make_loss(model, axis_name=None)
    share = loss(variables["params"], variables["statistics"], rows, TABLES, jax.random.key(0))
    np.testing.assert_allclose(share.loss, row_B[[0, 1, 3, 4]].mean(), rtol=1e-5)


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="din.*dnn.*found 'mlp'"):
        build(backbone="mlp")
