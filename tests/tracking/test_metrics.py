"""Tests of videox.tracking.metrics: each step is stored exactly once and reads back exactly, also after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import ROOT, record

from videox.errors import STORAGE, UserError
from videox.tracking.jsonl import json_line, read_lines
from videox.tracking.metrics import MetricsLog
from videox.tracking.report.sections import MEMORY, PARTS, SHOWN


@pytest.mark.parametrize("value", [5e-324, 1.7976931348623157e308, 0.1 + 0.2, float(np.float32(0.1)), -0.0])
def test_extreme_floats_read_back_exactly(tmp_path, value):
    log = MetricsLog(tmp_path)
    log.append(record(1, loss=np.float64(value), rows=np.array([7]), buckets=np.array([[5, 64, 64]])))
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert repr(line["loss"]) == repr(value)
    assert (line["rows"], line["buckets"]) == ([7], [[5, 64, 64]])
    assert "non_finite" not in line


def test_a_line_has_its_keys_in_order_and_steps_are_consecutive(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(record(1))
    log.append(record(2))
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert list(first) == [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "data_wait",
        "rows",
        "buckets",
    ]
    assert first["buckets"] == [[49, 512, 512], [1, 256, 992]]
    assert second["step"] == 2
    with pytest.raises(ValueError, match="step 4 does not follow step 2"):
        log.append(record(4))
    with pytest.raises(ValueError, match="step 2 does not follow step 2"):
        MetricsLog(tmp_path).append(record(2))
    with pytest.raises(ValueError, match="2 rows but 1 buckets"):
        log.append(record(3, buckets=[(1, 16, 16)]))
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


MOST_BYTES = 1000  # of a line, beside its rows and their buckets


def test_a_line_is_small_beside_its_rows(tmp_path):
    names = {*PARTS, *MEMORY, *(name for name in SHOWN if name not in record(1).as_dict())} - {"loss_corrected"}
    longest = -1.2345678901234567e-300  # no float takes more characters
    line = record(10**9, loss=longest, lr=longest, grad_norm=longest, tokens=10**12, tokens_per_second=longest,
                  data_wait=longest, measured=dict.fromkeys(sorted(names), longest), loss_corrected=longest, skipped=True,
                  rows=[0], buckets=[(1, 16, 16)])  # fmt: skip
    assert len(names) >= 10
    assert len(json_line(line.as_dict())) <= MOST_BYTES


def test_a_step_without_an_update_is_marked():
    assert record(1, skipped=True).as_dict()["skipped"] is True and "skipped" not in record(1).as_dict()


def test_the_corrected_loss_stands_beside_the_loss_where_it_is_known(tmp_path):
    lines = [record(1, loss_corrected=np.float64(0.1 + 0.2)).as_dict(), record(2).as_dict()]
    assert list(lines[0])[:3] == ["step", "loss", "loss_corrected"] and lines[0]["loss_corrected"] == 0.1 + 0.2
    assert "loss_corrected" not in lines[1]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_truncated_last_line_is_removed_and_written_again(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("truncated")
    log = MetricsLog(folder)
    for step in (1, 2, 3):
        log.append(record(step))
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    complete = content.rindex(b"\n", 0, -1) + 1
    path.write_bytes(content[: data.draw(st.integers(complete, len(content) - 1))])
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    again = MetricsLog(folder)
    assert again.last_step == 2
    again.append(record(3))
    assert path.read_bytes() == content


def test_a_killed_writer_leaves_at_most_one_truncated_line(tmp_path):
    code = (
        "import sys, itertools, pathlib; sys.path.insert(0, 'tests/support')\n"
        "from records import record; from videox.tracking.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]))\n"
        "for step in itertools.count(1): log.append(record(step, rows=list(range(500)), buckets=[(1,16,16)] * 500))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 10**6) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    log = MetricsLog(tmp_path)
    assert [line["step"] for line in read_lines(path)] == list(range(1, log.last_step + 1))
    assert log.last_step > 50


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(json_line(record(1).as_dict()) + b'{"step": 2, "lo\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not a JSON object") as raised:
        MetricsLog(tmp_path)
    assert raised.value.exit_code == STORAGE


def test_other_processes_than_the_main_one_write_no_metrics(tmp_path):
    log = MetricsLog(tmp_path / "run", enabled=False)
    log.append(record(1))
    log.sync()
    assert list(tmp_path.iterdir()) == []
