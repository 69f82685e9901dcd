"""Processor time of what guards a run, beside the step, save or start that it is part of.

    python benchmarks/guards.py [--rounds 5] [--layers 6] [--save_every 500] [--output benchmarks/guards.md]

A Wan2.1 transformer of real structure and a width of 512 trains in one process. Each guard is measured alone, in the
same process as what it is compared with, and the smaller half of the rounds counts: of a step with a guard and one
without, the difference would be lost in the noise. The model sees few tokens: a real step takes longer per parameter,
so that the guards' share of it is smaller.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from machine import machine_line

from videox.data.plan.settings import PlanColumns
from videox.distributed.accelerator import make_accelerator
from videox.distributed.replicas import LEAST_STEPS, ReplicaCheck
from videox.distributed.step_sync import sync_step
from videox.engine.ddp import DdpEngine
from videox.engine.saved_state import find_fault
from videox.engine.train_state import TrainState
from videox.optim.build import make_optimizer, parameter_groups
from videox.run.checkpoint import publish_checkpoint, verify
from videox.run.equal_processes import code_facts, refuse_differences
from videox.training.spikes import WINDOW, SpikeDetector

SIZES = {
    "patch_size": (1, 2, 2), "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
    "text_dim": 256, "freq_dim": 64, "ffn_dim": 2048, "rope_max_seq_len": 64,
}  # fmt: skip
LATENTS, TEXT = (1, 16, 5, 16, 16), (1, 64, 256)
CALLS = 200  # of a guard that takes microseconds


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """Return the processor seconds of a function: the median of the smaller half of the rounds."""
    work()  # the first call loads and allocates
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return statistics.median(sorted(taken)[: -(-rounds // 2)])


class Run:
    """A model in training, and its last checkpoint.

    Args:
        layers: of the transformer.
        folder: an empty folder.
    """

    def __init__(self, layers: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.accelerator, _ = make_accelerator("no")
        model = WanTransformer3DModel(**SIZES, num_layers=layers)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        make = partial(make_optimizer, learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01, epsilon=1e-8)
        self.engine = DdpEngine(self.accelerator, model, lambda named: make(parameter_groups(named, [*named], [])))
        numbers = np.zeros(1, np.int32)
        columns = PlanColumns(np.zeros(1, np.uint8), numbers, numbers, numbers, np.ones(1, np.bool_))
        self.state = TrainState(0, 1, "", {}, "", columns=columns)

    def step(self) -> None:
        """Train a step."""
        prediction = self.engine.model(
            hidden_states=torch.randn(LATENTS), timestep=torch.full((1,), 500.0), encoder_hidden_states=torch.randn(TEXT),
            return_dict=False,
        )[0]  # fmt: skip
        loss = prediction.square().mean()
        loss.backward()
        self.engine.update(loss=loss.detach(), empty=False, limit=lambda norm: norm.clamp(max=1.0))

    def save(self) -> None:
        """Publish a checkpoint, which is flushed and hashed."""
        shutil.rmtree(self.folder / "checkpoint-1", ignore_errors=True)
        with publish_checkpoint(self.folder, 1, is_main=True, gather=gather_one, description={}) as folder:
            assert folder is not None
            self.engine.save(folder, self.state)


def gather_one(value: object) -> list[object]:
    return [value]


def two_alike(value: object) -> list[object]:
    return [value, value]


def measure(run: Run, rounds: int) -> dict[str, float]:
    """Return processor seconds, by what they were used for."""
    spikes = SpikeDetector(run.state, skip=True)
    for number in range(WINDOW):
        spikes.add(1 + number % 7 / 10, 1.0)

    def many(work: Callable[[], object]) -> None:
        for _ in range(CALLS):
            work()

    def judge() -> None:
        spikes.bounds_to_skip()
        spikes.add(1.0, 1.0)

    agree = partial(sync_step, run.accelerator, stop=False, bad_samples=0, data_wait=0.0, stamp=1)
    found = {"step": seconds_of(run.step, rounds)}
    found["spikes"] = seconds_of(partial(many, judge), rounds) / CALLS
    found["agreement"] = seconds_of(partial(many, agree), rounds) / CALLS
    weights = run.engine.replicated_weights
    found["replicas"] = seconds_of(
        lambda: ReplicaCheck(torch.device("cpu"), two_alike, 1).compare(weights(), 1), rounds
    )
    found["save"] = seconds_of(run.save, rounds)
    found["numbers"] = seconds_of(lambda: find_fault(run.engine.saved_tensors()), rounds)
    checkpoint = run.folder / "checkpoint-1"
    found["load"] = seconds_of(lambda: run.engine.load(checkpoint), rounds)
    found["sizes"] = seconds_of(lambda: verify(checkpoint), rounds)
    found["hashes"] = seconds_of(lambda: verify(checkpoint, hashes=True), rounds)
    found["facts"] = seconds_of(lambda: refuse_differences(code_facts(), "", two_alike), rounds)
    return found


def page(run: Run, seconds: dict[str, float], save_every: int) -> str:
    """Return the page with the table."""
    step, save, load = seconds["step"], seconds["save"], seconds["load"]
    rows = [
        ("bounds for spikes, and the check of loss and gradient", "each step", seconds["spikes"], "step", step, 1),
        ("stop, bad samples and position agreed on (without the network)", "each step", seconds["agreement"], "step", step, 1),
        ("replicas compared", f"each {LEAST_STEPS} steps", seconds["replicas"], "step", step, LEAST_STEPS),
        ("weights and moments checked before a save", f"each {save_every} steps", seconds["numbers"], "save", save, save_every),
        ("hashes of the checkpoint checked", "each resume", seconds["hashes"] - seconds["sizes"], "load of the checkpoint", load, 0),
        ("flags, code and versions of all processes compared", "each start", seconds["facts"], "load of the checkpoint", load, 0),
    ]  # fmt: skip
    table = [
        f"| {name} | {often} | {1000 * cost:.3g} | {base}: {1000 * of:.3g} | {100 * cost / of:.2g} % | "
        + (f"{100 * cost / steps / step:.2g} % |" if steps else "0 |")
        for name, often, cost, base, of, steps in rows
    ]
    total = sum(cost / steps for *_, cost, _, _, steps in rows if steps)
    size = sum(path.stat().st_size for path in (run.folder / "checkpoint-1").rglob("*") if path.is_file())
    return "\n".join([
        "# What the guards of a run cost",
        "",
        f"Written by `python benchmarks/guards.py`: processor time in ms, of a Wan2.1 transformer of {run.parameters / 1e6:.0f} million",
        f"parameters that trains {LATENTS[2] * LATENTS[3] * LATENTS[4] // 4} tokens a step, in one process. Its checkpoint has {size / 1e6:.0f} MB.",
        "",
        "| guard | how often | ms | beside | share of it | share of a step |",
        "| --- | --- | --- | --- | --- | --- |",
        *table,
        "",
        f"A step without guards takes {1000 * step:.1f} ms, with all of them {1000 * (step + total):.1f} ms: {100 * total / step:.2g} % more.",
        "",
        f"{date.today():%-d %B %Y}; {machine_line('torch')}.",
        "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--layers", type=int, default=6, help="blocks of the transformer")
    parser.add_argument("--save_every", type=int, default=500, help="steps between saves")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="videox-guards-") as folder:
        run = Run(args.layers, Path(folder))
        text = page(run, measure(run, args.rounds), args.save_every)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
