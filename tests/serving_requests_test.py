"""Files of requests: what is read is what was written, and what is wrong is named."""

import pytest

from marsjax.serving.requests import read_requests
from marsjax.serving.scoring import Request


def test_requests_are_read_line_by_line(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"user": 7, "items": ["a", 3]}\n\n{"user": "u", "items": [], "history": ["b"], "time": 12}\n')
    assert read_requests(path) == [Request("7", ("a", "3")), Request("u", (), ("b",), 12)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"user": "u"}', "items"),
        ('{"user": "u", "items": "a"}', "expected a list, found str"),
        ('{"user": "u", "items": ["a"], "candidates": ["b"]}', "unknown candidates; known are user, items, history"),
        ("[]", "AttributeError"),
        ('{"user": ', "JSONDecodeError"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, line, said):
    path = tmp_path / "requests.jsonl"
    path.write_text(f'{{"user": "u", "items": ["a"]}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"requests.jsonl:2: .*{said}"):
        read_requests(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone.jsonl: expected a file of requests, found none"):
        read_requests(tmp_path / "gone.jsonl")
