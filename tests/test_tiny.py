"""Serves the other tests: what tiny.py writes is what diffusers and the decoders read."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from diffusers import WanPipeline
from PIL import Image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("model"))


def test_pipeline_loads_and_samples(model: Path) -> None:
    pipeline = WanPipeline.from_pretrained(model)
    assert 20_000 < sum(p.numel() for p in pipeline.transformer.parameters()) < 40_000
    generator = torch.Generator().manual_seed(0)
    options = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "np"}
    frames = pipeline(prompt="a rabbit walks", generator=generator, **options).frames
    assert frames.shape == (1, 9, 48, 64, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0


def test_captions_give_varied_tokens(model: Path) -> None:
    tokenizer = WanPipeline.from_pretrained(model, transformer=None, vae=None, text_encoder=None).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    rows = [tokenizer(caption)["input_ids"] for caption in tiny.CAPTIONS]
    assert all(row[-1] == 1 and 0 not in row and 2 not in row for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows)
    words = {word for caption in tiny.CAPTIONS for word in caption.split()}
    assert len({token for row in rows for token in row} - {1}) == len(words)  # each known word is one token
    for row, caption in zip(rows, tiny.CAPTIONS, strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == caption


def test_equal_arguments_give_equal_files(model: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = tiny.build_wan_t2v(tmp_path / "again")
    other = tiny.build_wan_t2v(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    names = sorted(p.relative_to(model) for p in model.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((model / name).read_bytes() == (again / name).read_bytes() for name in names)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (model / weights).read_bytes() != (other / weights).read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clip_reads_back(tmp_path: Path, suffix: str) -> None:
    path = tiny.write_clip(tmp_path / f"clip{suffix}", frames=13, width=96, height=64, fps=24)
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(container.streams.video[0].average_rate) == 24.0
    assert frames.shape == (13, 64, 96, 3)
    for i in range(13):  # the square is where it was drawn, so a frame tells its own number
        bright = np.flatnonzero(frames[i, 32, :, 0] > 200)
        assert abs(int(bright[0]) - tiny.square_left(i, 96)) <= 1


def test_dataset_is_what_its_metadata_says(tmp_path: Path) -> None:
    rows = json.loads(tiny.make_dataset(tmp_path, copies=2, declare_sizes=True).read_text(encoding="utf-8"))
    assert len(rows) == 2 * len(tiny.DATASET)
    lengths = set()
    for row in rows:
        path = tmp_path / row["file_path"]
        if row["type"] == "image":
            assert Image.open(path).size == (row["width"], row["height"])
            continue
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.frames) == (row["width"], row["height"], row["num_frames"])
            lengths.add(stream.frames)
    assert len(lengths) >= 3
