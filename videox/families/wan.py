"""What the training scripts of the Wan models share: frozen encoders, cached outputs, and the transformer's inputs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import CLIPVisionConfig

from videox.data.dataset import Batch
from videox.device import to_device
from videox.diffusion.conditioning import keep_on_host, known_mask, known_pixels, pack_mask
from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS
from videox.distributed.accelerator import compute_dtype
from videox.encoders.clip_image import FirstPicture, SquashProcessor
from videox.encoders.encode import Encoder, EncoderInput, EncodingSpec, LazyEncoders, fixed_shape, latents_spec
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import VAE_DTYPES, clip_moments, encode_moments, latent_statistics, sample_latents, to_images
from videox.families import wan_ti2v
from videox.families.wan_names import CLASSES, CROP, SQUASH, pictures_of
from videox.models.compression import wan_ratios
from videox.models.configured import Component
from videox.models.folder import build_config, full_config, load_class, load_pipeline
from videox.models.scheduler import with_shift
from videox.models.tokenizer import load_tokenizer
from videox.run.checkpoint import read_manifest
from videox.shapes import USUAL, Ratios
from videox.training import frozen_encoders
from videox.training.context import Gather
from videox.training.validator import HeldOut

PROBE = "A red fox, 2 years old, runs over the hill <3"


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders, and diffusers' pipeline over them, for prompts and sample clips."""

    text_encoder: OffloadedModule
    image_encoder: OffloadedModule | None
    vae: OffloadedModule
    pipeline: Any  # WanPipeline, or with images WanImageToVideoPipeline


@dataclass(frozen=True)
class Wan:
    """What a training step needs of the model; latents_mean, latents_std: per channel, [1, C, 1, 1, 1]."""

    transformer: Any  # WanTransformer3DModel, or what the engine makes of it
    encoders: LazyEncoders[Encoders]
    encode: Encoder
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    shift: float
    ratios: Ratios
    pictures: int = 1  # of a clip, whose CLIP features the transformer attends to

    @property
    def channels(self) -> int:
        """The channels C of a latent: 16, of Wan2.2 TI2V-5B 48."""
        return self.latents_mean.shape[1]

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """(z - mean) / std, with the rounding of WanImageToVideoPipeline."""
        return (z - self.latents_mean) * (1 / self.latents_std)


def build_pipeline(
    args: argparse.Namespace, components: dict[str, Component], shift: float, encoders: dict[str, Any]
) -> WanPipeline | diffusers.WanImageToVideoPipeline:
    """diffusers' pipeline over these encoders, without a transformer; its scheduler has the flow shift of the run."""
    # WanImageToVideoPipeline warns on import that torchvision is missing: import it only for training on images.
    text_only = {"normal": WanPipeline, "ti2v": wan_ti2v.TextOrImagePipeline}
    pipeline_class = text_only.get(args.train_mode) or diffusers.WanImageToVideoPipeline
    if "scheduler" in components:
        # A second transformer, which Wan2.2 has, is never read here: the script of Wan2.2 loads it for sampling.
        parts = {"transformer_2": None, **encoders}
        pipeline = load_pipeline(pipeline_class, components["scheduler"].path.parent, parts)
        pipeline.register_modules(scheduler=with_shift(pipeline.scheduler, shift))
        if squashes(components):
            pipeline.register_modules(image_processor=squash_processor(components, pipeline.image_processor))
        return show_first_picture(args, components, pipeline)
    modules: dict[str, Any] = {}
    if "image_encoder" in components:
        side = components["image_encoder"].count("image_size")
        crop = {"height": side, "width": side}
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
        modules["image_processor"] = squash_processor(components, processor) if squashes(components) else processor
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    if args.train_mode == "ti2v":
        modules["expand_timesteps"] = True
    pipeline = pipeline_class(**modules, **encoders, scheduler=scheduler, transformer=None)
    return show_first_picture(args, components, pipeline)


