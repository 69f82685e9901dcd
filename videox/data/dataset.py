"""Token-length dataset: decodes planned samples into uint8 clips.

A sample that cannot be read keeps its place in the batch with weight 0, and is reported with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from videox.data.cache.cache import CacheView, SampleKey
from videox.data.index.captions import CaptionRules, draw_caption
from videox.data.index.index import Index
from videox.data.media.container import bad_media_of
from videox.data.media.timeout import READ_SECONDS, time_limit
from videox.data.media.video import BadMedia, read_clip, read_image
from videox.data.plan.buckets import SizePolicy, frame_offsets, pace_of
from videox.data.plan.epoch import PADDING, PlannedSample
from videox.diffusion.conditioning import mask_name
from videox.errors import UserError
from videox.rng import Purpose, uniform
from videox.shapes import Bucket


class BadSample(NamedTuple):
    """A row that could not be read, and why; written to bad_samples.jsonl."""

    row: int
    path: str
    media_class: str
    detail: str


class Sample(TypedDict):
    """One planned sample.

    Attributes:
        planned: what the plan says about it.
        pixels: uint8 [T, H, W, 3]; None if every tensor computed from them was found in the cache.
        caption: one of its row's captions with the run's rules applied; "" if it is dropped.
        frame_indices: source frames, int64 [T].
        cached: tensors found in the cache, by name.
        sample_key: its key in the cache; None without a cache, and for padding.
        bad: why the pixels are zeros; None if they are not.
        fallback: why PyAV read the clip in place of decord; "" if it did not.
    """

    planned: PlannedSample
    pixels: np.ndarray | None
    caption: str
    frame_indices: np.ndarray
    cached: dict[str, torch.Tensor]
    sample_key: SampleKey | None
    bad: BadSample | None
    fallback: str


class Batch(TypedDict):
    """A micro-batch of B samples.

    Attributes:
        pixels: uint8 [n, T, H, W, 3] of the n <= B samples whose files were read.
        decoded: positions of these n samples in the batch.
        real: for each sample, whether it is neither padding nor bad.
        cached: for each sample, its tensors that were found in the cache, by name.
        sample_keys: for each sample, its key in the cache; None without a cache, and for padding.
        captions: for each sample, its caption, "" if dropped.
        weights: float64 [B], share of the step's loss; 0 for padding and bad samples.
        strata: float64 [B], timestep draws in (0, 1).
        timesteps: how these are drawn, one of TIMESTEPS.
        keys: for each sample, the key of its random draws.
        variants: for each sample, the key of those draws that encoder outputs depend on.
        rows: for each sample, its metadata row; -1 for padding.
        frame_indices: for each sample, its source frames.
        bucket: number and size of the frames.
        step: step within the epoch.
        micro: which of this rank's micro-batches of the step, from 0.
        last: whether it is the last micro-batch of the step on this rank.
        bad: the samples that could not be read.
        fallbacks: for each clip that PyAV read in place of decord, why.
    """

    pixels: torch.Tensor
    decoded: list[int]
    real: list[bool]
    cached: list[dict[str, torch.Tensor]]
    sample_keys: list[SampleKey | None]
    captions: list[str]
    weights: np.ndarray
    strata: np.ndarray
    timesteps: str
    keys: list[int]
    variants: list[int]
    rows: list[int]
    frame_indices: list[list[int]]
    bucket: Bucket
    step: int
    micro: int
    last: bool
    bad: list[BadSample]
    fallbacks: list[str]


class TokenLengthDataset(Dataset):
    """Reads planned samples: decodes only the frames that are trained, at the size of their bucket.

    Args:
        index: the index of the data set.
        policy: the flags that decide which frames are kept.
        reader: "pyav" | "decord".
        caption_dropout: share of captions (0 to 1) replaced by "", drawn by each sample's key.
        caption_rules: what is done to each caption before that.
        cache_view: cache of encoder outputs; a file is not read if all tensors computed from it are cached.
        always_read: read the files even then, for a caller that needs the pixels.

    Attributes:
        crashed: rows that are not read because reading them ended a process, by their position in the index, and how.
    """

    def __init__(
        self, index: Index, *, policy: SizePolicy, reader: str, caption_dropout: float,
        caption_rules: CaptionRules | None = None,
        cache_view: CacheView | None = None, always_read: bool = False,
    ) -> None:  # fmt: skip
        self.index = index
        self.policy = policy
        self.reader = reader
        self.caption_dropout = caption_dropout
        self.caption_rules = caption_rules or CaptionRules()
        self.cache_view = cache_view
        self.always_read = always_read
        self.crashed: dict[int, str] = {}

    def __getitem__(self, planned: PlannedSample) -> Sample:
        """Read a sample; one that cannot be read has zeros as pixels, weight 0 and the reason in `bad`."""
        sample = self._sample(planned)
        sample["planned"] = sample["planned"]._replace(row=self.index.number(planned.row))
        return sample

    def _sample(self, planned: PlannedSample) -> Sample:
        bucket = planned.bucket
        indices = planned.start + frame_offsets(np.arange(bucket.frames), self.pace(planned.row))
        zeros = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        sample = Sample(
            planned=planned, pixels=zeros, caption="", frame_indices=indices, cached={}, sample_key=None, bad=None,
            fallback="",
        )  # fmt: skip
        if planned.row == PADDING:
            return sample
        sample["caption"] = self.caption_of(planned)
        if self.cache_view is not None:
            sample_key = sample_key_of(self, planned, self.cache_view.mode)
            sample["sample_key"], sample["cached"] = sample_key, self.cache_view.find(sample_key)
            if not self.always_read and not self.cache_view.needs_pixels(sample["cached"]):
                sample["pixels"] = None
                return sample
        path = self.index.file(planned.row)
        why = self._read_or_refuse(sample, path)
        if why is not None:
            sample["pixels"] = zeros
            sample["bad"] = BadSample(self.index.number(planned.row), str(path), why.media_class, why.detail)
            sample["planned"] = planned._replace(weight=0.0)
        return sample

    def _read_or_refuse(self, sample: Sample, path: Path) -> BadMedia | None:
        """Read the pixels of a sample; return why if its file is bad: whatever a decoder raises is a bad sample.

        Raises:
            OSError: the process has no file descriptors or memory left for a call of the system.
            UserError: --video_reader decord, and decord is not installed.
        """
        row = sample["planned"].row
        if row in self.crashed:
            return BadMedia("crashed", self.crashed[row])
        try:
            with time_limit(READ_SECONDS, own_process=get_worker_info() is not None):
                sample["pixels"] = self._read(sample, path)
        except BadMedia as why:
            return why
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - the error is reported with the sample
            return bad_media_of(error)
        return None

    def caption_of(self, planned: PlannedSample) -> str:
        """Return a sample's caption, "" if it is dropped."""
        dropped = uniform(planned.key, Purpose.CAPTION_DROPOUT) < self.caption_dropout
        return "" if dropped else self.caption_before_dropout(planned)

    def caption_before_dropout(self, planned: PlannedSample) -> str:
        """Return the caption that a sample has if it is not dropped."""
        return draw_caption(self.index.captions(planned.row), self.caption_rules, planned.key)

    def pace(self, row: int) -> float:
        """Return the number of source frames from one kept frame of a row to the next."""
        return float(np.ravel(pace_of(self.policy, self.index.fps[[max(row, 0)]]))[0])

    def of_index(self, index: Index) -> TokenLengthDataset:
        """Return a copy that reads the rows of another index."""
        return self._replace(index=index)

    def without_dropout(self) -> TokenLengthDataset:
        """Return a copy that drops no caption."""
        return self._replace(caption_dropout=0.0)

    def with_pixels(self) -> TokenLengthDataset:
        """Return a copy that reads every sample from its file and uses no cache."""
        return self._replace(cache_view=None)

    def _replace(self, **changes: Any) -> TokenLengthDataset:  # noqa: ANN401 - keyword arguments of the class
        names = ("index", "policy", "reader", "caption_dropout", "caption_rules", "cache_view", "always_read")
        copy = TokenLengthDataset(**{name: getattr(self, name) for name in names} | changes)
        if copy.index is self.index:  # its keys are rows of the index
            copy.crashed = self.crashed
        return copy

    def _read(self, sample: Sample, path: Path) -> np.ndarray:
        planned, indices = sample["planned"], sample["frame_indices"].tolist()
        height, width = planned.bucket.height, planned.bucket.width

        def note_fallback(why: str) -> None:
            sample["fallback"] = why

        check_unchanged(path, int(self.index.file_size[planned.row]), int(self.index.mtime_ns[planned.row]))
        if self.index.kind[planned.row] == 0:
            return read_image(path, height, width)
        return read_clip(path, indices, height, width, self.reader, note_fallback)


