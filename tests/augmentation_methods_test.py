"""Every method of a report trains; the baselines, in both forms, change what they should and nothing else."""

import functools

import jax
import numpy as np
import pytest

from marsjax.augmentation import baselines, controls, methods, posterior, votes
from marsjax.augmentation.baselines import BASELINES
from marsjax.augmentation.donors import find_donors
from marsjax.augmentation.methods import METHODS, Offer
from marsjax.augmentation.queries import make_queries
from marsjax.ctr import objective as objectives
from marsjax.ctr.activations import Tower
from marsjax.ctr.backbones import make_backbone
from marsjax.ctr.items import padded_tables
from marsjax.ctr.view_losses import check_backbone
from marsjax.data import batches, histories
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.records import (
    LOW,
    MIDDLE,
    NEW,
    TEST,
    TRAIN,
    VALID,
    Inputs,
    ItemTables,
    Objective,
    Queries,
    Viewed,
    Viewing,
)
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.sharding import pad_rows
from marsjax.training.step import init_state

CTR = {
    "user_id": True, "inputs": "strong", "content": 2, "embedding": 3, "tower": (6,), "attention": (4,),
    "softmax": True, "apart": False, "activation": "prelu", "dtype": "float32",
}  # fmt: skip
SETTINGS = AdamW(1e-2, 0.0, 10.0)
LENGTH = 30  # one length, so that few steps are compiled
MODES = ("paper", "as_released")
CHANGES_HISTORIES = [name for name, baseline in BASELINES.items() if baseline.objective is None]
HAS_LOSS = [name for name, baseline in BASELINES.items() if baseline.objective is not None]


@pytest.fixture(scope="module")
def offer():
    dataset = make_synthetic(n_users=50, n_items=60, high_events=(15, 20), seed=0)
    rows = make_rows(dataset.log, split="leave_one_out")
    queries, donors = make_queries(rows, prefix_stride=1), find_donors(rows, cap=20)
    rng = np.random.default_rng(0)
    borrowed = controls.random_donor(donors, rng.integers(0, 9, len(queries.user_Q)), seed=1)
    item_ND = rng.normal(size=(len(dataset.items.raw_id_N), 4)).astype(np.float32)
    item_ND[0] = 0
    return Offer(
        log=dataset.log,
        rows=rows,
        queries=queries,
        donors=donors,
        borrowed=borrowed,
        item_ND=item_ND,
        votes=votes.Settings(),
        low_only=False,
        posterior=posterior.Settings(components=4),
        cut_share=0.5,
        baselines=baselines.Settings(view_length=8),
        seed=3,
    )


def source_of(offer, treatment, *, size=32, buckets=(LENGTH,), seed=5):
    train_E = np.flatnonzero(offer.rows.split_E == TRAIN)
    source, _ = batches.ctr_source(
        offer.log,
        treatment.rows or offer.rows,
        train_E,
        size=size,
        cap=LENGTH,
        buckets=buckets,
        epochs=2,
        seed=seed,
        augmentation=treatment.augmentation,
        inputs=Inputs(
            mark_H=histories.feedback(offer.rows.histories.label_H),
            dense_EJ=treatment.dense_EJ,
            hidden_E=treatment.hidden_E,
        ),
        viewing=treatment.viewing,
    )
    return source


def model_of(offer, *, mask_token=False, dense=0, **changes):
    n_items = len(offer.item_ND) + mask_token
    tables = padded_tables(ItemTables(np.zeros((len(offer.item_ND), 1), np.int32), offer.item_ND), n_items)
    model = make_backbone(
        CTR | {"backbone": "din"} | changes, n_items=n_items, n_categories=1, n_users=50, n_features=4
    )
    return model, tables, objectives.init_model(model, tables, seed=0, dense=dense)


