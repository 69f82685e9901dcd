"""Sharded checkpoints for tests: real DeepSpeed and FSDP checkpoints, and synthetic ZeRO files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import forkserver
import torch
from torch import Tensor, nn

TIME_LIMIT = 400.0  # seconds; the first run in an environment compiles DeepSpeed's CPU extension
TAG = "pytorch_model"  # the name that accelerate uses
STEPS = (1, 2)  # a checkpoint is saved after each
FROZEN = "blocks.0.attn1"
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 33,  # odd, so that shards need padding
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


# ------------------------------------------------------------------------------------------------ real engines


def make_real(folder: Path) -> None:
    """Write FOLDER/zero2, zero3 (checkpoint-1 and -2 each) and fsdp1, fsdp2 (checkpoint-2 each) with two ranks."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja is in the interpreter's folder
    ranks = forkserver.shared().start_ranks(
        2, [str(folder)], folder / "log", ["shard_maker:train_and_save"] * 2, {"PATH": path, "DS_ACCELERATOR": "cpu"}
    )
    assert [rank.wait(TIME_LIMIT) for rank in ranks] == [0, 0], "\n".join(rank.output()[-4000:] for rank in ranks)


def build() -> nn.Module:
    """Build a Wan2.1 with frozen parameters, a parameter under two names, and buffers of three kinds."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**TINY)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(FROZEN not in name)
    model.twin = nn.Linear(24, 24, bias=False)
    model.twin.weight = model.blocks[1].attn1.to_q.weight
    model.register_buffer("count", torch.arange(5) + 2**40)
    model.register_buffer("flag", torch.tensor([True, False, True]))
    model.register_buffer("gain", torch.tensor([1.001, float("-inf")]))
    return model


def _loss(model: nn.Module, dtype: torch.dtype) -> Tensor:
    latents = torch.randn(1, 16, 1, 8, 8, dtype=dtype)
    return model(latents, torch.tensor([500]), torch.randn(1, 4, 32, dtype=dtype)).sample.float().pow(2).mean()


def _train_zero(stage: int, folder: Path) -> None:
    import deepspeed

    model = build()
    config = model.to_json_string()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "sub_group_size": 4000},  # several flat groups per rank under ZeRO-3
        "zero_allow_untested_optimizer": True,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    large = [parameter for parameter in trained if parameter.ndim > 1]
    groups = [{"params": large}, {"params": [p for p in trained if p.ndim <= 1], "lr": 2e-3}]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=settings)
    for step in STEPS:
        engine.backward(_loss(engine, torch.bfloat16))
        engine.step()
        checkpoint = folder / f"checkpoint-{step}"
        engine.save_checkpoint(str(checkpoint), TAG)
        if engine.global_rank == 0:
            (checkpoint / "transformer").mkdir()
            (checkpoint / "transformer" / "config.json").write_text(config, encoding="utf-8")
    engine.destroy()


def _save_fsdp(version: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
    from torch.distributed.tensor import Shard

    model = build()
    model.gain.fill_(1.001)  # these files do not mark buffers, and parameters must be finite
    reference = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    config = model.to_json_string()
    shards = folder / "checkpoint-2" / "pytorch_model_fsdp_0"
    if version == 1:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            dcp.save({"model": model.state_dict()}, checkpoint_id=shards)
    else:
        # Matrices are sharded by columns, so a shard is not contiguous in the full tensor; others unevenly by rows.
        fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % 2 == 0 else None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        _loss(model, torch.float32).backward()
        dcp.save({"model": model.state_dict()}, checkpoint_id=shards)
        optimizer.step()
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / "checkpoint-2" / "optimizer_0")
        dcp.save(reference | {"only": {"nested": reference["gain"]}}, checkpoint_id=folder / "bare")
    if torch.distributed.get_rank() == 0:
        torch.save(reference, folder / "reference.pt")
        (folder / "checkpoint-2" / "config.json").write_text(config, encoding="utf-8")


def train_and_save() -> int:
    """Train a small Wan2.1 under each backend and save it in the folder of the first flag; entry point of a rank."""
    folder = Path(sys.argv[1])
    import deepspeed

    deepspeed.init_distributed("gloo")
    for stage in (2, 3):
        _train_zero(stage, folder / f"zero{stage}")
    for version in (1, 2):
        _save_fsdp(version, folder / f"fsdp{version}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


# -------------------------------------------------------------------------------------------- synthetic files


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(-tensor.numel() % multiple)])


def _flat_stage_2(
    groups: Sequence[Mapping[str, Tensor]], world: int, gap: int
) -> tuple[list[list[Tensor]], list[list[int]]]:
    """Return each rank's piece of each group, and the padding after each parameter, in the layout of the engine."""
    pieces: list[list[Tensor]] = [[] for _ in range(world)]
    paddings = [[gap * (i % 2) for i, _ in enumerate(group)] for group in groups]
    for group, sizes in zip(groups, paddings, strict=True):
        parts = [torch.cat([t.reshape(-1), t.new_zeros(size)]) for t, size in zip(group.values(), sizes, strict=True)]
        for rank, piece in enumerate(_padded(torch.cat(parts), 2 * world).chunk(world)):
            pieces[rank].append(piece.clone())
    return pieces, paddings


