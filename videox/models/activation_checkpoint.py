"""Activation checkpointing: which blocks recompute their activations in the backward pass, and what they keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from videox.models.activation_offload import HostOffload
from videox.models.recompute import Recompute, select_blocks

# Forward operators of fused attention: torch's kernels, and those that flash-attn, xformers and the Hub's kernels
# register. Attention that is computed by matrix products (with the math backend) is recomputed as before.
ATTENTION_FORWARD = re.compile(
    r"aten::_scaled_dot_product_(flash|efficient|cudnn|fused)_?attention\w*"
    r"|\w*flash_?attn\w*::_?\w*(forward|fwd)\w*|xformers\w*::\w*(forward|fwd)\w*"
)


def is_attention_forward(name: str) -> bool:
    """Return whether an operator's qualified name, as in `aten::mm`, is the forward pass of fused attention."""
    return "backward" not in name and "bwd" not in name and ATTENTION_FORWARD.match(name) is not None


def keep_policy(keep: str, *details: Any, **settings: Any) -> CheckpointPolicy:  # noqa: ANN401 - of an operator
    """Return whether selective checkpointing keeps an operator's outputs; see Recompute.keep.

    Args:
        keep: "attention" or "self_attention".
        details: torch's context, the operator, and its positional arguments (query, key and value first).
        settings: the operator's keyword arguments.
    """
    _, operator, *inputs = details
    if not is_attention_forward(operator.name()):
        return CheckpointPolicy.PREFER_RECOMPUTE
    query, key = (
        inputs[position] if len(inputs) > position else settings[name]
        for position, name in enumerate(("query", "key"))
    )
    if keep == "self_attention" and query.shape != key.shape:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def checkpoint_settings(keep: str, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> dict[str, Any]:
    """Return the keywords of torch's checkpoint.

    Args:
        keep: see Recompute.keep.
        around: returns a context for each pass of a block, for operations that are not counted; used where something
            is kept.
    """
    if not keep:
        return {"use_reentrant": False}
    counted = partial(create_selective_checkpoint_contexts, partial(keep_policy, keep))
    context_fn = counted if around is nullcontext else lambda: tuple(_nested(around(), inner) for inner in counted())
    return {"use_reentrant": False, "context_fn": context_fn}


@contextmanager
def _nested(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    """Enter two contexts, the inner one last."""
    with outer, inner:
        yield


def checkpoint_blocks(
    model: Any,  # noqa: ANN401 - a diffusers model
    blocks: Sequence[torch.nn.Module],
    choose: Callable[[int, int], Recompute],
    offload: HostOffload | None = None,
) -> None:
    """Make a diffusers model recompute its blocks as chosen for each micro-batch. Gradients stay bit-identical.

    Args:
        model: a diffusers model with enable_gradient_checkpointing, whose blocks take the latents' tokens [B, S, D] as
            their first argument.
        blocks: the model's repeated blocks, in order.
        choose: from samples B and tokens S; called for each block of a forward pass, and a pure function.
        offload: moves the first input of checkpointed blocks to the host until the backward pass; None leaves it.
    """
    numbers = {id(block): number for number, block in enumerate(blocks)}
    selected = cache(lambda share: frozenset(select_blocks(len(blocks), share)))

    def run(block: Any, *inputs: Any) -> Any:  # noqa: ANN401 - a module
        recompute = choose(*inputs[0].shape[:2])
        checkpointed = selected(recompute.share)
        inner = block if id(block) in numbers else block.module  # FSDP1 wraps blocks
        if (number := numbers[id(inner)]) not in checkpointed:
            return block(*inputs)
        # the backward pass begins with the last block, so that its input would come back at once
        moved = offload.around(inputs[0]) if offload is not None and number < max(checkpointed) else nullcontext()
        compiled = getattr(inner.forward, "keeping", None)  # of videox.models.compiled_blocks
        with moved:
            if recompute.keep and compiled is not None:  # what is kept is decided inside of the compiled function
                with compiled(recompute.keep):
                    return block(*inputs)
            streamed = getattr(inner.forward, "on_device", nullcontext)  # of videox.models.streamed_blocks
            return checkpoint(block, *inputs, **checkpoint_settings(recompute.keep, streamed))

    model.enable_gradient_checkpointing(run)
