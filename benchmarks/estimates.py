"""Tables of everything that the estimates compute, to notice a changed number: FLOPs, bytes, proposals, step times.

    python benchmarks/estimates.py          # compare tests/data/estimate/tables.json with the code of today
    python benchmarks/estimates.py --write  # write it, after a change that is meant to change numbers

The rows are those of the published commands, of settings like the recipes' and of small, uneven sizes that show every
term of a formula. The numbers come from the code itself: whether they are right is the question of the tests that
compute them in another way (tests/estimate). No model is built, except for the numbers of parameters with --write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from videox.estimate.advice import Change, SmallerSamples, possible_changes, propose
from videox.estimate.duration import Duration, Speed, format_duration, format_gpu_time
from videox.estimate.flops import Network, cross_attention_network, joint_attention_network
from videox.estimate.gpus import GPUS, host_bandwidth_of
from videox.estimate.memory import (
    Encoders,
    Memory,
    MemorySetup,
    Parameters,
    checkpoint_size,
    communication_bytes,
    memory_of,
)
from videox.estimate.rates import rates_of
from videox.estimate.step_time import StepModel, offload_seconds
from videox.families.wan_names import pictures_of

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tests" / "data" / "estimate" / "tables.json"
PUBLISHED = ROOT / "config" / "models"
GIB = 2**30
TOKENS = (3, 13_312, 32_760)  # of a sample; few tokens show the constant terms

_WAN = {
    "num_attention_heads": 3, "attention_head_dim": 32, "ffn_dim": 320, "num_layers": 3, "in_channels": 16, "text_dim": 64,
}  # fmt: skip
_HUNYUAN = {
    "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 1,
    "mlp_ratio": 3.0, "text_embed_dim": 64, "pooled_projection_dim": 48, "in_channels": 16, "out_channels": 12,
}  # fmt: skip
SMALL = {
    "small wan": _WAN,
    "small wan with images": {**_WAN, "in_channels": 36, "out_channels": 16, "image_dim": 40},
    "small hunyuan": _HUNYUAN,
    "small hunyuan with guidance": {**_HUNYUAN, "guidance_embeds": True},
    "small hunyuan, first frame replaced": {**_HUNYUAN, "image_condition_type": "token_replace"},
}
BASE = MemorySetup(
    "single", 1, 1, half=True, recompute_share=1.0, offload_encoders=True, workers=4, tokens=20_480, batch=1, zero={}
)
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
SMALL_BUFFERS = {
    "stage": 3, "overlap_comm": False, "reduce_bucket_size": 2 * 10**8, "stage3_max_live_parameters": 10**8,
    "stage3_prefetch_bucket_size": 10**7, "sub_group_size": 10**8,
}  # fmt: skip
AUTOMATIC = {
    "reduce_bucket_size": "auto",
    "stage3_max_live_parameters": "auto",
    "offload_optimizer": {"device": "none"},
}
SETUPS: Mapping[str, dict[str, Any]] = {
    "lora, 24 GB": {"lora_rank": 32, "tokens": 13_312},
    "lora in float32": {"lora_rank": 16, "half": False, "offload_encoders": False},
    "lora, cached": {"lora_rank": 64, "cached": True, "batch": 2, "vae_mini_batch": 4},
    "lora under zero3": {"lora_rank": 32, "backend": "zero3", "processes": 4, "per_host": 4},
    "lora under fsdp1": {"lora_rank": 32, "backend": "fsdp1", "processes": 4, "per_host": 4},
    "lora under ddp": {"lora_rank": 32, "backend": "ddp", "processes": 8, "per_host": 8, "ema_device": "cpu"},
    "all defaults": {"half": False, "recompute_share": 0.0, "offload_encoders": False, "batch": 16, "vae_mini_batch": 32},
    "half of the blocks": {"recompute_share": 0.5, "offload_encoders": False, "batch": 3, "vae_mini_batch": 2},
    "cached, few tokens": {"cached": True, "tokens": 64, "offload_encoders": False},
    "offloaded and cached, few tokens": {"cached": True, "tokens": 64},
    "few tokens": {"tokens": 64, "batch": 3, "vae_mini_batch": 2},
    "bf16 optimizer": {"optimizer": "adamw_bf16"},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "both": {"optimizer": "adamw8bit_bf16", "ema_device": "accelerator"},
    "moments in host memory": {"optimizer": "adamw_offload"},
    "bf16 moments in host memory": {"optimizer": "adamw_bf16_offload", "cached": True},
    "came": {"optimizer": "came"},
    "ddp": {"backend": "ddp", "processes": 8, "per_host": 8, "ema_device": "accelerator"},
    "published, zero2": {"backend": "zero2", "processes": 8, "per_host": 8, "workers": 8, "tokens": 21_504},
    "published, zero3": {"backend": "zero3", "processes": 8, "per_host": 8, "workers": 8, "tokens": 21_504},
    "published, fsdp1": {"backend": "fsdp1", "processes": 8, "per_host": 8, "workers": 8, "tokens": 21_504},
    "fsdp2": {"backend": "fsdp2", "processes": 16, "per_host": 8, "ema_device": "cpu", "full_weights": True},
    "fsdp2, bf16 optimizer": {"backend": "fsdp2", "processes": 2, "per_host": 2, "optimizer": "adamw_bf16"},
    "fsdp1 in float32": {"backend": "fsdp1", "processes": 2, "per_host": 2, "half": False, "full_weights": True},
    "zero2 in float32, small buffers": {
        "backend": "zero2", "processes": 2, "per_host": 2, "half": False, "zero": SMALL_BUFFERS, "full_weights": True,
    },
    "zero2 with an EMA": {"backend": "zero2", "processes": 16, "per_host": 8, "ema_device": "accelerator"},
    "zero2, optimizer offloaded": {"backend": "zero2", "processes": 2, "per_host": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "zero3, small buffers": {"backend": "zero3", "processes": 4, "per_host": 4, "zero": SMALL_BUFFERS, "full_weights": True},
    "zero3, automatic buffers": {"backend": "zero3", "processes": 4, "per_host": 2, "zero": AUTOMATIC, "ema_device": "cpu"},
    "zero3, all offloaded": {"backend": "zero3", "zero": OFFLOADED},
    "zero3, all offloaded on 8": {"backend": "zero3", "processes": 8, "per_host": 8, "zero": OFFLOADED, "ema_device": "cpu"},
    "offload settings without DeepSpeed": {"zero": OFFLOADED},
}  # fmt: skip
PROPOSED = {  # model, GiB, setup: which changes make it fit
    "1.3b, defaults, 24": ("wan2.1-t2v-1.3b", 24, "all defaults"),
    "1.3b, defaults, 10": ("wan2.1-t2v-1.3b", 10, "all defaults"),
    "1.3b, bf16 optimizer, 8": ("wan2.1-t2v-1.3b", 8, "bf16 optimizer"),
    "14b, defaults, 48": ("wan2.1-t2v-14b", 48, "all defaults"),
    "14b, defaults, 79": ("wan2.1-t2v-14b", 79, "all defaults"),
    "14b, defaults, 140": ("wan2.1-t2v-14b", 140, "all defaults"),
    "14b, defaults, 3": ("wan2.1-t2v-14b", 3, "all defaults"),
    "14b, moments in host memory, 40": ("wan2.1-t2v-14b", 40, "moments in host memory"),
    "14b, ddp, 80": ("wan2.1-t2v-14b", 80, "ddp"),
    "14b, lora, 16": ("wan2.1-t2v-14b", 16, "lora, cached"),
    "14b, fsdp2, 14": ("wan2.1-t2v-14b", 14, "fsdp2, bf16 optimizer"),
    "14b, zero2, 30": ("wan2.1-t2v-14b", 30, "published, zero2"),
    "hunyuan, lora, 24": ("hunyuanvideo-t2v", 24, "lora in float32"),
    "hunyuan, half, 80": ("hunyuanvideo-t2v", 80, "half of the blocks"),
}
CHANGED = (  # setups whose possible changes are listed
    "all defaults", "half of the blocks", "lora, cached", "8-bit moments", "moments in host memory", "published, zero2", "ddp",
    "zero3, all offloaded on 8", "fsdp2, bf16 optimizer", "lora in float32",
)  # fmt: skip
MEMORY_OF = {"small": "small wan", "wan2.1-t2v-14b": "wan2.1-t2v-14b", "hunyuanvideo-t2v": "hunyuanvideo-t2v"}
SMALLER = [SmallerSamples("--token_sample_size 512", 13_312), SmallerSamples("--token_sample_size 256", 3_328)]
ADAPTERS = 2_400_000  # parameters of the adapters per unit of rank
ENCODERS = Encoders({"text_encoder": 11_361_820_672, "vae": 507_591_892, "image_encoder": 2_523_000_000}, 4e9)


def configs() -> dict[str, dict[str, Any]]:
    """Return the transformer configurations by name: the published ones and the small ones."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(PUBLISHED.glob("*.json"))}
    return {**{name: content["components"]["transformer"] for name, content in found.items()}, **SMALL}


