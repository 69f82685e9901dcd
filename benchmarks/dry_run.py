"""Memory, disk and duration of the published commands, estimated by dry runs.

    python benchmarks/dry_run.py > benchmarks/dry_run.md

Each row is a process of its own: scripts/<family>/train.py --dry_run over 100,000 rows of metadata with all columns
and a model folder that contains only the configurations.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from proposed import printed_proposals

from videox.errors import DOES_NOT_FIT
from videox.estimate.memory import SAFE_SHARE

ROOT = Path(__file__).resolve().parent.parent
ROWS, LIMIT, PROCESSES = 100_000, 80, 8
GIB = 2**30
CONFIGS = json.loads((ROOT / "tests/data/transformers.json").read_text(encoding="utf-8"))
# Sizes of the frozen components as in their published config.json.
UMT5 = {
    "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": 4096, "d_ff": 10240, "d_kv": 64,
    "num_heads": 64, "num_layers": 24, "num_decoder_layers": 24, "vocab_size": 256384, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaModel"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128320,
}  # fmt: skip
CLIP = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip


class Case(NamedTuple):
    """One dry run: the model, the backend, the token sample size."""

    model: str
    backend: str
    token_size: int

    @property
    def family(self) -> str:
        """The folder of the training script."""
        return "hunyuanvideo" if self.model.startswith("Hunyuan") else "wan2.1"


CASES = [
    *(
        Case(model, backend, size)
        for model, sizes in (("Wan2.1-T2V-1.3B", (512, 960)), ("Wan2.1-T2V-14B", (512, 640, 960)))
        for backend in ("ddp", "zero2", "zero3")
        for size in sizes
    ),
    Case("HunyuanVideo", "fsdp1", 640),
]


class SingleGpu(NamedTuple):
    """One dry run on a single GPU: model, token sample size, GiB of the GPU, flags added to the published ones."""

    model: str
    token_size: int
    limit: int
    flags: tuple[str, ...] = ()


LORA, ATTENTION = ("--lora_rank=32",), ("--trainable_modules=attn1", "--optimizer=adamw_offload")
SINGLE = [
    SingleGpu("Wan2.1-T2V-1.3B", 512, 24, LORA),
    SingleGpu("Wan2.1-T2V-1.3B", 640, 24, LORA),
    SingleGpu("Wan2.1-T2V-1.3B", 960, 24, LORA),
    SingleGpu("Wan2.1-T2V-1.3B", 512, 24, ("--optimizer=adamw8bit_bf16",)),
    SingleGpu("Wan2.1-T2V-1.3B", 512, 24, ("--optimizer=adamw_offload",)),
    SingleGpu("Wan2.1-T2V-1.3B", 512, 40),
    SingleGpu("Wan2.1-T2V-1.3B", 640, 40),
    SingleGpu("Wan2.1-T2V-1.3B", 960, 80),
    SingleGpu("Wan2.1-T2V-14B", 512, 48, LORA),
    SingleGpu("Wan2.1-T2V-14B", 512, 80, LORA),
    SingleGpu("Wan2.1-T2V-14B", 640, 80, LORA),
    SingleGpu("Wan2.1-T2V-14B", 960, 80, LORA),
    SingleGpu("Wan2.1-T2V-14B", 512, 141, ATTENTION),
    SingleGpu("Wan2.1-T2V-14B", 640, 141, ATTENTION),
    SingleGpu("HunyuanVideo", 640, 48, LORA),
    SingleGpu("HunyuanVideo", 640, 80, LORA),
]


def write_model(folder: Path, name: str) -> Path:
    """Write the configurations of a published model, without weights, and return the folder."""
    hunyuan = name.startswith("Hunyuan")
    parts: dict[str, tuple[str, str, dict[str, Any]]] = {
        "transformer": ("diffusers", CONFIGS[name]["_class_name"], CONFIGS[name]),
        "vae": ("diffusers", "AutoencoderKLHunyuanVideo" if hunyuan else "AutoencoderKLWan", {}),
        "text_encoder": ("transformers", "LlamaModel", LLAMA)
        if hunyuan
        else ("transformers", "UMT5EncoderModel", UMT5),
    }
    if hunyuan:
        parts["text_encoder_2"] = ("transformers", "CLIPTextModel", CLIP)
    for part, name in (("scheduler", "scheduler"), ("tokenizer", "tokenizer"), ("tokenizer_2", "tokenizer")):
        (folder / part).mkdir(parents=True)
        (folder / part / f"{name}_config.json").write_text('{"shift": 7.0}', encoding="utf-8")
    index: dict[str, Any] = {"_class_name": "HunyuanVideoPipeline" if hunyuan else "WanPipeline"}
    for part, (library, class_name, config) in parts.items():
        (folder / part).mkdir(parents=True)
        index[part] = [library, class_name]
        (folder / part / "config.json").write_text(json.dumps({"_class_name": class_name, **config}), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_metadata(path: Path) -> Path:
    """Write typical rows: eight aspect ratios, 480 to 2160 lines, 2 to 20 seconds, three in ten of them images."""
    generator = np.random.default_rng(0)
    ratios = np.array([16 / 9, 16 / 9, 16 / 9, 9 / 16, 4 / 3, 1.0, 21 / 9, 2.0])[generator.integers(0, 8, ROWS)]
    lines = np.array([480, 720, 720, 1080, 1080, 2160])[generator.integers(0, 6, ROWS)]
    rates = np.array([24.0, 25.0, 30.0, 60.0])[generator.integers(0, 4, ROWS)]
    seconds = np.clip(np.exp(generator.normal(np.log(5.5), 0.6, ROWS)), 2, 20)
    image = generator.random(ROWS) < 0.3
    with path.open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            height = int(lines[row] if ratios[row] >= 1 else lines[row] / ratios[row]) // 2 * 2
            width = int(height * ratios[row]) // 2 * 2
            record: dict[str, Any] = {"text": "a clip", "width": width, "height": height}
            if image[row]:
                record |= {"file_path": f"{row}.jpg", "type": "image"}
            else:
                frames = int(seconds[row] * rates[row])
                record |= {"file_path": f"{row}.mp4", "type": "video", "num_frames": frames, "fps": rates[row]}
            file.write(json.dumps(record) + "\n")
    return path


def command(case: Case, model: Path, metadata: Path, output: Path) -> list[str]:
    """Return the published command of a case as a dry run for 8 processes."""
    hunyuan = case.family == "hunyuanvideo"
    sizes: Mapping[str, object] = {
        "image_sample_size": 640 if hunyuan else 1024,
        "video_sample_size": 640 if hunyuan else 256,
        "token_sample_size": case.token_size,
        "video_sample_stride": 2 if hunyuan else 3,
        "video_sample_n_frames": 81,
    }
    words = [f"--{name}={value}" for name, value in sizes.items()]
    return [
        sys.executable, str(ROOT / "scripts" / case.family / "train.py"), "--dry_run",
        f"--dry_run_processes={PROCESSES}", f"--dry_run_backend={case.backend}", f"--gpu_memory={LIMIT}",
        f"--pretrained_model_name_or_path={model}", f"--train_data_meta={metadata}", f"--output_dir={output}", *words,
        "--train_batch_size=1", "--video_repeat=1", "--gradient_accumulation_steps=1", "--dataloader_num_workers=8",
        "--num_train_epochs=100", "--checkpointing_steps=50", "--seed=42", "--gradient_checkpointing",
        "--mixed_precision=bf16", "--vae_mini_batch=1", "--random_hw_adapt", "--training_with_video_token_length",
        "--enable_bucket", "--uniform_sampling", "--low_vram",
    ]  # fmt: skip


class Result(NamedTuple):
    """A dry run: wall seconds, CPU seconds, peak bytes, plan_report.json and standard output."""

    seconds: float
    processor: float
    peak: float
    report: dict[str, Any]
    output: str


def measure(words: list[str], output: Path) -> Result:
    """Run one command in a child process and measure it; raise SystemExit with its errors if it fails."""
    probe = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "sys.stderr.write(done.stderr if done.returncode else ''); sys.stdout.write(done.stdout); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "sys.stdout.write('\\n%d %f' % (used.ru_maxrss, used.ru_utime + used.ru_stime)); sys.exit(done.returncode)"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", probe, *words], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    seconds = time.monotonic() - begun
    if done.returncode not in (0, DOES_NOT_FIT):
        raise SystemExit(done.stderr)
    printed, used = done.stdout.rsplit("\n", 1)
    peak, processor = used.split()
    report = json.loads((output / "plan_report.json").read_text(encoding="utf-8"))
    return Result(seconds, float(processor), int(peak) * 1024, report, printed)


def verdict(printed: str) -> str:
    """Return the verdict without its number, and the proposals that fit where this setting does not."""
    total = next(line for line in printed.splitlines() if line.strip().startswith("total "))
    words = [total.split(": ", 1)[1]]
    for fits, flags, gib in printed_proposals(printed):
        changes = ", ".join(f"`{flag}`" for flag in flags)
        words.append(f"{changes}{f': {gib:.1f} GiB' if gib else ''}" if fits else "nothing that was tried fits")
    return "; ".join(words)


def main() -> None:
    """Print the page."""
    words = [f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    sys.stdout.write(f"{INTRODUCTION}Machine: {words[0]}. {ROWS:,} rows, 8 processes, {LIMIT} GiB per GPU. Only the ")
    sys.stdout.write("config.json files of the models are on the disk. Columns `weights` to `total`: GiB per GPU.\n\n")
    sys.stdout.write(
        "| model | backend | token size | weights | fp32 parameters | gradients | optimizer state | communication | "
    )
    sys.stdout.write(
        "activations | total | verdict | checkpoint GB | dry run s | CPU s | peak GB |\n|" + "---|" * 15 + "\n"
    )
    totals: dict[Case, float] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        metadata = write_metadata(root / "metadata.jsonl")
        models = {name: write_model(root / name, name) for name in dict.fromkeys(case.model for case in CASES)}
        for case in CASES:
            output = root / "-".join(map(str, case))
            found = measure(command(case, models[case.model], metadata, output), output)
            memory = found.report["memory"]
            totals[case] = memory["total"] / GIB
            names = ("weights", "masters", "gradients", "optimizer", "communication", "activations", "total")
            sizes = " | ".join(f"{memory[name] / GIB:.1f}" for name in names)
            sys.stdout.write(f"| {' | '.join(map(str, case))} | {sizes} | {verdict(found.output)} | ")
            sys.stdout.write(
                f"{memory['checkpoint'] / 1e9:.0f} | {found.seconds:.1f} | {found.processor:.1f} | {found.peak / 1e9:.2f} |\n"
            )
            sys.stdout.flush()
        sys.stdout.write("".join(f"\n- {line}" for line in sentences(totals)) + "\n" + ABOUT + SINGLE_HEAD)
        for number, case in enumerate(SINGLE):
            sys.stdout.write(single_row(case, models[case.model], metadata, root / f"single-{number}"))
            sys.stdout.flush()


SINGLE_HEAD = """
## One GPU