def train(model, tables, variables, objective, made):
    """The states after a step on each batch, and the metrics of the last."""
    lifted = objectives.lifted_step(model, SETTINGS, "single", objective)
    state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(SETTINGS), seed=0))
    for batch in made:
        state, metrics = lifted.step(state, lifted.split(batch), lifted.replicate(tables))
    return lifted.collect(state), lifted.collect(metrics)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(offer, name):
    """A step on its own batches; a mask that stands in them has a row that learns, and no other method has it."""
    method = METHODS[name]
    treatment = method.treat(offer)
    source = source_of(offer, treatment)
    made = [source[0], source[1]]
    # The losses are tried on a DIN below; here the backbone that compiles soonest will do.
    changes = {"backbone": "dnn", "mask_token": method.mask_token, "dense": method.numbers}
    model, tables, variables = model_of(offer, **changes)
    state, metrics = train(model, tables, variables, treatment.objective, made)
    expected = {"loss", "gradient_norm"} | ({"click_loss", "view_loss"} if treatment.objective else set())
    assert set(metrics) == expected
    assert all(np.isfinite(value) for value in metrics.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    if treatment.objective:
        assert metrics["view_loss"] > 0
        np.testing.assert_allclose(metrics["loss"], metrics["click_loss"] + metrics["view_loss"], rtol=1e-5)
    last = len(offer.item_ND) - 1 + method.mask_token
    shown = [batch.history_BL if batch.views is None else batch.views.item_BVW for batch in made]
    assert max(ids.max() for ids in shown) <= last
    if method.mask_token:
        assert max(ids.max() for ids in shown) == last
        item_ND = variables["params"]["items"]["item"]
        assert (state.params["items"]["item"][last] != item_ND[last]).any()


@pytest.mark.parametrize(("name", "splits"), [("mars_train_only", [TRAIN]), ("mars_test_only", [VALID, TEST])])
def test_one_sided_methods_lend_to_their_rows_alone(offer, name, splits):
    query_E = METHODS["mars"].treat(offer).augmentation.queries.query_E
    one_sided_E = METHODS[name].treat(offer).augmentation.queries.query_E
    inside_E = np.isin(offer.rows.split_E, splits)
    np.testing.assert_array_equal(one_sided_E[inside_E], query_E[inside_E])
    assert (query_E[inside_E] >= 0).any()
    assert (query_E[~inside_E] >= 0).any()
    assert (one_sided_E[~inside_E] == -1).all()


@pytest.mark.parametrize("name", ["hidden_ids", "short_histories"])
def test_low_active_and_new_users_are_known_by_their_history_alone(offer, name):
    new_U = offer.rows.group_U.copy()
    new_U[np.flatnonzero(new_U == MIDDLE)[:3]] = NEW
    offer = offer._replace(rows=offer.rows._replace(group_U=new_U))
    treatment = METHODS[name].treat(offer)
    before, shown = offer.rows.histories, (treatment.rows or offer.rows).histories
    cut_E = shown.end_E - shown.start_E < before.end_E - before.start_E
    assert cut_E.any() == (name == "short_histories")
    few_E = np.isin(new_U[offer.rows.user_E], (LOW, NEW))
    np.testing.assert_array_equal(treatment.hidden_E, few_E | cut_E)
    assert few_E.any()
    assert not few_E.all()
    row_B = np.flatnonzero(few_E)[:5]
    inputs = Inputs(hidden_E=treatment.hidden_E)
    batch = batches.ctr_batch(offer.log, offer.rows, row_B, length=LENGTH, size=8, cap=LENGTH, inputs=inputs)
    assert not batch.user_B.any()


@pytest.mark.parametrize("name", BASELINES)
def test_own_forms_change_training_and_nothing_else(offer, name):
    treatment = METHODS[name].treat(offer)
    assert treatment._replace(viewing=None, objective=None) == methods.Treatment()
    assert not METHODS[name].borrows
    plain, own = source_of(offer, methods.Treatment()), source_of(offer, treatment)
    assert len(plain) == len(own)
    changed = 0
    for i in range(len(plain)):
        for field in ("user_B", "target_B", "label_B", "weight_B"):  # the same rows in the same batch
            np.testing.assert_array_equal(getattr(plain[i], field), getattr(own[i], field))
        assert not own[i].borrowed_BL.any()
        assert (own[i].views is None) == (name in CHANGES_HISTORIES)
        same = np.array_equal(plain[i].history_BL, own[i].history_BL)
        assert same or name in CHANGES_HISTORIES
        changed += not same
    assert (changed > 0) == (name in CHANGES_HISTORIES)


@pytest.mark.parametrize("name", CHANGES_HISTORIES)
def test_marks_go_with_the_items(offer, name):
    """Each mark is one that the row's own history has for the item; all but hidden and foreign entries have one."""
    plain, own = source_of(offer, methods.Treatment()), source_of(offer, METHODS[name].treat(offer))
    marked = unmarked = 0
    for i in range(4):
        for row, item_L in enumerate(own[i].history_BL):
            mark_L = own[i].feedback_BL[row]
            before = set(zip(plain[i].history_BL[row], plain[i].feedback_BL[row], strict=True))
            after = list(zip(item_L[item_L > 0], mark_L[item_L > 0], strict=True))
            assert not mark_L[item_L == 0].any()
            assert {pair for pair in after if pair[1]} <= before
            marked += sum(mark > 0 for _, mark in after)
            unmarked += sum(mark == 0 for _, mark in after)
    assert marked > 100
    assert (unmarked > 0) == (name in ("ran", "cmr", "cmrsi"))


@pytest.mark.parametrize("form", ["", "_budget"])
@pytest.mark.parametrize("name", HAS_LOSS)
def test_views_for_a_loss_are_of_the_last_own_entries(offer, name, form):
    """Marks belong to items that the tail holds, and of BASRec the first view is the tail itself."""
    source = source_of(offer, METHODS[f"{name}{form}"].treat(offer))
    row_E, rows = source_rows(offer, source), offer.rows
    for i in range(3):
        views = source[i].views
        marks = histories.feedback(rows.histories.label_H)
        row_B = row_E[i][rows.group_U[rows.user_E[row_E[i]]] == LOW] if form else row_E[i]
        tail_BW, mark_BW, length_B = histories.own_tails(rows.histories, marks, row_B, length=8)
        n = len(length_B)
        assert views.item_BVW.shape == (len(views.weight_B), 3 if name == "basrec" else 2, 8)
        assert not views.item_BVW[n:].any()
        known = [set(zip(*pair, strict=True)) for pair in zip(tail_BW, mark_BW, strict=True)]
        for row, seen in enumerate(known):
            for view in range(views.item_BVW.shape[1]):
                pairs = zip(views.item_BVW[row, view], views.feedback_BVW[row, view], strict=True)
                assert {(item, mark) for item, mark in pairs if mark} <= seen
        if name == "basrec":
            np.testing.assert_array_equal(views.item_BVW[:n, 0], tail_BW)
            np.testing.assert_array_equal(views.feedback_BVW[:n, 0], mark_BW)
            np.testing.assert_array_equal(views.item_BVW > 0, (views.item_BVW[:, :1] > 0).repeat(3, axis=1))
            assert (views.rate_BV[:n, 0] == 0).all()
            assert ((views.rate_BV[:n, 1:] >= 0.2) & (views.rate_BV[:n, 1:] <= 0.51)).all()


def source_rows(offer, source):
    """The events of the batches: dense numbers that are event numbers tell them."""
    number_E1 = np.arange(len(offer.log.item_E), dtype=np.float32)[:, None]
    told = source_of(offer, methods.Treatment(dense_EJ=number_E1))
    rows = [told[i].dense_BJ[told[i].weight_B > 0, 0].astype(int) for i in range(len(told))]
    for i, row_B in enumerate(rows):
        np.testing.assert_array_equal(source[i].target_B[: len(row_B)], offer.log.item_E[row_B])
    return rows


@pytest.mark.parametrize("name", HAS_LOSS)
def test_losses_are_of_rows_with_a_history_at_a_budget_of_low_active_ones(offer, name):
    histories = offer.rows.histories
    low_E = offer.rows.group_U[offer.rows.user_E] == LOW
    has_history_E = histories.end_E > histories.start_E
    source = source_of(offer, METHODS[name].treat(offer))
    for i, row_B in enumerate(source_rows(offer, source)):
        weight_B = source[i].views.weight_B
        assert source[i].views.rows is None
        np.testing.assert_array_equal(weight_B, batches.pad_to(32, has_history_E[row_B], np.float32))
    source, sizes = source_of(offer, METHODS[f"{name}_budget"].treat(offer)), set()
    for i, row_B in enumerate(source_rows(offer, source)):
        batch, views, at_S = source[i], source[i].views, np.flatnonzero(low_E[row_B])
        size = len(views.weight_B)
        sizes.add(size)
        np.testing.assert_array_equal(views.weight_B, batches.pad_to(size, has_history_E[row_B[at_S]], np.float32))
        for found, whole in zip(views.rows, batch._replace(views=None), strict=True):
            if whole is not None:
                np.testing.assert_array_equal(found, batches.pad_to(size, whole[at_S], whole.dtype))
    assert sizes <= {32, 16, 2}
    assert min(sizes) < 32


@pytest.mark.parametrize("name", HAS_LOSS)
def test_a_batch_of_which_no_row_has_views_has_the_click_loss_alone(offer, name):
    method = METHODS[f"{name}_budget"]
    treatment = method.treat(offer)
    none_E = np.zeros(len(offer.log.item_E), bool)
    batch = source_of(offer, treatment._replace(viewing=treatment.viewing._replace(row_E=none_E)))[0]
    assert batch.views.item_BVW.shape[0] == 2
    assert not batch.views.weight_B.any()
    model, tables, variables = model_of(offer, mask_token=method.mask_token, backbone="dnn")
    share = share_of(model, tables, treatment.objective, None)

    def loss(params):
        found = share(params, {}, jax.device_put(batch))
        return found.loss, found.metrics

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert found["view_loss"] == 0
    assert value == found["click_loss"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["cl4srec", "basrec"])
def test_fewer_rows_with_views_than_devices_are_shared_out(offer, name):
    """Two rows with views over four devices: loss and gradients are those of one device."""
    method = METHODS[f"{name}_budget"]
    treatment = method.treat(offer)
    some_E = np.cumsum(offer.rows.split_E == TRAIN) % 20 == 0
    source = source_of(offer, treatment._replace(viewing=treatment.viewing._replace(row_E=some_E)))
    batch = next(source[i] for i in range(len(source)) if list(source[i].views.weight_B) == [1, 1])
    model, tables, variables = model_of(offer, mask_token=method.mask_token, backbone="dnn")

    def one(params):
        return share_of(model, tables, treatment.objective, None)(params, {}, jax.device_put(batch))

    def four(params):
        part = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), jax.device_put(pad_rows(batch, 4)))
        share = share_of(model, tables, treatment.objective, "device")
        return jax.vmap(functools.partial(share, params, {}), axis_name="device")(part)

    def value(shares):
        return lambda params: (lambda found: (found.loss.sum(), found.metrics["view_loss"].sum()))(shares(params))

    found = [jax.jit(jax.value_and_grad(value(shares), has_aux=True))(variables["params"]) for shares in (one, four)]
    assert found[0][0][1] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), *found)


