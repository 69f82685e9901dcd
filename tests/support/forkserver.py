"""Fork server for the tests: torch is imported once, and every training run is a fork of that process.

`shared()` starts the server, a separate process that has loaded the train script and computed nothing; `start` forks a
trainer in a new session, as a shell starts one: flags in sys.argv, output in a file, extra environment variables. The
server must have exactly one thread, because a fork could otherwise inherit a lock that another thread holds.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import tiny
from dispositions import set_defaults

SCRIPT_VARIABLE = "FORKSERVER_SCRIPT"  # names the train script of the server's process
SCRIPT = os.environ.get(SCRIPT_VARIABLE, "scripts/wan2.1/train.py")
# Seconds for any wait here; a run takes a few seconds. A machine that does much other work may need more.
TIMEOUT = float(os.environ.get("FORKSERVER_TIMEOUT", "240"))
PR_SET_PDEATHSIG = 1
JEMALLOC_THREAD = "jemalloc_bg_thd"  # of pyarrow; jemalloc releases its locks around a fork
# Modules that training imports lazily. They are imported before the fork, so that not every run pays for them.
PRELOADED_MODULES = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.pipelines.wan.pipeline_wan",
)


# ------------------------------------------------------------------------------------------------- server


def serve() -> None:
    """Run the server loop: one JSON request per line on stdin, one JSON reply per line on stdout.

    A request to fork a trainer is replied to with its pid, {"reap": pid} with the wait status of that process.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the replies
    import torch

    torch.set_num_threads(1)
    script = tiny.load_script(SCRIPT)
    for name in PRELOADED_MODULES:
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping(
        "umt5"
    )  # cached inside transformers
    gc.freeze()
    _send(replies, {"threads": [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]})
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _send(replies, {"status": os.waitpid(request["reap"], 0)[1]})
            continue
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            os.close(replies.fileno())
            _prepare_child(request, writer)
            module, _, function = request["entry_point"].partition(":")
            main = getattr(importlib.import_module(module), function) if module else script.main
            _run_and_exit(script.run_script, main)
        os.close(writer)
        ready = os.read(reader, 1)
        os.close(reader)
        _send(replies, {"pid": pid, "ready": bool(ready)})


