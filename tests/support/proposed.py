"""Proposals of a dry run as a user applies them: flags added to a command, and a launch command for the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILLED_CACHE = "--latent_cache DIR, filled before"
_CONFIG_FILE = re.compile(r"accelerate launch --config_file config/accelerate/(\w+)\.yaml --num_processes (\d+)")
_OFFLOAD = re.compile(r"accelerate launch --use_deepspeed --deepspeed_config_file (\S+) --num_processes (\d+)")
_LINE = re.compile(r"^ {6}(\S.*?) +([\d.]+) GiB  \S")


@contextlib.contextmanager
def deepspeed_file(path: str) -> Iterator[None]:
    """Set the variable of a DeepSpeed file, relative to the repository, as the launcher does; "" sets none."""
    name = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    before = os.environ.pop(name, None)
    if path:
        os.environ[name] = str(ROOT / path)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def launched(flags: str) -> tuple[list[str], dict[str, str]]:
    """Return a change's flags as words of a dry run, and the variables that its launch command sets."""
    if found := _OFFLOAD.match(flags):
        stage = json.loads((ROOT / found[1]).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        words = ["--dry_run_backend", f"zero{stage}", "--dry_run_processes", found[2]]
        variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / found[1])}
    elif found := _CONFIG_FILE.match(flags):
        words, variables = ["--dry_run_backend", found[1], "--dry_run_processes", found[2]], {}
        assert (ROOT / "config" / "accelerate" / f"{found[1]}.yaml").is_file()
    else:
        return flags.split(), {}
    return [*words, *flags[found.end() :].split()], variables


def printed_proposals(stdout: str) -> list[tuple[bool, list[str], float]]:
    """Return the printed proposals: whether the run then fits, the flags of each change, and GiB after the last."""
    found: list[tuple[bool, list[str], float]] = []
    for line in stdout.splitlines():
        if line.strip().startswith(("to make it fit, the cheapest changes first", "or, with more GPUs")):
            found.append((True, [], 0.0))
        elif "none of the changes that were tried makes it fit" in line:
            found.append((False, [], 0.0))
        elif "a --latent_cache that was filled before" in line:
            found.append((True, [FILLED_CACHE], 0.0))
        elif found and (change := _LINE.match(line)):
            fits, flags, _ = found[-1]
            found[-1] = (fits, [*flags, change[1]], float(change[2]))
    return found


def output_flags(folder: Path) -> list[str]:
    """Return the flags of a dry run on described data, with its files in a folder."""
    data = ["--dry_run", "--dry_run_data", "200x5s@24fps:1280x720"]
    return [*data, "--output_dir", str(folder), "--seed", "42"]
