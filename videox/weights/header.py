"""Metadata in the headers of safetensors files: which base model was trained, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from videox import __version__
from videox.weights.expert_names import EXPERTS

MODEL_CONFIG = "transformer_config"  # header key with the model's config as JSON, in files that have no config.json
# Keys that describe the file itself and not the training; an export sets them again.
FILE_FIELDS = ("format", "layout", "dtype", "architecture", "lora", "lora_adapter_metadata", MODEL_CONFIG)
TRAINER_PREFIX = "videox "
TIMESTEPS = 1000


def base_model_name(model: str) -> str:
    """Return the name of a base model for a header: the folder's own name for a local folder, else the Hub id.

    The path of a local folder is left out, since it means nothing on another machine.
    """
    if not Path(model).exists():
        return model
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "transformer" else folder.name


def model_metadata(base_model: str | None, facts: Mapping[str, object], *, title: str | None = None) -> dict[str, str]:
    """Build the header metadata of a file of trained weights.

    Args:
        base_model: the model that was trained, as the user named it; of a local folder only its own name is written;
            None if unknown.
        facts: further fields such as task, steps and sizes; a value of None is left out.
        title: model title; None derives it from the base model's name.
    """
    base = {} if base_model is None else {"base_model": base_model_name(base_model)}
    fields = {name: str(value) for name, value in sorted(facts.items()) if value is not None}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title or f"{base.get('base_model', 'a model')} fine-tuned",
        "modelspec.prediction_type": "flow",
        "trainer": f"{TRAINER_PREFIX}{__version__}",
        **timestep_range(fields),
        **base,
        **fields,
    }


def timestep_range(facts: Mapping[str, str]) -> dict[str, str]:
    """Return ModelSpec's field of a model for a part of the timesteps, 0 to 1000: an expert of Wan2.2; else {}.

    modelspec.architecture is that of Wan2.1, as musubi-tuner writes it for both: programs choose by it how they load.

    Args:
        facts: expert and boundary, as in the header of an export.
    """
    expert, boundary = facts.get("expert"), facts.get("boundary")
    if expert not in EXPERTS or boundary is None:
        return {}
    edge = round(TIMESTEPS * float(boundary))
    return {"modelspec.timestep_range": f"{edge},{TIMESTEPS}" if expert == "high_noise" else f"0,{edge}"}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the header metadata of a safetensors file, or of the first one in a folder; empty if there is none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix not in (".safetensors", ".sft"):
        return {}
    try:
        with safe_open(files[0], framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}  # reading its tensors, which follows, reports what is wrong


def header_config(path: Path) -> dict[str, Any]:
    """Read the model configuration in a single file's header; empty if there is none."""
    return parse_json_object(read_metadata(path).get(MODEL_CONFIG, "{}")) if path.is_file() else {}


def parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; empty if the text is anything else, so that the fields in it count as unknown."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
