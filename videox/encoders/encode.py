"""Encodes micro-batches with the frozen encoders, through a cache of encoder outputs if there is one.

An EncodingSpec describes each tensor. Without a cache all samples of a micro-batch are encoded together, in chunks of
--vae_mini_batch. With a cache each sample is encoded alone, so that an entry never depends on the other samples of its
micro-batch. Encoders are loaded when the first spec needs them: a run that finds every tensor in the cache loads none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from einops import rearrange

from videox.data.cache.cache import CacheField, CacheView, cache_key, fingerprint, restore_zeros, trim_zeros
from videox.data.dataset import Batch
from videox.device import memory_phase, to_device
from videox.shapes import USUAL, Bucket, Ratios, latent_shape

Encoders = TypeVar("Encoders")
Gather = Callable[[Any], list[Any]]


# Encoders by module name, as error messages call them.
ENCODER_NAMES = {"vae": "VAE", "text_encoder_2": "text encoder"}


class LazyEncoders(Generic[Encoders]):
    """The frozen encoders, loaded on first use.

    Args:
        load: loads the encoders; its argument is a collective that gathers a value from every process, through which
            the processes of a machine share the encoders' memory.
    """

    def __init__(self, load: Callable[[Gather], Encoders]) -> None:
        self._load = load
        self._loaded: list[Encoders] = []

    def load(self, gather: Gather) -> Encoders:
        """Load the encoders on all processes together, which share the memory. A collective."""
        self._loaded = [self._load(gather)]
        return self._loaded[0]

    def __call__(self) -> Encoders:
        """Return the encoders; if they are not loaded yet, this process loads them alone."""
        return self._loaded[0] if self._loaded else self.load(lambda value: [value])

    @contextmanager
    def temporary(self) -> Iterator[Encoders]:
        """Yield the encoders; if they were not loaded before, they are dropped again afterwards."""
        before = list(self._loaded)
        try:
            yield self()
        finally:
            self._loaded = before


def to_video(pixels: torch.Tensor) -> torch.Tensor:
    """Return float32 [B, 3, T, H, W] in [-1, 1] of uint8 pixels [B, T, H, W, 3], bitwise equal to diffusers'."""
    return 2 * (rearrange(pixels, "b t h w c -> b c t h w").float() / 255) - 1


class EncoderInput(NamedTuple):
    """The encoders' input for n samples: video [n, 3, T, H, W] in [-1, 1]; captions; keys of their masks.

    The video is empty if no pixels were read (text encoders only).
    """

    video: torch.Tensor
    captions: Sequence[str]
    variants: Sequence[int]


