"""The DataLoader over the plan; its sampler already yields this rank's batches, so accelerate must not shard it."""

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
    """Build a loader of Batch; the batches are in the sampler's order for any number of workers.

    Args:
        dataset: reads the samples.
        sampler: yields this rank's micro-batches.
        workers: decoding processes; 0 decodes in the training process.
        pin_memory: put batches into page-locked memory, so that copies to a GPU overlap with computation.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=init_worker if workers else None,
    )


def init_worker(worker: int) -> None:
    """Initialize a worker process: ignore signals that only the training process handles, and use one thread.

    Terminals, batch systems and torchrun send signals to all processes of a session. A worker that ended on them would
    abort the step that the training process still has to finish and save. So a worker obeys SIGTERM only if the
    training process sent it.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Blocked in every thread: the thread below receives it by sigwaitinfo, which also reports the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
