"""The score estimators against the true scores of Gaussians, and their exact properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marsjax import stein

ESTIMATORS = {"stein": stein.stein_score, "ssge": stein.ssge_score}


def gaussian(n, d, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), jnp.float32)


def relative_error(score_ND, x_ND):
    """Against the score of a standard Gaussian, which is -x."""
    return float(jnp.linalg.norm(score_ND + x_ND) / jnp.linalg.norm(x_ND))


@pytest.mark.parametrize(("width", "expected"), [(2, 0.30), (8, 0.38), (64, 0.41)])
def test_error_against_true_score_of_gaussian(width, expected):
    """The errors that numpy in float64 gives at N = 512, eta = 0.1 (three seeds)."""
    ones = jnp.ones(512, bool)
    errors = []
    for seed in range(3):
        x_ND = gaussian(512, width, seed)
        errors.append(relative_error(stein.stein_score(x_ND, ones), x_ND))
    np.testing.assert_allclose(np.mean(errors), expected, atol=0.03)


@pytest.mark.parametrize("width", [2, 8, 64])
def test_spectral_estimator_beats_predicting_zero(width):
    x_ND = gaussian(512, width)
    assert relative_error(stein.ssge_score(x_ND, jnp.ones(512, bool)), x_ND) < 0.6


def test_equals_direct_formula():
    """S = -(K + eta I)^-1 gamma^-2 (diag(K 1) - K) X, written out in float64."""
    x_ND = np.asarray(gaussian(40, 3), np.float64)
    square_NN = ((x_ND[:, None] - x_ND[None]) ** 2).sum(-1)
    off_diagonal = np.sort(square_NN[~np.eye(40, dtype=bool)])
    gamma2 = off_diagonal[(len(off_diagonal) - 1) // 2]
    kernel_NN = np.exp(-square_NN / (2 * gamma2))
    # Sum over j of grad_{x_j} k(x_i, x_j) = K_ij (x_i - x_j) / gamma^2, one pair at a time.
    drift_ND = np.stack([sum(kernel_NN[i, j] * (x_ND[i] - x_ND[j]) for j in range(40)) for i in range(40)]) / gamma2
    expected_ND = -np.linalg.solve(kernel_NN + 0.1 * np.eye(40), drift_ND)
    found_ND = stein.stein_score(jnp.asarray(x_ND, jnp.float32), jnp.ones(40, bool), eta=0.1)
    np.testing.assert_allclose(found_ND, expected_ND, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_translation_invariance(name):
    x_ND, ones = gaussian(64, 4), jnp.ones(64, bool)
    estimate = ESTIMATORS[name]
    np.testing.assert_allclose(estimate(x_ND + 5.0, ones), estimate(x_ND, ones), atol=2e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_scaling_samples_divides_score(name, scale):
    x_ND, ones = gaussian(64, 4), jnp.ones(64, bool)
    estimate = ESTIMATORS[name]
    np.testing.assert_allclose(estimate(scale * x_ND, ones) * scale, estimate(x_ND, ones), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_permutation_equivariance(name):
    x_ND, ones = gaussian(64, 4), jnp.ones(64, bool)
    order = np.random.default_rng(1).permutation(64)
    estimate = ESTIMATORS[name]
    np.testing.assert_allclose(estimate(x_ND[order], ones), estimate(x_ND, ones)[order], atol=1e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_padded_rows_change_nothing(name):
    x_ND = gaussian(48, 4)
    estimate = ESTIMATORS[name]
    padded_ND = jnp.concatenate([x_ND, jnp.full((16, 4), 1e3)])
    mask_N = jnp.arange(64) < 48
    found_ND = estimate(padded_ND, mask_N)
    np.testing.assert_allclose(found_ND[:48], estimate(x_ND, jnp.ones(48, bool)), atol=1e-3)
    np.testing.assert_array_equal(found_ND[48:], 0)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_and_one_sample_are_finite(name, count):
    found_ND = ESTIMATORS[name](gaussian(8, 3), jnp.arange(8) < count)
    assert np.isfinite(found_ND).all()


def test_coinciding_samples_are_finite():
    assert np.isfinite(stein.stein_score(jnp.ones((16, 3)), jnp.ones(16, bool))).all()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_median_is_lower_order_statistic(count):
    value = np.random.default_rng(count).random(count).astype(np.float32) * 100
    valid = np.zeros(128, bool)
    valid[:count] = True
    padded = np.concatenate([value, np.zeros(128 - count, np.float32)])
    found = stein.median(jnp.asarray(padded[None]), jnp.asarray(valid[None]))
    assert float(found) == np.sort(value)[(count - 1) // 2]


@pytest.mark.parametrize("kind", ["uniform", "wide", "equal", "few", "zeros", "infinite"])
@pytest.mark.parametrize("count", [7, 1000, 20_001])
def test_median_is_exact_whatever_the_values_are(kind, count):
    """Values in one octave, over many, with ties, with -0 and infinity, among invalid ones that are smaller."""
    rng = np.random.default_rng(count)
    value = {
        "uniform": lambda: 100 + rng.random(count),
        "wide": lambda: np.exp(20 * rng.normal(size=count)),
        "equal": lambda: np.full(count, 3.0),
        "few": lambda: rng.integers(0, 3, count),
        "zeros": lambda: np.where(rng.random(count) < 0.7, -0.0, 1.0),
        "infinite": lambda: np.where(rng.random(count) < 0.7, np.inf, 1.0),
    }[kind]().astype(np.float32)  # fmt: skip
    valid = rng.random(count) < 0.8
    value[~valid] = -1.0
    found = jax.jit(stein.median)(jnp.asarray(value[None]), jnp.asarray(valid[None]))
    assert float(found) == np.sort(value[valid])[(valid.sum() - 1) // 2]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_half_of_the_pairs_has_the_median_of_all(count):
    rng = np.random.default_rng(count)
    value_NN = rng.random((count, count)).astype(np.float32)
    value_NN = np.maximum(value_NN, value_NN.T)
    keep_N = np.arange(count) != 1
    pair_NN = keep_N[:, None] & keep_N[None] & ~np.eye(count, dtype=bool)
    once = stein._pairs_once(jnp.asarray(value_NN)), stein._pairs_once(jnp.asarray(pair_NN))
    assert 2 * once[1].sum() == pair_NN.sum()
    assert stein.median(*once) == stein.median(jnp.asarray(value_NN), jnp.asarray(pair_NN))


def test_median_takes_negative_zero_for_zero():
    value = jnp.asarray([[-0.0, 1.0]])
    assert float(stein.median(value, jnp.ones_like(value, bool))) == 0


def test_no_difference_tensor_is_built():
    """No intermediate of the gradient step is as large as N x N x D."""
    n, d = 64, 32
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: stein.entropy_surrogate(x, jnp.ones(n, bool))))(gaussian(n, d))
    sizes = [int(np.prod(v.aval.shape)) for e in jaxpr.jaxpr.eqns for v in e.outvars if hasattr(v.aval, "shape")]
    assert max(sizes) <= n * n


def products(jaxpr):
    """All dot_general equations, those of inner functions and loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize(
    ("function", "least"),
    [(stein.stein_score, 2), (stein.ssge_score, 5), (lambda x, ones: jax.vjp(stein.alignment, x, x[::-1], ones), 1)],
    ids=["stein", "ssge", "alignment"],
)
def test_matrix_products_keep_float32(function, least):
    """A CPU multiplies in float32 whatever is asked, a GPU or TPU does so only at the highest precision."""
    found = list(products(jax.make_jaxpr(function)(gaussian(16, 3), jnp.ones(16, bool)).jaxpr))
    assert len(found) >= least
    assert {equation.params["precision"] for equation in found} == {(jax.lax.Precision.HIGHEST,) * 2}