def test_a_loss_on_few_rows_is_that_of_all_rows_with_the_others_not_counted(offer):
    treatment = METHODS["cl4srec_budget"].treat(offer)
    source = source_of(offer, treatment)
    index = next(i for i in range(len(source)) if 5 < source[i].views.weight_B.sum() < 16)
    batch = source[index]
    at_S = np.flatnonzero(offer.rows.group_U[offer.rows.user_E[source_rows(offer, source)[index]]] == LOW)

    def spread(value):
        out = np.zeros((32, *value.shape[1:]), value.dtype)
        out[at_S] = value[: len(at_S)]
        return out

    whole = batch._replace(views=jax.tree.map(spread, batch.views._replace(rows=None)))
    model, tables, variables = model_of(offer, mask_token=True)
    loss = jax.jit(jax.value_and_grad(lambda *given: share_of(model, tables, treatment.objective, None)(*given).loss))
    (few, few_gradient), (all_, all_gradient) = (loss(variables["params"], {}, one) for one in (batch, whole))
    np.testing.assert_allclose(few, all_, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), few_gradient, all_gradient)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("mode", MODES)
def test_budget_forms_lend_what_mars_lends_to_each_query(offer, name, mode):
    offer = offer._replace(baselines=offer.baselines._replace(mode=mode))
    treatment = METHODS[f"{name}_budget"].treat(offer)
    lent = treatment.augmentation
    np.testing.assert_array_equal(lent.borrowed.start_Q1, offer.borrowed.start_Q1)
    assert lent.queries is offer.queries
    assert (lent.borrowed.item_S < len(offer.item_ND)).all()
    assert (treatment.objective is not None) == (name in HAS_LOSS)
    test_E = np.flatnonzero(offer.rows.split_E == TEST)
    options = {"size": 32, "cap": LENGTH}
    mars = methods.lend(offer, offer.borrowed).augmentation
    expected_R, found_R = (
        batches.lent_items(offer.log, offer.rows, test_E, augmentation=a, **options) for a in (mars, lent)
    )
    np.testing.assert_array_equal(found_R, expected_R)
    assert found_R.sum() > 0


