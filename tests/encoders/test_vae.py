"""Tests of videox.encoders.vae: pixels are scaled as in diffusers, latents are drawn by each sample's key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videox.encoders.encode import latents_spec, to_video
from videox.encoders.offload import OffloadedModule
from videox.encoders.vae import VAE_DTYPES, encode_moments, sample_latents, use_tiling
from videox.rng import Purpose, hash_key

CPU = torch.device("cpu")
COUNT, FRAMES, HEIGHT, WIDTH = 5, 5, 32, 48
KEYS = [int(key) for key in hash_key(23, np.arange(COUNT))]


def encode_latents(
    vae: OffloadedModule, video: torch.Tensor, *, keys: list[int] | None, mini_batch: int
) -> torch.Tensor:
    """Return latents as a training step computes them: the moments of all samples, then one draw per sample."""
    moments = encode_moments(vae, video, mini_batch=mini_batch)
    return sample_latents(moments, moments.shape[1] // 2, keys)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_pixels_are_scaled_as_in_diffusers(seed: int, frames: int, rows: int, columns: int) -> None:
    shape = (2, frames, 16 * rows, 16 * columns, 3)
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    video = to_video(pixels)
    assert video.shape == (2, 3, *shape[1:4]) and video.dtype == torch.float32
    processor = VideoProcessor(vae_scale_factor=8)
    for clip, sample in zip(pixels, video, strict=True):
        images = [Image.fromarray(frame.numpy()) for frame in clip]
        for place, image in enumerate(images):
            assert torch.equal(processor.preprocess(image, *shape[2:4])[0], sample[:, place])
        assert torch.equal(processor.preprocess_video([images], *shape[2:4])[0], sample)


def test_every_pixel_value_is_scaled_bitwise_equally() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(values), 16, 16)
    video = to_video(torch.from_numpy(values)[None, None])
    assert torch.equal(video[:, :, 0], expected)
    assert video.min() == -1 and video.max() == 1


class CountingVae:
    """A VAE of diffusers that records the batch sizes of its encode calls."""

    def __init__(self, vae: AutoencoderKLWan | AutoencoderKLHunyuanVideo, monkeypatch: pytest.MonkeyPatch) -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.offloaded = OffloadedModule(self.vae, torch.device("cpu"), offload=True)
        self.calls: list[int] = []
        encode_batch = self.vae.encode

        def counting_encode(video: torch.Tensor) -> object:
            self.calls.append(len(video))
            return encode_batch(video)

        monkeypatch.setattr(self.vae, "encode", counting_encode)

    def in_float64(self) -> CountingVae:
        """Convert the VAE to float64: differences between batch sizes are then not hidden by float32 rounding."""
        self.offloaded = OffloadedModule(self.vae.double(), torch.device("cpu"), offload=True)
        return self


@pytest.fixture(params=["wan", "hunyuan"])
def autoencoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingVae]:
    """Yield a small VAE with random weights and a wide posterior, so that the draws differ visibly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "wan":
            vae = AutoencoderKLWan(
                base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
            )
        else:
            vae = AutoencoderKLHunyuanVideo(
                latent_channels=16, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
            )
        yield CountingVae(vae, monkeypatch)


@pytest.fixture
def video() -> torch.Tensor:
    clips = [tiny.moving_square(FRAMES, WIDTH, HEIGHT, seed) for seed in range(COUNT)]
    return to_video(torch.from_numpy(np.stack(clips)))


def test_each_samples_noise_is_drawn_from_its_key(autoencoder: CountingVae, video: torch.Tensor) -> None:
    latents = encode_latents(autoencoder.offloaded, video, keys=KEYS, mini_batch=32)
    with torch.no_grad():
        posterior = autoencoder.vae.encode(video).latent_dist
    assert latents.shape == (COUNT, 16, 2, 4, 6) and latents.dtype == torch.float32
    assert posterior.std.min() > 0.1
    for row, key in enumerate(KEYS):
        generator = np.random.Generator(np.random.Philox(key=int(hash_key(key, Purpose.POSTERIOR))))
        noise = torch.from_numpy(generator.standard_normal((16, 2, 4, 6), dtype=np.float32))
        assert torch.equal(latents[row], posterior.mean[row] + posterior.std[row] * noise)


