"""Nothing that is loaded can run: no pickle is read on the way of a bundle, of donors, of shards or of checkpoints."""

import ast
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from marsjax import files
from marsjax.serving import bundle as serving
from marsjax.serving import lending, rebuild, runner, versions

PACKAGE = pathlib.Path(__file__).parents[1] / "marsjax"
READERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}


class Evil:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.mkdir, (self.path,)


def uses(source):
    """What reads pickles, or lets NumPy or PyTorch read them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [name for name in names if name.split(".")[0] in READERS]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else ["allow_pickle"]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "yaml.load"):
            found.append(ast.unparse(node))
    return found


def test_no_module_reads_pickles():
    assert {path.name: uses(path.read_text()) for path in PACKAGE.rglob("*.py") if uses(path.read_text())} == {}
    for line in ("import pickle", "from dill import load", "np.load(f, allow_pickle=True)", "torch.load(f)"):
        assert uses(line)


@pytest.fixture
def damaged(bundle_folder, tmp_path):
    """A function that puts an array of objects into a file of a bundle, with the right sums."""

    def make(name):
        folder = tmp_path / "bundle"
        shutil.copytree(bundle_folder, folder)
        evil = np.array([Evil(tmp_path / "ran")], object)
        if name.endswith(".npz"):
            with np.load(folder / name) as arrays:
                content = dict(arrays)
            np.savez(folder / name, allow_pickle=True, **(content | {next(iter(content)): evil}))
        else:
            np.save(folder / name, evil, allow_pickle=True)
        manifest = files.read_json(folder / "manifest.json")
        manifest["sha256"][name] = files.sha256_file(folder / name)
        manifest["sum"] = files.digest_json({key: value for key, value in manifest.items() if key != "sum"})
        files.write_json(folder / "manifest.json", manifest)
        serving.check_bundle(folder)  # so it is not the sums that refuse it
        return folder

    return make


@pytest.mark.parametrize(
    "name", ["users.npz", "items.npz", "knowledge.npz", "donors.npz", "donor_units.npy", "features.npz"]
)
def test_an_object_in_a_bundle_is_not_read(damaged, tmp_path, name):
    with pytest.raises(ValueError, match="allow_pickle|Python objects in dtype"):
        serving.load_encoder(serving.load_bundle(damaged(name)))
    assert not (tmp_path / "ran").exists()


def test_an_object_in_the_vectors_of_a_shard_is_not_read(tmp_path):
    folder = tmp_path / rebuild.VECTORS / "v"
    folder.mkdir(parents=True)
    np.savez(folder / "0.npz", allow_pickle=True, raw_user_U=np.array([Evil(tmp_path / "ran")], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        rebuild.load_vectors(None, "v", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_loading_asks_nobody_to_unpickle(bundle_folder, tmp_path, monkeypatch):
    """Not orbax either, which loads the parameters."""

    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    version = versions.publish(tmp_path, bundle_folder, keep=1)
    model = runner.load_model(tmp_path, version)
    assert len(lending.read_lenders(model.bundle.folder, model.bundle.items.item_ND).mark_PL)
    with pytest.raises(AssertionError, match="a pickle was read"):
        pickle.loads(b"")
