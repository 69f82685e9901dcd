"""Tests of videox.weights.safe_pickle: no pickle runs code, and a damaged file is a one-line error."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from videox.errors import MODEL, UserError
from videox.weights.lazy_tensor import BlockReader, from_stored
from videox.weights.safe_pickle import OpaqueObject, StoredTensor, read_archive, read_pickle

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: off


class Canary:
    """Creates a file when it is unpickled by a reader that runs code."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def read_back(stored: StoredTensor) -> torch.Tensor:
    with BlockReader() as reader:
        parts = [block.clone() for block in reader.read_blocks(from_stored("x", stored))]
    flat = torch.cat(parts) if parts else torch.empty(0, dtype=stored.dtype)
    return flat.reshape(stored.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_back_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randint(0, 2, (6, 10, 4)).to(dtype)
    tensors = {
        "plain": base,
        "part": base[2:4],
        "transposed": base.transpose(0, 2),
        "spread": base[:, :1].expand(6, 5, 4),
        "strided": base[::2, 1::3],
        "scalar": base[0, 0, 0],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base) if dtype.is_floating_point else base,
    }
    torch.save(tensors, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].contiguous == tensor.is_contiguous(), name
        assert torch.equal(read_back(found[name]), tensor), name


def test_non_tensor_content_is_read_without_its_classes(tmp_path: Path) -> None:
    content = {
        "step": 7,
        "names": ["a", "b"],
        "shape": torch.Size([2, 3]),
        "order": OrderedDict(x=1),
        "set": {1, 2},
        "args": argparse.Namespace(lr=1),
        "array": np.arange(3),
        "number": np.float64(2.0),
        "device": torch.device("cpu"),
        "folder": Path("x"),
    }
    torch.save(content, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    plain = ("step", "names", "shape", "order", "set")
    assert {name: found[name] for name in plain} == {name: content[name] for name in plain}
    assert isinstance(found["args"], OpaqueObject) and found["args"].state == {"lr": 1}
    assert all(isinstance(found[name], OpaqueObject) for name in ("array", "number", "device", "folder"))


@pytest.mark.parametrize("module", ["builtins", "__builtin__"])  # protocol 4 and 2
def test_enum_members_pickled_by_python_3_11_2_are_read(tmp_path: Path, module: str) -> None:
    program = f"(dVkind\nc{module}\ngetattr\n(cdeepspeed.runtime.zero.config\nZeroStageEnum\nVweights\ntRs.".encode()
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", program)
    found = read_archive(tmp_path / "a.pt")["kind"]
    assert isinstance(found, OpaqueObject) and found.arguments == ("weights",)
    assert found.name == "deepspeed.runtime.zero.config.ZeroStageEnum"


def malicious_objects(target: Path) -> dict[str, Canary]:
    command = f"touch {target}"
    return {
        "system": Canary(os.system, command),
        "eval": Canary(eval, f"open({str(target)!r}, 'w')"),
        "getattr": Canary(getattr, "text", "upper"),
        "getattr of a type": Canary(getattr, OrderedDict, "fromkeys"),
        "open": Canary(open, str(target), "w"),
        "torch": Canary(torch.save, {}, str(target)),
        "import": Canary(__import__, "antigravity"),
        "nested": Canary(OrderedDict, [("x", Canary(os.system, command))]),
    }


@pytest.mark.parametrize("name", malicious_objects(Path("x")))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_pickle_runs_code(tmp_path: Path, name: str, protocol: int) -> None:
    target = tmp_path / "ran"
    evil = malicious_objects(target)[name]
    torch.save({"optimizer_state_dict": evil}, tmp_path / "a.pt", pickle_protocol=max(protocol, 2))
    (tmp_path / "b").write_bytes(pickle.dumps(evil, protocol=protocol))
    for read, path in ((read_archive, tmp_path / "a.pt"), (read_pickle, tmp_path / "b")):
        with pytest.raises(UserError, match=r"names .*no code was run") as refused:
            read(path)
        assert refused.value.exit_code == MODEL and str(path) in str(refused.value)
    assert not target.exists()
    if name == "system":  # control: a reader that trusts the file does run it
        torch.load(tmp_path / "a.pt", weights_only=False)
        assert target.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"(S'touch RAN'\nios\nsystem\n.",  # INST
        b"cos\nsystem\n(S'touch RAN'\ntR.",  # GLOBAL, REDUCE
        b"(cos\nsystem\nS'touch RAN'\no.",  # OBJ
        b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c\x09touch RAN\x85R.",  # a dotted name
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02Vx\nQ.",  # BINPERSID outside an archive
        b"\x80\x02ccollections\nOrderedDict\n(dVmodel\nNVx\nNsb.",  # BUILD of a class
    ],
    ids=["inst", "global", "obj", "dotted", "newobj", "ext", "persid", "build"],
)
def test_no_opcode_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(program)
    with pytest.raises(UserError):
        read_pickle(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_pickle_does_not_change_the_next_read(tmp_path: Path) -> None:
    program = b"\x80\x02cargparse\nNamespace\n}(X\x05\x00\x00\x00stateK\x05u\x86b."  # sets attributes on the class
    (tmp_path / "a").write_bytes(program)
    with pytest.raises(UserError):
        read_pickle(tmp_path / "a")
    assert OpaqueObject.state is None and OpaqueObject.arguments == ()
    (tmp_path / "b").write_bytes(pickle.dumps(argparse.Namespace()))
    assert not read_pickle(tmp_path / "b").state


@settings(max_examples=150, deadline=None)
@given(cut=st.floats(0, 1), at=st.floats(0, 1), byte=st.integers(0, 255))
@example(cut=0.0, at=0.23870197876013105, byte=4)  # the length of a name, which would move the start of a storage
def test_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, cut, at, byte) -> None:
    folder = tmp_path_factory.mktemp("damage")
    torch.save({"x": torch.arange(300.0), "y": [argparse.Namespace(z=1)]}, folder / "a.pt")
    whole_file = (folder / "a.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole_file[: int(cut * (len(whole_file) - 1))])
    with pytest.raises(UserError, match="damaged or truncated"):
        read_archive(folder / "cut.pt")
    changed = bytearray(whole_file)
    changed[int(at * (len(changed) - 1))] = byte
    (folder / "changed.pt").write_bytes(changed)
    try:
        found = read_archive(folder / "changed.pt")
    except UserError as error:
        assert "\n" not in error.line()
    else:  # the byte is in a value, or in a part that is not read
        stored = found.get("x")
        assert stored is None or stored.start + stored.extent * 4 <= len(changed)


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as forged:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"K\x04\x85") == 1  # the shape (4,)
                content = content.replace(b"K\x04\x85", b"K\x05\x85")
            forged.writestr(name, content)
    with pytest.raises(UserError, match="beyond its storage"):
        read_archive(tmp_path / "b.pt")


