r"""Fine-tunes HunyuanVideo: text-to-video and image-to-video, the whole model or a LoRA.

One process, one per GPU (DDP), or sharded (DeepSpeed ZeRO, FSDP); the part after the script's name stays the same:

    accelerate launch --mixed_precision="bf16" scripts/hunyuanvideo/train.py \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/HunyuanVideo \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/hv --enable_bucket --train_batch_size=1 --mixed_precision="bf16" --gradient_checkpointing

Ctrl-C or SIGTERM saves and stops. The same command with --resume_from_checkpoint=latest continues; its losses are
bit-identical to those of a run that was never stopped, on GPUs with --deterministic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from videox.errors import MODEL, UserError
from videox.estimate.flops import joint_attention_network
from videox.estimate.model_profile import ModelProfile
from videox.models.compression import hunyuan_ratios
from videox.models.configured import Component
from videox.models.published import dry_run_components
from videox.training.args import check_args, is_dry_run, planned_model
from videox.training.argument_parser import number, parse_or_exit
from videox.training.flags import make_parser
from videox.training.flow_shift import FlowShift, choose_shift

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"normal": "text-to-video", "i2v": "image-to-video"}
LORA_TARGETS = {"transformer_blocks": ("attn", "ff", "ff_context")}  # layers that get adapters, by list of blocks
LORA_TARGETS["single_transformer_blocks"] = ("attn", "proj_mlp", "proj_out")
PIPELINES = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
NAMES = ("scheduler", "tokenizer", "tokenizer_2", *TEXT_ENCODERS, "vae", "transformer")
MOST_IMAGE_TOKENS = 576  # of the prompt: Llava's tokens of an image, before most are left out
INTERLEAVE = {"token_replace": 4, "latent_concat": 2}  # every k-th image token is used, as in the pipeline


def parse_args(
    argv: Sequence[str] | None = None, check: Callable[[argparse.Namespace], None] = check_args
) -> argparse.Namespace:
    """Parse the flags and check them against each other."""
    parser = make_parser(__doc__, modes=tuple(TASKS), recipes=ROOT / "config/recipes/hunyuanvideo")
    add = parser.add_argument_group("HunyuanVideo").add_argument
    add("--guidance_scale", type=number(float, 1, 100), default=6.0, help="guidance that the model gets as input")
    tokens = "maximum text tokens of a caption, after the prompt template"
    add("--tokenizer_max_length", type=number(int, 1, 4096), default=256, help=tokens)
    skipped = "number of last Llama layers to skip: the text embedding is taken before them"
    add("--num_hidden_layers_to_skip", type=number(int, 0, 31), default=2, help=skipped)
    every = "keep every n-th image token of the prompt, n = 1 to 5; default: 4 for token_replace, 2 for latent_concat"
    add("--image_embed_interleave", type=number(int, 1, 5), help=every)
    shapes = "so that attention sees fewer shapes; by default 32 on GPUs where captions differ in length, else 1"
    rounded = f"round the text length of a micro-batch up to a multiple of N tokens by masked padding, {shapes}"
    add("--text_multiple", type=number(int, 1, 256), help=rounded)
    args = parser.parse(argv)
    check(args)
    return args


def check_model(args: argparse.Namespace) -> dict[str, Component]:
    """Find and check the model's components; loads no weights. Raises UserError where they do not fit --train_mode."""
    if published := planned_model(args):
        components = dry_run_components(published, "hunyuanvideo")
    else:
        root = local_folder(args.pretrained_model_name_or_path)
        overrides = {"transformer": ("hunyuan", args.transformer_path), "vae": ("hunyuan_vae", args.vae_path)}
        with_weights = () if is_dry_run(args) else TEXT_ENCODERS
        components = diffusers_components(root, PIPELINES, NAMES, overrides, with_weights)
    condition = components["transformer"].config.get("image_condition_type")
    mode = "normal" if condition is None else "i2v"
    if args.train_mode != mode:
        what = f"the transformer's image_condition_type is {condition}: it is made for --train_mode {mode}"
        raise UserError(f"--train_mode {args.train_mode}", what, "use that mode, or weights made for this one", MODEL)
    if mode == "i2v" and not published:
        read_component(root / "image_processor", check_weights=False)
    return components


