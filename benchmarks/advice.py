"""The advice of a dry run, checked: its flags are applied and dry-run again, and every cheaper single flag is tried.

    python benchmarks/advice.py [--only 1 4] [--output benchmarks/advice.md]

Each pair of a model and a card is dry-run with flags that do not fit. The flags of each proposal are added to the
command, which must then fit with the memory that the proposal states. Then each single flag that costs no more than
the proposal is added to the command instead: none may be enough.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import proposed
import runs

from videox.errors import DOES_NOT_FIT
from videox.estimate.advice import OFFLOAD_CONFIG
from videox.estimate.gpus import GPUS
from videox.estimate.memory import SAFE_SHARE

PLANNED = (0, DOES_NOT_FIT)  # exit codes of a dry run
GIB = 2**30
BUCKETS = ["--enable_bucket", "--training_with_video_token_length", "--random_hw_adapt"]
PUBLISHED = [*BUCKETS, "--train_batch_size", "1", "--mixed_precision", "bf16", "--low_vram", "--vae_mini_batch", "1"]
LORA = ["--lora_rank", "64"]
ON_EIGHT = ["--dry_run_processes", "8", "--dry_run_backend"]
PAIRS = (
    ("wan2.1-t2v-1.3b", "rtx4080", LORA),
    ("wan2.1-t2v-1.3b", "rtx4090", []),
    ("wan2.1-t2v-1.3b", "l40s", ["--gradient_accumulation_steps", "2", "--train_batch_size", "4"]),
    ("wan2.1-t2v-14b", "rtx4090", [*PUBLISHED, *LORA]),
    ("wan2.1-t2v-14b", "a6000", [*LORA, "--train_batch_size", "2"]),
    ("wan2.1-t2v-14b", "a100-80", PUBLISHED),
    ("wan2.1-t2v-14b", "h200", [*PUBLISHED, *ON_EIGHT, "ddp"]),
    ("wan2.1-i2v-14b", "a40", [*PUBLISHED, *LORA]),
    ("wan2.1-i2v-14b", "h100", [*PUBLISHED, "--optimizer", "adamw_bf16"]),
    ("hunyuanvideo-t2v", "rtx5090", [*PUBLISHED, *LORA]),
    ("hunyuanvideo-t2v", "h100", [*PUBLISHED, *ON_EIGHT, "zero2"]),
    ("hunyuanvideo-i2v", "b200", [*PUBLISHED, "--optimizer", "adamw_offload"]),
)
# Single changes as a user types them, by what they cost; {n}: the processes of the run.
FREE = ("--low_vram", "--vae_mini_batch 1", "--mixed_precision bf16", "--train_batch_size 1", "--latent_cache DIR")
TIME = (
    "--gradient_checkpointing", "--optimizer adamw8bit", "--optimizer adamw_bf16", "--optimizer adamw8bit_bf16",
    *(f"accelerate launch --config_file config/accelerate/{name}.yaml --num_processes {{n}}"
      for name in ("zero2", "zero3", "fsdp1", "fsdp2")),
)  # fmt: skip
HOST = (
    "--optimizer adamw_offload", "--optimizer adamw_bf16_offload",
    f"accelerate launch --use_deepspeed --deepspeed_config_file {OFFLOAD_CONFIG} --num_processes {{n}}",
)  # fmt: skip
OTHER = ("--lora_rank 4", "--token_sample_size 256 --video_sample_size 256 --image_sample_size 256")
GROUPS = (FREE, TIME, HOST, OTHER)


@dataclass
class Row:
    """What was found for a pair.

    Attributes:
        name: model, card and processes.
        flags: of the command.
        before: GiB of it.
        card: GiB of the card.
        proposals: the flags of each, stated GiB and GiB of the second dry run.
        tried: single flags that cost no more than the first proposal, with their GiB; None where refused.
        wrong: what is not as it must be.
    """

    name: str
    flags: str
    before: float
    card: float
    proposals: list[tuple[list[str], float, float]] = field(default_factory=list)
    tried: dict[str, float | None] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def dry_run(model: str, base: Sequence[str], changes: Sequence[str], folder: Path) -> tuple[runs.Outcome, float]:
    """Run a dry run with changes as a user applies them; return it and its GiB (0 where it is refused)."""
    words, set_by_launcher = list(base), dict[str, str]()
    for change in changes:
        more, environment = proposed.launched(change)
        words += [str(folder / "cache") if word == "DIR" else word for word in more]
        set_by_launcher |= environment
    report = folder / "plan_report.json"
    report.unlink(missing_ok=True)
    script = runs.train_script("wan2.1" if model.startswith("wan") else "hunyuanvideo")
    with variables(set_by_launcher):
        outcome = runs.train(words, script)
    if outcome.code not in PLANNED:
        return outcome, 0.0
    return outcome, json.loads(report.read_text(encoding="utf-8"))["memory"]["total"] / GIB


def check(number: int, folder: Path, *, singles: bool = True) -> Row:
    """Check the advice for a pair; singles: also try each single flag.

    Args:
        number: of the pair, from 0.
        folder: for the files of the dry runs.
    """
    model, card, flags = PAIRS[number]
    mode = "i2v" if "i2v" in model else "normal"
    base = [*proposed.output_flags(folder), "--dry_run_model", model, "--gpu", card, "--train_mode", mode, *flags]
    first, before = dry_run(model, base, [], folder)
    processes = flags[flags.index(ON_EIGHT[0]) + 1] if ON_EIGHT[0] in flags else "1"
    row = Row(
        f"{model}, {'' if processes == '1' else processes + ' x '}{card}", " ".join(flags), before, GPUS[card].gib
    )
    limit, found = SAFE_SHARE * row.card, proposed.printed_proposals(first.stdout)
    if first.code not in PLANNED or not found:
        row.wrong.append(f"no proposal: {first.stderr.strip() or first.stdout}")
        return row
    for fits, changes, stated in found:
        second, total = dry_run(model, base, changes, folder)
        row.proposals.append((changes, stated, total))
        if not fits or not changes or second.code:
            row.wrong.append(f"{changes}: {second.stderr.strip() or 'does not fit'}")
        elif total > limit or "fits in" not in second.stdout:
            row.wrong.append(f"{changes}: {total:.1f} GiB do not fit in {limit:.1f}")
        elif abs(total - stated) > 0.1 + 0.01 * total:
            row.wrong.append(f"{changes}: {total:.1f} GiB, but {stated:.1f} are stated")
    if singles:
        _try_singles(row, model, base, processes, folder)
    return row


def _try_singles(row: Row, model: str, base: Sequence[str], processes: str, folder: Path) -> None:
    changes, *_ = row.proposals[0]
    cost = max(_group(change) for change in changes)
    # a single change of the same cost is allowed where the proposal is one itself
    groups = GROUPS[: cost + 1] if len(changes) > 1 else GROUPS[:cost]
    for single in (text.format(n=processes) for group in groups for text in group):
        if single in base or (single.startswith("accelerate launch --config") and processes == "1"):
            continue
        outcome, total = dry_run(model, base, [single], folder)
        row.tried[single] = total if outcome.code in PLANNED else None
        if outcome.code in PLANNED and total <= SAFE_SHARE * row.card:
            row.wrong.append(f"{single} alone would fit: {total:.1f} GiB")


def _group(change: str) -> int:
    """Return what a printed change costs: the index of the group with its flag; more GPUs cost the most."""
    if change.startswith("accelerate launch --use_deepspeed"):
        return GROUPS.index(HOST)
    if change.startswith("accelerate launch"):
        return GROUPS.index(TIME)
    if "_offload" in change:
        return GROUPS.index(HOST)
    flag = change.split()[0]
    return next(
        (number for number, group in enumerate(GROUPS) if any(s.split()[0] == flag for s in group)), len(GROUPS)
    )


HEAD = """# The advice of the dry run, applied

