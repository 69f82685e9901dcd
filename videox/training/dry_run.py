"""--dry_run and --explain: plan a run and estimate its cost without loading a weight or training a step.

No accelerate state is made and no processes are joined: what the launcher would start is read from its environment
variables, and the first process alone plans.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videox.data.index.index import Index, build_index, load_index
from videox.data.plan.balance import PlanBalance, balance_by_world_size
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import largest_bucket, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings, columns_of
from videox.distributed.backends import BACKENDS, requested_engine
from videox.errors import STORAGE, UserError
from videox.estimate.cost_model import read_cost_model
from videox.estimate.data_report import caption_lines, check_captions, row_lines
from videox.estimate.explain_row import explain_row
from videox.estimate.memory import (
    SAFE_SHARE,
    UNSHARDED,
    Encoders,
    Memory,
    MemorySetup,
    Parameters,
    checkpoint_size,
    memory_of,
    nearest_that_fits,
)
from videox.estimate.mfu import device_peak
from videox.estimate.model_profile import ModelProfile
from videox.estimate.peak_memory import module_bytes, peak_bytes
from videox.estimate.plot import plot_plan
from videox.estimate.report import (
    GIB,
    WORLD_SIZES,
    EpochFlops,
    GpuSpeed,
    attribute_line,
    attributes,
    balance_lines,
    disk_lines,
    epoch_flops,
    format_changes,
    memory_lines,
    plan_records,
    plan_report,
    samples_of,
    step_lines,
    tail_line,
    target_size_lines,
    time_lines,
)
from videox.files import atomic_write, write_json_atomically
from videox.lora.adapters import adapter_sizes, choose_targets
from videox.models.activation_checkpoint import select_blocks
from videox.models.folder import build_on_meta, read_json
from videox.optim.build import choose_trainable
from videox.optim.registry import check_supported
from videox.shapes import Bucket, token_count
from videox.tracking.jsonl import json_line
from videox.training.args import optimizer_of
from videox.training.optimizer import try_optimizer
from videox.training.schedule import data_location, plan_settings
from videox.training.startup import notes

PER_HOST = 8  # processes per machine, unless the launcher says otherwise


@dataclass(frozen=True)
class Launch:
    """What the launcher starts, or the dry run's flags state instead.

    Attributes:
        backend: name of a backend.
        processes: number of processes.
        per_host: processes on each machine.
        half: compute in bfloat16.
        zero: `zero_optimization` of the DeepSpeed configuration file.
    """

    backend: str
    processes: int
    per_host: int
    half: bool
    zero: Mapping[str, Any]


def plan_run(args: argparse.Namespace, describe: Callable[[], ModelProfile]) -> int:
    """Print the plan of a run and its estimates, or how one row is used (--explain); return the exit code.

    Args:
        describe: returns the model's profile; called on the first process only.

    Raises:
        UserError: the flags, the data or the model cannot be used.
    """
    if os.environ.get("RANK", "0") == "0":
        _plan(args, describe())
    return 0


def launch_of(environment: Mapping[str, str], args: argparse.Namespace) -> Launch:
    """The launch to plan for: the launcher's variables, overridden by --dry_run_processes and --dry_run_backend."""
    kind, zero = requested_engine(environment), _zero_settings(environment)
    processes = args.dry_run_processes or int(environment.get("WORLD_SIZE", "1"))
    if kind == "deepspeed":
        backend = f"zero{zero.get('stage', environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2))}"
    else:
        backend = f"fsdp{environment.get('FSDP_VERSION', '1')}" if kind == "fsdp" else "single"
    if args.dry_run_backend == "single" and processes > 1:
        hint = "use --dry_run_backend ddp or --dry_run_processes 1"
        raise UserError("--dry_run_backend", f"single is one process, but {processes} are planned", hint)
    backend = args.dry_run_backend or backend
    if backend in ("single", "ddp"):
        backend = "ddp" if processes > 1 else "single"
    if backend not in BACKENDS:
        raise UserError("accelerate launch", f"{backend} is not supported", f"launch one of {', '.join(BACKENDS)}")
    precision = args.mixed_precision or environment.get("ACCELERATE_MIXED_PRECISION", "no")
    local = PER_HOST if args.dry_run_processes else int(environment.get("LOCAL_WORLD_SIZE", PER_HOST))
    return Launch(backend, processes, min(processes, local), precision == "bf16", zero)


