"""Makes clips from a run, a checkpoint, an export or a LoRA, with the model and the settings of its training.

    python scripts/sample.py outputs/wan --prompt "a red fox runs through snow"
    python scripts/sample.py outputs/wan/checkpoint-500 --prompt prompts.txt --output clips_500
    python scripts/sample.py outputs/lora --prompt "a red fox --w 832 --h 480 --f 81 --d 1" --lora_scale 0.8
    python scripts/sample.py lora.safetensors --base models/Diffusion_Transformer/Wan2.1-T2V-14B --prompt "a red fox"

Of a run its export is sampled, or its newest checkpoint while it has none; of a folder with both experts, both. Base
model, flow shift, size, length, frame rate, steps, guidance and seed are those of the run's own clips, or of the
model; flags and options of a prompt replace them (docs/samples.md). Convert sharded checkpoints with zero_to_bf16.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from videox.errors import FLAGS, MODEL, UserError
from videox.shapes import USUAL, Bucket
from videox.training.argument_parser import Parser, number, parse_or_exit
from videox.training.validation_flags import SAMPLE_STEPS, check_clip_shape, with_pictures
from videox.weights.expert_names import EXPERTS

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("bf16", "fp32")


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="run folder, checkpoint-N, transformer folder or file, LoRA, or model"
    )
    prompts = "prompts, or files of prompts, with options as for --validation_prompts; by default those of the run"
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT|FILE", help=prompts)
    images = "image-to-video: pictures that the clips start from, one for each prompt without --i"
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH", help=images)
    output = "folder for the clips (default: clips; if it exists, clips-2, ...)"
    parser.add_argument("--output", type=Path, default=Path("clips"), help=output)
    parser.add_argument("--base", help="base model: folder or Hub id (default: that of the run)")
    parser.add_argument("--ema", action="store_true", help="sample the EMA of the weights (--use_ema)")
    scale = "factor of a LoRA's effect, 1 as trained, 0 without it"
    parser.add_argument("--lora_scale", type=number(float, -10, 10), default=1.0, help=scale)
    size = {"type": number(int, 16, 8192), "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--resolution", **size, help="size of the clips, multiples of 16 (TI2V-5B: of 32)")
    parser.add_argument("--frames", type=number(int, 1, 10_000), help="frames of a clip, 4k+1")
    parser.add_argument("--fps", type=number(float, 0.1, 1000), help="frames per second")
    parser.add_argument("--steps", type=number(int, 1, 1000), help="denoising steps")
    parser.add_argument("--guidance", type=number(float, 0, 100), help="guidance scale")
    parser.add_argument("--negative_prompt", metavar="TEXT", help="negative prompt, for classifier-free guidance")
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), help="seed of the first clip; the next has the next one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of computation (default: that of the run, else bf16)")
    expert = "Wan2.2: the expert that weights without a run belong to (default: as their header says)"
    parser.add_argument("--expert", choices=tuple(EXPERTS), help=expert)
    low = "keep the encoders in host memory between their uses"
    parser.add_argument("--low_vram", action="store_true", help=low)
    flags = parser.parse(argv)
    check_clip_shape(flags.resolution, flags.frames, "--resolution", "--frames", USUAL)
    return flags


if __name__ == "__main__":
    parse_or_exit(parse_flags)  # answers --help and wrong flags before the slow imports below; main parses again

import diffusers
import torch
from accelerate import Accelerator
from sample_source import Source, find_source

from videox.device import memory_phase
from videox.distributed.accelerator import compute_dtype, make_accelerator
from videox.encoders.encode import LazyEncoders
from videox.engine.base import compute_in_bf16
from videox.files import unique_path
from videox.lora.merge import check_base, lora_updates
from videox.lora.reader import lora_names, read_lora
from videox.models.component import Component, load_checked
from videox.models.compression import hunyuan_ratios, wan_ratios
from videox.models.config_files import SHIPPED_YAML, read_json
from videox.models.hub import local_folder
from videox.models.norm_dtype import keep_norm_dtype
from videox.run.lifecycle import run_script
from videox.tracking.jsonl import append_line
from videox.training.flow_shift import choose_shift
from videox.training.memory_advice import MemoryAdvice
from videox.training.memory_check import explain_oom
from videox.training.prompts import read_prompts
from videox.training.sample_requests import ClipDefaults, build_clips
from videox.training.sampling import ClipWriter, FinishedClip, SampleClip, SampledClips, sample_clips
from videox.weights.header import read_metadata

# Flags of a run that decide how its model is loaded and sampled.
KEPT = (
    "train_mode", "config_path", "transformer_path", "vae_path", "vae_dtype", "vae_tiling", "tokenizer_max_length", "guidance_scale",
    "num_hidden_layers_to_skip", "image_embed_interleave", "expert", "other_transformer_path",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What sampling without a run needs to know of a family.

    Attributes:
        script: its train.py.
        transformer: class of diffusers.
        pipeline: class of diffusers, which reads LoRA files.
        shape: of a clip.
        fps: of a clip.
        embedded_guidance: as in ClipDefaults.
    """

    script: str
    transformer: str
    pipeline: str
    shape: Bucket
    fps: float
    embedded_guidance: bool


