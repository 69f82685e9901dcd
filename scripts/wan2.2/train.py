r"""Fine-tunes the experts of Wan2.2-A14B, or Wan2.2-TI2V-5B: text-to-video and image-to-video, all weights or a LoRA.

Wan2.2 has two transformers: the high-noise expert begins a clip, the low-noise expert finishes it. A run trains one of
them on its own noise levels; --expert=both trains one after the other, each in its own folder in --output_dir:

    accelerate launch --mixed_precision="bf16" scripts/wan2.2/train.py --expert=both \
      --pretrained_model_name_or_path=models/Diffusion_Transformer/Wan2.2-T2V-A14B-Diffusers \
      --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json \
      --output_dir=outputs/wan --enable_bucket --train_batch_size=1 --mixed_precision="bf16" \
      --gradient_checkpointing

With --train_mode=ti2v and without --expert the same command trains TI2V-5B, on text and on first frames in one run.

Ctrl-C or SIGTERM saves and stops. The same command with --resume_from_checkpoint=latest continues; its losses are
bit-identical to those of a run that was never stopped, on GPUs with --deterministic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from videox.diffusion.noise_window import WHOLE, NoiseWindow
from videox.errors import MODEL, UserError
from videox.estimate.flops import cross_attention_network
from videox.estimate.model_profile import ModelProfile
from videox.families import wan_5b as single
from videox.families import wan_experts as experts
from videox.families.wan_names import CLASSES, LORA_TARGETS, NAMES, PIPELINES
from videox.models.compression import wan_ratios
from videox.models.configured import Component
from videox.models.published import dry_run_components
from videox.training.args import check_args, is_dry_run, planned_model
from videox.training.argument_parser import number, parse_or_exit
from videox.training.flags import make_parser
from videox.training.flow_shift import FlowShift, choose_shift
from videox.weights.expert_names import EXPERTS

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"normal": "text-to-video", "i2v": "image-to-video", single.MODE: "text- and image-to-video"}
CHANNELS = {"normal": 16, "i2v": 36, single.MODE: 48}  # of the published transformers' inputs
SHIPPED_YAMLS = {mode: str(ROOT / f"config/wan2.2/wan_civitai_{name}.yaml") for mode, name in
                 {"normal": "t2v", "i2v": "i2v", single.MODE: "ti2v"}.items()}  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags of a run against each other. Raises UserError."""
    check_args(args)
    single.check_flags(args)
    if args.train_mode != single.MODE:
        experts.check_expert(args)


def parse_args(
    argv: Sequence[str] | None = None, check: Callable[[argparse.Namespace], None] = check_flags
) -> argparse.Namespace:
    """Parse the flags and check them against each other."""
    parser = make_parser(__doc__, modes=tuple(TASKS), recipes=ROOT / "config/recipes/wan2.2")
    add = parser.add_argument_group("Wan2.2").add_argument
    expert = f"the transformer to train, with the other one for sample clips only; {experts.BOTH}: one after the other"
    add("--expert", choices=(*EXPERTS, experts.BOTH), help=expert)
    other = "folder or file with weights or a LoRA of the other expert, for sample clips (default: that of the model)"
    add("--other_transformer_path", help=other)
    single.add_flags(add)
    content = "yaml with flow shift, boundary and paths inside a model in original layout (default: by task, from config/wan2.2)"
    add("--config_path", help=content)
    add("--tokenizer_max_length", type=number(int, 1, 512), default=512, help="maximum text tokens of a caption")
    args = parser.parse(argv)
    check(args)
    return args


def check_model(args: argparse.Namespace) -> dict[str, Component]:
    """Find and check the model's components; loads no weights. Raises UserError where they do not fit --train_mode.

    `transformer` is the expert in training, `other` the other one, and `model_index` has their boundary.
    """
    if published := planned_model(args):
        components = dry_run_components(published, "wan2.2")
    else:
        root = local_folder(args.pretrained_model_name_or_path)
        yaml = args.config_path or SHIPPED_YAMLS[args.train_mode]
        paths = models.original_paths(root, yaml)
        if args.train_mode == single.MODE:
            components = one_transformer(args, root, paths, yaml)
        else:
            components = diffusers_model(args, root) if paths is None else original_model(args, root, paths, yaml)
            check_mode(args, components["other"].config)
    # of a TI2V-5B in diffusers layout the model's index says what it is
    if args.train_mode != single.MODE or "scheduler" not in components:
        check_mode(args, components["transformer"].config)
    if args.train_mode == single.MODE:
        single.check_components(components)
    return components


