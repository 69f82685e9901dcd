"""Questions that people asked other trainers, each answered by a dry run, compared with what the thread says.

    python benchmarks/questions.py [--only 3 7] [--output benchmarks/questions.md]

The commands and the facts of the threads are the data of this file. A row is right where the dry run says what the
thread found out. All runs are of this trainer: one with an 8-bit base model needs less memory, and is not compared.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import proposed
import runs
import tiny

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
FITS, NOT = "fits in", "does not fit in"
FITS_SOMEHOW = rf"{FITS}|training fits with a --latent_cache|cheapest changes first:\s+--text_encoder_precision"
STEP = "--mixed_precision bf16 --train_batch_size 1 --vae_mini_batch 1 --low_vram --gradient_checkpointing"
OPEN_STEP = STEP.replace(" --gradient_checkpointing", "")
CLIPS = "--dry_run_data 50x5.1s@16fps:832x480 --video_sample_n_frames 81 --video_sample_fps 16 --enable_bucket"
AT_480P = f"{CLIPS} --video_sample_size 640 --token_sample_size 640 --image_sample_size 640"
IMAGES = "--dry_run_data 50:512x512 --enable_bucket"
ON_EIGHT = "--dry_run_processes 8 --dry_run_backend"
OFFLOAD = "config/zero_stage3_config_cpu_offload.json"
SITE = "https://github.com"


@dataclass(frozen=True)
class Question:
    """A question of a thread.

    Attributes:
        text: the question, in our words.
        thread: repository and number.
        fact: what the thread says.
        family: script that answers it.
        words: its flags; {folder} is a folder with the files that `prepare` writes.
        says: a regular expression of the right answer, in the output or in the error line.
        gib: bounds of the predicted GiB, where the thread states how much was used.
        deepspeed: DeepSpeed file of the launch.
        prepare: writes the files of the question.
    """

    text: str
    thread: str
    fact: str
    family: str
    words: str
    says: str
    gib: tuple[float, float] | None = None
    deepspeed: str = ""
    prepare: Callable[[Path], object] = lambda _: None


def _captioned_image(folder: Path) -> None:
    for number in (1, 2):
        tiny.write_image(folder / f"image_{number}.jpg", seed=number)
        (folder / f"image_{number}.txt").write_text("a square", encoding="utf-8")


def _image_as_video(folder: Path) -> None:
    tiny.write_image(folder / "test.png")
    (folder / "metadata.csv").write_text('video,prompt\ntest.png,"dog"\n', encoding="utf-8")


def _upper_case_videos(folder: Path) -> None:
    for number in (1, 2):
        tiny.write_clip(folder / f"{number}.mp4", frames=24, width=64, height=48, fps=16).rename(
            folder / f"{number}.MP4"
        )
        (folder / f"{number}.txt").write_text("a square", encoding="utf-8")


def _musubi_file(folder: Path) -> None:
    (folder / "clips").mkdir()
    for number in range(4):
        tiny.write_clip(folder / "clips" / f"{number}.mp4", frames=24, width=64, height=48, fps=16)
        (folder / "clips" / f"{number}.txt").write_text("a square", encoding="utf-8")
    (folder / "dataset.toml").write_text(
        '[general]\nresolution = [960, 544]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n\n'
        f'[[datasets]]\nvideo_directory = "{folder}/clips"\ntarget_frames = [17]\nframe_extraction = "head"\n',
        encoding="utf-8",
    )


SMALL_MODEL = "--dry_run_model wan2.1-t2v-1.3b --gpu rtx4090 --lora_rank 32 --enable_bucket"
LARGE, IMAGE_MODEL = "--dry_run_model wan2.1-t2v-14b", "--dry_run_model wan2.1-i2v-14b --train_mode i2v"
QUESTIONS = (
    Question(
        "Does a LoRA of the 14B model fit an RTX 4090?", "tdrussell/diffusion-pipe#164",
        "no: out of memory, also with 22 blocks swapped to the host", "wan2.1",
        f"{LARGE} --gpu rtx4090 --lora_rank 32 {CLIPS} {STEP}", NOT,
    ),
    Question(
        "And with the weights in host memory, at 512 x 512 x 81?", "tdrussell/diffusion-pipe#129",
        "barely, with 32 of 40 blocks swapped to the host", "wan2.1",
        f"--recipe t2v-14b-lora-24gb --video_sample_n_frames 81 {CLIPS.split(' --video_sample_n')[0]}", FITS,
        gib=(12, 24),
    ),
    Question(
        "A 14B LoRA with 16 GB, 512-pixel images only, 24 GB of host memory?", "tdrussell/diffusion-pipe#149",
        "no: killed while loading, because the model is 28 GB in bfloat16", "wan2.1",
        f"{LARGE} --gpu rtx5080 --lora_rank 32 {IMAGES} {STEP}", rf"{NOT}[\s\S]*while loading (2[5-9]|3\d)\.",
    ),
    Question(
        "Is there anything of Wan2.1 that trains on 12 GB?", "tdrussell/diffusion-pipe#245",
        "the 1.3B model does, depending on the settings", "wan2.1",
        f"--recipe t2v-1.3b-lora-16gb --gpu rtx3060 --video_sample_n_frames 49 {CLIPS.split(' --video_sample_n')[0]}", FITS_SOMEHOW,
    ),
    Question(
        "A LoRA of the 1.3B model on 12 GB with images?", "kohya-ss/musubi-tuner#119",
        "probably fine as it is", "wan2.1",
        f"--dry_run_model wan2.1-t2v-1.3b --gpu rtx3060 --lora_rank 32 {IMAGES} {STEP}", FITS_SOMEHOW,
    ),
    Question(
        "A LoRA of HunyuanVideo with 16 GB, 512-pixel images?", "tdrussell/diffusion-pipe#174",
        "no: out of memory", "hunyuanvideo",
        f"--dry_run_model hunyuanvideo-t2v --gpu rtx5080 --lora_rank 32 {IMAGES} {STEP}", NOT,
    ),
    Question(
        "HunyuanVideo on an RTX 4090 with an 8 s clip of 416 x 736?", "tdrussell/diffusion-pipe#82",
        "no; 65 frames of 512 x 512 are already too many there", "hunyuanvideo",
        f"--dry_run_model hunyuanvideo-t2v --gpu rtx4090 --lora_rank 32 --dry_run_data 1x8s@24fps:416x736 --enable_bucket "
        f"--video_sample_n_frames 189 --video_sample_stride 1 {STEP}", NOT,
    ),
    Question(
        "HunyuanVideo on an RTX 3090 with an 81-frame clip?", "kohya-ss/musubi-tuner#317",
        "no: images train, one clip of 81 frames runs out of memory", "hunyuanvideo",
        f"--dry_run_model hunyuanvideo-t2v --gpu rtx3090 --lora_rank 32 {CLIPS} {STEP}", NOT,
    ),
    Question(
        "A 14B I2V LoRA at 720p x 81 frames on 96 GB?", "kohya-ss/musubi-tuner#723",
        "no: out of memory on an RTX PRO 6000", "wan2.1",
        f"{IMAGE_MODEL} --gpu_memory 95 --lora_rank 32 --dry_run_data 20x5.1s@16fps:1280x720 --video_sample_n_frames 81 "
        f"--video_sample_fps 16 --enable_bucket --video_sample_size 960 --token_sample_size 960 --image_sample_size 960 "
        f"{STEP}", NOT,
    ),
    Question(
        "Can the I2V 14B model be fine-tuned on 24 or 32 GB?", "huggingface/finetrainers#399",
        "out of memory on both", "wan2.1", f"{IMAGE_MODEL} --gpu rtx5090 --lora_rank 32 {AT_480P} {STEP}", NOT,
    ),
    Question(
        "A 14B LoRA of rank 4 on eight RTX 4090 with ZeRO-3?", "modelscope/DiffSynth-Studio#581",
        "no: out of memory", "wan2.1", f"{LARGE} --gpu rtx4090 --lora_rank 4 {ON_EIGHT} zero3 {AT_480P} {STEP}", NOT,
    ),
    Question(
        "Full fine-tuning of I2V 14B on eight RTX 4090?", "modelscope/DiffSynth-Studio#751",
        "no, at least eight A100 are needed", "wan2.1",
        f"{IMAGE_MODEL} --gpu rtx4090 {ON_EIGHT} zero3 {AT_480P} {STEP}", NOT,
    ),
    Question(
        "Full fine-tuning of 14B on one A100 with 80 GB?", "modelscope/DiffSynth-Studio#1425",
        "no, eight are needed", "wan2.1", f"{LARGE} --gpu a100-80 {AT_480P} {STEP}", NOT,
    ),
    Question(
        "And on eight A100?", "modelscope/DiffSynth-Studio#1425", "yes", "wan2.1",
        f"{LARGE} --gpu a100-80 {ON_EIGHT} zero3 {AT_480P} {STEP}", FITS,
    ),
    Question(
        "Eight A100, without ZeRO-3 and without gradient checkpointing?", "modelscope/DiffSynth-Studio#812",
        "no: out of memory; the script did not switch checkpointing on", "wan2.1",
        f"{LARGE} --gpu a100-80 {ON_EIGHT} zero2 {AT_480P} {OPEN_STEP}", NOT,
    ),
    Question(
        "Full fine-tuning at 81 x 480 x 832 on eight A800 with ZeRO-3, bf16, low_vram, batch 1?",
        "aigc-apps/VideoX-Fun#148", "out of memory with the settings that are listed; gradient checkpointing is not",
        "wan2.1", f"{LARGE} --gpu a800 {ON_EIGHT} zero3 {AT_480P} {OPEN_STEP}", rf"{NOT}[\s\S]*--gradient_checkpointing",
    ),
    Question(
        "14B on eight H200 that each have the whole model?", "hao-ai-lab/FastVideo#612",
        "no: out of memory at 512 x 512 x 81", "wan2.1", f"{LARGE} --gpu h200 {ON_EIGHT} ddp {CLIPS} {STEP}", NOT,
    ),
    Question(
        "Full fine-tuning of 14B on 80 GB with bfloat16 AdamW?", "tdrussell/diffusion-pipe#339",
        "no: weights, gradients and moments are 140 GB at 10 bytes per parameter", "wan2.1",
        f"{LARGE} --gpu h100 --optimizer adamw_bf16 {AT_480P} {STEP}", NOT, gib=(130, 250),
    ),
    Question(
        "I2V 14B with ZeRO-3 offload on one H100 with 96 GB, 81 frames of 512 x 768?", "aigc-apps/VideoX-Fun#205",
        "yes (on four GPUs the processes were killed: not enough host memory)", "wan2.1",
        f"{IMAGE_MODEL} --gpu_memory 95 --dry_run_backend zero3 {CLIPS} {STEP}", FITS, deepspeed=OFFLOAD,
    ),
    Question(
        "Does a 1.3B LoRA on 80 GB need gradient checkpointing?", "aigc-apps/VideoX-Fun#309", "yes, always", "wan2.1",
        f"--dry_run_model wan2.1-t2v-1.3b --gpu a100-80 --lora_rank 64 {AT_480P} {OPEN_STEP}",
        rf"{NOT}[\s\S]*--gradient_checkpointing",
    ),
    Question(
        "Is one 80 GB GPU enough for a LoRA of I2V 14B?", "modelscope/DiffSynth-Studio#1056",
        "yes, says the documentation", "wan2.1", f"{IMAGE_MODEL} --gpu a100-80 --lora_rank 32 {AT_480P} {STEP}", FITS,
    ),
    Question(
        "What uses 48 GB when 38 of 40 blocks are swapped, at 720 x 720 x 93?", "tdrussell/diffusion-pipe#199",
        "almost out of memory on 48 GB, and out of memory on 32 GB: activations", "wan2.1",
        f"{LARGE} --gpu a6000 --lora_rank 32 --dry_run_backend zero3 --dry_run_data 200x5.9s@16fps:720x720 "
        "--video_sample_n_frames 93 --video_sample_fps 16 --enable_bucket --video_sample_size 720 --token_sample_size 720 "
        f"--image_sample_size 720 --latent_cache {{folder}}/cache {STEP}", "activations", gib=(38, 48), deepspeed=OFFLOAD,
    ),
    Question(
        "Two days with \"No images were discovered\": image_1.jpg next to image_1.txt?", "bghira/SimpleTuner#657",
        "the folder is as it should be", "wan2.1", f"{SMALL_MODEL} --train_data_dir {{folder}}", "2 rows, 2 usable",
        prepare=_captioned_image,
    ),
    Question(
        "An image in the video column of metadata.csv?", "modelscope/DiffSynth-Studio#610", "it should train", "wan2.1",
        f"{SMALL_MODEL} --train_data_meta {{folder}}/metadata.csv", r"1 row, 1 usable[\s\S]*1 image,",
        prepare=_image_as_video,
    ),
    Question(
        "A folder of .MP4 files only?", "tdrussell/diffusion-pipe#373", "the suffix in capitals was not found", "wan2.1",
        f"{SMALL_MODEL} --train_data_dir {{folder}}", r"2 rows, 2 usable[\s\S]*2 videos", prepare=_upper_case_videos,
    ),
    Question(
        "A musubi-tuner dataset.toml?", "kohya-ss/musubi-tuner#50", "four clips with captions", "wan2.1",
        f"{SMALL_MODEL} --dataset_config {{folder}}/dataset.toml", r"4 rows, 4 usable[\s\S]*4 videos",
        prepare=_musubi_file,
    ),
    Question(
        "The metadata.csv of the published command does not exist?", "FoundationAgents/VR-Bench#6",
        "it was missing in the data set", "wan2.1", f"{SMALL_MODEL} --train_data_meta {{folder}}/metadata.csv",
        r"error: .*metadata\.csv.*Fix: ",
    ),
    Question(
        "Should 24 fps clips be converted before training?", "kohya-ss/musubi-tuner#543",
        "Wan was trained at 16 fps; the trainer samples the frames", "wan2.1",
        f"{SMALL_MODEL} --dry_run_data 20x5s@24fps:832x480 --video_sample_fps 16 --video_sample_n_frames 81 {STEP}",
        "train at 16 fps",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a dry run says to a question.

    Attributes:
        right: it says what the thread says.
        words: its verdict, or the line that answers.
        command: the command, as typed.
        output: everything that it printed.
    """

    right: bool
    words: str
    command: str
    output: str


