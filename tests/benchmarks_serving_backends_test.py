"""What the benchmark serves in marsjax's place gives its scores."""

import jax
import numpy as np
import pytest

from benchmarks import backends, serving_backends
from marsjax.ctr import objective
from marsjax.serving import bundle as serving
from marsjax.serving import scoring
from marsjax.serving.lending import Lent

VARIANTS = {
    "together": {},
    "apart": {"apart": True},
    "dice": {"apart": True, "activation": "dice", "attention": (16, 8)},
    "sum": {"softmax": False, "apart": True},
    "drop_target": {"drop_target": True},
    "drop_target_apart": {"drop_target": True, "apart": True, "levels": 2, "n_users": 0},
}


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return serving.load_bundle(bundle_folder)


def variant(bundle, *, drop_target=False, **changes):
    """The bundle with another DIN, whose parameters and statistics are drawn; its folder names it."""
    model = bundle.model.clone(**changes)
    tables = bundle.tables._replace(vector_ND=None)
    made, rng = (
        objective.init_model(model, tables, seed=1, dense=scoring.dense_width(bundle.known)),
        np.random.default_rng(1),
    )

    def draw(path, value):
        drawn = rng.normal(0, 0.3, value.shape).astype(np.float32)
        return np.abs(drawn) + 0.1 if path[-1].key == "variance" else drawn

    params, statistics = (jax.tree.map_with_path(draw, made[name]) for name in ("params", "statistics"))
    config = bundle.manifest["config"]
    ctr = config["ctr"] | {"inputs": "strong" if model.levels else "ids"}
    lends = bundle.manifest["lends"] | {"drop_target": drop_target}
    return bundle._replace(
        model=model, params=params, statistics=statistics, tables=objective.with_vectors(model, params, tables),
        manifest=bundle.manifest | {"config": config | {"ctr": ctr}, "lends": lends},
        folder=bundle.folder / str((drop_target, *changes.items())),
    )  # fmt: skip


def rows_of(bundle):
    """Rows of 1, 17, 100 and 300 candidates; histories of 0, some and cap entries; with and without borrowed items."""
    rng, n_items, cap = np.random.default_rng(0), len(bundle.items.raw_id_N), scoring.lengths(bundle)[-1]
    rows = []
    for count in (1, 17, 100, 300):
        for own, lent in ((0, 0), (0, 5), (7, 0), (7, 9), (cap, 0), (cap - 4, 4), (0, cap)):
            drawn = Lent(
                rng.integers(1, n_items, lent).astype(np.int32), np.arange(lent), np.zeros(lent, np.int32),
                np.zeros(lent, np.float32), rng.integers(1, 3, lent).astype(np.int8),
            )  # fmt: skip
            item_L, mark_L = rng.integers(1, n_items, own).astype(np.int32), rng.integers(1, 3, own).astype(np.int8)
            target_C = rng.integers(0, n_items, count).astype(np.int32)
            if lent:
                target_C[0] = drawn.item_S[-1]
            rows.append(
                scoring.Row(
                    scoring.Profile(int(rng.integers(-1, 9)), item_L, mark_L, scoring.not_graded(item_L), drawn),
                    target_C,
                )
            )
    lengths = {len(scoring.history(bundle, row)[0]) for row in rows}
    assert {0, cap} <= lengths
    return rows


def hold(bundle, score_rows):
    rows = rows_of(bundle)
    expected = scoring.score_rows(bundle, rows)
    assert np.ptp(np.concatenate(expected)) > 0.01
    for row, found_C, expected_C in zip(rows, score_rows(bundle, rows), expected, strict=True):
        about = (
            f"{len(row.target_C)} candidates, {len(row.profile.item_L)} own, {len(row.profile.lent.item_S)} borrowed"
        )
        assert found_C.dtype == np.float32
        np.testing.assert_allclose(found_C, expected_C, atol=1e-5, err_msg=about)


@pytest.mark.parametrize("name", ["bundle", *VARIANTS])
def test_torch_scores_as_marsjax_does(bundle, name):
    pytest.importorskip("torch", reason="torch is absent")
    chosen = bundle if name == "bundle" else variant(bundle, **VARIANTS[name])
    hold(chosen, backends.score_rows_with(lambda it: backends.torch_run(it, threads=1)))


@pytest.mark.parametrize("name", ["bundle", *VARIANTS])
def test_onnx_scores_as_marsjax_does(bundle, name, tmp_path):
    for package in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is absent")
    chosen = bundle if name == "bundle" else variant(bundle, **VARIANTS[name])
    backends.export_onnx(chosen, tmp_path / "din.onnx")
    hold(chosen, backends.score_rows_with(lambda _: backends.onnx_run(tmp_path / "din.onnx")))


def test_time_safe_blanks_are_left_out(bundle):
    item_S = np.array([3, 4, 5], np.int32)
    lent = Lent(item_S, np.array([10, 90, 20]), np.zeros(3, np.int32), np.zeros(3, np.float32), np.full(3, 2, np.int8))
    profile = scoring.Profile(0, np.array([6], np.int32), np.array([1], np.int8), np.ones(1, np.float32), lent)
    safe = bundle._replace(manifest=bundle.manifest | {"lends": bundle.manifest["lends"] | {"time_safe": True}})
    found = backends.inputs_of(safe, scoring.Row(profile, np.array([1, 2], np.int32), time=50))
    assert found.item_L.tolist() == [3, 5, 6]
    assert found.mark_L.tolist() == [2, 2, 1]
    assert found.lent_L.tolist() == [True, True, False]


def test_another_model_is_refused(bundle):
    torch_din = pytest.importorskip("benchmarks.torch_din", reason="torch is absent")
    other = bundle._replace(model=bundle.model.clone(dtype="bfloat16"))
    with pytest.raises(ValueError, match="expected a bundle of a Din in float32, found Din in bfloat16"):
        torch_din.TorchDin(other)


def test_what_is_missing_is_told():
    with pytest.raises(SystemExit, match="no_such_package .* pip install torch onnx onnxruntime"):
        backends.need("json", "no_such_package")


def test_the_service_scores_with_the_backend(bundle, monkeypatch):
    """The module's function is replaced before `marsjax serve` runs, with its flags."""
    seen = {}
    monkeypatch.setattr(scoring, "score_rows", scoring.score_rows)
    monkeypatch.setattr(serving_backends, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(backends, "need", lambda *names: None)
    monkeypatch.setattr(
        backends, "torch_run", lambda it, threads: lambda inputs: np.full(len(inputs.target_C), threads)
    )
    monkeypatch.setattr(serving_backends, "marsjax_main", lambda words: seen.update(words=words) or 0)
    assert serving_backends.serve(["--backend=torch", "--threads=2", "--root=r", "--config.serving.port=1"]) == 0
    assert seen["words"] == ["serve", "--root=r", "--config.serving.port=1"]
    user = str(bundle.users.raw_user_U[0])
    (score_C,) = scoring.score(bundle, [scoring.Request(user, tuple(bundle.items.raw_id_N[1:4]))])
    assert score_C.tolist() == [2, 2, 2]
