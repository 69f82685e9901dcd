"""Tests of videox.models.attention_backend: which kernels can train here, and that the chosen one is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import runs
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from networks import SMALL_CONFIGS, blocks_of, build_transformer, model_inputs

from videox.errors import UserError
from videox.models.attention_backend import (
    ALIASES,
    AttentionShape,
    Trial,
    backend_names,
    check_backend,
    describe_times,
    failure_of,
    fastest_backend,
    find_backend,
    use_backend,
)

CPU = torch.device("cpu")
SMALL = Trial(AttentionShape(1, 64, 2, 16), CPU, torch.bfloat16)


@pytest.fixture(autouse=True)
def torchs_own_kernel() -> Iterator[None]:
    """diffusers has a global choice, which set_attention_backend changes."""
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_every_backend_of_diffusers_has_a_name_without_underscores() -> None:
    names = backend_names()
    assert len(set(names)) == len(names) and not [name for name in names if name.startswith("_")]
    assert {find_backend(name) for name in names} == {backend.value for backend in AttentionBackendName}
    assert find_backend("cudnn") == find_backend("native_cudnn") == "_native_cudnn"
    assert find_backend("flash3") == find_backend("_flash_3") == "_flash_3"
    assert set(ALIASES.values()) <= {backend.value for backend in AttentionBackendName}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="flash7") as raised:
        find_backend("flash7")
    assert "native, " in raised.value.hint and "cudnn" in raised.value.hint


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash", "pip install flash-attn"),
        ("flash3", "from source"),
        ("xformers", "pip install xformers"),
        ("flash_hub", "pip install kernels"),
        ("cudnn", "use native or auto"),
    ],
)
def test_a_backend_that_cannot_train_here_is_one_line_with_a_fix(name: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        check_backend(name, SMALL)
    assert raised.value.where == "--attention_backend" and name in raised.value.what
    assert words in raised.value.hint
    assert "\n" not in raised.value.line()


def test_a_backend_without_a_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernels of sageattention, which are for inference."""
    backends = attention_dispatch._AttentionBackendRegistry._backends
    native = backends[AttentionBackendName.NATIVE]

    def without_gradient(*inputs: Any, **settings: Any) -> torch.Tensor:
        with torch.no_grad():
            return native(*inputs, **settings)

    monkeypatch.setitem(backends, AttentionBackendName._NATIVE_MATH, without_gradient)
    assert "does not require grad" in failure_of("_native_math", SMALL)


def test_a_backend_with_wrong_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = attention_dispatch._AttentionBackendRegistry._backends
    native = backends[AttentionBackendName.NATIVE]
    monkeypatch.setitem(
        backends, AttentionBackendName._NATIVE_MATH, lambda query, key, value: native(query, key, 2 * value)
    )
    monkeypatch.setitem(
        attention_dispatch._AttentionBackendRegistry._supported_arg_names,
        AttentionBackendName._NATIVE_MATH,
        {"query", "key", "value"},
    )
    assert failure_of("_native_math", SMALL).startswith("its output differs")


def test_the_fastest_of_those_that_can_train_is_chosen() -> None:
    large = Trial(AttentionShape(1, 512, 2, 16), CPU, torch.bfloat16)
    name, times = fastest_backend(SMALL, large, ("native", "_native_math", "flash", "_native_cudnn"))
    assert set(times) == {"native", "_native_math"}
    assert times[name] == min(times.values()) and all(seconds > 0 for seconds in times.values())
    line = describe_times(times, large.shape)
    assert (
        line.startswith("attention kernels, 1 x 512 tokens") and "native_math" in line and "_native" not in line[:40]
    )


def used_backends(model: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the kernels of a forward pass."""
    found: set[str] = set()
    registry = attention_dispatch._AttentionBackendRegistry
    for backend, function in list(registry._backends.items()):

        def record(*inputs: Any, function=function, backend=backend, **settings: Any) -> torch.Tensor:
            found.add(backend.value)
            return function(*inputs, **settings)

        monkeypatch.setitem(registry._backends, backend, record)
    model(**given)
    return found


@pytest.mark.parametrize("name", ["text", "joint"])
def test_the_chosen_kernel_computes_all_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_transformer(SMALL_CONFIGS[name])
    given, _ = model_inputs(SMALL_CONFIGS[name], 8, side=4, frames=2)
    expected = model(**given)[0]
    use_backend(model, "native")
    assert torch.equal(model(**given)[0], expected)
    use_backend(model, "_native_math")
    assert used_backends(model, given, monkeypatch) == {"_native_math"}
    assert torch.allclose(model(**given)[0], expected, atol=1e-4)


@pytest.mark.parametrize("all_real", [True, False])
def test_masked_attention_of_hunyuanvideo_is_torchs_own(all_real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL_CONFIGS["joint"]
    model: Any = build_transformer(config)
    attention = runs.train_script("hunyuanvideo").MaskFreeAttention()
    for block in blocks_of(model):
        block.attn.set_processor(attention)
    given, _ = model_inputs(config, 8, side=4, frames=2)
    assert used_backends(model, given, monkeypatch) == {"native"}
    use_backend(model, "_native_math")
    attention.all_real = all_real
    assert used_backends(model, given, monkeypatch) == {"_native_math" if all_real else "native"}


def test_a_trial_has_equal_values_in_each_call() -> None:
    first, second = SMALL.run("native"), SMALL.run("native")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with attention_backend("native"):
        output = dispatch_attention_fn(*SMALL.inputs()[:3])
    assert torch.equal(output, first[0]) and output.shape == (1, 64, 2, 16)
