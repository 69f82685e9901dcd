"""Prints what this machine has, what of it will not work, and how to fix it.

    python -m videox.doctor        # or: make doctor

The report contains no secrets and can be pasted into an issue: versions, devices, limits, disk, the variables that
change a run, accelerate's default configuration and the state of DeepSpeed's extensions. Exit code 1 if something
blocks a run on this machine, else 0.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from videox import __version__
from videox.doctor.findings import BLOCKS, Finding, report

WINDOWS = "error: platform: native Windows is not supported. Fix: run it in WSL2, see README.md, Windows."


def diagnose() -> dict[str, list[Finding]]:
    """Return the findings of this machine by section."""
    # here, because on native Windows the modules for limits do not exist
    from videox.doctor import machine, software

    names = [
        name for name in ("torch", "packages", "deepspeed") if name == "packages" or importlib.util.find_spec(name)
    ]
    probes = software.Probes(names, os.environ)
    host, places = machine.this_host(), machine.folders(os.environ)
    sections = {
        "system": machine.system(host) + machine.wsl(host, places),
        "limits": machine.limits(host),
        "disk": machine.disk(places),
        "variables": software.variables(os.environ),
        "accelerate": software.accelerate(os.environ),
    }
    torch = probes.answer("torch") if "torch" in names else ({}, "")
    sections["torch and GPUs"] = software.torch_and_gpus(*torch, os.environ)
    sections["packages"] = software.packages(*probes.answer("packages"))
    if "deepspeed" in names:
        sections["DeepSpeed"] = software.deepspeed(*probes.answer("deepspeed"))
    return sections


def main() -> int:
    """Print the report; return the exit code."""
    if sys.argv[1:]:  # it has no flags
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    if sys.platform == "win32":
        print(WINDOWS)
        return 1
    sections = diagnose()
    print(f"videox {__version__} doctor")
    print("\n".join(report(sections)))
    return int(any(finding.level == BLOCKS for findings in sections.values() for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
