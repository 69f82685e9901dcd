"""DeepSpeed resume at another world size: the checkpoint is converted to DeepSpeed's universal format, then loaded.

ZeRO's files are shards for the world size that wrote them. DeepSpeed's universal checkpoint has each parameter
unsharded. DeepSpeed's converter writes one into a temporary folder of the run, in a subprocess, and the original
checkpoint is only read. What DeepSpeed's loading then leaves out, frozen parameters and buffers, is read from the
original checkpoint's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from videox.distributed.signals import stop_with_parent
from videox.errors import MODEL, STORAGE, UserError, plural
from videox.files import temp_path
from videox.run.checkpoint import read_manifest
from videox.run.folder import require_disk_space
from videox.weights.deepspeed_reader import read_zero
from videox.weights.lazy_tensor import BlockReader, LazyTensor

TAG = "pytorch_model"  # accelerate's name; DeepSpeed's own scripts find it by the file `latest`
LOG = "conversion.log"
POLL_SECONDS = 30.0  # between two collectives of the waiting ranks; far below the timeout of a collective
MAX_WORKERS = 4  # of the converter; fewer if memory is short

Gather = Callable[[Any], list[Any]]


# --------------------------------------------------------------------------------------- whether to convert, and cost


def saved_world_size(checkpoint: Path) -> int:
    """Return the world size that saved a checkpoint."""
    return int(read_manifest(checkpoint)["world_size"])


def conversion_bytes(folder: Path) -> int:
    """Return an upper limit of the disk space that the conversion of a DeepSpeed checkpoint needs temporarily.

    The optimizer's files are written twice, in fragments and merged; the model's files are copied, and frozen
    parameters are written once more as float32.
    """
    optimizer, model = ([p.stat().st_size for p in folder.glob(f"*_{kind}_states.pt")] for kind in ("optim", "model"))
    return 2 * sum(optimizer) + max(optimizer, default=0) + 3 * sum(model)


def announce_conversion(checkpoint: Path, output_dir: Path, processes: int) -> list[str]:
    """Return a line that announces a conversion; nothing if the world size is the checkpoint's.

    Raises:
        UserError: (STORAGE) the disk of output_dir does not have enough free space for it.
    """
    saved = saved_world_size(checkpoint)
    if saved == processes:
        return []
    needed = conversion_bytes(checkpoint / TAG)
    require_disk_space(output_dir, needed, f"to convert {checkpoint.name} from {saved} to {processes} processes")
    cost = f"{needed / 1e9:.3g} GB in {output_dir} until it is loaded"
    savers = plural(saved, "process", "processes")
    return [f"{checkpoint} was saved by {saved} {savers}, this launch has {processes}: converting it needs {cost}"]


# --------------------------------------------------------------------------------------------------- the conversion


@contextmanager
def converted_checkpoint(
    checkpoint: Path, tag: str, output_dir: Path, *, is_main: bool, gather: Gather
) -> Iterator[Path]:
    """Yield, on all ranks, a folder with the universal checkpoint in `tag` inside it; it is deleted on exit.

    Args:
        checkpoint: published; its files are known to contain only tensors (see videox.weights.safe_pickle). May be
            read-only.
        tag: the folder of DeepSpeed's files inside it.
        output_dir: of the run, visible to all ranks; the next start deletes what a killed conversion leaves there.
        is_main: true on rank 0 only.
        gather: collective that returns every rank's value.

    Raises:
        UserError: on every rank: DeepSpeed cannot convert it, or a rank does not see output_dir.
    """
    folder = output_dir / gather(temp_path(output_dir / f"universal-{checkpoint.name}").name if is_main else None)[0]
    try:
        with _converting(checkpoint / tag, folder) if is_main else contextlib.nullcontext(None) as conversion:
            failure = None
            while failure is None:
                failure = gather(conversion.wait(POLL_SECONDS) if conversion else None)[0]
        if failure:
            hint = f"free some disk space and launch again, or launch {saved_world_size(checkpoint)} processes"
            raise UserError(str(checkpoint), f"DeepSpeed cannot convert it ({failure})", hint, MODEL)
        if not all(gather((folder / tag / "zero").is_dir())):
            what = f"a process cannot see {folder.name} in it"
            raise UserError(str(output_dir), what, "pass an --output_dir that all machines share", STORAGE)
        yield folder
        gather(None)  # rank 0 deletes the folder only after all ranks have read it
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)


class _Conversion:
    """The running converter. Progress, as bytes written, is shown in a bar on a terminal, else in lines."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, total: int) -> None:
        self._process, self._folder, self._total = process, folder, total
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc="converting for this number of processes",
            total=total,
            unit="B",
            unit_scale=True,
            disable=not self._terminal,
        )

    def wait(self, seconds: float) -> str | None:
        """Return "" if the conversion succeeded, the cause if it failed, None if it still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                code = self._process.wait(min(5.0, seconds))
            except subprocess.TimeoutExpired:
                self._bar.n = max(self._bar.n, min(_written_bytes(self._folder), self._total))
                self._bar.refresh()
                continue
            self._bar.close()
            return self._failure(code) if code else ""
        if not self._terminal:
            sys.stderr.write(f"converting: about {min(_written_bytes(self._folder) / self._total, 1):.0%}\n")
        return None

    def _failure(self, code: int) -> str:
        log = (self._folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        return log.splitlines()[-1] if log else f"it exited with code {code}"

    def stop(self) -> None:
        """Kill the converter and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def _converting(source: Path, folder: Path) -> Iterator[_Conversion]:
    """Create `folder` and start the converter in it; kill it when the block ends."""
    folder.mkdir()
    (folder / "saved").symlink_to(source.resolve())
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    command = [
        sys.executable,
        "-m",
        "videox.engine.deepspeed_universal",
        "saved",
        source.name,
        str(_worker_count(source)),
    ]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    conversion = _Conversion(process, folder, conversion_bytes(source))
    try:
        yield conversion
    finally:
        conversion.stop()