def _run_and_exit(run_script: Callable, main: Callable[[], int]) -> NoReturn:
    """Run a trainer to its end as the interpreter would, but skip the slow teardown of all imported modules."""
    code = 1
    try:
        run_script(main)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if sys.exception() is not None:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()  # ends the data loader workers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _send(replies: TextIO, message: dict) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _prepare_child(request: dict, ready: int) -> None:
    """Turn a fork of the server into a trainer: new session, default signals, log, flags and environment."""
    os.setsid()
    set_defaults()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the child ends with the server, even if that is killed
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    devnull = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((devnull, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    faulthandler.register(signal.SIGUSR2)  # prints the stack of every thread
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    sys.argv = [str(tiny.ROOT / SCRIPT), *request["flags"]]
    os.write(ready, b"r")
    os.close(ready)


# ------------------------------------------------------------------------------------------------- client


class TrainerProcess:
    """A forked trainer: its process, its session, its output."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self.server, self.pid, self.log = server, pid, log
        self._start_time = time.monotonic()
        self.seconds = 0.0  # lifetime of the process
        self.code: int | None = None  # exit code, or minus the signal that killed it
        self._pidfd = os.pidfd_open(pid)

    def running(self) -> bool:
        return self.wait_for(0)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the process and return its exit code, or minus the number of the signal that killed it."""
        if self.code is None:
            ended = select.select([self._pidfd], [], [], timeout)[0]
            if not ended:
                self.server.end_all()
            self.seconds = time.monotonic() - self._start_time
            self.code = os.waitstatus_to_exitcode(self.server.request(reap=self.pid)["status"])
            os.close(self._pidfd)
            assert ended, f"still running after {timeout} s:\n{self.output()[-4000:]}"
        return self.code

    def wait_for(self, seconds: float) -> bool:
        """Wait for so long, or until the process has ended; return whether it is still running."""
        return self.code is None and not select.select([self._pidfd], [], [], seconds)[0]

    def signal(self, number: int) -> None:
        """Send a signal to this process only, as `kill` does."""
        if self.running():
            os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Send a signal to the process and its workers, as a terminal or a batch system does."""
        if self.code is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal_all(signal.SIGKILL)

    def wait_until(self, condition: Callable[[], object], timeout: float = TIMEOUT) -> bool:
        """Wait until the condition is true; return False if the process ended first."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running():
                return bool(condition())
            if time.monotonic() > deadline:
                self.server.end_all()
                raise AssertionError(f"the condition is still false after {timeout} s:\n{self.output()[-4000:]}")
            time.sleep(0.0003)
        return True

    def output(self) -> str:
        """Return what the process has printed so far, stdout and stderr together."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def error_line(self) -> str:
        """Return the one error line of the output; fail if there is not exactly one, or a traceback."""
        lines = [line for line in self.output().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.output()[-4000:]
        assert "Traceback" not in self.output(), self.output()[-4000:]
        return lines[0]


class ForkServer:
    """A process that has imported everything and forks trainers.

    Args:
        changes: environment variables of the process, besides those that it needs.
    """

    def __init__(self, **changes: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(tiny.ROOT))),
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # no library may start a thread before a fork
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **changes,
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._started: list[TrainerProcess] = []
        threads = self._receive()["threads"]
        assert len([name for name in threads if name != JEMALLOC_THREAD]) == 1, threads

    def _receive(self) -> dict:
        line = self._process.stdout.readline()
        assert line, f"the fork server ended with {self._process.wait()}"
        return json.loads(line)

    def request(self, **request: object) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def start(
        self,
        flags: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        largest_file: int = 0,
        folder: Path = tiny.ROOT,
        entry_point: str = "",
    ) -> TrainerProcess:
        """Fork a trainer and return when it runs.

        Args:
            flags: command-line flags of the train script.
            log: file that the output is appended to.
            environment: variables added to those of this process.
            largest_file: maximum size in bytes of any file that the trainer writes (soft limit, 0 = no limit).
            folder: working directory of the trainer.
            entry_point: "module:function" to call instead of the train script's main; it returns the exit code.
        """
        self._started = [trainer for trainer in self._started if trainer.running()]
        reply = self.request(
            flags=list(flags),
            log=str(log),
            environment=environment or {},
            largest_file=largest_file,
            folder=str(folder),
            entry_point=entry_point,
        )
        assert reply["ready"], f"the trainer did not start; see {log}"
        self._started.append(TrainerProcess(self, reply["pid"], log))
        return self._started[-1]

    def end_all(self) -> None:
        """Kill all running trainers, because peers of a hanging rank hang too; their logs get the stacks first."""
        for trainer in self._started:
            trainer.signal(signal.SIGUSR2)
        time.sleep(1)
        for trainer in filter(TrainerProcess.running, self._started):
            trainer.kill()

    def run(self, flags: Sequence[str], log: Path, timeout: float = TIMEOUT, **settings: object) -> TrainerProcess:
        """Fork a trainer and return when it has ended, within `timeout` seconds; keywords as for `start`."""
        trainer = self.start(flags, log, **settings)
        trainer.wait(timeout)
        return trainer

    def start_ranks(
        self,
        world_size: int,
        flags: Sequence[str] | Sequence[Sequence[str]],
        log: Path,
        entry_points: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        largest_file: int = 0,
    ) -> list[TrainerProcess]:
        """Fork the ranks of one launch with the variables that accelerate's launcher and torchrun would set.

        Args:
            flags: flags for all ranks, or one list of flags per rank.
            log: rank r writes to a file next to this one, with "-rank<r>" in its name.
            entry_points: one entry point per rank, as for `start` (empty = all ranks run the train script).
            environment: variables for all ranks, e.g. those that the launcher sets for a backend.
            largest_file: as for `start`.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        return [
            self.start(
                flags if not flags or isinstance(flags[0], str) else flags[rank],
                log.with_name(f"{log.stem}-rank{rank}{log.suffix}"),
                environment={**common, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                entry_point=entry_points[rank] if entry_points else "",
                largest_file=largest_file,
            )
            for rank in range(world_size)
        ]

    def run_ranks(
        self, world_size: int, flags: Sequence[str], log: Path, entry_points: Sequence[str] = ()
    ) -> list[TrainerProcess]:
        trainers = self.start_ranks(world_size, flags, log, entry_points)
        for trainer in trainers:
            trainer.wait()
        return trainers

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@functools.cache
def shared() -> ForkServer:
    """Return the fork server of this process, which is closed at exit."""
    server = ForkServer()
    atexit.register(server.close)
    return server


# ------------------------------------------------------------------------------------------- runs to compare


PARTS = ("encode_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
# measured, so never equal
TIMING_KEYS = ("tokens_per_second", "data_wait", "mfu", "straggler_share", "step_seconds", *PARTS)


def read_steps(output_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the measured times; every line must be complete JSON."""
    lines = (output_dir / "metrics.jsonl").read_bytes().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


def read_status(output_dir: Path) -> dict:
    return json.loads((output_dir / "run_status.json").read_bytes())


def read_training_state(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint with weights, optimizer and trainer state, as bytes by path."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.suffix == ".safetensors"]
    paths += [checkpoint / "trainer_state.json", checkpoint / "transformer" / "config.json"]
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in paths}


def differences(output_dir: Path, reference: Path, last_step: int, weights: str = "transformer") -> list[str]:
    """Return one line per bitwise difference between a run and a reference run: metrics, last checkpoint, export.

    weights: name of the exported folder.
    """
    found, expected = read_steps(output_dir), read_steps(reference)
    lines = []
    if [line["step"] for line in found] != list(range(1, last_step + 1)):
        lines.append(f"steps {[line['step'] for line in found]}")
    lines += [
        f"metrics of step {a['step']}: {b} instead of {a}" for a, b in zip(expected, found, strict=False) if a != b
    ]
    for folder in (f"checkpoint-{last_step}", weights):
        a, b = (_content(root / folder) for root in (reference, output_dir))
        lines += [f"{folder}/{name}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return lines


def _content(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    serve()
