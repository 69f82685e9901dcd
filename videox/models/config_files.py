"""Reads the configuration files of models, JSON and yaml; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videox.errors import MODEL, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHIFT_HINT = "set scheduler_kwargs.shift in it, 5.0 for Wan2.1"
SHIPPED_YAML = str(Path(__file__).resolve().parents[2] / "config" / "wan2.1" / "wan_civitai.yaml")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = f"cannot be read as JSON ({error})"
        raise UserError(str(path), what, download_again(path.parent), MODEL) from error
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object", download_again(path.parent), MODEL)
    return content


def download_again(folder: Path) -> str:
    """Return the hint to download the files of a folder again, with the command for the model."""
    from videox.models.downloads import download_command  # imported for this message alone, because it loads torch

    return f"delete the file and download it again with `{download_command(folder)}`"


def read_yaml(config_path: str) -> DictConfig:
    """Return the content of --config_path; raises UserError.

    Interpolations are rejected, since they could read environment variables.
    """
    from omegaconf import DictConfig, OmegaConf  # imported where a yaml is read, because it loads slowly

    try:
        text = Path(config_path).read_text(encoding="utf-8")
        if "${" in text:
            raise UserError("--config_path", f"{config_path} contains an interpolation", "write the values out")
        content = OmegaConf.create(text)
    except _bad_yaml() as error:
        raise UserError("--config_path", f"{config_path}: {' '.join(str(error).split())}", SHIFT_HINT) from error
    if not isinstance(content, DictConfig):
        raise UserError("--config_path", f"{config_path} is not a mapping of names to values", SHIFT_HINT)
    return content


def read_shift(config_path: str) -> float:
    """Return the flow shift from the yaml of --config_path. Raises UserError."""
    content = read_yaml(config_path)
    try:
        shift = float(content.scheduler_kwargs.shift)
    except _bad_yaml() as error:
        raise UserError("--config_path", f"{config_path}: {' '.join(str(error).split())}", SHIFT_HINT) from error
    if not 0 < shift < 1000:
        raise UserError("--config_path", f"scheduler_kwargs.shift is {shift}", "use a value above 0, 5.0 for Wan2.1")
    return shift


def _bad_yaml() -> tuple[type[Exception], ...]:
    """Return what OmegaConf raises for a bad yaml: its own errors, those of the yaml parser, and Python's.

    An AssertionError is that of a document that is a bare number.
    """
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    python = (OSError, ValueError, AttributeError, TypeError, RecursionError, AssertionError)
    return (*python, YAMLError, OmegaConfBaseException)
