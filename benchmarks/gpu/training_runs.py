"""Runs of the train scripts on generated clips, with small models of random weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from gpu.scales import Scale, Values
from videox.tracking.jsonl import read_lines

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
sys.path.append(str(ROOT / "tests/support"))
CAPTIONS = (
    "a bright square moves over a dark background",
    "a rabbit walks out of its burrow in the morning light and looks around at the trees behind the window",
    "people ride bikes through a city street on a sunny day",
    "a man in a car talks to the camera",
)
TRAIN_PROCESS = (sys.executable, str(ROOT / "benchmarks/gpu/train_process.py"))
STEPS = 3
SMALL_CLIP, SMALL_SIDE = (9, 64, 96), 64  # of the runs that only compare numbers
PARTS = ("encode", "forward", "backward", "optimizer")  # of a step, in metrics.jsonl
RUNNING: set[subprocess.Popen[str]] = set()
LATE = "the run has not ended"
LAST_LINES = 3  # of the output of a failed run


@dataclass(frozen=True)
class Run:
    """A run that has ended: its folder, the lines of metrics.jsonl, its output, and how long the process took."""

    folder: Path
    metrics: Sequence[Mapping[str, Any]]
    output: str
    seconds: float

    @property
    def losses(self) -> list[float]:
        """The losses of its steps."""
        return [line["loss"] for line in self.metrics]

    def remove(self) -> None:
        """Remove its folder, which may have gigabytes."""
        shutil.rmtree(self.folder)

    def values(self) -> Values:
        """Return losses, the fastest step after the first, its parts, and memory: measured and predicted."""
        fastest = min(self.metrics[1:] or self.metrics, key=lambda line: line["step_seconds"])
        values: Values = {f"loss {line['step']}": line["loss"] for line in self.metrics}
        values |= {"step s": fastest["step_seconds"], "process s": self.seconds}
        values |= {f"{part} s": fastest[f"{part}_seconds"] for part in PARTS}
        if "peak_allocated_gib" in self.metrics[-1]:
            last = self.metrics[-1]
            values |= {"peak GiB": last["peak_allocated_gib"], "reserved GiB": last["peak_reserved_gib"]}
            values |= {"predicted GiB": last["predicted_gib"]}
        if "mfu" in fastest:
            values["MFU %"] = 100 * fastest["mfu"]
        return values


class Workspace:
    """A temporary folder with models, clips and runs, and the process that is ready for the next run.

    Everything is created on first use. The folder is removed by close().

    Attributes:
        end: time.monotonic() at which a run is ended, whatever its own limit is.
    """

    def __init__(self) -> None:
        self.end = math.inf
        self._folder: Path | None = None
        self._ready: subprocess.Popen[str] | None = None
        self._runs = 0

    @property
    def folder(self) -> Path:
        """The folder."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="videox-gpu-"))
        return self._folder

    def close(self) -> None:
        """End all processes, also the one that is ready, and remove the folder."""
        for process in list(RUNNING):
            end(process)
        self._ready = None
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def seconds_left(self, limit: float) -> float:
        """Return the seconds that a run may take: at most `limit`."""
        return max(min(limit, self.end - time.monotonic()), 0.0)

    def train(self, scale: Scale, family: str, flags: Sequence[str], *, small: bool = False) -> Run:
        """Train STEPS steps in a process of its own.

        Args:
            scale: sizes of model and clips.
            family: folder in scripts/.
            flags: in addition to those of `flags_of`.
            small: train the small model of numbers alone.

        Raises:
            RuntimeError: the run failed or took too long; with the last lines of its output.
        """
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        argv = [str(ROOT / f"scripts/{family}/train.py"), *self.flags_of(scale, family, folder, small=small), *flags]
        process = self._ready or start(TRAIN_PROCESS)
        self._ready = None
        begun = time.monotonic()
        if torch.cuda.is_available():  # on a CPU it would only compete with the run
            self._ready = start(TRAIN_PROCESS)
        output = finish(process, json.dumps(argv) + "\n", self.seconds_left(scale.runs.seconds))
        return Run(folder, read_lines(folder / "metrics.jsonl"), output, time.monotonic() - begun)

    def launch(self, scale: Scale, family: str, launcher: Sequence[str], flags: Sequence[str]) -> Run:
        """Like `train` with the small model, through `accelerate launch`."""
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, f"scripts/{family}/train.py"]
        command += [*self.flags_of(scale, family, folder, small=True), *flags]
        begun = time.monotonic()
        # an empty HF_HOME: the user's accelerate configuration would change the launch
        process = start(command, {"HF_HOME": str(self.folder / "hf_home")})
        output = finish(process, "", self.seconds_left(scale.runs.seconds))
        return Run(folder, read_lines(folder / "metrics.jsonl"), output, time.monotonic() - begun)

    def flags_of(self, scale: Scale, family: str, folder: Path, *, small: bool) -> list[str]:
        """Return the flags of every run."""
        frames, side = (SMALL_CLIP[0], SMALL_SIDE) if small else (scale.runs.clip.frames, scale.runs.side)
        data = self.data(SMALL_CLIP if small else scale.runs.clip)
        flags = f"""
            --train_mode normal --mixed_precision bf16 --enable_bucket --video_sample_stride 1
            --image_sample_size {side} --video_sample_size {side} --token_sample_size {side}
            --video_sample_n_frames {frames} --train_batch_size 1 --dataloader_num_workers 0
            --max_train_steps {STEPS} --checkpointing_steps {STEPS} --seed 42
            --learning_rate 1e-4 --lr_scheduler constant --report_to none
        """
        paths = ["--pretrained_model_name_or_path", str(self.model(scale, family, small=small))]
        paths += ["--train_data_dir", str(data.parent), "--train_data_meta", str(data), "--output_dir", str(folder)]
        return [*flags.split(), *paths]

    def data(self, clip: tuple[int, int, int]) -> Path:
        """Return the metadata of four clips of this size, which has frames, height and width."""
        import tiny

        frames, height, width = clip
        folder = self.folder / f"clips-{frames}x{height}x{width}"
        metadata = folder / "metadata.json"
        if not metadata.exists():
            rows = []
            for number, caption in enumerate(CAPTIONS):
                path = tiny.write_clip(folder / f"{number}.mp4", frames, width, height, 16.0, seed=number)
                rows.append({"file_path": path.name, "text": caption, "type": "video"})
            metadata.write_text(json.dumps(rows), encoding="utf-8")
        return metadata

    def model(self, scale: Scale, family: str, *, small: bool) -> Path:
        """Return the folder of a family's model in diffusers layout."""
        small = small or not scale.runs.published_vae
        folder = self.folder / f"{family}-{'small' if small else 'wide'}"
        if not folder.exists():
            sizes = (scale.runs.small if small else scale.runs.families)[family]
            build_model(folder, family, sizes, published_vae=not small)
        return folder