The same rows and flags with one process (`--dry_run_processes=1`), changed as the second column says.

| model | flags added | token size | GPU, GiB | total, GiB | verdict |
|---|---|---|---|---|---|
"""


def single_row(case: SingleGpu, model: Path, metadata: Path, output: Path) -> str:
    """Run the dry run of a single GPU and return its row of the table."""
    words = command(Case(case.model, "single", case.token_size), model, metadata, output)
    # a flag given twice has its last value
    found = measure([*words, "--dry_run_processes=1", f"--gpu_memory={case.limit}", *case.flags], output)
    flags, total = " ".join(f"`{flag}`" for flag in case.flags) or "-", found.report["memory"]["total"] / GIB
    cells = (case.model, flags, case.token_size, case.limit, f"{total:.1f}", verdict(found.output))
    return f"| {' | '.join(map(str, cells))} |\n"


INTRODUCTION = """\
# Dry runs of the published commands

Estimates, not measurements on GPUs; written by `python benchmarks/dry_run.py > benchmarks/dry_run.md`.

"""
ABOUT = """
- Token size 512 is up to 21,504 tokens, 640 is 480p (81 frames of 480 x 832: 32,760 tokens), 960 is 720p (81 frames of
  720 x 1248: 73,710 tokens).
- Activations, with every block recomputed (`--gradient_checkpointing`), are the sum of three parts: tensors that autograd
  saves (the input of each block, and those outside the blocks), everything inside the one block that is being recomputed,
  and short-lived tensors. For 14B at token size 960 these are 28 + 4, 28 and 1 GiB. Most of the 28 GiB inside the block
  are float32, because norms, scales and gates compute in float32.
- tests/estimate/test_flops.py checks that the sum equals the memory of a traced pass of the real layers at 720p within 2 %.
- `total` includes 5 % for memory fragmentation and 1.4 GiB for the CUDA context.
"""


def fitting(total: float) -> str:
    """Return whether this many GiB fit."""
    return "no" if total > LIMIT else "too close to be sure" if total > SAFE_SHARE * LIMIT else "fits"


def sentences(totals: Mapping[Case, float]) -> list[str]:
    """Return the published advice with the verdicts of its cases; totals: GiB of each case."""

    def judged(words: str, *cases: Case) -> str:
        found = [f"token size {c.token_size}: {totals[c]:.1f} GiB, {fitting(totals[c])}" for c in cases]
        return f"{words}: {'; '.join(found)}."

    small, large = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
    return [
        judged("DDP for 1.3B", *(Case(small, "ddp", size) for size in (512, 960))),
        judged("ZeRO-2 for 14B at low resolutions", *(Case(large, "zero2", size) for size in (512, 640))),
        judged("ZeRO-3 for 14B at high resolutions", *(Case(large, "zero3", size) for size in (512, 640, 960))),
    ]


if __name__ == "__main__":
    main()
