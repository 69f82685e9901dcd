"""Serves the tests that end a training run many times: torch is imported once, and every run is a fork of that.

`shared()` starts the server, a process of its own that has the train script loaded and has computed nothing; `start`
forks a trainer in a session of its own, as a shell starts one: its flags in sys.argv, its output in a file, its
environment added to this one's. The server must be one process with one thread, or a fork could inherit a held lock.
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

SCRIPT = "scripts/wan2.1/train.py"
LIMIT = 240.0  # seconds that anything here may take; a run takes a few
PR_SET_PDEATHSIG = 1
ALLOCATOR = "jemalloc_bg_thd"  # pyarrow's; it lets go of its locks around a fork
# What training imports on the way; a fork that imports it again and again would spend its time on that.
ON_THE_WAY = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.pipelines.wan.pipeline_wan",
)


# ------------------------------------------------------------------------------------------------- the server


def serve() -> None:
    """Answers each JSON line on stdin by one on stdout: {"start": ...} by a pid, {"reap": pid} by its wait status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import torch

    torch.set_num_threads(1)
    script = tiny.load_script(SCRIPT)
    for name in ON_THE_WAY:
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("umt5")  # kept there
    gc.freeze()
    _answer(answers, {"threads": [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]})
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _answer(answers, {"status": os.waitpid(request["reap"], 0)[1]})
            continue
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            os.close(answers.fileno())
            _become(request, writer)
            module, _, function = request["work"].partition(":")
            work = getattr(importlib.import_module(module), function) if module else script.main
            _live(script.run_script, work)
        os.close(writer)
        ready = os.read(reader, 1)
        os.close(reader)
        _answer(answers, {"pid": pid, "ready": bool(ready)})


