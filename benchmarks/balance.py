"""Serves who trains on several GPUs: how evenly a plan loads them, and how varied its steps stay, side by side.

    python benchmarks/balance.py [--samples N] [--models NAME...] [--ranks N...] [--write benchmarks/balance.md]

Plans an epoch of simulated data sets (eight aspect ratios, 480 to 2160 lines, 2 to 20 seconds, 24 to 60 frames per
second; with images or without) by the package's own planner, for both slot fills, one and four slots per rank and
step, ranks that meet once a step (DDP, ZeRO-2) and in each micro-batch (ZeRO-3, FSDP), and both values of --balance.
Beside them, in the same run over the same samples: the original's scheme, in which every rank takes the next batch,
whatever the others take; strat4, whose micro-steps are 32 steps' samples sorted by cost, a step's four from its four
quarters; and winpack1R, which packs 32 steps' samples into sequences of equal cost, one per rank and step, and deals
them at random. Costs are a*S + b*S^2 from the models' dimensions. No clip is opened and no model is loaded.
"""

from __future__ import annotations

import argparse
import heapq
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cost import cost_coefficients, joint_cost_coefficients

from videox.data.plan.balance import balance, balance_and_mix, unplanned
from videox.data.plan.buckets import SizePolicy
from videox.data.plan.plan import BARRIERS, Columns, PlanSettings, plan_epoch, sample_cost
from videox.shapes import token_count

MIXES = {
    "256/1024/512, 30 % images": (0.3, 256, 1024, 3),
    "256/1024/512": (0.0, 256, 1024, 3),
    "640/640/640": (0.0, 640, 640, 2),
}
MODELS = {
    "Wan2.1 1.3B": cost_coefficients(dim=1536, ffn_dim=8960, layers=30, text_tokens=512),
    "Wan2.1 14B": cost_coefficients(dim=5120, ffn_dim=13824, layers=40, text_tokens=512),
    "HunyuanVideo": joint_cost_coefficients(dim=3072, mlp_ratio=4.0, layers=60, text_tokens=256),
}
RANKS, ACCUMULATIONS = (8, 64, 512), (1, 4)
WINDOW = 32  # steps, of strat4 and winpack1R
WHERE = {"step": "DDP", "micro": "sharded"}


def data_set(samples: int, images: float, seed: int = 0) -> Columns:
    """Returns columns of a mixed data set: log-normal durations with a median of 5.5 s, common sizes and rates."""
    rng = np.random.default_rng(seed)
    image = rng.random(samples) < images
    shares = [0.52, 0.2, 0.08, 0.07, 0.04, 0.04, 0.03, 0.02]
    ratio = rng.choice([16 / 9, 9 / 16, 1.0, 4 / 3, 3 / 4, 2.35, 3 / 2, 2 / 3], size=samples, p=shares)
    ratio = ratio * np.exp(rng.normal(0, 0.01, samples))
    short = rng.choice([480, 720, 1080, 2160], size=samples, p=[0.10, 0.40, 0.45, 0.05])
    seconds = np.clip(np.exp(rng.normal(np.log(5.5), 0.6, samples)), 2, 20)
    frames = (seconds * rng.choice([24, 25, 30, 60], size=samples, p=[0.25, 0.2, 0.45, 0.1])).astype(np.int32)
    height = np.where(ratio >= 1, short, short / ratio).astype(np.int32)
    width = np.where(ratio >= 1, short * ratio, short).astype(np.int32)
    kind = (~image).astype(np.uint8)
    return Columns(kind, width, height, np.where(image, 1, frames).astype(np.int32), np.ones(samples, bool))