def ask(question: Question, folder: Path) -> Answer:
    """Run the dry run of a question; folder: for its files."""
    files, out = folder / "files", folder / "out"
    files.mkdir(parents=True)
    question.prepare(files)
    words = question.words.format(folder=files).split()
    script = tiny.load_script(runs.TRAIN_SCRIPTS[question.family])
    with proposed.deepspeed_file(question.deepspeed):
        outcome = runs.train([*words, "--dry_run", "--seed", "42", "--output_dir", str(out)], script)
    output = outcome.stdout + outcome.stderr
    right = re.search(question.says, output) is not None
    if question.gib:
        total = json.loads((out / "plan_report.json").read_text(encoding="utf-8"))["memory"]["total"] / GIB
        right = right and question.gib[0] <= total <= question.gib[1]
    started = (
        f"accelerate launch --use_deepspeed --deepspeed_config_file {OFFLOAD} " if question.deepspeed else "python "
    )
    command = f"{started}scripts/{question.family}/train.py --dry_run {question.words.replace('{folder}', 'data')}"
    return Answer(right, _verdict(output, question.says), command, output)


def _verdict(output: str, says: str) -> str:
    """Return the line of the total memory with the first proposal, or for other questions the line that answers."""
    lines = output.splitlines()
    total = next((line for line in lines if line.strip().startswith("total ")), None)
    if total and (FITS in says or NOT in says or says == "activations"):
        fits = [flags for fits, flags, _ in proposed.printed_proposals(output) if fits][:1]
        advice = "; to make it fit: " + ", ".join(f"`{flag}`" for flag in fits[0]) if fits else ""
        advice = advice or ("; nothing that was tried fits" if NOT in total else "")
        return " ".join(total.split()).removeprefix("total ") + advice
    found = re.search(rf".*(?:{says.split('[')[0]}).*", output)
    return found[0].strip() if found else lines[-1] if lines else ""


