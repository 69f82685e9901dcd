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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

import videox.args as flags
from videox.data.bucket_sampler import BucketBatchSampler
from videox.data.dataset import Batch, TokenLengthDataset
from videox.data.loader import build_loader
from videox.data.plan import Columns, held_out_plan, plan_epoch
from videox.distributed import (
    Backend,
    StopRequest,
    accumulate,
    agree,
    gather_objects,
    make_accelerator,
)
from videox.dump import dump_folder, write_dump
from videox.errors import Refusal
from videox.estimate import cost_coefficients
from videox.flow_matching import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    batch_noise,
    draw_sigmas,
    loss_weights,
    motion_losses,
    timestep_density,
    velocity_losses,
)
from videox.keys import Purpose, mix, uniform
from videox.lifecycle import Run, open_run, run_script
from videox.metrics import check_tracker
from videox.model_folder import load_strictly, read_component, read_model_folder, read_shift, refuse_not_finite
from videox.offload import RestingModule
from videox.optim import (
    choose_trainable,
    clip_gradients,
    clip_limit,
    gradient_norm,
    make_optimizer,
    parameter_groups,
    schedule,
    set_learning_rate,
)
from videox.recompute import recompute_blocks
from videox.report import data_lines, start_facts, start_lines, typical_fps
from videox.state import checkpoint_bytes, load_state, plan_inputs, resume_or_begin, save_state
from videox.steps import total_steps, walk
from videox.validation import HeldOut
from videox.validator import Validator, held_out_samples
from videox.watch import Watch
from videox.weights import export_transformer

SAMPLING_GUIDANCE = 5.0  # of the sample clips

# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags, each checked by itself and against the others."""
    parser = flags.Parser(description=__doc__)
    flags.add_model_and_data(parser)
    flags.add_shapes(parser)
    flags.add_training(parser)
    flags.add_run(parser)
    wan = parser.add_argument_group("Wan2.1")
    wan.add_argument(
        "--config_path",
        default="config/wan2.1/wan_civitai.yaml",
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
    vae: RestingModule
    pipeline: WanPipeline
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    shift: float


def check_model(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the transformer's configuration after every part of the model has been looked at; loads no weight."""
    components = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
    weighted = [name for name in ("text_encoder", "vae", "transformer") if not getattr(args, f"{name}_path", None)]
    configs = read_model_folder(args.pretrained_model_name_or_path, ("WanPipeline",), components, weighted)
    for name in ("transformer", "vae"):
        if getattr(args, f"{name}_path"):
            configs[name] = read_component(Path(getattr(args, f"{name}_path")), weighted=True)
    config = configs["transformer"]
    if config.get("in_channels") != 16 or config.get("image_dim"):
        what = f"takes {config.get('in_channels')} channels: it is not a text-to-video checkpoint"
        raise Refusal("--train_mode normal", f"the transformer {what}", "give Wan2.1-T2V weights")
    return config


def load_components(args: argparse.Namespace, shift: float, accelerator: Accelerator) -> Components:
    """Loads the model: encoders frozen, the text encoder in the compute dtype, VAE and transformer in float32."""
    root, device = Path(args.pretrained_model_name_or_path), accelerator.device
    compute_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    transformer_folder = Path(args.transformer_path or root / "transformer")
    transformer = load_strictly(WanTransformer3DModel, transformer_folder, torch_dtype=torch.float32)
    refuse_not_finite(transformer, transformer_folder)
    vae = load_strictly(AutoencoderKLWan, Path(args.vae_path or root / "vae"), torch_dtype=torch.float32)
    text_encoder = load_strictly(UMT5EncoderModel, root / "text_encoder", dtype=compute_dtype)
    for encoder in (vae, text_encoder):
        encoder.requires_grad_(False).eval()
    pipeline = WanPipeline.from_pretrained(root, transformer=None, vae=vae, text_encoder=text_encoder)
    mean, std = (
        torch.tensor(vae.config[name], device=device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return Components(
        transformer=transformer.to(device),
        text_encoder=RestingModule(text_encoder, device, rests=args.low_vram),
        vae=RestingModule(vae, device, rests=args.low_vram),
        pipeline=pipeline,
        latents_mean=mean,
        latents_std=std,
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


@torch.no_grad()
def encode_video(
    components: Components, pixels: torch.Tensor, keys: Sequence[int] | None, mini_batch: int
) -> torch.Tensor:
    """Returns normalised latents (z - mean) / std, float32 [B, 16, t, h, w].

    Args:
        pixels: uint8 [B, T, H, W, 3] on the device.
        keys: one per sample for the posterior's noise; None takes the posterior's mode.
        mini_batch: samples per call of the VAE.
    """
    latents = []
    with components.vae.awake() as vae:
        for first in range(0, len(pixels), mini_batch):
            video = pixels[first : first + mini_batch].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            posterior = vae.encode(video).latent_dist
            z = posterior.mode()
            if keys is not None:
                part = [int(mix(key, Purpose.POSTERIOR)) for key in keys[first : first + mini_batch]]
                z = posterior.mean + posterior.std * batch_noise(part, z.shape[1:]).to(z.device)
            latents.append((z - components.latents_mean) / components.latents_std)
    return torch.cat(latents)


def transformer_inputs(
    noisy_latents: torch.Tensor, sigmas: torch.Tensor, prompt_embeds: torch.Tensor
) -> dict[str, Any]:
    """Returns the keywords of WanTransformer3DModel: its timestep is 1000 sigma, float32 [B]."""
    return {
        "hidden_states": noisy_latents,
        "timestep": NUM_TRAIN_TIMESTEPS * sigmas,
        "encoder_hidden_states": prompt_embeds,
        "return_dict": False,
    }


def draw_sigmas_of(args: argparse.Namespace, batch: Batch, shift: float) -> torch.Tensor:
    """Returns sigmas, float32 [B]: stratified over the global batch, or drawn one by one from the scheme's density."""
    if args.uniform_sampling:
        draws = batch["strata"]
    else:
        own = uniform(np.array(batch["keys"], np.uint64), Purpose.TIMESTEP)
        draws = timestep_density(own, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
    return draw_sigmas(draws, shift, args.train_sampling_steps)


# ----------------------------------------------------------------------------------------------- one micro-batch


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
    device = accelerator.device
    pixels = batch["pixels"].to(device, non_blocking=True)
    posterior_keys = batch["keys"] if args.vae_sample_mode == "sample" else None
    latents = encode_video(components, pixels, posterior_keys, args.vae_mini_batch)
    prompt_embeds = encode_prompts(components, batch["captions"], args.tokenizer_max_length, device)

    sigmas = draw_sigmas_of(args, batch, components.shift).to(device)
    noise = batch_noise([int(mix(key, Purpose.NOISE)) for key in batch["keys"]], latents.shape[1:]).to(device)
    noisy_latents = add_noise(latents, noise, sigmas)
    target = noise - latents

    inputs = transformer_inputs(noisy_latents, sigmas, prompt_embeds)
    weights = torch.from_numpy(batch["weights"]).to(device)  # each planned sample's share of the global batch
    with accumulate(accelerator, model, batch["last"]):
        prediction = model(**inputs)[0]
        losses = velocity_losses(prediction, target, loss_weights(sigmas, args.weighting_scheme))
        if args.motion_sub_loss:
            losses = motion_losses(prediction, target, losses, args.motion_sub_loss_ratio)
        loss = (losses.double() * weights).sum()
        accelerator.backward((loss * accelerator.num_processes).float())  # DDP takes the mean over processes
    if dump_to is not None:
        state = {
            "latents": latents,
            "noise": noise,
            "sigma": sigmas,
            "timestep": inputs["timestep"],
            "weight": weights,
        }
        state |= {"target": target, "prediction": prediction, "loss": losses}
        write_dump(dump_to, rank=accelerator.process_index, batch=batch, tensors=state, model_inputs=inputs)
    return loss.detach()


# --------------------------------------------------------------------------------------------------- validation


def encode_held_out(
    args: argparse.Namespace, components: Components, samples: Iterable[tuple[np.ndarray, str]], device: torch.device
) -> list[HeldOut]:
    """Returns held-out samples as latents (posterior mode) and prompt embeddings, kept in host memory."""
    encoded = []
    for pixels, caption in samples:
        latents = encode_video(components, torch.from_numpy(pixels)[None].to(device), None, args.vae_mini_batch)
        prompt_embeds = encode_prompts(components, [caption], args.tokenizer_max_length, device)
        encoded.append(HeldOut(latents.cpu(), {"prompt_embeds": prompt_embeds.cpu()}))
    return encoded


def predict_held_out(
    components: Components, noisy_latents: torch.Tensor, timestep: torch.Tensor, sample: HeldOut
) -> torch.Tensor:
    """Returns the velocity for one held-out sample, as training computes it."""
    prompt_embeds = sample.conditions["prompt_embeds"].to(noisy_latents.device)
    return components.transformer(**transformer_inputs(noisy_latents, timestep / NUM_TRAIN_TIMESTEPS, prompt_embeds))[
        0
    ]


@contextmanager
def sampling_pipeline(components: Components) -> Iterator[WanPipeline]:
    """Yields the pipeline with the transformer in training, its encoders on the device."""
    components.pipeline.transformer = components.transformer
    with components.text_encoder.awake(), components.vae.awake():
        yield components.pipeline
    components.pipeline.transformer = None


# ------------------------------------------------------------------------------------------------ main and loop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs training from the flags to the exported model; returns the exit code (0 done, 75 stopped and saved)."""
    args = parse_args(argv)
    accelerator, backend = make_accelerator(args.mixed_precision)
    gather = gather_objects(accelerator)
    with open_run(
        Path(args.output_dir),
        resume=args.resume_from_checkpoint,
        verify=args.verify,
        is_main=accelerator.is_main_process,
        gather=gather,
    ) as run:
        return train(args, accelerator, backend, run, gather)


def train(
    args: argparse.Namespace, accelerator: Accelerator, backend: Backend, run: Run, gather: Callable[[Any], list[Any]]
) -> int:
    """Builds data, schedule, model and records, then loops over optimizer steps; returns the exit code."""
    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    transformer_config, shift = check_model(args), read_shift(args.config_path)
    check_tracker(args.report_to)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    task = "text-to-video (the transformer takes 16 channels)"
    facts = start_facts(accelerator, backend, task=task, output_dir=output_dir)
    accelerator.print("\n".join([*start_lines(facts), *run.notes, *flags.notes(args)]))

    # data and schedule: from here on, everything that will happen is known
    index = flags.shared_index(args, is_main=is_main, gather=gather)
    columns = Columns(index.kind, index.width, index.height, index.frames, index.usable)
    cost = cost_coefficients(
        dim=transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"],
        ffn_dim=transformer_config["ffn_dim"],
        layers=transformer_config["num_layers"],
        text_tokens=args.tokenizer_max_length,
    )
    state, settings = resume_or_begin(
        run.resume.path,
        partial(flags.plan_settings, args, cost=cost),
        seed=args.seed,
        slots=accelerator.num_processes * args.gradient_accumulation_steps,
        world_size=accelerator.num_processes,
        index_fingerprint=index.fingerprint(),
        gather=gather,
    )
    plan = plan_epoch(columns, settings, state.epoch, state.quarantined)
    total = total_steps(columns, settings, args.max_train_steps, args.num_train_epochs)
    accelerator.print("\n".join(data_lines(index, plan)))
    accelerator.print(f"seed {settings.seed}, {total} optimizer steps, from step {state.step}")

    # model and optimizer: float32 masters, computation in the accelerator's precision
    components = load_components(args, shift, accelerator)
    transformer = components.transformer
    full, half = choose_trainable(transformer, args.trainable_modules, args.trainable_modules_low_learning_rate)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    elif args.selective_ac:
        recompute_blocks(transformer, transformer.blocks, args.selective_ac)
    base_rate = args.learning_rate * (settings.slots * args.train_batch_size if args.scale_lr else 1)
    rate_factor = schedule(args.lr_scheduler, args.lr_warmup_steps, total)
    model = accelerator.prepare_model(transformer.train())
    optimizer = make_optimizer(
        parameter_groups(transformer, full, half),
        learning_rate=base_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
    )
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if run.resume.path:
        load_state(run.resume.path, transformer, optimizer)

    # records and batches
    resolved = {"seed": settings.seed, "slots": settings.slots, "total_steps": total, "learning_rate": base_rate}
    watch = Watch(
        output_dir, run, state, total,
        asked=vars(args), resolved={**resolved, "shift": shift, "plan": plan_inputs(settings)},
        report_to=args.report_to, logging_dir=args.logging_dir, project=args.tracker_project_name,
        checkpoint_bytes=checkpoint_bytes(transformer), is_main=is_main, gather=gather,
    )  # fmt: skip
    sampler = BucketBatchSampler(rank=accelerator.process_index, world_size=accelerator.num_processes)
    dataset = TokenLengthDataset(
        index, stride=args.video_sample_stride, reader=args.video_reader, caption_dropout=args.caption_dropout
    )
    loader = build_loader(
        dataset, sampler, workers=args.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    undropped = TokenLengthDataset(index, stride=dataset.stride, reader=dataset.reader, caption_dropout=0.0)
    held_out = held_out_samples(undropped, held_out_plan(columns, settings))
    validate = Validator(
        accelerator, watch, model=transformer, predict=partial(predict_held_out, components),
        held_out=encode_held_out(args, components, held_out, accelerator.device), prompts=args.validation_prompts,
        pipeline=partial(sampling_pipeline, components), shape=plan.commonest_bucket(), shift=shift,
        fps=typical_fps(index) / args.video_sample_stride, guidance_scale=SAMPLING_GUIDANCE, seed=settings.seed,
    )  # fmt: skip
    save = partial(
        save_state, state=state, model=transformer, config=transformer.to_json_string(), optimizer=optimizer
    )
    description = {"task": "wan2.1 text-to-video"}
    if state.step == 0:
        watch.first_batch(plan, dataset, index.fps)
        validate()

    with StopRequest() as stop:
        for step in walk(columns, settings, state, sampler, loader, total=total, clock=watch.clock):
            rate = base_rate * rate_factor(state.step)
            set_learning_rate(optimizer, rate)
            step_loss, bad = torch.zeros((), dtype=torch.float64, device=accelerator.device), []
            dump_to = dump_folder(output_dir, state.step + 1, args.dump_steps)
            for batch in step.batches():
                step_loss += accumulate_gradients(args, accelerator, components, model, batch, dump_to)
                bad += batch["bad"]

            # all processes learn what the step was, then take it or leave it together
            report = agree(
                accelerator, loss=step_loss, stop=bool(stop), bad_samples=len(bad), data_wait=watch.clock.data_wait,
                stamp=step.stamp(),
            )  # fmt: skip
            norm = gradient_norm(trained)
            grad_norm = float(norm)
            if math.isfinite(report.loss) and math.isfinite(grad_norm) and report.bad_samples < len(step.rows):
                limit = clip_limit(
                    grad_norm, state.step, max_grad_norm=args.max_grad_norm,
                    initial_ratio=args.initial_grad_norm_ratio, ramp_steps=args.abnormal_norm_clip_start,
                )  # fmt: skip
                clip_gradients(trained, norm, limit)
                optimizer.step()
                state.skipped_in_row = 0
            else:
                watch.skipped(step.rows.tolist())
            optimizer.zero_grad(set_to_none=True)

            if report.bad_samples:
                watch.bad_samples(bad, len(index), args.max_bad_fraction)
            epoch_ended = state.advance(step.plan.n_steps)
            watch.step(step.plan, step.epoch_step, report, rate, grad_norm)
            done = state.step == total

            # once in a while: validate, save, stop
            if done or flags.validation_due(args, state.step, state.epoch if epoch_ended else 0):
                validate()
            if done or report.stop or state.step % args.checkpointing_steps == 0:
                watch.save(save, args.checkpoints_total_limit, description)
            if report.stop and not done:
                return watch.stopped(stop.signal_name)

    export = partial(
        export_transformer, transformer.state_dict(), transformer.to_json_string(), output_dir / "transformer",
        flags.EXPORT_DTYPES[args.export_dtype], WanTransformer3DModel._keep_in_fp32_modules,
    )  # fmt: skip
    return watch.finished(export)


if __name__ == "__main__":
    run_script(main)