def show_first_picture(args: argparse.Namespace, components: dict[str, Component], pipeline: Any) -> Any:  # noqa: ANN401 - of diffusers
    """Let CLIP see the first picture alone in clips between two, for a model that takes features of one; return it."""
    alone = args.train_mode == "flf2v" and pictures_of(components["transformer"].config) == 1
    if alone and "image_encoder" in components:
        pipeline.register_modules(image_processor=FirstPicture(pipeline.image_processor))
    return pipeline


def squashes(components: dict[str, Component]) -> bool:
    """Whether the picture that CLIP sees is resized to a square, as in Wan's own code."""
    return "image_processor" in components and components["image_processor"].config["clip_image"] == SQUASH


def squash_processor(components: dict[str, Component], processor: transformers.CLIPImageProcessor) -> SquashProcessor:
    """What makes CLIP's picture as Wan's own code does; processor: has the mean and deviation of each channel."""
    side = components["image_encoder"].count("image_size")
    return SquashProcessor(side, processor.image_mean, processor.image_std)


def choose_clip_image(asked: str | None, path: Path, *, original: bool, checkpoint: Path | None = None) -> Component:
    """How CLIP's picture is made, as a component of a model with an image encoder.

    Args:
        asked: --clip_image; None = as the inference of the model's layout does.
        path: of the image processor.
        original: the model has Wan's original layout.
        checkpoint: to resume from; a run keeps what it began with, and older versions cropped.
    """
    chosen = asked or (SQUASH if original else CROP)
    if checkpoint is not None:
        chosen = str(read_manifest(checkpoint)["description"].get("clip_image", CROP))
    return Component(path, {"clip_image": chosen})


def load_encoders(
    args: argparse.Namespace, components: dict[str, Component], shift: float, accelerator: Accelerator, gather: Gather
) -> Encoders:
    """Load the frozen encoders: text in the compute dtype, the VAE in --vae_dtype, the image encoder in float32."""
    load = partial(frozen_encoders.load, args, accelerator, gather)
    dtypes = {"vae": VAE_DTYPES[args.vae_dtype], "text_encoder": compute_dtype(accelerator)}
    dtypes["image_encoder"] = torch.float32
    text_encoder = load_class(CLASSES["text_encoder"]), components["text_encoder"]
    tokenizer = load_tokenizer(components["tokenizer"].path, *text_encoder, PROBE)
    modules: dict[str, Any] = {
        n: load(n, CLASSES[n], components[n], dtype) for n, dtype in dtypes.items() if n in components
    }
    if args.vae_tiling:
        modules["vae"].enable_tiling()
    pipeline = build_pipeline(args, components, shift, {**modules, "tokenizer": tokenizer})
    offloaded = {n: OffloadedModule(m, accelerator.device, offload=args.low_vram) for n, m in modules.items()}
    return Encoders(offloaded["text_encoder"], offloaded.get("image_encoder"), offloaded["vae"], pipeline)


def build_model(
    components: dict[str, Component], shift: float, transformer: torch.nn.Module, encoders: LazyEncoders[Encoders],
    encode: Encoder,
) -> Wan:  # fmt: skip
    """What a training step needs of the model; no encoder is loaded."""
    mean, std = latent_statistics(full_config(AutoencoderKLWan, components["vae"].config), encode.device)
    pictures = pictures_of(components["transformer"].config)
    return Wan(transformer, encoders, encode, mean, std, shift, wan_ratios(components), pictures)


@torch.no_grad()
def encode_captions(encoders: LazyEncoders[Encoders], max_length: int, inputs: EncoderInput) -> torch.Tensor:
    """UMT5 embeddings [B, max_length, D], zeros past each caption's length, as WanPipeline computes them.

    Each caption is encoded alone, so that its embedding is bitwise independent of the other captions of a batch.
    """
    encoder, pipeline = encoders().text_encoder, encoders().pipeline
    settings = {"do_classifier_free_guidance": False, "max_sequence_length": max_length}
    with encoder.on_device():
        embeds = [pipeline.encode_prompt([c], device=encoder.device, **settings)[0] for c in inputs.captions]
    return torch.cat(embeds)


def encode_known(
    encoders: LazyEncoders[Encoders], mode: str, mini_batch: int, inputs: EncoderInput, ratios: Ratios = USUAL
) -> torch.Tensor:
    """Moments of the VAE's posterior for the known pixels, float32 [B, 2 C, t, h, w]; only their mean is used."""
    pixels, _ = known_pixels(mode, inputs.video, inputs.variants, ratios)
    return encode_moments(encoders().vae, pixels, mini_batch=mini_batch)


@torch.no_grad()
def encode_first_frames(
    encoders: LazyEncoders[Encoders], mode: str, inputs: EncoderInput, pictures: int = 1, ratios: Ratios = USUAL
) -> torch.Tensor:
    """CLIP features [B, N, D] of the known pixels of the first frames; zeros where nothing of a video is known.

    With two pictures [B, 2 N, D], of the first and the last frames.
    """
    encoder, pipeline = encoders().image_encoder, encoders().pipeline
    assert encoder is not None  # a model without one has no such features to encode
    video, mask = known_pixels(mode, inputs.video, inputs.variants, ratios)
    with encoder.on_device():
        frames = [to_images(video[:, :, frame]) for frame in (0, -1)[:pictures]]
        embeds = [pipeline.encode_image([*images], video.device).flatten(0, 1) for images in zip(*frames, strict=True)]
    return torch.stack(embeds) * mask[:, :, 0].amax((1, 2, 3)).view(-1, 1, 1)


