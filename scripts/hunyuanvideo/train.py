"""Serves who fine-tunes HunyuanVideo: text-to-video and image-to-video, from clips to a model that diffusers loads.

One process, or one per GPU (DDP); everything after the script's name is the same for both:

    accelerate launch --mixed_precision="bf16" scripts/hunyuanvideo/train.py
      --pretrained_model_name_or_path=models/Diffusion_Transformer/HunyuanVideo
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json
      --output_dir=outputs/hunyuan --enable_bucket --train_batch_size=1 --mixed_precision="bf16"
      --gradient_checkpointing

Ctrl-C or SIGTERM saves and stops; the same command with --resume_from_checkpoint=latest goes on, to the bit.
"""

from __future__ import annotations

import videox.training.args as flags  # first of all: videox keeps the optional packages quiet that diffusers imports

# isort: split

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from transformers import AutoTokenizer, CLIPTextModel

import videox.training.build as wiring
import videox.training.dry_run as planning
import videox.training.schedule as scheduling
from videox.data.dataset import Batch
from videox.data.plan.plan import held_out_plan
from videox.device import to_device
from videox.diffusion.conditioning import concat_first_frame, replace_first_frame
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
from videox.encoders.encode import Encoder, EncodingSpec, LazyEncoders, latents_spec
from videox.encoders.hunyuan_text import encode_pooled, encode_text, pad_texts
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import encode_moments, sample_latents
from videox.errors import MODEL, UserError
from videox.estimate.flops import joint_attention_network
from videox.models.component import Component, choose_component
from videox.models.folder import check_tokenizer, full_config, read_component, read_model_folder, read_number
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

TASKS = {"normal": "text-to-video", "i2v": "image-to-video"}
ADAPTED = {"transformer_blocks": ("attn", "ff", "ff_context")}  # what a LoRA changes, by list of blocks
ADAPTED["single_transformer_blocks"] = ("attn", "proj_mlp", "proj_out")
LATENT_CHANNELS = 16
MOST_IMAGE_TOKENS = 576  # of the prompt: what Llava sees of an image, before most are left out
INTERLEAVE = {"token_replace": 4, "latent_concat": 2}  # every k-th image token is kept, as in the pipeline

# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags, each checked by itself and against the others."""
    parser = flags.Parser(description=__doc__)
    flags.add_model_and_data(parser)
    flags.add_shapes(parser)
    flags.add_training(parser, modes=tuple(TASKS))
    flags.add_run(parser)
    planning.add_flags(parser)
    add = parser.add_argument_group("HunyuanVideo").add_argument
    add("--guidance_scale", type=flags.number(float, 1, 100), default=6.0, help="embedded guidance, x 1000")
    add("--tokenizer_max_length", type=flags.number(int, 1, 4096), default=256, help="text tokens after the template")
    add("--num_hidden_layers_to_skip", type=flags.number(int, 0, 31), default=2, help="last layers of Llama left out")
    every = "keep every k-th image token of the prompt, 1 to 5 (none = 4 for token_replace, 2 for latent_concat)"
    add("--image_embed_interleave", type=flags.number(int, 1, 5), help=every)
    args = parser.parse(argv)
    flags.check(args)
    return args


# -------------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Encoders:
    """The frozen parts, and diffusers' own pipeline over them, for prompts and sample clips."""

    text_encoder: OffloadedModule
    text_encoder_2: OffloadedModule
    vae: OffloadedModule
    pipeline: HunyuanVideoPipeline | diffusers.HunyuanVideoImageToVideoPipeline


@dataclass(frozen=True)
class Components:
    """The model's parts. transformer: float32 masters; encode: what the encoders make of a micro-batch.

    condition: None for text-to-video, else how the first frame is given: "token_replace" | "latent_concat".
    """

    transformer: HunyuanVideoTransformer3DModel
    encoders: LazyEncoders[Encoders]
    encode: Encoder
    attention: MaskFreeAttention
    scaling_factor: float
    shift: float
    condition: str | None

    @property
    def given_frames(self) -> int:
        """Leading latent frames that the model is given; they are outside the loss."""
        return 0 if self.condition is None else 1


