"""The example of the documentation is a method that works."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np

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


def test_an_audit_that_can_ask_nobody_says_that_it_was_skipped():
    root = EXAMPLES.parent
    environment = os.environ | {"PYTHON": sys.executable, "MARSJAX_AUDIT_SERVICE": "http://127.0.0.1:9/"}
    run = subprocess.run([root / "tools" / "audit"], env=environment, capture_output=True, text=True, check=True)
    assert "SKIPPED, nothing was audited" in run.stderr
    assert "done" not in run.stdout
    assert "\ntools/audit\n" in (root / ".ci" / "run").read_text()
    assert "pip-audit -r requirements.lock" in (root / "CONTRIBUTING.md").read_text()
