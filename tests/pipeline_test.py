"""The whole of MARS on a small planted log: stages are done once, damage is mended, bundles travel."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from marsjax import pipeline, retrieval
from marsjax.configuration import override
from marsjax.data.synthetic import make_synthetic
from marsjax.defaults import default_config
from marsjax.records import HIGH, LOW, TEST
from marsjax.serving import bundle as serving

SMALL = {
    "data.synthetic.n_users": "120",
    "data.synthetic.n_items": "90",
    "data.synthetic.high_events": "20,30",
    "split.history": "positives",
    "alignment.id_width": "8",
    "alignment.width": "16",
    "alignment.hidden": "8",
    "alignment.blocks": "8",
    "alignment.stein_items": "32",
    "retrieval.history": "20",
    "ctr.cap": "20",
    "ctr.buckets": "10,20",
    "ctr.batch_size": "64",
    "ctr.epochs": "1",
    "ctr.tower": "8",
    "ctr.attention": "4",
    "evaluation.bootstrap": "20",
    "training.sharding": "single",
}


def small_config(preset="mars", **changes):
    config = default_config(preset)
    for key, value in (SMALL | changes).items():
        override(config, key, value)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(small_config(), folder)
    return folder


def stages(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "stages").glob("*/done.json")} | {
        path.parent.name: path.stat().st_mtime_ns for path in (folder / "stages").glob("*/done.json")
    }


def test_results_are_written_with_all_methods_and_groups(workdir):
    written = json.loads((workdir / "results.json").read_text())
    assert {row["method"] for row in written["rows"]} == {"base", "random_donor", "popular_items", "mars"}
    assert {row["group"] for row in written["rows"]} == {"all", "low", "middle", "high"}
    assert "| mars |" in (workdir / "results.md").read_text()


def test_finished_stages_are_skipped_and_others_are_not(workdir, caplog):
    before = stages(workdir)
    with caplog.at_level(logging.INFO):
        pipeline.run(small_config(), workdir)
    assert stages(workdir) == before
    assert caplog.text.count("already done, skipped") >= 6
    pipeline.run(small_config(**{"augmentation.theta_quantile": "0.25", "evaluation.methods": "base,mars"}), workdir)
    new = set(stages(workdir)) - set(before)
    assert {name.split("-")[0] for name in new} == {"augmentation", "mars"}


def test_a_stage_whose_file_changed_is_built_again(workdir, caplog):
    (folder,) = (workdir / "stages").glob("base-*")
    score = np.load(folder / "test.npz")["score"]
    (folder / "test.npz").write_bytes((folder / "test.npz").read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        pipeline.run(small_config(), workdir)
    assert "test.npz does not match its sum" in caplog.text
    np.testing.assert_array_equal(np.load(folder / "test.npz")["score"], score)


def test_donors_are_high_active_borrowers_low_active_and_never_the_same(workdir, tmp_path):
    config = small_config()
    loaded = pipeline.load(config)
    pipeline.augment(config, workdir, output=tmp_path / "borrowed.parquet")
    columns = pyarrow.parquet.read_table(tmp_path / "borrowed.parquet").to_pydict()
    assert list(columns) == [
        "user", "history_length", "donor", "similarity", "item", "item_similarity", "kept", "position",
    ]  # fmt: skip
    group = dict(zip(loaded.dataset.log.raw_user_U, loaded.rows.group_U, strict=True))
    assert {group[user] for user in columns["user"]} == {LOW}
    assert {group[user] for user in columns["donor"]} == {HIGH}
    kept = np.array(columns["kept"])
    assert 0 < kept.mean() < 1
    assert (np.array(columns["position"])[~kept] == -1).all()


def test_donors_histories_hold_training_items_only(workdir):
    loaded = pipeline.load(small_config())
    donors = pipeline.find_donors(loaded.rows, cap=20)
    log = loaded.dataset.log
    for row, user in enumerate(donors.user_P[:10]):
        events = slice(log.start_U1[user], log.start_U1[user] + loaded.rows.train_length_U[user])
        positives = log.item_E[events][log.label_E[events] > 0][-20:]
        np.testing.assert_array_equal(donors.item_PL[row][donors.item_PL[row] > 0], positives)


@pytest.fixture(scope="module")
def exported(workdir):
    pipeline.export(small_config(), workdir, output=workdir / "bundle")
    return workdir / "bundle"


def test_bundle_gives_the_same_scores_in_a_new_process(workdir, exported, tmp_path):
    """The test rows as requests, with the history before each: scores agree with the run's to 1e-6."""
    loaded = pipeline.load(small_config())
    log, rows, items = loaded.dataset.log, loaded.rows, loaded.dataset.items
    test_E = np.flatnonzero(rows.split_E == TEST)
    with (tmp_path / "requests.jsonl").open("w") as file:
        for event in test_E:
            user = rows.user_E[event]
            own = rows.histories.item_H[rows.histories.start_U1[user] : rows.histories.end_E[event]]
            request = {
                "user": str(log.raw_user_U[user]),
                "items": [str(items.raw_id_N[log.item_E[event]])],
                "history": [str(items.raw_id_N[item]) for item in own],
            }
            file.write(json.dumps(request) + "\n")
    command = [sys.executable, "-m", "marsjax.main", "score", f"--bundle={exported}"]
    command += [f"--requests={tmp_path}/requests.jsonl", f"--output={tmp_path}/scores.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = [json.loads(line)["scores"][0] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    (folder,) = [
        path for path in (workdir / "stages").glob("mars-*")
        if np.allclose(np.load(path / "test.npz")["score"], found, atol=1e-6)
    ]  # fmt: skip
    assert folder.is_dir()
    assert np.ptp(found) > 0.01


