"""Wan2.2 TI2V-5B: text-to-video and image-to-video by one transformer, with a timestep for each token.

As diffusers' pipelines with expand_timesteps: in an image-to-video sample the tokens of the first latent frame have
timestep 0 and are those of the given picture, without noise; in a text-to-video sample all tokens have the same
timestep. A micro-batch may have both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import WanPipeline

from videox.data.dataset import Batch
from videox.device import to_device
from videox.diffusion.schemes import NUM_TRAIN_TIMESTEPS
from videox.rng import Purpose, uniform

if TYPE_CHECKING:
    from videox.training.validation_loss import HeldOut

WITHOUT_CONDITION = ("normal", "ti2v")  # modes in which the transformer's input has the channels of the latents alone


def given_frame(first: torch.Tensor, frames: int, batch: Batch, ratio: float, patch: int) -> dict[str, torch.Tensor]:
    """The given first frames of a micro-batch, and which of its samples are trained from them.

    An image has no frame besides the first one, and is always trained as text-to-image.

    Args:
        first: normalised latents of the first frames, by the mode of their posterior, float32 [B, C, 1, h, w].
        frames: latent frames t of each sample.
        batch: whose keys draw which samples are image-to-video.
        ratio: share of the clips that are, 0 to 1.
        patch: latent pixels of a token's side.

    Returns:
        first_frame: `first`; generated: float32 [B, 1, t, 1, 1], 0 for a given latent frame, else 1; token_generated:
        the same for each token, float32 [B, tokens].
    """
    draws = uniform(np.array(batch["keys"], np.uint64), Purpose.FIRST_FRAME)
    generated = torch.ones(len(draws), 1, frames, 1, 1)
    if frames > 1:
        generated[:, 0, 0, 0, 0] -= torch.from_numpy((draws < ratio).astype(np.float32))
    height, width = first.shape[3:]
    tokens = generated[:, 0].expand(-1, -1, height, width)[:, :, ::patch, ::patch].flatten(1)
    chosen = {"generated": generated, "token_generated": tokens}
    return {"first_frame": first, **{name: to_device(value, first.device) for name, value in chosen.items()}}


def transformer_inputs(
    noisy_latents: torch.Tensor, sigmas: torch.Tensor, given: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Keywords of WanTransformer3DModel, as diffusers' pipelines with expand_timesteps pass them.

    Args:
        noisy_latents: float32 [B, C, t, h, w].
        sigmas: float32 [B].
        given: prompt_embeds, and what given_frame returns.

    Returns:
        hidden_states: [B, C, t, h, w], the noisy latents with the given first frames; timestep: float32 [B, tokens],
        1000 sigma, and 0 for the tokens of a given first frame.
    """
    generated = given["generated"]
    return {
        "hidden_states": (1 - generated) * given["first_frame"] + generated * noisy_latents,
        "timestep": given["token_generated"] * (NUM_TRAIN_TIMESTEPS * sigmas).view(-1, 1),
        "encoder_hidden_states": given["prompt_embeds"],
        "encoder_hidden_states_image": None,
        "return_dict": False,
    }


def given_frames(sample: HeldOut) -> int:
    """The leading latent frames that a held-out sample is given; they are excluded from its loss."""
    return int((sample.conditions["generated"] == 0).sum())


class TextOrImagePipeline(WanPipeline):
    """diffusers' WanPipeline, and for calls with a picture WanImageToVideoPipeline with the same modules."""

    def __call__(self, *, image: Any = None, **arguments: Any) -> Any:  # noqa: ANN401 - of diffusers
        """As the call of the pipeline for text, or for pictures where `image` is given."""
        if image is None:
            return super().__call__(**arguments)  # type: ignore[misc]
        from diffusers import WanImageToVideoPipeline  # it warns on import that torchvision is missing

        own: Any = self
        modules = {name: part for name, part in own.components.items() if not name.startswith("transformer")}
        pipeline: Any = WanImageToVideoPipeline(**modules, transformer=None, expand_timesteps=True)
        pipeline.transformer = own.transformer  # of any class: the backend may have wrapped it
        pipeline.set_progress_bar_config(**getattr(own, "_progress_bar_config", {}))
        return pipeline(image=image, **arguments)