def network_of(config: Mapping[str, Any], *, half: bool, **cast: bool) -> Network:
    """Return the network of a configuration, with the published number of text tokens."""
    if "num_single_layers" in config:
        return joint_attention_network(config, text_tokens=256, half=half, **cast)
    images = 257 * pictures_of(config) if config.get("image_dim") else 0
    return cross_attention_network(config, text_tokens=512, image_tokens=images, half=half, **cast)


def network_row(network: Network) -> dict[str, Any]:
    """Return FLOPs and bytes of a network, at every number of tokens in TOKENS."""
    chosen = range(0, len(network.blocks), 2)
    values: dict[str, Callable[[int], float]] = {
        "forward": network.forward,
        "forward and backward": network.forward_backward,
        "of frozen weights": replace(network, frozen=True).forward_backward,
        "recomputed": lambda tokens: network.recompute(tokens, chosen),
        "saved": lambda tokens: network.saved_bytes(tokens, ()),
        "saved, half recomputed": lambda tokens: network.saved_bytes(tokens, chosen),
        "peak": lambda tokens: network.peak_bytes(tokens, ()),
        "peak, half recomputed": lambda tokens: network.peak_bytes(tokens, chosen),
        "frozen, saved": lambda tokens: replace(network, frozen=True).saved_bytes(tokens, ()),
        "frozen, peak, half recomputed": lambda tokens: replace(network, frozen=True).peak_bytes(tokens, chosen),
        "outside, transient": network.outside_transient,
        "block, attention": lambda tokens: sum(block.attention(tokens) for block in network.blocks),
    }
    return {name: [round(value(tokens)) for tokens in TOKENS] for name, value in values.items()}


