"""Runs with --stream_blocks and --base_precision: equal numbers, resume, export, and the bfloat16 base for a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exports
import forkserver
import launches
import originals
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file

BLOCKS = 4
LORA = {
    "lora_rank": 4, "trainable_modules": None, "tokenizer_max_length": 16, "num_train_epochs": None, "lr_warmup_steps": 0,
}  # fmt: skip
KINDS = {
    "wan2.1 normal": (tiny.build_wan_t2v, {"layers": BLOCKS}),
    "wan2.1 i2v": (tiny.build_wan_i2v, {"layers": BLOCKS}),
    "hunyuanvideo normal": (tiny.build_hunyuan_t2v, {}),
    "hunyuanvideo i2v": (tiny.build_hunyuan_i2v, {}),
}


class SmallRuns:
    """Runs of models with four blocks; runs with equal settings are run once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, tiny.make_dataset(folder / "data", copies=2)
        self._done: dict[str, runs.Outcome] = {}

    def model(self, kind: str) -> Path:
        folder = self.folder / kind.replace(" ", "-")
        build, sizes = KINDS[kind]
        return folder if folder.is_dir() else build(folder, **sizes)

    def __call__(self, kind: str = "wan2.1 normal", steps: int = 4, **changes: Any) -> runs.Outcome:
        family, mode = kind.split()
        settings = {**LORA, "train_mode": mode, "max_train_steps": steps, "checkpointing_steps": steps // 2, **changes}
        if mode == "i2v" and family == "wan2.1":
            settings["tokenizer_max_length"] = None  # a model with an image embedder takes 512
        name = repr((kind, sorted(settings.items(), key=str)))
        if name not in self._done:
            folder = settings.pop("output_dir", self.folder / f"run-{len(self._done)}")
            flags = runs.train_flags(family, self.model(kind), self.metadata, folder, **settings)
            self._done[name] = runs.train(flags, runs.train_script(family))
            assert self._done[name].code == 0, self._done[name].stderr
        return self._done[name]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    return SmallRuns(tmp_path_factory.mktemp("small"))


def numbers(outcome: runs.Outcome) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in outcome.metrics]


def adapters(outcome: runs.Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.folder / "pytorch_lora_weights.safetensors")


def assert_alike(found: runs.Outcome, expected: runs.Outcome) -> None:
    assert numbers(found) == numbers(expected)
    exported, wanted = adapters(found), adapters(expected)
    assert exported.keys() == wanted.keys() and all(torch.equal(exported[key], wanted[key]) for key in wanted)


def test_streamed_blocks_train_the_same(small: SmallRuns) -> None:
    streamed = small(stream_blocks="all")
    assert f"streaming  {BLOCKS} of {BLOCKS} blocks: their frozen weights rest in " in streamed.stdout
    assert_alike(streamed, small())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_losses_and_a_resumed_run_are_bit_identical(small: SmallRuns, kind: str, precision: str) -> None:
    """Streamed and with every copy of inputs on the host; stopped after five steps and resumed without streaming."""
    resident = small(kind, 10, base_precision=precision)
    streamed = small(kind, 10, base_precision=precision, stream_blocks="all", offload_activations=True)
    assert_alike(streamed, resident)
    assert all(loss > 0 for loss in resident.losses)
    if precision != "bf16":
        plain = small(kind, 10)
        assert numbers(resident) != numbers(plain)
        assert resident.losses == pytest.approx(plain.losses, rel=0.05)
        assert f"base       {precision}: the output of a block differs by " in resident.stdout
    checkpoint = streamed.folder / "checkpoint-5"
    resumed = small(kind, 10, base_precision=precision, output_dir=streamed.folder, resume_from_checkpoint=checkpoint)
    assert numbers(resumed) == numbers(resident)


@pytest.mark.slow
def test_a_resume_in_another_precision_says_so(small: SmallRuns, tmp_path: Path) -> None:
    begun = small(base_precision="int8", output_dir=tmp_path / "run", max_train_steps=2, checkpointing_steps=1)
    at = {"output_dir": begun.folder, "resume_from_checkpoint": begun.folder / "checkpoint-2"}
    assert "before the resume" not in small(base_precision="int8", max_train_steps=3, **at).stdout
    other = small(max_train_steps=4, **{**at, "resume_from_checkpoint": "latest"})
    assert "warning: --base_precision is bf16, and was int8 before the resume" in other.stdout


@pytest.mark.slow
def test_three_of_four_blocks_may_be_streamed_and_auto_streams_what_does_not_fit(small: SmallRuns) -> None:
    some = small(stream_blocks=3)
    assert f"streaming  3 of {BLOCKS} blocks" in some.stdout
    roomy = small(stream_blocks="auto")
    assert "streaming  no block: by the estimate all of them fit" in roomy.stdout
    tight = small(stream_blocks="auto", gpu_memory=1)
    assert f"streaming  {BLOCKS} of {BLOCKS} blocks" in tight.stdout
    for outcome in (some, roomy, tight):
        assert_alike(outcome, small())
    names = {
        json.loads((o.folder / "checkpoint-4/trainer_state.json").read_text())["run"] for o in (some, roomy, small())
    }
    assert len(names) == 1


