"""Measures what the latent cache costs and saves: single steps, whole runs, memory and lookups.

    python benchmarks/cache.py [--rounds 15] [--entries 100000] [--output benchmarks/cache.md]

A cached step is a step of the training loop: next batch of the loader, noise, target, forward, backward, optimizer.
A bare step runs only the transformer on the tensors of the preceding cached step: forward, loss, backward, optimizer.
The two alternate, so that a busy machine slows both. Whole runs are the published command with and without the cache,
and a plain loop over the same samples that decodes with decord and encodes in every step; they run in turn. Memory is
read from /proc while one and two processes train.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import numpy as np
import runs
import tiny
import torch
from cache_memory import build_model, memory_of
from cache_plain import PlainLoop
from machine import machine_line

from videox.data.cache.cache import Cache
from videox.diffusion.flow_matching import velocity_losses
from videox.training import build
from videox.training.recorder import Recorder

NOTE = {"part": "moments", "encoder": "of the benchmark", "file": None, "size": 0, "mtime_ns": 0}
STEPS, TURNS = 12, 3  # steps of a whole run; runs of each kind
MODELS: dict[str, tuple[dict[str, int], int, int]] = {  # transformer sizes, pixels per side, frames
    "tiny": ({"heads": 4, "head_dim": 32, "layers": 4, "ffn_dim": 512}, 128, 13),
    "small": ({"heads": 4, "head_dim": 64, "layers": 4, "ffn_dim": 1024}, 256, 17),
    "medium": ({"heads": 8, "head_dim": 48, "layers": 8, "ffn_dim": 1536}, 256, 17),
}
FLAGS: dict[str, object] = {
    "mixed_precision": "no", "gradient_checkpointing": None, "caption_dropout": 0, "tokenizer_max_length": 64,
    "cache_variants": 1, "max_train_steps": STEPS, "low_vram": None,
}  # fmt: skip


def flags_of(name: str) -> dict[str, object]:
    """Return the flags of the runs of a model."""
    _, side, frames = MODELS[name]
    sizes = dict.fromkeys(("video_sample_size", "image_sample_size", "token_sample_size"), side)
    return {**FLAGS, **sizes, "video_sample_n_frames": frames}


def seconds(work: Callable[[], object]) -> float:
    """Return the duration of a call in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Times(NamedTuple):
    """Wall-clock and CPU seconds; the latter do not include time in which other programs use the core."""

    clock: float
    processor: float


def now() -> Times:
    """Return the current values of both clocks."""
    return Times(time.perf_counter(), time.process_time())


def since(before: Times) -> Times:
    """Return the time that has passed since `before`."""
    return Times(*(one - other for one, other in zip(now(), before, strict=True)))


