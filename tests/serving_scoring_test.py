"""Online and offline are the same functions: what is looked up is what training saw."""

import pathlib

import jax
import numpy as np
import pytest

from marsjax.ctr import objective
from marsjax.ctr.din import Din
from marsjax.records import LOW, CtrBatch, ItemTables
from marsjax.serving import bundle as serving
from marsjax.serving import lending, portable, runner, scoring
from marsjax.serving.events import Entry
from marsjax.training import checkpoint


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return serving.load_bundle(bundle_folder)


def low_users(bundle):
    lent_U = np.diff(bundle.users.borrowed_U1)
    return np.flatnonzero((bundle.users.group_U == LOW) & (lent_U > 0))


def test_what_is_looked_up_anew_is_what_the_pipeline_lent(bundle):
    users = low_users(bundle)
    found = lending.lend(bundle.lenders, bundle.manifest["config"], bundle.users.user_UD[users])
    assert len(users) > 5
    for user, lent in zip(users, found, strict=True):
        expected = scoring.table_lent(bundle, user)
        for name in ("item_S", "time_S", "donor_S", "mark_S"):
            np.testing.assert_array_equal(getattr(lent, name), getattr(expected, name), err_msg=name)
        np.testing.assert_allclose(lent.similarity_S, expected.similarity_S, atol=1e-5)
    assert any(mark == 1 for lent in found for mark in lent.mark_S) or any(
        mark == 2 for lent in found for mark in lent.mark_S
    )


def test_a_vector_without_length_or_an_empty_index_lends_nothing(bundle):
    config, width = bundle.manifest["config"], len(bundle.lenders.centre_D)
    (nothing,) = lending.lend(bundle.lenders, config, np.zeros((1, width), np.float32))
    assert not len(nothing.item_S)
    empty = bundle.lenders._replace(
        user_index=lending.retrieval.build_index(np.zeros((0, width), np.float32), np.zeros(0, np.int64))
    )
    (nothing,) = lending.lend(empty, config, np.ones((1, width), np.float32))
    assert not len(nothing.item_S)


def test_lenders_come_back_as_they_were_written(bundle, tmp_path):
    lending.write_lenders(tmp_path, bundle.lenders)
    read = lending.read_lenders(tmp_path, bundle.items.item_ND)
    users = low_users(bundle)
    config, vector_QD = bundle.manifest["config"], bundle.users.user_UD[users]
    one, other = (lending.lend(lenders, config, vector_QD) for lenders in (bundle.lenders, read))
    np.testing.assert_array_equal(
        np.concatenate([lent.item_S for lent in one]), np.concatenate([lent.item_S for lent in other])
    )


def test_tables_of_a_bundle_stay_on_the_disk(bundle):
    for array in (bundle.users.user_UD, bundle.users.item_H, bundle.items.item_ND, bundle.lenders.donors.item_PL):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_scores_do_not_depend_on_what_else_is_scored(bundle):
    rng = np.random.default_rng(0)
    names, users = bundle.items.raw_id_N[1:], bundle.users.raw_user_U
    requests = [
        scoring.Request(str(rng.choice(users)), tuple(rng.choice(names, rng.integers(1, 40)))) for _ in range(60)
    ]
    together = scoring.score(bundle, requests)
    for request, score_C in zip(requests, together, strict=True):
        (alone,) = scoring.score(bundle, [request])
        np.testing.assert_allclose(alone, score_C, atol=1e-6)
    many = scoring.Request(str(users[0]), tuple(rng.choice(names, 2500)))  # more than one batch holds
    (score_C,) = scoring.score(bundle, [many])
    assert score_C.shape == (2500,)
    (last,) = scoring.score(bundle, [many._replace(items=many.items[-3:])])
    np.testing.assert_allclose(score_C[-3:], last, atol=1e-6)
    assert scoring.score(bundle, []) == []