class MaskFreeAttention(HunyuanVideoAttnProcessor2_0):
    """Attention that leaves the mask away while every text token is real, so that the fused kernels can be used."""

    all_real = False

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Does what the parent does, with the mask only where it masks something."""
        mask = None if self.all_real else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def check_model(args: argparse.Namespace) -> dict[str, Component]:
    """Returns the model's parts after each has been looked at; loads no weight."""
    pipelines = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    encoders = ("text_encoder", "text_encoder_2")
    names = ("scheduler", "tokenizer", "tokenizer_2", *encoders, "vae", "transformer")
    root, check_weights = local_folder(args.pretrained_model_name_or_path), not planning.only_plans(args)
    configs = read_model_folder(str(root), pipelines, names, with_weights=encoders if check_weights else ())
    parts = {name: Component(root / name, configs[name]) for name in names}
    for name, kind in (("transformer", "hunyuan"), ("vae", "hunyuan_vae")):
        given = getattr(args, f"{name}_path")
        parts[name] = choose_component(name, given, root / name, kind, configs[name], check_weights=check_weights)
    condition = parts["transformer"].config.get("image_condition_type")
    made_for = "normal" if condition is None else "i2v"
    if args.train_mode != made_for:
        what = f"the transformer's image_condition_type is {condition}: it is made for --train_mode {made_for}"
        raise UserError(f"--train_mode {args.train_mode}", what, "give that mode, or weights made for this one", MODEL)
    if made_for == "i2v":
        read_component(root / "image_processor", check_weights=False)
    return parts


def describe(args: argparse.Namespace, parts: dict[str, Component]) -> planning.Model:
    """Returns what the model computes, from its configurations alone."""
    config, text_tokens = parts["transformer"].config, args.tokenizer_max_length
    condition = config.get("image_condition_type")
    if condition is not None:  # the prompt shows the first frame, too
        text_tokens += MOST_IMAGE_TOKENS // (args.image_embed_interleave or INTERLEAVE[condition])
    return planning.Model(
        task=f"{TASKS[args.train_mode]} (the transformer's image_condition_type is {condition})",
        network=partial(joint_attention_network, config, text_tokens=text_tokens),
        blocks=ADAPTED,
        parts={name: (kind, parts[name].config) for name, kind in classes_of(args.train_mode).items()},
        min_frames=1 if condition is None else 5,  # a given first latent frame alone teaches nothing
        divided="fsdp1",
    )


def classes_of(train_mode: str) -> dict[str, Any]:
    """Returns the class of each part that has weights."""
    # what image-to-video alone needs is imported where it is needed: it says that torchvision is missing
    text = transformers.LlamaModel if train_mode == "normal" else transformers.LlavaForConditionalGeneration
    encoders = {"vae": AutoencoderKLHunyuanVideo, "text_encoder": text, "text_encoder_2": CLIPTextModel}
    return {"transformer": HunyuanVideoTransformer3DModel, **encoders}


def load_encoders(
    args: argparse.Namespace, parts: dict[str, Component], accelerator: Accelerator, gather: wiring.Gather
) -> Encoders:
    """Loads the encoders: those of text in the compute dtype, the VAE in float32."""
    root, dtype = parts["scheduler"].path.parent, compute_dtype(accelerator)
    classes = classes_of(args.train_mode)
    load = partial(load_frozen, pinned=args.low_vram and accelerator.device.type == "cuda", gather=gather)
    kinds = {"vae": torch.float32, "text_encoder": dtype, "text_encoder_2": dtype}
    encoders = {name: load(classes[name], parts[name], kind) for name, kind in kinds.items()}
    pipeline_class = (
        HunyuanVideoPipeline if args.train_mode == "normal" else diffusers.HunyuanVideoImageToVideoPipeline
    )
    # not by the class that model_index.json names: transformers 5 would rebuild it without its spaces and line breaks
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    pipeline = pipeline_class.from_pretrained(root, transformer=None, tokenizer=tokenizer, **encoders)
    check_tokenizer(tokenizer, root / "tokenizer", "A red fox,\n\n2 years old, runs <3")
    # a caption beyond CLIP's 77 tokens is cut for the pooled embedding alone; once a batch this is no news
    logging.getLogger(pipeline_class.__module__).setLevel(logging.ERROR)
    check_tokenizer(pipeline.tokenizer_2, root / "tokenizer_2", "a red fox runs")
    resting = {name: OffloadedModule(part, accelerator.device, offload=args.low_vram) for name, part in encoders.items()}
    return Encoders(**resting, pipeline=pipeline)


def load_components(
    parts: dict[str, Component],
    shift: float,
    transformer: torch.nn.Module,
    encoders: LazyEncoders[Encoders],
    encode: Encoder,
) -> Components:
    """Returns the model's parts; the encoders are loaded by whoever asks for them first."""
    attention = MaskFreeAttention()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(attention)
    scaling = full_config(AutoencoderKLHunyuanVideo, parts["vae"].config).scaling_factor
    condition = transformer.config.image_condition_type
    return Components(transformer, encoders, encode, attention, scaling, shift, condition)


# --------------------------------------------------------------------------------------------- the family's part