def test_borrowed_own_items_have_the_mark_of_their_event(offer):
    """An item that is met again after the prefix, with the other label: the later label is that of a training row."""
    log, rows = offer.log, offer.rows
    user = int(np.argmax(rows.train_length_U))
    begin = log.start_U1[user]
    item_E, label_E = log.item_E.copy(), log.label_E.copy()
    item_E[begin : begin + 6] = [7, 8, 9, 7, 8, 9]
    label_E[begin : begin + 6] = [1, 0, 1, 0, 1, 0]
    log = log._replace(item_E=item_E, label_E=label_E)
    rows = make_rows(log, split="leave_one_out")
    queries = Queries(np.array([user], np.int32), np.array([begin + 3]), np.zeros(0, np.int32))
    for name in BASELINES:
        similar_NK = baselines.similar_items(name, log, rows, n_items=len(offer.item_ND))
        lent = BASELINES[name].lend(
            rows.histories, queries, np.array([12]), seed=0, n_items=len(offer.item_ND), similar_NK=similar_NK
        )
        own_S = lent.donor_S == user
        expected_S = np.where(own_S, np.array([0, 0, 0, 0, 0, 0, 0, 2, 1, 2] + [0] * 60)[lent.item_S], 0)
        np.testing.assert_array_equal(lent.feedback_S, expected_S, err_msg=name)
        if name == "reppad":  # what the donors' rule would say
            opinion_S = methods.opinions(log, rows, lent, n_items=len(offer.item_ND))
            np.testing.assert_array_equal(opinion_S, 3 - expected_S)


