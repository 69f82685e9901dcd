"""Loads a transformer with quantised blocks, block by block: it is never whole in bfloat16 or float32."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from videox.models.base_precision import FP8, is_quantised
from videox.models.configured import Component
from videox.models.folder import has_nonfinite, nonfinite_error
from videox.models.meta_init import build_meta_model
from videox.models.quantised import QuantisedLinear
from videox.weights.reader import LayoutTensors
from videox.weights.safetensors_io import TensorSource

SEED = 0  # of the probe's random numbers
FRAMES, SIDE = 2, 16  # latent frames and pixels of the probe: 128 tokens
TEXT, TEXT_WITH_IMAGES = 32, 512  # text tokens; a model with an image embedder takes 512
IMAGE_TOKENS = 16
NAN = 0x7F  # bits of float8_e4m3fn without the sign
# mallopt(3) of glibc: the parameters, their values while a model is loaded, and the largest that glibc itself chooses
MMAP_THRESHOLD, TRIM_THRESHOLD, SMALL, LARGE = -3, -1, 128 * 2**10, 32 * 2**20

_Read = Callable[[nn.Module, str, Iterable[str]], None]
_Stored = Callable[[str], tuple[Tensor, Tensor] | None]


@dataclass
class QuantisationError:
    """What quantising changes: of each block's output, |quantised - bfloat16| / |bfloat16|, L2 norms.

    Both outputs are computed for the same input, which is the output of the bfloat16 block before.

    Attributes:
        of_blocks: in the order of the blocks.
    """

    of_blocks: list[float] = field(default_factory=list)

    def mean(self) -> float:
        """Return the root mean square over all blocks."""
        return math.sqrt(sum(error**2 for error in self.of_blocks) / len(self.of_blocks))

    def __str__(self) -> str:
        """Return it in words."""
        if not any(self.of_blocks):
            return "the weights are those of the file, which has them in 8 bits"
        worst = max(range(len(self.of_blocks)), key=self.of_blocks.__getitem__)
        return (
            f"the output of a block differs by {self.mean():.2%} from bfloat16, at most by {self.of_blocks[worst]:.2%} "
            f"(block {worst})"
        )


def load_quantised(
    model_class: Any,  # noqa: ANN401 - of diffusers
    component: Component,
    lists: Sequence[str],
    precision: str,
    device: torch.device,
) -> tuple[nn.Module, QuantisationError]:
    """Return a transformer in host memory with quantised linear layers in its blocks, and the error of that.

    Everything else is as a bfloat16 model has it. Each block is read and quantised on the device, where it runs twice:
    at no time are there more than one block's weights in bfloat16. Weights that a single file has in float8_e4m3fn,
    as ComfyUI writes them, are taken as they are in FP8, with the file's scale, and have no error.

    Args:
        model_class: a class of diffusers.
        component: the transformer's files.
        lists: names of the lists of repeated blocks, in the order in which they run.
        precision: FP8, INT8 or NF4.
        device: that quantises.

    Raises:
        UserError: the weights do not match the configuration, or are not finite.
    """
    source = component.source()
    model: Any = build_meta_model(model_class, source, component.inferred_config())
    # from_pretrained keeps some modules in float32; files of other layouts are read in one dtype
    fp32 = set(() if component.tensors is not None else model_class._keep_in_fp32_modules or ())
    read, stored = partial(_read, source, fp32, device), partial(_stored_values, source, precision)
    blocks = {f"{name}.{number}": block for name in lists for number, block in enumerate(getattr(model, name))}
    outside = [name for name, _ in model.named_parameters() if ".".join(name.split(".")[:2]) not in blocks]
    read(model, "", outside)
    for module in model.modules():  # not model.to(device): the blocks' parameters are on the meta device
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    error = QuantisationError()
    for name, block in blocks.items():
        reader = _BlockReader(name, block, read, stored, device)
        block.forward = LoadingForward(block, reader, reader.layers, precision, error)
    inputs = probe_inputs(model.config, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), tensors_mapped():
        model(**inputs)
    assert len(error.of_blocks) == len(blocks)  # otherwise weights are still on the meta device
    return model.to("cpu"), error


class LoadingForward:
    """The first forward pass of a block, which loads its weights, quantises them, and leaves it in host memory.

    Args:
        block: its forward method is replaced by this one, and is its class's own again afterwards.
        load: gives the block its weights in the dtype of computation, on the device; layers whose stored values are
            quantised already get them here.
        layers: returns the linear layers of the block that are to be quantised, by name, after `load`.
        precision: FP8, INT8 or NF4.
        error: the block's error is added to it.
    """

    def __init__(
        self,
        block: nn.Module,
        load: Callable[[], object],
        layers: Callable[[nn.Module], Mapping[str, nn.Linear]],
        precision: str,
        error: QuantisationError,
    ) -> None:
        self._block, self._load, self._layers, self._precision, self._error = block, load, layers, precision, error

    def __call__(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - of a block
        """Return the output of the block before it is quantised."""
        block: Any = self._block
        del block.forward  # the class's own again
        self._load()
        expected = block(*inputs, **named)
        self._error.of_blocks.append(relative_error(block(*inputs, **named), expected) if self._quantise() else 0.0)
        block.to("cpu")
        return_freed_memory()
        return expected

    def _quantise(self) -> bool:
        """Quantise the block's linear layers; return whether there are any."""
        layers = dict(self._layers(self._block))
        paths = list(layers)
        for path in paths:  # each layer's own weight is freed before the next one is quantised
            self._block.set_submodule(path, QuantisedLinear(layers.pop(path), self._precision))
            return_freed_memory()
        return bool(paths)