def recipes_of(
    args: argparse.Namespace, parts: dict[str, Component], encoders: LazyEncoders[Encoders], accelerator: Accelerator
) -> list[EncodingSpec]:
    """Returns how the tensors of a sample are made.

    moments: of the VAE's posterior; prompt_embeds and pooled: of the caption; in image-to-video also first_frame: the
    posterior's mode of the image alone, as at inference, and prompt_embeds see the image too.
    """
    config, dtype, root = parts["transformer"].config, compute_dtype(accelerator), parts["scheduler"].path.parent
    condition = config.get("image_condition_type")
    vae, given = (parts["vae"].path,), partial(encode_moments, mini_batch=args.vae_mini_batch)
    kept, length = LATENT_CHANNELS * (2 if args.vae_sample_mode == "sample" else 1), args.tokenizer_max_length
    text = {"max_sequence_length": length, "num_hidden_layers_to_skip": args.num_hidden_layers_to_skip}
    llama: tuple[Path, ...] = (root / "text_encoder", root / "tokenizer")
    clip = (root / "text_encoder_2", root / "tokenizer_2")
    recipes = []
    if condition is not None:
        text["image_embed_interleave"] = args.image_embed_interleave or INTERLEAVE[condition]
        llama, length = (*llama, root / "image_processor"), length + MOST_IMAGE_TOKENS
        first = lambda raw: given(encoders().vae, raw.video[:, :, :1])  # noqa: E731
        recipes.append(latents_spec("first_frame", ("frame",), first, LATENT_CHANNELS, vae, first_only=True))
    sees = ("caption",) if condition is None else ("frame", "caption")
    return [
        *recipes,
        latents_spec("moments", ("clip",), lambda raw: given(encoders().vae, raw.video), kept, vae),
        EncodingSpec(
            "prompt_embeds", sees, lambda raw: encode_text(encoders().text_encoder, encoders().pipeline, raw, text),
            lambda _: (length, config["text_embed_dim"]), dtype, llama, f"{text}", trimmed=True, module="text_encoder",
        ),
        EncodingSpec(
            "pooled", ("caption",), lambda raw: encode_pooled(encoders().text_encoder_2, encoders().pipeline, raw),
            lambda _: (config["pooled_projection_dim"],), dtype, clip, module="text_encoder_2",
        ),
    ]  # fmt: skip


