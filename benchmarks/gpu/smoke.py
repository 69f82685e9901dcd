"""Cases of gpu.py: both families end to end by their train scripts, with each flag of speed and memory.

The first row of a family trains, saves, resumes and exports. The others train three steps with one flag, and their
losses are compared with those of a row without it: bit for bit where the flag must not change a number, for which both
runs are deterministic, and within a tolerance elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gpu.scales import Case, Scale, Values, nothing
from gpu.training_runs import STEPS, WORKSPACE, check_export

FAMILIES = ("wan2.1", "hunyuanvideo")
LOSSES = tuple(f"loss {step}" for step in range(1, STEPS + 1))
WHOLE, PLAIN = "train, save, resume, export", "--gradient_checkpointing"
EXACT = "--deterministic --gradient_checkpointing"
# What HunyuanVideo trains, whose blocks of the published width have gigabytes: all of one kind of blocks in its first
# row, and a LoRA in the others.
PART_OF_MODEL = {"hunyuanvideo": ("--trainable_modules", "single_transformer_blocks")}
LORA = {"hunyuanvideo": ("--lora_rank", "16")}
CLOSE, WIDE = 0.02, 0.2  # relative difference of losses: of another rounding, and of other latents or text


@dataclass(frozen=True)
class Row:
    """A run with some flags.

    like: the row with whose losses it is compared, "" = none; within: relative difference that passes, 0 = none.
    """

    flags: str
    like: str = ""
    within: float = 0.0


ROWS = (
    Row(EXACT),
    Row(f"{EXACT} --gradient_checkpointing_keep attention", EXACT),
    Row(f"{EXACT} --offload_activations", EXACT),
    Row("--deterministic --activation_memory auto", EXACT),
    Row(f"{EXACT} --low_vram", EXACT),
    Row(PLAIN, EXACT, CLOSE),
    Row(f"{PLAIN} --attention_backend auto", PLAIN, CLOSE),
    Row(f"{PLAIN} --compile", PLAIN, CLOSE),
    Row(f"{PLAIN} --vae_dtype bf16", PLAIN, WIDE),
    Row(f"{PLAIN} --vae_tiling", PLAIN, WIDE),
)
OF_FAMILY = {"hunyuanvideo": (Row(f"{PLAIN} --text_multiple 32", PLAIN, CLOSE),)}


def rows_of(family: str) -> dict[str, Row]:
    """Return the rows of a family but its first one, by their flags."""
    return {row.flags: row for row in (*ROWS, *OF_FAMILY.get(family, ()))}


def train_whole(scale: Scale, family: str, device: torch.device) -> Values:
    """Train with a checkpoint before the last step, resume from it, and compare the last step; check both exports."""
    del device
    checkpoint = STEPS - 1
    flags = [*EXACT.split(), *PART_OF_MODEL.get(family, ())]
    run = WORKSPACE.train(scale, family, [*flags, "--checkpointing_steps", str(checkpoint)])
    stored = str(run.folder / f"checkpoint-{checkpoint}")
    resumed = WORKSPACE.train(scale, family, [*flags, "--resume_from_checkpoint", stored])
    for ended in (run, resumed):
        check_export(ended, WORKSPACE.model(scale, family, small=False))
        ended.remove()
    values = run.values()
    if resumed.losses != run.losses[checkpoint:]:
        raise RuntimeError(f"the resumed run has the losses {resumed.losses}, not {run.losses[checkpoint:]}")
    return values


def train(scale: Scale, family: str, flags: str, device: torch.device) -> Values:
    """Train with some flags."""
    del device
    run = WORKSPACE.train(scale, family, [*flags.split(), *LORA.get(family, ())])
    run.remove()
    refused = [line for line in run.output.splitlines() if "cannot be compiled" in line]
    if refused:  # it trained as without the flag
        raise RuntimeError(refused[0])
    return run.values()


def smoke(scale: Scale) -> Iterator[Case]:
    """Yield the end-to-end run of both families, then every flag."""
    for family in FAMILIES:
        yield Case(
            "smoke", (family, WHOLE), 2 * scale.runs.seconds, nothing, partial(train_whole, scale, family), apart=True
        )
    for number in range(max(map(len, map(rows_of, FAMILIES)))):
        for family in FAMILIES:
            for flags in list(rows_of(family))[number : number + 1]:
                measure = partial(train, scale, family, flags)
                yield Case("smoke", (family, flags), scale.runs.seconds, nothing, measure, apart=True)


def difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the largest relative difference of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def judge(words: tuple[str, ...], measured: Values, others: Mapping[tuple[str, ...], Values]) -> Values:
    """Return result and loss difference of a row, from the measured values of all rows by their words.

    Args:
        words: of the row.
        measured: of the row, with the losses of all steps.
        others: as measured so far.
    """
    losses = [measured[name] for name in LOSSES]
    if not all(map(math.isfinite, losses)):
        return {"result": "fail: a loss is not finite"}
    row = rows_of(words[0]).get(words[1])
    if row is None or not row.like:
        return {"result": "pass"}
    reference = others.get((words[0], row.like))
    if not reference:
        return {"result": f"not compared: {row.like} has no losses"}
    found = difference(losses, [reference[name] for name in LOSSES])
    expected = f"within {row.within:g}" if row.within else "bit-identical"
    return {"result": "pass" if found <= row.within else f"fail: not {expected}", "difference": found}