TI2V = "TI2V-5B"  # of Wan2.2: one transformer, for text and for pictures
FAMILIES = {
    "Wan": Family(
        "wan2.1/train.py", "WanTransformer3DModel", "WanPipeline", Bucket(81, 480, 832), 16.0, embedded_guidance=False
    ),
    "Wan2.2": Family(
        "wan2.2/train.py", "WanTransformer3DModel", "WanPipeline", Bucket(81, 480, 832), 16.0, embedded_guidance=False
    ),
    TI2V: Family(
        "wan2.2/train.py", "WanTransformer3DModel", "WanPipeline", Bucket(121, 704, 1280), 24.0, embedded_guidance=False
    ),
    "HunyuanVideo": Family(
        "hunyuanvideo/train.py", "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline", Bucket(61, 544, 960), 24.0,
        embedded_guidance=True,
    ),
}  # fmt: skip


def family_of(base: Path) -> Family:
    """Return the family of a model folder; without model_index.json it is Wan's original layout."""
    index = base / "model_index.json"
    content = read_json(index) if index.is_file() else {"_class_name": "Wan"}
    name = str(content.get("_class_name"))
    if name.startswith("Wan") and (content.get("expand_timesteps") or (base / "Wan2.2_VAE.pth").is_file()):
        return FAMILIES[TI2V]
    if name.startswith("Wan") and (content.get("boundary_ratio") or (base / f"{next(iter(EXPERTS))}_model").is_dir()):
        return FAMILIES["Wan2.2"]
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix):
            return family
    raise UserError(str(index), f"names {name}", f"pass a model of {' or '.join(FAMILIES)}", MODEL)


def load_trainer(family: Family) -> ModuleType:
    """Return the family's train.py as a module; `wan2.1` is not an importable name."""
    path, name = ROOT / "scripts" / family.script, f"trainer_of_{Path(family.script).parent.name.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


def no_check(flags: argparse.Namespace) -> None:
    """Accept the flags of a train.py without data and output folder, which sampling does not need."""
    del flags


def trainer_flags(
    trainer: ModuleType, family: Family, source: Source, base: Path, flags: argparse.Namespace
) -> argparse.Namespace:
    """Return the flags of the family's train.py, as the run had them, or as its model needs them without a run."""
    args = trainer.parse_args(["--pretrained_model_name_or_path", str(base)], check=no_check)
    for name in KEPT:
        if name in source.asked and hasattr(args, name):
            setattr(args, name, source.asked[name])
    if not source.asked and (base / "model_index.json").is_file():
        images = "ImageToVideo" in str(read_json(base / "model_index.json").get("_class_name"))
        args.train_mode = "i2v" if images else "normal"
    if family is FAMILIES[TI2V]:
        args.train_mode = "ti2v"
    if hasattr(args, "clip_image"):  # older versions cropped
        args.clip_image = source.resolved.get("clip_image") or ("crop" if source.asked else None)
    if source.weights is not None:
        args.transformer_path = str(source.weights)
    if source.other is not None:
        args.other_transformer_path = str(source.other)
    if hasattr(args, "expert") and family is not FAMILIES[TI2V] and not (args.expert and source.asked):
        args.expert = expert_of(source, flags)
    precision = source.asked.get("mixed_precision") or "bf16"
    args.mixed_precision = {"bf16": "bf16", "fp32": "no", None: precision}[flags.dtype]
    args.low_vram = flags.low_vram or bool(source.asked.get("low_vram"))
    return args