def strat4(cost: np.ndarray, logs: np.ndarray, ranks: int) -> tuple[float, float]:
    """Returns (balance, mix) of four sorted micro-steps per step, one from each quarter of a window's.

    Args:
        cost, logs: of the samples' log tokens, in random order.
        ranks: that meet in each micro-step.
    """
    windows = [order.reshape(4, WINDOW // 4, ranks) for order in _sorted_windows(cost, ranks)]
    steps = np.concatenate(windows, axis=1)  # [4, steps, ranks]
    varied = logs[steps].mean((0, 2)).var() / (logs.var() / (4 * ranks))
    return cost[steps].sum() / (cost[steps].max(2).sum() * ranks), varied


def _sorted_windows(cost: np.ndarray, ranks: int) -> list[np.ndarray]:
    whole = np.arange(len(cost) // (WINDOW * ranks) * WINDOW * ranks).reshape(-1, WINDOW * ranks)
    return [window[np.argsort(cost[window])] for window in whole]


def winpack1r(cost: np.ndarray, logs: np.ndarray, ranks: int, rng: np.random.Generator) -> tuple[float, float]:
    """Returns (balance, mix) of sequences of equal cost, the dearest sample's or the mean's, dealt at random.

    Args:
        cost, logs: of the samples' log tokens, in random order.
        ranks: that meet once a step, each with one sequence.
        rng: deals the sequences.
    """
    busy, paid, means, counts = 0.0, 0.0, [], []
    for window in _sorted_windows(cost, ranks):
        bins = max(int(cost[window].sum() / cost[window].max()) // ranks, 1) * ranks
        least, load, total, count = [(0.0, i) for i in range(bins)], np.zeros(bins), np.zeros(bins), np.zeros(bins)
        for sample in window[::-1].tolist():  # dearest first, each to the sequence that costs least
            _, into = least[0]
            load[into] += cost[sample]
            total[into] += logs[sample]
            count[into] += 1
            heapq.heapreplace(least, (load[into], into))
        steps = rng.permutation(bins).reshape(-1, ranks)
        busy += load.sum()
        paid += load[steps].max(1).sum() * ranks
        means += list(total[steps].sum(1) / count[steps].sum(1))
        counts += list(count[steps].sum(1))
    return busy / paid, np.var(means) / (logs.var() / np.mean(counts))


def figures(columns: Columns, settings: PlanSettings, ranks: int) -> dict[str, str]:
    """Returns balance / mix of the default and of strict, of strat4 or winpack1R, and the original's balance."""
    found: dict[str, str] = {}
    for kind in ("mixed", "strict"):
        one = PlanSettings(**{**vars(settings), "balance": kind})
        plan = plan_epoch(columns, one, 0)
        found[kind] = "{:.3f} / {:.2f}".format(*balance_and_mix(plan, one, ranks))
    bucket = np.repeat(plan.micro_bucket, np.diff(plan.micro_first))
    cost, rng = sample_cost(settings, plan.buckets)[bucket], np.random.default_rng(0)
    scheme = unplanned(cost, bucket, batch_size=settings.batch_size, ranks=ranks, accumulation=settings.accumulation)
    found["original"] = f"{balance(scheme, settings.barrier):.3f}"
    order = rng.permutation(len(cost))
    logs = np.log([token_count(bucket) for bucket in plan.buckets])[bucket][order]
    if settings.accumulation == 4 and settings.barrier == "micro":
        found["other"] = "strat4 {:.3f} / {:.2f}".format(*strat4(cost[order], logs, ranks))
    elif settings.accumulation == 1 and settings.barrier == "step":
        found["other"] = "winpack1R {:.3f} / {:.2f}".format(*winpack1r(cost[order], logs, ranks, rng))
    else:
        found["other"] = "-"
    return found


def lines(samples: int, models: list[str], ranks: list[int]) -> Iterator[str]:
    """Yields the table, row by row."""
    cases = [(fill, accumulation, barrier) for fill in ("fixed", "cost") for accumulation in ACCUMULATIONS for barrier in BARRIERS]  # fmt: skip
    yield "| data (video/image/token size) | model | ranks | slots per rank | meets | original | other schemes | fixed, mixed | fixed, strict | cost, mixed | cost, strict |"
    yield "|" + "---|" * 11
    for name, (images, low, high, stride) in MIXES.items():
        columns = data_set(samples, images)
        policy = SizePolicy(
            video_sample_size=low, image_sample_size=high, token_sample_size=512 if low == 256 else 640, n_frames=81,
            stride=stride, enable_bucket=True, random_hw_adapt=True, token_length=True,
        )  # fmt: skip
        for model in models:
            for world in ranks:
                found = {}
                for fill, accumulation, barrier in cases:
                    settings = PlanSettings(
                        policy, 1, world * accumulation, 0, slot_fill=fill, cost_linear=MODELS[model][0],
                        cost_quadratic=MODELS[model][1], barrier=barrier, accumulation=accumulation,
                    )  # fmt: skip
                    found[fill, accumulation, barrier] = figures(columns, settings, world)
                for accumulation in ACCUMULATIONS:
                    for barrier in BARRIERS:
                        fixed, cost = (found[fill, accumulation, barrier] for fill in ("fixed", "cost"))
                        cells = [name, model, world, accumulation, WHERE[barrier], fixed["original"], fixed["other"]]
                        cells += [fixed["mixed"], fixed["strict"], cost["mixed"], cost["strict"]]
                        yield "| " + " | ".join(map(str, cells)) + " |"


def goals(table: list[str]) -> list[str]:
    """Returns what is asked of the figures, and which of them miss it; table: as `lines` yields it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    names = ("fixed, mixed", "fixed, strict", "cost, mixed", "cost, strict")
    cells = [
        (row, name, *map(float, text.split(" / "))) for row in rows for name, text in zip(names, row[7:], strict=True)
    ]
    several, one = ([cell for cell in cells if cell[0][3] == slots] for slots in "41")
    ddp = [cell for cell in several if cell[0][4] == "DDP"]
    sharded = [cell for cell in several if cell[0][4] == "sharded"]

    def asked(words: str, found: list[tuple], met: Callable[[tuple], bool]) -> str:
        missed = [cell for cell in found if not met(cell)]
        which = "; ".join(f"{', '.join(row[:3])} ranks, {name}: {b:.3f} / {m:.2f}" for row, name, b, m in missed)
        return f"- {words}: {len(found) - len(missed)} of {len(found)} cells{f'; not {which}' if missed else ''}"

    def other(cell: tuple) -> tuple[float, float]:
        """Returns balance and mix of the scheme beside it."""
        balanced, _, mixed = cell[0][6].split()[1:]
        return float(balanced), float(mixed)

    default, strict = ("fixed, mixed", "cost, mixed"), ("fixed, strict", "cost, strict")
    return [
        asked("the default's mix is at most 4", [c for c in cells if c[1] in default], lambda c: c[3] <= 4),
        asked("nowhere below the original's balance", cells, lambda c: c[2] >= float(c[0][5])),
        asked(
            "4 slots per rank, DDP: at least 0.95 at a mix of at most 2",
            [c for c in ddp if c[1] in default],
            lambda c: c[2] >= 0.95 and c[3] <= 2,
        ),
        asked(
            "4 slots per rank, DDP, strict: at least 0.98", [c for c in ddp if c[1] in strict], lambda c: c[2] >= 0.98
        ),
        asked(
            "4 slots per rank, sharded: at least 0.96 at a mix of at most 4",
            [c for c in sharded if c[1] in default],
            lambda c: c[2] >= 0.96 and c[3] <= 4,
        ),
        asked(
            "4 slots per rank, sharded: at least 0.96 at a mix of at most strat4's, by the default or strict",
            [
                max(pair, key=lambda c: (c[3] <= other(c)[1], c[2]))
                for pair in zip(sharded[::2], sharded[1::2], strict=True)
            ],
            lambda c: c[2] >= 0.96 and c[3] <= other(c)[1],
        ),
        asked(
            "1 slot per rank, DDP, cost fill: at least winpack1R at a mix of at most 4",
            [c for c in one if c[0][4] == "DDP" and c[1] == "cost, mixed"],
            lambda c: c[2] >= other(c)[0] and c[3] <= 4,
        ),
        asked(
            "1 slot per rank, DDP, cost fill, strict: at least winpack1R",
            [c for c in one if c[0][4] == "DDP" and c[1] == "cost, strict"],
            lambda c: c[2] >= other(c)[0],
        ),
    ]


def page(table: list[str], samples: int) -> str:
    """Returns the table with what it means and what it misses."""
    about = __doc__.split("\n\n", 2)[2].strip()
    means = (
        "Each cell is balance / mix. Balance: sum of cost / (ranks x sum of the largest rank's cost wherever ranks "
        "meet), 1 = nobody waits. Mix: variance of a step's mean of log tokens over that of random steps of the "
        "same size, 1 = random; the default's is at most 4. `original` has no plan and no mix but the random one."
    )
    why = (
        "Where a cell misses, its default and its strict figure are the two ends of what can be had. With cost fill a "
        "slot is at most 2 % above the cost of the largest clip, which nothing can divide: clips of more than half of "
        "that leave room that no other fits into, and the mean slot is 0.96 to 0.99 of the fullest. Among many "
        "ranks one of the fullest is in every step that is as varied as the data. Sharded ranks meet in each "
        "micro-batch, and wait there for the largest one; more slots per rank are what helps. The last step, of which a "
        "part is padding, counts too: where an epoch has some fifty steps it is what a figure of 0.958 lacks of 0.961."
    )
    command = f"    python benchmarks/balance.py --samples {samples} --write benchmarks/balance.md"
    where = f"Python {platform.python_version()}, numpy {np.__version__}; no number here depends on the machine."
    parts = ["# Balance and mix of the plan", about, means, command, where, "\n".join(goals(table)), why]
    return "\n\n".join([*parts, "\n".join(table)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=131072, help="of the simulated data set (default 131072)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="default: 8 64 512")
    parser.add_argument("--write", type=Path, help="also write the table to this file, with what it means")
    options = parser.parse_args()
    table = []
    for line in lines(options.samples, options.models, options.ranks):
        table.append(line)
        print(line, flush=True)
    if options.write:
        options.write.write_text(page(table, options.samples), encoding="utf-8")


if __name__ == "__main__":
    main()
