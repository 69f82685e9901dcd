"""What the estimates need to know of a model's modules: stored for published configurations, measured for others.

The stored facts are in config/module_facts.json, which `python benchmarks/module_facts.py` writes by the functions
that measure other configurations. With them a dry run loads neither torch nor diffusers.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from videox.shapes import USUAL

CONVOLUTION, ATTENTION = "convolution", "attention"  # what may need the most memory in a VAE's encoder
LONGER = "longer"  # key of the parts in which a VAE encodes longer clips
TILE, TILE_STRIDE = 256, 192  # pixels of a tile's side, and from one to the next: diffusers' defaults of both VAEs
MOST_PIXELS = 1280 * 720  # of a frame, up to which the stored peaks were checked
STORED = Path(__file__).resolve().parents[2] / "config" / "module_facts.json"


class Modules:
    """The modules of a model, by the names of its components.

    Args:
        components: class with its package, such as "diffusers.AutoencoderKLWan", and configuration of each.
    """

    def __init__(self, components: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        self.components = components

    def frozen(self) -> list[str]:
        """Return the names of the components that are not trained."""
        return [name for name in self.components if name != "transformer"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of the transformer, by name."""
        if (stored := self._stored("transformer")) is not None:
            return expand_shapes(stored["shapes"], stored["repeated"])
        from videox.estimate import measure

        return measure.parameter_shapes(measure.build(*self.components["transformer"]))

    def elements(self, name: str) -> int:
        """Return the number of elements of a component's parameters and buffers."""
        if (stored := self._stored(name)) is not None:
            return int(stored["elements"])
        from videox.estimate import measure

        return measure.element_count(measure.build(*self.components[name]))

    def text_flops(self, tokens: int) -> float:
        """Return the FLOPs of the text encoders for a caption of so many tokens: two per parameter and token."""
        names = [name for name in self.components if name.startswith("text")]
        return float(sum(2 * tokens * self._without_embeddings(name) for name in names))

    def text_linear(self) -> tuple[int, int]:
        """Return elements and rows of the text encoder's weights that --text_encoder_precision quantises."""
        if (stored := self._stored("text_encoder")) is not None:
            elements, rows = stored["linear"]
            return int(elements), int(rows)
        from videox.estimate import measure

        return measure.linear_counts(measure.build(*self.components["text_encoder"]))

    def vae_flops_per_pixel(self) -> float:
        """Return the FLOPs of the VAE's encoder per pixel and frame."""
        if (stored := self._stored("vae")) is not None:
            return float(stored["flops_per_pixel"])
        from videox.estimate import measure

        return measure.vae_flops_per_pixel(measure.build(*self.components["vae"]))

    def vae_peak(self, size: tuple[int, int, int], *, half: bool, tiled: bool) -> float:
        """Return the peak bytes of the activations of the VAE's encoder, without the clip itself.

        Args:
            size: frames, height and width of the clip.
            half: in bfloat16, else in float32.
            tiled: it encodes in tiles.
        """
        stored = self._stored("vae")
        if stored is not None:
            peaks, vae = stored["peaks"]["bf16" if half else "fp32"], Outputs.of(self.components["vae"][1])
            peak = stored_tiled_peak(peaks, size, 2 if half else 4, vae) if tiled else stored_peak(peaks, size)
            if peak is not None:
                return peak
        from videox.estimate import measure

        return measure.vae_peak_bytes(measure.build(*self.components["vae"], half=half, tiled=tiled), size)

    def _without_embeddings(self, name: str) -> int:
        if (stored := self._stored(name)) is not None:
            return int(stored["without_embeddings"])
        from videox.estimate import measure

        return measure.count_without_embeddings(measure.build(*self.components[name]))

    def _stored(self, name: str) -> Mapping[str, Any] | None:
        return stored_facts().get(fact_key(*self.components[name]))


class Outputs(NamedTuple):
    """What a VAE's encoder returns for a clip.

    Attributes:
        moments: channels, two for each of a latent.
        temporal: frames per latent frame after the first.
        spatial: pixels of a side per latent.
        patch: pixels of a side that the encoder takes as one; the tiles are of these.
    """

    moments: int
    temporal: int
    spatial: int
    patch: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Outputs:
        """Return those of a VAE of either family, by its configuration, with its class's defaults."""
        spatial = config.get("scale_factor_spatial", config.get("spatial_compression_ratio", USUAL.spatial))
        temporal = config.get("scale_factor_temporal", config.get("temporal_compression_ratio", USUAL.temporal))
        channels = config.get("z_dim", config.get("latent_channels", 16))
        return cls(2 * channels, temporal, spatial, config.get("patch_size") or 1)