def expert_of(source: Source, flags: argparse.Namespace) -> str:
    """Return which expert of Wan2.2 weights without a run belong to; of a whole model it makes no difference.

    Raises:
        UserError: neither --expert nor the header of the weights names it.
    """
    weights = source.lora or source.weights
    expert = flags.expert or (read_metadata(weights).get("expert") if weights else next(iter(EXPERTS)))
    if expert not in EXPERTS:
        what = f"{weights} may belong to either expert of Wan2.2"
        raise UserError("--expert", what, f"pass --expert {' or '.join(EXPERTS)}", FLAGS)
    return expert


def first(*values: Any) -> Any:  # noqa: ANN401 - values of any flag
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)


def clip_defaults(source: Source, family: Family, guidance: float, flags: argparse.Namespace) -> ClipDefaults:
    """Return what a clip has where its prompt says nothing: of a flag, else of the run, else of the family.

    guidance: the scale where neither a flag nor the run has one.
    """
    asked, sample = source.asked, source.resolved.get("sample") or {}

    shape = Bucket(*(sample.get("shape") or family.shape))
    height, width = first(flags.resolution, asked.get("sample_resolution"), (shape.height, shape.width))
    frames = first(flags.frames, asked.get("sample_frames"), shape.frames)
    run_seed = (source.resolved.get("seed") or 0) % 2**32
    return ClipDefaults(
        shape=Bucket(frames, height, width),
        fps=first(flags.fps, asked.get("sample_fps"), sample.get("fps"), family.fps),
        steps=first(flags.steps, asked.get("sample_steps"), SAMPLE_STEPS),
        guidance=first(flags.guidance, asked.get("sample_guidance"), guidance),
        negative_prompt=first(flags.negative_prompt, asked.get("sample_negative_prompt"), ""),
        seed=first(flags.seed, asked.get("sample_seed"), run_seed),
        embedded_guidance=family.embedded_guidance,
    )


def requested_clips(source: Source, defaults: ClipDefaults, mode: str, flags: argparse.Namespace) -> list[SampleClip]:
    """Return the clips to make; prints what of the prompts is not used as it was written. Raises UserError."""
    given = list(flags.prompt) or list(source.asked.get("validation_prompts") or [])
    if not given:
        raise UserError("--prompt", "is required: the run has no prompts", "pass a prompt or a file of prompts", FLAGS)
    images = flags.image if flags.prompt or flags.image else source.asked.get("validation_paths") or []
    prompts = with_pictures(read_prompts(given, "--prompt"), images, mode, "--image")
    clips, notes = build_clips(prompts, defaults)
    for note in notes:
        print(note)
    return clips


def load_transformer(component: Component, family: Family, accelerator: Accelerator) -> Any:  # noqa: ANN401 - of diffusers
    """Load the transformer onto the device; with bf16 it computes under autocast, as in training."""
    model = load_checked(getattr(diffusers, family.transformer), component, compute_dtype(accelerator))
    keep_norm_dtype(model, accelerator.device)
    if compute_dtype(accelerator) == torch.bfloat16:
        compute_in_bf16(model, accelerator.device)
    return model.requires_grad_(False)


def apply_lora(model: Any, component: Component, path: Path, family: Family, scale: float) -> None:  # noqa: ANN401
    """Add scale * alpha / rank B A to the weights, each sum in float32 and rounded once. Raises UserError (MODEL)."""
    load = getattr(diffusers, family.pipeline).lora_state_dict
    adapters, factor = read_lora(path, load, where="source")
    base, updates = component.source(), lora_updates(adapters, factor * scale)
    if component.tensors is not None:
        check_base(component.tensors, updates)
    for name, update in updates.items():
        weight = base[name].float() + update.scale * (update.b @ update.a)
        model.get_parameter(name).data.copy_(weight)


