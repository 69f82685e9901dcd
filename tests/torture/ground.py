"""Runs for the torture suite: a small model and data set, uninterrupted runs, and the comparison with them."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import forkserver
import runs
import tiny

from tests.torture import faults
from tests.torture.cases import flip_bit
from videox.errors import STORAGE
from videox.run.checkpoint import find_checkpoints, latest_checkpoint, verify

STEPS, EVERY, KEPT = 6, 2, 2
MEDIA = tuple(tiny.DATASET[i] for i in (1, 2, 4, 5))
# Not superseded-*: a resume keeps the records of the steps after its checkpoint there.
LEFT_BEHIND = (".tmp-*", ".trash-*")
BUILDERS: Mapping[str, Callable[[Path], Path]] = {
    "wan2.1": tiny.build_wan_t2v,
    "hunyuanvideo": tiny.build_hunyuan_t2v,
}


@cache
def shared(family: str = "wan2.1") -> Ground:
    """Return the ground of a family, whose model, reference runs and fork server all areas of this process share."""
    folder = Path(tempfile.mkdtemp(prefix="videox-torture-"))
    ground = Ground(folder, family)
    atexit.register(shutil.rmtree, folder)
    atexit.register(ground.server.close)
    return ground


class Ground:
    """A small model and data set; for each case the data set is written anew, so that the run also writes its index.

    Args:
        folder: an empty folder.
        family: a key of BUILDERS.

    Attributes:
        inputs: the data set and latent cache of the current case; always the same path, because a checkpoint names it.
        preloaded: the compiled file_faults.c, which all trainers have loaded; it does nothing until one arms it.
        calls: number of file-changing calls of each scene of the area disk that were counted.

    Raises:
        Unavailable: there is no C compiler.
    """

    def __init__(self, folder: Path, family: str = "wan2.1") -> None:
        self.family, self.folder, self.inputs = family, folder, folder / "inputs"
        self.preloaded = faults.compile_library(folder)
        self.server = faults.server_with(self.preloaded, runs.TRAIN_SCRIPTS[family])
        self.model = BUILDERS[family](folder / "model")
        self.data = tiny.make_dataset(folder / "data", MEDIA, copies=2).parent
        self.calls: dict[str, int] = {}
        self._references: dict[tuple[tuple[str, object], ...], tuple[Path, float]] = {}

    def new_place(self, name: str) -> Path:
        """Return an empty folder for a case, and write its data set."""
        place = self.folder / name
        for folder in (place, self.inputs):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        shutil.copytree(self.data, self.inputs / "data")
        return place

    def flags(self, place: Path, output_dir: Path | None = None, **changes: object) -> list[str]:
        """Return the flags of the run of a case: a save every two steps, the newest two are kept."""
        settings = {"max_train_steps": STEPS, "checkpointing_steps": EVERY, "checkpoints_total_limit": KEPT}
        settings |= {"mixed_precision": "no", "video_sample_n_frames": 5, "gradient_checkpointing": None}
        if changes.pop("cached", False):
            settings["latent_cache"] = self.inputs / "cache"
        metadata = self.inputs / "data" / "metadata.json"
        flags = {**settings, **changes}
        return runs.train_flags(self.family, self.model, metadata, output_dir or place / "run", **flags)

    def start(self, place: Path, entry_point: str = "", environment: dict[str, str] | None = None, **changes: object) -> forkserver.TrainerProcess:  # fmt: skip
        return self.server.start(
            self.flags(place, **changes), place / "log", entry_point=entry_point, environment=environment
        )

    def resume(self, place: Path, **changes: object) -> forkserver.TrainerProcess:
        return self.server.run(self.flags(place, resume_from_checkpoint="latest", **changes), place / "log")

    def reference(self, **changes: object) -> tuple[Path, float]:
        """Return the output folder of an uninterrupted run with these flags, and how many seconds it took."""
        key = tuple(sorted(changes.items()))
        if key not in self._references:
            place = self.new_place(f"reference-{len(self._references)}")
            begin = time.monotonic()
            run = self.start(place, **changes)
            assert run.wait() == 0, run.output()[-4000:]
            self._references[key] = place / "run", time.monotonic() - begin
        return self._references[key]

    def life(self, **changes: object) -> float:
        """Return how many seconds an uninterrupted run with these flags takes."""
        return self.reference(**changes)[1]

    def problems_after_resume(self, place: Path, broken: random.Random | None = None, output_dir: Path | None = None, **changes: object) -> list[str]:  # fmt: skip
        """Resume a run that a fault ended, and return what is not as in the uninterrupted run.

        Args:
            place: of the case.
            broken: change a bit of the optimizer's state and resume without a check of hashes.
            output_dir: None = run, in the folder of the case.
            changes: flags of the reference run.
        """
        output_dir = output_dir or place / "run"
        newest, half = latest_checkpoint(output_dir, partial(verify, hashes=True))
        if broken is not None:
            assert newest is not None, "there is no checkpoint to break"
            state = newest / "optimizer" / "optimizer.safetensors"
            flip_bit(state, broken, first=state.stat().st_size // 8 * 4 + 1, every=4)  # changes a float32 a little
        again = self.resume(place, output_dir=output_dir, skip_verify=broken is not None, **changes)
        problems = [f"half a checkpoint: {line}" for line in half]
        if again.code != 0:
            return [*problems, f"the resume ended with {again.code}: {again.output()[-1500:]}"]
        problems += forkserver.differences(output_dir, self.reference(**changes)[0], STEPS)
        problems += [f"{path.name} is left" for pattern in LEFT_BEHIND for path in output_dir.glob(pattern)]
        kept = [path.name for path in find_checkpoints(output_dir)]
        expected = [f"checkpoint-{step}" for step in range(STEPS - EVERY * (KEPT - 1), STEPS + 1, EVERY)]
        if STEPS not in (int(name.removeprefix("checkpoint-")) for name in kept) or len(kept) > len(expected):
            problems.append(f"kept {kept} instead of {expected}")
        return problems


def problems_of_refusal(run: forkserver.TrainerProcess) -> list[str]:
    """Return what is wrong with the end of a run whose disk refused a write: it goes on, or ends with 5 and a line."""
    lines = [line for line in run.output().splitlines() if line.startswith("error: ")]
    problems = ["it printed a traceback"] if "Traceback" in run.output() else []
    if run.code not in (0, STORAGE):
        problems.append(f"it ended with {run.code}: {run.output()[-1000:]}")
    if run.code == STORAGE and len(lines) != 1:
        problems.append(f"it printed {len(lines)} error lines: {run.output()[-1000:]}")
    return problems