@dataclass(frozen=True)
class EncodingSpec:
    """How one tensor of a sample is encoded and cached.

    Attributes:
        name: the tensor's name.
        uses: the parts of a SampleKey that the tensor depends on, as CacheField.uses.
        encode: a plain callable that encodes an EncoderInput of n samples, with gradients disabled. It returns n
            tensors in the order of the samples, as a sequence or as one tensor whose first dimension is n.
        shape: the shape of a sample's tensor, as a function of the bucket.
        dtype: the dtype of a sample's tensor.
        weights: the encoder's files and folders, hashed into the cache key.
        settings: everything else that the values depend on, hashed into the cache key.
        padded: zero rows at the tensor's end are not stored in the cache.
        trimmed: the first dimension may be smaller than `shape` returns.
        module: the encoder's attribute name among the family's encoders, "" if not known.
    """

    name: str
    uses: tuple[str, ...]
    encode: Callable[[EncoderInput], Sequence[torch.Tensor] | torch.Tensor]
    shape: Callable[[Bucket], tuple[int, ...]]
    dtype: torch.dtype
    weights: tuple[Path, ...]
    settings: str = ""
    padded: bool = False
    trimmed: bool = False
    module: str = ""

    def cache_field(self, memo: dict[str, Any]) -> CacheField:
        """Return the tensor's address in the cache; memo: as for fingerprint."""
        return CacheField(self.name, fingerprint(self.weights, f"{self.settings} {self.dtype}", memo), self.uses)

    def run(self, inputs: EncoderInput) -> Sequence[torch.Tensor] | torch.Tensor:
        """Call `encode`; an out-of-memory error inside names the encoder."""
        with memory_phase(f"the {ENCODER_NAMES.get(self.module, self.module.replace('_', ' ') or 'encoder')}"):
            return self.encode(inputs)

    def max_bytes(self, bucket: Bucket) -> int:
        """Return the maximum bytes of a sample's tensor."""
        return int(torch.Size(self.shape(bucket)).numel()) * self.dtype.itemsize

    def placeholder(self, bucket: Bucket) -> torch.Tensor:
        """Return zeros in place of a sample that does not count in the loss; no encoder is needed for them."""
        first, *rest = self.shape(bucket)
        return torch.zeros(1 if self.trimmed else first, *rest, dtype=self.dtype)

    def to_cache(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the form of a sample's tensor that is stored in the cache."""
        return trim_zeros(tensor) if self.padded else tensor

    def from_cache(self, tensor: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """Return a sample's tensor from the form that is stored in the cache."""
        return restore_zeros(tensor, self.shape(bucket)[0]) if self.padded else tensor


def fixed_shape(*sides: int) -> Callable[[Bucket], tuple[int, ...]]:
    """Return EncodingSpec.shape of a tensor whose shape does not depend on the bucket."""

    def shape(bucket: Bucket) -> tuple[int, ...]:
        del bucket
        return sides

    return shape


def latents_spec(
    name: str,
    uses: tuple[str, ...],
    encode: Callable[[EncoderInput], torch.Tensor],
    channels: int,
    weights: tuple[Path, ...],
    first_only: bool = False,
    vae_dtype: str = "fp32",
    ratios: Ratios = USUAL,
) -> EncodingSpec:
    """Return the EncodingSpec of a VAE's output: the first `channels` channels of [n, C, t, h, w], float32.

    Args:
        name: the tensor's name.
        uses: as EncodingSpec.uses.
        encode: returns the VAE's output [n, C, t, h, w] for n samples.
        channels: how many channels to keep.
        weights: the VAE's files and folders.
        first_only: the output has only the first latent frame.
        vae_dtype: a key of videox.encoders.vae.VAE_DTYPES; the outputs of each dtype are cached apart.
        ratios: of the model.
    """

    def shape(bucket: Bucket) -> tuple[int, ...]:
        frames, height, width = latent_shape(bucket, ratios)
        return channels, 1 if first_only else frames, height, width

    def encode_channels(inputs: EncoderInput) -> torch.Tensor:
        return encode(inputs)[:, :channels]

    # As it always was for float32: caches of earlier versions are read.
    settings = f"{channels} channels" + ("" if vae_dtype == "fp32" else f", VAE in {vae_dtype}")
    return EncodingSpec(name, uses, encode_channels, shape, torch.float32, weights, settings, module="vae")


class Encoder:
    """Encodes micro-batches, reads tensors from the cache and writes new ones to it.

    Args:
        specs: the tensors of the family and task, in any order.
        device: the device of the returned tensors.
        cache_view: the cache, with a CacheField for each spec that is cached; None encodes everything each time.
        encoders: the encoders with the modules that the specs name; each module is prefetched to the device while the
            previous one computes.
    """

    def __init__(
        self,
        specs: Sequence[EncodingSpec],
        device: torch.device,
        cache_view: CacheView | None = None,
        encoders: LazyEncoders[Any] | None = None,
    ) -> None:
        # The VAE is last because its activations take the most memory: by then no other encoder is on the device, and
        # none is being prefetched.
        self.specs, self.encoders = tuple(sorted(specs, key=lambda spec: spec.module == "vae")), encoders
        self.device = device
        self.cache_view = cache_view
        self.cache = cache_view.cache if cache_view is not None else None
        self._reported = len(self.cache.corrupted) if self.cache is not None else 0
        self.cache_fields = {field.name: field for field in cache_view.fields} if cache_view is not None else {}

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *raised: object) -> None:
        """Publish the entries that were made, also if the block failed."""
        if self.cache is not None:
            self.cache.publish()

    def __call__(self, batch: Batch, only: Collection[bytes] | None = None) -> dict[str, list[torch.Tensor]]:
        """Return each spec's tensor of each sample, on the device.

        Args:
            batch: as the dataset returns it.
            only: the cache keys that may be encoded and stored (None = all). Other tensors are zeros; for filling a
                cache.
        """
        video, encoded = _LazyVideo(batch, self.device), {}
        for spec, following in zip(self.specs, (*self.specs[1:], None), strict=True):
            if only is None and any(batch["real"]):
                self._prefetch(*(each for each in (spec, following) if each and each.name not in self.cache_fields))
            encoded[spec.name] = self._encode(spec, batch, video, only)
        return encoded

    @property
    def uncached(self) -> tuple[EncodingSpec, ...]:
        """The specs whose tensors are encoded each time, although there is a cache."""
        return tuple(spec for spec in self.specs if self.cache is not None and spec.name not in self.cache_fields)

    def _prefetch(self, *specs: EncodingSpec) -> None:
        """Start copying the modules of these specs to the device, in this order."""
        for spec in specs:
            if self.encoders is not None and spec.module:
                getattr(self.encoders(), spec.module).prefetch()

    def _encode(
        self, spec: EncodingSpec, batch: Batch, video: _LazyVideo, only: Collection[bytes] | None
    ) -> list[torch.Tensor]:
        name, bucket = spec.name, batch["bucket"]
        tensors: dict[int, torch.Tensor] = {}
        for place, real in enumerate(batch["real"]):
            if not real:
                tensors[place] = spec.placeholder(bucket)
            elif name in batch["cached"][place]:
                tensors[place] = spec.from_cache(batch["cached"][place][name], bucket)
            elif name in self.cache_fields:
                tensors |= self._from_cache(spec, batch, place, video, only)
            elif only is not None:  # filling a cache that does not have this tensor
                tensors[place] = spec.placeholder(bucket)
        missing = [place for place in range(len(batch["real"])) if place not in tensors]
        if missing:
            tensors |= dict(zip(missing, spec.run(video.select(missing)), strict=True))
        return [to_device(tensors[place], self.device) for place in range(len(tensors))]

    def _from_cache(
        self, spec: EncodingSpec, batch: Batch, place: int, video: _LazyVideo, only: Collection[bytes] | None
    ) -> dict[int, torch.Tensor]:
        """Return one sample's tensor: read if any process stored it meanwhile, otherwise encoded alone and stored."""
        sample = batch["sample_keys"][place]
        assert self.cache is not None and sample is not None
        field = self.cache_fields[spec.name]
        key = cache_key(field, sample)
        if only is not None and key not in only:
            return {place: spec.placeholder(batch["bucket"])}
        stored = self.cache.read(key)
        for line in self.cache.corruption_messages()[self._reported :]:
            sys.stderr.write(f"warning: {line}\n")
            self._reported += 1
        if stored is None:
            tensor = spec.run(video.select([place]))[0]
            stored = spec.to_cache(tensor).cpu()
            note = {"part": field.name, "encoder": field.encoder, "file": sample.file if field.needs_pixels else None}
            self.cache.put(key, stored, {**note, "size": sample.size, "mtime_ns": sample.mtime_ns})
        return {place: spec.from_cache(stored, batch["bucket"])}


class _LazyVideo:
    """The pixels of a micro-batch, copied to the device only when an encoder needs them."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self._video: torch.Tensor | None = None

    def select(self, places: Sequence[int]) -> EncoderInput:
        """Return the encoders' input for the samples at these places of the micro-batch."""
        batch = self._batch
        rows = [batch["decoded"].index(place) for place in places if place in batch["decoded"]]
        if self._video is None and rows:
            self._video = to_video(to_device(batch["pixels"], self._device))
        video = torch.empty(0)  # no pixels were read: text encoders only
        if self._video is not None:
            video = self._video if rows == list(range(len(self._video))) else self._video[rows]  # indexing copies
        return EncoderInput(video, [batch["captions"][p] for p in places], [batch["variants"][p] for p in places])