def step_times(name: str, folder: Path, rounds: int) -> list[float]:
    """Return tokens, parameters, median seconds of a cached and of a bare step, and their ratios (wall clock, CPU).

    The cached run is a real one; after each of its steps a copy of the transformer alone repeats the step.
    """
    model = tiny.build_wan_t2v(folder / f"model-{name}", **MODELS[name][0])
    clips = tuple((f"{number}.mp4", 320, 192, 41, 24.0) for number in range(6))
    metadata = tiny.make_dataset(folder / f"data-{name}", clips)
    argv = partial(runs.wan_flags, model, metadata, **{**flags_of(name), "max_train_steps": 2 + rounds})
    filled = runs.train(argv(folder / f"fill-{name}", latent_cache=folder / f"cache-{name}", cache_only=True))
    if filled.code:
        raise SystemExit(filled.stderr)
    script = runs.train_script()
    cached, bare, marks = list[Times](), list[Times](), list[Times]()
    inputs_of, build_engine, log_step = script.transformer_inputs, build.build_engine, Recorder.log
    seen: dict[str, Any] = {}

    def note_inputs(*given: Any) -> dict[str, Any]:  # noqa: ANN401 - passed on as it came
        seen["inputs"] = inputs_of(*given)
        return seen["inputs"]

    def note_engine(*given: Any) -> Any:  # noqa: ANN401 - passed on as it came
        engine = build_engine(*given)
        twin = type(engine.network).from_config(engine.network.config).train()
        seen["twin"] = twin
        seen["optimizer"] = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
        return engine

    def bare_step() -> None:
        inputs = seen["inputs"]
        prediction = seen["twin"](**inputs)[0]
        loss = velocity_losses(prediction, inputs["hidden_states"], torch.ones(len(prediction))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(seen["twin"].parameters(), 0.05)
        seen["optimizer"].step()
        seen["optimizer"].zero_grad()

    def note_log(*given: Any) -> None:  # noqa: ANN401 - passed on as it came
        log_step(*given)
        if marks:
            cached.append(since(marks[-1]))
            begin = now()
            bare_step()
            bare.append(since(begin))
        marks.append(now())

    script.transformer_inputs, build.build_engine, Recorder.log = note_inputs, note_engine, note_log
    try:
        done = runs.train(
            argv(folder / f"out-{name}", latent_cache=folder / f"cache-{name}", checkpointing_steps=10**6)
        )
    finally:
        script.transformer_inputs, build.build_engine, Recorder.log = inputs_of, build_engine, log_step
    if done.code:
        raise SystemExit(done.stderr)
    pairs = list(zip(cached, bare, strict=True))[1:-1]  # the first pair is warm-up
    found = [
        (one.clock, other.clock, one.clock / other.clock, one.processor / other.processor) for one, other in pairs
    ]
    latents, weights = seen["inputs"]["hidden_states"], sum(p.numel() for p in seen["twin"].parameters())
    return [latents[0, 0].numel() / 4, weights, *(statistics.median(values) for values in zip(*found, strict=True))]


def whole_runs(folder: Path) -> dict[str, float]:
    """Return the median seconds of a step, end to end, for each way to get its data; their runs alternate.

    All use the same samples, frames and sizes: the published command with and without the cache, and a plain loop that
    decodes with decord and encodes in every step. The first two steps of a run are warm-up and are not counted.
    """
    model, metadata, cache = folder / "model-tiny", folder / "data-tiny/metadata.json", folder / "cache-tiny"

    def run(name: str, **flags: object) -> runs.Outcome:
        outcome = runs.train(runs.wan_flags(model, metadata, folder / f"run-{name}", **{**flags_of("tiny"), **flags}))
        if outcome.code:
            raise SystemExit(outcome.stderr)
        return outcome

    wanted = run("dumped", dump_steps=list(range(1, STEPS + 1)))
    dumps = [[wanted.dump(step)] for step in range(1, STEPS + 1)]
    times: dict[str, list[float]] = {"with the cache": [], "without": [], "plain decord, encoded in every step": []}
    for turn in range(TURNS):
        for name, flags in (("with the cache", {"latent_cache": cache}), ("without", {})):
            metrics = run(f"{turn}-{name}", **flags).metrics[2:]
            times[name] += [line["tokens"] / line["tokens_per_second"] for line in metrics]
        loop = PlainLoop(model, metadata, int(str(FLAGS["tokenizer_max_length"])))
        times["plain decord, encoded in every step"] += [loop.step(dump) for dump in dumps][2:]
    return {name: statistics.median(found) for name, found in times.items()}


def memory(folder: Path) -> list[str]:
    """Return the table of memory use, with a text encoder that is much larger than everything else."""
    model, size = build_model(folder / "model-memory")
    metadata = tiny.make_dataset(folder / "data-memory", copies=2)
    lines = []
    for world_size in (1, 2):
        cache: dict[str, object] = {"latent_cache": folder / f"cache-{world_size}"}
        for name, flags in (("uncached", {}), ("fills the cache", {**cache, "cache_only": True}), ("cached", cache)):
            output_dir = folder / f"{name}-{world_size}"
            asked = {
                "max_train_steps": 6, "cache_variants": 1, "tokenizer_max_length": 64, "num_train_epochs": None,
                "gradient_accumulation_steps": 4 // world_size, **flags,
            }  # fmt: skip
            argv = runs.wan_flags(model, metadata, output_dir, **asked)
            found = memory_of(argv, output_dir, [model / "vae", model / "text_encoder"], world_size)
            peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in found.peaks)
            resident = f"{found.resident / 1e6:.0f}" if found.resident else "-"
            named = ", ".join(sorted(Path(path).parent.name or path for path in found.named)) or "none"
            lines.append(f"| {world_size} | {name} | {peaks} | {resident} | {named} |")
    return [
        "| processes | run | peak MB of each | resident MB of all, training | encoder files mapped, training |",
        "| --- | --- | --- | --- | --- |",
        *lines,
        "",
        f"Anonymous and shared memory, without mapped files. The text encoder has {size / 1e6:.0f} MB in bfloat16; the VAE is",
        "mapped from its file. Processes of one machine share a single copy of an encoder that was cast (`/memfd:videox`).",
    ]


