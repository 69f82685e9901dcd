"""Small Wan2.1 models for the demo and the tests: the real diffusers classes with random weights, no download."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in UMT5's tokenizer
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark for the beginning of a word
CHARACTERS = [chr(code) for code in range(33, 127)]
LOG_VARIANCE = -10.0  # of the VAE's posterior
CHARACTER_SCORE = -20.0  # log-probability of a single character, lower than that of every word

# Fields of WanSizes for a training that learns three clips within minutes on a CPU.
WAN_DEMO = {"heads": 4, "head_dim": 32, "layers": 4, "ffn_dim": 256, "text_dim": 64, "vae_dim": 6}
TRAINED_VAE = Path(__file__).resolve().parents[1] / "config/demo/vae"  # made by train_demo_vae.py

VOCABULARY_TEXT = """
a large gray rabbit comes out of its burrow and stretches, a rabbit walks out in the morning light under a tree
a rabbit holds up its arm on a green meadow, looks up and lets its arms fall while leaves move in the wind
a white butterfly lands on a flower and the camera moves slowly to the left
people ride bikes through a city street on a sunny day, the roof of a bus is seen from above
a man in a dark suit between waiting cars, then the sign of a taxi, a bus goes by behind a black taxi
a man waits on his bike beside a taxi, cars drive by behind a bike that is locked to a fence
people walk by an old bike that leans on a wall, a group of cyclists turns around a corner
a man with a red bow tie talks in a car to the camera, looks surprised and looks around at the trees behind the window
a portrait of a woman in an orange space suit in front of a flag and a model of a shuttle
a ginger cat with green eyes looks into the camera, close up of its fur and ears
a cup of black coffee on a wooden table with a spoon beside it, seen from above
a rocket lifts off at night with a bright flame and smoke around the launch tower
a bright square moves over a dark background from one side to the other
a slow pan over mountains, a river, the sea, a beach, a forest and a snowy field
two dogs run after a red ball on the grass, a child laughs and claps
rain falls on a quiet street at night, lights of shops shine on the wet ground
blurry, low quality, static, worst quality, jpeg artifacts, ugly, still picture, walking backwards
""".strip().splitlines()


def build_tokenizer() -> T5TokenizerFast:
    """Return a T5 tokenizer (Unigram) with one token for each word of VOCABULARY_TEXT; other words become characters.

    The score of a token is the logarithm of the word's relative frequency in the text, as in a trained Unigram model,
    and much lower for a single character. The tokenizers library's own trainer is not used: it sums in an order that
    changes between runs, so that equal arguments would not give equal files.
    """
    words = Counter(word for line in VOCABULARY_TEXT for word in re.findall(r"\w+", line))
    total = sum(words.values())
    pieces = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, 0.0)]
    pieces += [(f"{SPACE}{word}", math.log(count / total)) for word, count in sorted(words.items())]
    pieces += [(character, CHARACTER_SCORE) for character in [SPACE, *CHARACTERS]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return T5TokenizerFast(
        tokenizer_object=tokenizer, extra_ids=0, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=512
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside the context; the global random state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class WanSizes:
    """Sizes of a small Wan2.1. The defaults give about 28 thousand parameters in the transformer.

    Attributes:
        heads: attention heads of the transformer; its width is heads * head_dim.
        head_dim: channels per head, even and at least 6 (rotary embeddings split it into time, height and width).
        layers: number of transformer blocks.
        ffn_dim: hidden width of the feed-forward part of each block.
        text_dim: width of the text encoder and of the prompt embeddings.
        text_layers: layers of the text encoder.
        vae_dim: base channels of the video VAE.
        flow_shift: timestep shift of the scheduler.
        seed: seed of the random weights; equal arguments give equal files.
        condition_channels: input channels of the transformer in addition to the 16 noisy ones.
        image_dim: width of the image embeddings that the transformer attends to; None for no image embeddings.
        image_positions: tokens of the two images of a first-and-last-frame model, each with a position of its own.
        residual_vae: the VAE of Wan2.2 TI2V-5B, with 48 latent channels and 4x16x16 compression.
    """

    heads: int = 2
    head_dim: int = 12
    layers: int = 2
    ffn_dim: int = 32
    text_dim: int = 32
    text_layers: int = 2
    vae_dim: int = 3
    flow_shift: float = 3.0
    seed: int = 0
    condition_channels: int = 0
    image_dim: int | None = None
    image_positions: int | None = None
    residual_vae: bool = False

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, as published."""
        return 48 if self.residual_vae else 16


