"""Environment variables that CUDA libraries read when they start: defaults for training, set before torch loads."""

from __future__ import annotations

from collections.abc import MutableMapping

from videox.errors import UserError

# Of torch's memory allocator. torch 2.13 reads the name of one vendor first, so that a new value under the general
# name would have no effect beside an old one, and the user's value counts under each of them.
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Buckets differ in size. Blocks of fixed segments would rarely fit the next micro-batch; segments that grow do.
EXPANDABLE = "expandable_segments:True"
# The sizes of cuBLAS's workspace with which its results are deterministic, according to cuBLAS's documentation.
CUBLAS, DETERMINISTIC_SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def set_cuda_variables(environment: MutableMapping[str, str], *, deterministic: bool) -> None:
    """Set the allocator's and cuBLAS's variables, unless the user has set them; a second call changes nothing.

    Args:
        environment: of this process, in which CUDA has not started.
        deterministic: the run has --deterministic.

    Raises:
        UserError: the user's CUBLAS_WORKSPACE_CONFIG contradicts --deterministic.
    """
    if not any(environment.get(name) for name in ALLOCATOR_NAMES):
        environment[ALLOCATOR] = EXPANDABLE
    if not deterministic:
        return
    value = environment.setdefault(CUBLAS, DETERMINISTIC_SIZES[0])
    if value not in DETERMINISTIC_SIZES:
        what = f"{value!r}: with it cuBLAS is not deterministic, which --deterministic needs"
        raise UserError(CUBLAS, what, f"unset it, or set it to {' or '.join(DETERMINISTIC_SIZES)}")
