"""Serves the loader: a planned sample becomes tensors; a bad one keeps its place with weight 0 and is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from videox.data.cache.cache import CacheView, SampleKey
from videox.data.index.index import Index
from videox.data.media.timeout import READ_SECONDS, deadline
from videox.data.media.video import BadMedia, read_clip, read_image
from videox.data.plan.buckets import SizePolicy, frame_offsets, pace_of
from videox.data.plan.plan import PADDING
from videox.diffusion.conditioning import mask_name
from videox.rng import Purpose, uniform
from videox.shapes import Bucket


class PlannedSample(NamedTuple):
    """One sample of a micro-batch as the sampler hands it to a worker.

    row: metadata row, -1 for padding; start: first source frame; key: of its random draws; variant: of those that a
    cache can hold; weight: share of the step's loss; stratum: its timestep draw in (0, 1); step: within the epoch;
    micro: which of this process's micro-batches of the step, from 0; last: none follows in the step.
    """

    row: int
    start: int
    key: int
    variant: int
    weight: float
    stratum: float
    bucket: Bucket
    step: int
    micro: int
    last: bool


class BadSample(NamedTuple):
    """A row that could not be read: where and why, for bad_samples.jsonl."""

    row: int
    path: str
    media_class: str
    detail: str


class Sample(TypedDict):
    """One planned sample.

    pixels: uint8 [T, H, W, 3], None where all that is made of them was found; frame_indices: source frames, int64 [T];
    found: tensors of the cache, by name; facts: what the sample is made from, None without a cache; bad: why the
    pixels are zeros, or None.
    """

    planned: PlannedSample
    pixels: np.ndarray | None
    caption: str
    frame_indices: np.ndarray
    found: dict[str, torch.Tensor]
    facts: SampleKey | None
    bad: BadSample | None


class Batch(TypedDict):
    """A micro-batch: pixels uint8 [n, T, H, W, 3] of the n of B samples whose files were read; decoded: their places;
    weights, strata float64 [B]; keys, variants, captions, found, facts of length B; real: not padding and not bad.
    """

    pixels: torch.Tensor
    decoded: list[int]
    real: list[bool]
    found: list[dict[str, torch.Tensor]]
    facts: list[SampleKey | None]
    captions: list[str]
    weights: np.ndarray
    strata: np.ndarray
    keys: list[int]
    variants: list[int]
    rows: list[int]
    frame_indices: list[list[int]]
    bucket: Bucket
    step: int
    micro: int
    last: bool
    bad: list[BadSample]


class TokenLengthDataset(Dataset):
    """Reads planned samples: only the frames that will be trained, at the size of their bucket.

    Args:
        index: the rows.
        policy: the flags that decide which frames are kept.
        reader: "pyav" | "decord".
        caption_dropout: share of captions (0 to 1) replaced by "", drawn by each sample's key.
        shelf: where what encoders made of a sample may be found, so that its file need not be read.
        always_read: reads it all the same, for whoever wants to see the pixels.
    """

    def __init__(
        self, index: Index, *, policy: SizePolicy, reader: str, caption_dropout: float, shelf: CacheView | None = None,
        always_read: bool = False,
    ) -> None:  # fmt: skip
        self.index = index
        self.policy = policy
        self.reader = reader
        self.caption_dropout = caption_dropout
        self.shelf = shelf
        self.always_read = always_read

    def __getitem__(self, planned: PlannedSample) -> Sample:
        """Returns the sample; one that cannot be read comes back as zeros with weight 0 and its reason."""
        bucket = planned.bucket
        indices = planned.start + frame_offsets(np.arange(bucket.frames), self.pace(planned.row))
        nothing = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        sample = Sample(
            planned=planned, pixels=nothing, caption="", frame_indices=indices, found={}, facts=None, bad=None
        )
        if planned.row == PADDING:
            return sample
        sample["caption"] = self.caption_of(planned)
        if self.shelf is not None:
            facts = facts_of(self, planned, self.shelf.mode)
            sample["facts"], sample["found"] = facts, self.shelf.find(facts)
            if not self.always_read and not self.shelf.needs_pixels(sample["found"]):
                sample["pixels"] = None
                return sample
        path = self.index.file(planned.row)
        try:
            with deadline(READ_SECONDS, own_process=get_worker_info() is not None):
                sample["pixels"] = self._read(planned, path, indices)
        except BadMedia as why:
            sample["bad"] = BadSample(planned.row, str(path), why.media_class, why.detail)
            sample["planned"] = planned._replace(weight=0.0)
        return sample

    def caption_of(self, planned: PlannedSample) -> str:
        """Returns a sample's caption, "" where it is dropped."""
        dropped = uniform(planned.key, Purpose.CAPTION_DROPOUT) < self.caption_dropout
        return "" if dropped else self.index.caption(planned.row)

    def pace(self, row: int) -> float:
        """Returns the source frames from one kept frame of a row to the next."""
        return float(np.ravel(pace_of(self.policy, self.index.fps[[max(row, 0)]]))[0])

    def without_dropout(self) -> TokenLengthDataset:
        """Returns the same data with every caption kept."""
        return self._but(caption_dropout=0.0)

    def with_pixels(self) -> TokenLengthDataset:
        """Returns the same data read from its files, whatever a cache holds."""
        return self._but(shelf=None)

    def _but(self, **changes: Any) -> TokenLengthDataset:  # noqa: ANN401 - keywords of the class
        names = ("policy", "reader", "caption_dropout", "shelf", "always_read")
        return TokenLengthDataset(self.index, **{name: getattr(self, name) for name in names} | changes)

    def _read(self, planned: PlannedSample, path: Path, indices: np.ndarray) -> np.ndarray:
        refuse_changed(path, int(self.index.file_size[planned.row]), int(self.index.mtime_ns[planned.row]))
        if self.index.kind[planned.row] == 0:
            return read_image(path, planned.bucket.height, planned.bucket.width)
        return read_clip(path, indices.tolist(), planned.bucket.height, planned.bucket.width, self.reader)


