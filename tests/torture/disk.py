"""Area disk: a kill or an error at each file call of a run, a file system that is full, and one without inodes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forkserver

from tests.torture import faults
from tests.torture.cases import Area, Outcome, Row, Unavailable
from tests.torture.faults import ENTRY_POINT, Fault
from tests.torture.ground import problems_of_refusal, shared
from videox.run.checkpoint import find_checkpoints

# What a fault meets: a whole run (index, saves, prunes, export), a resumed one (load, rewind), one that fills a cache.
SCENES = ("run", "resume", "cached")
KINDS = {
    "kill": Fault(faults.KILL),
    "ENOSPC": Fault(errno.ENOSPC),
    "EIO": Fault(errno.EIO),
    "full": Fault(errno.ENOSPC, lasting=True),
}
STEP = 64 << 10  # bytes between two sizes of the file system
LARGE = 256 << 20


class Disk(Area):
    """Faults of the disk: no checkpoint is lost, and the same command resumes to the same end."""

    rows = (
        Row("kill", "SIGKILL at the n-th file-changing call of a run, a resume or a run with a cache, resumed bit-identically", 500),
        Row("ENOSPC", "ENOSPC at the n-th of these calls: the run goes on or ends with 5 and one line; resumed bit-identically", 500),
        Row("EIO", "EIO at the n-th of these calls: the same", 500),
        Row("full", "ENOSPC from the n-th of these calls on: the same", 500),
        Row("tmpfs", "a file system with room for a part of the run, in steps of 64 KiB: the same", 100),
        Row("inodes", "a file system with inodes for a part of the run: the same", 100),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        row = self.rows[seed % len(self.rows)].name
        if row in ("tmpfs", "inodes"):
            return self._without_room(row, seed, draw)
        scene = SCENES[seed // len(self.rows) % len(SCENES)]
        changes: dict[str, object] = {"cached": True} if scene == "cached" else {}
        self.ground.reference(**changes)
        if scene not in self.ground.calls:
            self.ground.calls[scene] = self._count_calls(scene)
        total = self.ground.calls[scene]
        # The cases of a row and scene go through all calls, in an order that is shuffled once.
        order = random.Random(f"{row} {scene}").sample(range(1, total + 1), total)
        at = order[seed // len(self.rows) // len(SCENES) % total]
        place = self._prepared(scene, f"disk-{seed}")
        run, _, hit = self._run_with(place, scene, Fault(KINDS[row].kind, at, KINDS[row].lasting))
        problems = [] if row == "kill" else problems_of_refusal(run)
        if row == "kill" and run.code != -9:
            problems.append(f"it was not killed, but ended with {run.code}: {run.output()[-1000:]}")
        broken = draw if self.broken and find_checkpoints(place / "run") else None
        problems += self.ground.problems_after_resume(place, broken, **changes)
        shutil.rmtree(place)
        return Outcome(row, f"{scene}: call {at} of {total} {hit}".strip(), problems=problems)

    def _prepared(self, scene: str, name: str) -> Path:
        """Return the folder of a case, with a run that has stopped after its first save if it is to be resumed."""
        place = self.ground.new_place(name)
        if scene != "resume":
            return place
        begun = self.folder / "begun"
        if not begun.exists():
            source = self.ground.new_place("begun-place")
            run = self.ground.start(source, checkpointing_steps=1)
            run.wait_until(lambda: find_checkpoints(source / "run"))
            run.kill()
            run.wait()
            for later in find_checkpoints(source / "run")[1:]:
                shutil.rmtree(later)
            source.rename(begun)
            place = self.ground.new_place(name)
        shutil.copytree(begun / "run", place / "run")
        return place

    def _run_with(self, place: Path, scene: str, fault: Fault) -> tuple[forkserver.TrainerProcess, int, str]:
        """Run a scene with a fault; return the ended trainer, the number of calls and the one that failed.

        After a kill the last two are 0 and "".
        """
        changes: dict[str, object] = {"cached": True} if scene == "cached" else {}
        changes |= {"resume_from_checkpoint": "latest"} if scene == "resume" else {}
        report = place.with_name(f"{place.name}.report")
        run = self.ground.start(
            place, ENTRY_POINT, fault.environment(self.ground.folder, report, self.ground.preloaded), **changes
        )
        run.wait()
        calls, _, hit = report.read_text(encoding="utf-8").partition(" ") if report.exists() else ("0", "", "")
        report.unlink(missing_ok=True)
        return run, int(calls), hit

    def _count_calls(self, scene: str) -> int:
        """Return how many calls of a scene change a file."""
        place = self._prepared(scene, f"count-{scene}")
        run, calls, _ = self._run_with(place, scene, Fault())
        assert run.code == 0 and calls, run.output()[-4000:]
        shutil.rmtree(place)
        return calls

    def _without_room(self, row: str, seed: int, draw: random.Random) -> Outcome:
        reference = self.ground.reference()[0]
        files = [path for path in reference.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        place = self.ground.new_place(f"disk-{seed}")
        if row == "tmpfs":
            limit = f"size={draw.randrange(STEP, size, STEP)}"
        else:
            limit = f"nr_inodes={draw.randrange(3, 2 * len(files))},size={LARGE}"
        with small_file_system(place / "disk", limit):
            output_dir = place / "disk" / "run"
            run = self.ground.start(place, output_dir=output_dir)
            run.wait()
            problems = problems_of_refusal(run)
            _mount(place / "disk", f"remount,size={LARGE},nr_inodes=0")
            broken = draw if self.broken and find_checkpoints(output_dir) else None
            problems += self.ground.problems_after_resume(place, broken, output_dir)
        shutil.rmtree(place)
        return Outcome(row, f"{limit}: ended with {run.code}", problems=problems)


@contextlib.contextmanager
def small_file_system(folder: Path, limit: str) -> Iterator[None]:
    """Mount a tmpfs with these options while the block runs.

    Raises:
        Unavailable: this user may not mount one.
    """
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise Unavailable("a user who may mount a tmpfs", "a full file system")
    try:
        _mount(folder, limit)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"a tmpfs ({error.stderr.strip()})", "a full file system") from error
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