def test_entropy_surrogate_has_no_gradient_through_score():
    x_ND, ones = gaussian(32, 4), jnp.ones(32, bool)
    gradient_ND = jax.grad(stein.entropy_surrogate)(x_ND, ones)
    np.testing.assert_allclose(gradient_ND, stein.stein_score(x_ND, ones) / 32, rtol=1e-5, atol=1e-7)


def test_value_of_eq_7_is_blind_to_scale():
    """Why only the surrogate means anything: the printed quantity does not see a contraction."""
    x_ND, ones = gaussian(128, 4), jnp.ones(128, bool)
    values = [float(stein.entropy_surrogate(scale * x_ND, ones)) for scale in (0.25, 1.0, 4.0)]
    np.testing.assert_allclose(values, values[0], rtol=1e-3)


def test_alignment_rises_as_pair_noise_falls():
    text_ND = gaussian(256, 8, 1)
    noise_ND = gaussian(256, 8, 2)
    values = [
        float(stein.alignment(text_ND + s * noise_ND, text_ND, jnp.ones(256, bool))[0]) for s in (1.0, 0.1, 0.001)
    ]
    assert values[0] < values[1] < values[2]
    assert values[2] > 0.999


def test_bandwidth_over_matched_pairs_would_pin_alignment():
    """The reason for taking all cross pairs: over matched pairs the median kernel is exp(-1/2) whatever the noise."""
    text_ND, noise_ND = gaussian(257, 8, 1), gaussian(257, 8, 2)
    for scale in (1.0, 0.001):
        matched_N = jnp.sum((scale * noise_ND) ** 2, axis=1)[None]
        gamma2 = stein.squared_bandwidth(matched_N, jnp.ones_like(matched_N, bool))
        median_kernel = np.median(stein.rbf_kernel(matched_N, gamma2))
        np.testing.assert_allclose(median_kernel, np.exp(-0.5), rtol=1e-5)
    assert float(stein.alignment(text_ND, text_ND, jnp.ones(257, bool))[0]) == pytest.approx(1.0)


def test_bandwidth_carries_no_gradient():
    gradient = jax.grad(lambda x: stein.squared_bandwidth(stein.squared_distances(x, x), jnp.ones((16, 16), bool)))
    np.testing.assert_array_equal(gradient(gaussian(16, 3)), 0)
