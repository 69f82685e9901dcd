"""Loads a transformer with quantised blocks, block by block: it is never whole in bfloat16 or float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from videox.models.base_precision import is_quantised
from videox.models.configured import Component
from videox.models.folder import has_nonfinite, nonfinite_error
from videox.models.meta_init import build_meta_model
from videox.models.quantised import QuantisedLinear
from videox.weights.safetensors_io import TensorSource

SEED = 0  # of the probe's random numbers
FRAMES, SIDE = 2, 16  # latent frames and pixels of the probe: 128 tokens
TEXT, TEXT_WITH_IMAGES = 32, 512  # text tokens; a model with an image embedder takes 512
IMAGE_TOKENS = 16


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
    at no time are there more than one block's weights in bfloat16.

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
    blocks = {f"{name}.{number}": block for name in lists for number, block in enumerate(getattr(model, name))}
    outside = (name for name, _ in model.named_parameters() if ".".join(name.split(".")[:2]) not in blocks)
    _read(model, "", outside, source, fp32, device)
    for module in model.modules():  # not model.to(device): the blocks' parameters are on the meta device
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    error = QuantisationError()
    for name, block in blocks.items():
        block.forward = _LoadingForward(name, block, source, fp32, precision, device, error)
    inputs = probe_inputs(model.config, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        model(**inputs)
    assert len(error.of_blocks) == len(blocks)  # otherwise weights are still on the meta device
    return model.to("cpu"), error


class _LoadingForward:
    """The first forward pass of a block, which reads its weights, quantises them, and leaves it in host memory."""

    def __init__(
        self, name: str, block: nn.Module, source: TensorSource, fp32: set[str], precision: str, device: torch.device,
        error: QuantisationError,
    ) -> None:  # fmt: skip
        self._name, self._block, self._source, self._fp32 = name, block, source, fp32
        self._precision, self._device, self._error = precision, device, error

    def __call__(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - of a block
        """Return the output of the bfloat16 block."""
        block: Any = self._block
        del block.forward  # the class's own again
        names = [name for name, _ in block.named_parameters()]
        _read(block, f"{self._name}.", names, self._source, self._fp32, self._device)
        expected = block(*inputs, **named)
        for name, shape in [(name, parameter.shape) for name, parameter in block.named_parameters()]:
            if is_quantised(name, shape):
                path, _, _ = name.rpartition(".")
                linear = block.get_submodule(path)
                block.set_submodule(path, QuantisedLinear(linear, self._precision))
        self._error.of_blocks.append(relative_error(block(*inputs, **named), expected))
        block.to("cpu")
        return expected


def _read(
    module: nn.Module, prefix: str, names: Iterator[str] | Sequence[str], source: TensorSource, fp32: set[str],
    device: torch.device,
) -> None:  # fmt: skip
    """Read parameters of a module in bfloat16, those of some modules in float32; prefix: of the names in the model."""
    for name in list(names):
        stored = source[f"{prefix}{name}"]
        if has_nonfinite(stored):
            raise nonfinite_error(f"{prefix}{name}", source.folder)
        dtype = torch.float32 if fp32 & {*f"{prefix}{name}".split(".")} else torch.bfloat16
        path, _, kind = name.rpartition(".")
        # a copy, also of a tensor that is mapped from its file in this dtype
        setattr(
            module.get_submodule(path), kind, nn.Parameter(stored.to(device, dtype, copy=True), requires_grad=False)
        )


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
        given["encoder_hidden_states_image"] = normal(1, IMAGE_TOKENS, config["image_dim"])
    if config.get("pooled_projection_dim"):
        given["encoder_attention_mask"] = torch.ones(1, text, device=device)
        given["pooled_projections"] = normal(1, config["pooled_projection_dim"])
        if config.get("guidance_embeds"):
            given["guidance"] = torch.tensor([6000.0], device=device)
    return given
