"""Launch recipes for the tests: accelerate's launcher flags, its environment variables, and runs under each backend.

A test either starts the launcher itself, with the flags that users pass, or forks the ranks from the fork server with
the environment variables that the same launcher would set (see forkserver.py), which is much faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import forkserver
import runs
import tiny
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from videox.weights.expert_names import TRANSFORMER, exported_name

# Keys are "<family> <train_mode>".
MODEL_BUILDERS = {
    "wan2.1 normal": tiny.build_wan_t2v,
    "wan2.1 i2v": tiny.build_wan_i2v,
    "wan2.2 normal": tiny.build_wan22_t2v,
    "wan2.2 ti2v": tiny.build_wan22_5b,
    "hunyuanvideo normal": tiny.build_hunyuan_t2v,
    "hunyuanvideo i2v": tiny.build_hunyuan_i2v,
}
LAYER_CLASSES = {
    "wan2.1 normal": "WanTransformerBlock",
    "wan2.1 i2v": "WanTransformerBlock",
    "wan2.2 normal": "WanTransformerBlock",
    "wan2.2 ti2v": "WanTransformerBlock",
    "hunyuanvideo normal": "HunyuanVideoTransformerBlock,HunyuanVideoSingleTransformerBlock",
    "hunyuanvideo i2v": "HunyuanVideoTokenReplaceTransformerBlock,HunyuanVideoTokenReplaceSingleTransformerBlock",
}
TRANSFORMER_CLASSES = {
    "wan2.1": "WanTransformer3DModel", "wan2.2": "WanTransformer3DModel",
    "hunyuanvideo": "HunyuanVideoTransformer3DModel",
}  # fmt: skip

# The launcher flags that users pass. {layers} stands for the transformer layer classes of the model.
DEEPSPEED_FLAGS = ("--use_deepspeed", "--deepspeed_multinode_launcher", "standard", "--deepspeed_config_file")
FSDP_FLAGS = (
    "--mixed_precision=bf16", "--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap={layers}", "--fsdp_sharding_strategy", "FULL_SHARD",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT", "--fsdp_backward_prefetch", "BACKWARD_PRE",
    "--fsdp_cpu_ram_efficient_loading", "False",
)  # fmt: skip
LAUNCH_FLAGS: Mapping[str, Sequence[str]] = {
    "plain": ("--mixed_precision=bf16",),
    "ddp": ("--mixed_precision=bf16", "--multi_gpu"),
    "zero2": (*DEEPSPEED_FLAGS, "config/zero_stage2_config.json"),
    "zero3": (
        "--zero_stage", "3", "--zero3_save_16bit_model", "true", "--zero3_init_flag", "true",
        *DEEPSPEED_FLAGS, "config/zero_stage2.1_config.json",
    ),
    "fsdp1": FSDP_FLAGS,
    "fsdp2": (*FSDP_FLAGS, "--fsdp_version", "2"),
}  # fmt: skip
SHARDED_BACKENDS = ("zero2", "zero3", "fsdp1", "fsdp2")


def launcher_flags(recipe: str, kind: str, world_size: int) -> list[str]:
    """Return the flags of `accelerate launch` for a launch recipe, a kind of model and a number of processes."""
    flags = ["--num_processes", str(world_size), "--num_machines", "1", "--dynamo_backend", "no"]
    return [*flags, *(flag.format(layers=LAYER_CLASSES[kind]) for flag in LAUNCH_FLAGS[recipe])]


def launcher_environment(recipe: str, kind: str, world_size: int) -> dict[str, str]:
    """Return the environment variables that accelerate's launcher would set for these flags."""
    parsed = launch_command_parser().parse_args([*launcher_flags(recipe, kind, world_size), "train.py"])
    args = _validate_launch_command(parsed)[0]
    args.deepspeed_fields_from_accelerate_config = ""  # no accelerate configuration file is used
    if recipe == "plain":
        environment = prepare_simple_launcher_cmd_env(args)[1]
    else:
        environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {
        name: value for name, value in environment.items() if os.environ.get(name) != value and name != "PYTHONPATH"
    }