def _worker_count(source: Path) -> int:
    """Return how many worker processes fit in memory; each has an optimizer file and copies of its parts."""
    largest = max((path.stat().st_size for path in source.glob("*_optim_states.pt")), default=1)
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = 1024 * int(meminfo["MemAvailable"].split()[0])
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)), free // (2 * largest)))


def _written_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # fragments are deleted when they are merged
                total += (Path(parent) / name).stat().st_size
    return total


def main() -> None:
    """Convert the folder `saved` of the working directory into one that has the name of DeepSpeed's tag.

    It runs in that directory with relative names: DeepSpeed treats paths as glob patterns, and a user's path may
    contain any character.
    """
    from deepspeed.checkpoint import ds_to_universal

    # If the trainer dies, the kernel sends SIGTERM (stop_with_parent). The whole process group ends then, workers too.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    stop_with_parent()
    source, tag, workers = sys.argv[1:]
    ds_to_universal.main(
        SimpleNamespace(
            input_folder=source,
            output_folder=tag,
            num_extract_workers=int(workers),
            num_merge_workers=int(workers),
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # ZeRO-2's converter requires a version number that only Megatron writes
        )
    )
    _shrink(Path(tag) / "zero" / "optimizer_state.pt")


def _shrink(path: Path) -> None:
    """Delete rank 0's shard from a ZeRO-3 optimizer's file.

    All ranks would read it completely, only to use the step counter in it.
    """
    state = torch.load(path, weights_only=False, mmap=True)
    optimizer = state.get("optimizer_state_dict")
    if optimizer is None:
        return
    optimizer["state"] = {0: {"step": optimizer["state"][0]["step"]}}
    state.pop("fp32_flat_groups")
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------------- the loading


def load_engine(engine: Any, folder: Path, tag: str, *, strict: bool = True) -> None:  # noqa: ANN401 - DeepSpeed's
    """Load a checkpoint by DeepSpeed, through a link: DeepSpeed treats paths as glob patterns.

    Args:
        engine: DeepSpeed's.
        folder: the checkpoint; its path may contain any character.
        tag: the folder of DeepSpeed's files inside it.
        strict: every tensor of the model must be in it.

    Raises:
        UserError: (MODEL) DeepSpeed cannot load it.
    """
    with TemporaryDirectory(prefix="videox-") as parent:
        link = Path(parent) / "checkpoint"
        link.symlink_to(folder.resolve())
        path, _ = engine.load_checkpoint(str(link), tag=tag, load_module_strict=strict)
    if path is None:
        raise UserError(str(folder), "DeepSpeed cannot load it", "resume from another checkpoint", MODEL)


def load_universal(engine: Any, folder: Path, tag: str) -> None:  # noqa: ANN401 - DeepSpeed's
    """Load masters and optimizer state from a universal checkpoint; frozen parameters and buffers are unchanged.

    Raises:
        UserError: (MODEL) DeepSpeed cannot load it.
    """
    # DeepSpeed reads this setting only while it loads; the next load may be of an ordinary checkpoint.
    engine._config.load_universal_checkpoint = True
    load_engine(engine, folder, tag)
    engine._config.load_universal_checkpoint = False
    # ZeRO-3 loads one step counter that all groups share, and each group would advance it. So each gets a copy, on the
    # device that the optimizer's kernel expects.
    for parameter, state in engine.optimizer.optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            fused = any(group.get("fused") for group in engine.optimizer.optimizer.param_groups)
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)


def load_frozen(
    source: Path, tensors: Mapping[str, Tensor], writable: Callable[[Tensor], AbstractContextManager[bool]]
) -> None:
    """Load frozen parameters and buffers from the files of a ZeRO checkpoint.

    Args:
        source: the folder of its tag.
        tensors: parameters and buffers in training, by name; trainable ones are left unchanged.
        writable: gathers a tensor, and yields whether this rank must write it.

    Raises:
        UserError: (MODEL) a file is missing, damaged or of another save.
    """
    stored = read_zero(source).tensors
    with BlockReader() as blocks, torch.no_grad():
        for entry, tensor in ((entry, tensors[entry.name]) for entry in stored if entry.name in tensors):
            if not tensor.requires_grad:
                with writable(tensor) as writes:
                    if writes:
                        tensor.copy_(_assembled(blocks.read_blocks(entry), entry))


def _assembled(blocks: Iterable[Tensor], entry: LazyTensor) -> Tensor:
    pieces = [block.clone() for block in blocks]  # BlockReader reuses the memory of a block
    return (torch.cat(pieces) if pieces else torch.empty(0, dtype=entry.dtype)).view(entry.shape)


if __name__ == "__main__":
    main()
