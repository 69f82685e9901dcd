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

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel

import videox.args as flags
import videox.planning as planning
import videox.wiring as wiring
from videox.conditioning import concat_first_frame, replace_first_frame
from videox.data.dataset import Batch
from videox.distributed import Backend, StopRequest, accumulate, backward
from videox.dump import dump_folder, write_dump
from videox.errors import MODEL, Refusal
from videox.first_minute import names_memory
from videox.flow_matching import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    batch_noise,
    loss_weights,
    motion_losses,
    velocity_losses,
)
from videox.keys import Purpose, mix
from videox.latents import encode, to_video
from videox.lifecycle import Run, run_script
from videox.model_folder import (
    check_tokenizer,
    read_component,
    read_model_folder,
    read_number,
)
from videox.network import joint_attention_network
from videox.offload import RestingModule
from videox.steps import close_step, walk
from videox.text import trim_text
from videox.validation import HeldOut

TASKS = {"normal": "text-to-video", "i2v": "image-to-video"}
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
    embedded = "embedded guidance, x 1000 to the model"
    add("--guidance_scale", type=flags.number(float, 1, 100), default=6.0, help=embedded)
    add("--tokenizer_max_length", type=flags.number(int, 1, 4096), default=256, help="text tokens after the template")
    skip = "last hidden layers of the text encoder to leave out (0 = none)"
    add("--num_hidden_layers_to_skip", type=flags.number(int, 0, 31), default=2, help=skip)
    every = "keep every k-th image token of the prompt, 1 to 5 (none = 4 for token_replace, 2 for latent_concat)"
    add("--image_embed_interleave", type=flags.number(int, 1, 5), help=every)
    args = parser.parse(argv)
    flags.check(args)
    return args


# -------------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Components:
    """The model's parts. transformer: float32 masters; pipeline: diffusers' own, for prompts and sample clips.

    condition: None for text-to-video, else how the first frame is given: "token_replace" | "latent_concat".
    """

    transformer: HunyuanVideoTransformer3DModel
    text_encoder: RestingModule
    text_encoder_2: RestingModule
    vae: RestingModule
    pipeline: HunyuanVideoPipeline | diffusers.HunyuanVideoImageToVideoPipeline
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
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Does what the parent does, with the mask only where it masks something."""
        mask = None if self.all_real else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def check_model(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the configurations of all parts after each has been looked at; loads no weight."""
    trains, pipelines = not planning.only_plans(args), ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    encoders = ("text_encoder", "text_encoder_2")
    names = (*encoders, *(("scheduler", "tokenizer", "tokenizer_2") if trains else ()))
    configs = read_model_folder(args.pretrained_model_name_or_path, pipelines, names, encoders if trains else ())
    root = Path(args.pretrained_model_name_or_path)
    for name in ("transformer", "vae"):
        configs[name] = read_component(Path(getattr(args, f"{name}_path") or root / name), weighted=trains)
    condition = configs["transformer"].get("image_condition_type")
    made_for = "normal" if condition is None else "i2v"
    if args.train_mode != made_for:
        what = f"the transformer's image_condition_type is {condition}: it is made for --train_mode {made_for}"
        raise Refusal(f"--train_mode {args.train_mode}", what, "give that mode, or weights made for this one", MODEL)
    if made_for == "i2v" and trains:
        read_component(root / "image_processor", weighted=False)
    return configs


