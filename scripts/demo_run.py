"""The trainings of the demo: their recipes, the launch with a stop, and what their files must contain afterwards."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_show import FRAMES, HEIGHT, STRIDE, WIDTH

from videox.errors import BUG, STOPPED, UserError
from videox.weights.expert_names import EXPERTS

ROOT = Path(__file__).resolve().parent.parent
READ_LOGS = "read the train-*.log files in the demo folder"
STEP_TIMEOUT = 900.0  # seconds; a training without a new step for so long is assumed to hang
MOST_THREADS = 4  # of the training process; more do not make these small models faster


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained.

    Attributes:
        steps: optimizer steps.
        checkpoint_steps: steps between checkpoints.
        stop_step: the training is stopped after this step and resumed; None = it is not.
        precision: of --mixed_precision; CPUs are faster in float32 than in bf16.
        flags: the other flags of train.py, but for paths and prompts.
    """

    steps: int
    checkpoint_steps: int
    stop_step: int | None
    precision: str
    flags: str


def learn_by_heart(steps: int, stop_step: int | None, learning_rate: str, more: str = "") -> Recipe:
    """Return the recipe for a few clips of one size, whose encoder outputs are cached, until they are known."""
    return Recipe(
        steps,
        checkpoint_steps=steps // 3,
        stop_step=stop_step,
        precision="no",
        flags=f"""
        --enable_bucket --fix_sample_size {HEIGHT} {WIDTH} --video_sample_stride {STRIDE} --clip_sampling head
        --video_sample_n_frames {FRAMES} --train_batch_size 6 --video_repeat 200 --num_train_epochs 100
        --cache_variants 1 --vae_sample_mode mode --vae_mini_batch 2 --caption_dropout 0 --uniform_sampling
        --learning_rate {learning_rate} --lr_scheduler cosine --lr_warmup_steps 30 --adam_beta2 0.95
        --adam_weight_decay 0 --max_grad_norm 1 --seed 42
        --sample_every {steps // 3} --sample_steps 20 --sample_guidance 1 {more}""",
    )


# 17 frames at 64 x 64, fewer at up to 192 x 192, with rows held out of the training.
HUNYUAN = Recipe(
    60,
    checkpoint_steps=20,
    stop_step=30,
    precision="bf16",
    flags="""
    --gradient_checkpointing --low_vram --image_sample_size 192 --video_sample_size 64 --token_sample_size 128
    --video_sample_stride 2 --video_sample_n_frames 17
    --enable_bucket --random_hw_adapt --training_with_video_token_length --uniform_sampling
    --train_batch_size 2 --video_repeat 1 --gradient_accumulation_steps 1 --vae_mini_batch 1
    --dataloader_num_workers 2 --num_train_epochs 100 --seed 42
    --learning_rate 5e-3 --lr_scheduler constant_with_warmup --lr_warmup_steps 10
    --adam_weight_decay 3e-2 --adam_epsilon 1e-10 --max_grad_norm 0.05
    --validation_steps 20 --validation_epochs 0 --validation_rows 2""",
)
TEXT_TOKENS = 32  # with the usual 512, most of the attention to the caption would go to its padding
RECIPES = {
    ("wan2.1", "normal"): learn_by_heart(900, 450, "2e-3", f"--tokenizer_max_length {TEXT_TOKENS}"),
    ("wan2.1", "i2v"): learn_by_heart(450, 225, "2e-3", f"--tokenizer_max_length {TEXT_TOKENS}"),
    ("wan2.1", "inpaint"): learn_by_heart(450, 225, "2e-3", f"--tokenizer_max_length {TEXT_TOKENS}"),
    # each expert has so many steps, and a part of the noise levels
    **{
        ("wan2.2", mode): learn_by_heart(450, 225, "2e-3", f"--tokenizer_max_length {TEXT_TOKENS} --expert both")
        for mode in ("normal", "i2v")
    },
    ("wan2.2", "ti2v"): learn_by_heart(450, 225, "2e-3", f"--tokenizer_max_length {TEXT_TOKENS}"),
    ("hunyuanvideo", "normal"): HUNYUAN,
    ("hunyuanvideo", "i2v"): HUNYUAN,
}
LORA = learn_by_heart(300, None, "4e-3", f"--tokenizer_max_length {TEXT_TOKENS} --lora_rank 16")


def train_command(family: str, mode: str, recipe: Recipe, paths: Sequence[str]) -> list[str]:
    """Return the command of a training; paths: flags with paths and prompts."""
    launch = f"{sys.executable} -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no"
    flags = f"""
        --train_mode {mode} --trainable_modules . --mixed_precision {recipe.precision}
        --max_train_steps {recipe.steps} --checkpointing_steps {recipe.checkpoint_steps} {recipe.flags}"""
    script = ["--mixed_precision", recipe.precision, f"scripts/{family}/train.py"]
    return [*launch.split(), *script, *flags.split(), *paths]


