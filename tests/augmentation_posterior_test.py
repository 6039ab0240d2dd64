"""Expected opinions equal Gaussian process regression, learn planted tastes, and know nothing of their own row."""

import numpy as np
import pytest

from marsjax.augmentation import posterior
from marsjax.augmentation.posterior import Opinions, Settings, expect, learn_opinions
from marsjax.augmentation.votes import PRIOR, centred
from marsjax.data.splits import make_rows
from marsjax.records import HIGH, TEST, TRAIN, Log

N, D = 14, 5
SETTINGS = Settings(components=4, folds=3, cap=6)


def make_log(seed=0, *, n_users=60, n_items=N, like=lambda rng, user, items: rng.integers(0, 2, len(items))):
    rng = np.random.default_rng(seed)
    count_U = rng.integers(4, n_items, n_users)
    items = [rng.permutation(n_items - 1)[:count] + 1 for count in count_U]
    return Log(
        start_U1=np.concatenate([[0], np.cumsum(count_U)]),
        item_E=np.concatenate(items).astype(np.int32),
        label_E=np.concatenate([like(rng, user, items[user]) for user in range(n_users)]).astype(np.float32),
        time_E=np.concatenate([np.sort(rng.integers(0, 10**6, count)) for count in count_U]).astype(np.int64),
        raw_user_U=np.arange(n_users).astype(str),
    )


def parity(rng, user, items):
    """Half of the users like even items, the others odd ones."""
    return rng.random(len(items)) < np.where(items % 2 == user % 2, 0.9, 0.1)


@pytest.fixture(scope="module")
def data():
    log = make_log(n_users=150, like=parity)
    rows = make_rows(log, split="leave_one_out")
    item_ND = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    item_ND[:, 0] += 2 * (np.arange(N) % 2)
    item_ND[0] = 0
    return log, rows, item_ND, np.flatnonzero(rows.group_U == HIGH)


def dense_covariance(log, rows, donors, vector_ND, fold, folds):
    """By loops over pairs of items, and the rates of likes."""
    events = [e for e in range(len(log.item_E)) if rows.split_E[e] == TRAIN and rows.user_E[e] in set(donors)]
    events = [e for e in events if rows.user_E[e] % folds != fold]
    overall = np.mean([log.label_E[e] for e in events])
    usual_N = np.empty(N)
    for item in range(N):
        labels = [log.label_E[e] for e in events if log.item_E[e] == item]
        usual_N[item] = (sum(labels) + PRIOR * overall) / (len(labels) + PRIOR)
    opinion = {(rows.user_E[e], log.item_E[e]): log.label_E[e] - usual_N[log.item_E[e]] for e in events}
    pairs = []
    for i in range(1, N):
        for j in range(1, N):
            both = [user for user in donors if (user, i) in opinion and (user, j) in opinion]
            if i != j and both:
                products = [opinion[user, i] * opinion[user, j] for user in both]
                pairs.append((i, j, len(both), sum(products), sum(product**2 for product in products)))
    n_Z, sum_Z, square_Z = (np.array([pair[k] for pair in pairs], float) for k in (2, 3, 4))
    cosine = (lambda i, j: vector_ND[i] @ vector_ND[j]) if vector_ND is not None else (lambda i, j: 0.0)
    design = np.array([[1.0, cosine(i, j)] for i, j, *_ in pairs])[:, : 1 + (vector_ND is not None)]
    weights = np.sqrt(n_Z)[:, None]
    fit = np.linalg.lstsq(design * weights, sum_Z / n_Z * weights[:, 0], rcond=None)[0]
    level, slope = max(fit[0], 0.0), (fit[1] if len(fit) > 1 else 0.0)
    if slope <= 0:
        level, slope = max(np.sum(sum_Z) / np.sum(n_Z), 0.0), 0.0
    prior_Z = level + slope * np.array([cosine(i, j) for i, j, *_ in pairs])
    noise_Z = square_Z / n_Z - prior_Z**2
    weight_Z = n_Z**2
    spread = np.sum(weight_Z * ((sum_Z / n_Z - prior_Z) ** 2 - noise_Z / n_Z)) / np.sum(weight_Z)
    tau = np.sum(weight_Z * noise_Z) / np.sum(weight_Z) / max(spread, 1e-8)
    out_NN = np.zeros((N, N))
    for i in range(1, N):
        for j in range(1, N):
            out_NN[i, j] = level + slope * cosine(i, j)
    for (i, j, n, total, _), prior in zip(pairs, prior_Z, strict=True):
        out_NN[i, j] = (total + tau * prior) / (n + tau)
    return usual_N, out_NN


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("content", [True, False])
def test_covariances_are_those_of_their_definition(data, content, full, monkeypatch):
    monkeypatch.setattr(posterior, "FASTER", 10**9 if full else 0)
    monkeypatch.setattr(posterior, "DENSE", 0 if full else 1)
    monkeypatch.setattr(posterior, "CELLS", N**2)  # a few donors at a time
    log, rows, item_ND, donors = data
    found = learn_opinions(log, rows, donors, item_ND if content else None, n_items=N, settings=SETTINGS)
    for fold in range(SETTINGS.folds):
        vector_ND = centred(item_ND).astype(float) if content else None
        usual_N, covariance_NN = dense_covariance(log, rows, donors, vector_ND, fold, SETTINGS.folds)
        np.testing.assert_allclose(found.usual_FN[fold][1:], usual_N[1:], rtol=1e-6)
        strength_N, component_NN = np.linalg.eigh(covariance_NN)
        top_NK = component_NN[:, -4:] * np.sqrt(np.maximum(strength_N[-4:], 0))
        loading_NK = found.loading_FNK[fold]
        np.testing.assert_allclose(
            loading_NK @ loading_NK.T, top_NK @ top_NK.T, atol=2e-3 * np.abs(covariance_NN).max()
        )
        assert np.abs(covariance_NN).max() > 0.01