def one_transformer(
    args: argparse.Namespace, root: Path, paths: dict[str, Path] | None, yaml: str
) -> dict[str, Component]:
    """The components of a TI2V-5B in either layout; paths: of original_paths."""
    if paths is not None:
        return models.original_components(paths, yaml, args.transformer_path, args.vae_path)
    single.check_index(root)
    overrides = {"transformer": ("wan", args.transformer_path), "vae": ("wan_vae", args.vae_path)}
    checked = () if is_dry_run(args) else ("text_encoder",)
    return models.diffusers_components(root, PIPELINES, NAMES, overrides, checked)


def diffusers_model(args: argparse.Namespace, root: Path) -> dict[str, Component]:
    """The components of a model in diffusers layout."""
    checked = () if is_dry_run(args) else ("text_encoder",)
    overrides = {"vae": ("wan_vae", args.vae_path)}
    components = models.diffusers_components(root, PIPELINES, NAMES, overrides, checked)
    index, known = experts.read_index(root), components["transformer"].config
    names = (args.expert, args.transformer_path), (experts.other_expert(args.expert), wan_both.other_weights(args))
    for key, (expert, path) in zip(("transformer", "other"), names, strict=True):
        folder = EXPERTS[expert]
        components[key] = models.choose_component(
            key if key == "transformer" else "other_transformer", expert_inside(path, folder), root / folder, "wan",
            known, check_weights=not is_dry_run(args),
        )  # fmt: skip
    return {**components, "model_index": index}


def expert_inside(path: str | None, folder: str) -> str | None:
    """The path of an expert's weights: of a whole model, or of the output folder of a run, its folder is meant."""
    inside = Path(path or "") / folder
    return str(inside) if path and (inside / "config.json").is_file() else path


def original_model(args: argparse.Namespace, root: Path, paths: dict[str, Path], yaml: str) -> dict[str, Component]:
    """The components of a model in the original layout; paths: of original_paths."""
    folders = experts.original_folders(root, yaml)
    components = models.original_components(
        {**paths, "transformer": folders[args.expert]}, yaml, expert_inside(args.transformer_path, EXPERTS[args.expert]),
        args.vae_path,
    )  # fmt: skip
    other = experts.other_expert(args.expert)
    components["other"] = models.choose_component(
        "other_transformer", expert_inside(wan_both.other_weights(args), EXPERTS[other]), folders[other], "wan", {}
    )
    return {**components, "model_index": experts.original_index(root, yaml)}