def hunyuan_profile(args: argparse.Namespace, components: dict[str, Component]) -> ModelProfile:
    """The model's profile from its configurations alone, for the plan and the estimates."""
    config, text_tokens = components["transformer"].config, args.tokenizer_max_length
    condition = config.get("image_condition_type")
    if condition is not None:  # the prompt contains tokens of the first frame, too
        text_tokens += MOST_IMAGE_TOKENS // (args.image_embed_interleave or INTERLEAVE[condition])
    return ModelProfile(
        task=f"{TASKS[args.train_mode]} (the transformer's image_condition_type is {condition})",
        network=partial(joint_attention_network, config, text_tokens=text_tokens),
        blocks=LORA_TARGETS,
        components={name: (kind, components[name].config) for name, kind in classes_of(args.train_mode).items()},
        fps=24.0,
        min_frames=1 if condition is None else 5,  # with the first latent frame given, nothing else would be trained
        sharded_backend="fsdp1",
        ratios=hunyuan_ratios(components),
    )


def profile_and_shift(
    args: argparse.Namespace, components: dict[str, Component], checkpoint: Path | None
) -> tuple[ModelProfile, FlowShift]:
    """What plans need of the model, and the run's flow shift; checkpoint: to resume from, None for a new run."""
    return hunyuan_profile(args, components), choose_shift(args, checkpoint, components["scheduler"])


def classes_of(train_mode: str) -> dict[str, str]:
    """The class of each component with weights, by name: Llava, which warns on import, is for image-to-video alone."""
    text = "LlamaModel" if train_mode == "normal" else "LlavaForConditionalGeneration"
    encoders = {"text_encoder": f"transformers.{text}", "text_encoder_2": "transformers.CLIPTextModel"}
    transformer, vae = "diffusers.HunyuanVideoTransformer3DModel", "diffusers.AutoencoderKLHunyuanVideo"
    return {"transformer": transformer, "vae": vae, **encoders}


def plan(args: argparse.Namespace) -> int:
    """Plan the run instead of training; return the exit code."""
    from videox.training import dry_run  # imported here, because --help does not need it

    return dry_run.plan_run(args, lambda: profile_and_shift(args, check_model(args), None))


if __name__ == "__main__":
    parse_or_exit(parse_args, plan, planned_model)  # --help, wrong flags, and plans that need no import below

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

from videox.data.dataset import Batch
from videox.device import to_device
from videox.diffusion import flow_matching
from videox.diffusion.conditioning import concat_first_frame, replace_first_frame
from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS
from videox.distributed.accelerator import compute_dtype
from videox.distributed.collectives import accumulate, backward
from videox.distributed.signals import StopRequest
from videox.encoders.encode import Encoder, EncodingSpec, LazyEncoders, fixed_shape, latents_spec
from videox.encoders.hunyuan_text import encode_pooled, encode_text, pad_texts
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import VAE_DTYPES, clip_moments, sample_latents
from videox.models.attention_backend import UnmaskedKernel
from videox.models.component import diffusers_components
from videox.models.folder import full_config, load_class, load_pipeline, read_component
from videox.models.hub import local_folder
from videox.models.scheduler import with_shift
from videox.models.tokenizer import load_tokenizer
from videox.rng import Purpose, hash_key
from videox.run.lifecycle import run_script
from videox.tracking.dump import dump_folder, write_dump
from videox.training import build, frozen_encoders, launch, loop, memory_check, precompute, startup
from videox.training.context import Context, Gather
from videox.training.data import build_data
from videox.training.schedule import build_schedule
from videox.training.step_loss import StepLoss
from videox.training.validator import FamilyValidation, HeldOut, encode_held_out

PROBES = {"tokenizer": "A red fox,\n\n2 years old, runs <3", "tokenizer_2": "a red fox runs"}


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders, and diffusers' pipeline over them, for prompts and sample clips."""

    text_encoder: OffloadedModule
    text_encoder_2: OffloadedModule
    vae: OffloadedModule
    pipeline: HunyuanVideoPipeline | diffusers.HunyuanVideoImageToVideoPipeline


@dataclass(frozen=True)
class Hunyuan:
    """What a training step needs of the model; condition: "token_replace", "latent_concat", None for text-to-video."""

    transformer: HunyuanVideoTransformer3DModel
    encoders: LazyEncoders[Encoders]
    encode: Encoder
    attention: MaskFreeAttention
    scaling_factor: float
    channels: int
    shift: float
    condition: str | None
    guidance_scale: float
    text_multiple: int | None

    @property
    def given_frames(self) -> int:
        """Leading latent frames that the model is given; they are excluded from the loss."""
        return 0 if self.condition is None else 1


