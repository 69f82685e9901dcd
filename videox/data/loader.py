"""Serves both train.py scripts: the DataLoader over the plan. It knows its rank, so accelerate never shards it."""

from __future__ import annotations

import signal

import torch
from torch.utils.data import DataLoader

from videox.data.bucket_sampler import BucketBatchSampler
from videox.data.dataset import TokenLengthDataset, collate


def build_loader(
    dataset: TokenLengthDataset, sampler: BucketBatchSampler, *, workers: int, pin_memory: bool
) -> DataLoader:
    """Returns a loader of Batch; batches keep the sampler's order whatever the number of workers.

    Args:
        workers: decoding processes; 0 decodes in the training process.
        pin_memory: page-locked batches, for copies to a GPU that overlap with computation.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=quiet_worker if workers else None,
    )


def quiet_worker(worker: int) -> None:
    """Keeps a worker out of the way: Ctrl-C is the training process's to handle, and decoding needs one thread."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
