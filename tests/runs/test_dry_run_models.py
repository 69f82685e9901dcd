"""Dry runs of the published models on 8 x 80 GB, 80 GB and 24 GB, with the recipes nearest to them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import runs
import tiny

from videox.models.published import published_models
from videox.weights.expert_names import EXPERTS

recipes = tiny.load_script("benchmarks/recipes.py")
GIB = 2**30


class Planned(NamedTuple):
    """A published model, its --train_mode, and the recipes for eight cards of 80 GB, one of 80 and one of 24."""

    model: str
    mode: str
    names: tuple[str, str, str]


WAN_14B = ("i2v-14b-full-8x80gb-zero3", "i2v-14b-lora-80gb", "i2v-14b-lora-24gb")
WAN_22 = ("t2v-a14b-full-8x80gb-zero3", "t2v-a14b-lora-80gb", "t2v-a14b-lora-24gb")
PLANNED = (
    Planned("wan2.2-t2v-a14b", "normal", WAN_22),
    Planned("wan2.2-i2v-a14b", "i2v", WAN_22),
    Planned("wan2.1-flf2v-14b", "flf2v", WAN_14B),
    Planned("wan2.1-fun-14b-inp", "inpaint", WAN_14B),
    Planned("wan2.1-fun-1.3b-inp", "flf2v", (WAN_14B[0], "t2v-1.3b-full-80gb", "t2v-1.3b-full-24gb")),
)
CARDS = ("8x80", "80", "24")
QUICK = ("wan2.1-flf2v-14b", "24")
CASES = [
    pytest.param(planned, card, id=f"{planned.model} {card}",
                 marks=() if (planned.model, card) == QUICK else pytest.mark.slow)
    for planned in PLANNED for card in CARDS
]  # fmt: skip


@pytest.mark.parametrize(("planned", "card"), CASES)
def test_a_published_model_is_planned_and_fits(planned: Planned, card: str, tmp_path: Path) -> None:
    family = planned.model.split("-")[0]
    assert planned.model in published_models(family)
    name = planned.names[CARDS.index(card)]
    words = ["--dry_run_model", planned.model, "--train_mode", planned.mode]
    report = recipes.dry_run(family, name, tmp_path, *words)
    gib = report["memory"]["total"] / GIB
    host, disk = report["host"] / 1e9, report["disk"] / 1e9
    print(
        f"| {planned.model} | {card} | {name} | {gib:.1f} | {host:.0f} | {report['seconds']['step']:.3g} | {disk:.0f} |"
    )
    assert round(report["gpu_memory"] / GIB) == int(card.rpartition("x")[2])
    assert 0.05 * report["gpu_memory"] < report["memory"]["total"] < 0.95 * report["gpu_memory"]
    assert report["seconds"]["step"] > 0 and report["host"] > 0 and report["disk"] > 0


def test_what_flf2v_adds_to_image_to_video_is_counted(tmp_path: Path) -> None:
    """Features of a second picture cost FLOPs of cross-attention in each block, and an expert none."""
    name = WAN_14B[2]
    both, one = (
        recipes.dry_run("wan2.1", name, tmp_path, "--dry_run_model", model, "--train_mode", "flf2v")["flops_per_step"]
        for model in ("wan2.1-flf2v-14b", "wan2.1-i2v-14b")
    )
    assert 1.001 < both / one < 1.05


@pytest.mark.slow
def test_both_experts_have_one_plan(tmp_path: Path) -> None:
    """The window of noise changes neither samples nor sizes, so that both experts can use one latent cache."""
    model, metadata = tiny.build_wan22_t2v(tmp_path / "model"), tiny.make_dataset(tmp_path / "data", copies=2)
    plans = []
    for expert in EXPERTS:
        flags = {"expert": expert, "dry_run": True, "dry_run_plan": [1, 8]}
        argv = runs.train_flags("wan2.2", model, metadata, tmp_path / expert, **flags)
        outcome = runs.train(argv, runs.train_script("wan2.2"))
        assert outcome.code == 0, outcome.stderr
        plans.append([(tmp_path / expert / f"plan-{world}.jsonl").read_bytes() for world in (1, 8)])
    assert plans[0] == plans[1]
