"""Tests of videox.training.data: which flags change the address of an encoder's outputs in the cache."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from videox.encoders.encode import EncodingSpec, fixed_shape, latents_spec
from videox.training.data import with_numerics

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def spec_of(module: str, dtype: torch.dtype, vae_dtype: str) -> EncodingSpec:
    if module == "vae":
        return latents_spec("moments", ("clip",), lambda _: torch.empty(0), 32, (), vae_dtype=vae_dtype)
    return EncodingSpec("embeds", ("caption",), lambda _: (), fixed_shape(8, 4), dtype, (), "8", module=module)


@pytest.mark.parametrize("vae_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", ["vae", "text_encoder", "image_encoder"])
def test_what_changes_an_output_changes_its_address(module: str, dtype: torch.dtype, vae_dtype: str) -> None:
    spec = spec_of(module, dtype, vae_dtype)

    def address(device: torch.device, *, tf32: bool = False, tiling: bool = False) -> str:
        args = Namespace(allow_tf32=tf32, vae_tiling=tiling, vae_dtype=vae_dtype)
        return with_numerics(args, spec, device).cache_field({}).encoder

    plain = spec.cache_field({}).encoder
    assert address(CPU) == address(GPU) == plain, "caches of earlier versions are read"
    assert address(CPU, tf32=True) == plain, "a CPU has no TensorFloat-32"
    in_float32 = vae_dtype == "fp32" if module == "vae" else dtype == torch.float32
    assert (address(GPU, tf32=True) != plain) == in_float32
    assert (address(GPU, tiling=True) != plain) == (module == "vae")
    assert len({address(GPU, tf32=a, tiling=b) for a in (False, True) for b in (False, True)}) == (
        (1 + in_float32) * (1 + (module == "vae"))
    )
