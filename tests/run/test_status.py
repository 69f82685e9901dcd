"""Tests of videox.run.status: a killed run is detected, and an unwritable status does not end a run."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest
from records import run_python

from videox.errors import UserError
from videox.run.status import RunStatus, read_status


def test_status_round_trips_with_the_error_on_one_line(tmp_path):
    assert read_status(tmp_path) is None
    status = RunStatus(tmp_path)
    status.write("running", step=3)
    own = read_status(tmp_path)
    assert (own.state, own.step, own.exit_code, own.pid) == ("running", 3, None, os.getpid())
    assert not own.was_killed
    error = UserError("--train_data_meta", "has\nno rows", "add rows", 3)
    status.write("failed", exit_code=3, error=error.line() + "\nmore")
    content = json.loads((tmp_path / "run_status.json").read_text())
    assert (content["state"], content["exit_code"], content["step"]) == ("failed", 3, 3)
    assert "\n" not in content["error"] and content["error"].startswith("error: --train_data_meta: has")
    assert not read_status(tmp_path).was_killed
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"]
    with pytest.raises(ValueError, match="'done' is not one of"):
        status.write("done")


def test_heartbeat_writes_only_after_its_interval(tmp_path):
    lazy, eager = RunStatus(tmp_path / "lazy", interval=3600), RunStatus(tmp_path / "eager", interval=0)
    for status in (lazy, eager):
        status.write("running")
        status.heartbeat(5)
    assert (read_status(tmp_path / "lazy").step, read_status(tmp_path / "eager").step) == (0, 5)
    lazy.write("finished", exit_code=0)
    assert read_status(tmp_path / "lazy").step == 5


@pytest.mark.parametrize("ending", ["kill", "exit"])
def test_killed_run_is_detected(tmp_path, ending):
    code = (
        "import os, signal, sys, pathlib; from videox.run.status import RunStatus\n"
        "status = RunStatus(pathlib.Path(sys.argv[1])); status.write('running', step=7)\n"
        "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "status.write('stopped', exit_code=75)"
    )
    assert run_python(code, tmp_path, ending).returncode == (-signal.SIGKILL if ending == "kill" else 0)
    status = read_status(tmp_path)
    assert (status.was_killed, status.step) == (ending == "kill", 7)


def test_reused_pid_other_host_and_incomplete_file_count_as_killed(tmp_path):
    RunStatus(tmp_path).write("running", step=1)
    path = tmp_path / "run_status.json"
    content = path.read_text()
    assert not read_status(tmp_path).was_killed
    for change in ({"started": "1"}, {"host": "elsewhere"}, {"pid": 2**22 + 1}):
        path.write_text(json.dumps(json.loads(content) | change))
        assert read_status(tmp_path).was_killed, change
    for incomplete in (content[:20], "", "[]", '{"state": "running"}'):
        path.write_text(incomplete)
        assert read_status(tmp_path).was_killed, incomplete


def test_unwritable_status_warns_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    status = RunStatus(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        status.write("running")
        status.write("failed", exit_code=5, error="x")
    assert len(caplog.records) == 1 and "run_status.json cannot be written" in caplog.text


def test_only_the_main_rank_writes_a_status(tmp_path):
    RunStatus(tmp_path / "run", enabled=False).write("running")
    assert list(tmp_path.iterdir()) == []