@pytest.mark.parametrize("scale_F", [None, np.array([0.3, 0.4, 0.5], np.float32)])
def test_expectations_are_gaussian_process_regression(data, scale_F):
    log, rows, _, _ = data
    rng = np.random.default_rng(2)
    opinions = Opinions(
        rng.uniform(0.1, 0.9, (3, N)).astype(np.float32), rng.normal(0, 0.15, (3, N, 4)).astype(np.float32), scale_F
    )
    row_R = np.arange(len(log.item_E))
    found_R2 = expect(log, rows, opinions, row_R, settings=SETTINGS)
    histories = rows.histories
    for event in row_R[::7]:
        fold = rows.user_E[event] % 3
        seen = slice(max(histories.start_E[event], histories.end_E[event] - SETTINGS.cap), histories.end_E[event])
        item_L, usual_N = histories.item_H[seen], opinions.usual_FN[fold].astype(float)
        kernel_NN = opinions.loading_FNK[fold].astype(float) @ opinions.loading_FNK[fold].T
        scale = 1 if scale_F is None else scale_F[fold]
        noise_N = np.maximum(scale * usual_N * (1 - usual_N) - np.diag(kernel_NN), scale * posterior.LEAST_NOISE)
        noise_L = noise_N[item_L]
        observed_LL = kernel_NN[np.ix_(item_L, item_L)] + np.diag(noise_L)
        to_target_L = kernel_NN[item_L, log.item_E[event]]
        weight_L = np.linalg.solve(observed_LL, to_target_L)
        mean, explained = weight_L @ (histories.label_H[seen] - usual_N[item_L]), weight_L @ to_target_L
        np.testing.assert_allclose(found_R2[event], [4 * mean, 4 * np.sqrt(explained)], rtol=2e-4, atol=1e-5)
    without_R = histories.end_E == histories.start_E
    assert without_R.any()
    assert not found_R2[without_R].any()


def test_expectations_on_all_items_are_those_on_targets(data):
    log, rows, item_ND, donors = data
    opinions = learn_opinions(log, rows, donors, item_ND, n_items=N, settings=SETTINGS)
    row_R = np.arange(0, len(log.item_E), 11)
    found_RN = posterior.expect_all(
        rows.histories, opinions, rows.user_E[row_R], rows.histories.end_E[row_R], cap=SETTINGS.cap
    )
    on_target_R = found_RN[np.arange(len(row_R)), log.item_E[row_R]]
    expected_R = expect(log, rows, opinions, row_R, settings=SETTINGS)[:, 0]
    np.testing.assert_allclose(4 * on_target_R, expected_R, atol=1e-5)
    assert np.abs(expected_R).max() > 0.05


