"""Tests of videox.optim.state: resume is bit-identical, and mismatched state is an error that changes nothing."""

from __future__ import annotations

import pickletools

import pytest
import torch
from tensors import same

from videox.errors import MODEL, UserError
from videox.optim.state import load_optimizer_tensors, optimizer_tensors
from videox.weights.safetensors_io import StoredTensors, load_weights, save_tensors, save_weights


def small_net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        data = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        loss = net[:3](data).square().sum()  # the last layer never has a gradient, hence no state
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def parameter_names(net: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in net.named_parameters()}


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adamw_amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "nadam": torch.optim.NAdam,  # has a running product in addition to the moments
    "adafactor": torch.optim.Adafactor,  # has rows and columns instead of full moments
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_bit_identical_with_parameters_in_another_order(kind, tmp_path):
    net = small_net(0)
    optimizer = OPTIMIZERS[kind](net.parameters())
    train(net, optimizer, range(3))
    save_tensors(tmp_path, optimizer_tensors(optimizer, parameter_names(net)), stem="optimizer", max_shard_size=300)
    save_weights(tmp_path, net.state_dict(), "{}")

    resumed_net = small_net(9)
    reversed_groups = [
        {"params": list(layer.parameters())[::-1]} for layer in reversed(resumed_net) if list(layer.parameters())
    ]
    resumed = OPTIMIZERS[kind](reversed_groups)
    load_weights(tmp_path, resumed_net)
    load_optimizer_tensors(resumed, parameter_names(resumed_net), StoredTensors(tmp_path, "optimizer"))
    assert len(resumed.state) == 4
    before, after = (optimizer_tensors(o, parameter_names(n)) for o, n in ((optimizer, net), (resumed, resumed_net)))
    assert same(before, after)

    train(net, optimizer, range(3, 6))
    train(resumed_net, resumed, range(3, 6))
    assert same(dict(net.state_dict()), dict(resumed_net.state_dict()))
    assert same(*(optimizer_tensors(o, parameter_names(n)) for o, n in ((optimizer, net), (resumed, resumed_net))))


def test_python_numbers_keep_their_type(tmp_path):
    net = small_net(0)
    optimizer = torch.optim.AdamW(net.parameters())
    first = next(net.parameters())
    optimizer.state[first] = {"step": 7, "ratio": 0.1, "warm": True, "codes": torch.arange(3, dtype=torch.uint8)}
    save_tensors(tmp_path, optimizer_tensors(optimizer, parameter_names(net)), stem="optimizer")
    resumed = torch.optim.AdamW(net.parameters())
    load_optimizer_tensors(resumed, parameter_names(net), StoredTensors(tmp_path, "optimizer"))
    state = resumed.state[first]
    assert (state["step"], state["ratio"], state["warm"]) == (7, 0.1, True)
    assert [type(state[key]) for key in ("step", "ratio", "warm")] == [int, float, bool]
    assert state["codes"].equal(torch.arange(3, dtype=torch.uint8))


def test_loaded_state_is_a_copy(tmp_path):
    """Stepping writes into the state; it must never write into the tensors that it was loaded from."""
    net = small_net(0)
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, range(2))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, parameter_names(net)).items()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer_tensors(optimizer, parameter_names(net), tensors)
    train(net, optimizer, range(2, 4))
    assert same(tensors, copies)


def test_mismatched_state_is_an_error_and_changes_nothing():
    net = small_net(0)
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, range(2))
    names = parameter_names(net)
    good = optimizer_tensors(optimizer, names)
    faulty = {
        "no state for 0.bias": {k: v for k, v in good.items() if not k.startswith("0.bias/")},
        "state for lost.weight, which is not trainable": {**good, "lost.weight/exp_avg": torch.zeros(1)},
        "exp_avg of 0.bias is [3]": {**good, "0.bias/exp_avg": torch.zeros(3)},
    }
    fresh = torch.optim.AdamW(net.parameters())
    for message, tensors in faulty.items():
        with pytest.raises(UserError) as caught:
            load_optimizer_tensors(fresh, names, tensors)
        assert caught.value.exit_code == MODEL and message in caught.value.line()
        assert len(fresh.state) == 0
    with pytest.raises(ValueError, match="two parameters are named x"):
        optimizer_tensors(optimizer, dict.fromkeys(names, "x"))
    optimizer.state[next(net.parameters())]["history"] = [1, 2]
    with pytest.raises(TypeError, match=r"history of 0\.weight is a list"):
        optimizer_tensors(optimizer, names)


def test_nothing_on_disk_is_a_pickle(tmp_path):
    net = small_net(0)
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, range(2))
    save_tensors(tmp_path, optimizer_tensors(optimizer, parameter_names(net)), stem="optimizer")
    save_weights(tmp_path, net.state_dict(), "{}", max_shard_size=100)
    for path in tmp_path.iterdir():
        assert path.suffix in {".safetensors", ".json"}
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(path.read_bytes()))
