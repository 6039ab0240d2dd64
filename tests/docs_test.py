"""The example of the documentation is a method that works."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from marsjax import main
from marsjax.augmentation.donors import find_donors
from marsjax.augmentation.methods import METHODS, Offer
from marsjax.augmentation.queries import make_queries
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.records import Borrowed

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_the_method_of_the_documentation_lends_what_it_says(monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", (DOCS / "methods.md").read_text(), re.DOTALL)
    known = dict(METHODS)
    exec(compile(source, "docs/methods.md", "exec"), {"__name__": "docs"})
    method = METHODS.pop("best_liked")
    assert known == METHODS
    dataset = make_synthetic(n_users=80, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    rows = make_rows(dataset.log, split="leave_one_out")
    queries = make_queries(rows, prefix_stride=2)
    budget_Q = np.random.default_rng(0).integers(0, 6, len(queries.user_Q))
    start_Q1 = np.concatenate([[0], np.cumsum(budget_Q)])
    nothing = np.zeros(start_Q1[-1])
    offer = Offer(
        log=dataset.log,
        rows=rows,
        queries=queries,
        donors=find_donors(rows, cap=20),
        borrowed=Borrowed(start_Q1, nothing, nothing, nothing, nothing),
        item_ND=np.zeros((41, 4), np.float32),
        **dict.fromkeys(Offer._fields[6:]),
    )
    lent = method.treat(offer).augmentation.borrowed
    np.testing.assert_array_equal(lent.start_Q1, start_Q1)
    for query in range(len(budget_Q)):
        items = lent.item_S[start_Q1[query] : start_Q1[query + 1]]
        assert (items > 0).all()
        assert len(set(items)) == len(items)
    last_S = lent.item_S[start_Q1[1:][budget_Q > 0] - 1]
    assert len(set(last_S)) == 1  # the best stands next to every own history


def test_every_method_is_told_of():
    text = (DOCS / "methods.md").read_text()
    assert not [name for name in METHODS if f"`{name.removesuffix('_budget')}`" not in text]


def test_the_compose_file_serves_what_its_header_publishes():
    text = (EXAMPLES / "compose.yaml").read_text()
    (published,) = re.findall(r"marsjax publish .*--root=(\S+)", text)
    mounted = re.findall(r'"(\S+):/serving"', text)
    assert [(EXAMPLES / path).resolve() for path in mounted] == [EXAMPLES.parent.resolve() / published] * 2
    assert f"--root={published}" in (DOCS / "serving.md").read_text()


def test_the_user_of_the_units_is_the_one_who_publishes():
    """A dynamic user owns the folder under a number that nobody else can take."""
    text = (EXAMPLES / "marsjax@.service").read_text()
    (user,) = re.findall(r"^User=(\S+)$", text, re.MULTILINE)
    (root,) = set(re.findall(r"--root=(\S+)", text))
    assert f"sudo -u {user} /opt/marsjax/.venv/bin/marsjax publish --bundle=/srv/bundle --root={root}" in text
    assert "DynamicUser" not in text


def test_the_commands_of_the_compose_file_are_ones(capsys):
    """Flags and configuration keys are checked by the program itself; what waits for whom is there."""
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
    services, started = compose["services"], []
    for name, service in services.items():
        program, *words = shlex.split(service.get("command", ""))
        if program == "marsjax":
            started.append(words[0])
            assert main.main([*words, "--help"]) == 0, (name, capsys.readouterr().err)
        assert set(service.get("depends_on", {})) <= set(services) - {name}
        volumes = [volume.split(":")[0] for volume in service.get("volumes", [])]
        assert {volume for volume in volumes if "/" not in volume} <= set(compose["volumes"])
    assert sorted(started) == ["runner", "serve"]
    assert main.main(["serve", "--root=x", "--config.serving.storag=y", "--help"]) == 2  # a wrong key would be seen
    hosts = {re.search(r"redis://(\w+):6379/0", service["command"])[1] for service in services.values() if "marsjax" in
             service["image"]}  # fmt: skip
    assert hosts == {"redis"}
    assert "--appendonly yes --appendfsync always" in services["redis"]["command"]


def test_the_units_are_ones(tmp_path, capsys):
    text = (EXAMPLES / "marsjax@.service").read_text()
    (command,) = re.findall(r"^ExecStart=(\S+ .*)$", text, re.MULTILINE)
    for name in ("serve", "runner"):
        assert main.main([*shlex.split(command.replace("%i", name))[1:], "--help"]) == 0, capsys.readouterr().err
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "marsjax@serve.service"  # with a program that is there
    unit.write_text(text.replace(command.split()[0], sys.executable))
    run = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=perhaps"))
    run = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "restart specifier" in run.stderr


def test_an_audit_that_can_ask_nobody_says_that_it_was_skipped():
    root = EXAMPLES.parent
    environment = os.environ | {"PYTHON": sys.executable, "MARSJAX_AUDIT_SERVICE": "http://127.0.0.1:9/"}
    run = subprocess.run([root / "tools" / "audit"], env=environment, capture_output=True, text=True, check=True)
    assert "SKIPPED, nothing was audited" in run.stderr
    assert "done" not in run.stdout
    assert "\ntools/audit\n" in (root / ".ci" / "run").read_text()
    assert "pip-audit -r FILE" in (root / "CONTRIBUTING.md").read_text()
