"""Serves whoever encodes once and trains many times: what a run will need, how much of it is missing, and its making.

All of it is known before the first file is read, because the plan is. The missing tensors are divided among the
processes; each publishes what it made file by file, so that a process that is killed loses its last file only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from videox.data.bucket_sampler import held_out_samples
from videox.data.cache.cache import Cache, CacheField, CacheView, key_of, read_memo, write_memo
from videox.data.cache.maintenance import size_text
from videox.data.dataset import BadSample, PlannedSample, TokenLengthDataset, collate, facts_of
from videox.data.loader import quiet_worker
from videox.data.plan.plan import Columns, PlanSettings, count_steps, draw_epoch, held_out_plan, row_fates
from videox.distributed.accelerator import StopRequest
from videox.encoders.encode import Encoder, EncodingSpec, LazyEncoders
from videox.engine.train_state import TrainState
from videox.errors import STOPPED, STORAGE, UserError
from videox.rng import Purpose, uniform
from videox.run.lifecycle import main_first, together
from videox.run.status import RunStatus
from videox.shapes import token_count


class Job(NamedTuple):
    """A sample of which something is missing, the keys of that, and its bytes: at most, and at least."""

    planned: PlannedSample
    keys: frozenset[bytes]
    size: int
    least: int


@dataclass(frozen=True)
class CacheTodo:
    """What a run needs: distinct entries, those that are missing, by sample, and the data that they are made of."""

    dataset: TokenLengthDataset
    entries: int
    jobs: tuple[Job, ...]

    @property
    def missing(self) -> int:
        """Entries to make."""
        return sum(len(job.keys) for job in self.jobs)

    @property
    def size(self) -> int:
        """Bytes of what is missing, at most: text is kept without its padding."""
        return sum(job.size for job in self.jobs)

    @property
    def least(self) -> int:
        """Bytes of what is missing but text."""
        return sum(job.least for job in self.jobs)


def samples_to_come(
    columns: Columns, settings: PlanSettings, epochs: range, quarantined: Sequence[int], caption_dropout: float
) -> Iterator[PlannedSample]:
    """Yields every different sample of these epochs once: with its caption, without it, or both.

    Where clips and sizes come again after some epochs (cache_variants), so do the samples; whether a caption is
    dropped is drawn anew in every epoch.
    """
    turns = settings.cache_variants or len(epochs)
    for turn in range(min(turns, len(epochs))):
        seen: dict[bool, np.ndarray] = {state: np.empty(0, np.uint64) for state in (False, True)}
        for epoch in epochs[turn::turns]:
            drawn = draw_epoch(columns, settings, epoch, row_fates(columns, settings, np.array(quarantined, np.int64)))
            dropped = uniform(drawn.keys, Purpose.CAPTION_DROPOUT) < caption_dropout
            for state, before in seen.items():
                new = np.flatnonzero((dropped == state) & ~np.isin(drawn.variants, before))
                seen[state] = np.concatenate([before, drawn.variants[new]])
                for i in new:
                    yield PlannedSample(
                        int(drawn.rows[i]), int(drawn.starts[i]), int(drawn.keys[i]), int(drawn.variants[i]), 1.0, 0.5,
                        drawn.buckets[drawn.number[i]], 0, 0, True,
                    )  # fmt: skip


def find_missing_of(
    samples: Iterator[PlannedSample], dataset: TokenLengthDataset, encoder: Encoder, seen: set[bytes]
) -> CacheTodo:
    """Returns what these samples need and what of it is missing; opens no file of the data.

    Args:
        samples: of the run; dataset: makes them; encoder: with the cache.
        seen: keys that count elsewhere already; those of these samples are added.
    """
    assert encoder.shelf is not None and encoder.cache is not None
    jobs, before = [], len(seen)
    for planned in samples:
        facts = facts_of(dataset, planned, encoder.shelf.mode)
        keys = {key_of(encoder.parts[recipe.name], facts): recipe for recipe in encoder.recipes}
        new = keys.keys() - seen
        seen |= new
        if missing := frozenset(key for key in new if key not in encoder.cache):
            sizes = {key: keys[key].size(planned.bucket) for key in missing}
            sure = (key for key in missing if not (keys[key].padded or keys[key].trimmed))
            jobs.append(Job(planned, missing, sum(sizes.values()), sum(sizes[key] for key in sure)))
    jobs.sort(key=lambda job: (-token_count(job.planned.bucket), job.planned.row))
    return CacheTodo(dataset, len(seen) - before, tuple(jobs))


def format_missing(stocks: Sequence[CacheTodo], cache: Cache) -> list[str]:
    """Returns what was found damaged, what is there, what is to be made, and whether there is room for it.

    Raises:
        UserError: there is none even if text were nothing.
    """
    entries, missing, size, least = (
        sum(numbers) for numbers in zip(*((s.entries, s.missing, s.size, s.least) for s in stocks), strict=True)
    )
    line = f"latent cache {cache.folder}: {entries - missing} of {entries} entries are there"
    if not missing:
        return [*cache.damage(), f"{line}; training needs no encoder"]
    free = shutil.disk_usage(cache.folder).free
    line += f"; {missing} to make, {size_text(size)} at most; {size_text(free)} are free"
    if least > free:
        hint = "give a folder on a larger disk, fewer --cache_variants, or --vae_sample_mode mode, which keeps half"
        raise UserError("--latent_cache", line, hint, STORAGE)
    close = ["warning: the latent cache may find too little room, if all captions are long"] if size > free else []
    return [*cache.damage(), line, *close]


def open_encoder(
    recipes: Sequence[EncodingSpec],
    folder: str | None,
    *,
    mode: str,
    device: torch.device,
    is_main: bool,
    gather: Callable[[Any], list[Any]],
    encoders: LazyEncoders[Any],
) -> Encoder:
    """Returns what makes the tensors that the encoders give, over a cache if there is one; all processes call it.

    The main process reads the encoders' files first, for their fingerprints, which the others find in the folder.

    Args:
        recipes: how a sample's tensors are made.
        folder: of the cache; None = none.
        mode: of known_mask.
        device: where tensors are wanted.
        is_main: on one process only.
        gather: collective that returns every process's value.
        encoders: with the modules that recipes name.
    """
    if folder is None:
        return Encoder(recipes, device, encoders=encoders)
    cache = Cache(Path(folder))

    def parts() -> tuple[CacheField, ...]:
        memo = read_memo(cache.folder)
        before = len(memo)
        found = tuple(recipe.part(memo) for recipe in recipes)
        if len(memo) > before:
            write_memo(cache.folder, memo)
        return found

    def prepare() -> None:
        cache.clear_up()
        parts()

    main_first(prepare, is_main=is_main, gather=gather)
    return Encoder(recipes, device, CacheView(cache, parts(), mode))


def find_missing(
    columns: Columns,
    settings: PlanSettings,
    state: TrainState,
    total: int,
    dataset: TokenLengthDataset,
    encoder: Encoder,
) -> list[CacheTodo]:
    """Returns what the rest of a run needs of the cache, and what its held-out rows do; nothing without a cache.

    Args:
        columns: of the index; settings: of the plan; state: where the run stands.
        total: optimizer steps of the whole run.
        dataset: of the run.
        encoder: with the cache.
    """
    if encoder.cache is None:
        return []
    ahead, last = total - state.step + state.epoch_step, state.epoch
    while ahead > 0 and (steps := count_steps(columns, settings, last, state.quarantined)):
        ahead, last = ahead - steps, last + 1
    epochs = range(state.epoch, last)
    trained = samples_to_come(columns, settings, epochs, state.quarantined, dataset.caption_dropout)
    held_out = held_out_samples(held_out_plan(columns, settings))
    seen: set[bytes] = set()  # a caption of both is one entry
    return [
        find_missing_of(trained, dataset, encoder, seen),
        find_missing_of(held_out, dataset.without_dropout(), encoder, seen),
    ]


def fill_together(
    stocks: Sequence[CacheTodo],
    encoder: Encoder,
    *,
    rank: int,
    world_size: int,
    workers: int,
    gather: Callable[[Any], list[Any]],
    say: Callable[[str], None],
    status: RunStatus,
) -> int:
    """Fills the cache, each process its share, and writes how it ended; returns the exit code.

    Args:
        say: prints on the main process; status: of the run; the others: as fill's and open_encoder's.
    """
    bad: list[BadSample] = []
    with StopRequest() as stop:
        share = partial(
            fill, stocks, encoder, rank=rank, world_size=world_size, workers=workers, stopped=stop.__bool__
        )
        together(lambda: bad.extend(share()), gather=gather)
    for sample in sorted(sample for part in gather(bad) for sample in part):
        say(f"row {sample.row} is left out: {sample.path!r} is {sample.media_class} ({sample.detail})")
    if any(gather(bool(stop))):
        line = f"stopped by {stop.signal_name or 'another process'}: the same command goes on filling the cache"
        status.write("stopped", exit_code=STOPPED, error=line)
        say(line)
        return STOPPED
    status.write("finished", exit_code=0)
    say("the latent cache has all that the run needs")
    return 0


def fill(
    stocks: Sequence[CacheTodo],
    encoder: Encoder,
    *,
    rank: int,
    world_size: int,
    workers: int,
    stopped: Callable[[], bool],
) -> list[BadSample]:
    """Makes this process's share of what is missing and publishes it; returns the samples that cannot be read.

    Args:
        workers: decoding processes; 0 decodes here.
        stopped: whether to stop after the sample at hand; what was made is published, and not made again.
    """
    bad: list[BadSample] = []
    total = sum(len(stock.jobs[rank::world_size]) for stock in stocks)
    with encoder, tqdm(total=total, unit="sample", desc="encoding", disable=rank != 0 or not total) as bar:
        for stock in stocks:
            jobs = stock.jobs[rank::world_size]
            loader = DataLoader(
                stock.dataset,
                batch_sampler=[[job.planned] for job in jobs],
                collate_fn=collate,
                num_workers=workers,
                worker_init_fn=quiet_worker if workers else None,
            )
            for job, batch in zip(jobs, loader, strict=True):
                encoder(batch, only=job.keys)
                bad += batch["bad"]
                bar.update()
                if stopped():
                    return bad
    return bad
