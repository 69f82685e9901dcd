"""Configurations of published models, shipped with the code, so that a dry run needs no model folder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videox.errors import MODEL, UserError
from videox.models.config_files import read_json
from videox.models.configured import Component

ROOT = Path(__file__).resolve().parents[2] / "config" / "models"
FLAG = "--dry_run_model"


def published_models(family: str) -> list[str]:
    """Return the names of a family's published models; family: the beginning of the names, such as "wan2.1"."""
    return sorted(path.stem for path in ROOT.glob(f"{family}-*.json"))


def dry_run_components(name: str, family: str) -> dict[str, Component]:
    """Return the components of a model for a dry run, by their configurations alone.

    Args:
        name: a published model, or a folder: each COMPONENT/config.json that it contains is used (a config.json of its
            own is the transformer's), and the configurations of the most similar published model stand in for the
            others.
        family: the beginning of the names of the family's published models.

    Raises:
        UserError: there is no such model and no such folder, or the folder has no transformer configuration.
    """
    names = published_models(family)
    if name in names:
        return _components(ROOT / f"{name}.json", _read_published(name))
    folder = Path(name)
    if not folder.is_dir():
        near = difflib.get_close_matches(name, names, 1, 0.3)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(FLAG, f"{name} is neither a folder nor a published model", f"{meant}use {', '.join(names)}")
    own = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/config.json"))}
    if "transformer" not in own:
        if not (folder / "config.json").is_file():
            hint = f"pass a folder with transformer/config.json or config.json, or one of {', '.join(names)}"
            raise UserError(FLAG, f"{folder} has no configuration of a transformer", hint, MODEL)
        own["transformer"] = read_json(folder / "config.json")
    nearest = min(names, key=lambda other: _differences(own["transformer"], _read_published(other)["transformer"]))
    return _components(folder, {**_read_published(nearest), **own})


def _read_published(name: str) -> dict[str, Any]:
    components = read_json(ROOT / f"{name}.json")["components"]
    return dict(components)


def _components(path: Path, configs: Mapping[str, Any]) -> dict[str, Component]:
    return {name: Component(path, config) for name, config in configs.items()}


def _differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(config.get(key, value) != value for key, value in other.items())
