"""Tests of scripts/zero_to_bf16.py: the converted folder has DeepSpeed's own values, and diffusers loads it.

The script is compared with DeepSpeed's zero_to_fp32 cast to bfloat16, on checkpoints of real engines and on synthetic
files with sizes and numbers of ranks that a test cannot train.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import originals
import pytest
import runs
import shard_maker
import tiny
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from diffusers import WanTransformer3DModel
from dispositions import default_signals
from exports import peak_anonymous
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from videox.errors import FLAGS, MODEL, NUMERICS, STORAGE, SaveError, UserError
from videox.run.checkpoint import find_checkpoints, latest_checkpoint
from videox.weights import layouts as layouts_of_weights
from videox.weights.safetensors_io import save_weights

SCRIPT = "scripts/zero_to_bf16.py"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
MIB = 2**20


def convert(checkpoint: Path, output: Path, *flags: str) -> Path:
    assert tiny.load_script(SCRIPT).main([str(checkpoint), str(output), *flags]) == 0
    return output


def refusal(checkpoint: Path, output: Path, *flags: str) -> UserError:
    """Return the error with which the script ends; it must not have changed any file."""
    before = {path: path.lstat().st_mtime_ns for path in output.parent.rglob("*")}
    with pytest.raises(UserError) as refused:
        convert(checkpoint, output, *flags)
    assert "\n" not in refused.value.line() and refused.value.hint
    after = {path: path.lstat().st_mtime_ns for path in output.parent.rglob("*")}
    assert after == before
    return refused.value


def deepspeed_reference(checkpoint: Path, **options: bool) -> dict[str, torch.Tensor]:
    """DeepSpeed's own float32 state dict, with floating-point tensors cast to bfloat16."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), **options)
    return {name: bf16(tensor) for name, tensor in found.items()}


def bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().bfloat16() if tensor.is_floating_point() else tensor


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8)), name


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that two ranks trained and saved: zero2, zero3, fsdp1, fsdp2."""
    folder = tmp_path_factory.mktemp("trained")
    shard_maker.make_real(folder)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that copies a checkpoint, so that a test can damage it."""
    return lambda name: Path(shutil.copytree(trained / name, tmp_path / name.replace("/", "-")))


# ------------------------------------------------------------------------------------------------ real engines


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_equals_deepspeed_on_its_own_checkpoint(trained: Path, tmp_path: Path, stage: int) -> None:
    checkpoint = trained / f"zero{stage}" / "checkpoint-2"
    output = convert(checkpoint, tmp_path / "out", "--max_shard_size", "80GB", "--safe_serialization")
    found, wanted = runs.read_weights(output), deepspeed_reference(checkpoint)
    assert_equal(found, wanted)
    assert found["count"].dtype == torch.int64 and found["flag"].dtype == torch.bool
    assert torch.equal(found["twin.weight"], found["blocks.1.attn1.to_q.weight"])
    assert [name for name in found if shard_maker.FROZEN in name]
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert (output / "config.json").read_bytes() == (checkpoint / "transformer" / "config.json").read_bytes()


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_can_be_left_out(trained: Path, tmp_path: Path, stage: int) -> None:
    checkpoint = trained / f"zero{stage}" / "checkpoint-2"
    found = runs.read_weights(convert(checkpoint, tmp_path / "out", "--exclude_frozen_parameters"))
    assert_equal(found, deepspeed_reference(checkpoint, exclude_frozen_parameters=True))
    assert not [name for name in found if shard_maker.FROZEN in name]