def run_folders(family: str, mode: str, run: Path) -> list[Path]:
    """Return the folders of the runs that a command trains: of Wan2.2 A14B one for each expert."""
    return [run / expert for expert in EXPERTS] if trains_experts(family, mode) else [run]


def trains_experts(family: str, mode: str) -> bool:
    """Return whether the model has two transformers, which are trained one after the other."""
    return family == "wan2.2" and mode != "ti2v"


def train(command: list[str], folders: Sequence[Path], log: Path, stop_step: int | None = None) -> None:
    """Run the training to its end; with stop_step, send it SIGTERM once that step of the first run is done.

    Args:
        folders: of the runs that the command trains, in their order.

    Raises:
        UserError: if it fails, or has no new step for STEP_TIMEOUT.
    """
    environment = dict(os.environ, OMP_NUM_THREADS=str(min(len(os.sched_getaffinity(0)), MOST_THREADS)))
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    run, stop_requested = folders[0], False
    deadline, recorded = time.monotonic() + STEP_TIMEOUT, recorded_bytes(folders)
    with log.open("w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while launcher.poll() is None:
                if (now_recorded := recorded_bytes(folders)) != recorded:
                    deadline, recorded = time.monotonic() + STEP_TIMEOUT, now_recorded
                if time.monotonic() > deadline:
                    raise UserError("training", f"no new step for {STEP_TIMEOUT:g} s", f"read {log}", BUG)
                if stop_step is not None and not stop_requested and last_step(run) >= stop_step:
                    # The signal goes to the training process only: the launcher would end at once, and its exit code
                    # would hide that of the training process.
                    os.kill(run_status(run)["pid"], signal.SIGTERM)
                    stop_requested = True
                time.sleep(0.1)
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
    status = run_status(next((folder for folder in reversed(folders) if folder.exists()), run))
    if launcher.returncode != 0 and not (stop_requested and status.get("state") == "stopped"):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        reason = status.get("error") or next((line for line in reversed(lines) if line.strip()), "no output")
        raise UserError("training", f"ended with exit code {launcher.returncode}: {reason}", f"read {log}", BUG)


def recorded_bytes(folders: Sequence[Path]) -> int:
    """Return the bytes of the metrics of all runs."""
    paths = [folder / "metrics.jsonl" for folder in folders]
    return sum(path.stat().st_size for path in paths if path.exists())


def json_lines(path: Path) -> list[dict]:
    """Return the records of a JSON Lines file; a last line that is still being written is ignored."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]


def last_step(run: Path) -> int:
    lines = json_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def run_status(run: Path) -> dict:
    path = run / "run_status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def expect_stopped(run: Path, recipe: Recipe) -> int:
    """Check that the run stopped with a checkpoint, and return the step at which it stopped."""
    status = run_status(run)
    if (status.get("state"), status.get("exit_code")) != ("stopped", STOPPED):
        raise UserError("stop", f"unexpected run status {status}", READ_LOGS, BUG)
    step = status["step"]
    if not (recipe.stop_step or 0) <= step < recipe.steps or not (run / f"checkpoint-{step}").is_dir():
        raise UserError("stop", f"stopped at step {step} without its checkpoint", READ_LOGS, BUG)
    print(f"   stopped after step {step}, checkpoint-{step} written")
    return step


def expect_finished(run: Path, steps: int) -> None:
    """Check that the run finished and that metrics.jsonl has each step exactly once, with a finite loss."""
    status = run_status(run)
    if status.get("state") != "finished":
        raise UserError("training", f"unexpected run status {status}", READ_LOGS, BUG)
    metrics = json_lines(run / "metrics.jsonl")
    if [line["step"] for line in metrics] != list(range(1, steps + 1)):
        raise UserError("metrics.jsonl", "a step is missing or repeated", READ_LOGS, BUG)
    if not all(math.isfinite(line["loss"]) for line in metrics):
        raise UserError("metrics.jsonl", "a loss is not finite", READ_LOGS, BUG)
    if not (run / "losses.png").exists():
        raise UserError("losses.png", "the loss curve was not plotted", READ_LOGS, BUG)
    print(f"   finished; metrics.jsonl has each of the steps 1 to {steps} exactly once")


def learned(run: Path) -> tuple[str, float, float]:
    """Check that the loss fell, and return which loss that is, and its first and last value.

    It is the held-out loss of a run that measures it, else the mean of the first and of the last tenth of the steps.
    """
    name, source = "held-out loss", "validation.jsonl"
    losses = [record["loss"] for record in json_lines(run / source)]
    if not losses:
        name, source = "training loss", "metrics.jsonl"
        steps = [line["loss"] for line in json_lines(run / source)]
        tenth = max(1, len(steps) // 10)
        losses = [sum(part) / tenth for part in (steps[:tenth], steps[-tenth:])]
    if len(losses) < 2 or not losses[-1] < losses[0]:
        raise UserError(source, f"the {name} did not fall: {losses}", READ_LOGS, BUG)
    return name, losses[0], losses[-1]
