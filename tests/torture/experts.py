"""Area experts: kills and stops of `--expert both` in either run and between the two, then a resume."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import forkserver
import runs
import tiny

from tests.torture.cases import Area, Outcome, Row, flip_bit
from tests.torture.ground import shared
from videox.errors import INTERRUPTED, STOPPED
from videox.run.checkpoint import find_checkpoints
from videox.weights.expert_names import EXPERTS

STEPS, EVERY = 4, 2
END_SECONDS = 240.0


def train() -> int:
    """Entry point of a forked trainer."""
    return runs.train_script("wan2.2").main()


class Experts(Area):
    """Ends a command that trains two runs in turn; resumed, both must be bit-identical to those of one start."""

    rows = (
        Row("killed", "both experts by one command, killed at a random moment, once or twice, resumed bit-identically", 300),
        Row("stopped", "the same with a stop signal: no status stays `running`, and the exit code says what was trained", 300),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.model = tiny.build_wan22_t2v(folder / "model")
        self._reference: tuple[Path, float] | None = None

    def start(self, place: Path, **changes: object) -> forkserver.TrainerProcess:
        settings = {
            "expert": "both", "max_train_steps": STEPS, "checkpointing_steps": EVERY, "mixed_precision": "no",
            "video_sample_n_frames": 5, "gradient_checkpointing": None, "tokenizer_max_length": 16,
            "latent_cache": self.ground.inputs / "cache",
        }  # fmt: skip
        metadata = self.ground.inputs / "data" / "metadata.json"
        flags = runs.train_flags("wan2.2", self.model, metadata, place / "run", **{**settings, **changes})
        return self.ground.server.start(flags, place / "log", entry_point="tests.torture.experts:train")

    def reference(self) -> tuple[Path, float]:
        """Return the output folder of an undisturbed command, and how many seconds it took."""
        if self._reference is None:
            place, begin = self.ground.new_place("experts-reference"), time.monotonic()
            run = self.start(place)
            assert run.wait() == 0, run.output()[-4000:]
            self._reference = place / "run", time.monotonic() - begin
        return self._reference

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        reference, seconds = self.reference()
        stopped, place = seed % 2 == 1 and not self.broken, self.ground.new_place(f"experts-{seed}")
        number = signal.SIGTERM if stopped else signal.SIGKILL
        moments = [draw.uniform(0, seconds) for _ in range(1 if stopped or self.broken else draw.choice((1, 2)))]
        problems: list[str] = []
        for moment in moments:
            run = self.start(place, resume_from_checkpoint="latest")
            if self.broken:
                run.wait_until(lambda: find_checkpoints(place / "run" / "low_noise"))
            else:
                time.sleep(moment)
            run.signal_all(number)
            run.wait(END_SECONDS)
            problems += problems_of_stop(run, place / "run") if stopped else []
        if self.broken:
            state = find_checkpoints(place / "run" / "low_noise")[-1] / "optimizer" / "optimizer.safetensors"
            flip_bit(state, draw, first=state.stat().st_size // 2)
        again = self.start(place, resume_from_checkpoint="latest", skip_verify=self.broken)
        if again.wait(END_SECONDS) != 0:
            problems.append(f"the resume ended with {again.code}: {again.output()[-1500:]}")
        for expert, weights in EXPERTS.items() if not problems else ():
            found = forkserver.differences(place / "run" / expert, reference / expert, STEPS, weights)
            problems += [f"{expert}: {line}" for line in found]
        what = f"{number.name} after {', '.join(f'{moment:.2f}' for moment in moments)} s of {seconds:.2f}"
        shutil.rmtree(place)
        return Outcome("stopped" if stopped else "killed", what, problems=problems)


def problems_of_stop(run: forkserver.TrainerProcess, output_dir: Path) -> list[str]:
    """Return what is wrong with how a command for two runs ended that got a stop signal."""
    problems = ["it printed a traceback"] if "Traceback" in run.output() else []
    folders = [output_dir / expert for expert in EXPERTS]
    states = [forkserver.read_status(each)["state"] for each in folders if (each / "run_status.json").exists()]
    # A signal that comes before a process handles any ends it as any program: at the start, or between the runs.
    begun = states[-1:] not in ([], ["finished"])
    expected = (STOPPED, INTERRUPTED) if begun else (STOPPED, INTERRUPTED, -signal.SIGTERM)
    if states == ["finished"] * len(folders):
        expected = (0,)
    if run.code not in expected:
        problems.append(f"exit code {run.code} with {states}: {run.output()[-1000:]}")
    if {"running", "failed"} & {*states}:
        problems.append(f"the states are {states}")
    return problems