@pytest.mark.parametrize("name", [*BASELINES, "basrec_budget"])
def test_a_restart_gives_the_same_batches(offer, name):
    """Whatever was made before, and another seed gives others."""
    treatment = METHODS[name].treat(offer)
    first, second = source_of(offer, treatment), source_of(offer, METHODS[name].treat(offer))
    made = [first[i] for i in range(4)]
    for i in (3, 0, 2):
        assert_same(made[i], second[i])
    assert_same(made[0].target_B, source_of(offer, methods.Treatment())[0].target_B)
    iterator = batches.iterate(first)
    next(iterator)
    state = iterator.get_state()
    resumed = batches.iterate(second)
    resumed.set_state(state)
    assert_same(next(resumed), made[1])


def test_batches_of_one_source_draw_apart(offer):
    """The same rows, drawn in two batches: a view that did not know the batch would repeat."""
    draws = []
    viewing = Viewing(lambda h, n, rng: (draws.append(rng.random()), unchanged(h, n))[1:], 8, replaces=True)
    source = source_of(offer, methods.Treatment(viewing=viewing))
    for i in range(len(source)):
        _ = source[i]
    assert len(set(draws)) == len(source)


def unchanged(history_BL, length_B):
    column_BL = np.where(history_BL > 0, np.arange(history_BL.shape[1]), -1)
    return Viewed(history_BL, length_B, column_BL)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_view_stands_in_the_place_of_the_last_entries(offer, length):
    """Twice the last one, reversed, written down row by row; batches get the shortest length that holds them."""

    def backwards(history_BL, length_B, rng):
        column_BL = np.arange(history_BL.shape[1])
        column_BL = np.where(column_BL < length_B[:, None], length_B[:, None] - 1 - column_BL, -1)
        item_BL = np.where(column_BL >= 0, np.take_along_axis(history_BL, np.maximum(column_BL, 0), axis=1), 0)
        return (Viewed(item_BL, length_B, column_BL),)

    viewing = Viewing(backwards, length, replaces=True)
    buckets = (4, 9, LENGTH)
    plain = source_of(offer, methods.Treatment(), buckets=buckets)
    found = source_of(offer, methods.Treatment(viewing=viewing), buckets=buckets)
    for i in range(len(plain)):
        for before_BL, after_BL in (
            (plain[i].history_BL, found[i].history_BL),
            (plain[i].feedback_BL, found[i].feedback_BL),
        ):
            assert after_BL.dtype == before_BL.dtype
            for before_L, after_L, item_L in zip(before_BL, after_BL, plain[i].history_BL, strict=True):
                own = before_L[item_L > 0].tolist()
                expected = own[:-length] + own[-length:][::-1]
                assert after_L.tolist() == expected + [0] * (len(after_L) - len(own))
        longest = (plain[i].history_BL > 0).sum(axis=1).max()
        assert found[i].history_BL.shape[1] == next(bound for bound in buckets if bound >= longest)
        assert found[i].borrowed_BL.shape == found[i].history_BL.shape


