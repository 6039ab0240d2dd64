"""CTR backbones: padding changes nothing, and the attention equals its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from marsjax.ctr import din, objective
from marsjax.ctr.activations import Activation, dice_of_batch
from marsjax.ctr.backbones import make_backbone
from marsjax.ctr.din import TargetAttention, masked_softmax
from marsjax.ctr.items import content_table
from marsjax.products import dense_dot_general, entries_by_matrix, rows_by_matrices
from marsjax.records import CtrBatch, Items, ItemTables, Modality
from marsjax.training.step import init_variables

N, G, U = 20, 4, 6
J = 3
TABLES = ItemTables(
    np.random.default_rng(0).integers(0, G, (N, 2)).astype(np.int32) * (np.arange(N) > 0)[:, None],
    np.random.default_rng(2).normal(size=(N, 5)).astype(np.float32),
)
SETTINGS = {
    "user_id": True,
    "inputs": "strong",
    "content": 3,
    "embedding": 4,
    "tower": (8, 4),
    "attention": (6, 3),
    "softmax": True,
    "apart": False,
    "activation": "prelu",
    "dtype": "float32",
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
        (rng.integers(0, 3, (b, length)) * (history_BL > 0)).astype(np.int8),
        rng.normal(size=(b, J)).astype(np.float32),
    )


def build(**changes):
    model = make_backbone(SETTINGS | {"backbone": "din"} | changes, n_items=N, n_categories=G, n_users=U, n_features=5)
    variables = objective.init_model(model, TABLES, seed=0, dense=J)
    # Statistics and slopes away from their start, so that a wrong use of them shows.
    return model, jax.tree.map(lambda leaf: leaf + 0.1, variables)


def test_parameters_are_drawn_by_a_program_that_is_compiled_once():
    def drawn(seed):
        model = make_backbone(SETTINGS | {"backbone": "dnn"}, n_items=N, n_categories=G, n_users=U, n_features=5)
        return objective.init_model(model, TABLES, seed=seed, dense=J)

    one, compiled = drawn(0), init_variables._cache_size()
    other = drawn(1)
    assert init_variables._cache_size() == compiled
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    jax.tree.map(np.testing.assert_array_equal, one, drawn(0))


ALL = [
    {"backbone": backbone, "activation": activation, "softmax": softmax, "user_id": user_id, "apart": not user_id,
     "inputs": inputs}
    for backbone, softmax in (("din", True), ("din", False), ("dnn", True))
    for activation in ("prelu", "dice")
    for user_id, inputs in ((True, "strong"), (False, "ids"))
]  # fmt: skip


def dtypes_in(jaxpr):
    """Of what the matrix products read, wherever they stand."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found += [str(value.aval.dtype) for value in equation.invars]
        for inner in jaxprs_in_params(equation.params):
            found += dtypes_in(inner)
    return found


@pytest.mark.parametrize("activation", ["prelu", "dice"])
@pytest.mark.parametrize("backbone", ["din", "dnn"])
def test_half_precision_multiplies_in_it_and_keeps_float32_around(backbone, activation):
    """Products read bfloat16, save the projection of the content; parameters, statistics and logits are float32."""
    half, variables = build(backbone=backbone, activation=activation, dtype="bfloat16")
    full, same = build(backbone=backbone, activation=activation)
    jax.tree.map(np.testing.assert_array_equal, variables, same)

    def loss(params, model):
        share = objective.make_loss(model, axis_name=None)(params, variables["statistics"], batch(), TABLES, None)
        return share.loss, share

    gradients, shares = {}, {}
    for name, model in (("half", half), ("full", full)):
        gradients[name], shares[name] = jax.grad(loss, has_aux=True)(variables["params"], model)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves((gradients[name], shares[name]))} == {"float32"}
    np.testing.assert_allclose(shares["half"].loss, shares["full"].loss, rtol=2e-2)
    assert shares["half"].loss != shares["full"].loss
    for one, other in zip(*(jax.tree.leaves(gradients[name]) for name in ("half", "full")), strict=True):
        assert np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(other) + 1e-3
    read = dtypes_in(jax.make_jaxpr(lambda params: loss(params, half)[0])(variables["params"]).jaxpr)
    assert read.count("float32") == 2
    assert read.count("bfloat16") >= 6


