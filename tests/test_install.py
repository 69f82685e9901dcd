"""Tests of the installation: the pins hold on every system, and the image is made from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
# What the markers of requirements.txt see. torch has no wheels for other systems.
SYSTEMS = {
    "Linux, x86-64": {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"},
    "Linux, ARM": {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "aarch64", "os_name": "posix"},
    "Windows": {"platform_system": "Windows", "sys_platform": "win32", "platform_machine": "AMD64", "os_name": "nt"},
    "macOS, Apple": {"platform_system": "Darwin", "sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"},
}  # fmt: skip
PYTHONS = ("3.11", "3.12", "3.13")
# Packages that are left out where their makers publish no wheel that works.
LEFT_OUT = {
    "Linux, x86-64": set(), "Linux, ARM": {"decord"}, "Windows": {"deepspeed"}, "macOS, Apple": {"deepspeed", "decord"},
}  # fmt: skip


def lines() -> list[str]:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-e"))]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_pins_hold_with_the_markers_of_every_system(system: str, python: str) -> None:
    pins = [Requirement(line) for line in lines()]
    environment = {**SYSTEMS[system], "python_version": python, "python_full_version": f"{python}.7"}
    chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    names = [pin.name for pin in chosen]
    assert len(set(names)) == len(names), "two versions of one package"
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in chosen)
    assert {pin.name for pin in pins} - set(names) == LEFT_OUT[system]


def test_the_image_is_made_from_the_pins() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (python,) = re.findall(r"^FROM python:([\d.]+)-", text, flags=re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert python in SpecifierSet(re.search(r'^requires-python = "(.+)"', project, flags=re.MULTILINE)[1])
    assert "-r requirements.txt" in text and "==" not in text  # no version of its own
    copied = [word for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE) for word in line.split()[:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".git", ".venv", "outputs"} <= set(ignored)
    assert not {"requirements.txt", "pyproject.toml", "videox", "README.md", "LICENSE"} & set(ignored)
