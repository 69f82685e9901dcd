"""Tests of videox.estimate.module_facts: the stored facts of published models are those of their modules."""

from __future__ import annotations

import json
import math
import re
from types import ModuleType
from typing import Any

import pytest
import tiny

from videox.estimate import measure
from videox.estimate.module_facts import STORED, Modules, fact_key, stored_facts

VAES = {"fp32": False, "bf16": True}
AGREES = 1e-3  # relative, as in benchmarks/module_facts.py


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return tiny.load_script("benchmarks/module_facts.py")


def config_of(model: str, component: str) -> dict[str, Any]:
    path = STORED.parent / "models" / f"{model}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["components"][component])


def test_every_published_component_has_stored_facts(script: ModuleType) -> None:
    assert {fact_key(kind, config) for kind, config in script.published()} == set(stored_facts())


def test_the_stored_shapes_are_those_of_the_transformer(script: ModuleType) -> None:
    kind, config = script.WAN["transformer"], config_of("wan2.1-t2v-1.3b", "transformer")
    assert Modules({"transformer": (kind, config)}).shapes() == measure.parameter_shapes(measure.build(kind, config))


def test_the_stored_linear_layers_are_those_of_the_text_encoder(script: ModuleType) -> None:
    for kind, model in (
        (script.WAN["text_encoder"], "wan2.1-t2v-14b"),
        (script.HUNYUAN["text_encoder"], "hunyuanvideo-t2v"),
        (script.LLAVA["text_encoder"], "hunyuanvideo-i2v"),
    ):
        config = config_of(model, "text_encoder")
        expected = measure.linear_counts(measure.build(kind, config))
        assert Modules({"text_encoder": (kind, config)}).text_linear() == expected


@pytest.mark.parametrize(
    ("family", "model", "size"),
    [
        pytest.param("WAN", "wan2.1-t2v-14b", (17, 480, 832), marks=pytest.mark.slow),
        pytest.param("HUNYUAN", "hunyuanvideo-t2v", (33, 480, 832), marks=pytest.mark.slow),
    ],
)
def test_the_stored_facts_of_a_vae_are_measured_ones(
    family: str, model: str, size: tuple[int, int, int], script: ModuleType
) -> None:
    kind, config = getattr(script, family)["vae"], config_of(model, "vae")
    modules, vae = Modules({"vae": (kind, config)}), measure.build(kind, config)
    assert modules.elements("vae") == measure.element_count(vae)
    assert modules.vae_flops_per_pixel() == measure.vae_flops_per_pixel(vae)
    for half in VAES.values():
        real = measure.vae_peak_bytes(measure.build(kind, config, half=half), size)
        assert modules.vae_peak(size, half=half, tiled=False) == pytest.approx(real, rel=AGREES)
    assert modules.vae_peak(size, half=False, tiled=True) < modules.vae_peak(size, half=False, tiled=False)


@pytest.mark.slow
def test_the_stored_facts_are_those_that_the_benchmark_writes(script: ModuleType) -> None:
    for kind, config in script.published():
        assert script.facts_of(kind, config) == stored_facts()[fact_key(kind, config)], kind


def test_an_unknown_configuration_is_measured() -> None:
    config = {**config_of("wan2.1-t2v-1.3b", "vae"), "base_dim": 8}
    modules = Modules({"vae": ("diffusers.AutoencoderKLWan", config)})
    assert fact_key(*modules.components["vae"]) not in stored_facts()
    vae = measure.build(*modules.components["vae"])
    assert modules.elements("vae") == measure.element_count(vae) > 0
    assert modules.vae_peak((5, 64, 64), half=False, tiled=False) == measure.vae_peak_bytes(vae, (5, 64, 64))


def test_the_readme_has_the_size_of_each_model(script: ModuleType) -> None:
    readme = (STORED.parents[1] / "README.md").read_text(encoding="utf-8")
    for path in sorted((STORED.parent / "models").glob("*.json")):
        elements = 0
        for kind, config in script.components_of(path):
            modules = Modules({"transformer" if "Transformer" in kind else "part": (kind, config)})
            shapes = modules.shapes().values() if "Transformer" in kind else ()
            experts = 2 if "a14b" in path.stem else 1
            elements += experts * sum(map(math.prod, shapes)) if shapes else modules.elements("part")
        sizes = f"{round(2 * elements / 1e9)} to {round(4 * elements / 1e9)}"
        assert re.search(rf"\| `{path.stem}` \| {elements / 1e9:.1f} billion[^|]*\| {sizes} \|", readme), path.stem
