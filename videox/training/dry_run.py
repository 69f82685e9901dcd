"""--dry_run and --explain: plan a run and estimate its cost without loading a weight or training a step.

No accelerate state is made and no processes are joined: what the launcher would start is read from its environment
variables, and the first process alone plans.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from videox.data.index.index import Index, build_index, load_index
from videox.data.plan.balance import PlanBalance, balance_by_world_size
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import columns_of
from videox.distributed.backends import BACKENDS
from videox.distributed.environment import is_launched
from videox.errors import DOES_NOT_FIT, STORAGE, UserError, plural
from videox.estimate.activation_choice import choice_lines
from videox.estimate.cost_model import read_cost_model
from videox.estimate.data_report import caption_lines, check_captions, row_lines
from videox.estimate.duration import ENCODER_SHARE, Duration, Speed, format_duration
from videox.estimate.epoch_time import gain_lines, step_time_lines
from videox.estimate.explain_row import explain_row
from videox.estimate.frame_rates import frame_rate_lines
from videox.estimate.host_report import host_lines, missing_lines
from videox.estimate.memory import SAFE_SHARE, Memory, checkpoint_size
from videox.estimate.model_profile import ModelProfile
from videox.estimate.plan_picture import PlanPicture
from videox.estimate.report import (
    GIB,
    LABELS,
    WORLD_SIZES,
    Disk,
    EpochFlops,
    attribute_line,
    attributes,
    balance_lines,
    disk_fact,
    disk_lines,
    duration_facts,
    duration_lines,
    epoch_flops,
    memory_lines,
    plan_records,
    plan_report,
    samples_of,
    step_lines,
    tail_line,
    target_size_lines,
    time_lines,
)
from videox.estimate.several_runs import SeveralRuns
from videox.estimate.stand_in_data import describe_data
from videox.files import atomic_write, write_json_atomically
from videox.optim.registry import check_supported, takes_settings
from videox.tracking.jsonl import json_line
from videox.training.args import optimizer_of, planned_model
from videox.training.flow_shift import FlowShift
from videox.training.notes import notes
from videox.training.planned_gpu import gpu_of, host_room, memory_limit
from videox.training.planned_step import PlannedStep, rates
from videox.training.planning import data_location, plan_settings
from videox.training.run_memory import Launch, RunMemory, chooser, largest_micro_batches, launch_of
from videox.training.speed_flags import check_backend_flags
from videox.training.validation_flags import check_clip_shape


def plan_run(
    args: argparse.Namespace, describe: Callable[[], tuple[ModelProfile, FlowShift]], runs: Sequence[str] = ()
) -> int:
    """Print the plan of a run and its estimates, or how one row is used (--explain); return the exit code.

    It is DOES_NOT_FIT if the flags name a GPU or a host memory that the run does not fit, so that a script can tell;
    under a launcher, which would print a traceback for it, it is 0.

    Args:
        describe: returns the model's profile and the flow shift of a new run; called on the first process only.
        runs: names of the runs of a command that trains several, one after the other.

    Raises:
        UserError: the flags, the data or the model cannot be used.
    """
    if os.environ.get("RANK", "0") == "0":
        fits = _plan(args, *describe(), runs)
        named = args.gpu or args.gpu_memory is not None or args.host_memory is not None
        if named and not fits and not (is_launched(os.environ) or "ACCELERATE_MIXED_PRECISION" in os.environ):
            return DOES_NOT_FIT
    return 0


def _plan(args: argparse.Namespace, model: ModelProfile, shift: FlowShift, runs: Sequence[str]) -> bool:
    """Print the plan and the estimates; return whether the run fits the GPU, True where no run is estimated."""
    launch = launch_of(os.environ, args)
    tried = _try_optimizer(args)
    check_supported(optimizer_of(args), launch.backend, "bf16" if launch.half else "no", lora=args.lora_rank > 0)
    check_backend_flags(args, BACKENDS[launch.backend], half=launch.half)
    check_clip_shape(
        args.sample_resolution, args.sample_frames, "--sample_resolution", "--sample_frames", model.ratios
    )
    index = describe_data(args.dry_run_data) if args.dry_run_data else _index(args)
    check_captions(index, args.missing_caption)
    columns = columns_of(index, by_second=args.video_sample_fps > 0)
    cost = read_cost_model(Path(args.cost_model)) if args.cost_model else model.cost
    settings = plan_settings(
        args, seed=args.seed or 0, slots=launch.processes * args.gradient_accumulation_steps,
        min_frames=model.min_frames, ratios=model.ratios, cost_linear=cost[0], cost_quadratic=cost[1],
        barrier=BACKENDS[launch.backend].barrier, accumulation=args.gradient_accumulation_steps,
    )  # fmt: skip
    if args.seed is None:
        _print("no --seed is given: the plan below is of seed 0; a run draws its own seed")
    if args.explain is not None:
        _print(*explain_row(index, columns, settings, args.explain, args.num_train_epochs, args.caption_dropout))
        return True
    plan = plan_epoch(columns, settings, 0)
    _print(f"{model.task}; dry run: nothing is trained, no weights are loaded", *tried, *notes(args))
    given, planned = args.pretrained_model_name_or_path, planned_model(args)
    if given and planned:
        _print(f"model {planned} (--dry_run_model), because {given} is not a folder on this machine")
    kept = "; a resumed run keeps that of its checkpoint" if args.resume_from_checkpoint else ""
    _print(f"flow shift {shift}{kept}")
    _print(
        *row_lines(index, columns, plan, settings.policy),
        *frame_rate_lines(index, plan, settings.policy, model.fps),
        *([] if args.dry_run_data else caption_lines(index, settings.caption_rules)),
        attribute_line(attributes(columns, plan, settings.policy)),
    )
    _print(tail_line(plan, settings), "target sizes:", *(f"  {line}" for line in target_size_lines(settings.policy)))
    return _Estimates(args, launch, RunMemory(args, model, launch, columns, settings), plan, runs).report()


class _Estimates:
    """The estimates for a plan: FLOPs, balance, memory, disk, time; and the files that contain them."""

    def __init__(
        self, args: argparse.Namespace, launch: Launch, run: RunMemory, plan: EpochPlan, runs: Sequence[str]
    ) -> None:
        self.args, self.launch, self.run, self.plan, self.runs = args, launch, run, plan, runs
        self.columns, self.settings = run.columns, run.settings

    def report(self) -> bool:
        """Print the estimates and write plan_report.json, plan_report.png and the requested plans.

        Returns:
            whether the run fits the GPU.
        """
        args, plan, settings = self.args, self.plan, self.settings
        setup = self.run.setup
        network = self.run.network(setup)
        limit = memory_limit(args)
        flops = epoch_flops(plan, network, self.run.recomputed_flops(limit))
        if args.activation_memory:
            choose = chooser(self.run, limit, alone=BACKENDS[setup.backend].recomputes_alone)
            _print(*choice_lines(largest_micro_batches(plan), choose, limit / GIB, ratios=plan.ratios))
        worlds = sorted({*WORLD_SIZES, self.launch.processes})
        balanced = balance_by_world_size(self.columns, settings, args.gradient_accumulation_steps, worlds)
        balance, several = balanced[self.launch.processes].balance, self.launch.processes > 1
        step = PlannedStep(args, self.run, plan, speed_of(args), balance)
        duration = self._duration(step)
        _print(*time_lines(plan, step.time.seconds_of(plan.buckets)), *step_lines(plan, settings, flops))
        _print(*self._step_lines(step))
        source = "computed, not measured" if args.assumed_mfu is None else "by --assumed_mfu"
        source += f"; balance {balance:.2f}" if several else ""
        _print(*duration_lines(duration, plan.n_steps, self.launch.processes, args.gpu_price, source))
        if several:
            _print("balance by number of processes:", *balance_lines(balanced, settings))
        memory = self._memory()
        checkpoint = checkpoint_size(self.run.parameters(setup.lora_rank), setup)
        disk = Disk(checkpoint, args.checkpointing_steps, self._steps(), args.checkpoints_total_limit)
        _print(*disk_lines(disk, _free_bytes(args.output_dir)))
        together = self._together(duration, disk)
        values = plan_report(
            self.columns, plan, settings, flops=flops, balanced=balanced, memory=memory, checkpoint=checkpoint
        )
        seconds = {"step": step.time.step.total(), "encoding": duration.encoding, "run": duration.run()}
        facts = {
            "samples": f"{len(plan.row):,} per epoch, in {len(plan.buckets)} bucket{'s' * (len(plan.buckets) > 1)}",
            "largest sample": "{} × {} × {}".format(*self.run.largest) + f" ({setup.tokens:,} tokens)",
            **duration_facts(duration, plan.n_steps, self.launch.processes, args.gpu_price),
            "checkpoints": disk_fact(disk),
        }
        extra = {
            "seconds": rounded(seconds), "step_parts": rounded(step.time.step._asdict()),
            "mfu": round(step.time.mfu(), 4), "disk": int(disk.needed()), "gpu_memory": int(memory_limit(args)),
            "host": int(memory.host_peak()), "host_memory": int(host_room(args).total), **together,
        }  # fmt: skip
        picture = self._picture(flops, balanced if several else {}, memory, facts)
        self._write({**values, **extra}, picture)
        needed = self.run.memory(self.run.without_samples()).host_peak()
        fits_host = args.host_memory is None or needed <= host_room(args).total
        return memory.total() <= memory_limit(args) and fits_host

    def _together(self, duration: Duration, disk: Disk) -> dict[str, Any]:
        """Print the time and disk space of several runs together, and return them for the file; {} for one run."""
        if len(self.runs) < 2:
            return {}
        several, args = SeveralRuns(self.runs, duration, disk), self.args
        _print(*several.lines(self.launch.processes, args.gpu_price, _free_bytes(args.output_dir)))
        total = {"seconds": several.seconds(), "disk": several.bytes_needed()}
        return {"runs": list(self.runs), "together": rounded(total)}

    def _steps(self) -> int:
        return int(self.args.max_train_steps or self.plan.n_steps * self.args.num_train_epochs)

    def _duration(self, step: PlannedStep) -> Duration:
        return Duration(
            epoch=step.time.seconds(),
            encoding=step.encoding,
            epochs=self._steps() / self.plan.n_steps,
            cached=self.args.latent_cache is not None,
            variants=self.args.cache_variants,
        )

    def _step_lines(self, step: PlannedStep) -> list[str]:
        """Return the lines on the time of a step and on further flags."""
        args, speed = self.args, step.speed
        assumed = rates(args, self.run.setup.half).words()
        if args.assumed_mfu is not None:
            assumed = f"{args.assumed_mfu:.0%} of {speed.peak / 1e12:g} TFLOP/s (--assumed_mfu)"
        encoding = 0.0 if args.latent_cache is not None else step.encoding / self.plan.n_steps
        if step.encoding:
            assumed += f"; encoders reach {speed.mfu:.0%} of the peak of their dtype"
        return [*step_time_lines(step.time, encoding, assumed), *gain_lines(step.gains())]

    def _memory(self) -> Memory:
        setup, limit = self.run.setup, memory_limit(self.args)
        memory, parameters = self.run.memory(setup), self.run.parameters(setup.lora_rank)
        room = host_room(self.args)
        # this machine is not always the one that trains
        host = room.total if self.args.host_memory is not None else math.inf
        proposals = self.run.proposals(limit, host=host) if memory.total() > SAFE_SHARE * limit else []
        counts = f"{parameters.total / 1e9:.2f} billion parameters, {parameters.trainable / 1e9:.2f} billion trainable"
        _print(
            counts,
            *memory_lines(memory, setup, limit, proposals),
            *host_lines(memory, setup, room.total, room.source, self.run.less_host(limit)),
            *missing_lines(proposals, room.total, room.source),
        )
        if self.run.memory(self.run.without_samples()).host_peak() <= room.total < memory.host_peak():
            _print("  too little for the other expert: the run would make no sample clips")
        return memory

    def _picture(
        self, flops: EpochFlops, balanced: Mapping[int, PlanBalance], memory: Memory, facts: Mapping[str, str]
    ) -> PlanPicture:
        plan = self.plan
        counts = np.bincount(samples_of(plan)[1], minlength=len(plan.buckets))
        return PlanPicture(
            title=self.run.model.task,
            buckets=plan.buckets,
            counts=counts,
            flops=counts * flops.per_sample,
            balanced=balanced,
            memory={LABELS.get(name, name): size / GIB for name, size in memory.at_peak().items()},
            total=memory.total() / GIB,
            limit=memory_limit(self.args) / GIB,
            card=self.args.gpu or "GPU",
            facts=facts,
            ratios=plan.ratios,
        )

    def _write(self, values: Mapping[str, Any], picture: PlanPicture) -> None:
        from videox.estimate.plot import plot_plan  # imported here, because matplotlib loads slowly

        args = self.args
        folder = Path(args.output_dir)
        with _written_to(folder):
            write_json_atomically(folder / "plan_report.json", values)
            plot_plan(folder / "plan_report.png", picture)
            written = ["plan_report.json", "plan_report.png"]
            for world in args.dry_run_plan:
                settings = replace(self.settings, slots=world * args.gradient_accumulation_steps)
                with atomic_write(folder / f"plan-{world}.jsonl") as temporary, temporary.open("wb") as file:
                    file.writelines(map(json_line, plan_records(plan_epoch(self.columns, settings, 0), world)))
                written.append(f"plan-{world}.jsonl")
        _print(f"written to {folder}: {', '.join(written)}")


def _try_optimizer(args: argparse.Namespace) -> list[str]:
    if not takes_settings(optimizer_of(args)):
        return []
    from videox.training.optimizer import try_optimizer  # imported where there is one to try: it loads torch

    return try_optimizer(args)


def speed_of(args: argparse.Namespace) -> Speed:
    """Return the assumed speed of the encoders: at --assumed_mfu, or at a share that is assumed for them."""
    gpu, _ = gpu_of(args)
    peak = gpu.bf16 if args.peak_tflops is None else args.peak_tflops * 1e12
    return Speed(gpu, peak, args.assumed_mfu or ENCODER_SHARE, args.allow_tf32)


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return seconds with four significant digits, for the file."""
    return {name: float(f"{value:.4g}") for name, value in seconds.items()}


def _free_bytes(folder: str) -> int:
    """Return the free bytes of the disk of a folder that may not exist yet."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


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
    _print(
        f"the size and length of {files:,} {plural(files, 'file')} are not known yet: reading them takes about {format_duration(seconds)}"
    )


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