def _flat_stage_3(groups: Sequence[Mapping[str, Tensor]], world: int, sub_groups: int) -> list[list[Tensor]]:
    pieces: list[list[Tensor]] = []
    for rank in range(world):
        parts = []
        for tensor in (tensor for group in groups for tensor in group.values()):
            share = math.ceil(tensor.numel() / world)
            parts.append(_padded(tensor.reshape(-1), world)[rank * share : (rank + 1) * share])
        size = math.ceil(len(parts) / sub_groups)  # a flat group ends where a parameter ends
        pieces.append([torch.cat(parts[i : i + size]) for i in range(0, len(parts), size)])
    return pieces


def write_zero(
    folder: Path,
    groups: Sequence[Mapping[str, Tensor]],
    *,
    stage: int,
    world: int,
    frozen: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    gap: int = 0,
    sub_groups: int = 1,
    step: int = 7,
    moments: bool = False,
    pickled_stage: object = None,
) -> Path:
    """Write a DeepSpeed checkpoint of stage 1, 2 or 3 with the given tensors, and a config.json next to it.

    Args:
        folder: the checkpoint to create.
        groups: trainable parameters, float32, by parameter group.
        stage: ZeRO stage, 1 to 3.
        world: number of ranks.
        frozen: frozen parameters; stored in full (stage 1, 2) or in equal pieces (3).
        buffers: buffers of the model.
        shared: for each shared name, the name of the parameter that has its data.
        gap: elements of padding after every second parameter (stage 1, 2).
        sub_groups: flat groups per rank (stage 3).
        step: number of optimizer steps to record.
        moments: add Adam's two moments, which are two thirds of a real file.
        pickled_stage: object to pickle as the stage; None pickles its number.
    """
    frozen, buffers = frozen or {}, buffers or {}
    tag = folder / TAG
    tag.mkdir(parents=True)
    (folder / "latest").write_text(TAG, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}), encoding="utf-8")
    weights_16bit = (
        {name: tensor.bfloat16() for group in groups for name, tensor in group.items()} if stage < 3 else {}
    )
    if stage < 3:
        pieces, paddings = _flat_stage_2(groups, world, gap)
    else:
        pieces, paddings = _flat_stage_3(groups, world, sub_groups), []
    for rank in range(world):
        fragments = dict(frozen)
        if stage == 3:
            fragments = {name: _padded(t.reshape(-1), world).chunk(world)[rank].clone() for name, t in frozen.items()}
        model = {
            "module": OrderedDict({**weights_16bit, **buffers}),
            "buffer_names": list(buffers),
            "param_shapes": [OrderedDict((name, t.shape) for name, t in group.items()) for group in groups],
            "frozen_param_shapes": OrderedDict((name, t.shape) for name, t in frozen.items()) or None,
            "frozen_param_fragments": OrderedDict(fragments) or None,
            "shared_params": dict(shared or {}),
            "global_steps": step,
            "dp_world_size": world,
            "ds_version": "0.19.8",
        }
        if stage == 3:
            torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        elif rank == 0:
            torch.save(model, tag / "mp_rank_00_model_states.pt")
        adam = {"step": torch.tensor(float(step))}
        if moments:
            adam |= {name: torch.zeros(sum(p.numel() for p in pieces[rank])) for name in ("exp_avg", "exp_avg_sq")}
        base = {"state": {0: adam}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        state = {
            "zero_stage": stage if pickled_stage is None else pickled_stage,
            "partition_count": world if stage == 3 else [world] * len(groups),
        }
        if stage == 3:
            state |= {"fp32_flat_groups": pieces[rank], "optimizer_state_dict": base}
        else:
            state |= {"single_partition_of_fp32_groups": pieces[rank], "base_optimizer_state": base}
            state |= {"param_alignment_paddings": paddings} if gap else {}
        torch.save(
            {"optimizer_state_dict": state, "ds_version": "0.19.8"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    return folder
