"""Serves who fine-tunes Wan2.1: text-to-video, from a folder of clips and captions to a model that diffusers loads.

One process, or one per GPU (DDP); everything after the script's name is the same for both:

    accelerate launch --mixed_precision="bf16" scripts/wan2.1/train.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.1-T2V-14B \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan --enable_bucket --train_batch_size=1 --mixed_precision="bf16" --gradient_checkpointing

Ctrl-C or SIGTERM saves and stops; the same command with --resume_from_checkpoint=latest goes on, to the bit.
"""

from __future__ import annotations

import videox.training.args as flags  # first of all: videox keeps the optional packages quiet that diffusers imports

# isort: split

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

import videox.training.build as wiring
import videox.training.dry_run as planning
import videox.training.schedule as scheduling
from videox.data.dataset import Batch
from videox.data.plan.plan import held_out_plan
from videox.device import to_device
from videox.diffusion.conditioning import keep_on_host, known_mask, pack_mask
from videox.diffusion.flow_matching import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    batch_noise,
    loss_weights,
    motion_losses,
    velocity_losses,
)
from videox.distributed.accelerator import compute_dtype
from videox.distributed.backends import Backend
from videox.distributed.collectives import accumulate, backward
from videox.distributed.signals import StopRequest
from videox.encoders.encode import Encoder, EncoderInput, EncodingSpec, LazyEncoders, latents_spec
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import encode_moments, sample_latents, to_images
from videox.errors import MODEL, UserError
from videox.estimate.flops import cross_attention_network
from videox.models.component import Component, choose_component, find_component, original_components, original_paths
from videox.models.folder import check_tokenizer, full_config, read_component, read_model_folder, read_shift
from videox.models.hub import local_folder
from videox.models.shared_memory import load_frozen
from videox.models.transformer import load_transformer
from videox.rng import Purpose, hash_key
from videox.run.lifecycle import Run, run_script
from videox.tracking.dump import dump_folder, write_dump
from videox.training.loop import finish_step, iterate_steps
from videox.training.memory_check import names_memory
from videox.training.validation_loss import HeldOut
from videox.training.validator import encode_held_out

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"normal": "text-to-video", "i2v": "image-to-video", "inpaint": "inpainting"}
ADAPTED = {"blocks": ("attn1", "attn2", "ffn")}  # what a LoRA changes, by list of blocks
LATENT_CHANNELS = 16
CLASSES = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
CLASSES["image_encoder"] = CLIPVisionModel
SAMPLING_GUIDANCE = 5.0  # of the sample clips

# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags, each checked by itself and against the others."""
    parser = flags.Parser(description=__doc__)
    flags.add_model_and_data(parser)
    flags.add_shapes(parser)
    flags.add_training(parser, modes=tuple(TASKS))
    flags.add_run(parser)
    planning.add_flags(parser)
    wan = parser.add_argument_group("Wan2.1")
    config = str(ROOT / "config/wan2.1/wan_civitai.yaml")
    wan.add_argument("--config_path", default=config, help="yaml with the flow shift (scheduler_kwargs.shift)")
    wan.add_argument("--tokenizer_max_length", type=flags.number(int, 1, 512), default=512, help="text tokens at most")
    args = parser.parse(argv)
    flags.check(args)
    return args


# -------------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Encoders:
    """The frozen parts, and diffusers' own pipeline over them, for prompts and sample clips."""

    text_encoder: OffloadedModule
    image_encoder: OffloadedModule | None
    vae: OffloadedModule
    pipeline: WanPipeline | diffusers.WanImageToVideoPipeline


@dataclass(frozen=True)
class Components:
    """The model's parts. transformer: float32 masters; encode: what the encoders make of a micro-batch."""

    transformer: WanTransformer3DModel
    encoders: LazyEncoders[Encoders]
    encode: Encoder
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    shift: float