def memory_row(parameters: Parameters, network: Network, setup: MemorySetup) -> dict[str, Any]:
    """Return every item of the memory of a setup, in bytes."""
    memory = memory_of(parameters, network, ENCODERS, setup)
    return {
        "states": whole(memory.states),
        "phases": {name: whole(phase) for name, phase in memory.phases.items()},
        "host": whole(memory.host),
        "at peak": list(memory.at_peak()),
        "total": round(memory.total()),
        "checkpoint": round(checkpoint_size(parameters, setup)),
        "communication": round(communication_bytes(parameters, setup)),
    }


def whole(sizes: Mapping[str, float]) -> dict[str, int]:
    """Return the sizes as whole bytes."""
    return {name: round(size) for name, size in sizes.items()}


def setup_of(name: str) -> MemorySetup:
    """Return a setup of SETUPS."""
    return replace(BASE, **SETUPS[name])


def parameters_of(full: Parameters, setup: MemorySetup) -> Parameters:
    """Return the parameters of a setup; a LoRA adds ADAPTERS per unit of rank and trains these alone."""
    if not setup.lora:
        return full
    trained = ADAPTERS * setup.lora_rank
    return replace(full, total=full.total + trained, trainable=trained)


def memory_function(full: Parameters, config: Mapping[str, Any]) -> Callable[[MemorySetup], Memory]:
    """Return the memory of a model as a function of the setup."""

    def memory(setup: MemorySetup) -> Memory:
        network = replace(network_of(config, half=setup.half), frozen=setup.lora)
        return memory_of(parameters_of(full, setup), network, ENCODERS, setup)

    return memory


