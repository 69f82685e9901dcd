"""Serves the demo and the tests: small HunyuanVideo of the real classes, with random weights and no download."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from demo_model import LOG_VARIANCE, VOCABULARY_TEXT, clip_image_processor, clip_vision_config, seeded
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

# Sizes for a training that shows something in a minute: the transformer is as wide as that of WAN_DEMO.
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
# How Llama 3 cuts text into pieces, before it looks any of them up.
LLAMA_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATES = (
    pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE,
    pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE,
)
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
IMAGE_SIZE = 336  # pixels a side: with patches of 14 the 576 image tokens that the pipeline's template has room for


def build_llama_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with Llama 3's pieces and specials; a piece that it does not know is spelled.

    The pipelines cut a fixed number of tokens, those before the caption, from the encoded template. Every piece of
    the templates is one token here, as it is in Llama 3, so that the cut falls where it falls there and an empty
    caption leaves one token.
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
        part for template in TEMPLATES for part in re.split("|".join(map(re.escape, specials)), template["template"])
    ]
    words = sorted({word for line in VOCABULARY_TEXT for word in re.findall(r"\w+", line)})
    texts += [text for word in words for text in (word, f" {word}")]  # a caption's first word has no space before it
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
    """Returns a CLIP tokenizer with a token for each word of the page of captions; other words are spelled."""
    blank = CLIPTokenizer().backend_tokenizer
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{character}</w>" for character in characters]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    # The ends are named: the trainer would number those it meets in an order that changes between runs, and then
    # choose between pairs that are equally frequent by these numbers.
    trainer = trainers.BpeTrainer(
        end_of_word_suffix="</w>", initial_alphabet=characters, special_tokens=ends, show_progress=False
    )
    trained.train_from_iterator(VOCABULARY_TEXT, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    pieces = [*characters, *ends, *("".join(merge) for merge in merges), *CLIP_SPECIALS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def text_encoders(
    *,
    text_dim: int,
    text_layers: int,
    pooled_dim: int,
    image_dim: int | None,
    llama: PreTrainedTokenizerFast,
    clip: CLIPTokenizer,
) -> tuple[LlamaModel | LlavaForConditionalGeneration, CLIPTextModel]:
    """Returns the Llama (inside a Llava when image_dim is given) and the CLIP text encoder for these tokenizers."""
    language = LlamaConfig(
        vocab_size=len(llama),
        hidden_size=text_dim,
        intermediate_size=2 * text_dim,
        num_hidden_layers=text_layers,
        num_attention_heads=2,
        max_position_embeddings=8192,
        initializer_range=text_dim**-0.5,  # Llama's 0.02 is for 4096: here all captions would embed to nearly nothing
        bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id,
        pad_token_id=llama.pad_token_id,
    )
    if image_dim is None:
        text_encoder = LlamaModel(language)
    else:
        text_encoder = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=language,
                vision_config=clip_vision_config(width=image_dim, layers=2, image_size=IMAGE_SIZE),
                image_token_index=llama.convert_tokens_to_ids("<image>"),
                pad_token_id=llama.pad_token_id,  # the pipeline asks this configuration, not the inner one
            )
        )
    pooled = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=pooled_dim,
            intermediate_size=2 * pooled_dim,
            projection_dim=pooled_dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    return text_encoder, pooled


def hunyuan_components(
    *,
    heads: int = 2,
    rope_axes: tuple[int, int, int] = (4, 4, 4),
    layers: int = 2,
    single_layers: int = 2,
    refiner_layers: int = 1,
    text_dim: int = 16,
    text_layers: int = 3,
    pooled_dim: int = 8,
    vae_dim: int = 8,
    flow_shift: float = 7.0,
    seed: int = 0,
    image_dim: int | None = None,
    image_condition_type: str | None = None,
) -> dict[str, Any]:
    """Returns what both HunyuanVideo pipelines have, with random weights in float32, by the names of their arguments.

    The structure is the published one (16 latent channels, 4x8x8 compression, patches of 1x2x2, Llama and CLIP text
    encoders, flow-matching Euler scheduler); only widths and depths are small. The defaults give about 96 thousand
    parameters in the transformer.

    Args:
        heads: attention heads of the transformer; its width is heads * sum(rope_axes).
        rope_axes: channels per head that the rotary embeddings give to time, height and width, each even.
        layers: two-stream transformer blocks.
        single_layers: one-stream transformer blocks.
        refiner_layers: blocks that refine the prompt embeddings.
        text_dim: width of the Llama and of the prompt embeddings, a multiple of 4.
        text_layers: layers of the Llama, at least 3: the embeddings are those of two layers before the last.
        pooled_dim: width of the CLIP text encoder and of the pooled prompt embedding, a multiple of 2.
        vae_dim: channels of the video autoencoder, a multiple of 4.
        flow_shift: the scheduler's timestep shift.
        seed: of the random weights; equal arguments give equal files.
        image_dim: width of the image encoder in front of the Llama, a multiple of 2; None for none.
        image_condition_type: of the transformer: None, token_replace or latent_concat. latent_concat takes 16 channels
            of the condition and 1 of its mask beside the noisy ones, and no guidance.
    """
    llama, clip = build_llama_tokenizer(), build_clip_tokenizer()
    concat = image_condition_type == "latent_concat"
    with seeded(seed):
        text_encoder, pooled = text_encoders(
            text_dim=text_dim,
            text_layers=text_layers,
            pooled_dim=pooled_dim,
            image_dim=image_dim,
            llama=llama,
            clip=clip,
        )
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=16, block_out_channels=(vae_dim,) * 4, layers_per_block=1, norm_num_groups=4
        )
        with torch.no_grad():  # like a trained one, it is nearly sure of its latents: else they would be mostly noise
            vae.quant_conv.weight[16:] = 0
            vae.quant_conv.bias[16:] = LOG_VARIANCE
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=33 if concat else 16,
            out_channels=16,
            num_attention_heads=heads,
            attention_head_dim=sum(rope_axes),
            num_layers=layers,
            num_single_layers=single_layers,
            num_refiner_layers=refiner_layers,
            guidance_embeds=not concat,
            text_embed_dim=text_dim,
            pooled_projection_dim=pooled_dim,
            rope_axes_dim=rope_axes,
            image_condition_type=image_condition_type,
        )
    return {
        "text_encoder": text_encoder,
        "tokenizer": llama,
        "text_encoder_2": pooled,
        "tokenizer_2": clip,
        "vae": vae,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=flow_shift),
    }


def build_hunyuan_t2v(folder: Path, **sizes: int | float | tuple[int, int, int]) -> Path:
    """Writes a text-to-video HunyuanVideo with random weights in the diffusers folder layout and returns the folder.

    Args:
        folder: created if need be; model_index.json and one folder per component are written into it.
        sizes: keywords of hunyuan_components, the seed among them.
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
    """Writes an image-to-video HunyuanVideo with random weights in the diffusers folder layout and returns the folder.

    Args:
        folder: created if need be; model_index.json and one folder per component are written into it.
        image_condition_type: how the transformer is given the first frame, token_replace (in its place) or
            latent_concat (as channels beside the noisy ones).
        image_dim: width of the Llava's image encoder, a multiple of 2.
        sizes: other keywords of hunyuan_components.
    """
    components = hunyuan_components(image_condition_type=image_condition_type, image_dim=image_dim, **sizes)
    components["image_processor"] = clip_image_processor(IMAGE_SIZE)
    HunyuanVideoImageToVideoPipeline(**components).save_pretrained(folder)
    return folder


def calibrate_scaling_factor(folder: Path, clips: torch.Tensor) -> None:
    """Gives the autoencoder of a built model the scaling_factor that makes its latents of these clips deviate by 1.

    The published number belongs to the published autoencoder; with random weights it would leave latents far from the
    unit variance that flow matching assumes.

    Args:
        folder: as returned by build_hunyuan_t2v or build_hunyuan_i2v; vae/config.json is written anew.
        clips: [N, 3, T, H, W] float in [-1, 1].
    """
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_config(folder / "vae")
