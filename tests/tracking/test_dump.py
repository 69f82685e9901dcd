"""Tests of videox.tracking.dump: the dump contains the tensors of the step, also shared and strided ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st

from videox.data.dataset import Batch
from videox.shapes import Bucket
from videox.tracking.dump import dump_folder, write_dump


def batch(captions: list[str], micro: int = 0) -> Batch:
    count = len(captions)
    return Batch(
        pixels=torch.arange(count * 5 * 32 * 48 * 3, dtype=torch.int64).to(torch.uint8).view(count, 5, 32, 48, 3),
        decoded=list(range(count)),
        real=[True] * count,
        cached=[{}] * count,
        sample_keys=[None] * count,
        captions=captions,
        weights=np.full(count, 1 / count),
        strata=np.full(count, 0.5),
        timesteps="across_steps",
        keys=list(range(count)),
        variants=list(range(count)),
        rows=list(range(7, 7 + count)),
        frame_indices=[[3, 5, 7, 9, 11]] * count,
        bucket=Bucket(5, 32, 48),
        step=2,
        micro=micro,
        last=True,
        bad=[],
    )


@given(step=st.integers(1, 1000), dump_steps=st.lists(st.integers(1, 1000), max_size=5))
def test_only_steps_in_dump_steps_have_a_folder(step: int, dump_steps: list[int]) -> None:
    folder = dump_folder(Path("out"), step, dump_steps)
    assert folder == (Path("out/dump") / f"step-{step}" if step in dump_steps else None)


@pytest.mark.parametrize("captions", [["a rabbit", ""], ['line\nbreak \N{BLACK HEART SUIT} "quoted" \'\\']])
def test_dump_reads_back_equal(tmp_path: Path, captions: list[str]) -> None:
    latents = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.ones(()))
    tensors = {
        "latents": latents,
        "same": latents,  # the same memory under a second name
        "transposed": latents.transpose(1, 2),
        "slice": latents[:, 3:5],
        "prediction": latents * weight,  # requires a gradient
        "half": latents.bfloat16(),
        "loss": torch.tensor(0.5, dtype=torch.float64),
    }
    inputs = {"hidden_states": latents, "timestep": torch.tensor([1.0, 2.0]), "return_dict": False}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    given_batch = batch(captions, micro=3)
    path = write_dump(tmp_path / "dump" / "step-1", 1, given_batch, inputs, **tensors)
    assert path == tmp_path / "dump" / "step-1" / "rank-1-micro-3.safetensors"

    dump = runs.read_dump(path)
    assert dump.tensors.keys() == {"pixels", *tensors, "model.hidden_states", "model.timestep"}
    assert torch.equal(dump["pixels"], given_batch["pixels"]) and dump["pixels"].dtype == torch.uint8
    for name, tensor in before.items():
        assert dump[name].dtype == tensor.dtype and torch.equal(dump[name], tensor)
        assert torch.equal(tensors[name].detach(), tensor)
    assert torch.equal(dump["model.hidden_states"], latents)
    assert (dump.rows, dump.captions, dump.bucket) == (given_batch["rows"], captions, [5, 32, 48])
    assert dump.frame_indices == given_batch["frame_indices"]
    tensors["prediction"].sum().backward()  # the dump does not change the backward pass
    assert weight.grad is not None