def test_chunks_and_padding_change_nothing(data, monkeypatch):
    log, rows, item_ND, donors = data
    settings = SETTINGS._replace(cap=20)
    opinions = learn_opinions(log, rows, donors, item_ND, n_items=N, settings=settings)
    row_R = np.arange(len(log.item_E))
    whole_R2 = expect(log, rows, opinions, row_R, settings=settings)
    monkeypatch.setattr(posterior, "CHUNK", 7)
    monkeypatch.setattr(posterior, "SHORTEST", 1)
    np.testing.assert_allclose(expect(log, rows, opinions, row_R, settings=settings), whole_R2, atol=1e-5)
    some_R = np.random.default_rng(0).permutation(row_R)[:50]
    np.testing.assert_allclose(expect(log, rows, opinions, some_R, settings=settings), whole_R2[some_R], atol=1e-5)


def test_nothing_of_the_row_or_of_later_events_enters(data):
    log, rows, item_ND, donors = data

    def expectations(log):
        histories = rows.histories._replace(label_H=log.label_E)
        shown = rows._replace(histories=histories)
        opinions = learn_opinions(log, shown, donors, item_ND, n_items=N, settings=SETTINGS)
        return expect(log, shown, opinions, np.arange(len(log.item_E)), settings=SETTINGS)

    assert len(rows.histories.item_H) == len(log.item_E)
    before = expectations(log)
    changes = 0
    for user in (donors[0], np.flatnonzero(rows.group_U != HIGH)[0]):
        first, last = log.start_U1[user : user + 2]
        middle = first + 2
        label_E = log.label_E.copy()
        label_E[middle:last] = 1 - label_E[middle:last]
        after = expectations(log._replace(label_E=label_E))
        np.testing.assert_array_equal(after[first : middle + 1], before[first : middle + 1])
        changes += np.abs(after - before).max() > 1e-3
    assert changes == 2  # a donor's labels are heard by others, anybody's by their own later rows


def planted(seed, *, n_users, taste_ND, n_items):
    """Users like what lies in the direction of their taste."""

    def like(rng, user, items):
        taste_D = np.random.default_rng((seed, user)).normal(size=taste_ND.shape[1])
        return rng.random(len(items)) < 1 / (1 + np.exp(-2.5 * taste_ND[items] @ taste_D))

    return make_log(seed, n_users=n_users, n_items=n_items, like=like)


def test_planted_tastes_are_found_and_content_helps_where_donors_are_few():
    """Truth is known: rank correlation with the label on test rows, of few and of many donors, with content and not."""
    n_items, settings = 60, Settings(components=8, folds=5)
    taste_ND = np.random.default_rng(5).normal(size=(n_items, 3))
    taste_ND /= np.linalg.norm(taste_ND, axis=1, keepdims=True)
    content_ND = np.where(np.arange(n_items)[:, None] > 0, taste_ND, 0).astype(np.float32)
    shuffled_ND = content_ND[np.append(0, np.random.default_rng(6).permutation(n_items - 1) + 1)]
    gain = {}
    for n_users in (60, 1200):
        log = planted(7, n_users=n_users, taste_ND=taste_ND, n_items=n_items)
        rows = make_rows(log, split="last_fraction", low_fraction=0.0, high_fraction=1.0)
        row_R = np.flatnonzero(rows.split_E == TEST)
        for name, vector_ND in (("content", content_ND), ("shuffled", shuffled_ND), ("none", None)):
            opinions = learn_opinions(log, rows, np.arange(n_users), vector_ND, n_items=n_items, settings=settings)
            mean_R = expect(log, rows, opinions, row_R, settings=settings)[:, 0]
            gain[name, n_users] = np.corrcoef(mean_R, log.label_E[row_R])[0, 1]
    assert gain["none", 1200] > 0.3
    assert gain["content", 60] > gain["none", 60] + 0.1  # few donors: what is alike in content tells
    assert abs(gain["content", 1200] - gain["none", 1200]) < 0.05  # many donors: they tell all
    # Content that means nothing is found to mean nothing.
    assert abs(gain["shuffled", 1200] - gain["none", 1200]) < 0.02
    assert gain["shuffled", 60] < gain["content", 60] - 0.1


