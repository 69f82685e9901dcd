"""Fields in the headers of LoRA files that model managers and other trainers read: modelspec.* and kohya's ss_*."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from videox.weights.header import read_metadata
from videox.weights.layout_writer import ARCHITECTURES

DATE, STEPS = "modelspec.date", "steps"
# musubi-tuner's names: of the network module that loads such a file, and of the model.
NETWORK_MODULES = {"wan": "networks.lora_wan", "hunyuan": "networks.lora"}
BASE_VERSIONS = {"wan": "wan", "hunyuan": "hunyuan_video"}
# Field of the header -> name of the fact in videox's own header.
FROM_FACTS = {
    "modelspec.resolution": "resolution", "modelspec.trigger_phrase": "trigger_word", "ss_steps": STEPS,
    "ss_learning_rate": "learning_rate", "ss_optimizer": "optimizer", "ss_discrete_flow_shift": "shift",
    "ss_output_name": "output_name",
}  # fmt: skip


def manager_fields(
    facts: Mapping[str, object], family: str, *, rank: int | None, alpha: float | None, date: str | None
) -> dict[str, str]:
    """Return the fields that other programs read; those of unknown facts are left out.

    The names are those of Stability AI's ModelSpec 1.0.0 and of kohya's trainers; the values of
    modelspec.architecture, ss_base_model_version and ss_network_module are those that musubi-tuner writes.

    Args:
        facts: what is known of the training, by the names of videox's own header, such as steps and learning_rate.
        family: "wan" | "hunyuan".
        rank: of all adapters; None if they differ.
        alpha: that fits the tensors in the file; None if they differ.
        date: when the weights were made, ISO 8601.
    """
    fields: dict[str, object] = {
        "modelspec.architecture": f"{ARCHITECTURES[family]}/lora",
        DATE: date,
        "ss_base_model_version": BASE_VERSIONS[family],
        "ss_network_module": NETWORK_MODULES[family],
        "ss_network_dim": rank,
        "ss_network_alpha": None if alpha is None else f"{alpha:g}",
        **{field: facts.get(fact) for field, fact in FROM_FACTS.items()},
    }
    return {name: str(value) for name, value in fields.items() if value not in (None, "")}


def export_date(target: Path, steps: str | None) -> str:
    """Return the date for a new file: today in UTC, or that of the file that it replaces if that is of the same step.

    An export that is repeated at the same step on another day is then the same file.
    """
    known = read_metadata(target) if target.is_file() else {}
    if steps is not None and known.get(STEPS) == steps and DATE in known:
        return known[DATE]
    return datetime.now(UTC).date().isoformat()
