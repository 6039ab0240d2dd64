"""NT-Xent: the definition, what padding and the number of devices change (nothing), and what could be NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marsjax.ctr.contrastive import nt_xent

B, D = 8, 5


def views(seed=0, padded=(2, 7)):
    rng = np.random.default_rng(seed)
    first_BD, second_BD = (rng.normal(size=(B, D)).astype(np.float32) for _ in range(2))
    weight_B = np.float32(~np.isin(np.arange(B), padded))
    return first_BD, second_BD, weight_B


def by_hand(first_BD, second_BD, weight_B, temperature, similarity):
    """One anchor and one negative at a time, over the valid rows alone."""
    keep_B = np.asarray(weight_B) > 0
    view_VD = np.concatenate([np.asarray(first_BD)[keep_B], np.asarray(second_BD)[keep_B]]).astype(np.float64)
    n = keep_B.sum()
    losses = []
    for anchor in range(2 * n):
        raised = {}
        for other in range(2 * n):
            product = view_VD[anchor] @ view_VD[other]
            if similarity == "cosine":
                product /= np.linalg.norm(view_VD[anchor]) * np.linalg.norm(view_VD[other])
            if other != anchor:
                raised[other] = np.exp(product / temperature)
        losses.append(-np.log(raised[(anchor + n) % (2 * n)] / sum(raised.values())))
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_equals_the_definition(similarity, temperature):
    options = {"temperature": temperature, "similarity": similarity}
    found = nt_xent(*views(), **options, axis_name=None)
    np.testing.assert_allclose(found, by_hand(*views(), **options), rtol=1e-5)


def test_two_rows_worked_out():
    """Rows (1, 0) and (0, 1), both views alike: each view sees its partner at product 1 and two others at 0."""
    view_BD = jnp.eye(2)
    found = nt_xent(view_BD, view_BD, jnp.ones(2), temperature=1.0, similarity="dot", axis_name=None)
    assert float(found) == pytest.approx(np.log((np.e + 2) / np.e))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_padding_changes_nothing_whatever_it_holds(similarity):
    first_BD, second_BD, weight_B = views(padded=())
    share = functools.partial(nt_xent, temperature=0.5, similarity=similarity, axis_name=None)
    loss = jax.jit(jax.value_and_grad(share, (0, 1)))
    value, gradients = loss(first_BD, second_BD, weight_B)
    for rubbish in (0.0, 1e4, np.nan):
        pad = lambda x, fill=rubbish: np.insert(x, [0, 3, B], fill, axis=0)  # noqa: E731
        padded, padded_gradients = loss(pad(first_BD), pad(second_BD), pad(weight_B, 0))
        np.testing.assert_allclose(padded, value, rtol=1e-6)
        for found, expected in zip(padded_gradients, gradients, strict=True):
            np.testing.assert_allclose(found, pad(expected, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_order_of_rows_and_of_views_changes_nothing(similarity):
    first_BD, second_BD, weight_B = views()
    options = {"temperature": 0.5, "similarity": similarity, "axis_name": None}
    value = nt_xent(first_BD, second_BD, weight_B, **options)
    order = np.random.default_rng(1).permutation(B)
    np.testing.assert_allclose(nt_xent(first_BD[order], second_BD[order], weight_B[order], **options), value, rtol=1e-5)
    np.testing.assert_allclose(nt_xent(second_BD, first_BD, weight_B, **options), value, rtol=1e-5)


@pytest.mark.parametrize("padded", [(2, 7), (0, 1, 5), tuple(range(1, B))])
@pytest.mark.parametrize("n_devices", [2, 4])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_shares_of_several_devices_add_up_to_the_loss_of_one(similarity, n_devices, padded):
    """Value and gradients; a whole device may hold padding."""
    first_BD, second_BD, weight_B = views(padded=padded)
    options = {"temperature": 0.5, "similarity": similarity}

    def several(first_BD, second_BD):
        split = lambda x: jnp.reshape(x, (n_devices, -1, *x.shape[1:]))  # noqa: E731
        share = lambda *part: nt_xent(*part, **options, axis_name="device")  # noqa: E731
        return jnp.sum(jax.vmap(share, axis_name="device")(split(first_BD), split(second_BD), split(weight_B)))

    one = jax.jit(jax.value_and_grad(lambda *pair: nt_xent(*pair, weight_B, **options, axis_name=None), (0, 1)))
    value, gradients = one(first_BD, second_BD)
    found, found_gradients = jax.jit(jax.value_and_grad(several, (0, 1)))(first_BD, second_BD)
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    for part, whole in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-6)


def test_real_devices_agree_as_a_step_adds_them_up():
    """Gradients of parameters, by shard_map over the host devices: the sum of the shares' gradients."""
    first_BD, second_BD, weight_B = views()
    kernel_DD = np.random.default_rng(3).normal(size=(D, D)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("device",), axis_types=(jax.sharding.AxisType.Auto,))

    def share(kernel_DD, first_BD, second_BD, weight_B, *, axis_name):
        views_BD = first_BD @ kernel_DD, second_BD @ kernel_DD
        return nt_xent(*views_BD, weight_B, temperature=0.5, similarity="cosine", axis_name=axis_name)

    def of_device(*arguments):
        return jax.lax.psum(jax.value_and_grad(share)(*arguments, axis_name="device"), "device")

    rows = jax.P("device")
    specs = {"in_specs": (jax.P(), rows, rows, rows), "out_specs": jax.P(), "check_vma": False}
    several = jax.jit(jax.shard_map(of_device, mesh=mesh, **specs))
    value, gradient_DD = several(kernel_DD, first_BD, second_BD, weight_B)
    expected, expected_DD = jax.value_and_grad(share)(kernel_DD, first_BD, second_BD, weight_B, axis_name=None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient_DD, expected_DD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [tuple(range(B)), tuple(range(1, B))])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_without_negatives_the_loss_and_its_gradient_are_zero(similarity, padded):
    first_BD, second_BD, weight_B = views(padded=padded)
    value, gradient_BD = jax.value_and_grad(nt_xent)(
        first_BD, second_BD, weight_B, temperature=0.1, similarity=similarity, axis_name=None
    )
    assert float(value) == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(gradient_BD, 0.0, atol=1e-6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_zero_vectors_have_finite_gradients(similarity):
    first_BD, second_BD, weight_B = views()
    first_BD[:2] = second_BD[0] = 0.0
    value, gradient_BD = jax.value_and_grad(nt_xent)(
        first_BD, second_BD, weight_B, temperature=0.1, similarity=similarity, axis_name=None
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient_BD).all()


def test_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match="similarity: expected one of .*'cosine', 'dot'.* found 'l2'"):
        nt_xent(*views(), temperature=1.0, similarity="l2", axis_name=None)
