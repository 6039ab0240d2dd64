"""The whole of MARS on a small planted log: stages are done once, damage is mended, bundles travel."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from marsjax import alignment, commands, files, pipeline, retrieval
from marsjax import stages as stages_module
from marsjax.augmentation.baselines import BASELINES
from marsjax.augmentation.methods import METHODS
from marsjax.augmentation.queries import make_queries
from marsjax.configuration import _leaves, override
from marsjax.data.synthetic import make_synthetic
from marsjax.defaults import default_config
from marsjax.evaluation import metrics
from marsjax.records import HIGH, LOW, TEST, Borrowed
from marsjax.serving import bundle as serving
from marsjax.serving import people, scoring
from marsjax.serving.events import decode_history, encode_history
from marsjax.stages import Stages

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
    "evaluation.methods": "base,random_donor,popular_items,mars",
    "export.method": "mars",
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
    commands.run(small_config(), folder)
    return folder


def stages(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "stages").glob("*/done.json")} | {
        path.parent.name: path.stat().st_mtime_ns for path in (folder / "stages").glob("*/done.json")
    }


def test_results_are_written_with_all_methods_and_groups(workdir):
    written = json.loads((workdir / "results.json").read_text())
    methods = {"base", "random_donor", "popular_items", "mars", "best_possible"}
    assert {row["method"] for row in written["rows"]} == methods
    auc = {row["method"]: row["mean"] for row in written["rows"] if (row["metric"], row["group"]) == ("auc", "all")}
    assert max(auc, key=auc.get) == "best_possible"  # the scores that the data were drawn with
    assert {row["group"] for row in written["rows"]} == {"all", "low", "middle", "high"}
    assert "| mars |" in (workdir / "results.md").read_text()


@pytest.mark.parametrize("tables", ["lazy", "sharded"])
def test_steps_on_few_rows_learn_as_well(tmp_path, tables):
    """Also with views, whose mask is an item beyond the catalogue."""
    logloss = {}
    for name in ("dense", tables):
        config = small_config(
            **{"ctr.tables": name, "training.sharding": "shard_map", "evaluation.methods": "base,cl4srec"}
        )
        context = pipeline.Context(config, pipeline.load(config), Stages(tmp_path), 0)
        donation = pipeline.borrow(context)
        for method in ("base", "cl4srec"):
            found = pipeline.train_stage(context, donation, method).predictions
            logloss[method, name] = metrics.logloss(found.label_B, found.score_B)
    for method in ("base", "cl4srec"):
        assert logloss[method, tables] != logloss[method, "dense"]
        assert abs(logloss[method, tables] - logloss[method, "dense"]) < 0.01


def test_finished_stages_are_skipped_and_others_are_not(workdir, caplog):
    before = stages(workdir)
    with caplog.at_level(logging.INFO):
        commands.run(small_config(), workdir)
    assert stages(workdir) == before
    assert caplog.text.count("already done, skipped") >= 6
    commands.run(small_config(**{"augmentation.theta_quantile": "0.25", "evaluation.methods": "base,mars"}), workdir)
    new = set(stages(workdir)) - set(before)
    assert {name.split("-")[0] for name in new} == {"augmentation", "mars", "judged"}


def test_a_stage_whose_file_changed_is_built_again(workdir, caplog):
    (folder,) = (workdir / "stages").glob("base-*")
    score = np.load(folder / "scores.npz")["test"]
    (folder / "scores.npz").write_bytes((folder / "scores.npz").read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        commands.run(small_config(), workdir)
    assert "scores.npz does not match its sum" in caplog.text
    np.testing.assert_array_equal(np.load(folder / "scores.npz")["test"], score)


def test_donors_are_high_active_borrowers_low_active_and_never_the_same(workdir, tmp_path):
    config = small_config()
    loaded = pipeline.load(config)
    commands.augment(config, workdir, output=tmp_path / "borrowed.parquet")
    columns = pyarrow.parquet.read_table(tmp_path / "borrowed.parquet").to_pydict()
    assert list(columns) == [
        "user", "history_length", "donor", "similarity", "item", "donor_time", "donor_label", "item_similarity",
        "kept", "position",
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
    commands.export(small_config(), workdir, output=workdir / "bundle")
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
        if np.allclose(np.load(path / "scores.npz")["test"], found, atol=1e-6)
    ]  # fmt: skip
    assert folder.is_dir()
    assert np.ptp(found) > 0.01


def test_unknown_users_score_and_unknown_items_are_named(exported, caplog):
    bundle = serving.load_bundle(exported)
    item = str(bundle.items.raw_id_N[3])
    (stranger,) = scoring.score(bundle, [scoring.Request("nobody", (item, item))])
    assert "1 of 1 requests are of users unknown to the bundle" in caplog.text
    assert np.isfinite(stranger).all()
    assert stranger[0] == stranger[1]
    with pytest.raises(ValueError, match="request 2: expected items that the bundle knows, found 'gone'"):
        scoring.score(bundle, [scoring.Request("nobody", (item,)), scoring.Request("nobody", (item, "gone"))])


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
    donation = pipeline.borrow(pipeline.Context(config, loaded, Stages(workdir), 0))
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
        commands.export(small_config(), workdir, output=small_disk / "bundle")
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_continued_run_reports_the_time_and_the_commits_of_its_parts(workdir):
    (seal,) = (workdir / "stages").glob("base-seed0-*/done.json")
    done = json.loads(seal.read_text())
    seal.write_text(json.dumps(done | {"commit": "an earlier one", "seconds": 1000.0}))
    commands.run(small_config(), workdir)  # all stages are there
    written = json.loads((workdir / "results.json").read_text())
    seal.write_text(json.dumps(done))
    assert 1000 < written["wall_seconds"] < 2000
    assert "an earlier one, " in written["commit"] + ", "
    assert written["config"]["ctr"]["cap"] == 20


@pytest.mark.parametrize("damage", ["[]", "{}", '{"sha256": {}}', "{"])
def test_a_damaged_seal_builds_again(tmp_path, damage):
    def build(folder):
        (folder / "x").write_text("1")
        built.append(folder)

    built = []
    for _ in range(2):
        folder = Stages(tmp_path)("a", "0" * 64, build)
    assert len(built) == 1
    (folder / "done.json").write_text(damage)
    Stages(tmp_path)("a", "0" * 64, build)
    assert len(built) == 2


def test_finished_stages_are_read_without_a_lock(tmp_path, monkeypatch):
    """From a disk that cannot be written, or while another process reads them."""

    def build(folder):
        (folder / "x").write_text("1")

    folder = Stages(tmp_path)("a", "0" * 64, build)
    (lock,) = folder.parent.glob(".*.lock")
    lock.unlink()
    assert Stages(tmp_path)("a", "0" * 64, build) == folder
    assert not lock.exists()


@pytest.mark.parametrize("other", [False, True])
def test_a_damaged_stage_is_summed_once_and_built_once(tmp_path, monkeypatch, caplog, other):
    """Unless another process built it while this one looked: then what that one made is looked at, and used."""

    def build(folder):
        (folder / "x").write_text("1")
        built.append(folder)

    built, summed = [], []
    folder = Stages(tmp_path)("a", "0" * 64, build)
    (folder / "x").write_text("2")
    sum_of, alone = files.sha256_file, stages_module._alone
    monkeypatch.setattr(files, "sha256_file", lambda path: summed.append(path) or sum_of(path))

    def beaten(folder):
        monkeypatch.setattr(stages_module, "_alone", alone)
        Stages(tmp_path)("a", "0" * 64, build)
        return alone(folder)

    if other:
        monkeypatch.setattr(stages_module, "_alone", beaten)
    Stages(tmp_path)("a", "0" * 64, build)
    assert len(built) == 2
    assert (folder / "x").read_text() == "1"
    # Each process: once to see the damage. Once to seal what was built, and once to see that another sealed it.
    assert len(summed) == (4 if other else 2)
    assert caplog.text.count("x does not match its sum") == (2 if other else 1)


def test_disk_without_locks_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("marsjax.files.fcntl.flock", no_locks)
    Stages(tmp_path)("a", "0" * 64, lambda folder: None)
    assert "cannot be locked" in caplog.text


def test_checkpoints_are_kept_until_the_stage_is_sealed(tmp_path, monkeypatch):
    """A kill after the training and before the seal must not cost the training."""

    def killed(path, value):
        if path.name == "done.json":
            raise KeyboardInterrupt
        write(path, value)

    write = files.write_json
    monkeypatch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        commands.align(small_config(), tmp_path)
    monkeypatch.undo()
    (folder,) = (tmp_path / "stages").glob("alignment-*")
    assert list((folder / "checkpoints").iterdir())
    before = (folder / "metrics.jsonl").read_text()
    commands.align(small_config(), tmp_path)
    assert (folder / "metrics.jsonl").read_text() == before  # nothing was trained again
    assert not (folder / "checkpoints").exists()


def test_two_processes_never_build_one_stage(tmp_path, caplog):
    """The second waits for the first, and uses what that made."""
    caplog.set_level(logging.INFO)
    built, begun = [], threading.Event()

    def build(folder):
        begun.set()
        time.sleep(0.5)
        built.append(folder)

    first = threading.Thread(target=lambda: Stages(tmp_path)("a", "0" * 64, build))
    first.start()
    begun.wait()
    assert Stages(tmp_path)("a", "0" * 64, build) == built[0]
    first.join()
    assert len(built) == 1
    assert "waiting for another process" in caplog.text


@pytest.mark.parametrize("change", ["cap", "format", "sum", "counts"])
def test_manifest_that_was_changed_is_refused(exported, tmp_path, change):
    subprocess.run(["cp", "-r", str(exported), str(tmp_path / "bundle")], check=True)
    path = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    if change == "cap":
        manifest["config"]["ctr"]["cap"] = 2
    manifest = {"format": 1} if change == "format" else manifest
    manifest = {"format": 5} if change == "sum" else manifest
    if change == "counts":
        del manifest["counts"]
    path.write_text(json.dumps(manifest))
    expected = "bundle of format 5, found 1" if change == "format" else "content of sha256"
    with pytest.raises(ValueError, match=f"manifest.json: expected a {expected}.*export it again"):
        serving.load_bundle(tmp_path / "bundle")


def test_vectors_are_written_with_their_ids(workdir):
    loaded = pipeline.load(small_config())
    (path,) = (workdir / "stages").glob("embeddings-seed0-*/embeddings.npz")
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["raw_user_U"], loaded.dataset.log.raw_user_U)
        np.testing.assert_array_equal(arrays["raw_item_N"], loaded.dataset.items.raw_id_N)
        assert len(arrays["user_UD"]) == len(arrays["raw_user_U"])
        assert len(arrays["item_ND"]) == len(arrays["raw_item_N"])


# --- no leak, equal terms, nothing stale


def borrowing(workdir):
    config = small_config()
    context = pipeline.Context(config, pipeline.load(config), Stages(workdir), 0)
    space = pipeline.align_stage(context)
    vectors, _ = pipeline.embed_stage(context, space)
    return context, space, vectors


def test_no_query_sees_what_comes_after_its_prefix(workdir, tmp_path):
    """Other items from the middle of a history on: queries that end before borrow the same from the same donor."""
    context, space, vectors = borrowing(workdir)
    loaded, histories = context.loaded, context.loaded.rows.histories
    donation = pipeline.augment_stage(context, space, vectors)
    queries = donation.queries
    user = int(np.argmax(np.bincount(queries.user_Q)))
    middle = np.sort(queries.end_Q[queries.user_Q == user])[1]
    item_H = histories.item_H.copy()
    item_H[middle : histories.start_U1[user + 1]] = 1 + item_H[middle : histories.start_U1[user + 1]] % 80
    rows = loaded.rows._replace(histories=histories._replace(item_H=item_H))
    changed = context._replace(loaded=loaded._replace(rows=rows), stages=Stages(tmp_path))
    before, after = (
        np.load(pipeline.augment_stage(c, space, vectors).folder / "candidates.npz") for c in (context, changed)
    )
    own = queries.user_Q == user
    early = own & (queries.end_Q <= middle)
    assert early.sum() > 1
    for name in ("item_QS", "donor_QS", "donor_similarity_QS", "similarity_QS", "kept_QS"):
        np.testing.assert_array_equal(before[name][early], after[name][early], err_msg=name)
        np.testing.assert_array_equal(before[name][~own], after[name][~own], err_msg=name)
    late = own & ~early
    assert (before["donor_similarity_QS"][late] != after["donor_similarity_QS"][late]).any()


def test_labels_of_test_rows_change_no_parameter(workdir, tmp_path):
    context, space, vectors = borrowing(workdir)
    donation = pipeline.augment_stage(context, space, vectors)
    log, rows = context.loaded.dataset.log, context.loaded.rows
    flipped = log._replace(label_E=np.where(rows.split_E == TEST, 1 - log.label_E, log.label_E))
    dataset = context.loaded.dataset._replace(log=flipped)
    trained = []
    for name, data in (("a", context.loaded.dataset), ("b", dataset)):
        c = context._replace(loaded=context.loaded._replace(dataset=data), stages=Stages(tmp_path / name))
        trained.append(pipeline.train_stage(c, donation, "mars"))
    for one, other in zip(*(jax.tree.leaves(t.load()) for t in trained), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(trained[0].predictions.score_B, trained[1].predictions.score_B)
    np.testing.assert_array_equal(trained[0].predictions.label_B, 1 - trained[1].predictions.label_B)
    one, other = (next((tmp_path / n).glob("stages/mars-*/evaluations.json")).read_text() for n in "ab")
    assert one == other


def test_methods_that_lend_items_lend_as_much_as_mars(workdir):
    context, space, vectors = borrowing(workdir)
    donation = pipeline.augment_stage(context, space, vectors)
    budget_Q = np.diff(donation.borrowed.start_Q1)
    assert budget_Q.max() > 5
    lending = {"random_donor", "popular_items", "tfidf_donor", "collaborative_donor"}
    lending |= {name for name in METHODS if name.startswith("mars") and not METHODS[name].numbers}
    lending |= {"mars_vote_and_items", "mars_short_posterior_and_items"}
    lending |= {f"{name}_budget" for name in BASELINES}
    for method in METHODS:
        lent = pipeline.treat(context, donation, method).augmentation
        assert (lent is not None) == (method in lending), method
        if lent is not None:
            lent_Q = np.diff(lent.borrowed.start_Q1)
            if method in ("tfidf_donor", "collaborative_donor"):  # as far as that donor has so many
                assert (lent_Q <= budget_Q).all()
                assert lent_Q.sum() > budget_Q.sum() / 2
            else:
                np.testing.assert_array_equal(lent_Q, budget_Q, err_msg=method)
            assert lent.time_safe == (method == "mars_time_safe")
            assert lent.drop_target == (method == "mars_without_target")


EVERY_METHOD = {"base", "mars", "cmr", "cmr_budget"}


@pytest.mark.parametrize(
    ("changes", "built"),
    [
        ({"data.synthetic.seed": "1"}, {"alignment", "embeddings", "augmentation", *EVERY_METHOD}),
        ({"split.seed": "1"}, {"alignment", "embeddings", "augmentation", *EVERY_METHOD}),
        ({"alignment.beta": "0.2"}, {"alignment", "embeddings", "augmentation", "mars", "cmr_budget"}),
        ({"retrieval.prefix_stride": "3"}, {"augmentation", "mars", "cmr_budget"}),
        ({"augmentation.time_safe": "true"}, {"mars", "cmr_budget"}),
        ({"augmentation.drop_target": "true"}, {"mars", "cmr_budget"}),
        ({"baselines.mode": "as_released"}, {"cmr", "cmr_budget"}),
        ({"baselines.view_length": "20"}, {"cmr", "cmr_budget"}),
        ({"ctr.epochs": "2"}, EVERY_METHOD),
        ({"evaluation.bootstrap": "30"}, set()),
    ],
)
def test_what_changes_the_result_of_a_stage_builds_it_anew(changes, built, tmp_path, monkeypatch):
    """Only names and fingerprints count here, so nothing is trained: each stage asks for its folder and gives up."""
    asked = []

    class Asked(Exception):
        pass

    def ask(self, name, key, build):
        asked.append((name.split("-")[0], key))
        raise Asked

    monkeypatch.setattr(Stages, "__call__", ask)

    def keys(config):
        asked.clear()
        context = pipeline.Context(config, pipeline.load(config), Stages(tmp_path), 0)
        with pytest.raises(Asked):
            pipeline.align_stage(context)
        space = pipeline.Space(None, None, None, asked[-1][1])
        with pytest.raises(Asked):
            pipeline.embed_stage(context, space)
        with pytest.raises(Asked):
            pipeline.augment_stage(context, space, None)
        empty = Borrowed(np.zeros(1, np.int64), *(np.zeros(0, np.int32) for _ in range(4)))
        queries = make_queries(context.loaded.rows, prefix_stride=0)
        donation = pipeline.Donation(queries, None, empty, None, tmp_path, asked[-1][1])
        for method in ("base", "mars", "cmr", "cmr_budget"):
            with pytest.raises(Asked):
                pipeline.train_stage(context, donation, method)
        return dict(asked)

    before, after = keys(small_config()), keys(small_config(**changes))
    assert {name for name in before if before[name] != after[name]} == built


def test_presets_differ_in_exactly_these_values():
    mars, paper = (_leaves(default_config(preset)) for preset in ("mars", "paper"))
    assert {key: (mars[key], paper[key]) for key in mars if mars[key] != paper[key]} == {
        "alignment.normalise": (True, False),
        "alignment.residual": (True, False),
        "alignment.entropy_sign": ("dispersive", "printed"),
        "alignment.blocks": (64, 512),
        "export.method": ("mars_posterior", "mars"),
        "alignment.targets": (16, 1),
        "retrieval.centre": (True, False),
        "retrieval.prefix_stride": (4, 0),
    }
    assert alignment.ENTROPY_SIGNS == {"dispersive": 1.0, "printed": -1.0}


KILLED = """
import sys
import threading
from marsjax.configuration import override
from marsjax.defaults import default_config
from marsjax import commands
import pathlib
config = default_config()
for flag in sys.argv[2:]:
    override(config, *flag.split("=", 1))