def add_dora(pipeline: Any, path: Path | None, scale: float, second: bool = False) -> None:  # noqa: ANN401 - of diffusers
    """Add a DoRA to the pipeline's transformer, or to its second one, by diffusers; None adds nothing."""
    if path is None:
        return
    place = {"load_into_transformer_2": True} if second else {}
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="sampled", **place)
    pipeline.set_adapters(["sampled"], adapter_weights=[scale])


def sample(
    clips: Sequence[SampleClip], open_pipeline: Callable[[], AbstractContextManager[Any]], prepare: Callable[[Any], None],
    folder: Path, step: int,
) -> SampledClips:  # fmt: skip
    """Sample the clips into a folder, with a line for each in clips.jsonl and on stdout.

    Args:
        open_pipeline: a context that yields the pipeline.
        prepare: called with the pipeline before the first clip.
        folder: new.
        step: optimizer steps of the weights, for the names of the files.
    """

    def report(clip: FinishedClip) -> None:
        append_line(folder / "clips.jsonl", {"file": clip.path.name, **clip.clip.facts(), "seconds": clip.seconds})
        shape = clip.clip.shape
        size = f"{shape.width}x{shape.height}, {shape.frames} frames"
        print(f"{clip.path}: {size}, {clip.seconds:.1f} s: {clip.clip.prompt}", flush=True)

    with memory_phase("sampling"), open_pipeline() as pipeline:
        prepare(pipeline)
        return sample_clips(pipeline, clips, ClipWriter(folder, step, on_clip=report))


def shipped_yaml(trainer: ModuleType, args: argparse.Namespace) -> str:
    """Return the yaml whose flow shift a model in the original layout has by default."""
    return str(trainer.SHIPPED_YAMLS[args.train_mode]) if hasattr(trainer, "SHIPPED_YAMLS") else SHIPPED_YAML


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    source = find_source(flags)
    base = local_folder(source.base, "--base")
    family = family_of(base)
    trainer = load_trainer(family)
    args = trainer_flags(trainer, family, source, base, flags)
    guidance = args.guidance_scale if family.embedded_guidance else trainer.SAMPLING_GUIDANCE
    guidance = trainer.single.GUIDANCE if family is FAMILIES[TI2V] else guidance
    components = trainer.check_model(args)
    ratios = (hunyuan_ratios if family.embedded_guidance else wan_ratios)(components)
    check_clip_shape(flags.resolution, flags.frames, "--resolution", "--frames", ratios)
    defaults = replace(clip_defaults(source, family, guidance, flags), text_tokens=args.tokenizer_max_length)
    clips = requested_clips(source, replace(defaults, ratios=ratios), args.train_mode, flags)
    stored = source.resolved.get("shift")
    yaml = None if "scheduler" in components else shipped_yaml(trainer, args)
    shift = stored or choose_shift(args, None, components.get("scheduler"), shipped_yaml=yaml).value
    accelerator, _ = make_accelerator(args.mixed_precision)
    with explain_oom(MemoryAdvice()), memory_phase("loading the model"):
        model = load_transformer(components["transformer"], family, accelerator)
        dora = source.lora if source.lora and any("magnitude" in name for name in lora_names(source.lora)) else None
        if source.lora is not None and dora is None:
            apply_lora(model, components["transformer"], source.lora, family, flags.lora_scale)
        encoders = LazyEncoders(partial(trainer.load_encoders, args, components, shift, accelerator))
        described = SimpleNamespace(
            encoders=encoders, transformer=model.to(accelerator.device), attention=SimpleNamespace()
        )
    print(f"{source.lora or source.weights or base}: step {source.step}, flow shift {shift:g}, {accelerator.device}")
    expert = getattr(args, "expert", None)
    prepare = partial(add_dora, path=dora, scale=flags.lora_scale, second=expert == "low_noise")
    opened: list[Any] = [described] + ([trainer.find_expert(args, components, accelerator)] if expert else [])
    folder = unique_path(flags.output)
    with explain_oom(MemoryAdvice()):
        result = sample(clips, partial(trainer.sampling_pipeline, *opened), prepare, folder, source.step)
    if result.warnings:
        raise UserError(str(folder), "; ".join(result.warnings), "see the line of each clip above", MODEL)
    print(f"clips and contact sheet in {folder.resolve()}")
    return 0


if __name__ == "__main__":
    run_script(main)
