"""Helpers to start training runs in this process or through a real launch, and to read what they wrote."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from bounded import run_bounded
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.utils import logging as diffusers_logging
from dispositions import STOP_SIGNALS
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from videox.distributed.accelerator import compute_dtype
from videox.encoders.encode import Encoder, LazyEncoders
from videox.models.scheduler import scheduler_shift
from videox.models.transformer import load_transformer
from videox.run.lifecycle import run_script
from videox.tracking.jsonl import read_lines

ROOT = tiny.ROOT
WAN_SCRIPT = "scripts/wan2.1/train.py"
TRAIN_SCRIPTS = {
    "wan2.1": WAN_SCRIPT, "wan2.2": "scripts/wan2.2/train.py", "hunyuanvideo": "scripts/hunyuanvideo/train.py",
}  # fmt: skip
TIME_LIMIT = 240  # seconds for a launch; one that takes longer counts as hanging

# The published Wan2.1 command with every flag in its order, at sizes that one CPU core trains in a moment.
WAN_FLAGS: Mapping[str, object] = {
    "image_sample_size": 96,
    "video_sample_size": 64,
    "token_sample_size": 64,
    "video_sample_stride": 2,
    "video_sample_n_frames": 13,
    "train_batch_size": 1,
    "video_repeat": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "num_train_epochs": 1,
    "checkpointing_steps": 50,
    "learning_rate": "2e-03",
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 2,
    "seed": 42,
    "gradient_checkpointing": True,
    "mixed_precision": "bf16",
    "adam_weight_decay": "3e-2",
    "adam_epsilon": "1e-10",
    "vae_mini_batch": 1,
    "max_grad_norm": 0.05,
    "random_hw_adapt": True,
    "training_with_video_token_length": True,
    "enable_bucket": True,
    "uniform_sampling": True,
    "low_vram": True,
    "train_mode": "normal",
    "trainable_modules": ["."],
}
# The published HunyuanVideo command has the same flags; its three sample sizes are equal.
FAMILY_FLAGS: Mapping[str, Mapping[str, object]] = {
    "wan2.1": WAN_FLAGS,
    "wan2.2": {**WAN_FLAGS, "expert": "high_noise"},
    "hunyuanvideo": {**WAN_FLAGS, "image_sample_size": 64},
}


def train_script(family: str = "wan2.1") -> ModuleType:
    """Return the train script of a family as a module; it is imported once."""
    return tiny.load_script(TRAIN_SCRIPTS[family])


def to_argv(settings: Mapping[str, object]) -> list[str]:
    """Return settings as command-line words: True is a bare flag, a list several values, None and False no flag."""
    argv: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return argv


def wan_flags(model: Path, metadata: Path, output_dir: Path, **changes: object) -> list[str]:
    """Return the flags of the published Wan2.1 command for a model and a data set.

    Keywords change, add or (None) drop flags.
    """
    return train_flags("wan2.1", model, metadata, output_dir, **changes)


def train_flags(family: str, model: Path, metadata: Path, output_dir: Path, **changes: object) -> list[str]:
    """Return the flags of the published command of a family, as `wan_flags`."""
    paths = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": metadata.parent,
        "train_data_meta": metadata,
        "output_dir": output_dir,
    }
    return to_argv({**paths, **FAMILY_FLAGS[family], "report_to": "none", "report_seconds": 0, **changes})


@dataclass(frozen=True)
class Outcome:
    """Result of a run: exit code, stdout and stderr, output folder, and duration in seconds."""

    code: int
    stdout: str
    stderr: str
    folder: Path
    seconds: float

    @property
    def metrics(self) -> list[dict]:
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.metrics]

    @property
    def status(self) -> dict:
        return json.loads((self.folder / "run_status.json").read_text(encoding="utf-8"))

    @property
    def validation(self) -> list[dict]:
        return read_lines(self.folder / "validation.jsonl")

    @property
    def bad_samples(self) -> list[dict]:
        return read_lines(self.folder / "bad_samples.jsonl")

    def weights(self, folder: str = "transformer") -> dict[str, torch.Tensor]:
        """Return the exported weights, or those in another folder of the run ("checkpoint-4/transformer")."""
        return read_weights(self.folder / folder)

    def dump(self, step: int, micro: int = 0) -> Dump:
        """Return what --dump_steps wrote for a micro-batch of rank 0."""
        return read_dump(self.folder / "dump" / f"step-{step}" / f"rank-0-micro-{micro}.safetensors")


@dataclass(frozen=True)
class Dump:
    """One dumped micro-batch: tensors by name, and rows, frame_indices, captions and bucket from the header."""

    tensors: dict[str, torch.Tensor]
    rows: list[int]
    frame_indices: list[list[int]]
    captions: list[str]
    bucket: list[int]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def build_model(trainer: ModuleType, args: Namespace, accelerator: Accelerator, shift: float | None = None) -> Any:
    """Return what a training step needs of the model, as a run without a latent cache builds it.

    Args:
        shift: flow shift; None is that of the model's scheduler, or 5.0 in a layout without one.
    """
    components, is_wan = trainer.check_model(args), "WanTransformer3DModel" in vars(trainer)
    if shift is None:
        scheduler = components.get("scheduler")
        shift = 5.0 if scheduler is None else scheduler_shift(scheduler.config, scheduler.path)
    encoders = LazyEncoders(partial(trainer.load_encoders, args, components, shift, accelerator))
    specs = trainer.encoding_specs(args, components, encoders, compute_dtype(accelerator))
    model_class = next(kind for name, kind in vars(trainer).items() if name.endswith("Transformer3DModel"))
    transformer = load_transformer(model_class, components["transformer"], accelerator)
    build = trainer.build_model if is_wan else partial(trainer.build_model, args)
    return build(components, shift, transformer, encoders, Encoder(specs, accelerator.device))


def read_dump(path: Path) -> Dump:
    with safe_open(path, framework="pt") as file:
        header = {name: json.loads(text) for name, text in file.metadata().items()}
        return Dump({name: file.get_tensor(name) for name in file.keys()}, **header)  # noqa: SIM118 - no mapping


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def replay(
    model: Path,
    steps: Sequence[Sequence[Dump]],
    *,
    limits: Sequence[float] | None = None,
    learning_rate: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 3e-2,
    epsilon: float = 1e-10,
    warm_up: int = 0,
) -> tuple[WanTransformer3DModel, list[float], list[float]]:
    """Train a freshly loaded transformer on dumped tensors with torch and diffusers only, at the published settings.

    This is the reference that runs of the train script are compared with.

    Args:
        model: folder of the base model of the run.
        steps: the dumped micro-batches of each optimizer step.
        limits: maximum gradient norm of each step (None = 0.05 in all steps).
        warm_up: number of LR warmup steps.

    Returns:
        The transformer, the loss of each step, and the gradient norm before clipping of each step.
    """
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer").train()
    parameters = list(transformer.parameters())
    adam = {"betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True, **adam)
    lr_scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warm_up)
    losses, norms = [], []
    for limit, step in zip(limits or [0.05] * len(steps), steps, strict=True):
        losses.append(0.0)
        for dump in step:
            noisy, text = dump["model.hidden_states"], dump["model.encoder_hidden_states"]
            velocity = transformer(noisy, dump["timestep"], text).sample
            error = torch.nn.functional.mse_loss(velocity, dump["target"], reduction="none")
            loss = (error.mean(dim=(1, 2, 3, 4)) * dump["weight"]).sum()
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit).item())
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    return transformer, losses, norms


@contextlib.contextmanager
def restored_process_state() -> Iterator[None]:
    """Restore what a run changes in its process: accelerate's state, environment, RNG, numerics, progress bars."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    bars = [(library, library._tqdm_active) for library in (diffusers_logging, transformers_logging)]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.benchmark
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - saved, not drawn from
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        for library, enabled in bars:
            (library.enable_progress_bar if enabled else library.disable_progress_bar)()
        os.environ.clear()
        os.environ.update(environment)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic[0])
        torch.utils.deterministic.fill_uninitialized_memory = deterministic[1]
        torch.backends.cuda.enable_cudnn_sdp(cudnn[0])
        torch.backends.cudnn.benchmark = cudnn[1]
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if multiprocessing.active_children():
            gc.collect()  # ends the data loader workers, which end with their loader


