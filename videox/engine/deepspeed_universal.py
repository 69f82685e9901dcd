"""Serves a DeepSpeed run that goes on at another number of processes: its checkpoint is converted aside, then loaded.

ZeRO's files are pieces for the number of processes that wrote them. DeepSpeed's universal checkpoint holds each
parameter whole; its converter makes one in a folder of the run, by a process of its own, and the checkpoint is only
read. What DeepSpeed then leaves out, frozen parameters and buffers, is read from the checkpoint's own files.
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

from videox.distributed.accelerator import follow_parent
from videox.errors import MODEL, STORAGE, UserError
from videox.files import temp_path
from videox.run.checkpoint import read_manifest
from videox.run.folder import room_for
from videox.weights.deepspeed_reader import read_zero
from videox.weights.lazy_tensor import Blocks, LazyTensor

TAG = "pytorch_model"  # accelerate's; DeepSpeed's own scripts find it through the file `latest`
LOG = "conversion.log"
ROUND = 30.0  # seconds after which the processes hear from each other, far below any limit of theirs
WORKERS = 4  # processes that convert, memory permitting

Gather = Callable[[Any], list[Any]]


# ------------------------------------------------------------------------------------------- whether, and at what cost


def saved_by(checkpoint: Path) -> int:
    """Returns how many processes saved a checkpoint."""
    return int(read_manifest(checkpoint)["world_size"])


def bytes_needed(folder: Path) -> int:
    """Returns the disk space, at most, that the conversion of a DeepSpeed checkpoint takes for a while.

    The optimizer's files are written twice, in fragments and merged; the model's are copied, and what is frozen is
    once more written as float32.
    """
    optimizer, model = ([p.stat().st_size for p in folder.glob(f"*_{kind}_states.pt")] for kind in ("optim", "model"))
    return 2 * sum(optimizer) + max(optimizer, default=0) + 3 * sum(model)


def announce_conversion(checkpoint: Path, output_dir: Path, processes: int) -> list[str]:
    """Returns what to tell of a conversion: nothing when the number of processes is the checkpoint's.

    Raises:
        UserError: (STORAGE) the disk of output_dir has no room for it.
    """
    saved = saved_by(checkpoint)
    if saved == processes:
        return []
    needed = bytes_needed(checkpoint / TAG)
    room_for(output_dir, needed, f"to convert {checkpoint.name} from {saved} to {processes} processes")
    cost = f"{needed / 1e9:.3g} GB in {output_dir} until it is loaded"
    return [f"{checkpoint} was saved by {saved} processes, here are {processes}: it is converted aside, {cost}"]


# --------------------------------------------------------------------------------------------------- the conversion


@contextmanager
def converted(checkpoint: Path, tag: str, output_dir: Path, *, is_main: bool, gather: Gather) -> Iterator[Path]:
    """Gives all processes a folder with `tag` inside it, the universal checkpoint; afterwards it is gone.

    Args:
        checkpoint: published; its files are known to hold tensors alone (see videox.weights.safe_pickle).
            May be read-only.
        tag: the folder of DeepSpeed's files inside it.
        output_dir: of the run, seen by all processes; what a killed conversion leaves there, the next start sweeps.
        is_main: on the first process only.
        gather: collective that returns every process's value.

    Raises:
        UserError: on every process: DeepSpeed cannot convert it, or a process does not see output_dir.
    """
    folder = output_dir / gather(temp_path(output_dir / f"universal-{checkpoint.name}").name if is_main else None)[0]
    try:
        with _converting(checkpoint / tag, folder) if is_main else contextlib.nullcontext(None) as conversion:
            failure = None
            while failure is None:
                failure = gather(conversion.wait(ROUND) if conversion else None)[0]
        if failure:
            hint = f"look for room on the disk and launch again, or launch {saved_by(checkpoint)} processes"
            raise UserError(str(checkpoint), f"DeepSpeed cannot convert it ({failure})", hint, MODEL)
        if not all(gather((folder / tag / "zero").is_dir())):
            what = f"a process cannot see {folder.name} in it"
            raise UserError(str(output_dir), what, "give an --output_dir that all machines share", STORAGE)
        yield folder
        gather(None)  # all have read
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)


class _Conversion:
    """The converter at work, its progress as written bytes: on a bar where there is a terminal, else in lines."""

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
        """Returns "" when all went well, the cause when not, None when that many seconds were not enough."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                code = self._process.wait(min(5.0, seconds))
            except subprocess.TimeoutExpired:
                self._bar.n = max(self._bar.n, min(_written(self._folder), self._total))
                self._bar.refresh()
                continue
            self._bar.close()
            return self._failure(code) if code else ""
        if not self._terminal:
            sys.stderr.write(f"converting: about {min(_written(self._folder) / self._total, 1):.0%}\n")
        return None

    def _failure(self, code: int) -> str:
        said = (self._folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        return said.splitlines()[-1] if said else f"it ended with {code}"

    def stop(self) -> None:
        """Ends the converter and its workers, whatever they are at."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def _converting(source: Path, folder: Path) -> Iterator[_Conversion]:
    """Starts the converter in `folder`, which is made; ends it with the block."""
    folder.mkdir()
    (folder / "saved").symlink_to(source.resolve())
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    command = [sys.executable, "-m", "videox.engine.deepspeed_universal", "saved", source.name, str(_workers(source))]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    conversion = _Conversion(process, folder, bytes_needed(source))
    try:
        yield conversion
    finally:
        conversion.stop()


def _workers(source: Path) -> int:
    """Returns how many processes may convert at a time; each holds an optimizer file and copies of its parts."""
    largest = max((path.stat().st_size for path in source.glob("*_optim_states.pt")), default=1)
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = 1024 * int(told["MemAvailable"].split()[0])
    return max(1, min(WORKERS, len(os.sched_getaffinity(0)), free // (2 * largest)))


def _written(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # fragments go when they are merged
                total += (Path(place) / name).stat().st_size
    return total


def main() -> None:
    """Converts the folder `saved`, inside the working directory, into one named like DeepSpeed's tag.

    Run in that directory, by names alone: DeepSpeed takes paths for patterns, and a user's may hold any character.
    """
    from deepspeed.checkpoint import ds_to_universal

    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))  # the workers too
    follow_parent()
    source, tag, workers = sys.argv[1:]
    ds_to_universal.main(
        SimpleNamespace(
            input_folder=source,
            output_folder=tag,
            num_extract_workers=int(workers),
            num_merge_workers=int(workers),
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # of ZeRO-2: DeepSpeed asks for a version number that only Megatron writes
        )
    )
    _shrink(Path(tag) / "zero" / "optimizer_state.pt")


def _shrink(path: Path) -> None:
    """Leaves out the first process's share of a ZeRO-3 optimizer, which all would read in full for its step alone."""
    state = torch.load(path, weights_only=False, mmap=True)
    base = state.get("optimizer_state_dict")
    if base is None:
        return
    base["state"] = {0: {"step": base["state"][0]["step"]}}
    state.pop("fp32_flat_groups")
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------------- the loading


def load_engine(engine: Any, folder: Path, tag: str, *, strict: bool = True) -> None:  # noqa: ANN401 - DeepSpeed's
    """Has DeepSpeed load a checkpoint, by a link: it takes a path for a pattern, and a user's may hold any character.

    Args:
        strict: every tensor of the model must be in it.

    Raises:
        UserError: (MODEL) DeepSpeed cannot load it.
    """
    with TemporaryDirectory(prefix="videox-") as place:
        link = Path(place) / "checkpoint"
        link.symlink_to(folder.resolve())
        path, _ = engine.load_checkpoint(str(link), tag=tag, load_module_strict=strict)
    if path is None:
        raise UserError(str(folder), "DeepSpeed cannot load it", "resume from another checkpoint", MODEL)


def load_universal(engine: Any, folder: Path, tag: str) -> None:  # noqa: ANN401 - DeepSpeed's
    """Loads masters and optimizer state from a universal checkpoint; frozen parameters and buffers stay as they are.

    Raises:
        UserError: (MODEL) DeepSpeed cannot load it.
    """
    engine._config.load_universal_checkpoint = True  # asked for at each load, and only there
    load_engine(engine, folder, tag)
    engine._config.load_universal_checkpoint = False
    # ZeRO-3 gives all its groups one and the same step counter, which each of them would then advance.
    for parameter, state in engine.optimizer.optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            fused = any(group.get("fused") for group in engine.optimizer.optimizer.param_groups)
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)


def load_frozen(
    source: Path, tensors: Mapping[str, Tensor], writing: Callable[[Tensor], AbstractContextManager[bool]]
) -> None:
    """Puts frozen parameters and buffers of a ZeRO checkpoint back.

    Args:
        source: the folder of its tag.
        tensors: parameters and buffers in training, by name; the trained ones are left alone.
        writing: makes a tensor whole, and says whether this process is to write it.

    Raises:
        UserError: (MODEL) a file is missing, damaged or of another save.
    """
    stored = read_zero(source).tensors
    with Blocks() as blocks, torch.no_grad():
        for entry, tensor in ((entry, tensors[entry.name]) for entry in stored if entry.name in tensors):
            if not tensor.requires_grad:
                with writing(tensor) as mine:
                    if mine:
                        tensor.copy_(_whole(blocks.of(entry), entry))


def _whole(blocks: Iterable[Tensor], entry: LazyTensor) -> Tensor:
    parts = [block.clone() for block in blocks]
    return (torch.cat(parts) if parts else torch.empty(0, dtype=entry.dtype)).view(entry.shape)


if __name__ == "__main__":
    main()