def test_without_keys_latents_are_the_posteriors_mode(autoencoder: CountingVae, video: torch.Tensor) -> None:
    latents = encode_latents(autoencoder.offloaded, video, keys=None, mini_batch=32)
    with torch.no_grad():
        posterior = autoencoder.vae.encode(video).latent_dist
    assert torch.equal(latents, posterior.mode())


@pytest.mark.parametrize("keys", [KEYS, None])
def test_the_mini_batch_size_does_not_change_the_latents(
    autoencoder: CountingVae, video: torch.Tensor, keys: list[int] | None
) -> None:
    offloaded, latents, calls = autoencoder.in_float64().offloaded, {}, {}
    for mini_batch in (1, 2, 32):
        autoencoder.calls.clear()
        latents[mini_batch] = encode_latents(offloaded, video.double(), keys=keys, mini_batch=mini_batch)
        calls[mini_batch] = list(autoencoder.calls)
    assert calls == {1: [1, 1, 1, 1, 1], 2: [2, 2, 1], 32: [5]}
    assert latents[32].std() > 0.01
    for mini_batch in (1, 2):
        assert torch.allclose(latents[mini_batch], latents[32], rtol=0, atol=1e-12)


def test_latents_are_independent_of_the_rest_of_the_batch(autoencoder: CountingVae, video: torch.Tensor) -> None:
    offloaded, video = autoencoder.in_float64().offloaded, video.double()
    batched = encode_latents(offloaded, video, keys=KEYS, mini_batch=2)
    reversed_batch = encode_latents(offloaded, video.flip(0), keys=KEYS[::-1], mini_batch=2)
    assert torch.allclose(reversed_batch.flip(0), batched, rtol=0, atol=1e-12)
    other = encode_latents(offloaded, video[:1], keys=KEYS[1:2], mini_batch=2)
    assert not torch.allclose(other[0], batched[0], rtol=0, atol=0.1)  # another key has other noise


def test_latents_have_no_gradient_and_use_no_global_rng(autoencoder: CountingVae, video: torch.Tensor) -> None:
    before = torch.get_rng_state()
    latents = encode_latents(autoencoder.offloaded, video.requires_grad_(), keys=KEYS, mini_batch=2)
    assert not latents.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vae_in_bfloat16_returns_float32_moments(autoencoder: CountingVae, video: torch.Tensor) -> None:
    full = encode_moments(autoencoder.offloaded, video, mini_batch=2)
    half = encode_moments(OffloadedModule(autoencoder.vae.bfloat16(), CPU, offload=True), video, mini_batch=2)
    assert full.dtype == half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float()) and not torch.equal(full, half)
    assert (half - full).abs().mean() < 0.05 * full.std()


def test_the_cache_keeps_the_outputs_of_each_dtype_apart() -> None:
    specs = [
        latents_spec("moments", ("clip",), lambda _: torch.empty(0), 32, (), vae_dtype=dtype) for dtype in VAE_DTYPES
    ]
    # the settings of float32 are those of caches that earlier versions wrote
    assert [spec.settings for spec in specs] == ["32 channels", "32 channels, VAE in bf16"]
    assert len({spec.cache_field({}).encoder for spec in specs}) == len(VAE_DTYPES)


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_tiling_changes_the_latents_of_what_is_larger_than_a_tile(family: str, tmp_path: Path) -> None:
    build, vae_class = {
        "wan": (tiny.build_wan_t2v, AutoencoderKLWan), "hunyuan": (tiny.build_hunyuan_t2v, AutoencoderKLHunyuanVideo),
    }[family]  # fmt: skip
    plain, tiled, untouched = (vae_class.from_pretrained(build(tmp_path), subfolder="vae") for _ in range(3))
    use_tiling(tiled, True)
    use_tiling(untouched, False)
    assert tiled.use_tiling and not untouched.use_tiling
    for side, equal in ((32, True), (288, False)):
        image = torch.rand(1, 3, 1, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            expected, latents = (vae.encode(image).latent_dist.mode() for vae in (plain, tiled))
        assert latents.shape == expected.shape
        assert torch.equal(latents, expected) == equal
        assert torch.allclose(latents, expected, atol=0.5)