def encoding_specs(
    args: argparse.Namespace, components: dict[str, Component], encoders: LazyEncoders[Encoders], dtype: torch.dtype
) -> list[EncodingSpec]:
    """How the encoder outputs of a sample are computed and cached; dtype: of text embeddings.

    moments: of the VAE's posterior; prompt_embeds; with images also known: the mode of the posterior of the known
    pixels, and image_embeds: of the known pixels of the first frame, for models that take them; in the mode ti2v
    first_frame: the mode of the posterior of the first frame.
    """
    config, mode, length = components["transformer"].config, args.train_mode, args.tokenizer_max_length
    vae, text = (components["vae"].path,), (components["text_encoder"].path, components["tokenizer"].path)
    video = partial(clip_moments, encoders, args.vae_mini_batch)
    captions, ratios = partial(encode_captions, encoders, length), wan_ratios(components)
    latents = partial(latents_spec, vae_dtype=args.vae_dtype, ratios=ratios)
    channels = full_config(AutoencoderKLWan, components["vae"].config).z_dim
    specs = [
        latents("moments", ("clip",), video, channels * (2 if args.vae_sample_mode == "sample" else 1), vae),
        EncodingSpec(
            "prompt_embeds", ("caption",), captions, fixed_shape(length, config["text_dim"]), dtype, text,
            frozen_encoders.text_settings(args, length), padded=True, module="text_encoder",
        ),
    ]  # fmt: skip
    if mode == "ti2v" and args.i2v_ratio > 0:  # encoded alone, as at inference
        first = partial(clip_moments, encoders, args.vae_mini_batch, frames=1)
        specs.append(latents("first_frame", ("frame",), first, channels, vae, first_only=True))
    if mode not in wan_ti2v.WITHOUT_CONDITION:
        known = partial(encode_known, encoders, mode, args.vae_mini_batch, ratios=ratios)
        specs.append(latents("known", ("clip", "mask"), known, channels, vae))
    if config.get("image_dim"):
        clip = build_config(CLIPVisionConfig, components["image_encoder"])
        tokens, pictures = (clip.image_size // clip.patch_size) ** 2 + 1, pictures_of(config)
        shape, both = fixed_shape(tokens * pictures, clip.hidden_size), pictures == 2
        encode = partial(encode_first_frames, encoders, mode, pictures=pictures, ratios=ratios)
        weights = (components["image_encoder"].path, components["tokenizer"].path.parent / "image_processor")
        settings = " ".join(["first and last"] * both + [SQUASH] * squashes(components))
        specs.append(EncodingSpec(
            "image_embeds", ("clip" if both else "frame", "mask"), encode, shape, torch.float32, weights, settings,
            module="image_encoder",
        ))  # fmt: skip
    return specs


def encode_batch(
    args: argparse.Namespace, wan: Wan, batch: Batch, keys: Sequence[int] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Normalised latents (z - mean) / std, float32 [B, C, t, h, w], and the other inputs of the transformer.

    These are prompt_embeds [B, L, D]; in the mode ti2v also those of wan_ti2v.given_frame; in the others, except for
    text-to-video, condition [B, 20, t, h, w], 4 mask channels and 16 of the known pixels' latents, and image_embeds
    [B, N, D] for models that take them, or [2 B, N, D] of two pictures.

    Args:
        keys: one per sample, draw the posterior's noise; None takes its mode.
    """
    encoded = {name: torch.stack(tensors) for name, tensors in wan.encode(batch).items()}
    given = {"prompt_embeds": encoded["prompt_embeds"]}
    if args.train_mode == "ti2v":
        moments = encoded["moments"][:, : wan.channels]
        first = wan.normalise(encoded.get("first_frame", moments[:, :, :1]))  # without one, none is given
        given |= wan_ti2v.given_frame(first, moments.shape[2], batch, args.i2v_ratio, wan.ratios.patch)
    elif args.train_mode != "normal":
        frames, device = (args.train_mode, batch["variants"]), wan.latents_mean.device
        mask = known_mask(*frames, *batch["bucket"], device=device, ratios=wan.ratios)
        keep = to_device(keep_on_host(*frames, batch["bucket"], batch["keys"], wan.ratios), device)
        # keep: 0 drops the condition of 90 % of the images without known pixels: they train text-to-image
        given["condition"] = torch.cat([pack_mask(mask, wan.ratios), wan.normalise(encoded["known"])], 1) * keep
    if "image_embeds" in encoded:
        # the transformer takes the two pictures of a sample as two rows
        given["image_embeds"] = encoded["image_embeds"].unflatten(1, (wan.pictures, -1)).flatten(0, 1)
    return wan.normalise(sample_latents(encoded["moments"], wan.channels, keys)), given


def transformer_inputs(
    noisy_latents: torch.Tensor, sigmas: torch.Tensor, given: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Keywords of WanTransformer3DModel; its timestep is 1000 sigma, float32 [B], in the mode ti2v [B, tokens]."""
    if "token_generated" in given:
        return wan_ti2v.transformer_inputs(noisy_latents, sigmas, given)
    condition = [given["condition"]] if "condition" in given else []
    return {
        "hidden_states": torch.cat([noisy_latents, *condition], 1),
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": given["prompt_embeds"],
        "encoder_hidden_states_image": given.get("image_embeds"),
        "return_dict": False,
    }


def predict_held_out(wan: Wan, noisy_latents: torch.Tensor, timestep: torch.Tensor, sample: HeldOut) -> torch.Tensor:
    """The velocity prediction for one held-out sample, as in training."""
    given = {name: value.to(noisy_latents.device) for name, value in sample.conditions.items()}
    return wan.transformer(**transformer_inputs(noisy_latents, timestep / NUM_TRAIN_TIMESTEPS, given))[0]


@contextmanager
def sampling_pipeline(wan: Wan) -> Iterator[WanPipeline | diffusers.WanImageToVideoPipeline]:
    """The pipeline with the transformer in training; --low_vram: an encoder is on the device while it is called."""
    with wan.encoders.temporary() as encoders, ExitStack() as stack:
        for encoder in (encoders.text_encoder, encoders.image_encoder, encoders.vae):
            if encoder is not None:
                stack.enter_context(encoder.on_calls())
        encoders.pipeline.transformer = wan.transformer
        yield encoders.pipeline
        encoders.pipeline.transformer = None
