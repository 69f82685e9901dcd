"""Findings of the doctor: one line each, with what to do about it, and without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from videox.errors import UserError

OK, NOTE, BLOCKS = "ok", "note", "BLOCKS"
GIB = 2**30
# Variables that change how a run starts or computes; the values of all others are nobody's business.
SHOWN_PREFIXES = (
    "NCCL_", "TORCH_", "PYTORCH_", "GLOO_", "CUDA_", "ACCELERATE_", "FSDP_", "DS_", "DEEPSPEED_", "OMP_", "HF_", "VIDEOX_",
    "OMPI_COMM_WORLD_", "PMI_", "SLURM_NTASKS", "SLURM_PROCID", "TORCHELASTIC_", "TOKENIZERS_", "XDG_CACHE_HOME",
)  # fmt: skip
SHOWN_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LD_LIBRARY_PATH",
    "PYTHONPATH", "CC", "CXX", "TMPDIR",
)  # fmt: skip
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
VALUE_LENGTH = 200  # characters of a value that are shown


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        name: what it is about, a word or two.
        text: the fact, with its value.
        level: OK, NOTE (works, but not as well, or not everything), BLOCKS (a run on this machine fails).
        fix: what to do, as an imperative; "" if nothing is to be done.
    """

    name: str
    text: str
    level: str = OK
    fix: str = ""


def from_error(name: str, error: UserError, level: str = BLOCKS) -> Finding:
    """Return the finding for an error that the start of a run would end with."""
    return Finding(name, f"{error.where}: {error.what}", level, error.hint)


def mask(text: str, home: str | None = None) -> str:
    """Return a text without the user's home folder and without passwords in addresses; control characters escaped."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    folder = home or str(Path.home())
    if len(folder) > 1:
        text = re.sub(rf"{re.escape(folder)}(?=/|$|[\s:,'\"`])", "~", text)
    return "".join(c if c.isprintable() else " " for c in text)


def shown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are shown, with their values; "(set)" for those whose name says it is a secret."""
    found = {}
    for name, value in sorted(environment.items()):
        if name.startswith(SHOWN_PREFIXES) or name in SHOWN_NAMES:
            found[name] = "(set)" if SECRET.search(name) else mask(value)[:VALUE_LENGTH]
    return found


def gib(size: float) -> str:
    """Return a size in GiB as text; below 1 GiB in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def report(sections: Mapping[str, Sequence[Finding]]) -> list[str]:
    """Return the lines of the report: the facts by section, then what does not work, with the fix."""
    lines: list[str] = []
    found = [finding for findings in sections.values() for finding in findings]
    width = max((len(finding.name) for finding in found), default=0)
    for title, findings in sections.items():
        lines += ["", title]
        lines += [f"  {finding.level:<6}  {finding.name:<{width}}  {finding.text}" for finding in findings]
    blocking, notes = ([finding for finding in found if finding.level == level] for level in (BLOCKS, NOTE))
    for title, chosen in (("what blocks a run", blocking), ("what to know", notes)):
        with_fix = [finding for finding in chosen if finding.fix]
        if with_fix:
            lines += ["", title]
            lines += [f"  {finding.name}: {finding.text}. Fix: {finding.fix}." for finding in with_fix]
    lines += ["", f"{len(blocking)} blocking, {len(notes)} to know"]
    return [mask(line) for line in lines]
