r"""Fine-tunes Wan2.1: text-, image-, first-and-last-frame-to-video and inpainting, the whole model or a LoRA.

One process, one per GPU (DDP), or sharded (DeepSpeed ZeRO, FSDP); the part after the script's name stays the same:

    accelerate launch --mixed_precision="bf16" scripts/wan2.1/train.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.1-T2V-14B \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan --enable_bucket --train_batch_size=1 --mixed_precision="bf16" --gradient_checkpointing

Ctrl-C or SIGTERM saves and stops. The same command with --resume_from_checkpoint=latest continues; its losses are
bit-identical to those of a run that was never stopped, on GPUs with --deterministic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from videox.errors import MODEL, UserError
from videox.estimate.flops import cross_attention_network
from videox.estimate.model_profile import ModelProfile
from videox.families.wan_names import CLASSES, CLIP_IMAGES, LORA_TARGETS, NAMES, PIPELINES, pictures_of
from videox.models.compression import wan_ratios
from videox.models.config_files import SHIPPED_YAML, read_json
from videox.models.configured import Component
from videox.models.published import dry_run_components
from videox.training.args import check_args, is_dry_run, planned_model
from videox.training.argument_parser import number, parse_or_exit
from videox.training.flags import make_parser
from videox.training.flow_shift import FlowShift, choose_shift

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"normal": "text-to-video", "i2v": "image-to-video", "inpaint": "inpainting"}
TASKS["flf2v"] = "first-and-last-frame-to-video"


def parse_args(
    argv: Sequence[str] | None = None, check: Callable[[argparse.Namespace], None] = check_args
) -> argparse.Namespace:
    """Parse the flags and check them against each other."""
    parser = make_parser(__doc__, modes=tuple(TASKS), recipes=ROOT / "config/recipes/wan2.1")
    add = parser.add_argument_group("Wan2.1").add_argument
    content = "yaml with flow shift (scheduler_kwargs.shift) and paths inside a model in original layout; by default"
    shipped = "config/wan2.1/wan_civitai.yaml, whose shift holds for the original layout only"
    add("--config_path", help=f"{content} {shipped}")
    picture = "picture for CLIP: crop its centre as diffusers does, or squash it to a square as Wan's own code does"
    add("--clip_image", choices=CLIP_IMAGES, help=f"{picture} (default: squash for the original layout, else crop)")
    add("--tokenizer_max_length", type=number(int, 1, 512), default=512, help="maximum text tokens of a caption")
    args = parser.parse(argv)
    check(args)
    return args


def check_model(args: argparse.Namespace) -> dict[str, Component]:
    """Find and check the model's components; loads no weights. Raises UserError where they do not fit --train_mode."""
    if published := planned_model(args):
        components = dry_run_components(published, "wan2.1")
        check_mode(args, components["transformer"].config)
        return components
    root, check_weights = local_folder(args.pretrained_model_name_or_path), not is_dry_run(args)
    yaml = args.config_path or SHIPPED_YAML
    if paths := models.original_paths(root, yaml):
        components = models.original_components(paths, yaml, args.transformer_path, args.vae_path)
    else:
        overrides = {"transformer": ("wan", args.transformer_path), "vae": ("wan_vae", args.vae_path)}
        checked = ("text_encoder",) if check_weights else ()
        components = models.diffusers_components(root, PIPELINES, NAMES, overrides, checked)
        check_one_transformer(args, root)
    check_mode(args, components["transformer"].config)
    if components["transformer"].config.get("image_dim"):
        encoder, processor = paths["image_encoder"] if paths else root / "image_encoder", root / "image_processor"
        components["image_encoder"] = models.find_component(encoder, "clip_vision", check_weights=check_weights)
        components["image_processor"] = choose_clip_image(args.clip_image, processor, original=bool(paths))
        if not paths:
            read_component(processor, check_weights=False)
    return components


def check_one_transformer(args: argparse.Namespace, root: Path) -> None:
    """Check that a new run does not train one expert of Wan2.2 on all noise levels, or TI2V-5B. Raises UserError."""
    index = read_json(root / "model_index.json")
    if index.get("expand_timesteps"):
        what, hint = f"{root} is Wan2.2 TI2V-5B", "use scripts/wan2.2/train.py --train_mode ti2v"
        raise UserError("--pretrained_model_name_or_path", what, hint, MODEL)
    if index.get("boundary_ratio") is not None and not args.resume_from_checkpoint:
        what, hint = (
            f"{root} is Wan2.2, with one transformer for high and one for low noise",
            "use scripts/wan2.2/train.py",
        )
        raise UserError("--pretrained_model_name_or_path", what, hint, MODEL)


