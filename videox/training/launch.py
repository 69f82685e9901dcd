"""Opens the processes and the run folder, runs a family's `train` in them, and ends all processes together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from videox.distributed.accelerator import make_accelerator
from videox.distributed.collectives import gather_objects
from videox.distributed.cuda_variables import set_cuda_variables
from videox.distributed.environment import settle_environment
from videox.distributed.peer_watch import PeerWatch
from videox.distributed.signals import StopOutsideSteps, stop_with_launcher
from videox.errors import INTERRUPTED, INTERRUPTED_LINE
from videox.run.equal_processes import code_facts, refuse_differences
from videox.run.failure import FailureMonitor
from videox.run.lifecycle import open_run
from videox.run.watchdog import Watchdog
from videox.tracking.report.live import LiveReport
from videox.training.args import PATHS
from videox.training.argument_parser import AUTO
from videox.training.context import Context
from videox.training.memory_check import explain_oom

SAME_COMMAND = "start all processes with the same command and the same installation"
# Flags whose values may differ from machine to machine: local paths, whose content is compared later, and workers.
LOCAL_FLAGS = frozenset((*PATHS, "config", "dataloader_num_workers")) - {"output_dir", "resume_from_checkpoint"}


def flags_of_all(args: argparse.Namespace) -> dict[str, object]:
    """Return the values of the flags that must be equal in all processes, by flag."""
    return {f"--{name}": value for name, value in sorted(vars(args).items()) if name not in LOCAL_FLAGS}


def launch(args: argparse.Namespace, train: Callable[[argparse.Namespace, Context], int]) -> int:
    """Open processes and run folder, call train(args, ctx), and return its exit code.

    Raises:
        UserError: the launch, the folder or the checkpoint to resume from cannot be used.
        PeerFailed: another process of the run failed first.
        StopSignal: a stop signal came outside of the steps.
    """
    with StopOutsideSteps() as signals:
        return _launch(args, train, signals)


def _launch(
    args: argparse.Namespace, train: Callable[[argparse.Namespace, Context], int], signals: StopOutsideSteps
) -> int:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        signals.begin()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # one bar per component, each complete at once, would bury the start's lines
    stop_with_launcher(os.environ)
    set_aside = settle_environment(os.environ)
    set_cuda_variables(os.environ, deterministic=args.deterministic)
    monitor, output_dir = FailureMonitor(), Path(args.output_dir)
    with PeerWatch(os.environ) as peers:
        accelerator, backend = make_accelerator(args.mixed_precision, peers)
        gather, is_main = gather_objects(accelerator), accelerator.is_main_process
        if set_aside:
            accelerator.print(*set_aside, sep="\n")
        if accelerator.num_processes > 1:
            accelerator.print(*monitor.join(accelerator.process_index, gather, os.environ), sep="\n", end="")
    if accelerator.num_processes > 1:
        with monitor.first_cause():
            refuse_differences({**flags_of_all(args), **code_facts()}, SAME_COMMAND, gather)
    # Not before: while several processes wait for each other to join, Python's handlers are not called.
    signals.begin()
    folder = open_run(
        output_dir, resume=args.resume_from_checkpoint, verify=not args.skip_verify, is_main=is_main, gather=gather
    )
    # The monitor is entered inside the run folder too, so that run_status.json gets the first cause of a failure.
    report = LiveReport(output_dir, args.report_seconds, enabled=is_main)
    watchdog = Watchdog(None if args.watchdog_seconds == AUTO else args.watchdog_seconds, monitor, output_dir)
    try:
        with monitor.first_cause(), folder as run, monitor.first_cause(), watchdog:
            monitor.status = run.status
            signals.before_exit = partial(run.status.write, "stopped", exit_code=INTERRUPTED, error=INTERRUPTED_LINE)
            ctx = Context(accelerator, backend, run, gather, output_dir, report=report, watchdog=watchdog)
            with signals.raised(), explain_oom(ctx.memory):
                code = train(args, ctx)
            signals.end()
        monitor.leave()
    except KeyboardInterrupt:  # the user wants to leave at once
        report.finish(wait=0.0)
        raise
    finally:  # after the status says how the run ended
        signals.end()
        report.finish()
    return code