def test_unknown_users_score_and_unknown_items_are_named(exported):
    bundle = serving.load_bundle(exported)
    item = str(bundle.items.raw_id_N[3])
    (stranger,) = serving.score(bundle, [serving.Request("nobody", (item, item))])
    assert np.isfinite(stranger).all()
    assert stranger[0] == stranger[1]
    with pytest.raises(ValueError, match="request 2: expected items that the bundle knows, found 'gone'"):
        serving.score(bundle, [serving.Request("nobody", (item,)), serving.Request("nobody", (item, "gone"))])


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "add", "manifest"])
def test_damaged_bundles_are_refused(exported, tmp_path, how):
    folder = tmp_path / "bundle"
    subprocess.run(["cp", "-r", str(exported), str(folder)], check=True)
    path = folder / "index" / "graph.usearch"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flip": lambda: path.write_bytes(data),
        "truncate": lambda: path.write_bytes(data[:50]),
        "remove": path.unlink,
        "add": lambda: (folder / "extra").write_text(""),
        "manifest": lambda: (folder / "manifest.json").write_text('{"format": 1, "sha'),
    }[how]()
    with pytest.raises(ValueError, match="graph.usearch|extra|manifest.json"):
        serving.load_bundle(folder)


def test_bundled_index_finds_the_donors_that_lent(workdir, exported):
    """The index holds vectors less the centre, and the centre lies beside it: a service must find the same donors."""
    config = small_config()
    loaded = pipeline.load(config)
    donation = pipeline.augment_stage(config, loaded, pipeline.align_stage(config, loaded, workdir, 0), workdir, 0)
    whole_Q = donation.queries.end_Q == loaded.rows.histories.train_end_U[donation.queries.user_Q]
    donor_Q = np.load(donation.folder / "candidates.npz")["donor_QS"].max(axis=1)[whole_Q]
    centre_D = np.load(exported / "donors.npz")["centre_D"]
    query_QD = np.load(exported / "users.npz")["user_UD"][donation.queries.user_Q[whole_Q]] - centre_D
    assert np.abs(centre_D).max() > 0.01
    found = retrieval.search(retrieval.load_index(exported / "index"), query_QD, k=1)
    np.testing.assert_array_equal(found.user_BK[:, 0], donor_Q)


@pytest.mark.parametrize("free", [20_000, 90_000])
@pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in.*(Event loop is closed|was never awaited):pytest.PytestUnraisableExceptionWarning"
)  # orbax, where one of the arrays it writes at once fails
def test_full_disk_leaves_no_bundle(workdir, small_disk, free):
    (small_disk / "other").write_bytes(bytes(3 * 2**20 - free))
    with pytest.raises(OSError, match="no space left while writing .*bundle; nothing was left half-written"):
        pipeline.export(small_config(), workdir, output=small_disk / "bundle")
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_continued_run_reports_the_time_of_its_parts(workdir):
    pipeline.run(small_config(), workdir)  # all stages are there
    spent = [json.loads(path.read_text())["seconds"] for path in (workdir / "stages").glob("*-seed0-*/done.json")]
    written = json.loads((workdir / "results.json").read_text())
    parts = sum(
        json.loads(path.read_text())["seconds"]
        for name in ("alignment", "augmentation", "base", "random_donor", "popular_items", "mars")
        for path in sorted((workdir / "stages").glob(f"{name}-seed0-*/done.json"), key=os.path.getmtime)[:1]
    )
    assert parts <= written["wall_seconds"] <= sum(spent) + 60