@pytest.mark.parametrize("drop_target", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_candidates_of_one_user_score_as_rows_do(drop_target, activation):
    """With marks, numbers and borrowed items apart; borrowed entries that are the candidate are blanked in both."""
    rng, n, length = np.random.default_rng(0), 37, 9
    model = Din(20, 1, n_users=4, levels=2, apart=True, activation=activation)
    tables = ItemTables(np.zeros((20, 1), np.int32))
    made = objective.init_model(model, tables, seed=0, dense=2)
    target_C = np.zeros(objective.CANDIDATES, np.int32)
    target_C[:n] = rng.integers(0, 20, n)
    dense_CJ = rng.normal(size=(objective.CANDIDATES, 2)).astype(np.float32)
    history_BL = rng.integers(0, 20, (1, length)).astype(np.int32)
    borrowed_BL = (np.arange(length) < 6)[None] & (history_BL > 0)
    mark_BL = (rng.integers(1, 3, (1, length)) * (history_BL > 0)).astype(np.int8)
    one_B, user_B = np.ones(1, np.float32), np.array([2], np.int32)
    one = CtrBatch(user_B, target_C, one_B, one_B, history_BL, borrowed_BL, mark_BL, dense_CJ)
    found_C = objective.probabilities_of_one(
        model, made["params"], made["statistics"], one, np.int32(n), tables, drop_target=drop_target
    )
    same_BL = borrowed_BL & (history_BL == target_C[:n, None])
    assert same_BL.any()
    kept_BL = ~same_BL if drop_target else np.ones_like(same_BL)
    ones_B = np.ones(n, np.float32)
    rows = CtrBatch(
        np.repeat(user_B, n), target_C[:n], ones_B, ones_B, history_BL * kept_BL, borrowed_BL & kept_BL,
        (mark_BL * kept_BL).astype(np.int8), dense_CJ[:n],
    )  # fmt: skip
    expected_B = objective.probabilities(model, made["params"], made["statistics"], rows, tables)
    np.testing.assert_allclose(np.asarray(found_C)[:n], expected_B, atol=1e-6)


def test_the_portable_function_scores_as_the_module_does(bundle):
    """StableHLO beside the orbax export, for batches and lengths that neither was compiled for."""
    function = portable.load_scoring(bundle.folder / serving.SCORING)
    leaves = checkpoint.load_params(bundle.folder / "ctr")
    tables = portable.table_arrays(bundle.tables)
    with np.load(bundle.folder / serving.READ_BY_SCORING) as stored:  # the same, for who has NumPy alone
        assert set(stored) == {f"leaf:{name}" for name in leaves} | {f"table:{name}" for name in tables}
        for name, value in [*leaves.items(), *tables.items()]:
            np.testing.assert_array_equal(stored[f"{'leaf' if name in leaves else 'table'}:{name}"], value)
    for users, length in ((low_users(bundle)[:3], 13), (low_users(bundle)[:7], 20)):
        rows = [
            scoring.Row(
                scoring.Profile(int(user), *scoring.own_history(bundle, user), scoring.table_lent(bundle, user)),
                np.arange(1, 4, dtype=np.int32),
            )
            for user in users
        ]
        rows = [row for row in rows if len(scoring.history(bundle, row)[0]) <= length]
        expected = np.concatenate(scoring.score_rows(bundle, rows))
        (batch,) = scoring.make_batches(bundle, rows, length)
        n = len(expected)
        found = function.call(
            leaves,
            tables,
            {
                "user": batch.user_B[:n],
                "target": batch.target_B[:n],
                "history": batch.history_BL[:n],
                "borrowed": batch.borrowed_BL[:n],
            },
        )
        assert batch.borrowed_BL.any()
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6)


def test_a_name_with_nul_is_another_name(bundle):
    """Arrays of text lose them at the end."""
    item, user = str(bundle.items.raw_id_N[3]), str(bundle.users.raw_user_U[2])
    np.testing.assert_array_equal(serving.item_numbers(bundle, [item, item + "\0"]), [3, 0])
    np.testing.assert_array_equal(serving.user_numbers(bundle, [user + "\0", user]), [-1, 2])


def test_the_page_says_how_to_score_without_this_package(bundle, tmp_path):
    """The example of docs/serving.md, on a bundle that a training has continued."""
    scaled = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(0.5), bundle.params)
    ctr = {"params": scaled, "statistics": bundle.statistics}
    serving.continue_bundle(tmp_path / "bundle", bundle, ctr=ctr, trained={"factor": 0.5})
    made = serving.load_bundle(tmp_path / "bundle")
    text = (pathlib.Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    (example,) = (part.partition("```")[0] for part in text.split("```python\n")[1:] if "stablehlo" in part)
    user = str(made.users.raw_user_U[low_users(made)[0]])
    names = tuple(str(name) for name in made.items.raw_id_N[[3, 5]])
    told = 'folder, user, candidates = "runs/bundle/", "42", ["7", "9"]'
    assert told in example
    values = {}
    exec(example.replace(told, f"folder, user, candidates = {f'{made.folder}/'!r}, {user!r}, {names!r}"), values)
    (expected,) = scoring.score(made, [scoring.Request(user, names)])
    np.testing.assert_allclose(values["scores"], expected, atol=1e-6)


def test_the_encoder_of_a_bundle_makes_the_vectors_of_the_pipeline(bundle):
    """Vectors of users from their training histories, which a bundle's longest histories begin with."""
    encoder, users = serving.load_encoder(bundle), bundle.users
    donors = bundle.lenders.donors
    histories = [
        [Entry(int(t), "", str(bundle.items.raw_id_N[i]), 1.0) for i, t in zip(items, times, strict=True) if i > 0]
        for items, times in zip(donors.item_PL, donors.time_PL, strict=True)
    ]
    found = runner.embed_histories(bundle, encoder, histories)
    np.testing.assert_allclose(found, users.user_UD[donors.user_P], atol=2e-5)


def test_own_entries_survive_and_late_loans_are_blanked(bundle):
    cap = scoring.lengths(bundle)[-1]
    lent = lending.Lent(
        np.arange(1, 6, dtype=np.int32), np.arange(10, 60, 10), np.zeros(5, np.int32), np.zeros(5, np.float32),
        np.full(5, 2, np.int8),
    )  # fmt: skip
    own = np.arange(20, 20 + cap - 3, dtype=np.int32)
    row = scoring.Row(
        scoring.Profile(0, own, np.ones(len(own), np.int8), scoring.not_graded(own), lent),
        np.array([1], np.int32),
        time=40,
    )
    item_L, mark_L, extra = scoring.history(bundle, row)
    assert extra == 3
    assert list(item_L[:3]) == [3, 4, 5]
    np.testing.assert_array_equal(item_L[3:], own)
    assert list(mark_L[:4]) == [2, 2, 2, 1]
    safe = bundle._replace(manifest=bundle.manifest | {"lends": bundle.manifest["lends"] | {"time_safe": True}})
    assert list(scoring.history(safe, row)[0][:3]) == [3, 4, 0]
    full = row._replace(
        profile=row.profile._replace(item_L=np.arange(cap + 9, dtype=np.int32), mark_L=np.zeros(cap + 9, np.int8))
    )
    item_L, _, extra = scoring.history(bundle, full)
    assert extra == 0
    assert list(item_L) == list(range(9, cap + 9))