@pytest.mark.parametrize("changes", ALL)
def test_padding_changes_nothing(changes):
    """Neither longer histories nor more rows of weight 0 change a logit, in training or in evaluation."""
    model, variables = build(**changes)
    small = batch()
    large = CtrBatch(
        *(
            np.pad(leaf, [(0, 3)] + ([(0, 4 * (name != "dense_BJ"))] if leaf.ndim == 2 else []), constant_values=0)
            for name, leaf in small._asdict().items()
            if leaf is not None
        )
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
    turned = small._replace(history_BL=small.history_BL[:, ::-1], feedback_BL=small.feedback_BL[:, ::-1])
    first_B, second_B = (model.apply(variables, each, TABLES, train=False) for each in (small, turned))
    np.testing.assert_allclose(first_B, second_B, atol=1e-5)


@pytest.mark.parametrize("backbone", ["din", "dnn"])
@pytest.mark.parametrize("field", ["feedback_BL", "dense_BJ"])
def test_strong_inputs_are_read_and_ids_ignores_the_marks(backbone, field):
    moved = batch()._replace(**{field: getattr(batch(seed=3), field)})
    for inputs, reads in (("strong", True), ("ids", field == "dense_BJ")):
        model, variables = build(backbone=backbone, inputs=inputs)
        first_B, second_B = (model.apply(variables, each, TABLES, train=False) for each in (batch(), moved))
        assert (np.abs(first_B - second_B)[2:] > 1e-6).any() == reads


def test_content_is_read_by_strong_models_only():
    other = TABLES._replace(feature_NF=-TABLES.feature_NF)
    for inputs in ("strong", "ids"):
        model, variables = build(inputs=inputs)
        first_B, second_B = (model.apply(variables, batch(), each, train=False) for each in (TABLES, other))
        assert (np.abs(first_B - second_B) > 1e-6).any() == (inputs == "strong")


def test_content_table_is_white_and_centred():
    rng = np.random.default_rng(0)
    present_N = np.arange(30) > 2
    feature_NF = rng.normal(size=(30, 6)).astype(np.float32) * np.arange(1, 7) * present_N[:, None]
    items = Items(np.arange(30).astype(str), None, None, (), {"text": Modality(feature_NF, present_N)})
    table_NF = content_table(items, components=4)
    np.testing.assert_allclose(table_NF.T @ table_NF / 30, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(table_NF[:3], 0, atol=1e-5)
    # The components are those of largest variance: the six columns have standard deviations 1 to 6.
    moved_NF = (feature_NF - feature_NF[present_N].mean(axis=0)) * present_N[:, None]
    kept = np.linalg.norm(table_NF.T @ moved_NF / 30)  # of whitened components: the root of their variances
    np.testing.assert_allclose(kept, np.linalg.norm(np.linalg.svd(moved_NF)[1][:4] / np.sqrt(30)), rtol=1e-5)
    assert content_table(items._replace(modalities={}), components=4).shape == (30, 0)


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
    whole = batch()
    small = whole._replace(
        history_BL=whole.history_BL[:, :3], borrowed_BL=np.zeros((5, 3), bool), feedback_BL=whole.feedback_BL[:, :3]
    )
    twice = small._replace(
        history_BL=np.tile(small.history_BL, 2),
        borrowed_BL=np.zeros((5, 6), bool),
        feedback_BL=np.tile(small.feedback_BL, 2),
    )
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


def dice_as_written(x_BLD, weight_BL, alpha_D):
    """Zhou et al., Eq. 3 and 4, with the mean and variance of the entries of weight 1."""
    count = jnp.maximum(weight_BL.sum(), 1.0)
    mean_D = (x_BLD * weight_BL[..., None]).sum((0, 1)) / count
    variance_D = ((x_BLD - mean_D[None, None]) ** 2 * weight_BL[..., None]).sum((0, 1)) / count
    gate_BLD = jax.nn.sigmoid((x_BLD - mean_D[None, None]) / jnp.sqrt(variance_D + 1e-8)[None, None])
    return x_BLD * (gate_BLD + (1 - gate_BLD) * alpha_D[None, None]), mean_D, variance_D


@pytest.mark.parametrize("weights", ["some", "none"])
def test_dice_and_its_gradient_are_those_of_its_equations(weights):
    rng = np.random.default_rng(0)
    x_BLD = jnp.asarray(rng.normal(0.5, 2.0, (5, 7, 3)).astype(np.float32))
    weight_BL = jnp.asarray((rng.random((5, 7)) < (0.6 if weights == "some" else 0.0)).astype(np.float32))
    alpha_D, of_y_BLD = jnp.float32([0.0, 0.3, -0.2]), jnp.asarray(rng.normal(size=(5, 7, 3)).astype(np.float32))
    if weights == "none":
        x_BLD *= 1e-4  # the scale is 1e4: gates that are neither open nor closed

    def loss(of, *values):
        return jnp.sum(of(*values)[0] * of_y_BLD)

    found, expected = (
        (
            of(x_BLD, weight_BL, alpha_D),
            jax.grad(lambda x, alpha, of=of: loss(of, x, weight_BL, alpha), (0, 1))(x_BLD, alpha_D),
        )
        for of in (lambda *values: dice_of_batch(*values, None), dice_as_written)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "width"), [(6, 4), (4, 6), (3, 1)])
def test_products_have_the_gradients_of_their_equations(depth, width):
    rng = np.random.default_rng(0)
    x_BLD, of_y_BLA = (jnp.asarray(rng.normal(size=(3, 5, size)).astype(np.float32)) for size in (depth, width))
    matrix_BDA = jnp.asarray(rng.normal(size=(3, depth, width)).astype(np.float32))
    for found, expected, matrix in (
        (entries_by_matrix, "bld,da->bla", matrix_BDA[0]),
        (rows_by_matrices, "bld,bda->bla", matrix_BDA),
    ):
        value, gradients = jax.vjp(found, x_BLD, matrix)
        value_then, gradients_then = jax.vjp(lambda x, m, expected=expected: jnp.einsum(expected, x, m), x_BLD, matrix)
        np.testing.assert_allclose(value, value_then, rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients(of_y_BLA), gradients_then(of_y_BLA), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_product_that_no_dense_asks_for_is_refused():
    with pytest.raises(ValueError, match="expected the product of a Dense"):
        dense_dot_general(jnp.ones((2, 3)), jnp.ones((2, 3)), (((0,), (0,)), ((), ())))


def test_loss_is_mean_cross_entropy_over_weighted_rows():
    model, variables = build()
    rows = batch()._replace(weight_B=np.float32([1, 1, 0, 1, 1]))
    logit_B = np.asarray(model.apply(variables, rows, TABLES, train=True, mutable=["statistics"])[0], np.float64)
    p_B = 1 / (1 + np.exp(-logit_B))
    row_B = -(rows.label_B * np.log(p_B) + (1 - rows.label_B) * np.log(1 - p_B))
    loss = objective.make_loss(model, axis_name=None)
    share = loss(variables["params"], variables["statistics"], rows, TABLES, jax.random.key(0))
    np.testing.assert_allclose(share.loss, row_B[[0, 1, 3, 4]].mean(), rtol=1e-5)


@pytest.mark.parametrize("backbone", ["din", "dnn"])
def test_an_unknown_user_is_one_whose_vector_is_zero(backbone):
    model, variables = build(backbone=backbone)
    rows = batch()
    table = variables["params"]["users"]["table"]
    assert (table[0] != 0).all()
    known = table.at[3].set(0.0)
    logits = [
        model.apply({**variables, "params": {**variables["params"], "users": {"table": users}}},
                    rows._replace(user_B=np.full(5, user, np.int32)), TABLES, train=False)
        for users, user in ((table, 0), (known, 3), (table, 3))
    ]  # fmt: skip
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(np.asarray(logits[0]) - np.asarray(logits[2])).max() > 1e-3


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="din.*dnn.*found 'mlp'"):
        build(backbone="mlp")


@pytest.mark.parametrize("changes", [{}, {"apart": True, "softmax": False}, {"attention": (6,)}])
def test_attention_trained_in_parts_is_the_attention(changes, monkeypatch):
    """The loss and all gradients, and one part of the rows is all that is ever there of [B, L, A]."""
    _, variables = build(**changes)
    rows = batch(96)
    rows = rows._replace(
        borrowed_BL=(np.random.default_rng(1).random(rows.history_BL.shape) < 0.3) & (rows.history_BL > 0),
        weight_B=(np.arange(96) < 90).astype(np.float32),
    )

    def trained():
        loss = objective.make_loss(build(**changes)[0], axis_name=None)
        gradient = jax.value_and_grad(
            lambda params: loss(params, variables["statistics"], rows, TABLES, jax.random.key(0)).loss
        )
        return jax.jit(gradient)(variables["params"]), str(jax.make_jaxpr(gradient)(variables["params"]))

    at_once, program = trained()
    assert "96,7,6" in program
    monkeypatch.setattr(din, "SEVERAL", din.Parts(32, 0))
    monkeypatch.setattr(din, "ONE_PROCESSOR", din.Parts(32, 0))
    in_parts, program = trained()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), at_once, in_parts)
    assert "96,7,6" not in program
    assert "32,7,6" in program


def test_rows_go_through_the_attention_together_where_parts_would_not_help(monkeypatch):
    def rows_of(rows, length):
        return din.rows_at_a_time(jnp.zeros((rows, length, 2)), 32)

    monkeypatch.setattr(din, "processors", lambda: [3])
    assert rows_of(512, 200) == 32
    assert rows_of(512, 8) == 512  # small enough
    assert rows_of(8200, 200) == 8200  # parts would be of 8 rows
    monkeypatch.setattr(din, "processors", lambda: [0, 3])
    assert rows_of(512, 200) == 512  # two processors would wait for each other
    assert rows_of(8192, 200) == 128
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows_of(8192, 200) == 8192
