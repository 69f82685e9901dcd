"""Serves whoever passes trained weights on: what their files and their checkpoint say of how they were trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from videox import __version__

MODEL_CONFIG = "transformer_config"  # in the header of a file that no config.json goes with, as JSON
OF_THE_FILE = ("format", "layout", "dtype", "architecture", "lora", "lora_adapter_metadata", MODEL_CONFIG)
TRAINER = "videox "


def name_of(model: str) -> str:
    """Returns what a file says of the model that was trained: of a folder here its own name alone, else its id."""
    if not Path(model).exists():
        return model
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "transformer" else folder.name


def describe(base_model: str | None, facts: Mapping[str, object], *, title: str | None = None) -> dict[str, str]:
    """Returns what a file of trained weights says of itself in its header.

    Args:
        base_model: that was trained, as the user named it; of a folder here the last name alone is told; None if
            nobody knows.
        facts: task, steps, sizes and the like; None is left out.
        title: in place of one made of the base model's name.
    """
    base = {} if base_model is None else {"base_model": name_of(base_model)}
    said = {name: str(value) for name, value in sorted(facts.items()) if value is not None}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title or f"{base.get('base_model', 'a model')} fine-tuned",
        "modelspec.prediction_type": "flow",
        "trainer": f"{TRAINER}{__version__}",
        **base,
        **said,
    }


def header_of(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file, or of the first one in a folder; nothing where it has none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".safetensors":
        return {}
    try:
        with safe_open(files[0], framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}  # whoever reads its tensors says what is wrong


def stored_config(path: Path) -> dict[str, Any]:
    """Returns the configuration that a single file's header has for its model; nothing where it has none."""
    return json_object(header_of(path).get(MODEL_CONFIG, "{}")) if path.is_file() else {}


def json_object(text: str) -> dict[str, Any]:
    """Returns a JSON object, an empty one where there is something else: what it would have told is not known."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
