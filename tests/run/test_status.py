"""Serves videox/status.py: a run that ended without a goodbye is known, and no lost disk ends one."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest
from records import run_python

from videox.errors import UserError
from videox.run.status import RunStatus, read_status


def test_status_reads_back_on_one_line_and_whole(tmp_path):
    assert read_status(tmp_path) is None
    status = RunStatus(tmp_path)
    status.write("running", step=3)
    mine = read_status(tmp_path)
    assert (mine.state, mine.step, mine.exit_code, mine.pid) == ("running", 3, None, os.getpid())
    assert not mine.was_killed
    refusal = UserError("--train_data_meta", "holds\nno rows", "give rows", 3)
    status.write("failed", exit_code=3, error=refusal.line() + "\nmore")
    found = json.loads((tmp_path / "run_status.json").read_text())
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 3, 3)
    assert "\n" not in found["error"] and found["error"].startswith("error: --train_data_meta: holds")
    assert not read_status(tmp_path).was_killed
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"]
    with pytest.raises(ValueError, match="'done' is not one of"):
        status.write("done")


def test_a_heartbeat_writes_only_when_it_is_due(tmp_path):
    lazy, eager = RunStatus(tmp_path / "lazy", interval=3600), RunStatus(tmp_path / "eager", interval=0)
    for status in (lazy, eager):
        status.write("running")
        status.heartbeat(5)
    assert (read_status(tmp_path / "lazy").step, read_status(tmp_path / "eager").step) == (0, 5)
    lazy.write("finished", exit_code=0)
    assert read_status(tmp_path / "lazy").step == 5


@pytest.mark.parametrize("ending", ["kill", "goodbye"])
def test_a_run_that_was_killed_is_known(tmp_path, ending):
    code = (
        "import os, signal, sys, pathlib; from videox.run.status import RunStatus\n"
        "status = RunStatus(pathlib.Path(sys.argv[1])); status.write('running', step=7)\n"
        "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "status.write('stopped', exit_code=75)"
    )
    assert run_python(code, tmp_path, ending).returncode == (-signal.SIGKILL if ending == "kill" else 0)
    status = read_status(tmp_path)
    assert (status.was_killed, status.step) == (ending == "kill", 7)


def test_a_reused_process_number_another_host_and_a_torn_file_count_as_dead(tmp_path):
    RunStatus(tmp_path).write("running", step=1)
    path = tmp_path / "run_status.json"
    content = path.read_text()
    assert not read_status(tmp_path).was_killed
    for change in ({"started": "1"}, {"host": "elsewhere"}, {"pid": 2**22 + 1}):
        path.write_text(json.dumps(json.loads(content) | change))
        assert read_status(tmp_path).was_killed, change
    for torn in (content[:20], "", "[]", '{"state": "running"}'):
        path.write_text(torn)
        assert read_status(tmp_path).was_killed, torn


def test_a_status_that_cannot_be_written_warns_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    status = RunStatus(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        status.write("running")
        status.write("failed", exit_code=5, error="x")
    assert len(caplog.records) == 1 and "run_status.json cannot be written" in caplog.text


def test_a_process_that_is_not_the_main_one_writes_no_status(tmp_path):
    RunStatus(tmp_path / "run", enabled=False).write("running")
    assert list(tmp_path.iterdir()) == []
