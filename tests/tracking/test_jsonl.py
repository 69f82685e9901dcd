"""Tests of videox.tracking.jsonl: every number reads back exactly, and a full disk leaves only complete lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record, run_python

from videox.errors import STORAGE
from videox.tracking.jsonl import append_line, json_line, read_lines


@settings(max_examples=200)
@given(
    loss=st.floats(allow_nan=False, allow_infinity=False),
    lr=st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True),
    rows=st.lists(st.integers(0, 2**40), max_size=5),
)
def test_a_line_reads_back_exactly(loss, lr, rows):
    line = json_line(record(1, loss=loss, lr=lr, rows=rows, buckets=[(1, 16, 16)] * len(rows)).as_dict())
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    back = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (back["loss"], back["lr"], back["rows"]) == (loss, lr, rows)
    assert math.copysign(1, back["loss"]) == math.copysign(1, loss)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null_at_any_depth(value):
    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(json_line({"step": 1, "loss": value}), parse_constant=strict) == {
        "step": 1,
        "loss": None,
        "non_finite": True,
    }
    nested = json.loads(json_line({"per_sigma": [[0.5, 1.0], [0.9, value]]}), parse_constant=strict)
    assert nested == {"per_sigma": [[0.5, 1.0], [0.9, None]], "non_finite": True}


def test_a_full_disk_is_an_error_and_leaves_complete_lines(tmp_path):
    code = (
        "import resource, sys, pathlib\n"
        "from videox.tracking.jsonl import append_line; from videox.errors import UserError\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "append_line(path, {'step': 1, 'note': 'x' * 60})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try: append_line(path, {'step': 2, 'note': 'x' * 60})\n"
        "except UserError as error: print(error.exit_code, error.line())"
    )
    path = tmp_path / "metrics.jsonl"
    done = run_python(code, path)
    assert done.stdout.startswith(f"{STORAGE} error: {path}: cannot be written (File too large)"), done.stderr
    assert path.read_bytes() == json_line({"step": 1, "note": "x" * 60})


def test_append_creates_the_folder_and_closes_the_file(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for step in range(100):
        append_line(tmp_path / "a" / "b.jsonl", {"step": step})
    assert [line["step"] for line in read_lines(tmp_path / "a" / "b.jsonl")] == list(range(100))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