WORKSPACE = Workspace()


def build_model(folder: Path, family: str, sizes: Mapping[str, Any], *, published_vae: bool) -> None:
    """Write a text-to-video model with random weights, by the builders of the demo.

    Args:
        folder: of the model.
        family: wan2.1 or hunyuanvideo.
        sizes: for the builder.
        published_vae: the VAE has the published widths.
    """
    for library in (diffusers_logging, transformers_logging):  # before the pipelines are imported, which warn
        library.set_verbosity_error()
        library.disable_progress_bar()
    import demo_hunyuan
    import demo_model
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan, HunyuanVideoPipeline, WanPipeline

    wan = family == "wan2.1"
    components = (demo_model.wan_components if wan else demo_hunyuan.hunyuan_components)(**sizes)
    if published_vae:
        with demo_model.seeded(0):
            components["vae"] = AutoencoderKLWan() if wan else AutoencoderKLHunyuanVideo()
        demo_model.shrink_posterior_variance(components["vae"])
    (WanPipeline if wan else HunyuanVideoPipeline)(**components).save_pretrained(folder)
    clips = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    (demo_model.calibrate_latents if wan else demo_hunyuan.calibrate_scaling_factor)(folder, clips)


# -------------------------------------------------------------------------------------------------------- processes


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a process in a session of its own, so that it can be ended with all of its children."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(environment or {})}
    if not torch.cuda.is_available():
        variables |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    with signals_held():  # else a process that was just started could be left behind
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        RUNNING.add(process)
    return process


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Handle SIGINT and SIGTERM that arrive inside at the end."""
    arrived: list[int] = []
    handlers = {
        number: signal.signal(number, lambda which, _: arrived.append(which))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            os.kill(os.getpid(), number)


def finish(process: subprocess.Popen[str], given: str, seconds: float) -> str:
    """Give a process its input, wait for its end, and return its output.

    Raises:
        RuntimeError: it failed, or has not ended after `seconds`; then it is killed.
    """
    try:
        output, _ = process.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{LATE} after {seconds:.0f} s") from error
    finally:
        end(process)
    if process.returncode != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("error:")] or lines[-LAST_LINES:]
        raise RuntimeError(f"the run ended with {process.returncode}: {' / '.join(found)}")
    return output


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    RUNNING.discard(process)


# ---------------------------------------------------------------------------------------------------------- exports


def check_export(run: Run, model: Path) -> None:
    """Check that the exported transformer has the tensors of the model, all finite, and not all unchanged.

    Raises:
        RuntimeError: naming what is missing or wrong.
    """
    exported, original = weights_of(run.folder / "transformer"), weights_of(model / "transformer")
    if exported.keys() != original.keys():
        raise RuntimeError(f"the export lacks or adds {sorted(exported.keys() ^ original.keys())[:3]}")
    wrong = [
        name
        for name, tensor in exported.items()
        if tensor.shape != original[name].shape or not tensor.isfinite().all()
    ]
    if wrong:
        raise RuntimeError(f"exported tensors have another shape or are not finite: {wrong[:3]}")
    if all(torch.equal(tensor.float(), original[name].float()) for name, tensor in exported.items()):
        raise RuntimeError("the exported weights are those of the base model")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"there is no safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