def changes_of(setup: MemorySetup, family: str) -> list[Change]:
    """Return the changes that are possible where all optimizers are installed."""
    sharded = "fsdp1" if family.startswith("hunyuan") else "zero3"
    return possible_changes(
        setup, sharded_backend=sharded, smaller=SMALLER, installed=lambda name: name != "came", accumulation=3
    )


def change_rows(setup: MemorySetup, family: str) -> Iterator[list[Any]]:
    """Yield group, flags, effect and changed settings of each change; None where it is not possible."""
    before = asdict(setup)
    for change in changes_of(setup, family):
        changed = change.apply(setup)
        new = None if changed is None else {k: v for k, v in asdict(changed).items() if v != before[k]}
        yield [change.group, change.flags, change.effect, new]


def proposal_rows(full: Parameters, config: Mapping[str, Any], case: tuple[str, float, str]) -> list[dict[str, Any]]:
    """Return the proposals of a case, each with the memory after each change."""
    model, gib, name = case
    setup = setup_of(name)
    found = propose(setup, gib * GIB, memory_function(full, config), changes_of(setup, model))
    return [
        {
            "fits": proposal.fits,
            "flags": proposal.flags,
            "changes": [[round(a.total), round(sum(a.host.values())), a.setup.backend] for a in proposal.changes],
        }
        for proposal in found
    ]


def duration_rows(full: Parameters) -> dict[str, Any]:
    """Return times: of copies to the host, of FLOPs, of runs, and in words."""
    speeds = {tf32: Speed(GPUS["a100-80"], 300e12, 0.4, tf32) for tf32 in (False, True)}
    seconds = (0.04, 89.9, 90, 5399, 5400, 200_000, 259_199, 259_200, 10**7)
    copies = ("moments in host memory", "bf16 moments in host memory", "zero3, all offloaded on 8", "zero2, optimizer offloaded", "ddp")  # fmt: skip
    runs = [(cached, variants) for cached in (False, True) for variants in (0, 1, 3, 9)]
    return {
        "copies": {name: offload_seconds(full, setup_of(name), GPUS["rtx4090"]) for name in copies},
        "speed": [[speed.seconds(1e15), speed.float32_seconds(1e15)] for speed in speeds.values()],
        "runs": [Duration(100.0, 10.0, 5, cached, variants).run() for cached, variants in runs],
        "words": [format_duration(value) for value in seconds],
        "gpu time": [format_gpu_time(10**6, gpus, price) for gpus in (1, 2) for price in (None, 0.0, 2.5)],
        "host bandwidth": [host_bandwidth_of(None), host_bandwidth_of(GPUS["b200"])],
    }