@pytest.mark.parametrize("size", ["80GB", "20KB"])
def test_from_pretrained_loads_it(trained: Path, tmp_path: Path, size: str) -> None:
    checkpoint = trained / "zero3" / "checkpoint-2"
    output = convert(checkpoint, tmp_path / "out", "--max_shard_size", size)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert (output / INDEX).exists() == (len(files) > 1) == (size == "20KB")
    assert len(files) == 1 or files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    model, info = WanTransformer3DModel.from_pretrained(output, torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    wanted = deepspeed_reference(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.bfloat16(), wanted[name]), name


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_shards_equal_the_reference(trained: Path, tmp_path: Path, version: int) -> None:
    folder = trained / f"fsdp{version}"
    wanted = {name: bf16(tensor) for name, tensor in torch.load(folder / "reference.pt").items()}
    assert_equal(runs.read_weights(convert(folder / "checkpoint-2", tmp_path / "a")), wanted)
    shards = folder / "checkpoint-2" / "pytorch_model_fsdp_0"  # the folder of the shards is accepted too
    config = ("--config", str(folder / "checkpoint-2" / "config.json"))
    assert_equal(runs.read_weights(convert(shards, tmp_path / "b", *config)), wanted)
    tagged = convert(folder / "checkpoint-2", tmp_path / "c", "--tag", "pytorch_model_fsdp_0")
    assert_equal(runs.read_weights(tagged), wanted)


def test_dcp_state_dict_without_model_key_is_converted(trained: Path, tmp_path: Path) -> None:
    folder = trained / "fsdp2"
    config = ("--config", str(folder / "checkpoint-2"))
    wanted = {name: bf16(tensor) for name, tensor in torch.load(folder / "reference.pt").items()}
    assert_equal(runs.read_weights(convert(folder / "bare", tmp_path / "out", *config)), wanted)


def test_verify_compares_names_and_shapes_with_the_model(trained: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel(**shard_maker.TINY)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    checkpoint = shard_maker.write_zero(tmp_path / "a", [state], stage=2, world=3)
    (checkpoint / "config.json").write_text(model.to_json_string())
    convert(checkpoint, tmp_path / "out", "--verify", "--max_shard_size", "30KB")
    found = refusal(trained / "zero2" / "checkpoint-2", tmp_path / "out2", "--verify")
    assert found.exit_code == MODEL and "twin.weight is not in the model" in str(found)
    (checkpoint / "config.json").write_text(json.dumps(json.loads(model.to_json_string()) | {"ffn_dim": 44}))
    found = refusal(checkpoint, tmp_path / "out3", "--verify")
    assert "describes another model" in str(found) and "[33, 24], the model has [44, 24]" in str(found)


def test_keep_fp32_modules_stay_float32(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "zero2" / "checkpoint-2"
    output = convert(checkpoint, tmp_path / "a", "--keep_fp32_modules")
    found = runs.read_weights(output)
    in_fp32 = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    names = WanTransformer3DModel._keep_in_fp32_modules
    assert in_fp32 == {name for name in found if set(names) & set(name.split("."))} and len(in_fp32) > 3
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    fp32_params = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    assert_equal(found, {n: t.detach() if n in in_fp32 else bf16(t) for n, t in fp32_params.items()})
    loaded = WanTransformer3DModel.from_pretrained(output, torch_dtype=torch.bfloat16).state_dict()
    assert all(
        torch.equal(tensor, found[name]) and tensor.dtype == found[name].dtype for name, tensor in loaded.items()
    )
    found = runs.read_weights(convert(checkpoint, tmp_path / "b", "--keep_fp32_modules", "norm2", "proj_out"))
    assert {n for n, t in found.items() if t.dtype == torch.float32} == {
        n for n in found if "norm2" in n.split(".") or "proj_out" in n.split(".")
    }


# ------------------------------------------------------------------------------- checkpoints with Wan's own names


WAN_CONFIG = {"_class_name": "WanTransformer3DModel", "dim": 24, "num_heads": 2, "in_dim": 16, "out_dim": 16,
              "ffn_dim": 33, "freq_dim": 256, "text_dim": 32, "num_layers": 2, "model_type": "t2v", "text_len": 512}  # fmt: skip


def original_checkpoint(folder: Path, stage: int, world: int, **changes: object) -> tuple[Path, torch.nn.Module]:
    """A checkpoint as VideoX-Fun saves it: Wan's own tensor names and configuration; the model that it contains."""
    torch.manual_seed(stage)
    model = WanTransformer3DModel(**shard_maker.TINY)
    state = originals.rebuilt({name: tensor.detach() for name, tensor in model.state_dict().items()}, "wan")
    without = changes.pop("without", ())
    names = [name for name in state if name not in without]
    groups = [{name: state[name].clone() for name in part} for part in (names[::2], names[1::2])]
    checkpoint = shard_maker.write_zero(folder, groups, stage=stage, world=world)
    (checkpoint / "config.json").unlink()
    if config := changes.pop("config", WAN_CONFIG):
        place = checkpoint / "transformer" if stage < 3 else checkpoint  # ZeRO-2's is in transformer/
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps({**config, **changes}))
    return checkpoint, model


@pytest.mark.parametrize(("stage", "world"), [(2, 3), (3, 2), (1, 1)])
def test_a_videox_fun_checkpoint_becomes_a_folder_that_diffusers_loads(
    tmp_path: Path, stage: int, world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model = original_checkpoint(tmp_path / "checkpoint-7", stage, world)
    output = convert(checkpoint, tmp_path / "out", "--verify", "--max_shard_size", "30KB")
    assert (
        "names and configuration are converted to those of diffusers' WanTransformer3DModel" in capsys.readouterr().out
    )
    loaded, info = WanTransformer3DModel.from_pretrained(output, torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    wanted = {name: bf16(tensor) for name, tensor in model.state_dict().items()}
    assert_equal(runs.read_weights(output), wanted)
    shown = {key: value for key, value in shard_maker.TINY.items() if key != "rope_max_seq_len"}  # in no shape
    assert {key: loaded.config[key] for key in shown} == json.loads(json.dumps(shown))


def test_full_weights_with_own_names_are_converted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """checkpoint-N/transformer of VideoX-Fun's training without sharding."""
    model = WanTransformer3DModel(**shard_maker.TINY)
    state = originals.rebuilt({name: tensor.detach() for name, tensor in model.state_dict().items()}, "wan")
    save_weights(tmp_path / "checkpoint-5/transformer", state, WAN_CONFIG)
    output = convert(tmp_path / "checkpoint-5", tmp_path / "out")
    assert "directly" not in capsys.readouterr().out  # diffusers does not load the names in the checkpoint
    assert_equal(runs.read_weights(output), {name: bf16(tensor) for name, tensor in model.state_dict().items()})


def test_a_foreign_configuration_of_diffusers_names_is_converted(tmp_path: Path) -> None:
    model = WanTransformer3DModel(**shard_maker.TINY)
    save_weights(tmp_path / "checkpoint-5/transformer", model.state_dict(), WAN_CONFIG)
    output = convert(tmp_path / "checkpoint-5", tmp_path / "out", "--verify")
    assert WanTransformer3DModel.from_pretrained(output).config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, "has 2 of 3 blocks (num_layers = 3 in the model's configuration), blocks.2 is missing"),
        ({"ffn_dim": 44}, "ffn_dim is 44, the weights have 33"),
        ({"config": None}, "has no config.json, and is not of the width of a published model"),
        ({"without": ("patch_embedding.weight",)}, "has no patch_embedding.weight"),
        ({"num_heads": 0}, "unexpected shapes"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    checkpoint, _ = original_checkpoint(tmp_path / "checkpoint-7", 3, 2, **changes)
    found = refusal(checkpoint, tmp_path / "out")
    assert found.exit_code == MODEL and words in found.line()


def test_a_published_width_needs_no_configuration(tmp_path: Path) -> None:
    """ZeRO-3 checkpoints of VideoX-Fun have no config.json; the shapes of the 1.3B model show all of it."""
    from videox.models.original_names import to_diffusers
    from videox.weights.lazy_tensor import LazyTensor

    config, shapes = originals.published("Wan2.1-T2V-1.3B")
    tensors = [LazyTensor(name, torch.float32, shape, ()) for name, shape in shapes.items()]
    names, found = to_diffusers(tmp_path, tensors, "wan", None)
    assert {tensor.name for tensor in names} == {e.name for e in layouts_of_weights.to_diffusers("wan", shapes)}
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    assert {key: listed[key] for key in config if key in listed} == {k: v for k, v in config.items() if k in listed}
    less = [tensor for tensor in tensors if not tensor.name.startswith("blocks.29.")]
    with pytest.raises(UserError, match=r"has 29 of 30 blocks .* blocks\.29 is missing"):
        to_diffusers(tmp_path, less, "wan", None)


def test_a_lora_is_refused_with_the_file_to_use(tmp_path: Path) -> None:
    groups = [{"blocks.0.self_attn.q.lora_A.default.weight": torch.ones(2, 24)}]
    checkpoint = shard_maker.write_zero(tmp_path / "checkpoint-7", groups, stage=3, world=2)
    save_file({"a": torch.ones(1)}, checkpoint / "lora_diffusion_pytorch_model.safetensors")
    line = refusal(checkpoint, tmp_path / "out").line()
    assert "adapters of a LoRA" in line and "lora_diffusion_pytorch_model.safetensors to --init_lora_from" in line


# -------------------------------------------------------------------------------------------- synthetic files


@st.composite
def layouts(draw: st.DrawFn) -> dict:
    shapes = st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)
    groups = draw(st.lists(shapes, min_size=1, max_size=3))
    return {
        "groups": [
            {f"g{g}.{i}.weight": torch.randn(shape) for i, shape in enumerate(group)} for g, group in enumerate(groups)
        ],
        "world": draw(st.integers(1, 4)),
        "stage": draw(st.sampled_from([1, 2, 3])),
        "gap": draw(st.sampled_from([0, 0, 3])),
        "sub_groups": draw(st.integers(1, 4)),
        "frozen": {f"frozen.{i}": torch.randn(shape).bfloat16() for i, shape in enumerate(draw(shapes))},
        "buffers": {"index": torch.arange(draw(st.integers(1, 5))), "scale": torch.randn(3, dtype=torch.float64)},
        "shared": {"twin": "g0.0.weight", "frozen_twin": "frozen.0"},
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), size=st.sampled_from(["80GB", "100", "1KB"]))
def test_any_sizes_and_numbers_of_ranks(tmp_path_factory: pytest.TempPathFactory, layout: dict, size: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    checkpoint = shard_maker.write_zero(folder / "checkpoint-7", **layout)
    found = runs.read_weights(convert(checkpoint, folder / "out", "--max_shard_size", size))
    plain = {name: tensor for group in layout["groups"] for name, tensor in group.items()}
    plain |= layout["frozen"] | layout["buffers"]
    plain |= {name: plain[source] for name, source in layout["shared"].items()}
    assert_equal(found, {name: bf16(tensor) for name, tensor in plain.items()})
    assert_equal(found, deepspeed_reference(checkpoint))


class ByName:
    """An enum member that is pickled by name, as Python 3.11.0 to 3.11.3 do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (ZeroStageEnum, self.name)


@pytest.mark.parametrize(("stage", "name"), [(1, "optimizer_states"), (2, "gradients"), (3, "weights")])
def test_zero_stage_can_be_pickled_by_name(tmp_path: Path, stage: int, name: str) -> None:
    groups = [{"w": torch.randn(10)}]
    checkpoint = shard_maker.write_zero(tmp_path / "a", groups, stage=stage, world=2, pickled_stage=ByName(name))
    assert_equal(runs.read_weights(convert(checkpoint, tmp_path / "out")), {"w": bf16(groups[0]["w"])})


def test_shared_name_of_an_excluded_parameter_is_excluded(tmp_path: Path) -> None:
    layout = {"frozen": {"f": torch.ones(4)}, "shared": {"twin": "f"}}
    checkpoint = shard_maker.write_zero(tmp_path / "a", [{"w": torch.ones(3)}], stage=3, world=2, **layout)
    found = runs.read_weights(convert(checkpoint, tmp_path / "out", "--exclude_frozen_parameters"))
    assert_equal(found, deepspeed_reference(checkpoint, exclude_frozen_parameters=True))
    assert found.keys() == {"w"}


def test_strided_frozen_weights_and_more_files_than_can_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    frozen = {"f": torch.randn(7, 5).t(), "wide": torch.randn(3, 1).expand(3, 4)}
    groups = [{"w": torch.randn(1000), "v": torch.randn(3)}]
    checkpoint = shard_maker.write_zero(tmp_path / "a", groups, stage=3, world=40)
    other = shard_maker.write_zero(tmp_path / "b", groups, stage=2, world=1, frozen=frozen)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(100, hard), hard))  # fewer than twice the ranks' files
    try:
        found = runs.read_weights(convert(checkpoint, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_equal(found, {name: bf16(tensor) for name, tensor in groups[0].items()})
    found = runs.read_weights(convert(other, tmp_path / "out2"))
    assert_equal(found, {name: bf16(tensor) for name, tensor in (groups[0] | frozen).items()})


# ---------------------------------------------------------------------------------------------- full weights


def test_full_float32_weights_are_converted(tmp_path: Path) -> None:
    model = WanTransformer3DModel(**shard_maker.TINY)
    save_weights(
        tmp_path / "checkpoint-5" / "transformer", model.state_dict(), model.to_json_string(), max_shard_size=30000
    )
    output = convert(tmp_path / "checkpoint-5", tmp_path / "out", "--verify")
    assert_equal(runs.read_weights(output), {name: bf16(tensor) for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("place", ["transformer", "top"])
def test_existing_16_bit_weights_are_reported(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    checkpoint = copied("zero3/checkpoint-2")
    folder = checkpoint / "transformer" if place == "transformer" else checkpoint
    ready = {name: tensor.contiguous().clone() for name, tensor in deepspeed_reference(checkpoint).items()}
    ready["gain"].fill_(1.0)  # this file does not mark buffers, and parameters must be finite
    save_file(ready, folder / "diffusion_pytorch_model.safetensors")
    convert(checkpoint, tmp_path / "a")
    output = capsys.readouterr().out
    assert f"{folder} already contains the full 16-bit weights" in output and "ZeRO-3 of 2 ranks" in output
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    convert(checkpoint, tmp_path / "c")
    assert f"{weights} cannot be read" in capsys.readouterr().out
    assert_equal(runs.read_weights(tmp_path / "c"), runs.read_weights(tmp_path / "a"))
    weights.write_bytes(content)
    shutil.rmtree(checkpoint / "pytorch_model")
    (checkpoint / "latest").unlink()
    convert(checkpoint, tmp_path / "b")
    assert f"{folder} already contains 16-bit weights and can be loaded directly" in capsys.readouterr().out
    assert_equal(runs.read_weights(tmp_path / "b"), ready)


def test_damaged_checkpoint_with_manifest_is_refused(tmp_path: Path) -> None:
    from videox.run.checkpoint import publish_checkpoint

    model = WanTransformer3DModel(**shard_maker.TINY)
    with publish_checkpoint(tmp_path, 3, is_main=True, gather=lambda value: [value], description={}) as folder:
        save_weights(folder / "transformer", model.state_dict(), model.to_json_string())
        (folder / "trainer_state.json").write_text("{}")
    checkpoint = tmp_path / "checkpoint-3"
    convert(checkpoint, tmp_path / "checkpoint-3-outputs", "--verify")
    assert find_checkpoints(tmp_path) == [checkpoint] and latest_checkpoint(tmp_path) == (checkpoint, [])
    weights = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    convert(checkpoint, tmp_path / "unseen")  # the size is unchanged, so only --verify detects it
    assert "differs from what was saved" in str(refusal(checkpoint, tmp_path / "out", "--verify"))
    (checkpoint / "trainer_state.json").write_text("{ }")
    assert "trainer_state.json has 3 bytes" in str(refusal(checkpoint, tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("stage", [2, 3])
def test_missing_extra_and_duplicate_ranks_are_refused(
    copied: Callable[[str], Path], tmp_path: Path, stage: int
) -> None:
    checkpoint, output = copied(f"zero{stage}/checkpoint-2"), tmp_path / "out"
    tag = checkpoint / "pytorch_model"
    name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    shutil.copy(tag / name.format(0), tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "has two files of rank 0" in str(refusal(checkpoint, output))
    (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(tag / name.format(2))
    assert "contains 3 files *_optim_states.pt, 2 were saved: 1 too many" in str(refusal(checkpoint, output))
    (tag / name.format(2)).unlink()
    (tag / name.format(1)).rename(tag / "kept")
    assert "contains 1 file *_optim_states.pt, 2 were saved: 1 missing" in str(refusal(checkpoint, output))
    (tag / name.format(0)).rename(tag / name.format(1))
    assert "is missing *_optim_states.pt of rank 0 (found 1)" in str(refusal(checkpoint, output))
    (tag / name.format(1)).rename(tag / name.format(0))
    (tag / "kept").rename(tag / "expert_states_optim_states.pt")
    assert "has no data-parallel rank in its name" in str(refusal(checkpoint, output))
    (tag / "expert_states_optim_states.pt").rename(tag / name.format(1))
    next(tag.glob("*_model_states.pt")).unlink()
    found = refusal(checkpoint, output)
    assert found.exit_code == MODEL and re.search(r"_model_states\.pt", str(found)) and "missing" in str(found)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (2, "mp_rank_00_model_states.pt"),
        (3, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_files_of_another_step_are_refused(
    trained: Path, copied: Callable[[str], Path], tmp_path: Path, stage: int, file: str
) -> None:
    checkpoint = copied(f"zero{stage}/checkpoint-2")
    shutil.copy(
        trained / f"zero{stage}" / "checkpoint-1" / "pytorch_model" / file, checkpoint / "pytorch_model" / file
    )
    found = refusal(checkpoint, tmp_path / "out")
    assert found.exit_code == MODEL and "mixes files of different saves" in str(found)


@pytest.mark.parametrize("folder", ["zero2/checkpoint-2", "zero3/checkpoint-2", "fsdp2/checkpoint-2"])
def test_truncated_files_are_refused(copied: Callable[[str], Path], tmp_path: Path, folder: str) -> None:
    checkpoint = copied(folder)
    files = [path for path in checkpoint.glob("pytorch_model*/*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        content = path.read_bytes()
        for size in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            found = refusal(checkpoint, tmp_path / "out")
            assert found.exit_code == MODEL and path.name in str(found), (path.name, size)
        path.write_bytes(content)
    convert(checkpoint, tmp_path / "out")


class Canary:
    """Creates a file when it is unpickled by a reader that runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("stage", [2, 3])
def test_no_deepspeed_file_runs_code(copied: Callable[[str], Path], tmp_path: Path, stage: int) -> None:
    checkpoint = copied(f"zero{stage}/checkpoint-2")
    for path in sorted((checkpoint / "pytorch_model").iterdir()):
        content = path.read_bytes()
        torch.save({"evil": Canary(tmp_path / "ran"), **torch.load(path, weights_only=False)}, path)
        found = refusal(checkpoint, tmp_path / "out")
        assert found.exit_code == MODEL and "no code was run" in str(found) and path.name in str(found)
        assert not (tmp_path / "ran").exists()
        path.write_bytes(content)


def test_no_dcp_file_runs_code(copied: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied("fsdp2/checkpoint-2")
    shards, canary = checkpoint / "pytorch_model_fsdp_0", Canary(tmp_path / "ran")
    with (shards / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    torch.save(canary, tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()
    info = next(iter(metadata.storage_data.values()))
    shard = shards / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(evil)
    with shard.open("ab") as file:
        file.write(evil)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    found = refusal(checkpoint, tmp_path / "out")
    assert shard.name in str(found) and "no code was run" in str(found)
    metadata.planner_data = canary
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    assert ".metadata" in str(refusal(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


def test_inconsistent_fsdp_shards_are_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, output = copied("fsdp2/checkpoint-2"), tmp_path / "out"
    shards = checkpoint / "pytorch_model_fsdp_0"
    shutil.copy(shards / "__1_0.distcp", shards / "__2_0.distcp")
    assert "has the extra files __2_0.distcp (3 files found, .metadata lists 2)" in str(refusal(checkpoint, output))
    (shards / "__2_0.distcp").unlink()
    (shards / "__1_0.distcp").rename(tmp_path / "kept")
    assert "is missing __1_0.distcp (1 file found, .metadata lists 2)" in str(refusal(checkpoint, output))
    shutil.copy(shards / "__0_0.distcp", shards / "__1_0.distcp")  # the file of another rank
    found = refusal(checkpoint, output)
    assert found.exit_code == MODEL and "__1_0.distcp" in str(found)
    (tmp_path / "kept").replace(shards / "__1_0.distcp")
    content = (shards / ".metadata").read_bytes()
    metadata = pickle.loads(content)
    for change in ("gap", "overlap", "outside"):
        metadata = pickle.loads(content)
        chunks = metadata.state_dict_metadata["model.patch_embedding.weight"].chunks
        if change == "gap":
            chunks.pop()
        elif change == "overlap":
            chunks.append(chunks[0])
        else:
            index = next(iter(metadata.storage_data))
            metadata.storage_data[index].relative_path = f"../{metadata.storage_data[index].relative_path}"
        (shards / ".metadata").write_bytes(pickle.dumps(metadata))
        assert re.search(r"patch_embedding|outside its folder", str(refusal(checkpoint, output))), change
    (shards / ".metadata").unlink()
    assert "has no .metadata" in str(refusal(checkpoint, output))
    shutil.rmtree(shards)
    assert "contains no ZeRO or FSDP shards and no weights" in str(refusal(checkpoint, output))
    assert "only ZeRO shards do" in str(refusal(checkpoint, output, "--exclude_frozen_parameters"))
    assert "'model' (found: optimizer)" in str(refusal(checkpoint, output, "--tag", "optimizer_0"))


def test_tag_is_checked(copied: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, output = copied("zero2/checkpoint-2"), tmp_path / "out"
    (checkpoint / "latest").write_text("global_step9")
    found = refusal(checkpoint, output)
    assert "'global_step9', which has no *_optim_states.pt (found: pytorch_model)" in str(found)
    assert found.hint == "pass --tag pytorch_model"
    (checkpoint / "latest").write_text("../zero2-checkpoint-2/pytorch_model")
    assert "names the tag '../zero2" in str(refusal(checkpoint, output))
    (checkpoint / "latest").unlink()
    assert "has no file 'latest'" in str(refusal(checkpoint, output))
    assert "names the tag 'x'" in str(refusal(checkpoint, output, "--tag", "x"))
    assert refusal(checkpoint / "pytorch_model", output).hint == "pass its parent folder, with --tag pytorch_model"
    convert(checkpoint, output, "-t", "pytorch_model")


def test_config_is_found_and_checked(copied: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, output = copied("zero3/checkpoint-2"), tmp_path / "out"
    config = checkpoint / "transformer" / "config.json"
    text = config.read_bytes()
    config.unlink()
    found = refusal(checkpoint, output)
    assert found.exit_code == MODEL and "no config.json (looked for" in str(found) and "--config FILE" in found.hint
    assert "no config.json" in str(refusal(checkpoint, output, "--config", str(tmp_path / "absent.json")))
    (tmp_path / "given.json").write_bytes(text)
    assert (convert(checkpoint, output, "--config", str(tmp_path / "given.json")) / "config.json").read_bytes() == text
    (checkpoint / "config.json").write_text('{"_class_name": "Wan')
    assert "is not the JSON of a model" in str(refusal(checkpoint, tmp_path / "out2"))
    for name in ("NoSuchModel", "WanPipeline", "_LazyModule", None):
        (checkpoint / "config.json").write_text(json.dumps({"_class_name": name}))
        assert "which diffusers does not have" in str(refusal(checkpoint, tmp_path / "out2", "--keep_fp32_modules"))


def test_output_folders_that_are_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "zero2" / "checkpoint-2"
    before = sorted(path for path in trained.rglob("*"))
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diffusion_pytorch_model-00003-of-00003.safetensors").touch()
    (tmp_path / "file").touch()
    for output, reason in (
        (checkpoint, "one is inside the other"),
        (checkpoint / "out", "one is inside the other"),
        (tmp_path / "link" / "out", "one is inside the other"),
        (trained, "one is inside the other"),
        (tmp_path / "taken", "is not empty"),
        (tmp_path / "file", "is not a folder"),
    ):
        found = refusal(checkpoint, output)
        assert found.exit_code == FLAGS and reason in str(found), output
    assert refusal(tmp_path / "absent", tmp_path / "out").exit_code == MODEL
    assert sorted(path for path in trained.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    convert(checkpoint, tmp_path / "empty")
    convert(checkpoint, tmp_path / "deep" / "er" / "out")


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, math.inf, math.nan])
@pytest.mark.parametrize("stage", [2, 3])
def test_tensors_that_overflow_bf16_are_named(tmp_path: Path, value: float, stage: int) -> None:
    good, bad = torch.ones(50), torch.ones(5, 10)
    bad[4, 3] = value
    buffers = {
        "mask": torch.tensor([0.0, -math.inf]),
        "limit": torch.tensor([3.389e38]),
    }  # both are allowed: infinities in buffers, and a value below the bf16 maximum
    layout = {"stage": stage, "world": 2, "buffers": buffers}
    checkpoint = shard_maker.write_zero(tmp_path / "a", [{"good": good, "bad.weight": bad}], **layout)
    found = refusal(checkpoint, tmp_path / "out")
    assert found.exit_code == NUMERICS and "1 tensor is not finite after conversion: bad.weight" in str(found)
    bad[4, 3] = 3.389e38
    checkpoint = shard_maker.write_zero(tmp_path / "b", [{"good": good, "bad.weight": bad}], **layout)
    assert_equal(runs.read_weights(convert(checkpoint, tmp_path / "out")), deepspeed_reference(checkpoint))


def test_keep_fp32_modules_avoids_an_overflow(tmp_path: Path) -> None:
    checkpoint = shard_maker.write_zero(tmp_path / "a", [{"proj.weight": torch.tensor([3.4e38])}], stage=3, world=1)
    assert refusal(checkpoint, tmp_path / "out").exit_code == NUMERICS
    found = runs.read_weights(convert(checkpoint, tmp_path / "out", "--keep_fp32_modules", "proj"))
    assert torch.equal(found["proj.weight"], torch.tensor([3.4e38]))


def test_inconsistent_zero_files_are_refused(tmp_path: Path) -> None:
    for number, change in enumerate(("short", "long", "stage", "half")):
        layout = {"stage": 3 if number % 2 else 2, "world": 2}
        checkpoint = shard_maker.write_zero(tmp_path / change, [{"w": torch.ones(40)}], **layout)
        for path in checkpoint.glob("pytorch_model/*_optim_states.pt"):
            content = torch.load(path)
            state = content["optimizer_state_dict"]
            key = "fp32_flat_groups" if number % 2 else "single_partition_of_fp32_groups"
            if change == "stage":
                state["zero_stage"] = 0
            else:
                (flat,) = state[key]
                state[key] = [{"short": flat[:10], "long": torch.ones(99), "half": flat.half()}[change]]
            torch.save(content, path)
        found = refusal(checkpoint, tmp_path / "out")
        assert found.exit_code == MODEL, change


@pytest.mark.parametrize("size", ["", "0", "-1GB", "GB", "1XB", "1e3"])
def test_invalid_sizes_are_refused(tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path / "a", tmp_path / "b", "--max_shard_size", size)
    assert ended.value.code == FLAGS and "max_shard_size" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ disk, kill, memory


def command(checkpoint: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, SCRIPT, str(checkpoint), str(output), *flags]


def test_published_command_works(trained: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(trained / "zero2" / "checkpoint-2", tmp_path / "checkpoint-2"))
    output = tmp_path / "checkpoint-2-outputs"
    flags = ("--max_shard_size", "80GB", "--safe_serialization")
    done = runs.run_command(command(checkpoint, output, *flags), output)
    assert done.code == 0, done.stderr
    assert "ZeRO-2 of 2 ranks, step 2" in done.stdout
    again = runs.run_command(command(checkpoint, output, *flags), output)
    assert again.code == FLAGS and again.stderr.startswith("error: output_dir: ") and again.stderr.count("\n") == 1


def test_full_disk_is_reported_before_the_first_write(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    found = refusal(trained / "zero2" / "checkpoint-2", tmp_path / "out")
    assert found.exit_code == STORAGE and "0.00 MB are free" in str(found)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes, which simulates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_disk_that_fills_up_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    with file_size_limit(20_000), pytest.raises(SaveError, match="File too large"):
        convert(trained / "zero2" / "checkpoint-2", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("cut", "flags"), [(1, ()), (0, ("--verify",))])
def test_written_files_are_read_back_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, flags: tuple[str, ...]
) -> None:
    script = tiny.load_script(SCRIPT)
    write = script.write_folder

    def lossy(folder: Path, *arguments, **options):
        checksums = write(folder, *arguments, **options)
        path = folder / "diffusion_pytorch_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content[: len(content) - cut])
        return checksums

    monkeypatch.setattr(script, "write_folder", lossy)
    model = WanTransformer3DModel(**shard_maker.TINY)
    save_weights(tmp_path / "a" / "transformer", model.state_dict(), model.to_json_string())
    with pytest.raises(SaveError, match="out: .*" + ("incomplete" if cut else "differs from what was written")):
        convert(tmp_path / "a", tmp_path / "out", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def big_checkpoint(folder: Path, millions: int) -> Path:
    """Write a ZeRO-3 checkpoint of 8 ranks; a tensor has at most 4 million elements."""
    torch.manual_seed(0)
    group = {f"blocks.{i}.weight": torch.randn(2000, 2000) for i in range(millions // 4)}
    return shard_maker.write_zero(folder, [group], stage=3, world=8)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_kill_leaves_no_output(tmp_path: Path, number: signal.Signals) -> None:
    checkpoint, output = big_checkpoint(tmp_path / "a", 40), tmp_path / "out"
    env = runs.child_environment()
    with default_signals():
        process = subprocess.Popen(command(checkpoint, output), cwd=tiny.ROOT, env=env, stderr=subprocess.DEVNULL)
    while not (begun := list(tmp_path.glob(".converting-out-*/*"))) and process.poll() is None:
        time.sleep(0.001)
    assert begun
    process.send_signal(number)
    assert process.wait(60) != 0
    assert not output.exists()
    assert bool(list(tmp_path.glob(".converting-*"))) == (number == signal.SIGKILL)
    convert(checkpoint, output)
    assert not list(tmp_path.glob(".converting-*"))


def test_folder_of_a_running_conversion_is_not_removed(trained: Path, tmp_path: Path) -> None:
    script = tiny.load_script(SCRIPT)
    with script.atomic_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        convert(trained / "zero2" / "checkpoint-2", tmp_path / "out2")
        with script.atomic_folder(tmp_path / "out") as other:
            assert other != folder
            (other / "y").touch()
        assert (folder / "x").exists() and (tmp_path / "out" / "y").exists()
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    largest, peaks = 4_000_000 * 4, []
    for millions in (24, 72):
        checkpoint = big_checkpoint(tmp_path / f"a{millions}", millions)
        peaks.append(peak_anonymous(command(checkpoint, tmp_path / f"out{millions}", "--max_shard_size", "80GB")))
        shutil.rmtree(checkpoint)
        size = (tmp_path / f"out{millions}" / "diffusion_pytorch_model.safetensors").stat().st_size
        assert size > millions * 2_000_000
    assert max(peaks) <= largest + 512 * MIB
    assert peaks[1] - peaks[0] <= 24 * MIB  # 48 million parameters more are 92 MiB in bfloat16
