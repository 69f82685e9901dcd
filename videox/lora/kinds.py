"""The kinds of adapters that --lora_type selects; imports no torch, so that flags are parsed at once."""

from __future__ import annotations

from videox.errors import UserError

LORA_TYPES = ("lora", "dora")
OTHER_TYPES = {  # of LyCORIS and peft
    "lokr": "LoKr", "loha": "LoHa", "locon": "LoCon", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT", "ia3": "IA3",
    "lycoris": "LyCORIS",
}  # fmt: skip


def lora_type(text: str) -> str:
    """Return the value of --lora_type, a type for argparse. Raises UserError, by name for adapters of other tools."""
    if text in LORA_TYPES:
        return text
    other = OTHER_TYPES.get(text.lower())
    what = f"{other} adapters are not trained here" if other else f"{text!r} is not known"
    raise UserError("--lora_type", what, f"use {' or '.join(LORA_TYPES)}")