commands.run(config, pathlib.Path(sys.argv[1]))
"""


def test_run_that_is_killed_in_every_stage_ends_the_same(tmp_path):
    """SIGKILL when a stage of the second run has begun, or has a checkpoint; the last start goes to the end."""
    changes = SMALL | {"evaluation.methods": "base,mars", "training.checkpoint_seconds": "0", "ctr.epochs": "2"}
    root = pathlib.Path(__file__).parent.parent

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), *(f"{key}={value}" for key, value in changes.items())],
            cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    for sign in ("alignment-*/checkpoints/2", "augmentation-*", "mars-*/checkpoints/4"):
        process, until = start(tmp_path / "killed"), time.monotonic() + 120
        while not list((tmp_path / "killed" / "stages").glob(sign)) and time.monotonic() < until:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.kill()
        process.communicate()
    last = start(tmp_path / "killed")
    for process in (whole, last):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    seals = [sorted((tmp_path / name / "stages").glob("*/done.json")) for name in ("whole", "killed")]
    assert [path.parent.name for path in seals[0]] == [path.parent.name for path in seals[1]]
    for one, other in zip(*seals, strict=True):
        for name in ("embeddings.npz", "candidates.npz", "scores.npz", "params/content.json"):
            if (one.parent / name).is_file():
                assert files.sha256_file(one.parent / name) == files.sha256_file(other.parent / name), other
    assert (tmp_path / "whole" / "results.md").read_text() == (tmp_path / "killed" / "results.md").read_text()


@pytest.mark.parametrize("method", ["mars_time_safe", "mars_without_target"])
def test_bundle_blanks_what_its_method_blanks(workdir, tmp_path, method):
    commands.export(small_config(**{"export.method": method}), workdir, output=tmp_path / "bundle")
    bundle = serving.load_bundle(tmp_path / "bundle")
    users = bundle.users
    user = int(np.argmax(np.diff(users.borrowed_U1)))
    lent = slice(users.borrowed_U1[user], users.borrowed_U1[user + 1])
    times, target = users.borrowed_time_S[lent], users.borrowed_item_S[lent][:1]
    request = scoring.Request(str(users.raw_user_U[user]), (str(bundle.items.raw_id_N[target[0]]),))
    nobody = bundle._replace(users=users._replace(borrowed_U1=np.zeros_like(users.borrowed_U1)))
    only_target = users._replace(
        borrowed_U1=np.where(np.arange(len(users.borrowed_U1)) > user, 1, 0),
        borrowed_item_S=target,
        borrowed_time_S=times[:1],
    )
    unlent = scoring.score(nobody, [request])[0]
    if method == "mars_without_target":  # all that is lent is the target: as if nothing were
        np.testing.assert_array_equal(scoring.score(bundle._replace(users=only_target), [request])[0], unlent)
    else:  # everything is later than the request: as if nothing were lent; at the end of time it is not
        early, late = (request._replace(time=int(t)) for t in (times.min() - 1, times.max()))
        np.testing.assert_array_equal(scoring.score(bundle, [early])[0], unlent)
        assert scoring.score(bundle, [late])[0] != unlent
        assert scoring.score(bundle._replace(users=only_target), [late])[0] != unlent


def test_a_model_that_cannot_be_time_safe_is_not_exported_as_if_it_were(tmp_path):
    config = small_config(**{"export.method": "mars_posterior", "augmentation.time_safe": "true"})
    with pytest.raises(ValueError, match="found mars_posterior in export.method"):
        commands.export(config, tmp_path, output=tmp_path / "bundle")


def test_bundle_of_a_model_with_a_mask_scores_as_the_run(workdir, tmp_path):
    """Its tables have a row more than the catalogue. Nothing is borrowed, so requests need no more than users."""
    config = small_config(**{"export.method": "cmr"})
    commands.export(config, workdir, output=tmp_path / "bundle")
    bundle = serving.load_bundle(tmp_path / "bundle")
    assert bundle.manifest["counts"]["n_items"] == len(bundle.items.raw_id_N) + 1
    loaded = pipeline.load(config)
    log, rows = loaded.dataset.log, loaded.rows
    test_E = np.flatnonzero(rows.split_E == TEST)[:20]
    requests = []
    for event in test_E:
        own = rows.histories.item_H[rows.histories.start_E[event] : rows.histories.end_E[event]]
        user, item = str(log.raw_user_U[rows.user_E[event]]), str(bundle.items.raw_id_N[log.item_E[event]])
        requests.append(scoring.Request(user, (item,), tuple(bundle.items.raw_id_N[own])))
    (folder,) = (workdir / "stages").glob("cmr-*")
    found = np.concatenate(scoring.score(bundle, requests))
    np.testing.assert_allclose(found, np.load(folder / "scores.npz")["test"][:20], atol=1e-6)


def test_sparse_users_are_not_exported(workdir, tmp_path):
    with pytest.raises(ValueError, match="expected split.sparse_fraction=0, found 0.3"):
        commands.export(small_config(**{"split.sparse_fraction": "0.3"}), workdir, output=tmp_path / "bundle")


def test_unknown_history_items_are_counted(exported, caplog):
    bundle = serving.load_bundle(exported)
    item = str(bundle.items.raw_id_N[3])
    scoring.score(bundle, [scoring.Request("nobody", (item,), history=("gone", item, "lost"))])
    assert "2 history items of the requests are unknown" in caplog.text


def test_bundles_never_change(exported, workdir):
    with pytest.raises(ValueError, match="does not exist yet"):
        commands.export(small_config(), workdir, output=exported)
    assert serving.load_bundle(exported).manifest["format"] == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "movielense"),
        ("split.kind", "random"),
        ("alignment.entropy_sign", "minus"),
        ("alignment.estimator", "kde"),
        ("alignment.objective", "triplet"),
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
    with pytest.raises(
        ValueError, match=f"{key.rsplit('.')[-1]}.*(expects|expected).*(got|found).*{value.split(',')[-1]}"
    ):
        commands.run(small_config(**{key: value}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ""}, "config.seeds expects at least one seed, each once, got"),
        ({"seeds": "0,1,0"}, "each once, got .0, 1, 0."),
        ({"evaluation.methods": ""}, "config.evaluation.methods expects one of .*base.*, got none"),
        ({"evaluation.methods": "base,random_doner"}, "got 'random_doner'; did you mean random_donor"),
        ({"export.method": "magic"}, "config.export.method expects one of"),
        ({"baselines.mode": "published"}, "config.baselines.mode expects one of .*as_released.*got 'published'"),
        ({"baselines.view_length": "0"}, "config.baselines.view_length expects 1 or more, got 0"),
        ({"ctr.evaluations_per_epoch": "0"}, "config.ctr.evaluations_per_epoch expects 1 or more, got 0"),
        ({"ctr.batch_size": "0"}, "config.ctr.batch_size expects 1 or more, got 0"),
        ({"votes.shrink": "0"}, "config.votes.shrink expects a number from 1e-06 to inf, got 0"),
        ({"votes.sharpness": "100"}, "config.votes.sharpness expects a number from 0 to 50, got 100"),
        ({"short.share": "1.5"}, "config.short.share expects a number from 0 to 1, got 1.5"),
        ({"retrieval.prefix_stride": "-1"}, "config.retrieval.prefix_stride expects 0 or more, got -1"),
        ({"split.sparse_fraction": "0.9"}, "sparse_fraction and high_fraction together at most 1"),
        ({"split.high_fraction": "0"}, "expected high-active users .* found none"),
        ({"augmentation.theta": "0.3"}, "exactly one of theta and theta_quantile.*set the other to none"),
        ({"augmentation.theta_quantile": "1.5"}, "theta_quantile: expected 0 to below 1, found 1.5"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        commands.run(small_config(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_theta_can_be_a_value_from_the_command_line(workdir, tmp_path):
    changes = {"augmentation.theta": "0.2", "augmentation.theta_quantile": "none"}
    commands.augment(small_config(**changes), workdir, output=tmp_path / "borrowed.parquet")
    columns = pyarrow.parquet.read_table(tmp_path / "borrowed.parquet").to_pydict()
    kept, similarity = np.array(columns["kept"]), np.array(columns["item_similarity"])
    assert (similarity[kept] >= 0.2).all()
    assert kept.any()
    assert (similarity[~kept] < 0.2).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation.strategy": "kth_similar", "alignment.objective": "info_nce", "alignment.keep_values": "true"},
        {"augmentation.strategy": "dp", "augmentation.vectors": "static"},
        {"augmentation.strategy": "most_similar", "augmentation.time_safe": "true"},
        {"retrieval.backend": "exact", "augmentation.drop_target": "true"},
        {"alignment.modalities": "image", "ctr.backbone": "dnn"},
        {"alignment.modalities": "", "split.sparse_fraction": "0.3", "split.sparse_events": "3"},
        {"ctr.activation": "dice", "ctr.apart": "true", "ctr.softmax": "false"},
        {"split.kind": "last_fraction", "training.sharding": "shard_map"},
        {"split.kind": "global_time", "data.synthetic.shuffle_features": "true"},
        {"split.low_fraction": "0"},
    ],
)
def test_options_run(changes, tmp_path):
    commands.run(small_config(**({"evaluation.methods": "base,mars"} | changes)), tmp_path)
    assert (tmp_path / "results.json").is_file()


def test_options_of_the_alignment_reach_encoder_and_loss(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def ask(encoder, weights, *_):
        raise Asked(encoder.keep_values, weights.objective)

    monkeypatch.setattr(alignment, "lifted_step", ask)
    config = small_config(**{"alignment.objective": "mmd", "alignment.keep_values": "true"})
    with pytest.raises(Asked) as asked:
        pipeline.align_stage(pipeline.Context(config, pipeline.load(config), Stages(tmp_path), 0))
    assert asked.value.args == (True, "mmd")


def test_paper_preset_runs(tmp_path):
    commands.run(small_config("paper", **{"evaluation.methods": "base,mars"}), tmp_path)
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
    commands.run(small_config(**changes), tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()
    with pytest.raises(ValueError, match="column 'label' for label, found uid, sku, clicked, ts"):
        commands.run(small_config(**(changes | {"data.columns.label": "label"})), tmp_path / "run")


def test_a_split_that_nothing_can_be_judged_on_is_refused(tmp_path):
    columns = {"user": [1, 1, 2, 2], "item": ["a", "b", "a", "c"], "label": [1, 0, 1, 1], "time": [1, 2, 1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "events.parquet")
    changes = {"data.source": "tabular", "data.events_file": str(tmp_path / "events.parquet")}
    with pytest.raises(ValueError, match="expected validation rows of both labels, found 0 rows"):
        commands.run(small_config(**changes), tmp_path)
    commands.inspect(small_config(**changes), tmp_path)


def test_no_key_hides_behind_a_method_of_the_configuration():
    """`config.data.items` would be the method of the dictionary, whatever was set."""
    config = default_config()
    for section in config.values():
        if isinstance(section, ConfigDict):
            assert not [key for key in section if hasattr(ConfigDict, key)]


def assert_grades_go_with_a_history(bundle, row):
    """Through the store, and where an event has none it counts as the mean of its label."""
    user, own = row.profile.user, scoring.own_history(bundle, row.profile.user)
    entries = people.seed_entries(bundle, str(bundle.users.raw_user_U[user]))
    stored = people.of_entries(bundle, decode_history(encode_history(entries)))
    for found, expected in zip(stored, own, strict=True):
        np.testing.assert_array_equal(found, expected)
    without = people.of_entries(bundle, [entry._replace(grade=None) for entry in entries])
    middle = bundle.known.middle_2[(own[1] == 2).astype(int)]
    assert 0 < bundle.known.middle_2[0] < bundle.known.middle_2[1] < 1
    numbers = [
        scoring.dense_numbers(bundle, [row._replace(profile=scoring.Profile(user, *known))])
        for known in (own, without, (*own[:2], middle))
    ]
    np.testing.assert_array_equal(numbers[1], numbers[2])
    assert np.abs(numbers[0] - numbers[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        ("mars", "strong"), ("mars_posterior", "ids"), ("mars_short_posterior", "strong"),
        ("mars_short_graded_posterior", "strong"),
    ],
)  # fmt: skip
def test_bundles_hold_what_strong_models_and_opinions_read(workdir, tmp_path, method, inputs):
    """The test rows with the histories before them score as in the run. All of them are later than what was trained on,
    as a service's requests are."""
    config = small_config(**{"export.method": method, "ctr.inputs": inputs, "split.kind": "global_time"})
    commands.export(config, workdir, output=tmp_path / "bundle")
    bundle = serving.load_bundle(tmp_path / "bundle")
    context = pipeline.Context(config, pipeline.load(config), Stages(workdir), 0)
    trained = pipeline.train_stage(context, pipeline.borrow(context), method)
    log, rows, histories = context.loaded.dataset.log, context.loaded.rows, context.loaded.rows.histories
    asked = []
    for event in np.flatnonzero(rows.split_E == TEST):
        user, own = int(rows.user_E[event]), slice(histories.start_E[event], histories.end_E[event])
        marks, grades = scoring.marks(histories.label_H[own]), histories.grade_H[own]
        profile = scoring.Profile(user, histories.item_H[own], marks, grades, scoring.table_lent(bundle, user))
        asked.append(scoring.Row(profile, log.item_E[event : event + 1], int(log.time_E[event])))
    found = np.concatenate(scoring.score_rows(bundle, asked))
    np.testing.assert_allclose(found, trained.predictions.score_B, atol=2e-6)
    assert np.ptp(found) > 0.01
    if METHODS[method].graded:
        assert_grades_go_with_a_history(bundle, asked[0])
    many = asked[0]._replace(target_C=np.arange(1, 40, dtype=np.int32))
    (together,) = scoring.score_rows(bundle, [many])
    alone = np.concatenate(
        [scoring.score_rows(bundle, [many._replace(target_C=many.target_C[c : c + 1])])[0] for c in (0, 38)]
    )
    np.testing.assert_allclose(together[[0, 38]], alone, atol=1e-6)
