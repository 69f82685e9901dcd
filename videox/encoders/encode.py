"""Serves both train.py scripts: what frozen encoders make of a micro-batch, made once and kept where a cache is given.

Each tensor has a recipe. Without a cache all samples of a micro-batch are encoded together, in parts of
--vae_mini_batch; with one each is encoded alone, so that an entry never depends on a sample's neighbours. Encoders are
loaded by the first recipe that runs: a run whose every tensor is in the cache loads none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from videox.data.cache.cache import CacheField, CacheView, fingerprint, key_of, restore_zeros, trim_zeros
from videox.data.dataset import Batch
from videox.device import to_device
from videox.encoders.vae import to_video
from videox.shapes import Bucket, latent_shape

Kind = TypeVar("Kind")
Gather = Callable[[Any], list[Any]]


class LazyEncoders(Generic[Kind]):
    """The frozen encoders, loaded when they are first asked for.

    Args:
        load: loads them, from a collective by which the processes of a machine share them in its memory.
    """

    def __init__(self, load: Callable[[Gather], Kind]) -> None:
        self._load = load
        self._loaded: list[Kind] = []

    def load(self, gather: Gather) -> Kind:
        """Loads them on all processes together, which share the memory."""
        self._loaded = [self._load(gather)]
        return self._loaded[0]

    def __call__(self) -> Kind:
        """Returns them, loaded by this process alone if they were not there."""
        return self._loaded[0] if self._loaded else self.load(lambda mine: [mine])

    @contextmanager
    def for_a_while(self) -> Iterator[Kind]:
        """Yields them; if they were not there before, they are gone again afterwards."""
        before = list(self._loaded)
        try:
            yield self()
        finally:
            self._loaded = before


class EncoderInput(NamedTuple):
    """What encoders see of some samples: video [n, 3, T, H, W] in [-1, 1]; captions; keys of their masks."""

    video: torch.Tensor
    captions: Sequence[str]
    variants: Sequence[int]


@dataclass(frozen=True)
class EncodingSpec:
    """How a tensor of a sample is made.

    name: of the tensor; uses: what it depends on, as Part's; encode: makes one tensor for each sample; shape: of such
    a tensor, by bucket, and its dtype; weights: files and folders of the encoder; settings: what else its numbers
    depend on; padded: zero rows at its end are not kept; trimmed: its first side may be shorter than `shape` says;
    module: the encoder, as its family names it among its encoders ("" = not known).
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

    def part(self, memo: dict[str, Any]) -> CacheField:
        """Returns its address; memo: as fingerprint's."""
        return CacheField(self.name, fingerprint(self.weights, f"{self.settings} {self.dtype}", memo), self.uses)

    def size(self, bucket: Bucket) -> int:
        """Returns the bytes of a sample's tensor, at most."""
        return int(torch.Size(self.shape(bucket)).numel()) * self.dtype.itemsize

    def nothing(self, bucket: Bucket) -> torch.Tensor:
        """Returns what stands for a sample that counts nothing: zeros, for which no encoder is needed."""
        first, *rest = self.shape(bucket)
        return torch.zeros(1 if self.trimmed else first, *rest, dtype=self.dtype)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what is kept of a sample's tensor."""
        return trim_zeros(tensor) if self.padded else tensor

    def restored(self, tensor: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """Returns a sample's tensor of what was kept."""
        return restore_zeros(tensor, self.shape(bucket)[0]) if self.padded else tensor


def latents_spec(
    name: str,
    uses: tuple[str, ...],
    encode: Callable[[EncoderInput], torch.Tensor],
    channels: int,
    weights: tuple[Path, ...],
    first_only: bool = False,
) -> EncodingSpec:
    """Returns the Recipe of what a VAE makes of a sample: the first `channels` of [n, C, t, h, w], float32.

    first_only: of the first latent frame alone.
    """

    def shape(bucket: Bucket) -> tuple[int, ...]:
        frames, height, width = latent_shape(bucket)
        return channels, 1 if first_only else frames, height, width

    settings = f"{channels} channels"
    return EncodingSpec(
        name, uses, lambda raw: encode(raw)[:, :channels], shape, torch.float32, weights, settings, module="vae"
    )


class Encoder:
    """Makes, finds and keeps the tensors of micro-batches.

    Args:
        recipes: of the family and task, in any order.
        device: where tensors are wanted.
        shelf: where they are kept, with a part for each recipe; None encodes everything each time.
        encoders: with the modules that recipes name; each is then called while the one before it computes.
    """

    def __init__(
        self,
        recipes: Sequence[EncodingSpec],
        device: torch.device,
        shelf: CacheView | None = None,
        encoders: LazyEncoders[Any] | None = None,
    ) -> None:
        # The VAE comes last, whose work takes the most memory: no other encoder is there then, or on its way.
        self.recipes, self.encoders = tuple(sorted(recipes, key=lambda recipe: recipe.module == "vae")), encoders
        self.device = device
        self.shelf = shelf
        self.cache = shelf.cache if shelf is not None else None
        self._told = len(self.cache.damaged) if self.cache is not None else 0
        self.parts = {part.name: part for part in shelf.parts} if shelf is not None else {}

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *raised: object) -> None:
        """Publishes what was made, also when the block failed."""
        if self.cache is not None:
            self.cache.publish()

    def __call__(self, batch: Batch, only: Collection[bytes] | None = None) -> dict[str, list[torch.Tensor]]:
        """Returns each recipe's tensor of each sample, on the device.

        Args:
            batch: as the dataset reads it.
            only: the keys that may be made and kept (None = all); others are left empty, for who wants to fill only.
        """
        video, made = _Video(batch, self.device), {}
        for recipe, following in zip(self.recipes, (*self.recipes[1:], None), strict=True):
            if self.cache is None and any(batch["real"]):
                self._call(recipe, following)
            made[recipe.name] = self._tensors(recipe, batch, video, only)
        return made

    def _call(self, *recipes: EncodingSpec | None) -> None:
        """Has the modules of these recipes come to the device, in this order."""
        for recipe in recipes:
            if self.encoders is not None and recipe is not None and recipe.module:
                getattr(self.encoders(), recipe.module).prefetch()

    def _tensors(
        self, recipe: EncodingSpec, batch: Batch, video: _Video, only: Collection[bytes] | None
    ) -> list[torch.Tensor]:
        name, bucket = recipe.name, batch["bucket"]
        made: dict[int, torch.Tensor] = {}
        for place, real in enumerate(batch["real"]):
            if not real:
                made[place] = recipe.nothing(bucket)
            elif name in batch["found"][place]:
                made[place] = recipe.restored(batch["found"][place][name], bucket)
            elif self.cache is not None:
                made |= self._from_cache(recipe, batch, place, video, only)
        missing = [place for place in range(len(batch["real"])) if place not in made]
        if missing:
            made |= dict(zip(missing, recipe.encode(video.of(missing)), strict=True))
        return [to_device(made[place], self.device) for place in range(len(made))]

    def _from_cache(
        self, recipe: EncodingSpec, batch: Batch, place: int, video: _Video, only: Collection[bytes] | None
    ) -> dict[int, torch.Tensor]:
        """Returns one sample's tensor: kept meanwhile by this process or another, else made alone, and kept."""
        facts = batch["facts"][place]
        assert self.cache is not None and facts is not None
        part = self.parts[recipe.name]
        key = key_of(part, facts)
        if only is not None and key not in only:
            return {place: recipe.nothing(batch["bucket"])}
        found = self.cache.read(key)
        for line in self.cache.damage()[self._told :]:
            sys.stderr.write(f"warning: {line}\n")
            self._told += 1
        if found is None:
            tensor = recipe.encode(video.of([place]))[0]
            found = recipe.stored(tensor).cpu()
            note = {"part": part.name, "encoder": part.encoder, "file": facts.file if part.sees_pixels else None}
            self.cache.put(key, found, {**note, "size": facts.size, "mtime_ns": facts.mtime_ns})
        return {place: recipe.restored(found, batch["bucket"])}


class _Video:
    """The pixels of a micro-batch, brought to the device only when somebody wants to see them."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self._video: torch.Tensor | None = None

    def of(self, places: Sequence[int]) -> EncoderInput:
        """Returns what encoders see of the samples in these places."""
        batch = self._batch
        read = [batch["decoded"].index(place) for place in places if place in batch["decoded"]]
        if self._video is None and read:
            self._video = to_video(to_device(batch["pixels"], self._device))
        video = torch.empty(0)  # of text alone
        if self._video is not None:
            video = self._video if read == list(range(len(self._video))) else self._video[read]
        return EncoderInput(video, [batch["captions"][p] for p in places], [batch["variants"][p] for p in places])
