"""Tensor helpers for tests: bitwise comparison, and the devices to test on."""

from __future__ import annotations

import torch

# For torch "cpu:0" is another device than "cpu": `.to` copies host tensors to it. Copies between host and device can
# therefore be tested without an accelerator; if there is one, it is tested, too.
DEVICES = [torch.device("cpu:0"), *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Return whether names, dtypes, shapes and bytes are equal; NaN equals itself."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(right[name].contiguous().view(-1).view(torch.uint8))
        for name in left
    )