HEAD = """# Questions from threads, answered by the dry run

Written by `python benchmarks/questions.py --output benchmarks/questions.md`. The threads are about other trainers, so that their facts
bound the answers and do not equal them. Right: the dry run says what the thread found out.

| | question | thread | what the thread says | the dry run says | |
|---|---|---|---|---|---|
"""


def page(rows: list[tuple[int, Question, Answer]]) -> str:
    """Return the page: a table and the commands."""
    table = [
        f"| {number} | {q.text} | [{q.thread}]({SITE}/{q.thread.replace('#', '/issues/')}) | {q.fact} | {a.words} | "
        f"{'right' if a.right else 'wrong'} |"
        for number, q, a in rows
    ]
    right = sum(answer.right for _, _, answer in rows)
    commands = [f"{number}. `{answer.command}`" for number, _, answer in rows]
    return (
        f"{HEAD}{chr(10).join(table)}\n\nRight: {right} of {len(rows)}.\n\n## Commands\n\n{chr(10).join(commands)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=int, nargs="+", help="numbers of questions, from 1; the whole output is printed"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="videox-questions-") as place:
        for number, question in enumerate(QUESTIONS, 1):
            if args.only and number not in args.only:
                continue
            folder = Path(place) / str(number)
            answer = ask(question, folder)
            answer = replace(answer, words=answer.words.replace(f"{folder}/files/", ""))
            rows.append((number, question, answer))
            print(number, "right" if answer.right else "WRONG", question.text, answer.words, sep="\t", flush=True)
            if args.only:
                print(answer.output)
    if args.output:
        args.output.write_text(page(rows), encoding="utf-8")
    return int(not all(answer.right for _, _, answer in rows))


if __name__ == "__main__":
    sys.exit(main())
