"""Tests of videox.weights.safetensors_io: round trips are bit-identical, and diffusers reads what is written."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crashes import fork, wait_for
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tensors import same

from videox.errors import MODEL, NUMERICS, SaveError, UserError
from videox.files import publish_folder
from videox.weights.safetensors_io import (
    CONFIG,
    WEIGHTS,
    StoredTensors,
    export_transformer,
    load_weights,
    save_tensors,
    save_weights,
)

INDEX = f"{WEIGHTS}.safetensors.index.json"


def tiny_wan(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    return tiny_wan()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [20_000, 5 * 1000**3])
def test_from_pretrained_reads_what_save_weights_wrote(wan, tmp_path, shard_size):
    save_weights(tmp_path / "transformer", wan.state_dict(), wan.to_json_string(), max_shard_size=shard_size)
    files = sorted(path.name for path in (tmp_path / "transformer").iterdir())
    assert (INDEX in files) == (shard_size == 20_000) and (len(files) > 4) == (shard_size == 20_000)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32)
    assert same(loaded.state_dict(), wan.state_dict())
    compared = set(wan.config) - {"_use_default_values", "patch_size"}  # JSON has no tuples
    assert {key: loaded.config[key] for key in compared} == {key: wan.config[key] for key in compared}


def test_shards_are_named_and_indexed_as_diffusers_does(wan, tmp_path):
    save_weights(tmp_path / "ours", wan.state_dict(), wan.to_json_string(), max_shard_size=30_000)
    wan.save_pretrained(tmp_path / "theirs", max_shard_size=30_000)
    ours, theirs = (sorted(path.name for path in (tmp_path / side).iterdir()) for side in ("ours", "theirs"))
    assert ours == theirs
    ours_index, theirs_index = (json.loads((tmp_path / side / INDEX).read_text()) for side in ("ours", "theirs"))
    assert ours_index == theirs_index
    assert json.loads((tmp_path / "ours" / CONFIG).read_text()) == json.loads(wan.to_json_string())


def test_load_weights_reads_what_diffusers_wrote_in_place(wan, tmp_path):
    wan.save_pretrained(tmp_path, max_shard_size=30_000)
    other = tiny_wan(seed=1)
    addresses = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    assert load_weights(tmp_path, other) == []
    assert same(other.state_dict(), wan.state_dict())
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == addresses


def test_load_weights_casts_to_the_dtype_of_the_parameter(wan, tmp_path):
    save_weights(tmp_path, wan.state_dict(), wan.to_json_string())
    other = tiny_wan(seed=1).to(torch.bfloat16)
    load_weights(tmp_path, other)
    assert same(other.state_dict(), {name: tensor.to(torch.bfloat16) for name, tensor in wan.state_dict().items()})


def test_path_of_the_source_is_not_saved(tmp_path, wan):
    save_weights(tmp_path, {}, {**wan.config, "_class_name": "WanTransformer3DModel", "_name_or_path": "/home/me/x"})
    assert "/home/me" not in (tmp_path / CONFIG).read_text()


DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)


@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    shard_size=st.integers(1, 400),
    one_by_one=st.booleans(),
)
def test_any_tensors_round_trip_bit_identical(tmp_path_factory, specs, shard_size, one_by_one):
    folder = tmp_path_factory.mktemp("tensors")
    tensors = {
        f"layer.{number}": torch.randint(0, 2 if dtype is torch.bool else 100, shape).to(dtype)
        for number, (dtype, shape) in enumerate(specs)
    }
    save_tensors(folder, iter(tensors.items()) if one_by_one else tensors, stem="x", max_shard_size=shard_size)
    stored = StoredTensors(folder, "x")
    assert same(dict(stored), tensors) and all(stored.shape(name) == tensors[name].shape for name in tensors)
    for shard in folder.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(shard).values()]
        assert sum(sizes) <= shard_size or sum(size > 0 for size in sizes) == 1


def test_views_transposed_and_tied_tensors_are_written_in_full(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"rows": table[1:], "transposed": table.T, "tied": table, "again": table}
    save_tensors(tmp_path, tensors, stem="x")
    assert same(dict(StoredTensors(tmp_path, "x")), {name: t.contiguous() for name, t in tensors.items()})


def test_a_stale_shard_is_never_mixed_in(wan, tmp_path):
    save_weights(tmp_path, wan.state_dict(), wan.to_json_string(), max_shard_size=30_000)
    with pytest.raises(FileExistsError, match="already contains diffusion_pytorch_model"):
        save_weights(tmp_path, wan.state_dict(), wan.to_json_string())


@pytest.mark.parametrize("shard_size", [1, 1000])
def test_a_name_given_twice_is_refused(tmp_path, shard_size):
    twice = [("a", torch.zeros(2)), ("a", torch.ones(2))]
    with pytest.raises(ValueError, match="tensor a is given twice"):
        save_tensors(tmp_path, twice, stem="x", max_shard_size=shard_size)


def test_full_disk_is_reported_after_the_iterable_is_exhausted(tmp_path):
    """The iterable may run a collective on every rank: stopping early would leave the others waiting."""

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        requested = []

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for number in range(5):
                requested.append(number)
                yield f"t{number}", torch.zeros(1000)

        with pytest.raises((OSError, SafetensorError), match="File too large"):
            save_tensors(tmp_path, gathered(), stem="x", max_shard_size=4000)
        assert requested == [0, 1, 2, 3, 4]

    assert wait_for(fork(full_disk)) == 0


# --- weights that cannot be loaded -----------------------------------------------------------------------------------


def refusal(folder: Path, target) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(folder, target)
    assert caught.value.exit_code == MODEL
    return caught.value.line()


def test_missing_extra_and_mismatched_tensors_are_named_and_nothing_is_copied(wan, tmp_path):
    state = dict(wan.state_dict())
    state["proj_out.bias"] = torch.zeros(7)
    state["new.weight"] = torch.zeros(1)
    del state["scale_shift_table"]
    save_weights(tmp_path, state, wan.to_json_string())
    other = tiny_wan(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    line = refusal(tmp_path, other)
    for fragment in ("scale_shift_table is missing", "new.weight is not in the model", "proj_out.bias is [7]"):
        assert fragment in line
    assert same(other.state_dict(), before)
    state["proj_out.bias"] = wan.state_dict()["proj_out.bias"]
    save_weights(tmp_path / "lax", state, wan.to_json_string())
    ignored = load_weights(tmp_path / "lax", other, strict=False)
    assert ignored == ["scale_shift_table is missing", "new.weight is not in the model"]
    assert torch.equal(other.proj_out.weight, wan.proj_out.weight)
    assert torch.equal(other.scale_shift_table, before["scale_shift_table"])


def test_many_differences_are_counted(tmp_path):
    save_tensors(tmp_path, {})
    assert "and 15 more" in refusal(tmp_path, {f"p{number}": torch.zeros(1) for number in range(20)})


def test_broken_file_of_a_folder_is_named(wan, tmp_path):
    save_weights(tmp_path, wan.state_dict(), wan.to_json_string(), max_shard_size=30_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    intact = shards[1].read_bytes()
    for content in (intact[: len(intact) // 2], intact[:4], b"", b"\xff" * 100):
        shards[1].write_bytes(content)
        assert shards[1].name in refusal(tmp_path, tiny_wan(1))
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path, tiny_wan(1))
    for index in ("{", "[]", "{}", json.dumps({"weight_map": {"a": "../other.safetensors"}})):
        (tmp_path / INDEX).write_text(index)
        assert INDEX in refusal(tmp_path, tiny_wan(1))


def test_error_for_a_folder_without_weights_lists_its_files(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "found: pytorch_model.bin" in refusal(tmp_path, {})
    assert "no such folder" in refusal(tmp_path / "absent", {})


def test_meta_tensors_raise(tmp_path):
    save_tensors(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="w is on the meta device"):
        load_weights(tmp_path, torch.nn.ParameterDict({"w": torch.empty(2, device="meta")}))


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_export_equals_the_cast_of_from_pretrained(wan, tmp_path, dtype):
    wan.save_pretrained(tmp_path / "fp32")
    export_transformer(
        wan.state_dict(), wan.to_json_string(), tmp_path / "out", dtype, WanTransformer3DModel._keep_in_fp32_modules
    )
    cast = WanTransformer3DModel.from_pretrained(tmp_path / "fp32", torch_dtype=dtype).state_dict()
    assert same(dict(StoredTensors(tmp_path / "out")), dict(cast))
    assert {tensor.dtype for tensor in cast.values()} == {dtype, torch.float32}
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype).state_dict()
    assert same(dict(again), dict(cast))


def test_integer_tensors_are_not_cast(tmp_path):
    state = {"ids": torch.arange(3), "w": torch.ones(2), "norm.w": torch.ones(2), "normal.w": torch.ones(2)}
    export_transformer(state, "{}", tmp_path / "out", torch.bfloat16, ["norm"])
    dtypes = {name: tensor.dtype for name, tensor in StoredTensors(tmp_path / "out").items()}
    assert dtypes == {
        "ids": torch.int64, "w": torch.bfloat16, "norm.w": torch.float32, "normal.w": torch.bfloat16
    }  # fmt: skip


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.bfloat16), (1e6, torch.float16)])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, value, dtype):
    state = {"good": torch.ones(4000), "bad.weight": torch.tensor([1.0, value])}
    with pytest.raises(UserError) as caught:
        export_transformer(state, "{}", tmp_path / "out", dtype, max_shard_size=100)
    assert caught.value.exit_code == NUMERICS and "bad.weight" in caught.value.line()
    assert list(tmp_path.iterdir()) == []


def test_a_second_export_renames_the_first(tmp_path):
    for value in (1.0, 2.0, 3.0):
        export_transformer({"w": torch.full((2,), value)}, "{}", tmp_path / "transformer", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "transformer", "transformer-superseded", "transformer-superseded-2"
    ]  # fmt: skip
    assert StoredTensors(tmp_path / "transformer")["w"].tolist() == [3.0, 3.0]
    assert StoredTensors(tmp_path / "transformer-superseded")["w"].tolist() == [1.0, 1.0]


def test_equal_saves_are_byte_identical(tmp_path):
    facts = {name: name.upper() for name in ("steps", "shift", "task", "größe", 'quote " and \\')}
    tensors = {"weight": torch.arange(6.0), "bias": torch.ones(2)}
    for number in range(8):
        save_tensors(tmp_path / str(number), tensors, metadata=facts)
    files = [tmp_path / str(number) / f"{WEIGHTS}.safetensors" for number in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt", **facts}
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_failed_export_leaves_the_old_one_unchanged(tmp_path):
    export_transformer({"w": torch.ones(2)}, "{}", tmp_path / "out", torch.float32)

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(SaveError, match="File too large"):
            export_transformer({"w": torch.zeros(4000)}, "{}", tmp_path / "out", torch.float32)

    assert wait_for(fork(full_disk)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert StoredTensors(tmp_path / "out")["w"].tolist() == [1.0, 1.0]


def test_published_folder_has_the_permissions_of_the_umask(tmp_path):
    """Temporary folders are private by default; folders renamed from them must follow the user's umask."""
    before = os.umask(0o022)
    try:
        publish_folder(tmp_path / "out", lambda folder: save_tensors(folder, {"w": torch.zeros(1)}, stem="x"))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "x.safetensors").stat().st_mode & 0o777 == 0o644