def test_longer_views_get_a_longer_batch(offer):
    plain = source_of(offer, methods.Treatment(), buckets=(8, LENGTH))
    found = source_of(offer, METHODS["ran"].treat(offer._replace(baselines=baselines.Settings())), buckets=(8, LENGTH))
    short = [i for i in range(len(plain)) if plain[i].history_BL.shape[1] == 8]
    assert short
    for i in short:
        assert found[i].history_BL.shape[1] == LENGTH
        before_B, after_B = ((one.history_BL > 0).sum(axis=1) for one in (plain[i], found[i]))
        np.testing.assert_array_equal(after_B, np.where(before_B > 0, before_B + 10, 0))


def test_views_do_not_replace_borrowed_entries(offer):
    treatment = methods.lend(offer, offer.borrowed)._replace(viewing=METHODS["ran"].treat(offer).viewing)
    source = source_of(offer, treatment)
    with pytest.raises(ValueError, match="expected rows that borrow nothing, found borrowed entries"):
        [source[i] for i in range(len(source))]


# --- losses on views


@pytest.mark.parametrize("kind", ["contrastive", "mixup"])
def test_a_loss_of_no_weight_is_the_base_bit_for_bit(offer, kind):
    method = METHODS["cl4srec" if kind == "contrastive" else "basrec"]
    treatment = method.treat(offer)
    assert treatment.objective.kind == kind
    source = source_of(offer, treatment)
    made = [source[i] for i in range(3)]
    model = model_of(offer, mask_token=method.mask_token)
    nothing = treatment.objective._replace(weight=0.0, cross_weight=0.0)
    base, _ = train(*model, None, [batch._replace(views=None) for batch in made])
    for objective, same in ((nothing, True), (treatment.objective, False)):
        state, _ = train(*model, objective, made)
        equal = [np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (state.params, base.params)), strict=True)]
        assert all(equal) == same