@pytest.mark.parametrize("change", ["compressed", "big-endian", "two", "text", "moved"])
def test_archives_not_written_by_torch_save_are_refused(tmp_path: Path, change: str) -> None:
    torch.save({"x": torch.zeros(4)}, tmp_path / "a.pt")
    path = tmp_path / "b.pt"
    mode = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(path, "w", mode) as forged:
        for name in archive.namelist():
            forged.writestr(name, b"big" if change == "big-endian" and "byteorder" in name else archive.read(name))
        if change == "two":
            forged.writestr("other/data.pkl", b"N.")
    if change == "text":
        path.write_text("no archive")
    if change == "moved":
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\3\4", 0, content.index(b"/data/0"))] = 0
        path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or truncated"):
        read_archive(path)


def test_an_archive_inside_a_larger_file_is_read(tmp_path: Path) -> None:
    torch.save(torch.arange(9.0).reshape(3, 3), tmp_path / "a")
    inner = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(struct.pack("5x") + inner + inner)  # at an unaligned offset
    for start in (5, 5 + len(inner)):
        stored = read_archive(tmp_path / "b", start, len(inner))
        assert torch.equal(read_back(stored), torch.arange(9.0).reshape(3, 3))
    with pytest.raises(UserError, match="are needed"):
        read_archive(tmp_path / "b", 5 + len(inner), len(inner) + 1)