def check_mode(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Check that the transformer with this configuration is made for --train_mode."""
    channels = config.get("in_channels")
    modes, takes = {16: ["normal"], 36: ["i2v", "inpaint", "flf2v"]}.get(channels, []), f"{channels} channels"
    if pictures_of(config) == 2:
        modes, takes = ["flf2v"], "features of two images"
    if args.train_mode not in modes:
        what = f"the transformer takes {takes}, which no mode here trains"
        if modes:
            what = f"the transformer takes {takes}: it is made for --train_mode {' or '.join(modes)}"
        raise UserError(f"--train_mode {args.train_mode}", what, "use that mode, or weights made for this one", MODEL)
    if config.get("image_dim") and args.tokenizer_max_length != 512:
        what = f"{args.tokenizer_max_length}: a model with an image embedder takes 512 text tokens"
        raise UserError("--tokenizer_max_length", what, "remove the flag")


def wan_profile(args: argparse.Namespace, components: dict[str, Component]) -> ModelProfile:
    """The model's profile from its configurations alone, for the plan and the estimates."""
    config, images = components["transformer"].config, 0
    if "image_encoder" in components:
        clip = components["image_encoder"]
        images = ((clip.count("image_size") // clip.count("patch_size")) ** 2 + 1) * pictures_of(config)
    return ModelProfile(
        task=f"{TASKS[args.train_mode]} (the transformer takes {config['in_channels']} channels)",
        network=partial(cross_attention_network, config, text_tokens=args.tokenizer_max_length, image_tokens=images),
        blocks=LORA_TARGETS,
        components={name: (kind, components[name].config) for name, kind in CLASSES.items() if name in components},
        fps=16.0,
        vae_frames=4,
        ratios=wan_ratios(components),
    )


def describe(
    args: argparse.Namespace, components: dict[str, Component], checkpoint: Path | None = None
) -> tuple[ModelProfile, FlowShift]:
    """The model's profile, and the flow shift of a run that resumes from this checkpoint (None = a new run)."""
    scheduler = components.get("scheduler")
    shift = choose_shift(args, checkpoint, scheduler, named_yaml=args.config_path, shipped_yaml=SHIPPED_YAML)
    return wan_profile(args, components), shift


def plan(args: argparse.Namespace) -> int:
    """Plan the run instead of training; return the exit code."""
    from videox.training import dry_run  # imported here, because --help does not need it

    return dry_run.plan_run(args, lambda: describe(args, check_model(args)))


if __name__ == "__main__":
    parse_or_exit(parse_args, plan, planned_model)  # --help, wrong flags, and plans that need no import below

from dataclasses import replace

import torch
from accelerate import Accelerator
from diffusers import WanPipeline, WanTransformer3DModel

from videox.data.dataset import Batch
from videox.device import to_device
from videox.diffusion.flow_matching import add_noise, batch_noise, loss_weights, motion_losses, velocity_losses
from videox.distributed.accelerator import compute_dtype
from videox.distributed.collectives import accumulate, backward
from videox.distributed.signals import StopRequest
from videox.encoders.encode import LazyEncoders
from videox.families.wan import (
    Wan,
    build_model,
    choose_clip_image,
    encode_batch,
    encoding_specs,
    load_encoders,
    predict_held_out,
    sampling_pipeline,
    transformer_inputs,
)
from videox.models import component as models
from videox.models.folder import read_component
from videox.models.hub import local_folder
from videox.rng import Purpose, hash_key
from videox.run.lifecycle import run_script
from videox.tracking.dump import dump_folder, write_dump
from videox.training import build, launch, loop, memory_check, precompute, startup
from videox.training.context import Context
from videox.training.data import build_data
from videox.training.schedule import build_schedule
from videox.training.step_loss import StepLoss
from videox.training.validator import FamilyValidation, encode_held_out

SAMPLING_GUIDANCE = 5.0  # of the sample clips


def accumulate_gradients(
    args: argparse.Namespace, accelerator: Accelerator, wan: Wan, model: torch.nn.Module, batch: Batch,
    dump_to: Path | None,
) -> torch.Tensor:  # fmt: skip
    """Accumulate the gradients of a micro-batch and return each sample's part of the step's loss, float64 [B].

    x_t = (1 - sigma) x_0 + sigma noise; the model predicts noise - x_0. Every draw is a function of a sample's key.
    """
    device, keys = accelerator.device, batch["keys"]
    latents, given = encode_batch(args, wan, batch, keys if args.vae_sample_mode == "sample" else None)

    sigmas = to_device(build.sigmas_of_batch(args, batch, wan.shift), device)
    noise = to_device(batch_noise([int(hash_key(key, Purpose.NOISE)) for key in keys], latents.shape[1:]), device)
    noisy_latents = add_noise(latents, noise, sigmas)
    target = noise - latents

    inputs = transformer_inputs(noisy_latents, sigmas, given)
    weights = to_device(torch.from_numpy(batch["weights"]), device)  # each planned sample's share of the global batch
    with accumulate(accelerator, model, batch["last"]):
        prediction = model(**inputs)[0]
        losses = velocity_losses(prediction, target, loss_weights(sigmas, args.weighting_scheme))
        if args.motion_sub_loss:
            losses = motion_losses(prediction, target, losses, args.motion_sub_loss_ratio)
        parts = losses.double() * weights
        backward(accelerator, model, parts.sum())
    write_dump(
        dump_to, accelerator.process_index, batch, inputs, latents=latents, noise=noise, sigma=sigmas,
        timestep=inputs["timestep"], weight=weights, target=target, prediction=prediction, loss=losses,
    )  # fmt: skip
    return parts.detach()


def keep_clip_image(args: argparse.Namespace, chosen: Component, ctx: Context) -> Component:
    """How the picture that CLIP sees is made: as chosen, or as the run that is resumed began with; prints it."""
    if ctx.checkpoint is None:
        ctx.print(f"CLIP image  {chosen.config['clip_image']}")
        return chosen
    kept = choose_clip_image(args.clip_image, chosen.path, original=False, checkpoint=ctx.checkpoint)
    ctx.print(f"CLIP image  {kept.config['clip_image']} ({ctx.checkpoint.name}: a resumed run keeps its own)")
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Plan or train; return the exit code (0 finished, 75 stopped and saved)."""
    args = parse_args(argv)
    return plan(args) if is_dry_run(args) else launch.launch(args, train)


def train(args: argparse.Namespace, ctx: Context) -> int:
    """Build schedule, data, model and records, in this order, then loop over optimizer steps; return the exit code."""
    components = check_model(args)
    profile, chosen = describe(args, components, ctx.checkpoint)
    shift = chosen.value
    startup.announce(args, ctx, profile.task, chosen)
    facts: dict[str, object] = {"task": f"wan2.1 {args.train_mode}", "shift": shift}
    if "image_processor" in components:
        components["image_processor"] = keep_clip_image(args, components["image_processor"], ctx)
        facts |= components["image_processor"].config

    # schedule: all samples, steps and random draws of the run follow from it
    schedule = build_schedule(args, ctx, profile)
    memory_check.plan_memory(args, ctx, profile, schedule)
    state, lr_at = schedule.state, build.lr_of_step(args, schedule)
    lora = build.build_lora(args, ctx, schedule, components["transformer"], LORA_TARGETS, WanPipeline)

    # data: outputs of the frozen encoders, from the cache where there is one
    encoders = LazyEncoders(partial(load_encoders, args, components, shift, ctx.accelerator))
    specs = encoding_specs(args, components, encoders, compute_dtype(ctx.accelerator))
    data = build_data(args, ctx, schedule, specs, encoders)
    if args.cache_only:
        return precompute.fill_cache(ctx, data.missing, data.encode, args.dataloader_num_workers)
    # model: build_engine freezes what is not trained, and loads the checkpoint if the run resumes
    transformer = build.load_model(args, ctx, schedule, WanTransformer3DModel, components["transformer"])
    wan = build_model(components, shift, transformer, encoders, data.encode)
    engine = build.build_engine(args, ctx, schedule, transformer, transformer.blocks, components["transformer"], lora)
    wan = replace(wan, transformer=engine.network)  # as validation and sampling call it
    # records, checkpoints, validation
    recorder, guard, checkpoints = build.build_records(args, ctx, schedule, engine, profile, transformer, facts)
    held_out = encode_held_out(data.dataset, schedule, partial(encode_batch, args, wan, keys=None))
    family = FamilyValidation(partial(predict_held_out, wan), partial(sampling_pipeline, wan), SAMPLING_GUIDANCE)
    validate = build.build_validator(args, ctx, schedule, engine, recorder, held_out, family, shift)
    run_batch = partial(accumulate_gradients, args, ctx.accelerator, wan, engine.model, dump_to=None)
    memory_check.try_largest(args, ctx, schedule, engine, data.dataset, run_batch)
    if state.step == 0:
        recorder.first_batch(schedule, data.dataset)
        validate()

    with StopRequest() as stop, data.encode, recorder:
        for step in loop.iterate_steps(schedule, data, recorder.clock):
            engine.set_lr(lr := lr_at(state.step))
            loss = StepLoss(step, ctx.device)
            for batch in step.micro_batches():
                with memory_check.name_batch(batch, profile.ratios):  # encode, add noise, forward, loss, backward
                    dump_to = dump_folder(ctx.output_dir, state.step + 1, args.dump_steps)
                    loss.add(batch, accumulate_gradients(args, ctx.accelerator, wan, engine.model, batch, dump_to))
            report = loop.agree(ctx, step, recorder, guard, stop=bool(stop))
            loss.reduce()
            limit_of_norm = build.clip_limit_at(args, state.step)
            update = loop.clip_and_step(engine, guard, loss.total, empty=step.is_empty(report), limit=limit_of_norm)
            epoch_ended = state.advance(steps_of_epoch=step.plan.n_steps)
            recorder.log(step, report, lr, loss, update)
            done = state.step == schedule.total
            if report.stop and not done:
                return checkpoints.save_and_stop(stop.signal_name)
            if loop.finish_step(args, validate, checkpoints, epoch_ended=epoch_ended, done=done):
                break
    return checkpoints.export_and_finish()


if __name__ == "__main__":
    run_script(main)