class _BlockReader:
    """Reads the weights of one block from the transformer's files.

    Args:
        name: of the block in the model.
        block: its parameters are on the meta device.
        read: reads parameters by their names in the block, as `_read`.
        stored: returns the quantised values and scale that the files have of a weight, or None.
        device: for the weights.
    """

    def __init__(self, name: str, block: nn.Module, read: _Read, stored: _Stored, device: torch.device) -> None:
        self._name, self._block, self._read, self._stored, self._device = name, block, read, stored, device

    def __call__(self) -> None:
        """Give the block its weights on the device; those that are quantised in the files stay as they are."""
        block = self._block
        for path, linear in self.layers(block).items():
            if (stored := self._stored(f"{self._name}.{path}.weight")) is not None:
                values, scale = (part.to(self._device) for part in stored)
                block.set_submodule(path, QuantisedLinear(linear, FP8, (values, scale)))
        names = [name for name, parameter in block.named_parameters() if parameter.is_meta]
        self._read(block, f"{self._name}.", names)

    def layers(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Return the linear layers of the block that are to be quantised and are not, by name."""
        found = {}
        for name, parameter in block.named_parameters():
            module = block.get_submodule(name.rpartition(".")[0])
            if is_quantised(name, parameter.shape) and not isinstance(module, QuantisedLinear):
                assert isinstance(module, nn.Linear)
                found[name.rpartition(".")[0]] = module
        return found


def _read(
    source: TensorSource, fp32: set[str], device: torch.device, module: nn.Module, prefix: str, names: Iterable[str]
) -> None:
    """Read parameters of a module in bfloat16, those of some modules in float32; prefix: of the names in the model."""
    for name in names:
        stored = source[f"{prefix}{name}"]
        if has_nonfinite(stored):
            raise nonfinite_error(f"{prefix}{name}", source.folder)
        dtype = torch.float32 if fp32 & {*f"{prefix}{name}".split(".")} else torch.bfloat16
        path, _, kind = name.rpartition(".")
        # a copy, also of a tensor that is mapped from its file in this dtype
        setattr(
            module.get_submodule(path), kind, nn.Parameter(stored.to(device, dtype, copy=True), requires_grad=False)
        )


def _stored_values(source: TensorSource, precision: str, name: str) -> tuple[Tensor, Tensor] | None:
    """Return values and scale of a weight as `quantise` does, if the file has it in FP8 and that is asked for."""
    stored = source.eight_bit(name) if precision == FP8 and isinstance(source, LayoutTensors) else None
    if stored is None:
        return None
    values, scale = stored
    if (values & NAN == NAN).any():
        raise nonfinite_error(name, source.folder)
    return values, torch.full((len(values), 1), scale)


@contextmanager
def tensors_mapped() -> Iterator[None]:
    """Let the C library map each large tensor by itself, so that its memory is the system's again when it is freed.

    glibc maps what is larger than a threshold, and raises the threshold with what is freed: then the temporary tensors
    of quantising leave gaps in the heap. A threshold that the user has set stays.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:  # as glibc has it after tensors of that size were freed
        library.mallopt(MMAP_THRESHOLD, LARGE)
        library.mallopt(TRIM_THRESHOLD, 2 * LARGE)


def return_freed_memory() -> None:
    """Return memory that was freed to the system, where the C library can.

    glibc keeps what lies between memory in use: temporary tensors, and the bfloat16 weights of one block between its
    quantised ones, which are smaller, so that the weights of the next block do not fit there.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def relative_error(found: Any, expected: Any) -> float:  # noqa: ANN401 - tensors, or tuples of them
    """Return |found - expected| / |expected| of all elements of all tensors, L2 norms."""
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(difference / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300))


def _tensors(output: Any) -> list[Tensor]:  # noqa: ANN401 - as above
    return [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]


def probe_inputs(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return keywords of a transformer's forward pass: one sample of normal numbers from a fixed seed.

    Args:
        config: the transformer's; its keys decide which inputs it takes.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    text = TEXT_WITH_IMAGES if config.get("image_dim") else TEXT
    given: dict[str, Any] = {
        "hidden_states": normal(1, config["in_channels"], FRAMES, SIDE, SIDE),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": normal(1, text, config.get("text_embed_dim") or config["text_dim"]),
        "return_dict": False,
    }
    if config.get("image_dim"):
        both = config.get("pos_embed_seq_len")  # tokens of the two pictures of a model for first and last frames
        shape = (2, both // 2) if both else (1, IMAGE_TOKENS)
        given["encoder_hidden_states_image"] = normal(*shape, config["image_dim"])
    if config.get("pooled_projection_dim"):
        given["encoder_attention_mask"] = torch.ones(1, text, device=device)
        given["pooled_projections"] = normal(1, config["pooled_projection_dim"])
        if config.get("guidance_embeds"):
            given["guidance"] = torch.tensor([6000.0], device=device)
    return given