class BackendRuns:
    """A small model and data set, a baseline run on one process, and runs under any backend with the same flags.

    Attributes:
        baseline: output folder of a run on one process with two micro-batches per step, the same global batch as two
            processes with one.
        settings: train flags that differ from the defaults in every run.
    """

    def __init__(self, folder: Path, kind: str, steps: int, **settings: object) -> None:
        self.folder, self.kind, self.steps, self.settings = folder, kind, steps, settings
        self.family, self.mode = kind.split()
        self.model = MODEL_BUILDERS[kind](folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", copies=2)
        self.baseline = folder / "baseline"
        outcome = runs.train(self.flags(self.baseline, gradient_accumulation_steps=2), runs.train_script(self.family))
        assert outcome.code == 0, outcome.stderr

    @property
    def place(self) -> str:
        """The folder of the trained weights, in the model and in an export."""
        return exported_name(TRANSFORMER, self.settings.get("expert", runs.FAMILY_FLAGS[self.family].get("expert")))

    def flags(self, output_dir: Path, **changes: object) -> list[str]:
        """Return the flags of the train script; keywords change, add or (None) drop flags."""
        settings = {"train_mode": self.mode, "max_train_steps": self.steps, "checkpointing_steps": self.steps // 2}
        settings |= {"validation_rows": 1, "validation_epochs": 0, "num_train_epochs": None, **self.settings}
        if self.mode == "ti2v":  # of one transformer
            settings["expert"] = None
        return runs.train_flags(self.family, self.model, self.metadata, output_dir, **{**settings, **changes})

    def launch(self, recipe: str, output_dir: Path, world_size: int = 2, **changes: object) -> runs.Outcome:
        """Train through a real `accelerate launch`."""
        flags = launcher_flags(recipe, self.kind, world_size)
        return runs.launch(self.flags(output_dir, **changes), [*flags, "--main_process_port", "0"], family=self.family)

    def run_ranks(
        self, recipe: str, output_dir: Path, world_size: int = 2, entry_point: str = "", **changes: object
    ) -> list[forkserver.TrainerProcess]:
        """Fork the ranks of a launch and return them when all have ended."""
        ranks = self.start_ranks(recipe, output_dir, world_size, entry_point, **changes)
        for rank in ranks:
            rank.wait()
        return ranks

    def start_ranks(
        self, recipe: str, output_dir: Path, world_size: int = 2, entry_point: str = "", **changes: object
    ) -> list[forkserver.TrainerProcess]:
        """Fork the ranks of a launch and return them while they run.

        Args:
            entry_point: "module:function" that each rank calls ("" = the family's train script).
        """
        return forkserver.shared().start_ranks(
            world_size,
            self.flags(output_dir, **changes),
            output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.log"),
            entry_points=[entry_point or entry_point_of(self.family)] * world_size,
            environment=launcher_environment(recipe, self.kind, world_size),
        )


def exit_codes(ranks: Sequence[forkserver.TrainerProcess]) -> list[int | None]:
    return [rank.code for rank in ranks]


def output_of(ranks: Sequence[forkserver.TrainerProcess]) -> str:
    """Return the end of what each rank printed, for the message of a failed assertion."""
    return "\n".join(rank.output()[-3000:] for rank in ranks)


# ------------------------------------------------------------------------------------- entry points of forked ranks


def entry_point_of(family: str) -> str:
    """Return the entry point that runs a family's train script."""
    return f"launches:train_{family.replace('.', '_')}"


def train_wan2_1() -> int:
    return runs.train_script("wan2.1").main()


def train_wan2_2() -> int:
    return runs.train_script("wan2.2").main()


def train_hunyuanvideo() -> int:
    return runs.train_script("hunyuanvideo").main()


def train_with_infinite_loss() -> int:
    """Train on two ranks; rank 1 has an infinite loss in step 2."""
    script = runs.train_script()
    compute_losses, calls = script.velocity_losses, iter(range(1, 100))

    def infinite_once(*arguments: torch.Tensor) -> torch.Tensor:
        losses = compute_losses(*arguments)
        return losses + float("inf") if next(calls) == 2 and os.environ["RANK"] == "1" else losses

    script.velocity_losses = infinite_once
    return script.main()