def test_donors_who_share_nothing_tell_nothing():
    log = Log(
        start_U1=np.arange(4),
        item_E=np.array([1, 2, 3], np.int32),
        label_E=np.array([1, 0, 1], np.float32),
        time_E=np.arange(3),
        raw_user_U=np.array(["a", "b", "c"]),
    )
    rows = make_rows(log, split="last_fraction")
    settings = Settings(components=3, folds=2)
    for donors in (np.arange(3), np.zeros(0, int)):
        opinions = learn_opinions(log, rows, donors, None, n_items=7, settings=settings)
        assert not opinions.loading_FNK.any()
        assert np.isfinite(opinions.usual_FN).all()
        assert not expect(log, rows, opinions, np.arange(3), settings=settings).any()


def test_an_item_met_again_counts_once_with_the_mean_label(data):
    log, rows, item_ND, donors = data
    again = log._replace(
        start_U1=np.append(0, np.cumsum(2 * np.diff(log.start_U1))),
        item_E=np.repeat(log.item_E, 2),
        label_E=np.repeat(log.label_E, 2),
        time_E=np.repeat(log.time_E, 2),
    )
    twice = rows._replace(user_E=np.repeat(rows.user_E, 2), split_E=np.repeat(rows.split_E, 2))
    once, found = (
        learn_opinions(which, shown, donors, item_ND, n_items=N, settings=SETTINGS)
        for which, shown in ((log, rows), (again, twice))
    )
    for name in ("usual_FN", "loading_FNK"):
        np.testing.assert_allclose(np.abs(getattr(found, name)), np.abs(getattr(once, name)), atol=1e-4)


def test_cosines_are_the_same_in_blocks(monkeypatch):
    vector_ND = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    left_Z, right_Z = np.nonzero(np.random.default_rng(1).random((30, 30)) < 0.2)
    monkeypatch.setattr(posterior, "CELLS", 100)
    expected_Z = np.einsum("zd,zd->z", vector_ND[left_Z], vector_ND[right_Z])
    np.testing.assert_allclose(posterior._cosines(vector_ND, left_Z, right_Z), expected_Z, rtol=1e-5, atol=1e-6)


def test_too_many_pairs_are_refused(data, monkeypatch):
    log, rows, item_ND, donors = data
    monkeypatch.setattr(posterior, "LARGEST", 50)
    with pytest.raises(
        ValueError, match="expected at most 50 pairs of items known to one donor, found up to [0-9,]*; lower"
    ):
        learn_opinions(log, rows, donors, item_ND, n_items=N, settings=SETTINGS)


def test_labels_without_meaning_are_not_told_by_their_own_row():
    """All users are donors and labels are coins: what rows are lent must not go with their own labels."""
    log = make_log(3, n_users=150, n_items=40)
    rows = make_rows(log, split="last_fraction", low_fraction=0.0, high_fraction=1.0)
    settings = Settings(components=8, folds=5)
    opinions = learn_opinions(log, rows, np.arange(150), None, n_items=40, settings=settings)
    row_R = np.flatnonzero(rows.split_E == TRAIN)

    def told(opinions):
        mean_R = expect(log, rows, opinions, row_R, settings=settings)[:, 0]
        usual_R = opinions.usual_FN[rows.user_E[row_R] % len(opinions.usual_FN), log.item_E[row_R]]
        return [np.corrcoef(value_R, log.label_E[row_R])[0, 1] for value_R in (mean_R, usual_R)]

    noise = 3 / np.sqrt(len(row_R))
    assert max(told(opinions)) < noise
    # Were the user's own fold asked as well, both would tell.
    wrong = Opinions(np.roll(opinions.usual_FN, 1, axis=0), np.roll(opinions.loading_FNK, 1, axis=0))
    assert min(told(wrong)) > noise
