"""The tables of the README are those of the committed results."""

import json
import pathlib

import pytest

from marsjax.evaluation import report

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["synthetic", "ml1m"])
def test_readme_quotes_the_committed_results(name):
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert {"command", "commit", "machine", "wall_seconds", "rows"} <= set(results)
    assert report.as_markdown(results["rows"]) in (ROOT / "README.md").read_text()