def lookups(folder: Path, entries: int) -> dict[str, float]:
    """Return the seconds to open a cache of many 16 KiB entries and to read one (median, p99), and its file count."""
    tensor, cache = torch.randn(4096), Cache(folder / "many")
    keys = [number.to_bytes(16, "big") for number in range(entries)]
    for key in keys:
        cache.put(key, tensor, NOTE)
    cache.publish()
    opened = seconds(lambda: Cache(folder / "many"))
    reader, drawn = Cache(folder / "many"), np.random.default_rng(0).integers(0, entries, 4000)
    for number in drawn:
        reader.read(keys[number])  # fills the page cache
    reads = [seconds(partial(reader.read, keys[number])) for number in drawn]
    return {
        "open": opened,
        "median": statistics.median(reads),
        "p99": float(np.quantile(reads, 0.99)),
        "files": float(len(list((folder / "many").iterdir()))),
    }


def main() -> int:
    """Run all measurements and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="compared steps per model")
    parser.add_argument("--entries", type=int, default=100_000, help="entries of the large cache, 16 KiB each")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {model: step_times(model, folder, args.rounds) for model in MODELS}
        ways = whole_runs(folder)
        held = memory(folder)
        found = lookups(folder, args.entries)
    lines = [
        "# What the latent cache costs and saves",
        "",
        "Measured by `python benchmarks/cache.py`: Wan2.1 text-to-video of the real classes with random weights in float32,",
        f"one sample per step, one thread, load average {os.getloadavg()[0]:.0f}; {machine_line('torch', 'diffusers', 'decord')}.",
        "",
        "| model | tokens | million parameters | cached step | bare transformer step | ratio (median of pairs) | ratio of CPU time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {m} | {n:,.0f} | {w / 1e6:.1f} | {1e3 * a:.1f} ms | {1e3 * b:.1f} ms | {r:.3f} | {p:.3f} |"
            for m, (n, w, a, b, r, p) in steps.items()
        ),
        "",
        "The work of a cached step outside the transformer (lookup, posterior, noise, loader, metrics) hardly grows with the model.",
        "",
        "| tiny model, whole run | step | relative to the cached run |",
        "| --- | --- | --- |",
        *(f"| {way} | {1e3 * t:.1f} ms | {t / ways['with the cache']:.2f} |" for way, t in ways.items()),
        "",
        *held,
        "",
        f"| cache of {args.entries:,} entries | |",
        "| --- | --- |",
        f"| open | {found['open']:.2f} s |",
        f"| read, median | {1e3 * found['median']:.3f} ms |",
        f"| read, 99th percentile | {1e3 * found['p99']:.3f} ms |",
        f"| files | {found['files']:.0f} |",
        "",
        "Compared with its transformer, the random VAE used here is far smaller than a published one: with published weights",
        "a run saves more.",
    ]
    text = "\n".join(lines) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
