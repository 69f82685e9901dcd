"""The compiled file_faults.c: builds it, and trains in a process in which a file call kills or fails."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import forkserver
import runs

from tests.torture.cases import Unavailable

SOURCE = Path(__file__).with_name("file_faults.c")
ENTRY_POINT = "tests.torture.faults:train"
KILL = -1
COUNT = 0
NAMES = {KILL: "SIGKILL", errno.ENOSPC: "ENOSPC", errno.EIO: "EIO", errno.EDQUOT: "EDQUOT", errno.EROFS: "EROFS"}


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call that changes a file.

    Attributes:
        kind: KILL, COUNT (nothing happens) or an errno.
        at: number of the call, from 1.
        lasting: all later calls fail, too.
    """

    kind: int = COUNT
    at: int = 0
    lasting: bool = False

    def environment(self, folder: Path, report: Path, library: Path) -> dict[str, str]:
        """Return the variables that `train` reads.

        Args:
            folder: calls for files below it count.
            report: file that gets the number of calls and the name of the one that failed.
            library: the compiled file_faults.c.
        """
        values = {"KIND": self.kind, "AT": self.at, "LASTING": int(self.lasting)}
        values |= {"FOLDER": folder, "REPORT": report, "LIBRARY": library}
        return {f"FAULT_{name}": str(value) for name, value in values.items()}


def compile_library(folder: Path) -> Path:
    """Compile file_faults.c into the folder and return the library.

    Raises:
        Unavailable: there is no compiler.
    """
    compiler, library = os.environ.get("CC", "cc"), folder / "file_faults.so"
    if shutil.which(compiler) is None:
        raise Unavailable("a C compiler", "a fault at every file call")
    command = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def server_with(library: Path, script: str = forkserver.SCRIPT) -> forkserver.ForkServer:
    """Return a fork server of a train script whose trainers have the library loaded; it does nothing until armed."""
    return forkserver.ForkServer(LD_PRELOAD=str(library), **{forkserver.SCRIPT_VARIABLE: script})


def train() -> int:
    """Train with the fault that the environment describes; entry point of a forked trainer."""
    settings = {name.removeprefix("FAULT_"): value for name, value in os.environ.items() if name.startswith("FAULT_")}
    library = ctypes.CDLL(settings["LIBRARY"])
    library.faults_hit.restype, library.faults_disarm.restype = ctypes.c_char_p, ctypes.c_long
    library.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    numbers = (int(settings[name]) for name in ("AT", "KIND", "LASTING"))
    library.faults_arm(os.fsencode(settings["FOLDER"]), *numbers)
    try:
        return runs.train_script().main()
    finally:
        calls = library.faults_disarm()
        Path(settings["REPORT"]).write_text(f"{calls} {library.faults_hit().decode()}", encoding="utf-8")
