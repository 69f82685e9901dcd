"""Flags of speed and activation memory, one row each: what is equal, counted on a CPU, and what a GPU should gain.

    python benchmarks/gpu_flags.py [--markdown benchmarks/gpu_flags.md] [--compiled]

Gradients, graphs, bytes between the two passes and forward passes of attention are counted with small models of the
real classes. Times and memory at the published widths are computed as in a dry run
(videox/estimate/step_time.py); no GPU is needed.
--compiled also counts --compile, which needs a C++ compiler and minutes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import videox  # noqa: F401 - before the libraries, whose warnings it filters

# isort: split

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from gpu.full_step import FLAGS, FULL, Computed, Flag, compute
from gpu.report import table
from gpu.scales import REAL, SMALL
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from videox.estimate.gpus import GPUS
from videox.estimate.rates import rates_of
from videox.models.activation_checkpoint import is_attention_forward
from videox.models.activation_offload import HostOffload
from videox.shapes import Bucket, token_count

CLIP = Bucket(93, 480, 832)  # 37,440 tokens, the shape of published MFU figures
MODELS = {"Wan2.1 1.3B": REAL.wan["Wan2.1 1.3B"], "Wan2.1 14B": REAL.wan["Wan2.1 14B"], "HunyuanVideo": REAL.hunyuan}
SMALL_MODELS = {"Wan2.1": SMALL.wan["Wan2.1 1.3B"], "HunyuanVideo": SMALL.hunyuan}
SMALL_TEXT = 12
GPU = "h100"
FIRST, OTHERS = (3, 8), ((5, 6), (2, 12), (4, 10))  # latent frames and sides of the clips; the first one is counted


# --------------------------------------------------------------------------------------------------------- counted


class Watch(TorchDispatchMode):
    """Counts forward passes of attention, and knows which tensors were made."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return that functions are compiled also while this mode is active."""
        return True

    def __torch_dispatch__(self, function, types, inputs=(), settings=None):  # noqa: ANN001, ANN204 - of torch
        self.attention += is_attention_forward(function.name())
        result = function(*inputs, **(settings or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: Tensor) -> None:
        """Remember a tensor's memory."""
        storage = tensor.untyped_storage()
        self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def bytes_alive(self) -> int:
        """Return the bytes of all memory that was made and is still in use."""
        return sum(size for storage, size in self.made.values() if not storage.expired())


def build(config: Mapping[str, Any]) -> tuple[Any, Callable[[Any], list[nn.Module]]]:
    """Return a transformer in training, and a function that returns the blocks of one."""
    torch.manual_seed(0)
    if "num_single_layers" in config:
        return HunyuanVideoTransformer3DModel(**config).train(), lambda m: [
            *m.transformer_blocks,
            *m.single_transformer_blocks,
        ]
    return WanTransformer3DModel(**config).train(), lambda m: list(m.blocks)


def inputs_of(config: Mapping[str, Any], frames: int, side: int) -> dict[str, Any]:
    """Return the keywords of one sample."""
    generator, joint = torch.Generator().manual_seed(1), "num_single_layers" in config
    text = config["text_embed_dim" if joint else "text_dim"]
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, config["in_channels"], frames, side, 8, generator=generator),
        "timestep": torch.full((1,), 500.0), "return_dict": False,
        "encoder_hidden_states": torch.randn(1, SMALL_TEXT, text, generator=generator),
    }  # fmt: skip
    if joint:
        given |= {
            "encoder_attention_mask": torch.ones(1, SMALL_TEXT), "guidance": torch.full((1,), 6000.0),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"], generator=generator),
        }  # fmt: skip
    return given


def run(
    model: Any,  # noqa: ANN401 - of diffusers
    given: dict[str, Any],
    offload: HostOffload | None = None,
    *,
    half: bool = True,
) -> tuple[Tensor, int, int, int]:
    """Run a step; return gradients, bytes on the device between the passes, attention forwards, bytes on the host.

    half: in bfloat16, otherwise in float32.
    """
    model.zero_grad(set_to_none=True)
    before = offload.moved_bytes if offload else 0

    def keep(tensor: Tensor) -> Tensor:
        watch.note(tensor)
        return tensor

    with Watch() as watch:
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            prediction = model(**given)[0]
        for parameter in (
            *model.parameters(),
            *model.buffers(),
            *(v for v in given.values() if isinstance(v, Tensor)),
        ):
            watch.made.pop(parameter.untyped_storage()._cdata, None)
        host = offload.moved_bytes - before if offload else 0
        device = watch.bytes_alive() - host
        prediction.float().square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return gradients, device, watch.attention, host


@dataclass(frozen=True)
class Counted:
    """What was counted of a flag. difference, exact: of gradients in bfloat16 and float32, relative."""

    model: str
    flag: Flag
    difference: float
    exact: float
    graphs: tuple[int, int]
    device: int
    host: int
    attention: int