def test_bundles_never_change(exported, workdir):
    with pytest.raises(ValueError, match="does not exist yet"):
        pipeline.export(small_config(), workdir, output=exported)
    assert serving.load_bundle(exported).manifest["format"] == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "movielense"),
        ("split.kind", "random"),
        ("alignment.entropy_sign", "minus"),
        ("alignment.estimator", "kde"),
        ("alignment.modalities", "text,audio"),
        ("retrieval.backend", "faiss"),
        ("augmentation.strategy", "nearest"),
        ("augmentation.vectors", "dynamic"),
        ("ctr.backbone", "mlp"),
        ("ctr.activation", "relu"),
        ("evaluation.methods", "base,magic"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(ValueError, match=f"expected.*found.*{value.split(',')[-1]}"):
        pipeline.run(small_config(**{key: value}), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation.strategy": "kth_similar"},
        {"augmentation.strategy": "dp", "augmentation.vectors": "static"},
        {"augmentation.strategy": "most_similar", "augmentation.time_safe": "true"},
        {"retrieval.backend": "exact", "augmentation.drop_target": "true"},
        {"alignment.modalities": "image", "ctr.backbone": "dnn"},
        {"ctr.activation": "dice", "ctr.apart": "true", "ctr.softmax": "false"},
        {"split.kind": "last_fraction", "training.sharding": "shard_map"},
        {"split.kind": "global_time", "data.synthetic.shuffle_features": "true"},
    ],
)
def test_options_run(changes, tmp_path):
    pipeline.run(small_config(**({"evaluation.methods": "base,mars"} | changes)), tmp_path)
    assert (tmp_path / "results.json").is_file()


def test_paper_preset_runs(tmp_path):
    pipeline.run(small_config("paper", **{"evaluation.methods": "base,mars"}), tmp_path)
    assert (tmp_path / "results.json").is_file()


def test_own_tables_run(tmp_path):
    """A log in Parquet, items in CSV, vectors in npz, columns mapped; and a misnamed column is named."""
    dataset = make_synthetic(n_users=120, n_items=90, high_events=(20, 30), seed=0)
    log, items = dataset.log, dataset.items
    columns = {
        "uid": np.repeat(log.raw_user_U, np.diff(log.start_U1)),
        "sku": items.raw_id_N[log.item_E],
        "clicked": log.label_E.astype(int),
        "ts": log.time_E,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "events.parquet")
    pyarrow.csv.write_csv(pyarrow.table({"sku": items.raw_id_N[1:], "name": items.title_N[1:]}), tmp_path / "items.csv")
    np.savez(tmp_path / "text.npz", id=items.raw_id_N[1:], embedding=items.modalities["text"].feature_NF[1:])
    changes = {
        "data.source": "tabular",
        "data.events_file": str(tmp_path / "events.parquet"),
        "data.items_file": str(tmp_path / "items.csv"),
        "data.text_features": str(tmp_path / "text.npz"),
        "data.columns.user": "uid",
        "data.columns.item": "sku",
        "data.columns.label": "clicked",
        "data.columns.time": "ts",
        "data.columns.title": "name",
        "alignment.modalities": "text",
        "evaluation.methods": "base,mars",
    }
    pipeline.run(small_config(**changes), tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()
    with pytest.raises(ValueError, match="column 'label' for label, found uid, sku, clicked, ts"):
        pipeline.run(small_config(**(changes | {"data.columns.label": "label"})), tmp_path / "run")


def test_a_split_that_nothing_can_be_judged_on_is_refused(tmp_path):
    columns = {"user": [1, 1, 2, 2], "item": ["a", "b", "a", "c"], "label": [1, 0, 1, 1], "time": [1, 2, 1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "events.parquet")
    changes = {"data.source": "tabular", "data.events_file": str(tmp_path / "events.parquet")}
    with pytest.raises(ValueError, match="expected validation rows of both labels, found 0 rows"):
        pipeline.run(small_config(**changes), tmp_path)
    pipeline.inspect(small_config(**changes), tmp_path)


def test_no_key_hides_behind_a_method_of_the_configuration():
    """`config.data.items` would be the method of the dictionary, whatever was set."""
    config = default_config()
    for section in config.values():
        if isinstance(section, ConfigDict):
            assert not [key for key in section if hasattr(ConfigDict, key)]
