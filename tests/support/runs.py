"""Serves the tests of the trainers: a run of the script in this process, a real launch, and what either left."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import sys
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
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from videox.encoders.encode import Encoder, LazyEncoders
from videox.models.transformer import load_transformer
from videox.run.lifecycle import run_script
from videox.tracking.jsonl import read_lines

ROOT = tiny.ROOT
WAN = "scripts/wan2.1/train.py"
TRAINERS = {"wan2.1": WAN, "hunyuanvideo": "scripts/hunyuanvideo/train.py"}
TIME_LIMIT = 240  # seconds for a launch; one that takes longer hangs

# The users' own Wan2.1 command, every flag in their order, at sizes that a processor core trains in a blink.
WAN_PLAIN: Mapping[str, object] = {
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
# The published HunyuanVideo command has the same flags; its three sizes are one.
PLAIN: Mapping[str, Mapping[str, object]] = {
    "wan2.1": WAN_PLAIN,
    "hunyuanvideo": {**WAN_PLAIN, "image_sample_size": 64},
}


def script(family: str = "wan2.1") -> ModuleType:
    """Returns a family's trainer as a module; its imports are paid once."""
    return tiny.load_script(TRAINERS[family])


def words(settings: Mapping[str, object]) -> list[str]:
    """Returns flags as a command line: True is the bare flag, a list several words; None and False leave it out."""
    line: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        line.append(f"--{name}")
        if value is not True:
            line += [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]
    return line


def wan_plain(model: Path, metadata: Path, output_dir: Path, **changes: object) -> list[str]:
    """Returns the users' Wan2.1 command over a model and a data set; keywords change, add or (None) drop flags."""
    return plain("wan2.1", model, metadata, output_dir, **changes)


def plain(family: str, model: Path, metadata: Path, output_dir: Path, **changes: object) -> list[str]:
    """Returns the users' command of a family, as wan_plain."""
    where = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": metadata.parent,
        "train_data_meta": metadata,
        "output_dir": output_dir,
    }
    return words({**where, **PLAIN[family], "report_to": "none", **changes})


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, what it printed, its folder, and how long it took in seconds."""

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
        """Returns the exported weights, or those of another folder of the run ("checkpoint-4/transformer")."""
        return read_weights(self.folder / folder)

    def dump(self, step: int, micro: int = 0) -> Dump:
        """Returns what --dump_steps wrote for a micro-batch of the first process."""
        return read_dump(self.folder / "dump" / f"step-{step}" / f"rank-0-micro-{micro}.safetensors")


@dataclass(frozen=True)
class Dump:
    """One dumped micro-batch: its tensors by name, and the header's rows, frame_indices, captions, bucket."""

    tensors: dict[str, torch.Tensor]
    rows: list[int]
    frame_indices: list[list[int]]
    captions: list[str]
    bucket: list[int]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def components_of(trainer: ModuleType, args: Namespace, accelerator: Accelerator, shift: float = 5.0) -> Any:
    """Returns a family's components as a run without a cache has them."""
    parts = trainer.check_model(args)
    shifts = [shift] if "open_pipeline" in vars(trainer) else []  # Wan makes its own scheduler
    encoders = LazyEncoders(partial(trainer.load_encoders, args, parts, *shifts, accelerator))
    encode = Encoder(trainer.recipes_of(args, parts, encoders, accelerator), accelerator.device)
    model_class = next(kind for name, kind in vars(trainer).items() if name.endswith("Transformer3DModel"))
    transformer = load_transformer(model_class, parts["transformer"], accelerator)
    return trainer.load_components(parts, shift, transformer, encoders, encode)


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
    """Trains an untouched transformer on dumped tensors by torch and diffusers alone, at the published settings.

    Args:
        model: folder of the model that the run began with.
        steps: the dumped micro-batches of each optimizer step.
        limits: gradient norm that each step may have (None = 0.05 in all of them).
        warm_up: steps.

    Returns:
        The transformer, the loss and the gradient norm before clipping of each step.
    """
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer").train()
    parameters = list(transformer.parameters())
    adam = {"betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True, **adam)
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warm_up)
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
        rate.step()
        optimizer.zero_grad()
    return transformer, losses, norms


@contextlib.contextmanager
def untouched_process() -> Iterator[None]:
    """Puts back what a run leaves in a process: accelerate's shared state, environment, generators, switches, bars."""
    environment = dict(os.environ)
    bars = [(library, library._tqdm_active) for library in (diffusers_logging, transformers_logging)]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - kept, not drawn from
    try:
        yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        for library, shown in bars:
            (library.enable_progress_bar if shown else library.disable_progress_bar)()
        os.environ.clear()
        os.environ.update(environment)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if multiprocessing.active_children():
            gc.collect()  # the loader's workers end with their loader


def train(argv: Sequence[str], trainer: ModuleType | None = None) -> Outcome:
    """Runs the trainer in this process as the shell would, from the repository's root, on the CPU.

    A UserError becomes its line and exit code, as in a real run; any other exception is the caller's.
    """
    trainer = trainer or script()
    out, err = io.StringIO(), io.StringIO()
    begin = time.monotonic()
    with untouched_process(), contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        try:
            run_script(partial(trainer.main, list(argv)))
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue(), output_dir_of(argv), time.monotonic() - begin)


def output_dir_of(argv: Sequence[str]) -> Path:
    return Path(argv[list(argv).index("--output_dir") + 1]) if "--output_dir" in argv else Path()


def environment(**changes: str) -> dict[str, str]:
    """Returns the environment of a child: no GPU, no network, one thread, the interpreter's own folder first."""
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
    """Runs a trainer through a real `accelerate launch`, as users do, from the repository's root."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return run_command([*accelerate, *launcher, TRAINERS[family], *argv], output_dir_of(argv), **environment_changes)


def run_command(command: Sequence[str], folder: Path, **environment_changes: str) -> Outcome:
    """Runs a command to its end from the repository's root."""
    begin = time.monotonic()
    done = run_bounded(command, TIME_LIMIT, cwd=ROOT, env=environment(**environment_changes))
    return Outcome(done.returncode, done.stdout, done.stderr, folder, time.monotonic() - begin)