def _zero_settings(environment: Mapping[str, str]) -> Mapping[str, Any]:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return read_json(Path(path)).get("zero_optimization", {}) if path and path != "none" else {}


def _plan(args: argparse.Namespace, model: ModelProfile) -> None:
    launch = launch_of(os.environ, args)
    tried = try_optimizer(args)
    check_supported(optimizer_of(args), launch.backend, "bf16" if launch.half else "no", lora=args.lora_rank > 0)
    index = _index(args)
    check_captions(index, args.missing_caption)
    columns = columns_of(index, by_second=args.video_sample_fps > 0)
    cost = read_cost_model(Path(args.cost_model)) if args.cost_model else model.cost
    settings = plan_settings(
        args, seed=args.seed or 0, slots=launch.processes * args.gradient_accumulation_steps,
        min_frames=model.min_frames, cost_linear=cost[0], cost_quadratic=cost[1],
        barrier=BACKENDS[launch.backend].barrier, accumulation=args.gradient_accumulation_steps,
    )  # fmt: skip
    if args.seed is None:
        _print("no --seed is given: the plan below is of seed 0; a run draws its own seed")
    if args.explain is not None:
        _print(*explain_row(index, columns, settings, args.explain, args.num_train_epochs, args.caption_dropout))
        return
    plan = plan_epoch(columns, settings, 0)
    _print(f"{model.task}; dry run: nothing is trained, no weights are loaded", *tried, *notes(args))
    _print(
        *row_lines(index, columns, plan, settings.policy),
        *caption_lines(index, settings.caption_rules),
        attribute_line(attributes(columns, plan, settings.policy)),
    )
    _print(tail_line(plan, settings), "target sizes:", *(f"  {line}" for line in target_size_lines(settings.policy)))
    _Estimates(args, model, launch, columns, settings, plan).report()


