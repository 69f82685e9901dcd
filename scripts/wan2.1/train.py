"""Serves who fine-tunes Wan2.1: text-to-video, from a folder of clips and captions to a model that diffusers loads.

One process, or one per GPU (DDP); everything after the script's name is the same for both:

    accelerate launch --mixed_precision="bf16" scripts/wan2.1/train.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.1-T2V-14B \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan --enable_bucket --train_batch_size=1 --mixed_precision="bf16" --gradient_checkpointing

Ctrl-C or SIGTERM saves and stops; the same command with --resume_from_checkpoint=latest goes on, to the bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import CLIPVisionModel, UMT5EncoderModel

import videox.args as flags
import videox.planning as planning
import videox.wiring as wiring
from videox.conditioning import keep_condition, known_mask, pack_mask
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
    read_shift,
)
from videox.network import cross_attention_network
from videox.offload import RestingModule
from videox.steps import close_step, walk
from videox.validation import HeldOut

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"normal": "text-to-video", "i2v": "image-to-video", "inpaint": "inpainting"}
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
    wan.add_argument(
        "--config_path",
        default=str(ROOT / "config/wan2.1/wan_civitai.yaml"),
        help="yaml with the flow shift (scheduler_kwargs.shift)",
    )
    wan.add_argument("--tokenizer_max_length", type=flags.number(int, 1, 512), default=512, help="text tokens at most")
    args = parser.parse(argv)
    flags.check(args)
    return args


# -------------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Components:
    """The model's parts. transformer: float32 masters; pipeline: diffusers' own, for prompts and sample clips."""

    transformer: WanTransformer3DModel
    text_encoder: RestingModule
    image_encoder: RestingModule | None
    vae: RestingModule
    pipeline: WanPipeline | diffusers.WanImageToVideoPipeline
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    shift: float


def check_model(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the transformer's configuration after every part of the model has been looked at; loads no weight.

    For planning the configurations of what has weights are enough, without the weights.
    """
    trains, pipelines = not planning.only_plans(args), ("WanPipeline", "WanImageToVideoPipeline")
    names = ("text_encoder", *(("scheduler", "tokenizer") if trains else ()))
    weighted = ("text_encoder",) if trains else ()
    configs = read_model_folder(args.pretrained_model_name_or_path, pipelines, names, weighted)
    for name in ("transformer", "vae"):
        folder = getattr(args, f"{name}_path") or Path(args.pretrained_model_name_or_path) / name
        configs[name] = read_component(Path(folder), weighted=trains)
    config = configs["transformer"]
    channels, with_image = config.get("in_channels"), bool(config.get("image_dim"))
    made_for = {16: ("normal",), 36: ("i2v", "inpaint")}.get(channels, ())
    if args.train_mode not in made_for or config.get("pos_embed_seq_len"):
        what = f"the transformer takes {channels} channels, which no mode here trains"
        if made_for:
            what = f"the transformer takes {channels} channels: it is made for --train_mode {' or '.join(made_for)}"
        if config.get("pos_embed_seq_len"):
            what = "the transformer takes features of two images, which no mode here trains"
        raise Refusal(f"--train_mode {args.train_mode}", what, "give that mode, or weights made for this one", MODEL)
    if with_image and args.tokenizer_max_length != 512:
        what = f"{args.tokenizer_max_length}: a model with an image embedder takes 512 text tokens"
        raise Refusal("--tokenizer_max_length", what, "leave the flag out")
    if with_image:
        root = Path(args.pretrained_model_name_or_path)
        read_component(root / "image_encoder", weighted=trains)
        if trains:
            read_component(root / "image_processor", weighted=False)
    return config


