"""Small HunyuanVideo models for the demo and the tests: the real classes with random weights, no download."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model import VOCABULARY_TEXT, clip_image_processor, clip_vision_config, seeded, shrink_posterior_variance
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

# Fields of HunyuanSizes for a training whose loss falls within a minute.
HUNYUAN_DEMO = {
    "heads": 4,
    "rope_axes": (8, 8, 8),
    "layers": 2,
    "single_layers": 2,
    "text_dim": 64,
    "pooled_dim": 32,
    "vae_dim": 16,
}

LLAMA_SPECIALS = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<pad>",
    "extra_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"],
}
# Llama 3's pre-tokenization: the regular expression that splits text before the vocabulary look-up.
LLAMA_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATES = (
    pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE,
    pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE,
)
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
IMAGE_SIZE = (
    336  # pixels per side: with patches of 14, this gives the 576 image tokens that the pipeline's template expects
)


def build_llama_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with Llama 3's pre-tokenization and special tokens; unknown words become bytes.

    The pipelines remove a fixed number of tokens, those before the caption, from the encoded template. Every word of
    the templates is one token here, as in Llama 3, so that exactly the tokens before the caption are removed and an
    empty caption leaves one token.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    extra = LLAMA_SPECIALS["extra_special_tokens"]
    specials = [LLAMA_SPECIALS[name] for name in ("bos_token", "eos_token", "pad_token")] + extra
    texts = [
        text for template in TEMPLATES for text in re.split("|".join(map(re.escape, specials)), template["template"])
    ]
    words = sorted({word for line in VOCABULARY_TEXT for word in re.findall(r"\w+", line)})
    texts += [
        text for word in words for text in (word, f" {word}")
    ]  # the first word of a caption has no space before it
    pieces = dict.fromkeys(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    vocabulary = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    begin = LLAMA_SPECIALS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", model_max_length=8192, **LLAMA_SPECIALS
    )


def build_clip_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer with one token for each word of VOCABULARY_TEXT; other words become characters."""
    blank = CLIPTokenizer().backend_tokenizer
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{character}</w>" for character in characters]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    # The word-final characters are passed explicitly. Otherwise the trainer numbers them in an order that changes
    # between runs, and uses these numbers to choose between equally frequent pairs.
    trainer = trainers.BpeTrainer(
        end_of_word_suffix="</w>", initial_alphabet=characters, special_tokens=ends, show_progress=False
    )
    trained.train_from_iterator(VOCABULARY_TEXT, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    pieces = [*characters, *ends, *("".join(merge) for merge in merges), *CLIP_SPECIALS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@dataclass(frozen=True)
class HunyuanSizes:
    """Sizes of a small HunyuanVideo. The defaults give about 96 thousand parameters in the transformer.

    Attributes:
        heads: attention heads of the transformer; its width is heads * sum(rope_axes).
        rope_axes: channels per head of the rotary embeddings for time, height and width, each even.
        layers: number of dual-stream transformer blocks.
        single_layers: number of single-stream transformer blocks.
        refiner_layers: number of blocks that refine the prompt embeddings.
        text_dim: width of the Llama and of the prompt embeddings, a multiple of 4.
        text_layers: layers of the Llama, at least 3: the embeddings are taken two layers before the last.
        pooled_dim: width of the CLIP text encoder and of the pooled prompt embedding, a multiple of 2.
        vae_dim: channels of the video VAE, a multiple of 4.
        flow_shift: timestep shift of the scheduler.
        seed: seed of the random weights; equal arguments give equal files.
        image_dim: width of the image encoder of a Llava around the Llama, a multiple of 2; None for a plain Llama.
        image_condition_type: condition type of the transformer: None, token_replace or latent_concat. With
            latent_concat it has 16 input channels for the condition and 1 for its mask in addition to the noisy ones,
            and no guidance.
    """

    heads: int = 2
    rope_axes: tuple[int, int, int] = (4, 4, 4)
    layers: int = 2
    single_layers: int = 2
    refiner_layers: int = 1
    text_dim: int = 16
    text_layers: int = 3
    pooled_dim: int = 8
    vae_dim: int = 8
    flow_shift: float = 7.0
    seed: int = 0
    image_dim: int | None = None
    image_condition_type: str | None = None


def hunyuan_components(**sizes: int | float | str | tuple[int, int, int] | None) -> dict[str, Any]:
    """Return the components that both HunyuanVideo pipelines share, by argument name, with random float32 weights.

    The architecture is the published one (16 latent channels, 4x8x8 compression, patches of 1x2x2, Llama and CLIP text
    encoders, flow-matching Euler scheduler); only widths and depths are small.

    Args:
        sizes: fields of HunyuanSizes.
    """
    size = HunyuanSizes(**sizes)
    llama, clip = build_llama_tokenizer(), build_clip_tokenizer()
    with seeded(size.seed):  # the order of construction determines the weights
        return {
            "text_encoder": llama_text_encoder(size, llama),
            "tokenizer": llama,
            "text_encoder_2": clip_text_encoder(size, clip),
            "tokenizer_2": clip,
            "vae": hunyuan_vae(size),
            "transformer": hunyuan_transformer(size),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=size.flow_shift),
        }


def llama_text_encoder(
    size: HunyuanSizes, tokenizer: PreTrainedTokenizerFast
) -> LlamaModel | LlavaForConditionalGeneration:
    """Return the Llama for the tokenizer, inside a Llava if image_dim is set."""
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_dim,
        intermediate_size=2 * size.text_dim,
        num_hidden_layers=size.text_layers,
        num_attention_heads=2,
        max_position_embeddings=8192,
        # Llama's 0.02 is meant for a width of 4096; at small widths, the embeddings would be close to 0
        initializer_range=size.text_dim**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if size.image_dim is None:
        return LlamaModel(language)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=language,
            vision_config=clip_vision_config(width=size.image_dim, layers=2, image_size=IMAGE_SIZE),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,  # the pipeline reads it here, not in text_config
        )
    )