def train(argv: Sequence[str], trainer: ModuleType | None = None) -> Outcome:
    """Run a train script in this process, with the repository root as working directory, on the CPU.

    A UserError becomes its line and exit code, as in a real run; any other exception is raised to the caller.
    """
    trainer = trainer or train_script()
    out, err = io.StringIO(), io.StringIO()
    begin = time.monotonic()
    with (
        restored_process_state(),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        try:
            run_script(partial(trainer.main, list(argv)))
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue(), output_dir_of(argv), time.monotonic() - begin)


def output_dir_of(argv: Sequence[str]) -> Path:
    return Path(argv[list(argv).index("--output_dir") + 1]) if "--output_dir" in argv else Path()


def child_environment(**changes: str) -> dict[str, str]:
    """Return environment variables for a child: no GPU, no network, one thread, this interpreter first in PATH."""
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **changes,
    }


def launch(
    argv: Sequence[str], launcher: Sequence[str] = (), *, family: str = "wan2.1", **environment_changes: str
) -> Outcome:
    """Run a train script through a real `accelerate launch`, from the repository root."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return run_command(
        [*accelerate, *launcher, TRAIN_SCRIPTS[family], *argv], output_dir_of(argv), **environment_changes
    )


def run_command(command: Sequence[str], folder: Path, **environment_changes: str) -> Outcome:
    """Run a command to its end from the repository root."""
    begin = time.monotonic()
    done = run_bounded(command, TIME_LIMIT, cwd=ROOT, env=child_environment(**environment_changes))
    return Outcome(done.returncode, done.stdout, done.stderr, folder, time.monotonic() - begin)