class _Estimates:
    """The estimates for a plan: FLOPs, balance, memory, disk, time; and the files that contain them."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: ModelProfile,
        launch: Launch,
        columns: PlanColumns,
        settings: PlanSettings,
        plan: EpochPlan,
    ) -> None:
        self.args, self.launch, self.columns, self.settings, self.plan = args, launch, columns, settings, plan
        self.model = model
        share = 1.0 if args.gradient_checkpointing else args.selective_ac
        self.setup = MemorySetup(
            backend=launch.backend,
            processes=launch.processes,
            per_host=launch.per_host,
            half=launch.half,
            recompute_share=share,
            offload_encoders=args.low_vram,
            workers=args.dataloader_num_workers,
            tokens=token_count(largest_bucket(columns, settings)),
            batch=args.train_batch_size,
            zero=launch.zero,
            ema_device=args.ema_device if args.use_ema else "",
            full_weights=args.save_whole_weights,
            optimizer=optimizer_of(args),
            lora=args.lora_rank > 0,
        )
        cast = launch.backend in UNSHARDED and self.setup.frozen_bytes == 4
        self.network = replace(model.network(half=launch.half, cast=cast), frozen=self.setup.lora)

    def report(self) -> None:
        """Print the estimates and write plan_report.json, plan_report.png and the requested plans."""
        args, plan, settings = self.args, self.plan, self.settings
        chosen = (
            select_blocks(len(self.network.blocks), self.setup.recompute_share) if self.setup.recompute_share else []
        )
        flops = epoch_flops(plan, self.network, chosen)
        worlds = sorted({*WORLD_SIZES, self.launch.processes})
        balanced = balance_by_world_size(self.columns, settings, args.gradient_accumulation_steps, worlds)
        _print(*time_lines(plan, flops))
        efficiency = balanced[self.launch.processes].balance
        _print(*step_lines(plan, settings, flops, self.launch.processes, speed_of(args), efficiency))
        _print("balance by number of processes:", *balance_lines(balanced, settings))
        parameters = self._parameters()
        memory = self._memory(parameters)
        checkpoint = checkpoint_size(parameters, self.setup)
        steps = args.max_train_steps or plan.n_steps * args.num_train_epochs
        _print(*disk_lines(checkpoint, args.checkpointing_steps, steps, args.checkpoints_total_limit))
        values = plan_report(
            self.columns, plan, settings, flops=flops, balanced=balanced, memory=memory, checkpoint=checkpoint
        )
        self._write(values, flops, balanced)

    def _parameters(self) -> Parameters:
        args = self.args
        transformer: Any = build_on_meta(*self.model.components["transformer"])
        blocks = [block for name in self.model.blocks for block in getattr(transformer, name)]
        everything, *sizes = (sum(p.numel() for p in module.parameters()) for module in (transformer, *blocks))
        outside = everything - sum(sizes)
        if args.lora_rank:
            shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
            targets = choose_targets(shapes, self.model.blocks, args.lora_target_modules)
            trained = sum(adapter_sizes(shapes, targets, args.lora_rank, dora=args.lora_type == "dora").values())
            return Parameters(everything + trained, trained, max(sizes), outside)
        choose_trainable(transformer, args.trainable_modules, args.trainable_modules_low_learning_rate)
        trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
        return Parameters(everything, trained, max(sizes), outside)

    def _memory(self, parameters: Parameters) -> Memory:
        args = self.args
        largest = largest_bucket(self.columns, self.settings)
        encoders = encoders_of(args, self.model, self.launch.half, largest)
        memory = partial(memory_of, parameters, self.network, encoders)
        found, limit = memory(self.setup), args.gpu_memory * GIB
        ways: list[str] = []
        if found.total() > SAFE_SHARE * limit:
            tokens = [int(self.setup.tokens * share) for share in np.arange(0.9, 0.05, -0.1)]
            fitting = nearest_that_fits(
                self.setup, SAFE_SHARE * limit, memory, sharded_backend=self.model.sharded_backend, fewer_tokens=tokens
            )
            ways = [format_changes(words, memory(setup)) for words, setup in fitting]
        rows = f"{parameters.total / 1e9:.2f} billion parameters, {parameters.trainable / 1e9:.2f} billion trainable"
        _print(rows, *memory_lines(found, self.setup, limit, ways))
        return found

    def _write(self, values: Mapping[str, Any], flops: EpochFlops, balanced: Mapping[int, PlanBalance]) -> None:
        args = self.args
        folder, plan = Path(args.output_dir), self.plan
        with _written_to(folder):
            write_json_atomically(folder / "plan_report.json", values)
            counts = np.bincount(samples_of(plan)[1], minlength=len(plan.buckets))
            plot_plan(folder / "plan_report.png", plan.buckets, counts, counts * flops.per_sample, balanced)
            written = ["plan_report.json", "plan_report.png"]
            for world in args.dry_run_plan:
                settings = replace(self.settings, slots=world * args.gradient_accumulation_steps)
                with atomic_write(folder / f"plan-{world}.jsonl") as temporary, temporary.open("wb") as file:
                    file.writelines(map(json_line, plan_records(plan_epoch(self.columns, settings, 0), world)))
                written.append(f"plan-{world}.jsonl")
        _print(f"written to {folder}: {', '.join(written)}")


def encoders_of(args: argparse.Namespace, model: ModelProfile, half: bool, largest: Bucket) -> Encoders:
    """The bytes of the frozen encoders, and the peak of the VAE encoder at its largest batch of clips.

    Text encoders are loaded in the compute dtype, the others in float32.
    """
    frozen: dict[str, Any] = {n: build_on_meta(*part) for n, part in model.components.items() if n != "transformer"}
    weights = {n: module_bytes(module, 2 if half and n.startswith("text") else 4) for n, module in frozen.items()}
    pixels = torch.empty((min(args.vae_mini_batch, args.train_batch_size), 3, *largest), device="meta")
    work = peak_bytes(lambda: frozen["vae"].encode(pixels).latent_dist.mode())
    return Encoders(weights, work + 4.0 * pixels.numel())


def speed_of(args: argparse.Namespace) -> GpuSpeed:
    """The assumed speed of a GPU: from the flags, or from the GPU of this machine."""
    peak, name = device_peak(args.peak_tflops)
    return GpuSpeed(peak, args.assumed_mfu, f"{args.assumed_mfu:.0%} of {peak / 1e12:g} TFLOP/s, {name}")


def _index(args: argparse.Namespace) -> Index:
    with _written_to(Path(args.output_dir)):
        location = data_location(args)
    build_index(
        location,
        workers=max(args.dataloader_num_workers, 1),
        progress=True,
        trust_metadata=True,
        announce=_print_probing,
    )
    return load_index(location.index_path, location.data_dir)


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """Create the output folder; an OSError of it or of a file in it becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        hint = "free disk space, or use an --output_dir that you can write to"
        raise UserError(str(folder), f"the plan cannot be written ({error})", hint, STORAGE) from error


def _print_probing(files: int, seconds: float) -> None:
    _print(f"{files:,} files are not described by the metadata: probing them takes about {seconds / 60:,.1f} minutes")


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