def facts_of(dataset: TokenLengthDataset, planned: PlannedSample, mode: str) -> SampleKey:
    """Returns what a sample is made from; mode: of known_mask."""
    index, row = dataset.index, planned.row
    file = str(index.file_path[row].as_py()), int(index.file_size[row]), int(index.mtime_ns[row])
    mask = mask_name(mode, planned.variant, planned.bucket.frames)
    return SampleKey(*file, planned.start, dataset.pace(row), planned.bucket, mask, dataset.caption_of(planned))


def refuse_changed(path: Path, file_size: int, mtime_ns: int) -> None:
    """Raises BadMedia when a file is gone or is not the one that was indexed: the plan may not fit it."""
    try:
        found = path.stat()
    except OSError as why:
        raise BadMedia("missing", f"{why.strerror}") from why
    if (found.st_size, found.st_mtime_ns) != (file_size, mtime_ns):
        raise BadMedia("changed", f"{file_size} bytes when indexed, {found.st_size} now, or another time stamp")


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks the samples of one micro-batch; they share a bucket, so that nothing is cut."""
    planned = [sample["planned"] for sample in samples]
    read = {place: sample["pixels"] for place, sample in enumerate(samples) if sample["pixels"] is not None}
    return Batch(
        pixels=torch.from_numpy(np.stack(list(read.values()))) if read else torch.empty(0, dtype=torch.uint8),
        decoded=list(read),
        real=[sample["planned"].row != PADDING and sample["bad"] is None for sample in samples],
        found=[sample["found"] for sample in samples],
        facts=[sample["facts"] for sample in samples],
        captions=[sample["caption"] for sample in samples],
        weights=np.array([p.weight for p in planned]),
        strata=np.array([p.stratum for p in planned]),
        keys=[p.key for p in planned],
        variants=[p.variant for p in planned],
        rows=[p.row for p in planned],
        frame_indices=[sample["frame_indices"].tolist() for sample in samples],
        bucket=planned[0].bucket,
        step=planned[0].step,
        micro=planned[0].micro,
        last=planned[0].last,
        bad=[sample["bad"] for sample in samples if sample["bad"] is not None],
    )
