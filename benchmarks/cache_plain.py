"""A plain training loop for cache.py: decodes with decord and encodes in every step, over given samples."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import decord
import runs
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

SHIFT = 5.0


def clip_of(path: Path, frames: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Return frames of a clip, read by decord and resized without cropping: [3, T, height, width] in [-1, 1]."""
    read = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1).get_batch(list(frames)).asnumpy()
    pixels = torch.from_numpy(read).permute(0, 3, 1, 2).float() / 127.5 - 1
    sized = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return sized.transpose(0, 1)


class PlainLoop:
    """Training steps of a minimal script without plan and cache; float32, AdamW.

    Args:
        model: folder of a Wan2.1 text-to-video model.
        metadata: metadata.json of the data set.
        text_tokens: token count that a caption is padded to.
    """

    def __init__(self, model: Path, metadata: Path, text_tokens: int) -> None:
        self.data, self.text_tokens = metadata.parent, text_tokens
        self.rows = json.loads(metadata.read_text(encoding="utf-8"))
        self.vae = AutoencoderKLWan.from_pretrained(model / "vae").requires_grad_(False)
        self.pipeline = WanPipeline.from_pretrained(model, transformer=None, vae=self.vae)
        self.transformer = WanTransformer3DModel.from_pretrained(model / "transformer").train()
        self.optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=2e-3, fused=True)
        config = self.vae.config
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )

    def step(self, dumps: Sequence[runs.Dump]) -> float:
        """Run one optimizer step over the micro-batches that a run has dumped; return its duration in seconds."""
        begin = time.perf_counter()
        for dump in dumps:
            _, height, width = dump.bucket
            clips = [
                clip_of(self.data / self.rows[row]["file_path"], frames, height, width)
                for row, frames in zip(dump.rows, dump.frame_indices, strict=True)
            ]
            with torch.no_grad():
                moments = self.vae.encode(torch.stack(clips)).latent_dist
                latents = (moments.sample() - self.mean) / self.std
                text = self.pipeline.encode_prompt(
                    dump.captions, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
                )[0]
            noise, draw = torch.randn_like(latents), torch.rand(len(latents))
            sigma = SHIFT * draw / (1 + (SHIFT - 1) * draw)
            level = sigma.view(-1, 1, 1, 1, 1)
            predicted = self.transformer((1 - level) * latents + level * noise, 1000 * sigma, text, return_dict=False)
            torch.nn.functional.mse_loss(predicted[0], noise - latents).backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 0.05)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin
