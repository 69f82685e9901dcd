"""Tests of videox.weights.weight_files: which files of a folder are one set of weights, under the names that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from videox.errors import MODEL, UserError
from videox.weights.reader import open_tensors
from videox.weights.weight_files import has_standard_names, weight_files

STEM = "diffusion_pytorch_model"


def write(folder: Path, *names: str, index: str | None = None) -> Path:
    """Write one tensor to each file, numbered by the file, and an index of these files."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.full((2,), float(number))}, folder / name)
    if index:
        weight_map = {f"t{number}": name for number, name in enumerate(names)}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        weight_files(folder)
    assert raised.value.exit_code == MODEL and raised.value.hint
    return raised.value.line()


@pytest.mark.parametrize(
    ("names", "index", "standard"),
    [
        ([f"{STEM}.safetensors"], None, True),
        ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"],
         f"{STEM}.safetensors.index.json", True),
        ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"], None, False),
        ([f"{STEM}-1-of-3.safetensors", f"{STEM}-2-of-3.safetensors", f"{STEM}-3-of-3.safetensors"], None, False),
        ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"],
         "model.safetensors.index.json", False),  # as VideoX-Fun's zero_to_bf16.py writes it
        ([f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"],
         f"{STEM}.safetensors.index.fp16.json", False),
        ([f"{STEM}-00001-of-00002.bf16.safetensors", f"{STEM}-00002-of-00002.bf16.safetensors"], None, False),
        ([f"{STEM}.fp16.safetensors"], None, False),
        (["model.safetensors"], None, False),
        (["my_finetune.safetensors"], None, False),
        (["wan2.1_t2v_1.3B_bf16.safetensors"], None, False),
        (["wan.sft"], None, False),
        (["part1.safetensors", "part2.safetensors"], None, False),
        (["step-500-00001-of-00002.safetensors", "step-500-00002-of-00002.safetensors"], None, False),
    ],
)  # fmt: skip
def test_one_set_is_read_under_any_name(tmp_path: Path, names: list[str], index: str | None, standard: bool) -> None:
    folder = write(tmp_path / "m", *names, index=index)
    assert [path.name for path in weight_files(folder)] == sorted(names)
    assert has_standard_names(folder) == standard
    assert sorted(open_tensors(folder)) == [f"t{number}" for number in range(len(names))]


@pytest.mark.parametrize(
    ("chosen", "others"),
    [
        (f"{STEM}.safetensors", [f"{STEM}.fp16.safetensors"]),
        (f"{STEM}.safetensors", ["my_finetune.safetensors"]),
        (f"{STEM}.safetensors", [f"{STEM}.bf16.safetensors", "pytorch_lora_weights.safetensors"]),
        (f"{STEM}.bf16.safetensors", [f"{STEM}.fp16.safetensors"]),
        (f"{STEM}.fp16.safetensors", ["a.safetensors", "b.safetensors"]),
        ("model.safetensors", ["model.fp16.safetensors"]),
    ],
)
def test_the_usual_name_without_variant_is_preferred(tmp_path: Path, chosen: str, others: list[str]) -> None:
    folder = write(tmp_path / "m", chosen, *others)
    assert [path.name for path in weight_files(folder)] == [chosen]


def test_a_complete_file_is_preferred_to_an_index_without_its_shards(tmp_path: Path) -> None:
    shards = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    folder = write(tmp_path / "m", *shards, index=f"{STEM}.safetensors.index.json")
    write(folder, f"{STEM}.safetensors")
    assert [path.name for path in weight_files(folder)] == shards  # both are complete: as from_pretrained
    (folder / shards[1]).unlink()
    assert [path.name for path in weight_files(folder)] == [f"{STEM}.safetensors"]
    assert not has_standard_names(folder)  # from_pretrained would follow the index


def test_a_variant_is_read_beside_the_index_of_files_that_were_not_downloaded(tmp_path: Path) -> None:
    """As `hf download --include "*.bf16*" "*.json"` leaves a folder: it has every index, and one variant's shards."""
    shards = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    folder = write(tmp_path / "m", *shards, index=f"{STEM}.safetensors.index.json")
    for name in shards:
        (folder / name).rename(folder / name.replace(STEM, f"{STEM}.bf16"))
    chosen = [name.replace(STEM, f"{STEM}.bf16") for name in shards]
    assert [path.name for path in weight_files(folder)] == chosen and not has_standard_names(folder)
    (folder / "lora.safetensors").write_bytes((folder / chosen[0]).read_bytes())
    assert [path.name for path in weight_files(folder)] == chosen
    (folder / chosen[0]).rename(folder / shards[0])  # now the download of the others began
    assert f"{shards[1]}, which is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ([f"{STEM}-00001-of-00003.safetensors", f"{STEM}-00003-of-00003.safetensors"],
         "has 2 of 3 shards, diffusion_pytorch_model-00002-of-00003.safetensors is missing"),
        ([f"{STEM}.fp16-00002-of-00002.safetensors"],
         "has 1 of 2 shards, diffusion_pytorch_model.fp16-00001-of-00002.safetensors is missing"),
        (["mine-1-of-2.safetensors"], "has 1 of 2 shards, mine-2-of-2.safetensors is missing"),
        ([f"{STEM}-00006-of-00007.safetensors"], "has 1 of 7 shards, diffusion_pytorch_model-00001-of-00007"),
    ],
)  # fmt: skip
def test_missing_shards_are_named_without_an_index(tmp_path: Path, names: list[str], missing: str) -> None:
    assert missing in refusal(write(tmp_path / "m", *names))


def test_several_sets_without_a_usual_name_are_refused(tmp_path: Path) -> None:
    line = refusal(write(tmp_path / "m", "mine.safetensors", "vae.safetensors"))
    assert "contains several sets of weights (mine; vae)" in line and "rename" in line


def test_a_tensor_in_two_files_names_both(tmp_path: Path) -> None:
    for name in ("part1", "part2"):
        save_file({"t": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"contains t twice, in part1\.safetensors and part2\.safetensors"):
        open_tensors(tmp_path)


def test_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "wan.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refusal(tmp_path / "wan.gguf")
    assert "contains no .safetensors weights (found: wan.gguf)" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "none")