@pytest.mark.slow
def test_a_quantised_run_is_merged_into_the_bfloat16_base(small: SmallRuns) -> None:
    outcome = small(base_precision="int8", export_layouts=["merged"], validation_rows=1)
    base = runs.read_weights(small.model("wan2.1 normal") / "transformer")
    merged = runs.read_weights(outcome.folder / "transformer_merged")
    assert merged.keys() == base.keys()
    adapted = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in adapters(outcome)}
    for name, value in base.items():
        if name.removesuffix(".weight") not in adapted:
            assert torch.equal(merged[name].float(), value.to(merged[name].dtype).float()), name
    changed = [
        name for name in adapted if not torch.equal(merged[f"{name}.weight"], base[f"{name}.weight"].bfloat16())
    ]
    assert changed
    assert outcome.validation  # the held-out loss is that of the quantised model


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("wan2.1 normal", "int8"), ("hunyuanvideo normal", "nf4")])
def test_a_quantised_text_encoder_trains_and_is_cached_separately(
    small: SmallRuns, kind: str, precision: str, tmp_path: Path
) -> None:
    """Its losses are near those of bf16 and not equal; from the cache they are equal, and bf16 uses other entries."""
    plain, quantised = small(kind), small(kind, text_encoder_precision=precision)
    assert f"text       {precision}: the output of a block differs by " in quantised.stdout
    assert numbers(quantised) != numbers(plain)
    assert quantised.losses == pytest.approx(plain.losses, rel=0.05)
    cached = small(kind, text_encoder_precision=precision, latent_cache=tmp_path / "cache", low_vram=True)
    assert numbers(cached) == numbers(quantised)
    again = small(
        kind,
        text_encoder_precision=precision,
        latent_cache=tmp_path / "cache",
        low_vram=True,
        output_dir=tmp_path / "again",
    )
    assert ": 0 of " in cached.stdout and ": 0 of " not in again.stdout
    assert numbers(again) == numbers(quantised)
    other = small(kind, latent_cache=tmp_path / "cache")
    assert " to encode, " in other.stdout and numbers(other) == numbers(plain)
    names = {json.loads((o.folder / "checkpoint-4/trainer_state.json").read_text())["run"] for o in (plain, other)}
    assert len(names) == 1


def write_fp8(model: Path, path: Path) -> None:
    """Write a transformer as ComfyUI's scaled fp8."""
    state = originals.rebuilt(runs.read_weights(model / "transformer"), "wan")
    stored: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, value in state.items():
        stored[name] = value.bfloat16()
        if value.ndim == 2 and name.startswith("blocks."):
            scale = value.abs().max().float() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    save_file(stored, path)


@pytest.mark.slow
def test_a_base_in_8_bits_is_trained_as_it_is_and_merged_into_its_bf16_model(small: SmallRuns, tmp_path: Path) -> None:
    model = small.model("wan2.1 normal")
    write_fp8(model, tmp_path / "fp8.safetensors")
    settings = {"transformer_path": tmp_path / "fp8.safetensors"}
    taken, plain = small(base_precision="fp8", **settings), small(**settings)
    assert "base       fp8: the weights are those of the file, which has them in 8 bits" in taken.stdout
    assert numbers(taken) == numbers(plain)
    merged = small(base_precision="fp8", export_layouts=["merged"], merge_base=model, **settings)
    assert numbers(merged) == numbers(taken)
    words = [merged.folder / "checkpoint-4", tmp_path / "merged", "--layout", "diffusers", "--base", model]
    assert exports.export(*words, "--dtype", "bf16") == 0
    found, expected = (runs.read_weights(path) for path in (merged.folder / "transformer_merged", tmp_path / "merged"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_a_small_card_fills_its_cache_and_trains_from_it(small: SmallRuns, tmp_path: Path) -> None:
    """--cache_only with a text encoder in 4 bits and the VAE in tiles; the training then needs no encoder."""
    prepared = {"text_encoder_precision": "nf4", "vae_tiling": True, "low_vram": True}
    card = {**prepared, "base_precision": "nf4", "stream_blocks": "all", "offload_activations": True}
    cache = {"latent_cache": tmp_path / "cache"}
    filled = small(**prepared, **cache, cache_only=True, output_dir=tmp_path / "filled")
    assert "text       nf4: the output of a block differs by " in filled.stdout and not filled.metrics
    assert "the latent cache has everything that the run needs" in filled.stdout
    trained = small(**card, **cache)
    assert "text       nf4" not in trained.stdout  # no encoder was loaded
    assert f"streaming  {BLOCKS} of {BLOCKS} blocks" in trained.stdout
    assert numbers(trained) == numbers(small(**card)) != numbers(small())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_two_processes_share_the_weights_at_rest(tmp_path: Path, precision: str) -> None:
    ddp = launches.BackendRuns(tmp_path / "base", "hunyuanvideo normal", 4, **LORA)
    cases = {"resident": {}, "streamed": {"stream_blocks": "all"}}
    for name, changes in cases.items():
        ranks = ddp.run_ranks("ddp", tmp_path / name, base_precision=precision, **changes)
        assert launches.exit_codes(ranks) == [0, 0], launches.output_of(ranks)
    found = [[(step["loss"], step["grad_norm"]) for step in forkserver.read_steps(tmp_path / name)] for name in cases]
    assert found[0] == found[1] and len(found[0]) == 4