def describe(args: argparse.Namespace) -> planning.Model:
    """Returns what the model computes, from its configurations alone."""
    configs = check_model(args)
    condition, text_tokens = configs["transformer"].get("image_condition_type"), args.tokenizer_max_length
    if condition is not None:  # the prompt shows the first frame, too
        seen = {"image_size": 336, "patch_size": 14} | configs["text_encoder"].get("vision_config", {})
        every = args.image_embed_interleave or INTERLEAVE[condition]
        text_tokens += (seen["image_size"] // seen["patch_size"]) ** 2 // every
    return planning.Model(
        task=f"{TASKS[args.train_mode]} (the transformer's image_condition_type is {condition})",
        network=partial(joint_attention_network, configs["transformer"], text_tokens=text_tokens),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        min_frames=1 if condition is None else 5,  # a given first latent frame alone teaches nothing
        divided="fsdp1",
    )


def load_components(args: argparse.Namespace, shift: float, accelerator: Accelerator) -> Components:
    """Loads the model: encoders frozen, text encoders in the compute dtype, VAE and transformer in float32."""
    root, device = Path(args.pretrained_model_name_or_path), accelerator.device
    compute_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    transformer = wiring.open_transformer(args, accelerator, HunyuanVideoTransformer3DModel)
    attention = MaskFreeAttention()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(attention)
    # what image-to-video alone needs is imported where it is needed: it says that torchvision is missing
    text_to_video = args.train_mode == "normal"
    text_encoder_class = transformers.LlamaModel if text_to_video else transformers.LlavaForConditionalGeneration
    vae_folder = Path(args.vae_path or root / "vae")
    load = wiring.encoder_loader(args, accelerator)
    encoders = {
        "vae": load(AutoencoderKLHunyuanVideo, vae_folder, torch.float32),
        "text_encoder": load(text_encoder_class, root / "text_encoder", compute_dtype),
        "text_encoder_2": load(CLIPTextModel, root / "text_encoder_2", compute_dtype),
    }
    pipeline_class = HunyuanVideoPipeline if text_to_video else diffusers.HunyuanVideoImageToVideoPipeline
    # not by the class that model_index.json names: transformers 5 would rebuild it without its spaces and line breaks
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    pipeline = pipeline_class.from_pretrained(root, transformer=None, tokenizer=tokenizer, **encoders)
    check_tokenizer(tokenizer, root / "tokenizer", "A red fox,\n\n2 years old, runs <3")
    # a caption beyond CLIP's 77 tokens is cut for the pooled embedding alone; once a batch this is no news
    logging.getLogger(pipeline_class.__module__).setLevel(logging.ERROR)
    check_tokenizer(pipeline.tokenizer_2, root / "tokenizer_2", "a red fox runs")
    resting = {
        name: RestingModule(encoder.requires_grad_(False).eval(), device, rests=args.low_vram)
        for name, encoder in encoders.items()
    }
    return Components(
        transformer=transformer,
        **resting,
        pipeline=pipeline,
        attention=attention,
        scaling_factor=encoders["vae"].config.scaling_factor,
        shift=shift,
        condition=transformer.config.image_condition_type,
    )


# --------------------------------------------------------------------------------------------- the family's part


@torch.no_grad()
def encode_prompts(
    args: argparse.Namespace, components: Components, captions: Sequence[str], video: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns prompt_embeds [B, L, D], prompt_mask [B, L] and pooled [B, P], trimmed to the batch's longest caption.

    In image-to-video the prompt shows the first frame of the video [B, 3, T, H, W] to the text encoder, one sample at
    a time: the pipeline cuts prompts that are too long for its template rightly for a single one only.
    """
    pipeline, device = components.pipeline, video.device
    settings = {
        "device": device,
        "max_sequence_length": args.tokenizer_max_length,
        "num_hidden_layers_to_skip": args.num_hidden_layers_to_skip,
    }
    template = sys.modules[type(pipeline).__module__].DEFAULT_PROMPT_TEMPLATE  # each pipeline has its own
    with components.text_encoder.awake(), components.text_encoder_2.awake():
        if components.condition is None:
            embeds, mask = pipeline._get_llama_prompt_embeds(list(captions), template, **settings)
        else:
            settings["image_embed_interleave"] = args.image_embed_interleave or INTERLEAVE[components.condition]
            images = [Image.fromarray(frame) for frame in first_frames(video)]
            encoded = [
                pipeline._get_llama_prompt_embeds([image], [caption], template, **settings)
                for image, caption in zip(images, captions, strict=True)
            ]
            embeds, mask = (torch.cat(part) for part in zip(*encoded, strict=True))
        pooled = pipeline._get_clip_prompt_embeds(list(captions), device=device)
    embeds, mask = trim_text(embeds, mask)
    return {"prompt_embeds": embeds, "prompt_mask": mask, "pooled": pooled}


def first_frames(video: torch.Tensor) -> np.ndarray:
    """Returns the first frames as uint8 [B, H, W, 3] of a video [B, 3, T, H, W] in [-1, 1]."""
    return ((video[:, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def encode_video(
    components: Components, video: torch.Tensor, keys: Sequence[int] | None, mini_batch: int
) -> torch.Tensor:
    """Returns scaled latents, float32 [B, 16, t, h, w], of a video [B, 3, T, H, W] in [-1, 1].

    keys draw the posterior's noise, one per sample; None takes its mode. mini_batch: samples per call of the VAE.
    """
    return encode(components.vae, video, keys=keys, mini_batch=mini_batch) * components.scaling_factor


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
    components.attention.all_real = bool(given["prompt_mask"].all())
    return {
        "hidden_states": hidden_states,
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": given["prompt_embeds"],
        "encoder_attention_mask": given["prompt_mask"],
        "pooled_projections": given["pooled"],
        "guidance": torch.full_like(sigmas, 1000 * guidance_scale) if guided else None,
        "return_dict": False,
    }


# ----------------------------------------------------------------------------------------------- one micro-batch


@names_memory
def accumulate_gradients(
    args: argparse.Namespace,
    accelerator: Accelerator,
    components: Components,
    model: torch.nn.Module,
    batch: Batch,
    dump_to: Path | None,
) -> torch.Tensor:
    """Adds a micro-batch's gradients and returns its part of the step's loss, float64 scalar.

    x_t = (1 - sigma) x_0 + sigma noise, the model predicts noise - x_0; every draw is a function of a sample's key.
    """
    device, keys = accelerator.device, batch["keys"]
    video = to_video(batch["pixels"].to(device, non_blocking=True))
    posterior_keys = keys if args.vae_sample_mode == "sample" else None
    latents = encode_video(components, video, posterior_keys, args.vae_mini_batch)
    given = encode_prompts(args, components, batch["captions"], video)
    if components.given_frames:  # as at inference: the image alone, the posterior's mode
        given["first_frame"] = encode_video(components, video[:, :, :1], None, args.vae_mini_batch)

    del video  # as large as all activations of a block
    sigmas = wiring.draw_sigmas_of(args, batch, components.shift).to(device)
    noise = batch_noise([int(mix(key, Purpose.NOISE)) for key in keys], latents.shape[1:]).to(device)
    noisy_latents = add_noise(latents, noise, sigmas)
    target = noise - latents

    inputs = transformer_inputs(components, noisy_latents, sigmas, given, args.guidance_scale)
    weights = torch.from_numpy(batch["weights"]).to(device)  # each planned sample's share of the global batch
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


def encode_held_out(
    args: argparse.Namespace, components: Components, samples: Iterable[tuple[np.ndarray, str]], device: torch.device
) -> list[HeldOut]:
    """Returns held-out samples in host memory: latents by the posterior's mode, prompts, the first frame if given."""
    encoded = []
    for pixels, caption in samples:
        video = to_video(torch.from_numpy(pixels)[None].to(device))
        given = encode_prompts(args, components, [caption], video)
        if components.given_frames:
            given["first_frame"] = encode_video(components, video[:, :, :1], None, args.vae_mini_batch)
        latents = encode_video(components, video, None, args.vae_mini_batch)
        encoded.append(HeldOut(latents.cpu(), {name: value.cpu() for name, value in given.items()}))
    return encoded


def predict_held_out(
    components: Components,
    guidance_scale: float,
    noisy_latents: torch.Tensor,
    timestep: torch.Tensor,
    sample: HeldOut,
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
    components.pipeline.transformer = components.transformer
    components.attention.all_real = False
    with components.text_encoder.awake(), components.text_encoder_2.awake(), components.vae.awake():
        yield components.pipeline
    components.pipeline.transformer = None


# ------------------------------------------------------------------------------------------------ main and loop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs training from the flags to the exported model; returns the exit code (0 done, 75 stopped and saved)."""
    return planning.start(parse_args(argv), train, describe)


def train(
    args: argparse.Namespace, accelerator: Accelerator, backend: Backend, run: Run, gather: Callable[[Any], list[Any]]
) -> int:
    """Builds schedule, model and records in this order, then loops over optimizer steps; returns the exit code."""
    model, root = describe(args), Path(args.pretrained_model_name_or_path)
    shift = read_number(read_component(root / "scheduler", weighted=False), "shift", "scheduler")
    wiring.announce(args, accelerator, backend, run, model.task)

    # schedule: from here on, everything that will happen is known
    planned = wiring.open_schedule(args, accelerator, run, gather, model.cost, model.min_frames)
    settings, state, total = planned.settings, planned.state, planned.total

    # model: float32 masters, computation in the accelerator's precision
    components = load_components(args, shift, accelerator)
    transformer = components.transformer
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    engine, rate_at = wiring.open_engine(args, accelerator, backend, transformer, blocks, planned)
    components = replace(components, transformer=engine.network)  # as validation and sampling must call it
    if run.resume.path:
        engine.load(run.resume.path)

    # records, batches, looks at the model on the way
    watch = wiring.open_watch(args, accelerator, run, gather, planned, engine, {"shift": shift}, model.network)
    dataset, sampler, loader = wiring.open_data(args, accelerator, planned.index)
    held_out = encode_held_out(args, components, wiring.held_out_of(planned, dataset), accelerator.device)
    validate = wiring.open_validator(
        args, accelerator, backend, watch, planned, engine=engine, held_out=held_out, shift=shift,
        predict=partial(predict_held_out, components, args.guidance_scale), guidance_scale=args.guidance_scale,
        pipeline=partial(sampling_pipeline, components), given_frames=components.given_frames,
    )  # fmt: skip
    save = partial(engine.save, state=state)
    about = {"task": f"hunyuanvideo {args.train_mode}", "backend": backend.name}
    clip_at = wiring.clip_limit_of(args)
    accumulate = partial(accumulate_gradients, args, accelerator, components, engine.model)
    planning.try_largest(args, accelerator, backend, planned, engine, dataset, partial(accumulate, dump_to=None))
    if state.step == 0:
        watch.first_batch(planned.plan, dataset, planned.index.fps)
        validate()

    with StopRequest() as stop:
        for step in walk(planned.columns, settings, state, sampler, loader, total=total, clock=watch.clock):
            rate = rate_at(state.step)
            engine.set_rate(rate)
            step_loss, bad = torch.zeros((), dtype=torch.float64, device=accelerator.device), []
            dump_to = dump_folder(watch.output_dir, state.step + 1, args.dump_steps)
            for batch in step.batches():
                step_loss += accumulate(batch, dump_to)
                bad += batch["bad"]
            end = close_step(
                step, accelerator, watch, engine, loss=step_loss, bad=bad, stop=bool(stop),
                clip_limit=clip_at, max_bad_fraction=args.max_bad_fraction, rate=rate,
            )  # fmt: skip

            # once in a while: validate, save, stop
            done = state.step == total
            if end.stop and not done:  # first of all: whoever asks may not wait for long
                watch.save(save, args.checkpoints_total_limit, about)
                return watch.stopped(stop.signal_name)
            if done or wiring.validation_due(args, state.step, end.epochs):
                validate()
            if done or state.step % args.checkpointing_steps == 0:
                watch.save(save, args.checkpoints_total_limit, about)

    return watch.finished(wiring.export_of(args, engine, transformer, is_main=accelerator.is_main_process))


if __name__ == "__main__":
    run_script(main)
