"""ModelProfile: what the plan and the estimates know of a model, from its configuration files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from videox.estimate.flops import Network
from videox.estimate.polynomial import total
from videox.shapes import USUAL, Ratios


@dataclass(frozen=True)
class ModelProfile:
    """What the plan and the estimates know of a model; no weights are loaded for it.

    Attributes:
        task: what is trained, in words.
        network: returns FLOPs and activation bytes; keywords `half` (compute in bfloat16) and `cast` (the weights are
            float32 and cast for it).
        blocks: names of the transformer's lists of repeated blocks, each with the layers that get LoRA adapters.
        components: class and configuration of each component that has weights, by name.
        fps: frames per second of the videos that the model was trained on.
        min_frames: samples with fewer frames teach the model nothing and are not trained.
        sharded_backend: the backend that is proposed where the weights do not fit one GPU.
        vae_frames: frames that the VAE encodes at a time, after the first one; 0: it encodes a clip as a whole.
        other: class and configuration of a second transformer that samples are made with; None: there is none.
        ratios: pixels and frames per latent and token.
    """

    task: str
    network: Callable[..., Network]
    blocks: Mapping[str, Sequence[str]]
    components: Mapping[str, tuple[Any, dict[str, Any]]]
    fps: float
    min_frames: int = 1
    sharded_backend: str = "zero3"
    vae_frames: int = 0
    other: tuple[Any, dict[str, Any]] | None = None
    ratios: Ratios = USUAL

    @property
    def cost(self) -> tuple[float, float]:
        """a and b of a sample's cost a*S + b*S^2 in tokens S: FLOPs of the blocks' forward pass."""
        forward = total(*(block.forward for block in self.network(half=True).blocks))
        return float(forward.linear), float(forward.quadratic)
