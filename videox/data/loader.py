"""Serves both train.py scripts: the DataLoader over the plan. It knows its rank, so accelerate never shards it."""

from __future__ import annotations

import os
import signal
import threading

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
    """Keeps a worker out of the way: signals are the training process's to handle, and decoding needs one thread.

    Terminals, batch systems and torchrun signal every process of a session. A worker that obeyed would break the step
    that the training process wants to finish and save, so that its SIGTERM counts from the training process alone.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_word_from, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_on_word_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