def _live(run_script: Callable, work: Callable[[], int]) -> NoReturn:
    """Runs a trainer to its end as the interpreter would, but leaves out taking every imported module apart again."""
    code = 1
    try:
        run_script(work)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if sys.exception() is not None:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()  # the loader's workers end here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(answers: TextIO, message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _become(request: dict, ready: int) -> None:
    """Turns a fork of the server into a trainer: own session, own output, the flags and environment asked for."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with the server, whatever ends that
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    faulthandler.register(signal.SIGUSR2)  # says where it stands
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    sys.argv = [str(tiny.ROOT / SCRIPT), *request["start"]]
    os.write(ready, b"r")
    os.close(ready)


# ------------------------------------------------------------------------------------------------- the client


class Trainer:
    """A trainer that was forked off: its process, its session, what it has said."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self.server, self.pid, self.log = server, pid, log
        self.began = time.monotonic()
        self.seconds = 0.0  # that it lived
        self.code: int | None = None  # exit code, or minus the signal that killed it
        self._handle = os.pidfd_open(pid)

    def running(self) -> bool:
        return self.code is None and not select.select([self._handle], [], [], 0)[0]

    def wait(self, limit: float = LIMIT) -> int:
        """Returns the exit code, or minus the number of the signal that ended the process."""
        if self.code is None:
            ended = select.select([self._handle], [], [], limit)[0]
            if not ended:
                self.server.end_all()
            self.seconds = time.monotonic() - self.began
            self.code = os.waitstatus_to_exitcode(self.server.ask(reap=self.pid)["status"])
            os.close(self._handle)
            assert ended, f"still running after {limit} s:\n{self.said()[-4000:]}"
        return self.code

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone, as `kill` does."""
        if self.running():
            os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Sends a signal to the process and its workers, as a terminal or a batch system does."""
        if self.code is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal_all(signal.SIGKILL)

    def until(self, happened: Callable[[], object], limit: float = LIMIT) -> bool:
        """Waits until something has happened; False if the process ended before it did."""
        deadline = time.monotonic() + limit
        while not happened():
            if not self.running():
                return bool(happened())
            if time.monotonic() > deadline:
                self.server.end_all()
                raise AssertionError(f"nothing after {limit} s:\n{self.said()[-4000:]}")
            time.sleep(0.0003)
        return True

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def complaint(self) -> str:
        """Returns the one line that the process ended with."""
        lines = [line for line in self.said().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.said()[-4000:]
        assert "Traceback" not in self.said(), self.said()[-4000:]
        return lines[0]


class ForkServer:
    """A process that has imported everything and forks trainers off."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(tiny.ROOT))),
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # nothing may start a thread before a fork
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._started: list[Trainer] = []
        threads = self._hear()["threads"]
        assert len([name for name in threads if name != ALLOCATOR]) == 1, threads

    def _hear(self) -> dict:
        line = self._process.stdout.readline()
        assert line, f"the fork server ended with {self._process.wait()}"
        return json.loads(line)

    def ask(self, **request: object) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def start(
        self,
        flags: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        largest_file: int = 0,
        folder: Path = tiny.ROOT,
        work: str = "",
    ) -> Trainer:
        """Forks a trainer and returns when it runs.

        Args:
            flags: of the train script.
            log: gets what it says; is appended to.
            environment: added to this process's.
            largest_file: bytes that any file it writes may have (soft limit), 0 = no limit.
            folder: its working directory.
            work: "module:function" to run instead of the trainer's main; it returns the exit code.
        """
        self._started = [trainer for trainer in self._started if trainer.running()]
        answer = self.ask(
            start=list(flags),
            log=str(log),
            environment=environment or {},
            largest_file=largest_file,
            folder=str(folder),
            work=work,
        )
        assert answer["ready"], f"no trainer came to life; see {log}"
        self._started.append(Trainer(self, answer["pid"], log))
        return self._started[-1]

    def end_all(self) -> None:
        """Kills all trainers that live, for one that hangs is seldom alone; their logs say where they stood."""
        for trainer in self._started:
            trainer.signal(signal.SIGUSR2)
        time.sleep(1)
        for trainer in filter(Trainer.running, self._started):
            trainer.kill()

    def run(self, flags: Sequence[str], log: Path, **settings: object) -> Trainer:
        """Forks a trainer and returns when it has ended."""
        trainer = self.start(flags, log, **settings)
        trainer.wait()
        return trainer

    def start_ranks(
        self,
        world_size: int,
        flags: Sequence[str] | Sequence[Sequence[str]],
        log: Path,
        work: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        largest_file: int = 0,
    ) -> list[Trainer]:
        """Forks the processes of one launch with the variables that accelerate's launcher and torchrun would set.

        Args:
            flags: of all ranks, or a list for each.
            log: rank r's output goes to a file beside it, with "-rank<r>" in its name.
            work: as for `start`, one for each rank (none = all train).
            environment: added to all of it, e.g. what the launcher sets for a backend.
            largest_file: as for `start`.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        return [
            self.start(
                flags if not flags or isinstance(flags[0], str) else flags[rank],
                log.with_name(f"{log.stem}-rank{rank}{log.suffix}"),
                environment={**common, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                work=work[rank] if work else "",
                largest_file=largest_file,
            )
            for rank in range(world_size)
        ]

    def run_ranks(self, world_size: int, flags: Sequence[str], log: Path, work: Sequence[str] = ()) -> list[Trainer]:
        trainers = self.start_ranks(world_size, flags, log, work)
        for trainer in trainers:
            trainer.wait()
        return trainers

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@functools.cache
def shared() -> ForkServer:
    """Returns the one server of this process; it ends with it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


# ------------------------------------------------------------------------------------------- runs to compare


MEASURED = ("tokens_per_second", "data_wait", "mfu", "straggler_share")  # of the clock, so never equal


def steps(output_dir: Path) -> list[dict]:
    """Returns metrics.jsonl without what the clock says, every line of it whole."""
    lines = (output_dir / "metrics.jsonl").read_bytes().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def status(output_dir: Path) -> dict:
    return json.loads((output_dir / "run_status.json").read_bytes())


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Returns the content of a checkpoint's files that hold what was trained, by path: weights, optimizer, state."""
    names = [path for path in sorted(checkpoint.rglob("*")) if path.suffix == ".safetensors"]
    names += [checkpoint / "trainer_state.json", checkpoint / "transformer" / "config.json"]
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in names}


def differences(output_dir: Path, unbroken: Path, last_step: int) -> list[str]:
    """Returns in what a run differs from another one, to the last bit; empty if in nothing."""
    found, expected = steps(output_dir), steps(unbroken)
    said = []
    if [line["step"] for line in found] != list(range(1, last_step + 1)):
        said.append(f"steps {[line['step'] for line in found]}")
    said += [
        f"metrics of step {a['step']}: {b} instead of {a}" for a, b in zip(expected, found, strict=False) if a != b
    ]
    for folder in (f"checkpoint-{last_step}", "transformer"):
        a, b = (_content(root / folder) for root in (unbroken, output_dir))
        said += [f"{folder}/{name}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return said


def _content(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder, by its path inside it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    serve()
