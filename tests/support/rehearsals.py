"""Starts rehearsals of the train scripts on a fake GPU (tests/cuda/fake_cuda.py), each in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import forkserver
import launches
import runs
import tiny
import torch
from skips import skip_missing

CUDA = tiny.ROOT / "tests" / "cuda"
STEPS = 3
TIMEOUT = 600.0  # seconds of a run; every operation is looked at, and mutants are slower still
EFFECT = "what CUDA tensors do in the train scripts"
# torchrun's variables of rank 0 of two.
RANK_0 = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def skip_unless_possible() -> None:
    """Skip the running test where the fake GPU cannot be built: it uses private interfaces of one version of torch."""
    pinned = (tiny.ROOT / "requirements.txt").read_text(encoding="utf-8").partition("torch==")[2].split()[0]
    if version("torch").partition("+")[0] != pinned:
        skip_missing(f"torch {pinned}, not {version('torch')}", EFFECT)
    if torch.version.cuda is not None or platform.system() != "Linux":
        skip_missing("a CPU build of torch for Linux", EFFECT)
    if shutil.which(compiler()) is None:
        skip_missing("a C++ compiler", EFFECT)


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def build_guard() -> Path:
    """Return the compiled guard.cpp; conftest.py keeps the folder of extensions for later sessions."""
    source = CUDA / "guard.cpp"
    package = Path(importlib.util.find_spec("torch").origin).parent
    # the library stores where torch is
    digest = hashlib.sha256(source.read_bytes() + str(package).encode()).hexdigest()[:12]
    library = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / f"guard-{digest}" / "guard.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler(), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{package}/include", str(source)]
        built = library.with_name(f"guard-{os.getpid()}.so")  # other workers of pytest-xdist have this folder, too
        command += [f"-L{package}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package}/lib", "-o", str(built)]
        subprocess.run(command, check=True, timeout=300)
        built.rename(library)
    return library


@dataclass(frozen=True)
class Report:
    """What a rehearsal found; see tests/cuda/fake_cuda.py.

    Attributes:
        code: exit code.
        output: what the process printed.
        failure: traceback of an exception.
        steps: number of steps.
        errors: operations that a GPU would refuse.
        races: uses of memory that do not wait for another stream.
        warnings: Python's warnings.
        waits: [step, what for, innermost place in videox or scripts, place outside torch, count].
        attention: [where, dtypes of query, key and value, contiguous, masked, count].
        folder: --output_dir.
    """

    code: int
    output: str
    folder: Path
    failure: str
    steps: int
    errors: list[str]
    races: list[str]
    warnings: list[str]
    waits: list[tuple[int, str, str, str, int]]
    attention: list[tuple[str, str, bool, bool, int]]


class Rehearsals:
    """Starts rehearsals as forks of one process that has loaded guard, torch and the train script of Wan2.1.

    Args:
        folder: for models, data, caches and outputs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.guard, self._count = folder, build_guard(), 0
        paths = os.pathsep.join(map(str, (CUDA, CUDA.parent / "support", tiny.ROOT)))
        # DeepSpeed chooses its device when it is imported, which is before the GPU can be found.
        self._server = forkserver.ForkServer(LD_PRELOAD=str(self.guard), PYTHONPATH=paths, DS_ACCELERATOR="cuda")
        self.metadata = tiny.make_dataset(folder / "data")

    def close(self) -> None:
        self._server.close()

    def run(
        self, family: str, mode: str, backend: str = "", *, cached: bool = False, script: Path | None = None,
        **flags: object,
    ) -> Report:  # fmt: skip
        """Train for three steps, save and export.

        Args:
            family: wan2.1 or hunyuanvideo.
            mode: of --train_mode.
            backend: recipe of launches.py to be rank 0 of two under; "" is a single process.
            cached: fill a latent cache before, and train from it.
            script: train.py to run; None is the family's.
            flags: of the train script, besides those of the published command.
        """
        self._count += 1
        name = f"{self._count}-{family}-{mode}-{backend or 'single'}"
        kind = f"{family} {'normal' if mode == 'normal' else 'i2v'}"
        flags = {"train_mode": mode, "max_train_steps": STEPS, "checkpointing_steps": STEPS, **flags}
        if cached:
            flags["latent_cache"] = self._filled_cache(kind, mode, flags)
        environment = self._environment(kind, backend)
        wanted = {
            "report": str(self.folder / f"{name}.json"), "guard": str(self.guard), "devices": 2 if backend else 1,
            "script": str(script or runs.TRAIN_SCRIPTS[family]),
        }  # fmt: skip
        argv = runs.train_flags(family, self._model(kind), self.metadata, self.folder / name, **flags)
        trainer = self._server.run(
            argv, self.folder / f"{name}.log", TIMEOUT, entry_point="rehearse:main",
            environment={**environment, "REHEARSAL": json.dumps(wanted)},
        )  # fmt: skip
        report = Path(wanted["report"])
        assert report.is_file(), trainer.output()[-6000:]
        return Report(
            trainer.code, trainer.output(), self.folder / name, **json.loads(report.read_text(encoding="utf-8"))
        )

    def _model(self, kind: str) -> Path:
        folder = self.folder / "models" / kind.replace(" ", "-")
        return folder if folder.is_dir() else launches.MODEL_BUILDERS[kind](folder)

    def _environment(self, kind: str, backend: str) -> Mapping[str, str]:
        """Return the variables that a launcher would set on a machine with GPUs."""
        launcher = launches.launcher_environment(backend, kind, 2) | RANK_0 if backend else {}
        return {"ACCELERATE_MIXED_PRECISION": "bf16", **launcher, "ACCELERATE_USE_CPU": "false"}

    def _filled_cache(self, kind: str, mode: str, flags: Mapping[str, object]) -> Path:
        """Return a latent cache that was filled on the CPU, with all that a run of as many micro-batches reads."""
        name = f"{kind}-{mode}-{flags.get('gradient_accumulation_steps', 1)}".replace(" ", "-")
        family, cache = kind.split()[0], self.folder / "caches" / name
        if not cache.is_dir():
            asked = {**flags, "latent_cache": cache, "cache_only": True}
            argv = runs.train_flags(
                family, self._model(kind), self.metadata, self.folder / f"fill-{cache.name}", **asked
            )
            log = self.folder / f"fill-{cache.name}.log"
            filled = self._server.run(argv, log, entry_point=launches.entry_point_of(family))
            assert filled.code == 0, filled.output()[-6000:]
        return cache
