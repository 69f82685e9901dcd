"""Measures the modules of the published models on the meta device: config/module_facts.json.

    python benchmarks/module_facts.py

The dry run of a published model reads these facts instead of building its modules, which takes seconds and loads torch
and diffusers. tests/estimate/test_module_facts.py measures them again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from videox.estimate import measure
from videox.estimate.module_facts import (
    ATTENTION,
    CONVOLUTION,
    LONGER,
    STORED,
    attention_terms,
    convolution_terms,
    fact_key,
    stored_peak,
)

MODELS = Path(__file__).resolve().parents[1] / "config" / "models"
WAN = {
    "transformer": "diffusers.WanTransformer3DModel", "vae": "diffusers.AutoencoderKLWan",
    "text_encoder": "transformers.UMT5EncoderModel", "image_encoder": "transformers.CLIPVisionModel",
}  # fmt: skip
HUNYUAN = {
    "transformer": "diffusers.HunyuanVideoTransformer3DModel", "vae": "diffusers.AutoencoderKLHunyuanVideo",
    "text_encoder": "transformers.LlamaModel", "text_encoder_2": "transformers.CLIPTextModel",
}  # fmt: skip
LLAVA = {"text_encoder": "transformers.LlavaForConditionalGeneration"}
# Sides at which the peak of a VAE is measured: small ones, where its convolutions need the most memory, and large
# ones, where its attention does, whose matrix has a row for each pixel of a latent frame (Wan), or of all latent
# frames of a part (HunyuanVideo). Both VAEs encode in parts. The fit must agree with the sizes to check.
SMALL = ((64, 64), (64, 128), (128, 64), (128, 128))
LARGE = ((4320, 7680), (5760, 10240), (8640, 15360))  # twice as large for a VAE that takes 2 x 2 pixels as one
FRAMES = (1, 5, 9, 13, 17)
# HunyuanVideo's VAE encodes longer clips in parts of 17 frames, 12 frames after each other, and keeps 32 channels of
# 5 latent frames of each, and the clip beside the part. Wan's encodes 4 frames at a time; videox.training.run_memory
# counts what each part adds.
PART = {"frames": 17, "every": 12}
KEPT, CLIP = 32 * 5 / 64, 3  # values per pixel of a frame: of a part, and of a frame
AGREES = 1e-3  # relative; 2 MiB that the parts need at any size are not in the fit
CHECKED = {
    "wan": ((17, 480, 832), (13, 720, 1280), (9, 256, 448), (1, 720, 1280)),
    "hunyuan": ((129, 544, 960), (29, 480, 832), (17, 720, 1280), (5, 320, 512), (1, 480, 832), (13, 256, 256)),
}


def components_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield class and configuration of each component with weights of a published model."""
    classes = WAN if path.stem.startswith("wan") else HUNYUAN | (LLAVA if "i2v" in path.stem else {})
    for name, config in json.loads(path.read_text(encoding="utf-8"))["components"].items():
        if name in classes:
            yield classes[name], config


def published() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield class and configuration of each component with weights of all published models."""
    for path in sorted(MODELS.glob("*.json")):
        yield from components_of(path)


def transformer_facts(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of a transformer, of repeated blocks once. Raises ValueError if its blocks are not alike."""
    shapes = measure.parameter_shapes(measure.build(kind, config))
    once, numbers = dict[str, list[int]](), dict[str, set[int]]()
    for name, shape in shapes.items():
        blocks, number, rest = re.fullmatch(r"(?:(\w*blocks)\.(\d+)\.)?(.+)", name).groups()  # type: ignore[union-attr]
        if number is not None:
            numbers.setdefault(blocks, set()).add(int(number))
            rest = f"{blocks}.*.{rest}"
        if once.setdefault(rest, list(shape)) != list(shape):
            raise ValueError(f"{name} has another shape than in the other blocks")
    return {"repeated": {blocks: len(found) for blocks, found in numbers.items()}, "shapes": once}


def polynomial(
    sides: Sequence[tuple[int, int]], peaks: Sequence[int], terms: Callable[[int, int], list[float]]
) -> list[float]:
    """Return the coefficients with which terms(height, width) gives the peak of each size."""
    matrix = np.array([terms(*side) for side in sides], np.float64)
    scale = np.abs(matrix).max(0)
    found = np.linalg.lstsq(matrix / scale, np.array(peaks, np.float64), rcond=None)[0] / scale
    return [float(f"{value:.10g}") for value in found]


def peaks_of(kind: str, config: dict[str, Any], half: bool) -> dict[str, Any]:
    """Return the polynomials of a VAE's peak, by number of frames; {} if they do not agree with what is measured."""
    vae, found = measure.build(kind, config, half=half), dict[str, Any]()
    scale = config.get("patch_size") or 1
    large = [(scale * height, scale * width) for height, width in LARGE]
    is_hunyuan = "Hunyuan" in kind
    for frames in FRAMES:
        attention = partial(attention_terms, frames)
        phases = {CONVOLUTION: (SMALL, convolution_terms), ATTENTION: (large, attention)}
        found[str(frames)] = {}
        for name, (sides, terms) in phases.items():
            peaks = [measure.vae_peak_bytes(vae, (frames, *side)) for side in sides]
            found[str(frames)][name] = polynomial(sides, peaks, terms)
    if is_hunyuan:
        size_of = 2 if half else 4
        found[LONGER] = {**PART, "kept": KEPT * size_of, "clip": CLIP * size_of}
    for size in CHECKED["hunyuan" if is_hunyuan else "wan"]:
        real, fitted = measure.vae_peak_bytes(vae, size), stored_peak(found, size)
        print(kind, "bf16" if half else "fp32", size, real, fitted, flush=True)
        if fitted is None or abs(fitted / real - 1) > AGREES:
            print("  does not agree, is not stored")
            return {}
    return found


def facts_of(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of one component."""
    if "Transformer" in kind:
        return transformer_facts(kind, config)
    module = measure.build(kind, config)
    facts: dict[str, Any] = {"elements": measure.element_count(module)}
    if "Autoencoder" in kind:
        facts["flops_per_pixel"] = measure.vae_flops_per_pixel(module)
        facts["peaks"] = {name: peaks_of(kind, config, half) for name, half in (("fp32", False), ("bf16", True))}
    else:
        facts["without_embeddings"] = measure.count_without_embeddings(module)
        if "CLIP" not in kind:  # of these encoders no weight is quantised
            facts["linear"] = list(measure.linear_counts(module))
    return facts


def main() -> int:
    found: dict[str, Any] = {}
    for kind, config in published():
        if (key := fact_key(kind, config)) not in found:
            found[key] = facts_of(kind, config)
            print(key, flush=True)
    lines = [f" {json.dumps(key)}: {json.dumps(facts)}" for key, facts in sorted(found.items())]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
