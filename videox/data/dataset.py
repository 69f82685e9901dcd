"""Serves the loader: a planned sample becomes tensors; a bad one keeps its place with weight 0 and is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from videox.data.buckets import SizePolicy, frame_offsets, pace_of
from videox.data.deadline import READ_SECONDS, deadline
from videox.data.index import Index
from videox.data.plan import PADDING
from videox.data.video import BadMedia, read_clip, read_image
from videox.keys import Purpose, uniform
from videox.shapes import Bucket


class PlannedSample(NamedTuple):
    """One sample of a micro-batch as the sampler hands it to a worker.

    row: metadata row, -1 for padding; start: first source frame; key: of its random draws; weight: share of the step's
    loss; stratum: its timestep draw in (0, 1); step: within the epoch; micro: which of this process's micro-batches of
    the step, from 0; last: none follows in the step.
    """

    row: int
    start: int
    key: int
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
    """pixels: uint8 [T, H, W, 3]; frame_indices: source frames, int64 [T]; bad: why the pixels are zeros, or None."""

    planned: PlannedSample
    pixels: np.ndarray
    caption: str
    frame_indices: np.ndarray
    bad: BadSample | None


class Batch(TypedDict):
    """A micro-batch: pixels uint8 [B, T, H, W, 3]; weights, strata float64 [B]; keys and captions of length B."""

    pixels: torch.Tensor
    captions: list[str]
    weights: np.ndarray
    strata: np.ndarray
    keys: list[int]
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
    """

    def __init__(self, index: Index, *, policy: SizePolicy, reader: str, caption_dropout: float) -> None:
        self.index = index
        self.policy = policy
        self.reader = reader
        self.caption_dropout = caption_dropout

    def __getitem__(self, planned: PlannedSample) -> Sample:
        """Returns the sample; one that cannot be read comes back as zeros with weight 0 and its reason."""
        bucket = planned.bucket
        indices = planned.start + frame_offsets(np.arange(bucket.frames), self.pace(planned.row))
        nothing = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        if planned.row == PADDING:
            return Sample(planned=planned, pixels=nothing, caption="", frame_indices=indices, bad=None)
        dropped = uniform(planned.key, Purpose.CAPTION_DROPOUT) < self.caption_dropout
        caption = "" if dropped else self.index.caption(planned.row)
        path = self.index.file(planned.row)
        try:
            with deadline(READ_SECONDS, own_process=get_worker_info() is not None):
                pixels, bad = self._read(planned, path, indices), None
        except BadMedia as why:
            bad = BadSample(planned.row, str(path), why.media_class, why.detail)
            pixels, planned = nothing, planned._replace(weight=0.0)
        return Sample(planned=planned, pixels=pixels, caption=caption, frame_indices=indices, bad=bad)

    def pace(self, row: int) -> float:
        """Returns the source frames from one kept frame of a row to the next."""
        return float(np.ravel(pace_of(self.policy, self.index.fps[[max(row, 0)]]))[0])

    def without_dropout(self) -> TokenLengthDataset:
        """Returns the same data with every caption kept."""
        return TokenLengthDataset(self.index, policy=self.policy, reader=self.reader, caption_dropout=0.0)

    def _read(self, planned: PlannedSample, path: Path, indices: np.ndarray) -> np.ndarray:
        refuse_changed(path, int(self.index.file_size[planned.row]), int(self.index.mtime_ns[planned.row]))
        if self.index.kind[planned.row] == 0:
            return read_image(path, planned.bucket.height, planned.bucket.width)
        return read_clip(path, indices.tolist(), planned.bucket.height, planned.bucket.width, self.reader)


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
    return Batch(
        pixels=torch.from_numpy(np.stack([sample["pixels"] for sample in samples])),
        captions=[sample["caption"] for sample in samples],
        weights=np.array([p.weight for p in planned]),
        strata=np.array([p.stratum for p in planned]),
        keys=[p.key for p in planned],
        rows=[p.row for p in planned],
        frame_indices=[sample["frame_indices"].tolist() for sample in samples],
        bucket=planned[0].bucket,
        step=planned[0].step,
        micro=planned[0].micro,
        last=planned[0].last,
        bad=[sample["bad"] for sample in samples if sample["bad"] is not None],
    )