class MaskFreeAttention(UnmaskedKernel, HunyuanVideoAttnProcessor2_0):
    """Attention without the mask while every text token is real: the fused attention kernels take no mask."""

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As the parent, with the mask only where it masks something."""
        mask = None if self.all_real else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def load_encoders(
    args: argparse.Namespace, components: dict[str, Component], shift: float, accelerator: Accelerator, gather: Gather
) -> Encoders:
    """Load the frozen encoders: text in the compute dtype, the VAE in --vae_dtype; the scheduler has the shift."""
    root, classes = components["scheduler"].path.parent, classes_of(args.train_mode)
    dtypes = {"vae": VAE_DTYPES[args.vae_dtype], **dict.fromkeys(TEXT_ENCODERS, compute_dtype(accelerator))}
    load = partial(frozen_encoders.load, args, accelerator, gather)
    tokenizers = {  # not of the classes in model_index.json: transformers 5 would rebuild one without spaces and line breaks
        name: load_tokenizer(root / name, load_class(classes[encoder]), components[encoder], PROBES[name])
        for name, encoder in zip(PROBES, TEXT_ENCODERS, strict=True)
    }
    modules = {name: load(name, classes[name], components[name], dtype) for name, dtype in dtypes.items()}
    if args.vae_tiling:
        modules["vae"].enable_tiling()
    pipeline_class = (
        HunyuanVideoPipeline if args.train_mode == "normal" else diffusers.HunyuanVideoImageToVideoPipeline
    )
    pipeline = load_pipeline(pipeline_class, root, {**modules, **tokenizers})
    pipeline.register_modules(scheduler=with_shift(pipeline.scheduler, shift))
    # The pipeline warns for each caption over CLIP's 77 tokens; only the pooled embedding is cut, which is expected.
    logging.getLogger(pipeline_class.__module__).setLevel(logging.ERROR)
    offloaded = {n: OffloadedModule(m, accelerator.device, offload=args.low_vram) for n, m in modules.items()}
    return Encoders(**offloaded, pipeline=pipeline)


def blocks_of(transformer: HunyuanVideoTransformer3DModel) -> list[torch.nn.Module]:
    """The repeated blocks, in order."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def build_model(
    args: argparse.Namespace, components: dict[str, Component], shift: float, transformer: torch.nn.Module,
    encoders: LazyEncoders[Encoders], encode: Encoder,
) -> Hunyuan:  # fmt: skip
    """Set the attention processors and collect what a training step needs; no encoder is loaded."""
    attention = MaskFreeAttention()
    for block in blocks_of(transformer):
        block.attn.set_processor(attention)
    vae = full_config(AutoencoderKLHunyuanVideo, components["vae"].config)
    known = (vae.scaling_factor, vae.latent_channels, shift, transformer.config.image_condition_type)
    return Hunyuan(transformer, encoders, encode, attention, *known, args.guidance_scale, args.text_multiple)


def encoding_specs(
    args: argparse.Namespace, components: dict[str, Component], encoders: LazyEncoders[Encoders], dtype: torch.dtype
) -> list[EncodingSpec]:
    """How the encoder outputs of a sample are computed and cached; dtype: of text embeddings.

    moments: of the VAE's posterior; prompt_embeds and pooled: of the caption; in image-to-video also first_frame: the
    mode of the posterior of the first frame, and prompt_embeds depend on that frame too.
    """
    config, root = components["transformer"].config, components["scheduler"].path.parent
    condition, mini_batch, length = config.get("image_condition_type"), args.vae_mini_batch, args.tokenizer_max_length
    channels = full_config(AutoencoderKLHunyuanVideo, components["vae"].config).latent_channels
    vae, moments = (components["vae"].path,), channels * (2 if args.vae_sample_mode == "sample" else 1)
    settings = {"max_sequence_length": length, "num_hidden_layers_to_skip": args.num_hidden_layers_to_skip}
    llama: tuple[Path, ...] = (root / "text_encoder", root / "tokenizer")
    specs, latents = [], partial(latents_spec, vae_dtype=args.vae_dtype, ratios=hunyuan_ratios(components))
    if condition is not None:
        settings["image_embed_interleave"] = args.image_embed_interleave or INTERLEAVE[condition]
        llama, length = (*llama, root / "image_processor"), length + MOST_IMAGE_TOKENS
        first = partial(clip_moments, encoders, mini_batch, frames=1)
        specs.append(latents("first_frame", ("frame",), first, channels, vae, first_only=True))
    return [
        *specs,
        latents("moments", ("clip",), partial(clip_moments, encoders, mini_batch), moments, vae),
        EncodingSpec(
            "prompt_embeds", ("caption",) if condition is None else ("frame", "caption"),
            partial(encode_text, encoders, settings), fixed_shape(length, config["text_embed_dim"]), dtype, llama,
            frozen_encoders.text_settings(args, settings), trimmed=True, module="text_encoder",
        ),
        EncodingSpec(
            "pooled", ("caption",), partial(encode_pooled, encoders), fixed_shape(config["pooled_projection_dim"]),
            dtype, (root / "text_encoder_2", root / "tokenizer_2"), module="text_encoder_2",
        ),
    ]  # fmt: skip