def describe(args: argparse.Namespace) -> planning.Model:
    """Returns what the model computes, from its configurations alone."""
    config, image_tokens = check_model(args), 0
    if config.get("image_dim"):
        seen = read_component(Path(args.pretrained_model_name_or_path) / "image_encoder", weighted=False)
        image_tokens = (seen["image_size"] // seen["patch_size"]) ** 2 + 1
    texts = args.tokenizer_max_length
    return planning.Model(
        task=f"{TASKS[args.train_mode]} (the transformer takes {config['in_channels']} channels)",
        network=partial(cross_attention_network, config, text_tokens=texts, image_tokens=image_tokens),
        blocks=("blocks",),
    )


def load_components(args: argparse.Namespace, shift: float, accelerator: Accelerator) -> Components:
    """Loads the model: encoders frozen, the text encoder in the compute dtype, everything else in float32."""
    root, device = Path(args.pretrained_model_name_or_path), accelerator.device
    compute_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    transformer = wiring.open_transformer(args, accelerator, WanTransformer3DModel)
    load = wiring.encoder_loader(args, accelerator)
    encoders = {
        "vae": load(AutoencoderKLWan, Path(args.vae_path or root / "vae"), torch.float32),
        "text_encoder": load(UMT5EncoderModel, root / "text_encoder", compute_dtype),
    }
    if transformer.config.image_dim:
        encoders["image_encoder"] = load(CLIPVisionModel, root / "image_encoder", torch.float32)
    # loaded where it is needed: its import says that torchvision is missing, also to those who do not train on images
    pipeline_class = WanPipeline if args.train_mode == "normal" else diffusers.WanImageToVideoPipeline
    pipeline = pipeline_class.from_pretrained(root, transformer=None, **encoders)
    check_tokenizer(pipeline.tokenizer, root / "tokenizer", "A red fox, 2 years old, runs over the hill <3")
    resting = {
        name: RestingModule(encoder.requires_grad_(False).eval(), device, rests=args.low_vram)
        for name, encoder in encoders.items()
    }
    config = encoders["vae"].config
    return Components(
        transformer=transformer,
        text_encoder=resting["text_encoder"],
        image_encoder=resting.get("image_encoder"),
        vae=resting["vae"],
        pipeline=pipeline,
        latents_mean=torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1),
        latents_std=torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1),
        shift=shift,
    )


# --------------------------------------------------------------------------------------------- the family's part


@torch.no_grad()
def encode_prompts(
    components: Components, captions: Sequence[str], max_length: int, device: torch.device
) -> torch.Tensor:
    """Returns UMT5 embeddings [B, max_length, D], zeros past each caption's true length, as WanPipeline makes them."""
    with components.text_encoder.awake():
        embeds, _ = components.pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=max_length, device=device
        )
    return embeds


def encode_video(
    components: Components, video: torch.Tensor, keys: Sequence[int] | None, mini_batch: int
) -> torch.Tensor:
    """Returns normalised latents (z - mean) / std, float32 [B, 16, t, h, w], of a video [B, 3, T, H, W] in [-1, 1].

    keys draw the posterior's noise, one per sample; None takes its mode. mini_batch: samples per call of the VAE.
    """
    z = encode(components.vae, video, keys=keys, mini_batch=mini_batch)
    return (z - components.latents_mean) * (1 / components.latents_std)  # rounded as WanImageToVideoPipeline does


def encode_conditions(
    components: Components, video: torch.Tensor, mode: str, keys: Sequence[int], mini_batch: int
) -> dict[str, torch.Tensor]:
    """Returns what the model is given of the picture beside the prompt: nothing for text-to-video.

    condition [B, 20, t, h, w]: 4 mask channels and 16 of the known pixels' latents (the rest grey, the posterior's
    mode); image_embeds [B, N, D] of the first frame as far as it is known, zeros where nothing of it is.

    Args:
        video: [B, 3, T, H, W] in [-1, 1].
        mode: "normal" | "i2v" | "inpaint".
        keys: one per sample, for masks and dropped conditions.
        mini_batch: samples per call of the VAE.
    """
    if mode == "normal":
        return {}
    mask = known_mask(mode, keys, *video.shape[2:], device=video.device)
    known = encode_video(components, video * mask, None, mini_batch)
    keep = keep_condition(mask, keys).to(video.device)
    conditions = {"condition": torch.cat([pack_mask(mask), known], 1) * keep}
    if components.image_encoder is not None:
        conditions["image_embeds"] = encode_images(components, (video * mask)[:, :, 0], mask[:, :, 0])
    return conditions