@cache
def stored_facts() -> dict[str, Any]:
    """Return the stored facts by fact_key."""
    return dict(json.loads(STORED.read_text(encoding="utf-8")))


def fact_key(kind: str, config: Mapping[str, Any]) -> str:
    """Return the key of stored facts: the class, and a hash of the whole configuration."""
    text = json.dumps(config, sort_keys=True)
    return f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def expand_shapes(shapes: Mapping[str, list[int]], repeated: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, from those of one block of each list and the number of blocks.

    Args:
        shapes: by name; in a list of blocks with "*" for the number, such as "blocks.*.norm2.weight".
        repeated: number of blocks, by the name of the list.
    """
    expanded = dict[str, tuple[int, ...]]()
    for name, shape in shapes.items():
        blocks, star, _ = name.partition(".*.")
        numbers = range(repeated[blocks]) if star else [0]
        expanded |= {name.replace("*", str(number), 1): tuple(shape) for number in numbers}
    return expanded


def convolution_terms(height: int, width: int) -> list[float]:
    """Return the terms of the memory of convolutions of some frames: both sides are padded."""
    return [1.0, height, width, height * width]


def attention_terms(frames: int, height: int, width: int) -> list[float]:
    """Return the terms of the memory of attention between all pixels of all latent frames, by the usual ratios.

    Other ratios of the sides change the coefficients alone; frames are always those of one latent frame each.
    """
    latent = (1 + (frames - 1) / USUAL.temporal) * height * width / USUAL.spatial**2
    return [1.0, latent, latent**2]


def stored_peak(peaks: Mapping[str, Any], size: tuple[int, int, int]) -> float | None:
    """Return the peak bytes of a VAE's encoder for a clip; None where none are stored for it.

    Args:
        peaks: by number of frames the coefficients of convolution_terms and of attention_terms; under LONGER, for a
            VAE that encodes longer clips in parts: the frames of a part, those from one part to the next, and the
            bytes per pixel of a frame that it keeps of each part and of each further frame of the clip.
        size: frames, height and width of the clip.
    """
    frames, height, width = size
    kept = 0.0
    if (part := peaks.get(LONGER)) and frames > part["frames"]:
        further = frames - part["frames"]
        kept = (further // part["every"] * part["kept"] + further * part["clip"]) * height * width
        frames = part["frames"]
    found = peaks.get(str(frames))
    if found is None or height * width > MOST_PIXELS:
        return None
    terms = {CONVOLUTION: convolution_terms(height, width), ATTENTION: attention_terms(frames, height, width)}
    return kept + max(sum(map(operator.mul, values, terms[name])) for name, values in found.items())


def stored_tiled_peak(
    peaks: Mapping[str, Any], size: tuple[int, int, int], element: int, vae: Outputs
) -> float | None:
    """Return the peak bytes of a VAE's encoder that works in tiles; None where none are stored.

    It is that of one tile, with the outputs of all tiles and, where the frames are encoded in parts, with what is kept
    of the parts before.

    Args:
        peaks: as for stored_peak.
        size: frames, height and width of the clip.
        element: bytes of a number.
        vae: what its encoder returns.
    """
    frames, height, width = size
    if max(height, width) <= TILE:
        return stored_peak(peaks, size)
    side, stride = TILE * vae.patch, TILE_STRIDE * vae.patch
    part = peaks.get(LONGER)
    in_part = min(frames, part["frames"]) if part else frames
    tile = stored_peak(peaks, (in_part, min(height, side), min(width, side)))
    if tile is None:
        return None
    earlier = 0.0
    if part and frames > in_part:
        further = frames - in_part
        earlier = (further // part["every"] * part["kept"] + further * part["clip"]) * height * width
    tiles = -(-height // stride) * -(-width // stride)
    outputs = element * vae.moments * (1 + (in_part - 1) // vae.temporal) * (side // vae.spatial) ** 2 * tiles
    return tile + earlier + outputs
