"""Entry point of a forked trainer: runs a train.py on a fake GPU, and writes what it did with it to a JSON file.

It gets its flags in sys.argv, as a train.py does, and the rest in the variable REHEARSAL, as JSON:

    report   file to write
    script   path of the train.py
    devices  number of GPUs of the machine

With WORLD_SIZE=2 in the environment it is rank 0, and its peer is simulated (fake_ranks.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import fake_ranks
import tiny

from videox.optim import state
from videox.training import loop


def main() -> int:
    """Run the script to its end; return its exit code, or 1 after an exception, which is in the report."""
    wanted, record = json.loads(os.environ["REHEARSAL"]), fake_cuda.RECORD
    shown: list[str] = []
    warnings.showwarning = lambda message, kind, file, line, *_: shown.append(
        f"{file}:{line} {kind.__name__}: {message}"
    )
    script = tiny.load_script(wanted["script"])
    count_steps(record)
    fake_cuda.install(wanted["devices"], ctypes.CDLL(wanted["guard"]))
    save_fake_moments()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        fake_ranks.simulate_peer()
    code, failure = 1, ""
    try:
        with fake_cuda.FakeGpu():
            code = script.main()
    except BaseException:  # noqa: BLE001 - also SystemExit; the report has it
        failure = traceback.format_exc()
    report = {"failure": failure, "warnings": shown, **record.as_json()}
    Path(wanted["report"]).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return code


def save_fake_moments() -> None:
    """Accept fake tensors in an optimizer's state, which has to consist of torch's own class."""
    state_tensor = state._state_tensor
    state._state_tensor = lambda value, where: (
        ("", value.detach()) if fake_cuda.is_fake(value) else state_tensor(value, where)
    )


def count_steps(record: fake_cuda.Record) -> None:
    """Tell the record which step runs. The last one includes what comes after it: validation, save and export."""
    iterate_steps = loop.iterate_steps

    def counted(*args: Any) -> Iterator[Any]:
        for step in iterate_steps(*args):
            record.step += 1
            yield step

    loop.iterate_steps = counted
