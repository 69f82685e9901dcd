"""Tests of videox.estimate.cost_model: coefficients are recovered from steps of known cost, bad files refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plans import COLUMNS, SETTINGS

from videox.data.plan.balance import plan_costs
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import BARRIERS, sample_cost
from videox.errors import FLAGS, UserError
from videox.estimate.cost_model import COST_MODEL, StepTimes, fit, read_cost_model, step_sizes

LINEAR, QUADRATIC, FIXED = 3e-5, 2e-9, 0.25


def sizes_of(steps: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).choice([256, 4096, 13312, 21504], size=(steps, 4))
    return np.column_stack([tokens.sum(1), (tokens.astype(float) ** 2).sum(1)])


def seconds_of(sizes: np.ndarray, noise: float = 0.0) -> np.ndarray:
    exact = sizes @ np.array([LINEAR, QUADRATIC]) + FIXED
    return exact * np.exp(np.random.default_rng(1).normal(0, noise, len(sizes)))


def test_exact_times_return_the_coefficients() -> None:
    sizes = sizes_of(40)
    fitted = fit(sizes, seconds_of(sizes))
    assert fitted[:3] == pytest.approx((LINEAR, QUADRATIC, FIXED), rel=1e-6)
    assert fitted.error < 1e-9
    assert fitted.steps == 40


def test_slow_first_steps_and_stalls_are_outliers() -> None:
    sizes = sizes_of(200)
    seconds = seconds_of(sizes, noise=0.02)
    seconds[:5] *= 20  # kernels are selected
    seconds[50::40] *= 3
    fitted = fit(sizes, seconds)
    assert fitted[:3] == pytest.approx((LINEAR, QUADRATIC, FIXED), rel=0.15)
    assert fitted.error < 0.03


def test_coefficients_are_never_negative() -> None:
    sizes = sizes_of(60)
    fitted = fit(sizes, 1e-4 * np.sqrt(sizes[:, 0]))  # grows slower than any cost model
    assert min(fitted[:3]) >= 0
    assert max(fitted[:2]) > 0


@pytest.mark.parametrize("sizes", [sizes_of(11), np.ones((50, 2)) * 4096])
def test_too_few_steps_or_sizes_fit_nothing(sizes: np.ndarray) -> None:
    assert fit(sizes, seconds_of(sizes)) is None


@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("world_size", [1, 4, 12])
@pytest.mark.parametrize("slot_fill", ["fixed", "cost"])
def test_step_sizes_are_those_of_the_most_expensive_rank(barrier: str, world_size: int, slot_fill: str) -> None:
    settings = replace(SETTINGS, slot_fill=slot_fill)
    plan = plan_epoch(COLUMNS, settings, 0)
    pair = (settings.cost_linear, settings.cost_quadratic)
    costs, _ = plan_costs(plan, settings, world_size)
    slowest = costs.max(2).sum(1) if barrier == "micro" else costs.sum(1).max(1)
    for step in range(plan.n_steps):
        first, second = step_sizes(plan, step, world_size, barrier, pair)
        assert pair[0] * first + pair[1] * second == pytest.approx(slowest[step])


def test_a_written_cost_model_can_be_read(tmp_path: Path) -> None:
    plan = plan_epoch(COLUMNS, SETTINGS, 0)
    times = StepTimes(world_size=4, barrier="step", cost=(1.0, 0.0), device="cpu")
    times.add(plan, 0, 1.0)
    assert not times.write(tmp_path)
    assert not (tmp_path / COST_MODEL).exists()
    for step in range(12):
        sizes = np.array(step_sizes(plan, step % plan.n_steps, 4, "step", (1.0, 0.0)))
        times.add(plan, step % plan.n_steps, float(sizes @ [LINEAR, QUADRATIC]) + FIXED)
    assert times.write(tmp_path)
    content = json.loads((tmp_path / COST_MODEL).read_text())
    assert (content["steps"], content["device"], content["processes"], content["barrier"]) == (13, "cpu", 4, "step")
    assert read_cost_model(tmp_path / COST_MODEL) == pytest.approx((LINEAR, QUADRATIC), rel=0.05)
    assert sample_cost(SETTINGS, plan.buckets).min() > 0
    refuse_every_damage(tmp_path / COST_MODEL)


def refuse_every_damage(path: Path) -> None:
    """Every changed bit is refused, unless the file still says the same; so is every shorter file."""
    content, pair, refused = path.read_bytes(), read_cost_model(path), 0
    for at in range(len(content)):
        for mutant in (content[:at], content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]):
            path.write_bytes(mutant)
            try:
                assert read_cost_model(path) == pair, at
            except UserError as error:
                assert str(path) in error.what
                refused += 1
    assert refused > 1.9 * len(content)  # all but changed letters of the word `seal`, an E for an e, a lost line end
    body = json.loads(content)
    path.write_text(json.dumps({**body, "linear": 2 * body["linear"]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"has changed since it was written.*a file without `seal`"):
        read_cost_model(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"linear": 1}', '{"linear": -1, "quadratic": 1}', '{"linear": 0, "quadratic": 0}',
             '{"linear": NaN, "quadratic": 1}', '{"linear": "x", "quadratic": 1}'],
)  # fmt: skip
def test_an_unusable_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / COST_MODEL
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_cost_model(path)
    assert refused.value.exit_code == FLAGS
    assert str(path) in refused.value.what
    for shape in ("[]", "{}", "3", '{"linear": [], "quadratic": 1}'):
        path.write_text(shape, encoding="utf-8")
        with pytest.raises(UserError, match="not a JSON object with numbers `linear` and `quadratic`"):
            read_cost_model(path)
    with pytest.raises(UserError, match="not a readable cost model"):
        read_cost_model(tmp_path / "none.json")