Written by `python benchmarks/advice.py --output benchmarks/advice.md`, on 200 described clips of 5 s (1280x720, 24 fps). The flags of each
proposal are added to the command, which is dry-run again; `tried`: single flags that cost no more than the first proposal and were
dry-run instead of it.

| model and card | flags | GiB before | proposal | GiB stated | GiB then | card, GiB | tried | of these fit |
|---|---|---|---|---|---|---|---|---|
"""


def page(rows: Sequence[Row]) -> str:
    """Return the page with the table."""
    lines = []
    for row in rows:
        fitting = sum(total is not None and total <= SAFE_SHARE * row.card for total in row.tried.values())
        for number, (changes, stated, total) in enumerate(row.proposals):
            first = number == 0
            cells = [
                row.name if first else "", f"`{row.flags}`" if first and row.flags else "", f"{row.before:.1f}" if first else "",
                ", ".join(f"`{change}`" for change in changes), f"{stated:.1f}", f"{total:.1f}", f"{row.card:g}",
                str(len(row.tried)) if first else "", str(fitting) if first else "",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    proposals = [total <= SAFE_SHARE * row.card for row in rows for _, _, total in row.proposals]
    good = sum(not row.wrong for row in rows)
    summary = f"{good} of {len(rows)} pairs without a fault; {sum(proposals)} of {len(proposals)} proposals fit with 5 % to spare."
    return f"{HEAD}{chr(10).join(lines)}\n\n{summary}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of pairs, from 1")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    numbers = [number - 1 for number in args.only] if args.only else range(len(PAIRS))
    rows = []
    with tempfile.TemporaryDirectory(prefix="videox-advice-") as place:
        for number in numbers:
            rows.append(row := check(number, Path(place) / str(number)))
            print(f"{number + 1}. {row.name}: {len(row.tried)} tried; {'; '.join(row.wrong) or 'right'}", flush=True)
    text = page(rows)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
