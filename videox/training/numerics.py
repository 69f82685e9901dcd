"""The settings of torch that decide how float32 is computed on a GPU, and whether results repeat bit for bit."""

from __future__ import annotations

import argparse

import torch
import torch.utils.deterministic


def apply_numerics(args: argparse.Namespace) -> None:
    """Apply --allow_tf32 and --deterministic to this process.

    --allow_tf32 governs matrix products alone. Convolutions, which are most of a VAE, use TF32 by torch's own default:
    without it a float32 VAE of 81 frames would take longer than a whole step of the 1.3B model.
    """
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.deterministic:
        make_deterministic()


def make_deterministic() -> None:
    """Make torch use deterministic algorithms on GPUs, or raise RuntimeError in an operation that has none.

    The backward pass of attention adds gradients in varying order in cuDNN's kernel, and in torch's other kernels
    unless they are asked not to: cuDNN's is switched off, and the others then take their deterministic variant.
    DeepSpeed's, torchao's and bitsandbytes' own kernels do not read these settings. That two runs on a GPU are equal
    can be tested on a GPU alone.

    cuBLAS needs a variable in addition: see videox.distributed.cuda_variables.
    """
    torch.use_deterministic_algorithms(True)
    # Reading uninitialized memory would be an error of its own; filling all of it costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
