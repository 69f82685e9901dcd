"""Widths and sizes of the cases of gpu.py, published or small ones, and the functions that measure time and memory.

A case has a function that predicts its values and one or more that measure them on a device. The names of the columns
contain their units: ms, s, TFLOP (1e12 operations), GB (1e9 bytes), GiB.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from videox.errors import UserError
from videox.estimate.peak_memory import peak_bytes
from videox.shapes import Bucket

GIB, TERA = 2**30, 1e12
TEXT, JOINT_TEXT = 512, 256  # tokens of a prompt: UMT5's with its padding; the Llama's
HALF = torch.bfloat16
NOT_RUN = "not run"
Values = dict[str, Any]  # float by column; text in the columns of results in words


@dataclass(frozen=True)
class Runs:
    """What the runs of the train scripts train on.

    clip: frames, height and width of the clips; side: value of the three sample sizes.
    families: by family, the sizes of its model for scripts/demo_model.py and demo_hunyuan.py; published_vae: the VAE
    has the published widths instead.
    small: by family, sizes of a model for runs that only compare numbers.
    seconds: after which a run is ended.
    """

    clip: Bucket
    side: int
    families: Mapping[str, Mapping[str, Any]]
    published_vae: bool
    small: Mapping[str, Mapping[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Scale:
    """Widths and sizes of all cases.

    sizes: of the clips; usual: size of the cases that are measured at one size only; short: of a clip for encoders;
    many: that follow each other in one process.
    steps: sizes of the clips whose whole step is extrapolated, the first one also with each flag.
    layers: numbers of layers of the truncated transformers whose memory is measured.
    runs: of the train scripts.
    seconds: duration for which a measurement is repeated.
    budget: seconds that a case may take.
    """

    sizes: Mapping[str, Bucket]
    usual: str
    short: Bucket
    many: tuple[Bucket, ...]
    steps: Mapping[str, Bucket]
    wan: Mapping[str, Mapping[str, Any]]
    hunyuan: Mapping[str, Any]
    wan_vae: Mapping[str, Any]
    hunyuan_vae: Mapping[str, Any]
    umt5: Mapping[str, Any]
    matrices: tuple[tuple[int, int, int], ...]
    copied: int
    runs: Runs
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
# Models of the runs that only compare numbers; those of the demo's defaults.
TOY = {"wan2.1": {}, "hunyuanvideo": {}}
REAL = Scale(
    sizes={"49x512x512": Bucket(49, 512, 512), "81x480x832": Bucket(81, 480, 832), "81x720x1280": Bucket(81, 720, 1280)},
    usual="81x480x832",
    short=Bucket(17, 480, 832),
    many=tuple(
        Bucket(*size) for size in (
            (33, 640, 640), (81, 480, 832), (1, 1024, 1024), (49, 512, 512), (81, 832, 480), (17, 720, 1280),
            (65, 480, 832), (25, 704, 704), (81, 624, 624), (41, 544, 960), (73, 416, 736), (57, 448, 768),
        )
    ),
    steps={"93x480x832": Bucket(93, 480, 832), "81x480x832": Bucket(81, 480, 832)},
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
    runs=Runs(
        clip=Bucket(33, 480, 832),
        side=640,
        families={
            "wan2.1": {"heads": 12, "head_dim": 128, "layers": 2, "ffn_dim": 8960, "text_dim": 1024},
            "hunyuanvideo": {
                "heads": 24, "rope_axes": (16, 56, 56), "layers": 1, "single_layers": 1, "text_dim": 1024, "pooled_dim": 768,
            },
        },
        published_vae=True,
        small=TOY,
        seconds=60.0,
    ),
    seconds=0.5,
    budget=30.0,
)  # fmt: skip
NARROW = {**WAN, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 64}
SMALL = Scale(
    sizes={"5x32x48": Bucket(5, 32, 48), "9x64x96": Bucket(9, 64, 96)},
    usual="9x64x96",
    short=Bucket(5, 32, 48),
    many=tuple(Bucket(1 + 4 * (n % 3), 32, 32 + 16 * n) for n in range(12)),
    steps={"9x64x96": Bucket(9, 64, 96), "5x64x64": Bucket(5, 64, 64)},
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
    runs=Runs(clip=Bucket(9, 64, 96), side=64, families=TOY, published_vae=False, small=TOY, seconds=1800.0),
    seconds=0.02,
    budget=600.0,
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A measurement in a process that has these environment variables in addition."""

    measure: Callable[[torch.device], Values]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row. The functions return values by column.

    words: its first columns; budget: seconds that it may take; apart: it starts processes of its own, and is measured
    by the command itself.
    others: more measurements; judge: values of the row from those of all measurements (None: there is one).
    """

    section: str
    words: tuple[str, ...]
    budget: float
    predict: Callable[[], Values]
    measure: Callable[[torch.device], Values]
    others: tuple[Probe, ...] = ()
    judge: Callable[..., Values] | None = None
    apart: bool = False

    def probes(self) -> Iterator[Probe]:
        """Yield the measurements."""
        yield Probe(self.measure)
        yield from self.others

    def conclude(self, found: list[Values]) -> Values:
        """Return the values of the row from those of its measurements."""
        return self.judge(*found) if self.judge else found[0]


class NotRunError(RuntimeError):
    """A measurement that this machine does not allow."""


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


def attempt(measure: Callable[[torch.device], Values], device: torch.device) -> tuple[Values, str]:
    """Return what is measured, or no values and the reason: the error message of the library.

    torch reports by warnings why each kernel cannot be used; the error after them only says that no kernel is left.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return measure(device), ""
        except NotRunError as why:
            return {}, f"{NOT_RUN}: {why}"
        except (LookupError, OSError, UserError) as error:
            words = [f"{type(error).__name__}: {error}"]
        except (RuntimeError, ValueError, ImportError) as error:
            words = [str(error), *(str(w.message) for w in caught if "kernel" in str(error))]
    return {}, "; ".join(dict.fromkeys(first_sentence(word) for word in words))


def measured(case: Case, device: torch.device) -> tuple[Values, str]:
    """Return the values of a case, or no values and the reason; all of it in this process."""
    found = []
    for probe in case.probes():
        values, reason = attempt(probe.measure, device)
        if reason:
            return {}, reason
        found.append(values)
    return case.conclude(found), ""


def first_sentence(words: str) -> str:
    """Return the first sentence of a message, or its first line if that is shorter."""
    line = next((line.strip() for line in words.splitlines() if line.strip()), "no message")
    return line.split(". ")[0].split(" (Triggered")[0].removesuffix(".")