def encode_batch(
    hunyuan: Hunyuan, batch: Batch, keys: Sequence[int] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scaled latents, float32 [B, C, t, h, w], and the other inputs of the transformer.

    These are prompt_embeds [B, L, D] and prompt_mask [B, L], L as pad_texts returns it; pooled [B, P]; in
    image-to-video first_frame [B, C, 1, h, w].

    Args:
        keys: one per sample, draw the posterior's noise; None takes its mode.
    """
    encoded = hunyuan.encode(batch)
    embeds, mask = pad_texts(encoded["prompt_embeds"], hunyuan.text_multiple)
    given = {"prompt_embeds": embeds, "prompt_mask": mask, "pooled": torch.stack(encoded["pooled"])}
    if hunyuan.given_frames:
        given["first_frame"] = torch.stack(encoded["first_frame"]) * hunyuan.scaling_factor
    latents = sample_latents(torch.stack(encoded["moments"]), hunyuan.channels, keys) * hunyuan.scaling_factor
    return latents, given


def transformer_inputs(
    hunyuan: Hunyuan, noisy_latents: torch.Tensor, sigmas: torch.Tensor, given: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Keywords of HunyuanVideoTransformer3DModel; timestep is 1000 sigma, guidance 1000 x scale, both float32 [B].

    Also tells the attention whether all text tokens are real, so that it needs no mask.

    Args:
        given: of encode_batch; in image-to-video with `first_frame`, its latents [B, C, 1, h, w].
    """
    hidden_states = noisy_latents
    if hunyuan.condition == "token_replace":
        hidden_states = replace_first_frame(noisy_latents, given["first_frame"])
    elif hunyuan.condition == "latent_concat":
        hidden_states = concat_first_frame(noisy_latents, given["first_frame"])
    guided = hunyuan.transformer.config.guidance_embeds
    hunyuan.attention.all_real = bool(given["prompt_mask"].all())  # the mask is in host memory: no wait for the device
    return {
        "hidden_states": hidden_states,
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": given["prompt_embeds"],
        "encoder_attention_mask": to_device(given["prompt_mask"], hidden_states.device),
        "pooled_projections": given["pooled"],
        "guidance": torch.full_like(sigmas, 1000 * hunyuan.guidance_scale) if guided else None,
        "return_dict": False,
    }


def accumulate_gradients(
    args: argparse.Namespace, accelerator: Accelerator, hunyuan: Hunyuan, model: torch.nn.Module, batch: Batch,
    dump_to: Path | None,
) -> torch.Tensor:  # fmt: skip
    """Accumulate the gradients of a micro-batch and return each sample's part of the step's loss, float64 [B].

    x_t = (1 - sigma) x_0 + sigma noise; the model predicts noise - x_0. Every draw is a function of a sample's key.
    """
    device, keys = accelerator.device, batch["keys"]
    latents, given = encode_batch(hunyuan, batch, keys if args.vae_sample_mode == "sample" else None)

    sigmas = to_device(build.sigmas_of_batch(args, batch, hunyuan.shift), device)
    noise_keys = [int(hash_key(key, Purpose.NOISE)) for key in keys]
    noise = to_device(flow_matching.batch_noise(noise_keys, latents.shape[1:]), device)
    noisy_latents, target = flow_matching.add_noise(latents, noise, sigmas), noise - latents
    inputs = transformer_inputs(hunyuan, noisy_latents, sigmas, given)

    weights = to_device(torch.from_numpy(batch["weights"]), device)  # each planned sample's share of the global batch
    generated = (slice(None), slice(None), slice(hunyuan.given_frames, None))  # without the given frame
    with accumulate(accelerator, model, batch["last"]):
        prediction = model(**inputs)[0]
        pair = prediction[generated], target[generated]
        losses = flow_matching.velocity_losses(*pair, flow_matching.loss_weights(sigmas, args.weighting_scheme))
        if args.motion_sub_loss:
            losses = flow_matching.motion_losses(*pair, losses, args.motion_sub_loss_ratio)
        parts = losses.double() * weights
        backward(accelerator, model, parts.sum())
    write_dump(
        dump_to, accelerator.process_index, batch, inputs, latents=latents, noise=noise, sigma=sigmas, target=target,
        timestep=inputs["timestep"], weight=weights, prediction=prediction, loss=losses,
    )  # fmt: skip
    return parts.detach()


def predict_held_out(
    hunyuan: Hunyuan, noisy_latents: torch.Tensor, timestep: torch.Tensor, sample: HeldOut
) -> torch.Tensor:
    """The velocity prediction for one held-out sample, as in training."""
    given = {name: value.to(noisy_latents.device) for name, value in sample.conditions.items()}
    return hunyuan.transformer(**transformer_inputs(hunyuan, noisy_latents, timestep / NUM_TRAIN_TIMESTEPS, given))[0]


@contextmanager
def sampling_pipeline(
    hunyuan: Hunyuan,
) -> Iterator[HunyuanVideoPipeline | diffusers.HunyuanVideoImageToVideoPipeline]:
    """The pipeline with the transformer in training, its encoders on the device when called; it pads its text."""
    hunyuan.attention.all_real = False
    with hunyuan.encoders.temporary() as encoders:
        encoders.pipeline.transformer = hunyuan.transformer
        with encoders.text_encoder.on_calls(), encoders.text_encoder_2.on_calls(), encoders.vae.on_calls():
            yield encoders.pipeline
        encoders.pipeline.transformer = None


def main(argv: Sequence[str] | None = None) -> int:
    """Plan or train; return the exit code (0 finished, 75 stopped and saved)."""
    args = parse_args(argv)
    return plan(args) if is_dry_run(args) else launch.launch(args, train)


def train(args: argparse.Namespace, ctx: Context) -> int:
    """Build schedule, data, model and records, in this order, then loop over optimizer steps; return the exit code."""
    components = check_model(args)
    profile, chosen = profile_and_shift(args, components, ctx.checkpoint)
    startup.announce(args, ctx, profile.task, chosen)

    # schedule: all samples, steps and random draws of the run follow from it
    shift, schedule = chosen.value, build_schedule(args, ctx, profile)
    memory_check.plan_memory(args, ctx, profile, schedule)
    state, lr_at = schedule.state, build.lr_of_step(args, schedule)
    lora = build.build_lora(args, ctx, schedule, components["transformer"], LORA_TARGETS, HunyuanVideoPipeline)

    # data: outputs of the frozen encoders, from the cache where there is one
    encoders = LazyEncoders(partial(load_encoders, args, components, shift, ctx.accelerator))
    specs = encoding_specs(args, components, encoders, compute_dtype(ctx.accelerator))
    data = build_data(args, ctx, schedule, specs, encoders)
    if args.cache_only:
        return precompute.fill_cache(ctx, data.missing, data.encode, args.dataloader_num_workers)
    # model: build_engine freezes what is not trained, and loads the checkpoint if the run resumes
    transformer = build.load_model(args, ctx, schedule, HunyuanVideoTransformer3DModel, components["transformer"])
    hunyuan = build_model(args, components, shift, transformer, encoders, data.encode)
    blocks, component = blocks_of(transformer), components["transformer"]
    engine = build.build_engine(args, ctx, schedule, transformer, blocks, component, lora)
    hunyuan = replace(hunyuan, transformer=engine.network)  # as validation and sampling call it
    # records, checkpoints, validation
    facts = {"task": f"hunyuanvideo {args.train_mode}", "shift": shift}
    recorder, guard, checkpoints = build.build_records(args, ctx, schedule, engine, profile, transformer, facts)
    held_out = encode_held_out(data.dataset, schedule, partial(encode_batch, hunyuan, keys=None))
    predict, pipeline = partial(predict_held_out, hunyuan), partial(sampling_pipeline, hunyuan)
    given, guidance = hunyuan.given_frames, args.guidance_scale
    family = FamilyValidation(predict, pipeline, guidance, given, embedded_guidance=True)
    validate = build.build_validator(args, ctx, schedule, engine, recorder, held_out, family, shift)
    run_batch = partial(accumulate_gradients, args, ctx.accelerator, hunyuan, engine.model, dump_to=None)
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
                    loss.add(batch, accumulate_gradients(args, ctx.accelerator, hunyuan, engine.model, batch, dump_to))
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
