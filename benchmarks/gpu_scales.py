"""Widths and sizes of the cases of gpu.py, published or small ones, and the functions that measure time and memory.

A case has a function that predicts its values and one that measures them on a device. The names of the columns contain
their units: ms, s, TFLOP (1e12 operations), GB (1e9 bytes), GiB.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from videox.estimate.peak_memory import peak_bytes
from videox.shapes import Bucket

GIB, TERA = 2**30, 1e12
TEXT, JOINT_TEXT = 512, 256  # tokens of a prompt: UMT5's with its padding; the Llama's
HALF = torch.bfloat16
Values = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """Widths and sizes of all cases.

    usual: size of the cases that are measured at one size only.
    layers: numbers of layers of the truncated transformers whose memory is measured.
    seconds: duration for which a measurement is repeated.
    budget: seconds that a case may take.
    """

    sizes: Mapping[str, Bucket]
    usual: str
    wan: Mapping[str, Mapping[str, Any]]
    hunyuan: Mapping[str, Any]
    wan_vae: Mapping[str, Any]
    hunyuan_vae: Mapping[str, Any]
    umt5: Mapping[str, Any]
    matrices: tuple[tuple[int, int, int], ...]
    copied: int
    seconds: float
    budget: float
    layers: tuple[int, int] = (2, 4)


WAN = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "guidance_embeds": True,
    "text_embed_dim": 4096, "pooled_projection_dim": 768, "rope_axes_dim": (16, 56, 56),
}  # fmt: skip
LARGEST = "Wan2.1 14B"
REAL = Scale(
    sizes={"49x512x512": Bucket(49, 512, 512), "81x480x832": Bucket(81, 480, 832), "81x720x1280": Bucket(81, 720, 1280)},
    usual="81x480x832",
    wan={
        "Wan2.1 1.3B": {**WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        LARGEST: {**WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    },
    hunyuan=HUNYUAN,
    wan_vae={},
    hunyuan_vae={},
    umt5={"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    matrices=((8192, 8192, 8192), (32760, 5120, 13824), (32760, 5120, 5120)),
    copied=4 * GIB,
    seconds=0.5,
    budget=30.0,
)  # fmt: skip
NARROW = {**WAN, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 64}
SMALL = Scale(
    sizes={"5x32x48": Bucket(5, 32, 48), "9x64x96": Bucket(9, 64, 96)},
    usual="9x64x96",
    wan={
        "Wan2.1 1.3B": {**NARROW, "num_attention_heads": 2, "ffn_dim": 160, "num_layers": 6},
        LARGEST: {**NARROW, "num_attention_heads": 4, "ffn_dim": 320, "num_layers": 8},
    },
    hunyuan={
        **HUNYUAN, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 4,
        "text_embed_dim": 64, "pooled_projection_dim": 32, "rope_axes_dim": (4, 14, 14),
    },
    wan_vae={"base_dim": 8},
    hunyuan_vae={"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1},
    umt5={"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4},
    matrices=((256, 256, 256),),
    copied=2**24,
    seconds=0.02,
    budget=120.0,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row. words: its first columns; budget: seconds that it may take; the functions return values by column."""

    section: str
    words: tuple[str, ...]
    budget: float
    predict: Callable[[], Values]
    measure: Callable[[torch.device], Values]


# ------------------------------------------------------------------------------------------------------- measuring


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median time of a call in seconds: 2 to 20 calls in about `seconds`, after one warm-up call."""
    taken: list[float] = []
    for _ in range(21):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - begun)
        if len(taken) > 2 and sum(taken) > seconds:
            break
    return statistics.median(taken[1:])


def peak_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the peak GiB of a call, without what was allocated before: from the allocator, on the CPU by tensor.

    On the CPU a tensor that existed before counts as soon as it is changed or viewed; therefore a call creates the
    weights that it trains.
    """
    if device.type != "cuda":

        def with_gradients() -> None:
            with torch.enable_grad():
                run()

        return peak_bytes(with_gradients) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def nothing() -> Values:
    """Return no predictions."""
    return {}


def measured(case: Case, device: torch.device) -> tuple[Values, str]:
    """Return the values of a case, or no values and the reason: the error message of the library.

    torch reports by warnings why each kernel cannot be used; the error after them only says that no kernel is left.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return case.measure(device), ""
        except (RuntimeError, ValueError, ImportError) as error:
            words = [str(error), *(str(w.message) for w in caught if "kernel" in str(error))]
    return {}, "; ".join(dict.fromkeys(first_sentence(word) for word in words))


def first_sentence(words: str) -> str:
    """Return the first sentence of a message, or its first line if that is shorter."""
    line = next((line.strip() for line in words.splitlines() if line.strip()), "no message")
    return line.split(". ")[0].split(" (Triggered")[0].removesuffix(".")