def share_of(model, tables, objective, axis_name):
    loss = objectives.make_loss(model.clone(axis_name=axis_name), axis_name=axis_name, objective=objective)
    return lambda params, statistics, batch: loss(params, statistics, batch, tables, jax.random.key(7))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("cl4srec", {"backbone": "dnn", "activation": "dice"}), ("basrec_budget", {"apart": True})],
)
def test_shares_of_devices_add_up_and_padding_changes_nothing(offer, name, changes):
    """Loss and gradients of 4 devices and of one agree, whatever the views of rows hold that do not count."""
    treatment = METHODS[name].treat(offer)
    source = source_of(offer, treatment, size=32)
    batch = next(source[i] for i in range(len(source)) if source[i].views.weight_B.sum() > 5)
    batch = batch._replace(weight_B=batch.weight_B * (np.arange(32) != 4))
    counts_B = np.arange(len(batch.views.weight_B)) != 4
    batch = batch._replace(views=batch.views._replace(weight_B=batch.views.weight_B * counts_B))
    model, tables, variables = model_of(offer, mask_token=True, **changes)
    params, statistics = variables["params"], variables["statistics"]

    def one(params, batch):
        share = share_of(model, tables, treatment.objective, None)(params, statistics, batch)
        return share.loss, share

    def four(params):
        part = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
        share = share_of(model, tables, treatment.objective, "device")
        shares = jax.vmap(functools.partial(share, params, statistics), axis_name="device")(part)
        return shares.loss.sum(), shares

    whole = jax.jit(jax.value_and_grad(one, has_aux=True))
    (value, share), gradient = whole(params, batch)
    (found, shares), found_gradient = jax.jit(jax.value_and_grad(four, has_aux=True))(params)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(shares.metrics["view_loss"].sum(), share.metrics["view_loss"], rtol=1e-4)
    assert share.metrics["view_loss"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), found_gradient, gradient)
    # The running statistics are those of the click loss alone.
    click = jax.jit(share_of(model, tables, None, None))(params, statistics, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), share.statistics, click.statistics)
    views = batch.views
    other_BVW = np.where((views.weight_B == 0)[:, None, None], np.roll(views.item_BVW, 5, axis=0), views.item_BVW)
    assert (other_BVW != views.item_BVW).any()
    (value_of_other, _), gradient_of_other = whole(params, batch._replace(views=views._replace(item_BVW=other_BVW)))
    np.testing.assert_allclose(value_of_other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), gradient_of_other, gradient)


def test_contrastive_loss_is_of_what_the_target_draws_from_the_views(offer):
    """NT-Xent over the pooled views, written with the parts of the backbone and a loop over anchors."""
    treatment = METHODS["cl4srec"].treat(offer)
    batch = source_of(offer, treatment, size=12)[0]
    model, tables, variables = model_of(offer, mask_token=True)
    pooled = []
    for view in range(2):
        seen = batch._replace(
            history_BL=batch.views.item_BVW[:, view],
            feedback_BL=batch.views.feedback_BVW[:, view],
            borrowed_BL=np.zeros(batch.views.item_BVW[:, view].shape, bool),
        )
        target_BD, history_BLD = model.apply(variables, seen, tables, method="embed")
        (interest_BD,) = model.apply(variables, target_BD, history_BLD, seen, train=False, method="pool")
        pooled.append(np.asarray(interest_BD, np.float64)[batch.views.weight_B > 0])
    anchors = np.concatenate(pooled)
    n = len(pooled[0])
    losses = []
    for a in range(2 * n):
        product = anchors @ anchors[a]
        others = np.delete(product, a)
        losses.append(np.log(np.exp(others).sum()) - product[(a + n) % (2 * n)])
    share = jax.jit(share_of(model, tables, treatment.objective, None))(variables["params"], {}, batch)
    np.testing.assert_allclose(share.metrics["view_loss"], 0.1 * np.mean(losses), rtol=1e-4)


def test_a_batch_without_views_and_a_backbone_without_parts_are_refused(offer):
    model, tables, variables = model_of(offer)
    batch = source_of(offer, methods.Treatment())[0]
    share = share_of(model, tables, Objective("contrastive", 0.1), None)
    with pytest.raises(ValueError, match="expected a batch with views, found none"):
        share(variables["params"], {}, batch)
    batch = source_of(offer, METHODS["cl4srec"].treat(offer))[0]
    with pytest.raises(ValueError, match="expected one of .*contrastive.*mixup.*found 'distance'"):
        share_of(model, tables, Objective("distance", 0.1), None)(variables["params"], {}, batch)
    with pytest.raises(ValueError, match="din and dnn have them.*found Tower without embed, pool, decide"):
        check_backbone(Tower((3,), "prelu"))
