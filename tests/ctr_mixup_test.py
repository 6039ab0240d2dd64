"""BASRec's mixup: the definitions, the bug of the released code, and what padding and devices change (nothing)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from marsjax.ctr import mixup

B, L, D = 8, 4, 3
KEY = jax.random.key(7)


def rows(seed=0, padded=(2, 7)):
    rng = np.random.default_rng(seed)
    weight_B = np.float32(~np.isin(np.arange(B), padded))
    return {
        "weight_B": weight_B,
        "loss_B": rng.random(B).astype(np.float32) + 0.1,
        "lambda_B": rng.uniform(0.1, 0.9, B).astype(np.float32),
        "rate_B": rng.uniform(0.2, 0.7, B).astype(np.float32),
        "encoded_BD": rng.normal(size=(B, D)).astype(np.float32),
        "target_BD": rng.normal(size=(B, D)).astype(np.float32),
        "label_B": np.float32(np.arange(B) % 2),
    }


def split(x, n_devices):
    return jnp.reshape(x, (n_devices, -1, *np.shape(x)[1:]))


def joined(function, *arguments, n_devices):
    """`function(*parts)` of emulated devices, parts of the result put together again."""
    parts = jax.jit(jax.vmap(function, axis_name="device"))(*(split(x, n_devices) for x in arguments))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


# --- draws


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
@pytest.mark.parametrize("n_channels", [None, 6])
def test_lambda_is_beta(alpha, n_channels):
    lambda_ = np.asarray(mixup.draw_lambda(KEY, 4000, alpha=alpha, axis_name=None, n_channels=n_channels))
    assert lambda_.shape == ((4000,) if n_channels is None else (4000, n_channels))
    assert ((lambda_ >= 0) & (lambda_ <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    error = 5 * np.sqrt(variance / lambda_.size)
    assert lambda_.mean() == pytest.approx(0.5, abs=error)
    assert lambda_.var() == pytest.approx(variance, abs=error)
    assert len(np.unique(lambda_)) > 0.9 * lambda_.size  # rows and channels draw their own
    assert scipy.stats.kstest(lambda_.ravel(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.3, 0.4, 1.0, 2.0])
def test_quantiles_are_those_of_the_distribution(alpha):
    share = np.concatenate([2.0 ** -np.arange(1, 24), np.linspace(0.01, 0.99, 50)]).astype(np.float32)
    expected = scipy.stats.beta(alpha, alpha).ppf(share.astype(np.float64))
    np.testing.assert_allclose(mixup.quantile(share, alpha), expected, rtol=2e-4)
    assert 0 <= mixup.quantile(np.float32(0.0), alpha) < expected.min()


@pytest.mark.parametrize("n_channels", [None, 6])
def test_a_row_draws_the_same_lambda_whatever_stands_after_it_and_on_any_device(n_channels):
    draw = lambda n, axis: mixup.draw_lambda(KEY, n, alpha=0.4, axis_name=axis, n_channels=n_channels)  # noqa: E731
    whole = draw(B, None)
    np.testing.assert_array_equal(draw(B + 5, None)[:B], whole)
    np.testing.assert_array_equal(joined(lambda _: draw(B // 4, "device"), jnp.zeros(B), n_devices=4), whole)


def test_partners_permute_the_valid_rows_alone():
    weight_B = rows()["weight_B"]
    seen = set()
    for seed in range(30):
        partner_B = np.asarray(mixup.draw_partners(jax.random.key(seed), weight_B, axis_name=None))
        valid_B = weight_B > 0
        assert sorted(partner_B[valid_B]) == list(np.flatnonzero(valid_B))
        np.testing.assert_array_equal(partner_B[~valid_B], np.flatnonzero(~valid_B))
        seen.add(tuple(partner_B))
    assert len(seen) > 20  # of 720


def test_partners_are_uniform():
    """Three valid rows have six permutations, all of them as frequent."""
    weight_B = np.float32([0, 1, 1, 0, 1])
    draw = jax.vmap(lambda key: mixup.draw_partners(key, weight_B, axis_name=None))
    _, count = np.unique(draw(jax.random.split(KEY, 6000)), axis=0, return_counts=True)
    assert len(count) == 6
    assert (abs(count - 1000) < 5 * np.sqrt(1000)).all()


def test_partners_do_not_depend_on_padding_or_devices():
    weight_B = rows()["weight_B"]
    whole_B = mixup.draw_partners(KEY, weight_B, axis_name=None)
    padded_B = mixup.draw_partners(KEY, np.pad(weight_B, (0, 5)), axis_name=None)
    np.testing.assert_array_equal(padded_B[:B], whole_B)
    draw = lambda part: mixup.draw_partners(KEY, part, axis_name="device")  # noqa: E731
    np.testing.assert_array_equal(joined(draw, weight_B, n_devices=2), whole_B)


# --- within a sequence


def test_histories_are_mixed_row_by_row():
    rng = np.random.default_rng(0)
    one_BLD, other_BLD = (rng.normal(size=(B, L, D)).astype(np.float32) for _ in range(2))
    one_BLD[:, :2] = other_BLD[:, :2] = 0.0  # padding
    lambda_B = rows()["lambda_B"]
    mixed_BLD = mixup.mix_histories(one_BLD, other_BLD, lambda_B)
    for b in range(B):
        for position in range(L):
            expected = lambda_B[b] * one_BLD[b, position] + (1 - lambda_B[b]) * other_BLD[b, position]
            np.testing.assert_allclose(mixed_BLD[b, position], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(mixed_BLD[:, :2], 0)
    np.testing.assert_array_equal(mixup.mix_histories(one_BLD, other_BLD, np.ones(B, np.float32)), one_BLD)


def test_relevance_is_scaled_over_the_valid_rows():
    data = rows()
    omega_B = mixup.relevance(data["lambda_B"], data["rate_B"], data["weight_B"], axis_name=None)
    raw = {b: 1 / (data["lambda_B"][b] * data["rate_B"][b]) for b in range(B) if data["weight_B"][b]}
    low, high = min(raw.values()), max(raw.values())
    expected_B = [(raw[b] - low) / (high - low) if b in raw else 0.0 for b in range(B)]
    np.testing.assert_allclose(omega_B, expected_B, rtol=1e-5)


@pytest.mark.parametrize("filling", [0.0, 1e-30, np.nan])
def test_padded_rows_do_not_move_relevance(filling):
    data = rows()
    whole_B = mixup.relevance(data["lambda_B"], data["rate_B"], data["weight_B"], axis_name=None)
    padded_B = data["weight_B"] == 0
    lambda_B = np.where(padded_B, np.float32(filling), data["lambda_B"])
    np.testing.assert_array_equal(mixup.relevance(lambda_B, data["rate_B"], data["weight_B"], axis_name=None), whole_B)


def test_relevance_without_a_spread_is_one():
    """The released code divides 0 by 0 for one row, and for rows that are all alike."""
    data = rows()
    one_B = np.float32(np.arange(B) == 3)
    np.testing.assert_array_equal(mixup.relevance(data["lambda_B"], data["rate_B"], one_B, axis_name=None), one_B)
    alike_B = np.full(B, 0.4, np.float32)
    np.testing.assert_array_equal(mixup.relevance(alike_B, alike_B, data["weight_B"], axis_name=None), data["weight_B"])
    none_B = np.zeros(B, np.float32)
    np.testing.assert_array_equal(mixup.relevance(data["lambda_B"], data["rate_B"], none_B, axis_name=None), none_B)


def test_relevance_of_a_vanishing_lambda_is_finite():
    lambda_B = np.float32([0, 1e-38, 0.5, 1])
    omega_B = mixup.relevance(lambda_B, np.full(4, 0.3, np.float32), np.ones(4, np.float32), axis_name=None)
    np.testing.assert_allclose(omega_B, [1, 1, 0, 0], atol=1e-6)


def test_relevance_has_no_gradient():
    data = rows()
    gradient_B = jax.grad(lambda x: jnp.sum(mixup.relevance(x, data["rate_B"], data["weight_B"], axis_name=None)))
    np.testing.assert_array_equal(gradient_B(data["lambda_B"]), 0)


def test_released_weights_are_broadcast_and_those_of_the_paper_are_not():
    """The released product of [B, 1] and [B], worked out as NumPy does it and by hand."""
    loss_B, omega_B = np.float32([1, 2, 4, 99]), np.float32([0, 0.5, 1, 99])
    weight_B = np.float32([1, 1, 1, 0])
    table_BB = omega_B[:3, None] * loss_B[None, :3]
    assert table_BB.shape == (3, 3)
    released = mixup.weighted_loss(loss_B, omega_B, weight_B, mode="as_released", axis_name=None)
    assert float(released) == pytest.approx(table_BB.sum() / 3) == pytest.approx(1.5 * 7 / 3)
    paper = mixup.weighted_loss(loss_B, omega_B, weight_B, mode="paper", axis_name=None)
    assert float(paper) == pytest.approx((0 * 1 + 0.5 * 2 + 1 * 4) / 3)
    # So the row of weight 0 is trained on all the same, and every row as much.
    gradient_B = jax.grad(mixup.weighted_loss)(loss_B, omega_B, weight_B, mode="as_released", axis_name=None)
    np.testing.assert_allclose(gradient_B, np.float32([0.5, 0.5, 0.5, 0]))
    gradient_B = jax.grad(mixup.weighted_loss)(loss_B, omega_B, weight_B, mode="paper", axis_name=None)
    np.testing.assert_allclose(gradient_B, np.float32([0, 0.5 / 3, 1 / 3, 0]))


@pytest.mark.parametrize("mode", mixup.MODES)
def test_padded_losses_count_nowhere(mode):
    data = rows()
    options = {"mode": mode, "axis_name": None}
    omega_B = mixup.relevance(data["lambda_B"], data["rate_B"], data["weight_B"], axis_name=None)
    valid_B = data["weight_B"] > 0
    cut = (data["loss_B"][valid_B], omega_B[valid_B], data["weight_B"][valid_B])
    for filling in (0.0, 1e6, np.nan):
        loss_B = np.where(valid_B, data["loss_B"], np.float32(filling))
        value, gradient_B = jax.value_and_grad(mixup.weighted_loss)(loss_B, omega_B, data["weight_B"], **options)
        np.testing.assert_allclose(value, mixup.weighted_loss(*cut, **options), rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(gradient_B)[~valid_B], 0)
    assert float(mixup.weighted_loss(loss_B, omega_B, np.zeros(B, np.float32), **options)) == 0.0


@pytest.mark.parametrize("mode", mixup.MODES)
def test_order_of_rows_changes_nothing(mode):
    data = rows()

    def loss(order):
        lambda_B, rate_B, weight_B, loss_B = (
            data[name][order] for name in ("lambda_B", "rate_B", "weight_B", "loss_B")
        )
        omega_B = mixup.relevance(lambda_B, rate_B, weight_B, axis_name=None)
        return mixup.weighted_loss(loss_B, omega_B, weight_B, mode=mode, axis_name=None)

    np.testing.assert_allclose(loss(np.random.default_rng(0).permutation(B)), loss(np.arange(B)), rtol=1e-6)


@pytest.mark.parametrize("padded", [(2, 7), (0, 1), (4, 5, 6, 7)])
@pytest.mark.parametrize("mode", mixup.MODES)
def test_devices_agree_on_the_weighted_loss(mode, padded):
    """The extremes of relevance lie on one device each; a whole device may hold padding."""
    data = rows(padded=padded)
    names = ("lambda_B", "rate_B", "weight_B")

    def loss(loss_B, *others, axis_name):
        omega_B = mixup.relevance(*others, axis_name=axis_name)
        return mixup.weighted_loss(loss_B, omega_B, others[-1], mode=mode, axis_name=axis_name)

    def several(loss_B):
        parts = (split(x, 4) for x in (loss_B, *(data[name] for name in names)))
        return jnp.sum(jax.vmap(lambda *part: loss(*part, axis_name="device"), axis_name="device")(*parts))

    value, gradient_B = jax.value_and_grad(loss)(data["loss_B"], *(data[name] for name in names), axis_name=None)
    found, found_B = jax.value_and_grad(several)(data["loss_B"])
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(found_B, gradient_B, rtol=1e-5)


# --- across sequences


def mixed(data, lambda_, partner_B, mode, axis_name=None):
    batch = (data[name] for name in ("encoded_BD", "target_BD", "label_B"))
    return mixup.mix_rows(*batch, lambda_, partner_B, mode=mode, axis_name=axis_name)


@pytest.mark.parametrize("mode", mixup.MODES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_rows_are_mixed_with_their_partners(per_channel, mode):
    data = rows()
    partner_B = np.array([3, 0, 2, 1, 5, 4, 6, 7])
    lambda_ = np.random.default_rng(1).random((B, D) if per_channel else B).astype(np.float32)
    found = mixed(data, lambda_, partner_B, mode)
    for b, p in enumerate(partner_B):
        for name in ("encoded_BD", "target_BD"):
            for d in range(D):
                share = lambda_[b, d] if per_channel else lambda_[b]
                expected = share * data[name][b, d] + (1 - share) * data[name][p, d]
                np.testing.assert_allclose(getattr(found, name)[b, d], expected, rtol=1e-5, atol=1e-6)
        share = lambda_[b].mean()
        paper = share * data["label_B"][b] + (1 - share) * data["label_B"][p]
        expected = data["label_B"][b] if mode == "as_released" else paper
        np.testing.assert_allclose(found.label_B[b], expected, rtol=1e-6)


def test_padding_is_never_mixed_in():
    data = rows()
    padded_B = data["weight_B"] == 0
    partner_B = mixup.draw_partners(KEY, data["weight_B"], axis_name=None)
    lambda_B = mixup.draw_lambda(KEY, B, alpha=0.4, axis_name=None)
    whole = mixed(data, lambda_B, partner_B, "paper")
    scribbled = data | {name: data[name].copy() for name in ("encoded_BD", "target_BD", "label_B")}
    for name in ("encoded_BD", "target_BD", "label_B"):
        scribbled[name][padded_B] = np.nan
    found = mixed(scribbled, lambda_B, partner_B, "paper")
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[~padded_B], np.asarray(other)[~padded_B])
    gradient = jax.grad(lambda x: jnp.sum(mixed(data | {"encoded_BD": x}, lambda_B, partner_B, "paper")[0][~padded_B]))
    np.testing.assert_array_equal(np.asarray(gradient(data["encoded_BD"]))[padded_B], 0)


def test_numbering_of_rows_changes_nothing():
    """Rows, lambdas and partners renumbered together give the same mixes, renumbered."""
    data = rows()
    partner_B = np.asarray(mixup.draw_partners(KEY, data["weight_B"], axis_name=None))
    order = np.random.default_rng(2).permutation(B)
    new_number = np.argsort(order)
    moved = {name: value[order] for name, value in data.items()}
    found = mixed(moved, data["lambda_B"][order], new_number[partner_B[order]], "paper")
    for one, other in zip(found, mixed(data, data["lambda_B"], partner_B, "paper"), strict=True):
        np.testing.assert_allclose(one, np.asarray(other)[order], rtol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_devices_agree_on_mixes_and_gradients(per_channel):
    """Draws, partners on other devices, and what flows back to them."""
    data = rows()
    names = ("encoded_BD", "target_BD", "label_B", "weight_B")
    coefficient_BD = np.random.default_rng(4).normal(size=(B, D)).astype(np.float32)

    def mix(*part, axis_name):
        batch = dict(zip(names, part, strict=True))
        keys = jax.random.split(KEY)
        n_channels = D if per_channel else None
        n_rows = len(batch["weight_B"])
        lambda_ = mixup.draw_lambda(keys[0], n_rows, alpha=0.4, axis_name=axis_name, n_channels=n_channels)
        partner_B = mixup.draw_partners(keys[1], batch["weight_B"], axis_name=axis_name)
        return mixed(batch, lambda_, partner_B, "paper", axis_name)

    def several(*whole):
        return joined(lambda *part: mix(*part, axis_name="device"), *whole, n_devices=4)

    def one(*whole):
        return mix(*whole, axis_name=None)

    whole = [data[name] for name in names]
    for part, expected in zip(several(*whole), one(*whole), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-6, atol=1e-7)
    gradients = [
        jax.grad(lambda x, run=run: jnp.sum(run(x, *whole[1:]).encoded_BD * coefficient_BD))(whole[0])
        for run in (several, one)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_unknown_mode_is_refused():
    data = rows()
    with pytest.raises(ValueError, match="mixup mode: expected one of .*'as_released', 'paper'.* found 'fixed'"):
        mixed(data, data["lambda_B"], np.arange(B), "fixed")
    with pytest.raises(ValueError, match="found 'fixed'"):
        mixup.weighted_loss(data["loss_B"], data["lambda_B"], data["weight_B"], mode="fixed", axis_name=None)