@torch.no_grad()
def encode_images(components: Components, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns CLIP features [B, N, D] of images [B, 3, H, W] in [-1, 1], zeros where the mask [B, 1, H, W] is zero."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with components.image_encoder.awake():
        embeds = components.pipeline.encode_image([Image.fromarray(image) for image in pixels], images.device)
    return embeds * mask.amax((1, 2, 3)).view(-1, 1, 1)


def transformer_inputs(
    noisy_latents: torch.Tensor, sigmas: torch.Tensor, prompt_embeds: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Returns the keywords of WanTransformer3DModel: its timestep is 1000 sigma, float32 [B]."""
    condition = [conditions["condition"]] if "condition" in conditions else []
    return {
        "hidden_states": torch.cat([noisy_latents, *condition], 1),
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": prompt_embeds,
        "encoder_hidden_states_image": conditions.get("image_embeds"),
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
    prompt_embeds = encode_prompts(components, batch["captions"], args.tokenizer_max_length, device)
    conditions = encode_conditions(components, video, args.train_mode, keys, args.vae_mini_batch)

    del video  # as large as all activations of a block
    sigmas = wiring.draw_sigmas_of(args, batch, components.shift).to(device)
    noise = batch_noise([int(mix(key, Purpose.NOISE)) for key in keys], latents.shape[1:]).to(device)
    noisy_latents = add_noise(latents, noise, sigmas)
    target = noise - latents

    inputs = transformer_inputs(noisy_latents, sigmas, prompt_embeds, conditions)
    weights = torch.from_numpy(batch["weights"]).to(device)  # each planned sample's share of the global batch
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


def encode_held_out(
    args: argparse.Namespace, components: Components, samples: Iterable[tuple[np.ndarray, str]], device: torch.device
) -> list[HeldOut]:
    """Returns held-out samples in host memory: latents by the posterior's mode, a mask of the mode's for each."""
    encoded = []
    for number, (pixels, caption) in enumerate(samples):
        video = to_video(torch.from_numpy(pixels)[None].to(device))
        latents = encode_video(components, video, None, args.vae_mini_batch)
        given = encode_conditions(components, video, args.train_mode, [number], args.vae_mini_batch)
        given["prompt_embeds"] = encode_prompts(components, [caption], args.tokenizer_max_length, device)
        encoded.append(HeldOut(latents.cpu(), {name: value.cpu() for name, value in given.items()}))
    return encoded


def predict_held_out(
    components: Components, noisy_latents: torch.Tensor, timestep: torch.Tensor, sample: HeldOut
) -> torch.Tensor:
    """Returns the velocity for one held-out sample, as training computes it."""
    given = {name: value.to(noisy_latents.device) for name, value in sample.conditions.items()}
    sigmas = timestep / NUM_TRAIN_TIMESTEPS
    return components.transformer(**transformer_inputs(noisy_latents, sigmas, given["prompt_embeds"], given))[0]


@contextmanager
def sampling_pipeline(components: Components) -> Iterator[WanPipeline | diffusers.WanImageToVideoPipeline]:
    """Yields the pipeline with the transformer in training, its encoders on the device."""
    encoders = (components.text_encoder, components.image_encoder, components.vae)
    components.pipeline.transformer = components.transformer
    with ExitStack() as stack:
        for encoder in encoders:
            if encoder is not None:
                stack.enter_context(encoder.awake())
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
    model, shift = describe(args), read_shift(args.config_path)
    wiring.announce(args, accelerator, backend, run, model.task)

    # schedule: from here on, everything that will happen is known
    planned = wiring.open_schedule(args, accelerator, run, gather, model.cost)
    settings, state, total = planned.settings, planned.state, planned.total

    # model: float32 masters, computation in the accelerator's precision
    components = load_components(args, shift, accelerator)
    transformer = components.transformer
    engine, rate_at = wiring.open_engine(args, accelerator, backend, transformer, transformer.blocks, planned)
    components = replace(components, transformer=engine.network)  # as validation and sampling must call it
    if run.resume.path:
        engine.load(run.resume.path)

    # records, batches, looks at the model on the way
    watch = wiring.open_watch(args, accelerator, run, gather, planned, engine, {"shift": shift}, model.network)
    dataset, sampler, loader = wiring.open_data(args, accelerator, planned.index)
    held_out = encode_held_out(args, components, wiring.held_out_of(planned, dataset), accelerator.device)
    validate = wiring.open_validator(
        args, accelerator, backend, watch, planned, engine=engine, held_out=held_out, shift=shift,
        predict=partial(predict_held_out, components), guidance_scale=SAMPLING_GUIDANCE,
        pipeline=partial(sampling_pipeline, components),
    )  # fmt: skip
    save = partial(engine.save, state=state)
    about = {"task": f"wan2.1 {args.train_mode}", "backend": backend.name}
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
