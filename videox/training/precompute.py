"""Fills the latent cache: which entries a run needs, which are missing, and their encoding (--cache_only).

All of it is known before the first media file is read, because the plan is. The missing entries are distributed over
the ranks; each rank publishes its entries file by file, so that one that is killed loses its last file only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from videox.data.bucket_sampler import BucketBatchSampler, held_out_samples
from videox.data.cache.cache import Cache, CacheField, CacheView, cache_key, read_memo, write_memo
from videox.data.cache.maintenance import format_size
from videox.data.dataset import BadSample, TokenLengthDataset, sample_key_of
from videox.data.index.captions import caption_counts, drawn_caption
from videox.data.loader import BatchLoader
from videox.data.plan.epoch import PADDING, PlannedSample
from videox.data.plan.plan import count_steps, draw_epoch, row_fates
from videox.distributed.collectives import run_on_all, run_on_main
from videox.distributed.signals import StopRequest
from videox.encoders.encode import Encoder, EncodingSpec, LazyEncoders
from videox.errors import STOPPED, STORAGE, UserError
from videox.rng import Purpose, uniform
from videox.shapes import token_count
from videox.training.context import Context
from videox.training.measured_rows import row_sets
from videox.training.schedule import Schedule


class Job(NamedTuple):
    """A sample of which cache entries are missing.

    Attributes:
        planned: the sample.
        keys: of the missing entries.
        max_bytes: their size at most: text is stored without its padding.
        min_bytes: their size without text.
    """

    planned: PlannedSample
    keys: frozenset[bytes]
    max_bytes: int
    min_bytes: int


@dataclass(frozen=True)
class CacheTodo:
    """Cache entries that some samples need and the cache does not have.

    Attributes:
        dataset: decodes these samples.
        entries: number of distinct entries that the samples need.
        jobs: samples with missing entries, largest first.
    """

    dataset: TokenLengthDataset
    entries: int
    jobs: tuple[Job, ...]

    @property
    def missing(self) -> int:
        """Number of missing entries."""
        return sum(len(job.keys) for job in self.jobs)

    @property
    def max_bytes(self) -> int:
        """Bytes of the missing entries at most."""
        return sum(job.max_bytes for job in self.jobs)

    @property
    def min_bytes(self) -> int:
        """Bytes of the missing entries without text."""
        return sum(job.min_bytes for job in self.jobs)


def distinct_samples(schedule: Schedule, epochs: range, caption_dropout: float) -> Iterator[PlannedSample]:
    """Yield every distinct sample of these epochs once: with each caption of its row that it draws, and without one.

    Where clips and sizes repeat after some epochs (cache_variants), so do the samples; the caption of a row with
    several, and caption dropout, are drawn anew in every epoch.
    """
    counts = caption_counts(schedule.index.text)
    columns, settings = schedule.columns, schedule.settings
    fates = row_fates(columns, settings, np.array(schedule.state.later_quarantined, np.int64))
    period = settings.cache_variants or len(epochs)
    for first in range(min(period, len(epochs))):
        seen: dict[int, np.ndarray] = {}  # number of the caption, -1 if it is dropped -> variants of the samples
        for epoch in epochs[first::period]:
            drawn = draw_epoch(columns, settings, epoch, fates)
            is_dropped = uniform(drawn.keys, Purpose.CAPTION_DROPOUT) < caption_dropout
            captions = np.where(is_dropped, -1, drawn_caption(drawn.keys, counts[drawn.rows]))
            for caption in np.unique(captions).tolist():
                before = seen.get(caption, np.empty(0, np.uint64))
                new = np.flatnonzero((captions == caption) & ~np.isin(drawn.variants, before))
                seen[caption] = np.concatenate([before, drawn.variants[new]])
                for i in new:
                    yield PlannedSample(
                        int(drawn.rows[i]), int(drawn.starts[i]), int(drawn.keys[i]), int(drawn.variants[i]), 1.0, 0.5,
                        drawn.buckets[drawn.number[i]], 0, 0, True,
                    )  # fmt: skip


def missing_of(
    samples: Iterator[PlannedSample], dataset: TokenLengthDataset, encoder: Encoder, seen: set[bytes]
) -> CacheTodo:
    """What the cache lacks of these samples; opens no media file.

    Args:
        samples: of the run.
        dataset: decodes them.
        encoder: with the cache.
        seen: keys that are counted already; those of these samples are added.
    """
    assert encoder.cache_view is not None and encoder.cache is not None
    jobs, before, ratios = [], len(seen), dataset.policy.ratios
    for planned in samples:
        sample_key = sample_key_of(dataset, planned, encoder.cache_view.mode)
        specs = {
            cache_key(encoder.cache_fields[spec.name], sample_key): spec
            for spec in encoder.specs
            if spec.name in encoder.cache_fields
        }
        new = specs.keys() - seen
        seen |= new
        if missing := frozenset(key for key in new if key not in encoder.cache):
            sizes = {key: specs[key].max_bytes(planned.bucket) for key in missing}
            fixed = (key for key in missing if not (specs[key].padded or specs[key].trimmed))
            jobs.append(Job(planned, missing, sum(sizes.values()), sum(sizes[key] for key in fixed)))
    jobs.sort(key=lambda job: (-token_count(job.planned.bucket, ratios), job.planned.row))
    return CacheTodo(dataset, len(seen) - before, tuple(jobs))


def _samples_of_plan(schedule: Schedule) -> Iterator[PlannedSample]:
    """Yield the samples of the schedule's plan from the state's position on, padding left out."""
    sampler = BucketBatchSampler(data_group=0, data_groups=1)
    sampler.set_plan(schedule.plan, schedule.state.epoch_step, schedule.first_row)
    return (planned for batch in sampler for planned in batch if planned.row != PADDING)


def find_missing(schedule: Schedule, dataset: TokenLengthDataset, encoder: Encoder) -> list[CacheTodo]:
    """What the cache lacks for the rest of the run and for the rows of its validations; empty without a cache."""
    if encoder.cache is None:
        return []
    columns, settings, state = schedule.columns, schedule.settings, schedule.state
    remaining, first = schedule.total - state.step + state.epoch_step, state.epoch
    trained: Iterator[PlannedSample] = iter(())
    if state.next_data:  # the rest of this epoch has rows of its own
        remaining, first = remaining - schedule.plan.n_steps, first + 1
        trained = _samples_of_plan(schedule)
    end = first
    while remaining > 0 and (steps := count_steps(columns, settings, end, state.later_quarantined)):
        remaining, end = remaining - steps, end + 1
    trained = chain(trained, distinct_samples(schedule, range(first, end), dataset.caption_dropout))
    seen: set[bytes] = set()  # a caption that several have is one entry
    todos = [missing_of(trained, dataset, encoder, seen)]
    for rows in row_sets(schedule):
        measured = dataset.of_index(rows.index).without_dropout()
        todos.append(missing_of(held_out_samples(rows.plan), measured, encoder, seen))
    return todos


def format_missing(todos: Sequence[CacheTodo], cache: Cache, uncached: Sequence[EncodingSpec] = ()) -> list[str]:
    """Lines on damaged files, existing and missing entries, and the disk space that they take.

    Args:
        todos: of find_missing.
        cache: the cache.
        uncached: specs whose tensors are not cached.

    Raises:
        UserError: (STORAGE) the missing entries do not fit the disk, even without text.
    """
    entries, missing, largest, smallest = (
        sum(numbers)
        for numbers in zip(*((t.entries, t.missing, t.max_bytes, t.min_bytes) for t in todos), strict=True)
    )
    line = f"latent cache {cache.folder}: {entries - missing} of {entries} entries exist"
    notes = cache.corruption_messages()
    if uncached:
        names = ", ".join(spec.name for spec in uncached)
        notes.append(f"--caption_shuffle_tags: {names} are not cached, every step encodes its captions")
    if not missing:
        return [*notes, line if uncached else f"{line}; no encoder is needed for training"]
    free = shutil.disk_usage(cache.folder).free
    line += f"; {missing} to encode, at most {format_size(largest)}; {format_size(free)} free disk space"
    if smallest > free:
        hint = "use a folder on a larger disk, fewer --cache_variants, or --vae_sample_mode mode, which takes half"
        raise UserError("--latent_cache", line, hint, STORAGE)
    warning = ["warning: the disk may be too small for the latent cache if all captions are long"]
    return [*notes, line, *(warning if largest > free else [])]


def open_encoder(
    specs: Sequence[EncodingSpec],
    folder: str | None,
    ctx: Context,
    *,
    mode: str,
    encoders: LazyEncoders[Any],
    cache_text: bool = True,
) -> Encoder:
    """The encoder outputs of micro-batches, over a cache if there is one; all ranks call it.

    The main process reads the encoders' files first, for their fingerprints; the others find these in the folder.

    Args:
        specs: how the tensors of a sample are computed.
        folder: of the cache; None = no cache.
        ctx: of the run.
        mode: as known_mask's.
        encoders: with the modules that the specs name.
        cache_text: cache tensors that depend on the caption; False where captions differ in every epoch.
    """
    if folder is None:
        return Encoder(specs, ctx.device, encoders=encoders)
    cache = Cache(Path(folder))

    def fields() -> tuple[CacheField, ...]:
        memo = read_memo(cache.folder)
        before = len(memo)
        found = tuple(spec.cache_field(memo) for spec in specs)
        if len(memo) > before:
            write_memo(cache.folder, memo)
        return found

    def prepare() -> None:
        cache.delete_unfinished()
        fields()

    run_on_main(prepare, is_main=ctx.is_main, gather=ctx.gather)
    found = fields()
    cached = tuple(field for field in found if cache_text or "caption" not in field.uses)
    needed = tuple(field for field in found if field not in cached)
    return Encoder(specs, ctx.device, CacheView(cache, cached, mode, needed), encoders=encoders)


def fill_cache(ctx: Context, todos: Sequence[CacheTodo], encoder: Encoder, workers: int) -> int:
    """Encode everything that the cache lacks, each rank its share; return the exit code.

    Args:
        ctx: of the run; its status file gets how the filling ended.
        todos: of find_missing.
        encoder: with the cache.
        workers: processes that decode, per rank; 0 decodes in this process.
    """
    bad: list[BadSample] = []
    with StopRequest() as stop:
        encode_share = partial(encode_missing, ctx, todos, encoder, workers, stopped=stop.__bool__)
        run_on_all(lambda: bad.extend(encode_share()), gather=ctx.gather)
    for sample in sorted(sample for part in ctx.gather(bad) for sample in part):
        ctx.print(f"row {sample.row} is left out: {sample.path!r} is {sample.media_class} ({sample.detail})")
    if any(ctx.gather(bool(stop))):
        line = f"stopped by {stop.signal_name or 'another process'}: the same command continues to fill the cache"
        ctx.run.status.write("stopped", exit_code=STOPPED, error=line)
        ctx.print(line)
        return STOPPED
    ctx.run.status.write("finished", exit_code=0)
    ctx.print("the latent cache has everything that the run needs")
    return 0


def encode_missing(
    ctx: Context, todos: Sequence[CacheTodo], encoder: Encoder, workers: int, *, stopped: Callable[[], bool]
) -> list[BadSample]:
    """Encode this rank's share of the missing entries and publish it; return the samples that cannot be read.

    Args:
        ctx: of the run.
        todos: of find_missing.
        encoder: with the cache.
        workers: processes that decode; 0 decodes in this process.
        stopped: whether to stop after the current sample; what was encoded until then is published.
    """
    bad: list[BadSample] = []
    shares = [(todo.dataset, todo.jobs[ctx.rank :: ctx.world_size]) for todo in todos]
    total = sum(len(jobs) for _, jobs in shares)
    with encoder, tqdm(total=total, unit="sample", desc="encoding", disable=ctx.rank != 0 or not total) as bar:
        for dataset, jobs in shares:
            loader = BatchLoader(dataset, [[job.planned] for job in jobs], workers=workers)
            for job, batch in zip(jobs, loader, strict=True):
                encoder(batch, only=job.keys)
                bad += batch["bad"]
                bar.update()
                if stopped():
                    return bad
    return bad