def wan_components(**sizes: int | float | None) -> dict[str, Any]:
    """Return the components that both Wan2.1 pipelines share, by argument name, with random float32 weights.

    The architecture is the published one (16 latent channels, 4x8x8 compression, patches of 1x2x2, UMT5 text encoder,
    flow-matching UniPC scheduler); only widths and depths are small.

    Args:
        sizes: fields of WanSizes.
    """
    size = WanSizes(**sizes)
    tokenizer = build_tokenizer()
    with seeded(size.seed):  # the order of construction determines the weights
        return {
            "tokenizer": tokenizer,
            "text_encoder": wan_text_encoder(size, tokenizer),
            "vae": wan_vae(size),
            "transformer": wan_transformer(size),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                num_train_timesteps=1000,
                flow_shift=size.flow_shift,
            ),
        }


def wan_text_encoder(size: WanSizes, tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """Return a UMT5 text encoder for the tokenizer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=size.text_dim,
            d_kv=8,
            d_ff=2 * size.text_dim,
            num_layers=size.text_layers,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def wan_vae(size: WanSizes) -> AutoencoderKLWan:
    """Return a video VAE with a small posterior variance."""
    channels = size.latent_channels
    residual = {
        "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
        "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels,
    }  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=size.vae_dim,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **(residual if size.residual_vae else {}),
    )
    shrink_posterior_variance(vae)
    return vae


def shrink_posterior_variance(vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo) -> None:
    """Set the log-variance of a VAE to LOG_VARIANCE.

    A trained VAE has a small variance, too; with the variance of random weights, latents would be mostly noise.
    """
    with torch.no_grad():
        channels = vae.quant_conv.weight.shape[0] // 2
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = LOG_VARIANCE


def wan_transformer(size: WanSizes) -> WanTransformer3DModel:
    """Return the transformer."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=size.latent_channels + size.condition_channels,
        out_channels=size.latent_channels,
        text_dim=size.text_dim,
        freq_dim=256,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=size.image_dim,
        added_kv_proj_dim=None if size.image_dim is None else size.heads * size.head_dim,
        rope_max_seq_len=1024,
        pos_embed_seq_len=size.image_positions,
    )
    if size.image_positions is not None:  # zeros in a new model: a wrong use of them would change nothing
        torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    return transformer


def build_wan_t2v(folder: Path, **sizes: int | float) -> Path:
    """Write a text-to-video Wan2.1 with random weights in the diffusers folder layout and return the folder.

    Args:
        folder: created if it does not exist; model_index.json and one folder per component are written into it.
        sizes: fields of WanSizes, including the seed.
    """
    WanPipeline(**wan_components(**sizes)).save_pretrained(folder)
    return folder


