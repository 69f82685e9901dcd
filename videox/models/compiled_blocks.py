"""Compilation of the repeated blocks by torch.compile (--compile), with a fallback to blocks that are not compiled.

What is compiled is the forward pass of each block alone, before the backend shards the model: the hooks by which FSDP
gathers a block's weights run outside of it. All blocks of a class have one graph, for all sizes of samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch.fx.experimental._config as shape_config
from torch import Tensor
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from videox.activity import ACTIVITY
from videox.models.activation_checkpoint import checkpoint_settings

# Graphs of a class of blocks: with and without gradients, with and without a mask, one sample or several, and the ways
# of --gradient_checkpointing_keep, among which --activation_memory may choose.
MOST_GRAPHS = 64
# bfloat16 results within a fused kernel are rounded as those of separate kernels are.
OPTIONS = {"emulate_precision_casts": True}
CAUSE_LENGTH = 160  # characters of a cause that are printed
COMPILING = "compilation"  # the section of the watchdog


class Compilation:
    """Whether blocks are compiled: until the first failure.

    Args:
        note: prints a line.
        backend: of torch.compile.
    """

    def __init__(self, note: Callable[[str], None], backend: str = "inductor") -> None:
        self.note, self.backend = note, backend
        self.failed = False
        self.proven: set[tuple[type, str]] = set()  # classes of blocks, with what they keep, that ran compiled

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function, compiled at its first call."""
        options: Any = OPTIONS if self.backend == "inductor" else None
        return torch.compile(function, fullgraph=True, dynamic=True, backend=self.backend, options=options)

    def fail(self, why: BaseException) -> None:
        """Note the failure, once."""
        if self.failed:
            return
        self.failed = True
        cause = " ".join(f"{type(why).__name__}: {why}".split())[:CAUSE_LENGTH]
        self.note(f"--compile: the blocks cannot be compiled here and run as without the flag ({cause})")


class CompiledForward:
    """The forward pass of a block: compiled, or as it was after a failure.

    Args:
        block: its forward method is called.
        compilation: shared by all blocks.
    """

    def __init__(self, block: torch.nn.Module, compilation: Compilation) -> None:
        self._block_class, self._compilation = type(block), compilation
        self._plain: dict[str, Callable[..., Any]] = {"": block.forward}
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._keep = ""

    @contextmanager
    def keeping(self, keep: str) -> Iterator[None]:
        """Checkpoint the block inside of the compiled function, which keeps what Recompute.keep names."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = ""

    def __call__(self, *inputs: Any) -> Any:  # noqa: ANN401 - of a block
        """Run the block."""
        keep = self._keep
        if keep not in self._plain:
            self._plain[keep] = partial(checkpoint, self._plain[""], **checkpoint_settings(keep))
        if keep not in self._compiled:
            self._compiled[keep] = self._compilation.compile(self._plain[keep])
        if self._compilation.failed:
            return self._plain[keep](*inputs)
        if (self._block_class, keep) not in self._compilation.proven:
            return self.probe(keep, *inputs)
        try:
            return self._compiled[keep](*tree_map(_without_base, inputs))
        except (TorchDynamoException, FailOnRecompileLimitHit) as why:  # raised before anything has run
            self._compilation.fail(why)
        return self._plain[keep](*inputs)

    def probe(self, keep: str, *inputs: Any) -> Any:  # noqa: ANN401 - of a block
        """Run the block compiled for the first time, or as it was if that fails, in whatever way.

        The first call compiles both passes and runs the kernels of one, which need a compiler, a writable cache, and
        a driver that fits; each may fail with errors of its own.
        """
        try:
            result = self._compiled[keep](*tree_map(_without_base, inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as why:  # noqa: BLE001 - as above
            self._compilation.fail(why)
            return self._plain[keep](*inputs)
        self._compilation.proven.add((self._block_class, keep))
        return result


class _WithoutBase(torch.autograd.Function):
    """A tensor as one that is no view, with the same memory and the same gradient."""

    @staticmethod
    def forward(ctx: Any, view: Tensor) -> Tensor:  # noqa: ANN401 - of torch
        """Return the tensor without its base."""
        del ctx
        return view.data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401 - of torch
        """Return the gradient as it is."""
        del ctx
        return gradients[0]


def _without_base(value: Any) -> Any:  # noqa: ANN401 - an input of a block
    """Return a view as a tensor that is none, with the same memory; anything else as it is.

    A graph holds for the sizes of an input's base, too, and for whether there is one. The angles of Wan's rotary
    embedding are a view of a tensor by frames, rows and columns, so that clips and images (one frame) would have a
    graph each. Where hooks handle saved tensors (--offload_activations), the inputs of a recomputed block are no
    views, so that both forward passes would have one.
    """
    if not isinstance(value, Tensor) or not value._is_view():
        return value
    return _WithoutBase.apply(value) if value.requires_grad else value.data


def compile_blocks(blocks: Sequence[torch.nn.Module], note: Callable[[str], None], backend: str = "inductor") -> None:
    """Compile the forward pass of repeated blocks, at their first call.

    Args:
        blocks: before they are sharded; LoRA adapters may be added to them later.
        note: prints a line if that fails.
        backend: of torch.compile.
    """
    # Equal sizes at the first call (frames and height, tokens of text and latents) are not taken to be always equal:
    # otherwise each new combination of sizes needs a graph.
    shape_config.use_duck_shape = False
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MOST_GRAPHS)
    # DDP's buckets would split the graphs; blocks are so small that their gradients are reduced in time.
    dynamo_config.optimize_ddp = False
    # With sizes that vary, torch would compile the backward pass when it runs, too late for the fallback.
    functorch_config.force_non_lazy_backward_lowering = True
    # torch warns of operators that write in place in a checkpoint, such as those of the rotary embedding; the tests
    # compare gradients.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if _note_begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_note_begin)
        callback_handler.register_end_callback(_note_end)
    compilation = Compilation(note, backend)
    for block in blocks:
        block.forward = CompiledForward(block, compilation)


def _note_begin(_: object) -> None:
    ACTIVITY.enter(COMPILING)


def _note_end(_: object) -> None:
    ACTIVITY.leave(COMPILING)