def encode_batch(
    components: Components, batch: Batch, keys: Sequence[int] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns scaled latents, float32 [B, 16, t, h, w], and what the model is given beside them.

    prompt_embeds [B, L, D] and prompt_mask [B, L], as long as the longest caption; pooled [B, P]; in image-to-video
    first_frame [B, 16, 1, h, w].

    Args:
        keys: draw the posterior's noise, one per sample; None takes its mode.
    """
    made = components.encode(batch)
    given = dict(zip(("prompt_embeds", "prompt_mask"), pad_texts(made["prompt_embeds"]), strict=True))
    given["pooled"] = torch.stack(made["pooled"])
    if components.given_frames:
        given["first_frame"] = torch.stack(made["first_frame"]) * components.scaling_factor
    latents = sample_latents(torch.stack(made["moments"]), LATENT_CHANNELS, keys) * components.scaling_factor
    return latents, given


def transformer_inputs(
    components: Components, noisy_latents: torch.Tensor, sigmas: torch.Tensor, given: dict[str, torch.Tensor],
    guidance_scale: float,
) -> dict[str, Any]:  # fmt: skip
    """Returns the keywords of HunyuanVideoTransformer3DModel: timestep 1000 sigma, guidance x 1000, both float32 [B].

    Args:
        given: of encode_prompts; in image-to-video with `first_frame`, its latents [B, 16, 1, h, w].
        guidance_scale: embedded guidance, for models that take it.
    """
    hidden_states = noisy_latents
    if components.condition == "token_replace":
        hidden_states = replace_first_frame(noisy_latents, given["first_frame"])
    elif components.condition == "latent_concat":
        hidden_states = concat_first_frame(noisy_latents, given["first_frame"])
    guided = components.transformer.config.guidance_embeds
    components.attention.all_real = bool(given["prompt_mask"].all())  # on the host
    return {
        "hidden_states": hidden_states,
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": given["prompt_embeds"],
        "encoder_attention_mask": to_device(given["prompt_mask"], hidden_states.device),
        "pooled_projections": given["pooled"],
        "guidance": torch.full_like(sigmas, 1000 * guidance_scale) if guided else None,
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
    latents, given = encode_batch(components, batch, keys if args.vae_sample_mode == "sample" else None)

    sigmas = to_device(wiring.draw_sigmas_of(args, batch, components.shift), device)
    noise = to_device(batch_noise([int(hash_key(key, Purpose.NOISE)) for key in keys], latents.shape[1:]), device)
    noisy_latents = add_noise(latents, noise, sigmas)
    target = noise - latents

    inputs = transformer_inputs(components, noisy_latents, sigmas, given, args.guidance_scale)
    weights = to_device(torch.from_numpy(batch["weights"]), device)  # each planned sample's share of the global batch
    with accumulate(accelerator, model, batch["last"]):
        prediction = model(**inputs)[0]
        made = (slice(None), slice(None), slice(components.given_frames, None))  # what the model was not given
        losses = velocity_losses(prediction[made], target[made], loss_weights(sigmas, args.weighting_scheme))
        if args.motion_sub_loss:
            losses = motion_losses(prediction[made], target[made], losses, args.motion_sub_loss_ratio)
        loss = (losses.double() * weights).sum()
        backward(accelerator, model, loss)
    if dump_to is not None:
        drawn = {"latents": latents, "noise": noise, "sigma": sigmas, "timestep": inputs["timestep"]}
        found = {"weight": weights, "target": target, "prediction": prediction, "loss": losses}
        write_dump(dump_to, rank=accelerator.process_index, batch=batch, tensors=drawn | found, model_inputs=inputs)
    return loss.detach()


# --------------------------------------------------------------------------------------------------- validation


def predict_held_out(
    components: Components, guidance_scale: float, noisy_latents: torch.Tensor, timestep: torch.Tensor, sample: HeldOut
) -> torch.Tensor:
    """Returns the velocity for one held-out sample, as training computes it."""
    given = {name: value.to(noisy_latents.device) for name, value in sample.conditions.items()}
    inputs = transformer_inputs(components, noisy_latents, timestep / NUM_TRAIN_TIMESTEPS, given, guidance_scale)
    return components.transformer(**inputs)[0]


@contextmanager
def sampling_pipeline(
    components: Components,
) -> Iterator[HunyuanVideoPipeline | diffusers.HunyuanVideoImageToVideoPipeline]:
    """Yields the pipeline with the transformer in training, its encoders on the device; it pads and masks its text."""
    components.attention.all_real = False
    with components.encoders.temporary() as parts:
        parts.pipeline.transformer = components.transformer
        with parts.text_encoder.on_device(), parts.text_encoder_2.on_device(), parts.vae.on_device():
            yield parts.pipeline
        parts.pipeline.transformer = None


# ------------------------------------------------------------------------------------------------ main and loop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs training from the flags to the exported model; returns the exit code (0 done, 75 stopped and saved)."""
    return planning.start(parse_args(argv), train, check_model, describe)


def train(
    args: argparse.Namespace, accelerator: Accelerator, backend: Backend, run: Run, gather: Callable[[Any], list[Any]]
) -> int:
    """Builds schedule, model and records in this order, then loops over optimizer steps; returns the exit code."""
    parts = check_model(args)
    model, shift = describe(args, parts), read_number(parts["scheduler"].config, "shift", "scheduler")
    wiring.announce(args, accelerator, backend, run, model.task)

    # schedule: from here on, everything that will happen is known
    planned = scheduling.open_schedule(args, accelerator, run, gather, model.cost, model.min_frames)
    settings, state, total, part = planned.settings, planned.state, planned.total, parts["transformer"]
    lora = wiring.open_lora(args, accelerator, run, planned, part, ADAPTED, HunyuanVideoPipeline)

    # data: what the frozen encoders make of it is made once, where there is a cache
    encoders = LazyEncoders(partial(load_encoders, args, parts, accelerator))
    recipes = recipes_of(args, parts, encoders, accelerator)
    encode, dataset, sampler, loader = wiring.open_data(args, accelerator, gather, planned, recipes, encoders)
    if args.cache_only:
        return wiring.fill_cache(args, accelerator, run, gather, planned, encode, dataset)

    # model: float32 masters, computation in the accelerator's precision
    transformer = load_transformer(
        HunyuanVideoTransformer3DModel, part, accelerator, fp32_params=flags.with_fp32_params(args)
    )
    components = load_components(parts, shift, transformer, encoders, encode)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    engine, lr_at = wiring.open_engine(args, accelerator, backend, transformer, blocks, planned, part, lora)
    components = replace(components, transformer=engine.network)  # as validation and sampling must call it
    if run.resume.path:
        engine.load(run.resume.path)

    # records, batches, looks at the model on the way
    watch = wiring.open_watch(args, accelerator, run, gather, planned, engine, {"shift": shift}, model.network)
    plan = held_out_plan(planned.columns, settings)
    held_out = encode_held_out(dataset, plan, partial(encode_batch, components, keys=None))
    validate = wiring.open_validator(
        args, accelerator, backend, watch, planned, engine=engine, held_out=held_out, shift=shift,
        predict=partial(predict_held_out, components, args.guidance_scale), guidance_scale=args.guidance_scale,
        pipeline=partial(sampling_pipeline, components), given_frames=components.given_frames,
    )  # fmt: skip
    about = {"task": f"hunyuanvideo {args.train_mode}", "backend": backend.name, "optimizer": flags.optimizer_of(args)}
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
