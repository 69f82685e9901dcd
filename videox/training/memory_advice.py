"""The estimated memory of a run in progress, and which flags to change after an out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NoReturn

from videox.errors import LOAD_ERRORS, UserError
from videox.estimate.host_report import missing_lines
from videox.estimate.memory import SAFE_SHARE
from videox.estimate.report import GIB, proposal_lines
from videox.training.planned_gpu import Room, host_room
from videox.training.run_memory import RunMemory

# What runs out of memory (videox.device.memory_phase) -> its phase in the estimate; "states": weights, gradients and
# optimizer alone. Other phases are not estimated: loading, validation, saves and exports.
PHASES: Mapping[str, str] = {
    **dict.fromkeys(("the VAE", "the text encoder", "the image encoder", "encoding the held-out rows"), "encoding"),
    **dict.fromkeys(("the forward pass", "the backward pass"), "training"),
    "the optimizer step": "step",
    "placing weights and optimizer": "states",
}
NOT_ESTIMATED: Mapping[str, str] = {"validation": "use fewer --validation_prompts, or add --low_vram"}
OTHERWISE = (
    "add --low_vram, --gradient_checkpointing or --latent_cache, or lower --token_sample_size; see docs/dry_run.md"
)
FIT = "to make it fit"
LESS = 0.9  # of the estimate, is the goal where a run does not fit although its estimate does


class MemoryAdvice:
    """The memory of a run as a dry run estimates it. Nothing is computed before it is asked for.

    Until `plan` is called it knows nothing of the run.
    """

    def __init__(self) -> None:
        self._build: Callable[[], RunMemory] = _refuse
        self._room: Callable[[], Room] = _refuse

    def plan(self, build: Callable[[], RunMemory], room: Callable[[], Room]) -> None:
        """Set how the memory of the run is estimated, and how that of its GPU is read."""
        self._build, self._room = build, room

    @cached_property
    def run(self) -> RunMemory:
        """The estimate; raises UserError where the plan was not made yet."""
        return self._build()

    def allocated(self, *, encoded: bool) -> float | str:
        """Return the predicted peak of tensors in the largest micro-batch, in bytes; or why there is none.

        Args:
            encoded: the encoders run on it, too.
        """
        try:
            memory = self.run.memory(self.run.setup)
        except (UserError, *LOAD_ERRORS) as why:
            return _reason(why)
        phases = ("training", "encoding") if encoded else ("training",)
        return max(memory.only(phase).allocated() for phase in phases)

    def after_oom(self, phase: str) -> tuple[str, list[str]]:
        """Return how to fix an out-of-memory error, and lines with the memory of each change.

        Args:
            phase: what ran, as in the message.
        """
        try:
            return _advice(self.run, self._room(), phase)
        except (UserError, *LOAD_ERRORS) as why:  # the error that ends the run must be reported whatever happens here
            return NOT_ESTIMATED.get(phase, OTHERWISE), [f"the memory of this run cannot be estimated: {_reason(why)}"]


def _refuse() -> NoReturn:
    raise UserError("the plan", "was not made yet", "see docs/dry_run.md")


def _reason(why: BaseException) -> str:
    if isinstance(why, UserError):
        return f"{why.where}: {why.what}"
    return f"{type(why).__name__}: {' '.join(str(why).split())[:300]}"


def _advice(run: RunMemory, room: Room, phase: str) -> tuple[str, list[str]]:
    setup, limit, host = run.setup, room.available, host_room(run.args)
    memory = run.memory(setup)
    others = f"; other programs use {room.others / GIB:.1f} GiB of it" if room.others >= GIB else ""
    lines = [
        f"estimate for these flags: {memory.total() / GIB:.1f} GiB, with {setup.batch} x {setup.tokens:,} tokens in the "
        f"largest micro-batch; GPU: {room.total / GIB:.1f} GiB ({room.source}){others}"
    ]
    goal = FIT
    estimated = PHASES.get(phase)
    if memory.total() > SAFE_SHARE * limit:
        proposals = run.proposals(limit, host=host.total)
    elif estimated is None:
        lines.append(f"the training is estimated to fit; {phase} is not part of the estimate")
        return NOT_ESTIMATED.get(phase, OTHERWISE), lines
    else:
        lines.append("the estimate said that this fits: it is too low for this run, or the memory is fragmented")
        goal = f"to need {1 - LESS:.0%} less in this phase"
        limit = LESS * memory.only(estimated).total() / SAFE_SHARE
        proposals = run.proposals(limit, estimated, host.total)
    if goal != FIT and not any(proposal.fits for proposal in proposals):
        return OTHERWISE, [*lines, f"none of the changes that were tried needs {1 - LESS:.0%} less in this phase"]
    lines += [*proposal_lines(proposals, limit, goal), *missing_lines(proposals, host.total, host.source)]
    first = next((proposal for proposal in proposals if proposal.fits), proposals[0])
    if not first.fits:
        return "train smaller or shorter samples, or use a GPU with more memory", lines
    if first.filled:
        return "fill a --latent_cache first, by the same command with --cache_only", lines
    flags = ", ".join(applied.change.flags for applied in first.changes)
    return f"use {flags} ({first.changes[-1].total / GIB:.1f} GiB by the estimate)", lines
