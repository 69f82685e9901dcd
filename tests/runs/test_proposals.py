"""The advice of a dry run is true: its flags are added to the command, and that run fits the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from proposed import launched, output_flags, printed_proposals

from videox.estimate.gpus import GPUS

GIB = 2**30
BUCKETS = ["--enable_bucket", "--training_with_video_token_length", "--random_hw_adapt"]
PUBLISHED = [*BUCKETS, "--train_batch_size", "1", "--mixed_precision", "bf16", "--low_vram", "--vae_mini_batch", "1"]
LORA = ["--lora_rank", "64"]
ON_EIGHT = ["--dry_run_processes", "8", "--dry_run_backend"]
PAIRS = [
    ("wan2.1-t2v-1.3b", "rtx4080", LORA),
    ("wan2.1-t2v-1.3b", "rtx4090", []),
    ("wan2.1-t2v-1.3b", "l40s", ["--gradient_accumulation_steps", "2", "--train_batch_size", "4"]),
    ("wan2.1-t2v-14b", "rtx4090", [*PUBLISHED, *LORA]),
    ("wan2.1-t2v-14b", "a6000", [*LORA, "--train_batch_size", "2"]),
    ("wan2.1-t2v-14b", "a100-80", PUBLISHED),
    ("wan2.1-t2v-14b", "h200", [*PUBLISHED, *ON_EIGHT, "ddp"]),
    ("wan2.1-i2v-14b", "a40", [*PUBLISHED, *LORA]),
    ("wan2.1-i2v-14b", "h100", [*PUBLISHED, "--optimizer", "adamw_bf16"]),
    ("hunyuanvideo-t2v", "rtx5090", [*PUBLISHED, *LORA]),
    ("hunyuanvideo-t2v", "h100", [*PUBLISHED, *ON_EIGHT, "zero2"]),
    ("hunyuanvideo-i2v", "b200", [*PUBLISHED, "--optimizer", "adamw_offload"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "card", "flags"), PAIRS, ids=[f"{model}, {card}" for model, card, _ in PAIRS])
def test_a_run_with_the_proposed_flags_fits(
    model: str, card: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runs.train_script("wan2.1" if model.startswith("wan") else "hunyuanvideo")
    mode = "i2v" if "i2v" in model else "normal"
    base = [*output_flags(tmp_path), "--dry_run_model", model, "--gpu", card, "--train_mode", mode, *flags]
    first = runs.train(base, script)
    assert first.code == 0, first.stderr
    proposals = printed_proposals(first.stdout)
    assert proposals and all(fits and changes for fits, changes, _ in proposals), first.stdout
    for _, changes, gib in proposals:
        words = list(base)
        with monkeypatch.context() as environment:
            for change in changes:
                more, variables = launched(change)
                words += [str(tmp_path / "cache") if word == "DIR" else word for word in more]
                for name, value in variables.items():
                    environment.setenv(name, value)
            second = runs.train(words, script)
        assert second.code == 0, f"{changes}: {second.stderr}"
        total = json.loads((tmp_path / "plan_report.json").read_text())["memory"]["total"] / GIB
        print(f"{model:<17} {card:<8} {total:6.1f} of {GPUS[card].gib:g} GiB: {' '.join(changes)}")
        assert total <= 0.95 * GPUS[card].gib and "fits in" in second.stdout
        assert total == pytest.approx(gib, rel=0.01, abs=0.1), "the memory that the proposal states"