def check_model(args: argparse.Namespace) -> dict[str, Component]:
    """Returns the model's parts after every one has been looked at; loads no weight."""
    root, check_weights = local_folder(args.pretrained_model_name_or_path), not planning.only_plans(args)
    if places := original_paths(root, args.config_path):
        parts = original_components(places, args.config_path, args.transformer_path, args.vae_path)
    else:
        pipelines = ("WanPipeline", "WanImageToVideoPipeline")
        names = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
        configs = read_model_folder(str(root), pipelines, names, with_weights=("text_encoder",) if check_weights else ())
        parts = {name: Component(root / name, configs[name]) for name in names}
        for name, kind in (("transformer", "wan"), ("vae", "wan_vae")):
            given = getattr(args, f"{name}_path")
            parts[name] = choose_component(name, given, root / name, kind, configs[name], check_weights=check_weights)
    config = parts["transformer"].config
    channels, with_image = config.get("in_channels"), bool(config.get("image_dim"))
    made_for = {16: ("normal",), 36: ("i2v", "inpaint")}.get(channels, ())
    if args.train_mode not in made_for or config.get("pos_embed_seq_len"):
        what = f"the transformer takes {channels} channels, which no mode here trains"
        if made_for:
            what = f"the transformer takes {channels} channels: it is made for --train_mode {' or '.join(made_for)}"
        if config.get("pos_embed_seq_len"):
            what = "the transformer takes features of two images, which no mode here trains"
        raise UserError(f"--train_mode {args.train_mode}", what, "give that mode, or weights made for this one", MODEL)
    if with_image and args.tokenizer_max_length != 512:
        what = f"{args.tokenizer_max_length}: a model with an image embedder takes 512 text tokens"
        raise UserError("--tokenizer_max_length", what, "leave the flag out")
    if with_image:
        encoder = places["image_encoder"] if places else root / "image_encoder"
        parts["image_encoder"] = find_component(encoder, "clip_vision", check_weights=check_weights)
        if not places:
            read_component(root / "image_processor", check_weights=False)
    return parts


def describe(args: argparse.Namespace, parts: dict[str, Component]) -> planning.Model:
    """Returns what the model computes, from its configurations alone."""
    config, images = parts["transformer"].config, 0
    if "image_encoder" in parts:
        images = (parts["image_encoder"].config["image_size"] // parts["image_encoder"].config["patch_size"]) ** 2 + 1
    return planning.Model(
        task=f"{TASKS[args.train_mode]} (the transformer takes {config['in_channels']} channels)",
        network=partial(cross_attention_network, config, text_tokens=args.tokenizer_max_length, image_tokens=images),
        blocks=ADAPTED,
        parts={name: (kind, parts[name].config) for name, kind in CLASSES.items() if name in parts},
    )


def open_pipeline(
    args: argparse.Namespace, parts: dict[str, Component], shift: float, encoders: dict[str, torch.nn.Module]
) -> WanPipeline | diffusers.WanImageToVideoPipeline:
    """Returns diffusers' pipeline over these encoders, without a transformer."""
    # loaded where it is needed: its import says that torchvision is missing, also to those who do not train on images
    pipeline_class = WanPipeline if args.train_mode == "normal" else diffusers.WanImageToVideoPipeline
    if "scheduler" in parts:
        return pipeline_class.from_pretrained(parts["scheduler"].path.parent, transformer=None, **encoders)
    own: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(parts["tokenizer"].path, local_files_only=True)}
    if "image_encoder" in parts:
        side = parts["image_encoder"].config["image_size"]
        crop = {"height": side, "width": side}
        own["image_processor"] = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    return pipeline_class(**own, **encoders, scheduler=scheduler, transformer=None)


def load_encoders(
    args: argparse.Namespace,
    parts: dict[str, Component],
    shift: float,
    accelerator: Accelerator,
    gather: wiring.Gather,
) -> Encoders:
    """Loads the encoders: that of text in the compute dtype, the others in float32."""
    load = partial(load_frozen, pinned=args.low_vram and accelerator.device.type == "cuda", gather=gather)
    kinds = {"vae": torch.float32, "text_encoder": compute_dtype(accelerator), "image_encoder": torch.float32}
    encoders = {name: load(CLASSES[name], parts[name], kind) for name, kind in kinds.items() if name in parts}
    pipeline = open_pipeline(args, parts, shift, encoders)
    check_tokenizer(pipeline.tokenizer, parts["tokenizer"].path, "A red fox, 2 years old, runs over the hill <3")
    resting = {name: OffloadedModule(part, accelerator.device, offload=args.low_vram) for name, part in encoders.items()}
    return Encoders(resting["text_encoder"], resting.get("image_encoder"), resting["vae"], pipeline)