def clip_text_encoder(size: HunyuanSizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the CLIP text encoder for the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.pooled_dim,
            intermediate_size=2 * size.pooled_dim,
            projection_dim=size.pooled_dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def hunyuan_vae(size: HunyuanSizes) -> AutoencoderKLHunyuanVideo:
    """Return a video VAE with a small posterior variance."""
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=16, block_out_channels=(size.vae_dim,) * 4, layers_per_block=1, norm_num_groups=4
    )
    shrink_posterior_variance(vae)
    return vae


def hunyuan_transformer(size: HunyuanSizes) -> HunyuanVideoTransformer3DModel:
    """Return the transformer."""
    concat = size.image_condition_type == "latent_concat"
    return HunyuanVideoTransformer3DModel(
        in_channels=33 if concat else 16,
        out_channels=16,
        num_attention_heads=size.heads,
        attention_head_dim=sum(size.rope_axes),
        num_layers=size.layers,
        num_single_layers=size.single_layers,
        num_refiner_layers=size.refiner_layers,
        guidance_embeds=not concat,
        text_embed_dim=size.text_dim,
        pooled_projection_dim=size.pooled_dim,
        rope_axes_dim=size.rope_axes,
        image_condition_type=size.image_condition_type,
    )


def build_hunyuan_t2v(folder: Path, **sizes: int | float | tuple[int, int, int]) -> Path:
    """Write a text-to-video HunyuanVideo with random weights in the diffusers folder layout and return the folder.

    Args:
        folder: created if it does not exist; model_index.json and one folder per component are written into it.
        sizes: fields of HunyuanSizes, including the seed.
    """
    HunyuanVideoPipeline(**hunyuan_components(**sizes)).save_pretrained(folder)
    return folder


def build_hunyuan_i2v(
    folder: Path,
    *,
    image_condition_type: str = "token_replace",
    image_dim: int = 8,
    **sizes: int | float | tuple[int, int, int],
) -> Path:
    """Write an image-to-video HunyuanVideo with random weights in the diffusers folder layout and return the folder.

    Args:
        folder: created if it does not exist; model_index.json and one folder per component are written into it.
        image_condition_type: how the transformer receives the first frame: token_replace (it replaces the noisy first
            latent frame) or latent_concat (as additional input channels).
        image_dim: width of the Llava's image encoder, a multiple of 2.
        sizes: other fields of HunyuanSizes.
    """
    components = hunyuan_components(image_condition_type=image_condition_type, image_dim=image_dim, **sizes)
    components["image_processor"] = clip_image_processor(IMAGE_SIZE)
    HunyuanVideoImageToVideoPipeline(**components).save_pretrained(folder)
    return folder


def calibrate_scaling_factor(folder: Path, clips: torch.Tensor) -> None:
    """Set scaling_factor in a built model's VAE config so that the latents of these clips have standard deviation 1.

    The published value belongs to the published VAE. With random weights, it would give latents far from the unit
    variance that flow matching assumes.

    Args:
        folder: as returned by build_hunyuan_t2v or build_hunyuan_i2v; vae/config.json is overwritten.
        clips: [N, 3, T, H, W] float in [-1, 1].
    """
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_config(folder / "vae")
