"""The loader: decodes the micro-batches of a plan in worker processes, and survives the death of a worker.

Its batches are this rank's already, so accelerate must not shard it.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from videox.data.dataset import Batch, Sample, TokenLengthDataset, collate
from videox.data.plan.epoch import PlannedSample
from videox.errors import DATA, UserError

logger = logging.getLogger(__name__)
IDLE = -1  # what a worker reads while it reads no row
OF_TRAINING = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
}  # signals that only the training process handles
# Deaths of workers in a row, each while no row was read, without a batch in between, after which the run ends.
MOST_IDLE_DEATHS = 3
PARENT_SECONDS = 1.0  # between two looks of a worker whether the training process is still there


class BatchLoader:
    """Loads micro-batches in the order of a sampler, for any number of workers.

    If a worker dies, all are started again, at the batch that was awaited. The row that it was reading becomes a bad
    sample: a file that crashes a decoder would crash the next worker, too. After SIGKILL, which may have come from
    outside (a user, or the kernel without memory), the row is read once more first, so that nothing is lost by it.

    Args:
        dataset: reads the samples.
        batches: this rank's micro-batches; iterated again for each epoch and after each death.
        workers: decoding processes; 0 decodes in the training process.
        pin_memory: put batches into page-locked memory, so that copies to a GPU overlap with computation.
    """

    def __init__(
        self,
        dataset: TokenLengthDataset,
        batches: Iterable[list[PlannedSample]],
        *,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.workers, self.pin_memory = dataset, workers, pin_memory
        self._batches, self._idle_deaths = _Remaining(batches), 0
        self._killed: set[int] = set()  # rows during whose reading a worker was killed once
        self._build()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            UserError: (DATA) workers die again and again without reading a row.
        """
        delivered = 0
        while True:
            self._batches.skip, iterator = delivered, None
            try:
                iterator = self._start()
                for batch in iterator:
                    delivered, self._idle_deaths = delivered + 1, 0
                    yield batch
                return
            except RuntimeError:
                dead = self._dead_workers()
                if not dead:
                    raise
            for number, code in dead.items():
                self._note_death(self._reading[number], code)
            del iterator  # with the loader it ends the remaining workers
            self._build()

    def _build(self) -> None:
        # The row that each worker reads, in memory that all share: a dead worker's entry stays.
        self._reading = multiprocessing.RawArray(ctypes.c_int64, [IDLE] * self.workers)
        self._loader = DataLoader(
            _Reporting(self.dataset, self._reading) if self.workers else self.dataset,
            batch_sampler=self._batches,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
            worker_init_fn=init_worker if self.workers else None,
        )

    def _start(self) -> Iterator[Batch]:
        """Return the iterator of torch's loader, without its handler of SIGCHLD.

        That one raises an exception when a worker has died, wherever the main thread is: in a collective, or in the
        middle of a save. Without it the death is noticed within 5 s when the next batch is awaited.

        Stop signals are blocked meanwhile: a worker inherits that, so that none ends it before init_worker.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_TRAINING)
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if is_main else None
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if before is not None:  # None: a handler that was not installed from Python
                signal.signal(signal.SIGCHLD, before)

    def _dead_workers(self) -> dict[int, int]:
        """Return the exit codes of the workers that have ended, by their number."""
        workers = getattr(self._loader._iterator, "_workers", ())
        return {number: worker.exitcode for number, worker in enumerate(workers) if not worker.is_alive()}

    def _note_death(self, row: int, code: int) -> None:
        how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
        if row == IDLE:
            self._idle_deaths += 1
            if self._idle_deaths >= MOST_IDLE_DEATHS:
                what = f"{self._idle_deaths} of its processes ended one after the other, the last one with {how}"
                hint = "see the lines above and the kernel's log; use fewer of them, or give them more host memory or /dev/shm"
                raise UserError("--dataloader_num_workers", what, hint, DATA)
            logger.warning("a data worker ended with %s while it read no row; it is started again", how)
            return
        again = code == -signal.SIGKILL and row not in self._killed
        if again:
            self._killed.add(row)
        else:
            self.dataset.crashed[row] = f"the process that read it ended with {how}"
        path, number = str(self.dataset.index.file(row)), self.dataset.index.number(row)
        then = "the row is read once more" if again else "the row is left out"
        logger.warning("a data worker ended with %s while it read row %d (%r); %s", how, number, path, then)


class _Remaining:
    """The batches of a sampler without the first `skip` ones."""

    def __init__(self, batches: Iterable[list[PlannedSample]]) -> None:
        self._all, self.skip = batches, 0

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        return islice(iter(self._all), self.skip, None)


class _Reporting(Dataset):
    """A dataset in a worker, which leaves in shared memory which row it reads."""

    def __init__(self, dataset: TokenLengthDataset, reading: Any) -> None:  # noqa: ANN401 - an array of ctypes
        self._dataset, self._reading = dataset, reading

    def __getitem__(self, planned: PlannedSample) -> Sample:
        worker = get_worker_info()
        assert worker is not None
        self._reading[worker.id] = planned.row
        sample = self._dataset[planned]
        self._reading[worker.id] = IDLE
        return sample


def init_worker(worker: int) -> None:
    """Initialize a worker process: ignore signals that only the training process handles, and use one thread.

    Terminals, batch systems and torchrun send signals to all processes of a session. A worker that ended on them would
    abort the step that the training process still has to finish and save. So a worker obeys SIGTERM only if the
    training process sent it. It ends with the training process, also while it reads a file without an end.
    """
    del worker
    for number in OF_TRAINING - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    # Blocked in every thread: the thread below waits for it by sigtimedwait, which also reports the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _exit_with(parent: int) -> None:
    """End this process when the parent sends SIGTERM or is gone, as after a kill."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