def load_components(
    parts: dict[str, Component],
    shift: float,
    transformer: torch.nn.Module,
    encoders: LazyEncoders[Encoders],
    encode: Encoder,
) -> Components:
    """Returns the model's parts; the encoders are loaded by whoever asks for them first."""
    config = full_config(AutoencoderKLWan, parts["vae"].config)
    mean, std = (
        torch.tensor(values, device=encode.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return Components(transformer, encoders, encode, mean, std, shift)


# --------------------------------------------------------------------------------------------- the family's part


@torch.no_grad()
def encode_prompts(encoders: Encoders, captions: Sequence[str], max_length: int) -> torch.Tensor:
    """Returns UMT5 embeddings [B, max_length, D], zeros past each caption's true length, as WanPipeline makes them.

    Each caption is encoded alone: its embedding must not depend on its neighbours, to the last bit.
    """
    settings = {"do_classifier_free_guidance": False, "max_sequence_length": max_length}
    device = encoders.text_encoder.device
    with encoders.text_encoder.on_device():
        embeds = [encoders.pipeline.encode_prompt([c], device=device, **settings)[0] for c in captions]
    return torch.cat(embeds)


@torch.no_grad()
def encode_images(encoders: Encoders, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns CLIP features [B, N, D] of the first frames of [B, 3, T, H, W] in [-1, 1], zeros where all of the mask
    [B, 1, T, H, W] is zero."""
    with encoders.image_encoder.on_device():
        embeds = [encoders.pipeline.encode_image([image], video.device) for image in to_images(video[:, :, 0])]
    return torch.cat(embeds) * mask[:, :, 0].amax((1, 2, 3)).view(-1, 1, 1)


def known_pixels(mode: str, raw: EncoderInput) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what is known of a video, grey elsewhere [B, 3, T, H, W], and the mask that says so [B, 1, T, H, W]."""
    mask = known_mask(mode, raw.variants, *raw.video.shape[2:], device=raw.video.device)
    return raw.video * mask, mask


def recipes_of(
    args: argparse.Namespace, parts: dict[str, Component], encoders: LazyEncoders[Encoders], accelerator: Accelerator
) -> list[EncodingSpec]:
    """Returns how the tensors of a sample are made.

    moments: of the VAE's posterior; prompt_embeds; for images also known: the posterior's mode of what is known, and
    image_embeds: of the first frame as far as it is known, where the model takes them.
    """
    config, mode, length = parts["transformer"].config, args.train_mode, args.tokenizer_max_length
    vae, text = (parts["vae"].path,), (parts["text_encoder"].path, parts["tokenizer"].path)
    to_moments = partial(encode_moments, mini_batch=args.vae_mini_batch)
    dtype, kept = compute_dtype(accelerator), LATENT_CHANNELS * (2 if args.vae_sample_mode == "sample" else 1)
    recipes = [
        latents_spec("moments", ("clip",), lambda raw: to_moments(encoders().vae, raw.video), kept, vae),
        EncodingSpec(
            "prompt_embeds", ("caption",), lambda raw: encode_prompts(encoders(), raw.captions, length),
            lambda _: (length, config["text_dim"]), dtype, text, f"{length}", padded=True, module="text_encoder",
        ),
    ]  # fmt: skip
    if mode != "normal":
        known = lambda raw: to_moments(encoders().vae, known_pixels(mode, raw)[0])  # noqa: E731
        recipes.append(latents_spec("known", ("clip", "mask"), known, LATENT_CHANNELS, vae))
    if config.get("image_dim"):
        seen = CLIPVisionConfig(**parts["image_encoder"].config)
        shape = ((seen.image_size // seen.patch_size) ** 2 + 1, seen.hidden_size)
        weights = (parts["image_encoder"].path, parts["tokenizer"].path.parent / "image_processor")
        recipes.append(EncodingSpec(
            "image_embeds", ("frame", "mask"), lambda raw: encode_images(encoders(), *known_pixels(mode, raw)),
            lambda _: shape, torch.float32, weights, module="image_encoder",
        ))  # fmt: skip
    return recipes


def encode_batch(
    args: argparse.Namespace, components: Components, batch: Batch, keys: Sequence[int] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns normalised latents (z - mean) / std, float32 [B, 16, t, h, w], and what the model is given beside them.

    prompt_embeds [B, L, D]; but for text-to-video also condition [B, 20, t, h, w], 4 mask channels and 16 of the known
    pixels' latents, and image_embeds [B, N, D] where the model takes them.

    Args:
        keys: draw the posterior's noise, one per sample; None takes its mode.
    """
    made = {name: torch.stack(tensors) for name, tensors in components.encode(batch).items()}
    given = {"prompt_embeds": made["prompt_embeds"]}
    if args.train_mode != "normal":
        mask = known_mask(args.train_mode, batch["variants"], *batch["bucket"], device=components.latents_mean.device)
        keep = to_device(keep_on_host(args.train_mode, batch["variants"], batch["bucket"], batch["keys"]), mask.device)
        given["condition"] = torch.cat([pack_mask(mask), normalise(components, made["known"])], 1) * keep
    if "image_embeds" in made:
        given["image_embeds"] = made["image_embeds"]
    return normalise(components, sample_latents(made["moments"], LATENT_CHANNELS, keys)), given


def normalise(components: Components, z: torch.Tensor) -> torch.Tensor:
    """Returns (z - mean) / std, rounded as WanImageToVideoPipeline does."""
    return (z - components.latents_mean) * (1 / components.latents_std)


def transformer_inputs(
    noisy_latents: torch.Tensor, sigmas: torch.Tensor, given: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Returns the keywords of WanTransformer3DModel: its timestep is 1000 sigma, float32 [B]."""
    condition = [given["condition"]] if "condition" in given else []
    return {
        "hidden_states": torch.cat([noisy_latents, *condition], 1),
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": given["prompt_embeds"],
        "encoder_hidden_states_image": given.get("image_embeds"),
        "return_dict": False,
    }


# ----------------------------------------------------------------------------------------------- one micro-batch


@names_memory
def accumulate_gradients(
    args: argparse.Namespace, accelerator: Accelerator, components: Components, model: torch.nn.Module, batch: Batch,
    dump_to: Path | None,
) -> torch.Tensor:  # fmt: skip
    """Adds a micro-batch's gradients and returns its part of the step's loss, float64 scalar.

    x_t = (1 - sigma) x_0 + sigma noise, the model predicts noise - x_0; every draw is a function of a sample's key.
    """
    device, keys = accelerator.device, batch["keys"]
    latents, given = encode_batch(args, components, batch, keys if args.vae_sample_mode == "sample" else None)

    sigmas = to_device(wiring.draw_sigmas_of(args, batch, components.shift), device)
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
        loss = (losses.double() * weights).sum()
        backward(accelerator, model, loss)
    if dump_to is not None:
        drawn = {"latents": latents, "noise": noise, "sigma": sigmas, "timestep": inputs["timestep"]}
        found = {"weight": weights, "target": target, "prediction": prediction, "loss": losses}
        write_dump(dump_to, rank=accelerator.process_index, batch=batch, tensors=drawn | found, model_inputs=inputs)
    return loss.detach()


# --------------------------------------------------------------------------------------------------- validation


def predict_held_out(
    components: Components, noisy_latents: torch.Tensor, timestep: torch.Tensor, sample: HeldOut
) -> torch.Tensor:
    """Returns the velocity for one held-out sample, as training computes it."""
    given = {name: value.to(noisy_latents.device) for name, value in sample.conditions.items()}
    sigmas = timestep / NUM_TRAIN_TIMESTEPS
    return components.transformer(**transformer_inputs(noisy_latents, sigmas, given))[0]


@contextmanager
def sampling_pipeline(components: Components) -> Iterator[WanPipeline | diffusers.WanImageToVideoPipeline]:
    """Yields the pipeline with the transformer in training, its encoders on the device."""
    with components.encoders.temporary() as encoders, ExitStack() as stack:
        for encoder in (encoders.text_encoder, encoders.image_encoder, encoders.vae):
            if encoder is not None:
                stack.enter_context(encoder.on_device())
        encoders.pipeline.transformer = components.transformer
        yield encoders.pipeline
        encoders.pipeline.transformer = None


# ------------------------------------------------------------------------------------------------ main and loop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs training from the flags to the exported model; returns the exit code (0 done, 75 stopped and saved)."""
    return planning.start(parse_args(argv), train, check_model, describe)


def train(
    args: argparse.Namespace, accelerator: Accelerator, backend: Backend, run: Run, gather: Callable[[Any], list[Any]]
) -> int:
    """Builds schedule, model and records in this order, then loops over optimizer steps; returns the exit code."""
    parts, shift = check_model(args), read_shift(args.config_path)
    model = describe(args, parts)
    wiring.announce(args, accelerator, backend, run, model.task)

    # schedule: from here on, everything that will happen is known
    planned = scheduling.open_schedule(args, accelerator, run, gather, model.cost)
    settings, state, total, part = planned.settings, planned.state, planned.total, parts["transformer"]
    lora = wiring.open_lora(args, accelerator, run, planned, part, ADAPTED, WanPipeline)

    # data: what the frozen encoders make of it is made once, where there is a cache
    encoders = LazyEncoders(partial(load_encoders, args, parts, shift, accelerator))
    recipes = recipes_of(args, parts, encoders, accelerator)
    encode, dataset, sampler, loader = wiring.open_data(args, accelerator, gather, planned, recipes, encoders)
    if args.cache_only:
        return wiring.fill_cache(args, accelerator, run, gather, planned, encode, dataset)

    # model: float32 masters, computation in the accelerator's precision
    transformer = load_transformer(WanTransformer3DModel, part, accelerator, fp32_params=flags.with_fp32_params(args))
    components = load_components(parts, shift, transformer, encoders, encode)
    engine, lr_at = wiring.open_engine(
        args, accelerator, backend, transformer, transformer.blocks, planned, part, lora
    )
    components = replace(components, transformer=engine.network)  # as validation and sampling must call it
    if run.resume.path:
        engine.load(run.resume.path)

    # records, batches, looks at the model on the way
    watch = wiring.open_watch(args, accelerator, run, gather, planned, engine, {"shift": shift}, model.network)
    plan = held_out_plan(planned.columns, settings)
    held_out = encode_held_out(dataset, plan, partial(encode_batch, args, components, keys=None))
    validate = wiring.open_validator(
        args, accelerator, backend, watch, planned, engine=engine, held_out=held_out, shift=shift,
        predict=partial(predict_held_out, components), guidance_scale=SAMPLING_GUIDANCE,
        pipeline=partial(sampling_pipeline, components),
    )  # fmt: skip
    about = {"task": f"wan2.1 {args.train_mode}", "backend": backend.name, "optimizer": flags.optimizer_of(args)}
    export = wiring.export_of(args, accelerator, engine, transformer, state, about | {"shift": shift}, watch.bar.note)
    accumulate = partial(accumulate_gradients, args, accelerator, components, engine.model)
    planning.try_largest(args, accelerator, backend, planned, engine, dataset, partial(accumulate, dump_to=None))
    if state.step == 0:
        watch.first_batch(planned.plan, dataset.with_pixels(), planned.index.fps)
        validate()

    with StopRequest() as stop, encode, watch:
        for step in iterate_steps(planned.columns, settings, state, sampler, loader, total=total, clock=watch.clock):
            engine.set_lr(rate := lr_at(state.step))
            step_loss, bad = torch.zeros((), dtype=torch.float64, device=accelerator.device), []
            dump_to = dump_folder(watch.output_dir, state.step + 1, args.dump_steps)
            for batch in step.batches():
                step_loss += accumulate(batch, dump_to)
                bad += batch["bad"]
            end = finish_step(
                step, accelerator, watch, engine, loss=step_loss, bad=bad, stop=bool(stop),
                clip_limit=wiring.clip_limit_of(args), max_bad_fraction=args.max_bad_fraction, rate=rate,
            )  # fmt: skip

            # once in a while: validate, save, stop
            done = state.step == total
            if end.stop and not done:  # first of all: whoever asks may not wait for long
                watch.save(export.save, args.checkpoints_total_limit, export.about())
                return watch.stopped(stop.signal_name)
            if done or wiring.validation_due(args, state.step, end.epochs):
                validate()
            if done or state.step % args.checkpointing_steps == 0:
                watch.save(export.save, args.checkpoints_total_limit, export.about())

    return watch.finished(export)


if __name__ == "__main__":
    run_script(main)