def sample_key_of(dataset: TokenLengthDataset, planned: PlannedSample, mode: str) -> SampleKey:
    """Return the cache key of a sample; mode: the task, as in `known_mask`."""
    index, row = dataset.index, planned.row
    file = str(index.file_path[row].as_py()), int(index.file_size[row]), int(index.mtime_ns[row])
    mask = mask_name(mode, planned.variant, planned.bucket.frames)
    caption, decoding = dataset.caption_of(planned), int(index.decoding[row])
    return SampleKey(*file, planned.start, dataset.pace(row), planned.bucket, mask, caption, decoding)


def check_unchanged(path: Path, file_size: int, mtime_ns: int) -> None:
    """Raise BadMedia if a file is missing or has changed since it was indexed: the plan may not fit it."""
    try:
        status = path.stat()
    except OSError as why:
        raise BadMedia("missing", f"{why.strerror}") from why
    if (status.st_size, status.st_mtime_ns) != (file_size, mtime_ns):
        what = f"{file_size} bytes when indexed, {status.st_size} now, or another modification time"
        raise BadMedia("changed", what)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the samples of one micro-batch; they have the same bucket, so that no sample is cropped or padded."""
    planned = [sample["planned"] for sample in samples]
    read = {position: s["pixels"] for position, s in enumerate(samples) if s["pixels"] is not None}
    return Batch(
        pixels=torch.from_numpy(np.stack(list(read.values()))) if read else torch.empty(0, dtype=torch.uint8),
        decoded=list(read),
        real=[sample["planned"].row != PADDING and sample["bad"] is None for sample in samples],
        cached=[sample["cached"] for sample in samples],
        sample_keys=[sample["sample_key"] for sample in samples],
        captions=[sample["caption"] for sample in samples],
        weights=np.array([p.weight for p in planned]),
        strata=np.array([p.stratum for p in planned]),
        timesteps=planned[0].timesteps,
        keys=[p.key for p in planned],
        variants=[p.variant for p in planned],
        rows=[p.row for p in planned],
        frame_indices=[sample["frame_indices"].tolist() for sample in samples],
        bucket=planned[0].bucket,
        step=planned[0].step,
        micro=planned[0].micro,
        last=planned[0].last,
        bad=[sample["bad"] for sample in samples if sample["bad"] is not None],
        fallbacks=[sample["fallback"] for sample in samples if sample["fallback"]],
    )