def step_rows(full: Parameters, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the computed step of one sample, with every block recomputed: its parts, by GPU and settings."""
    tokens, found = 32_760, {}
    for gpu in ("rtx4090", "a100-80", "h100", "b200"):
        for name in ("moments in host memory", "published, zero2", "published, zero3", "fsdp2", "ddp", "lora, 24 GB"):
            for compiled in (False, True):
                setup = setup_of(name)
                network = replace(network_of(config, half=True), frozen=setup.lora)
                rates = rates_of(GPUS[gpu], gpu)
                step = StepModel(network, parameters_of(full, setup), setup, rates, compiled)
                parts = step.micro_batch(1, tokens, range(len(network.blocks)), setup.keep)
                parts = parts.plus(step.optimizer_step(step.backward(1, tokens).total()))
                words = f"{gpu}, {name}{', compiled' if compiled else ''}"
                found[words] = [float(f"{part:.6g}") for part in parts]
    return found


def rows(models: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str, Any]]:
    """Yield table, name and content of every row.

    Args:
        models: total, largest block's and outside parameters of each published transformer.
    """
    full = {name: Parameters(total, total, block, outside) for name, (total, block, outside) in models.items()}
    full["small"] = Parameters(1_000_003, 600_001, 100_003, 200_001)  # a part is trained
    by_name = configs()
    for name, gpu in GPUS.items():
        yield "gpus", name, list(gpu)
    for name, config in by_name.items():
        precisions = {
            "bf16": {"half": True},
            "bf16 weights": {"half": True, "cast": False},
            "float32": {"half": False},
        }
        yield "networks", name, {p: network_row(network_of(config, **given)) for p, given in precisions.items()}
    for name in CHANGED:
        yield "changes", name, list(change_rows(setup_of(name), "wan2.1"))
    for model, config in MEMORY_OF.items():
        for name in SETUPS:
            setup = setup_of(name)
            network = replace(network_of(by_name[config], half=setup.half), frozen=setup.lora)
            yield "memory", f"{model}: {name}", memory_row(parameters_of(full[model], setup), network, setup)
    for name, values in duration_rows(full["wan2.1-t2v-14b"]).items():
        yield "durations", name, values
    for model in ("small", "wan2.1-t2v-14b", "hunyuanvideo-t2v"):
        yield "steps", model, step_rows(full[model], by_name[MEMORY_OF[model]])
    for name, case in PROPOSED.items():
        yield "proposals", name, proposal_rows(full[case[0]], by_name[case[0]], case)


def tables(models: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return all tables; models: as in `rows`."""
    found: dict[str, Any] = {"models": dict(models)}
    for table, name, row in rows(models):
        found.setdefault(table, {})[name] = row
    return found


def count_parameters() -> dict[str, list[int]]:
    """Return total, largest block's and outside parameters of each published transformer, built on the meta device."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

    counts = {}
    for name, config in configs().items():
        if name in SMALL:
            continue
        kind: Any = HunyuanVideoTransformer3DModel if "num_single_layers" in config else WanTransformer3DModel
        with torch.device("meta"):
            model = kind.from_config(config)
        lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
        blocks = [block for listed in lists for block in getattr(model, listed, ())]
        total, *sizes = (sum(p.numel() for p in module.parameters()) for module in (model, *blocks))
        counts[name] = [total, max(sizes), total - sum(sizes)]
    return counts


def stored() -> dict[str, Any]:
    """Return the stored tables."""
    content: dict[str, Any] = json.loads(TABLES.read_text(encoding="utf-8"))
    return content


def as_stored(content: dict[str, Any]) -> dict[str, Any]:
    """Return tables as they are after writing and reading."""
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read


def write(content: dict[str, Any]) -> None:
    """Write the tables, one row per line."""
    parts = []
    for table, rows in content.items():
        lines = (f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items())
        parts.append(f" {json.dumps(table)}: {{\n" + ",\n".join(lines) + "\n }")
    TABLES.parent.mkdir(parents=True, exist_ok=True)
    TABLES.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables instead of comparing them")
    args = parser.parse_args()
    if args.write:
        write(tables(count_parameters()))
    before = stored()
    now = as_stored(tables(before["models"]))
    different = [name for name in now if now[name] != before.get(name)]
    print(f"differs: {', '.join(different)}" if different else f"{TABLES.name} is up to date")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