def check_mode(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Check that a transformer with this configuration is an expert that is made for --train_mode."""
    channels, made_for = config.get("in_channels"), {CHANNELS[mode]: mode for mode in TASKS}
    if config.get("image_dim"):
        what, hint = "the transformer has an image embedder: it is Wan2.1", "use scripts/wan2.1/train.py"
        raise UserError("--pretrained_model_name_or_path", what, hint, MODEL)
    if channels != CHANNELS[args.train_mode]:
        what = f"the transformer takes {channels} channels, which no mode here trains"
        if channels in made_for:
            what = f"the transformer takes {channels} channels: it is made for --train_mode {made_for[channels]}"
        raise UserError(f"--train_mode {args.train_mode}", what, "use that mode, or weights made for this one", MODEL)


def expert_profile(args: argparse.Namespace, components: dict[str, Component]) -> ModelProfile:
    """The profile of the transformer in training from configurations alone, for the plan and the estimates."""
    config, by_token = components["transformer"].config, args.train_mode == single.MODE
    trained = TASKS[args.train_mode] + ("" if by_token else f", {args.expert} expert")
    network = partial(cross_attention_network, config, text_tokens=args.tokenizer_max_length, image_tokens=0)
    return ModelProfile(
        task=f"{trained} (the transformer takes {config['in_channels']} channels)",
        network=partial(network, timestep_per_token=by_token),
        blocks=LORA_TARGETS,
        components={name: (CLASSES[name], components[name].config) for name in CLASSES if name in components},
        fps=single.FPS if by_token else 16.0,
        vae_frames=4,
        other=None
        if by_token
        else (CLASSES["transformer"], components.get("other", components["transformer"]).config),
        ratios=wan_ratios(components),
    )


class Trained(NamedTuple):
    """What a run trains: the flow shift, the boundary between the experts, and the expert's window of noise levels."""

    shift: FlowShift
    boundary: float | None
    window: NoiseWindow

    def line(self, args: argparse.Namespace) -> str:
        """What the start of a run says of it."""
        if self.boundary is None:
            return f"first frame given to the model in {args.i2v_ratio:.0%} of the clips (--i2v_ratio)"
        return f"expert      {args.expert}, sigma {self.window.words()} (the boundary is {self.boundary:g})"

    def facts(self, args: argparse.Namespace) -> dict[str, object]:
        """What args.json, manifests and headers of exports say of it."""
        facts: dict[str, object] = {"task": f"wan2.2 {args.train_mode}", "shift": self.shift.value}
        return facts | ({} if self.boundary is None else {"expert": args.expert, "boundary": self.boundary})


def describe(args: argparse.Namespace, components: dict[str, Component], checkpoint: Path | None) -> Trained:
    """The noise that the expert is trained at, in a run that resumes from this checkpoint (None = a new run)."""
    if args.train_mode == single.MODE:
        single.check_resumed(checkpoint)
    else:
        experts.check_same_expert(args.expert, checkpoint)
    shipped, scheduler = SHIPPED_YAMLS[args.train_mode], components.get("scheduler")
    shift = choose_shift(args, checkpoint, scheduler, named_yaml=args.config_path, shipped_yaml=shipped)
    if args.train_mode == single.MODE:
        return Trained(shift, None, WHOLE)
    boundary = experts.boundary_of(components["model_index"], checkpoint)
    window = experts.window_of(args.expert, boundary)
    experts.check_window(window, shift.value, args.train_sampling_steps)
    return Trained(shift, boundary, window)


def plan(args: argparse.Namespace) -> int:
    """Plan the run instead of training; return the exit code."""
    from videox.training import dry_run  # imported here, because --help does not need it

    def profile_and_shift() -> tuple[ModelProfile, FlowShift]:
        found = [(run, check_model(run)) for run in experts.runs_of(args)]
        shifts = [describe(run, components, None).shift for run, components in found]
        return expert_profile(*found[0]), shifts[0]

    return dry_run.plan_run(args, profile_and_shift, [run.expert for run in experts.runs_of(args)])


if __name__ == "__main__":
    parse_or_exit(parse_args, plan, planned_model)  # --help, wrong flags, and plans that need no import below

from contextlib import contextmanager
from dataclasses import dataclass, replace

import diffusers
import torch
from accelerate import Accelerator
from diffusers import WanPipeline, WanTransformer3DModel

from videox.data.dataset import Batch
from videox.device import to_device
from videox.diffusion.flow_matching import add_noise, batch_noise, loss_weights, motion_losses, velocity_losses
from videox.distributed.accelerator import compute_dtype
from videox.distributed.collectives import accumulate, backward
from videox.distributed.signals import StopRequest
from videox.encoders.encode import LazyEncoders
from videox.encoders.offload import OffloadedModule, OffloadedTransformer
from videox.engine.base import compute_in_bf16
from videox.families import wan as family
from videox.families import wan_both, wan_ti2v
from videox.families.wan import Wan, build_model, encode_batch, encoding_specs, load_encoders, transformer_inputs
from videox.models import component as models
from videox.models.hub import local_folder
from videox.models.norm_dtype import keep_norm_dtype
from videox.models.shared_memory import load_frozen
from videox.rng import Purpose, hash_key
from videox.run.lifecycle import run_script
from videox.tracking.dump import dump_folder, write_dump
from videox.training import build, loop, memory_check, other_weights, precompute, startup
from videox.training.context import Context, Gather
from videox.training.data import build_data
from videox.training.schedule import build_schedule
from videox.training.step_loss import StepLoss
from videox.training.validator import FamilyValidation, encode_held_out

SAMPLING_GUIDANCE = 4.0  # of the sample clips


@dataclass(frozen=True)
class Expert:
    """The expert in training among the two of diffusers' pipeline; other: rests in host memory between its uses."""

    name: str
    boundary: float
    other: LazyEncoders[OffloadedModule]


def find_expert(
    args: argparse.Namespace, components: dict[str, Component], accelerator: Accelerator, boundary: float | None = None
) -> Expert:
    """The expert in training, with the other one still on disk; boundary: None = that of the model."""
    chosen = experts.boundary_of(components["model_index"], None) if boundary is None else boundary
    return Expert(args.expert, chosen, LazyEncoders(partial(load_other, args, components["other"], accelerator)))


def load_other(
    args: argparse.Namespace, component: Component, accelerator: Accelerator, gather: Gather
) -> OffloadedModule:
    """Load the other expert into host memory in the compute dtype; it computes as the one in training does."""
    device, dtype = accelerator.device, compute_dtype(accelerator)
    model = load_frozen(
        WanTransformer3DModel, component, dtype, pinned=device.type == "cuda", gather=gather,
        change=wan_both.merge_of_other(args, component, dtype),
    )  # fmt: skip
    keep_norm_dtype(model, device)
    if dtype == torch.bfloat16:
        compute_in_bf16(model, device)
    return OffloadedTransformer(model, model.blocks, device, other_weights.fits_beside(accelerator))


def accumulate_gradients(
    args: argparse.Namespace, accelerator: Accelerator, wan: Wan, window: NoiseWindow, model: torch.nn.Module,
    batch: Batch, dump_to: Path | None,
) -> torch.Tensor:  # fmt: skip
    """Accumulate the gradients of a micro-batch and return each sample's part of the step's loss, float64 [B].

    x_t = (1 - sigma) x_0 + sigma noise with sigma in the expert's window; the model predicts noise - x_0. Every draw
    is a function of a sample's key.
    """
    device, keys = accelerator.device, batch["keys"]
    latents, given = encode_batch(args, wan, batch, keys if args.vae_sample_mode == "sample" else None)
    sigmas = to_device(build.sigmas_of_batch(args, batch, wan.shift, window), device)
    noise = to_device(batch_noise([int(hash_key(key, Purpose.NOISE)) for key in keys], latents.shape[1:]), device)
    inputs, target = transformer_inputs(add_noise(latents, noise, sigmas), sigmas, given), noise - latents
    weights = to_device(torch.from_numpy(batch["weights"]), device)  # each planned sample's share of the global batch
    with accumulate(accelerator, model, batch["last"]):
        prediction = model(**inputs)[0]
        generated = given.get("generated")  # latent frames that are not given: of ti2v alone
        losses = velocity_losses(prediction, target, loss_weights(sigmas, args.weighting_scheme), generated)
        if args.motion_sub_loss:
            losses = motion_losses(prediction, target, losses, args.motion_sub_loss_ratio, generated)
        parts = losses.double() * weights
        backward(accelerator, model, parts.sum())
    write_dump(
        dump_to, accelerator.process_index, batch, inputs, latents=latents, noise=noise, sigma=sigmas,
        timestep=inputs["timestep"], weight=weights, target=target, prediction=prediction, loss=losses,
    )  # fmt: skip
    return parts.detach()


@contextmanager
def sampling_pipeline(
    wan: Wan, expert: Expert | None = None
) -> Iterator[WanPipeline | diffusers.WanImageToVideoPipeline]:
    """The pipeline with its encoders on the device, and with both experts, one in training, if there are two."""
    if expert is None:
        with family.sampling_pipeline(wan) as pipeline:
            yield pipeline
        return
    with family.sampling_pipeline(wan) as pipeline, expert.other().on_device() as other:
        pipeline.register_to_config(boundary_ratio=expert.boundary)
        both = {EXPERTS[expert.name]: wan.transformer, EXPERTS[experts.other_expert(expert.name)]: other}
        for name, transformer in both.items():
            setattr(pipeline, name, transformer)
        yield pipeline
        pipeline.transformer_2 = None


def validation_of(
    args: argparse.Namespace, ctx: Context, components: dict[str, Component], wan: Wan, trained: Trained
) -> FamilyValidation:
    """How the run validates and samples; samples of an expert need the other one, too."""
    predict = partial(family.predict_held_out, wan)
    if args.train_mode == single.MODE:
        pipeline = partial(sampling_pipeline, wan)
        return FamilyValidation(predict, pipeline, single.GUIDANCE, given_frames=wan_ti2v.given_frames)
    expert = find_expert(args, components, ctx.accelerator, trained.boundary)
    return FamilyValidation(
        predict, partial(sampling_pipeline, wan, expert), SAMPLING_GUIDANCE, window=trained.window,
        no_samples=other_weights.prepare(args, ctx, components["other"], expert.other),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plan or train; return the exit code (0 finished, 75 stopped and saved)."""
    args = parse_args(argv)
    if is_dry_run(args):
        return plan(args)
    command = [__file__, *(sys.argv[1:] if argv is None else argv)]
    return wan_both.train_in_turn(args, command, train, lambda run: describe(run, check_model(run), None))


def train(args: argparse.Namespace, ctx: Context) -> int:
    """Build schedule, data, expert and records, in this order, then loop over the steps; return the exit code."""
    components = check_model(args)
    profile, trained = expert_profile(args, components), describe(args, components, ctx.checkpoint)
    startup.announce(args, ctx, profile.task, trained.shift)
    ctx.print(trained.line(args))

    # schedule: all samples, steps and random draws of the run follow from it
    schedule, shift = build_schedule(args, ctx, profile), trained.shift.value
    memory_check.plan_memory(args, ctx, profile, schedule)
    state, lr_at = schedule.state, build.lr_of_step(args, schedule)
    lora = build.build_lora(args, ctx, schedule, components["transformer"], LORA_TARGETS, WanPipeline)
    # data: outputs of the frozen encoders, from the cache where there is one; the same for both experts
    encoders = LazyEncoders(partial(load_encoders, args, components, shift, ctx.accelerator))
    specs = encoding_specs(args, components, encoders, compute_dtype(ctx.accelerator))
    data = build_data(args, ctx, schedule, specs, encoders)
    if args.cache_only:
        return precompute.fill_cache(ctx, data.missing, data.encode, args.dataloader_num_workers)
    # model: build_engine freezes what is not trained, and loads the checkpoint if the run resumes
    transformer = build.load_model(args, ctx, schedule, WanTransformer3DModel, components["transformer"])
    wan = build_model(components, shift, transformer, encoders, data.encode)
    engine = build.build_engine(args, ctx, schedule, transformer, transformer.blocks, components["transformer"], lora)
    wan = replace(wan, transformer=engine.network)  # as validation and sampling call it
    # records, checkpoints, validation
    facts = trained.facts(args)
    recorder, guard, checkpoints = build.build_records(args, ctx, schedule, engine, profile, transformer, facts)
    held_out = encode_held_out(data.dataset, schedule, partial(encode_batch, args, wan, keys=None))
    validation = validation_of(args, ctx, components, wan, trained)
    validate = build.build_validator(args, ctx, schedule, engine, recorder, held_out, validation, shift)
    accumulate_batch = partial(accumulate_gradients, args, ctx.accelerator, wan, trained.window, engine.model)
    memory_check.try_largest(args, ctx, schedule, engine, data.dataset, partial(accumulate_batch, dump_to=None))
    if state.step == 0:
        recorder.first_batch(schedule, data.dataset)
        validate()

    with StopRequest() as stop, data.encode, recorder:
        for step in loop.iterate_steps(schedule, data, recorder.clock):
            engine.set_lr(lr := lr_at(state.step))
            loss = StepLoss(step, ctx.device)
            dump_to = dump_folder(ctx.output_dir, state.step + 1, args.dump_steps)
            for batch in step.micro_batches():
                with memory_check.name_batch(batch, profile.ratios):  # encode, add noise, forward, loss, backward
                    loss.add(batch, accumulate_batch(batch, dump_to))
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