def count(flags: Sequence[Flag]) -> list[Counted]:
    """Count every flag for each small model; differences are those from --gradient_checkpointing."""
    found = []
    for name, config in SMALL_MODELS.items():
        plain, blocks_of = build(config)
        plain.enable_gradient_checkpointing()
        for flag in flags:
            torch._dynamo.reset()
            counters.clear()
            model, notes = copy.deepcopy(plain), list[str]()
            offload = flag.apply(model, blocks_of(model), notes, torch.device("cpu"))
            reference = run(plain, inputs_of(config, *FIRST))[0]
            gradients, device, attention, host = run(model, inputs_of(config, *FIRST), offload)
            graphs = [counters["stats"]["unique_graphs"]]
            for clip in OTHERS:
                run(model, inputs_of(config, *clip), offload)
                graphs.append(counters["stats"]["unique_graphs"])
            torch._dynamo.reset()  # the graphs of another dtype are none of those
            exact, expected = (run(each, inputs_of(config, *FIRST), half=False)[0] for each in (model, plain))
            if notes:
                raise RuntimeError(notes[0])
            differences = (float((a - b).norm() / b.norm()) for a, b in ((gradients, reference), (exact, expected)))
            found.append(Counted(name, flag, *differences, (graphs[1], graphs[-1]), device, host, attention))
    return found


# ------------------------------------------------------------------------------------------------------------ page


def counted_table(rows: Sequence[Counted]) -> list[str]:
    """Return the table of what was counted."""
    lines = []
    for row in rows:
        equal = ["bit-identical" if found == 0 else f"within {found:.1e}" for found in (row.difference, row.exact)]
        graphs = f"{row.graphs[0]}, {row.graphs[1]}" if row.flag.compiled else "none"
        cells = [row.model, f"`{row.flag.flags}`" if row.flag.flags != "none" else "none", *equal, graphs]
        lines.append([*cells, f"{row.device:,}", f"{row.host:,}", str(row.attention)])
    header = [
        "model",
        "flags",
        "gradients",
        "in float32",
        "graphs after 2 and 4 sizes",
        "bytes between the passes",
        "bytes on the host",
    ]
    return table([*header, "attention forwards"], lines)


def computed_table(name: str, rows: Sequence[Computed], flags: Sequence[Flag]) -> list[str]:
    """Return the table of a model at the published width."""
    base = next(row for row, flag in zip(rows, flags, strict=True) if flag.flags == FULL)
    lines = [
        [
            f"`{flag.flags}`" if flag.flags != "none" else "none", f"{row.seconds:.2f}", f"{row.mfu:.1%}",
            f"{1 - row.seconds / base.seconds:+.1%}", f"{row.activations:.1f}", f"{row.host:.1f}",
        ]
        for row, flag in zip(rows, flags, strict=True)
    ]  # fmt: skip
    return table([name, "s per step", "MFU", "time saved", "activations, GiB", "on the host, GiB"], lines)


def page(counted: Sequence[Counted], computed: Mapping[str, Sequence[Computed]]) -> str:
    """Return the report in Markdown."""
    size = f"{CLIP.frames} x {CLIP.height} x {CLIP.width} ({token_count(CLIP):,} tokens)"
    compiled = " --compiled" if any(row.flag.compiled for row in counted) else ""
    text = [
        "# Flags of speed and activation memory", "",
        f"Written by `python benchmarks/gpu_flags.py{compiled} --markdown benchmarks/gpu_flags.md`. Nothing was measured on a GPU.", "",
        "## Counted on a CPU", "",
        "Small models of the real classes in bfloat16. Gradients are compared with those of `--gradient_checkpointing` in the same",
        "dtype; bytes are those of tensors that exist between the two passes, without weights and inputs (of compiled blocks those",
        "that autograd saves). HunyuanVideo's two attentions of the text refiner are not recomputed.", "", *counted_table(counted), "",
        f"## Computed for one {GPU.upper()}, one clip of {size}", "",
        f"A whole step with float32 weights and AdamW, as the dry run computes it. {rates_of(GPUS[GPU], GPU).words()}.",
        "Compiled: all operators between two matrix products are one kernel, which is the most that compilation can give. MFU counts the",
        "model's own FLOPs, without recomputation. Activations are the dry run's estimate.", "",
    ]  # fmt: skip
    for name, rows in computed.items():
        text += [*computed_table(name, rows, FLAGS), ""]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="Markdown file to write (default: print only)")
    parser.add_argument("--compiled", action="store_true", help="also count --compile")
    args = parser.parse_args(argv)
    counted = count([flag for flag in FLAGS if args.compiled or not flag.compiled])
    report = page(counted, {name: compute(config, CLIP, FLAGS, GPU) for name, config in MODELS.items()})
    print(report)
    if args.markdown:
        args.markdown.write_text(report, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
