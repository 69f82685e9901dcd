"""Facts about trained weights, from a checkpoint's records and files' headers, for the headers of exported files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videox.lora.header import DATE
from videox.lora.reader import SETTINGS, lora_file
from videox.run.checkpoint import MANIFEST
from videox.weights.format import EXPORT_DTYPES
from videox.weights.header import FILE_FIELDS, TRAINER_PREFIX, model_metadata, parse_json_object, read_metadata

OTHER_PREFIXES = ("modelspec.", "ss_")  # of fields that are derived from the facts again


def training_facts(source: Path) -> dict[str, str]:
    """Collect how weights were trained: base_model, task, rank, alpha, steps, seed, sizes, shift, trainer.

    Args:
        source: a file, a transformer folder, or a checkpoint. The records of a checkpoint take precedence over the
            headers of the files in it.
    """
    header = read_metadata(source)
    from_header = {}
    if header.get("trainer", "").startswith(TRAINER_PREFIX):
        own = {key: value for key, value in header.items() if not key.startswith(OTHER_PREFIXES)}
        from_header = {key: value for key, value in own.items() if key not in FILE_FIELDS}
    adapters = parse_json_object(header.get(SETTINGS, "{}"))
    facts = {"rank": adapters.get("transformer.r"), "alpha": adapters.get("transformer.lora_alpha")}
    if (checkpoint := find_checkpoint(source)) is not None:
        manifest, state, lora = (
            read_json_or_empty(checkpoint / name) for name in (MANIFEST, "trainer_state.json", "lora.json")
        )
        facts |= manifest.get("description") or {}
        facts |= {"steps": manifest.get("step"), "seed": state.get("seed")}
        if lora:
            facts |= {"rank": lora.get("rank"), "alpha": lora.get("alpha")}
        if version := (manifest.get("versions") or {}).get("videox"):
            facts["trainer"] = f"{TRAINER_PREFIX}{version}"
    return {**from_header, **{name: str(value) for name, value in facts.items() if value is not None}}


def find_checkpoint(source: Path) -> Path | None:
    """Return the checkpoint that weights are in, None if they are in none."""
    folders = (source, *source.resolve().parents[:2])
    return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def weights_date(source: Path) -> str | None:
    """Return when weights were made: the date in their file's header, or that of their checkpoint; None if unknown."""
    if date := read_metadata(source).get(DATE):
        return date
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return None
    return datetime.fromtimestamp((checkpoint / MANIFEST).stat().st_mtime, UTC).date().isoformat()


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if there is none."""
    return parse_json_object(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}


def make_metadata(source: Path, facts: Mapping[str, str | None], base: str | None = None) -> dict[str, str]:
    """Build the header metadata of an output file.

    Args:
        source: the weights; their training facts are copied.
        facts: fields that describe the output file itself.
        base: base model that a LoRA is merged into or was extracted with, as the user named it.
    """
    known = training_facts(source)
    base_model = base or known.pop("base_model", None)
    # Weights that were not trained with this trainer have no known base model: their file name is the title.
    title = None if base_model else f"{source.parent.name if lora_file(source) else source.stem}"
    return model_metadata(base_model, {**known, **facts}, title=title)


def dtype_name(tensors: Iterable[Tensor]) -> str:
    """Return the --dtype name of the dtype that most elements have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.numel()
    common = sizes.most_common(1)[0][0]
    return next((name for name, dtype in EXPORT_DTYPES.items() if dtype == common), str(common))
