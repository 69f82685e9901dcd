"""Refuses a run whose processes were started differently: other flags, code, versions, data or models."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from videox.errors import UserError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "deepspeed", "peft", "safetensors", "numpy")
_SHOWN = 3  # differences that the error names


def code_facts() -> dict[str, object]:
    """Return what a process runs: a hash of the modules of videox, and the versions of Python and the packages."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    facts: dict[str, object] = {"the code of videox": digest.hexdigest()[:12], "Python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def refuse_differences(facts: Mapping[str, object], hint: str, gather: Callable[[object], list[Any]]) -> None:
    """Compare the facts of all processes; called on each.

    Args:
        facts: values that must be equal, by the flag or thing that has them; they can be pickled and compared.
        hint: how to fix a difference, as an imperative.
        gather: collective that returns every rank's value, in rank order.

    Raises:
        UserError: on every rank, with up to three of the facts that differ, each with the first process that has
            another value than process 0, and both values.
    """
    gathered: list[tuple[str, dict[str, object]]] = gather((socket.gethostname(), dict(facts)))
    (_, first), several_hosts = gathered[0], len({host for host, _ in gathered}) > 1
    places = [f"process {rank}{f' on {host}' * several_hosts}" for rank, (host, _) in enumerate(gathered)]
    found: dict[str, str] = {}
    for place, (_, other) in zip(places[1:], gathered[1:], strict=True):
        for name in (*first, *(name for name in other if name not in first)):
            if name not in found and other.get(name) != first.get(name):
                found[name] = f"{_shown(first.get(name))} in {places[0]}, {_shown(other.get(name))} in {place}"
    if not found:
        return
    names = list(found)
    more = f"; {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    others = "".join(f"; {name}: {found[name]}" for name in names[1:_SHOWN])
    raise UserError(names[0], f"{found[names[0]]}{others}{more}", hint)


def _shown(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
