"""Imports packages in a process of its own and reports what they say, as one line of JSON.

    python -m videox.doctor.probe torch | packages | deepspeed

A package that crashes, hangs or prints on import then ends this process and not the doctor.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from videox.errors import LOAD_ERRORS, UserError

IMPORT_ERRORS = (SyntaxError, *LOAD_ERRORS)
# What a train script imports; the name of the package where the module is called otherwise.
IMPORTED = (
    "numpy", "PIL", "av", "safetensors", "huggingface_hub", "tokenizers", "sentencepiece", "ftfy", "omegaconf", "yaml",
    "pyarrow", "pebble", "einops", "accelerate", "transformers", "peft", "diffusers",
)  # fmt: skip


def torch_facts() -> Mapping[str, Any]:
    """Return torch's version, devices and attention kernels; each kernel has run once on the first device."""
    import torch

    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    if torch.cuda.is_available():
        facts["architectures"] = torch.cuda.get_arch_list()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            facts["gpus"].append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as why:
            facts["error"] = str(why).splitlines()[0]
    facts["attention"] = _attention(torch.device("cuda" if facts["gpus"] else "cpu"))
    return facts


def _attention(device: Any) -> Mapping[str, str]:  # noqa: ANN401 - torch.device, which the type checker would import
    """Return for each kernel of scaled_dot_product_attention "" or why it does not run (bf16, heads of 128)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        kernels |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    found = {}
    for name, kernel in kernels.items():
        query = torch.ones(1, 2, 64, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        try:
            with sdpa_kernel([kernel]):
                torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
            found[name] = ""
        except (RuntimeError, AssertionError) as why:
            found[name] = str(why).splitlines()[0]
    return found


def package_facts() -> Mapping[str, str]:
    """Return for each imported package "" or the error that its import ends in."""
    facts = {}
    for name in IMPORTED:
        try:
            importlib.import_module(name)
            facts[name] = ""
        except IMPORT_ERRORS as why:
            facts[name] = f"{type(why).__name__}: {' '.join(str(why).split())}"
    return facts


def deepspeed_facts() -> Mapping[str, Any]:
    """Return DeepSpeed's version, where its extensions are built, which are, and locks of killed builds."""
    import os

    import deepspeed
    from deepspeed.ops.op_builder import CPUAdamBuilder

    from videox.distributed.build_lock import extensions_folder, refuse_stale_locks

    folder = extensions_folder(os.environ)
    built = sorted({path.parent.name for path in [*folder.glob("*/*.so"), *folder.glob("*/*/*.so")]})
    facts = {"version": deepspeed.__version__, "folder": str(folder), "built": built, "lock": ["", "", ""]}
    facts["cpu_adam"] = bool(CPUAdamBuilder().is_compatible(verbose=False))
    try:
        refuse_stale_locks(os.environ)
    except UserError as error:
        facts["lock"] = [error.where, error.what, error.hint]
    return facts


PROBES: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "torch": torch_facts,
    "packages": package_facts,
    "deepspeed": deepspeed_facts,
}


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # what packages print on import is not part of the answer
    out.write(f"{json.dumps(dict(PROBES[sys.argv[1]]()))}\n")
    out.flush()