def build_wan_i2v(
    folder: Path,
    *,
    image_embedder: bool = True,
    image_dim: int = 32,
    image_layers: int = 2,
    image_size: int = 56,
    both_frames: bool = False,
    seed: int = 0,
    **sizes: int | float,
) -> Path:
    """Write an image-to-video Wan2.1 with random weights in the diffusers folder layout and return the folder.

    The transformer's input has 16 noisy channels, 4 mask channels and 16 channels of the encoded condition. With an
    image embedder, as published, it also attends to a CLIP image embedding.

    Args:
        folder: created if it does not exist; model_index.json and one folder per component are written into it.
        image_embedder: whether there is a CLIP image encoder. Without one, model_index.json has null for it and for
            its processor, and the transformer has no weights for it.
        image_dim: width of the image encoder and of its embeddings, a multiple of 2.
        image_layers: layers of the image encoder, at least 2: the embeddings are taken before the last layer.
        image_size: side in pixels of the image encoder's input, a multiple of the patch size 14; the published 224
            gives 257 tokens.
        both_frames: a first-and-last-frame model, which attends to the embeddings of two images.
        seed: seed of the random weights; equal arguments give equal files.
        sizes: other fields of WanSizes.
    """
    components = wan_components(
        condition_channels=20, image_dim=image_dim if image_embedder else None, seed=seed,
        image_positions=2 * ((image_size // 14) ** 2 + 1) if both_frames else None, **sizes,
    )  # fmt: skip
    if image_embedder:
        with seeded(seed):
            components["image_encoder"] = CLIPVisionModel(
                clip_vision_config(width=image_dim, layers=image_layers, image_size=image_size)
            )
        components["image_processor"] = clip_image_processor(image_size)
    WanImageToVideoPipeline(**components).save_pretrained(folder)
    return folder


def build_wan22(folder: Path, *, images: bool = False, seed: int = 0, **sizes: int | float) -> Path:
    """Write a Wan2.2 with random weights in the diffusers folder layout and return the folder.

    It has two transformers, for high and for low noise, with the published boundary between them.

    Args:
        folder: created if it does not exist; model_index.json and one folder per component are written into it.
        images: whether it is an image-to-video model, whose transformers take 20 channels more and no image embedding.
        seed: seed of the random weights; equal arguments give equal files.
        sizes: other fields of WanSizes.
    """
    size = {**sizes, "condition_channels": 20 if images else 0}
    components = wan_components(seed=seed, **size)
    with seeded(seed + 1):
        components["transformer_2"] = wan_transformer(WanSizes(seed=seed, **size))
    kind, boundary = (WanImageToVideoPipeline, 0.9) if images else (WanPipeline, 0.875)
    kind(**components, boundary_ratio=boundary).save_pretrained(folder)
    return folder


def build_wan22_demo(folder: Path, *, images: bool) -> Path:
    """Write the Wan2.2 of the demo, whose two experts begin with the same weights, and return the folder.

    Args:
        folder: as for build_wan22.
        images: as for build_wan22.
    """
    build_wan22(folder, images=images, **WAN_DEMO)
    shutil.copytree(folder / "transformer", folder / "transformer_2", dirs_exist_ok=True)
    return folder


def build_wan22_5b(folder: Path, *, seed: int = 0, **sizes: float) -> Path:
    """Write a Wan2.2 TI2V-5B with random weights in the diffusers folder layout and return the folder.

    It has one transformer, which takes a timestep for each token, and a VAE with 4x16x16 compression.

    Args:
        folder: created if it does not exist; model_index.json and one folder per component are written into it.
        seed: seed of the random weights; equal arguments give equal files.
        sizes: other fields of WanSizes; with residual_vae=False it has the channels and compression of Wan2.1.
    """
    components = wan_components(seed=seed, **{"vae_dim": 4, "flow_shift": 5.0, "residual_vae": True, **sizes})
    WanPipeline(**components, expand_timesteps=True).save_pretrained(folder)
    return folder


def clip_vision_config(*, width: int, layers: int, image_size: int) -> CLIPVisionConfig:
    """Return the configuration of a CLIP image encoder with patches of 14 x 14 pixels, as published."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )


def clip_image_processor(image_size: int) -> CLIPImageProcessor:
    """Return CLIP's preprocessing: shortest side to image_size, center crop, CLIP's mean and standard deviation."""
    return CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def calibrate_latents(folder: Path, clips: torch.Tensor) -> None:
    """Set latents_mean and latents_std in a built model's VAE config to the statistics of these clips.

    The published values belong to the published VAE. With random weights, they would give latents far from the unit
    variance that flow matching assumes.

    Args:
        folder: as returned by build_wan_t2v or build_wan_i2v; vae/config.json is overwritten.
        clips: [N, 3, T, H, W] float in [-1, 1].
    """
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )
    vae.save_config(folder / "vae")


def use_trained_vae(folder: Path) -> None:
    """Replace the VAE of a built model with the trained one of config/demo/vae; it is stored in float32.

    Args:
        folder: as returned by build_wan_t2v or build_wan_i2v; vae/ is overwritten.
    """
    AutoencoderKLWan.from_pretrained(TRAINED_VAE, torch_dtype=torch.float32).save_pretrained(folder / "vae")
