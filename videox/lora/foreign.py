"""Names what a LoRA file holds that cannot be read here, and how to convert it: LoKr, LoHa, other models, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from videox.lora.names import HALF

EXTRACT = "scripts/export.py MERGED lora.safetensors --layout diffusers --extract_lora RANK BASE"
MERGE = (
    f"merge it into its base model with the program that trained it, then extract a LoRA from the result: {EXTRACT}"
)
UNQUANTIZE = "multiply its tensors by their scales and save them as bfloat16 or float32"
REMOVE = "remove these tensors from the file, and pass the rest"
# What it is, a pattern of its tensor names, and the way to convert it; the first that matches is reported.
KINDS = (
    ("a LoKr (Kronecker product)", r"[._]lokr_", MERGE),
    ("a LoHa (Hadamard product)", r"[._]hada_", MERGE),
    ("a GLoRA", r"\.[ab][12]\.weight$", MERGE),
    ("an OFT or BOFT adapter", r"[._]b?oft_|[._]oft_R", MERGE),
    ("an IA3 adapter", r"\.on_input$|ia3_l", MERGE),
    ("a DoRA, which has a magnitude for each output", r"dora_scale$|lora_magnitude_vector|\.dora_layer\.", MERGE),
    ("a LoCon with a Tucker decomposition", r"[._]lora_mid\.", MERGE),
    ("a rank-stabilized LoRA of a musubi-tuner fork", r"\.use_rslora_flag$", MERGE),
    ("a LoRA with differences of whole tensors (diff)", r"\.diff(_b|_m)?$|\.[wb]_norm$", MERGE),
    ("a LoRA with whole tensors that replace the model's", r"\.(set|reshape)_weight$", MERGE),
    ("a LoRA with quantized values", r"\.\w+_scale(_\d)?$|\.(absmax|zero_point)$|\.quant_(map|state)", UNQUANTIZE),
    ("a LoRA with trained biases", r"lora_B(\.[^.]+)?\.bias$", MERGE),
    ("a LoRA of the text encoder", r"^lora_te\d?_|^text_encoder", f"the text encoders are not trained: {REMOVE}"),
    (
        "a LoRA of Wan2.2's second expert",
        r"^transformer_2\.",
        "pass the LoRA of one expert, with the names of one transformer",
    ),
    ("a LoRA of Wan VACE's own blocks", r"vace_(blocks|patch|layers)", f"VACE is not trained: {REMOVE}"),
    ("a LoRA of HunyuanVideo-1.5", r"img_attn_[qkv][._](?!norm)", "pass a LoRA of the model that is trained"),
    ("a LoRA of Stable Diffusion", r"(down|up|input|output)_blocks|mid_block", "pass a LoRA of the model that is trained"),
)  # fmt: skip
# Adapters that have none of a LoRA's tensors.
OTHER_ADAPTERS = re.compile("|".join(pattern for _, pattern, _ in KINDS[:2]) + r"|[._]b?oft_|[._]oft_R")
# Names of other models in the header of a LoRA. FLUX.1 and HunyuanVideo have modules of the same names and widths.
OTHER_MODELS = {
    "FLUX": r"flux", "Stable Diffusion": r"stable-diffusion|sdxl|sd_|sd3", "Qwen-Image": r"qwen", "Z-Image": r"z.?image",
    "HunyuanVideo-1.5": r"hunyuan.?video.?1.?5", "Hunyuan-Image": r"hunyuan.?image", "LTX-Video": r"ltx",
    "Chroma": r"chroma", "Kandinsky": r"kandinsky", "CogVideoX": r"cogvideo", "HiDream": r"hidream",
}  # fmt: skip
ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version")


def foreign_model(header: Mapping[str, str]) -> str | None:
    """Return the model that a file's header names if it is none of this trainer, as text for a message; else None."""
    for key in ARCHITECTURE_KEYS:
        named = header.get(key, "")
        for model, pattern in OTHER_MODELS.items():
            if re.search(pattern, named, re.IGNORECASE):
                return f"a LoRA of {model}: its header has {key} = {named}"
    return None


def explain_unread(unread: Iterable[str], family: str, *, has_adapters: bool) -> tuple[str, str]:
    """Return what a file is, by the names of its tensors that cannot be read, and how to convert it.

    Args:
        unread: the names that stand for no adapter of the family.
        family: "wan" | "hunyuan".
        has_adapters: the file also has adapters that can be read.
    """
    names = sorted(unread)
    for what, pattern, hint in KINDS:
        if found := [name for name in names if re.search(pattern, name)]:
            return f"is {what}: {_count(found)}", hint
    model = {"wan": "Wan", "hunyuan": "HunyuanVideo"}[family]
    if half := [name for name in names if HALF.fullmatch(name)]:
        return f"adapts layers that {model} does not have: {_count(half)}", "pass a LoRA of the model that is trained"
    if not has_adapters:
        return "contains no LoRA", "pass a LoRA; --transformer_path accepts the weights of a complete model"
    return f"has tensors that belong to no LoRA: {_count(names)}", REMOVE


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, first {names[0]}"
