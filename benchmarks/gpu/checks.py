"""Cases of gpu.py: what only a GPU can show of the trainer's choices, one line each with pass, fail or not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from gpu.models import vae_classes
from gpu.probes import (
    LENGTHS,
    compiled_graphs,
    ddp_gradients,
    exposed_copy,
    kernel_seen,
    launch_seconds,
    norm_dtypes,
    reserved,
    text_lengths,
    vae_precisions,
)
from gpu.scales import SMALL, Case, NotRunError, Probe, Scale, Values
from gpu.training_runs import WORKSPACE, check_export, weights_of
from videox.shapes import token_count

RANKS = 2
FSDP1 = (
    "--num_processes", str(RANKS), "--num_machines", "1", "--main_process_port", "0", "--dynamo_backend", "no", "--mixed_precision=bf16", "--use_fsdp",
    "--fsdp_version", "1", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap=WanTransformerBlock", "--fsdp_sharding_strategy", "FULL_SHARD",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "False",
)  # fmt: skip
ERRORS = {"TF32": 0.01, "bf16": 0.1}  # largest relative errors of latents that pass
DEFAULT_SEGMENTS, FIXED_SEGMENTS = ({"PYTORCH_ALLOC_CONF": f"expandable_segments:{on}"} for on in (True, False))
KEEP_PLANS = {"TORCH_CUDNN_SDPA_AVOID_RECOMPILE": "1"}


def verdict(passed: bool, figure: str, **values: float) -> Values:
    """Return the values of a check."""
    return {"result": "pass" if passed else "fail", "figure": figure, **values}


def expect(words: str) -> Callable[[], Values]:
    """Return a prediction in words."""
    return lambda: {"expected": words}


# ------------------------------------------------------------------------------------------------- training runs


def export_fsdp1(scale: Scale, device: torch.device) -> Values:
    """Train by two processes under FSDP1 and check the export, whose weights are gathered on the GPU with NCCL."""
    if device.type == "cuda" and torch.cuda.device_count() < RANKS:
        raise NotRunError("one GPU")
    family = "wan2.1"
    run = WORKSPACE.launch(scale, family, FSDP1, ["--gradient_checkpointing"])
    check_export(run, WORKSPACE.model(scale, family, small=True))
    return verdict(True, f"all weights of {RANKS} processes exported, {run.seconds:.0f} s", seconds=run.seconds)


def deterministic_runs(scale: Scale, device: torch.device) -> Values:
    """Train twice with --deterministic, and compare losses and exported weights bit for bit."""
    del device
    runs = [
        WORKSPACE.train(scale, "wan2.1", ["--deterministic", "--gradient_checkpointing"], small=True) for _ in range(2)
    ]
    first, second = (weights_of(run.folder / "transformer") for run in runs)
    different = sum(not torch.equal(tensor, second[name]) for name, tensor in first.items())
    equal = runs[0].losses == runs[1].losses
    words = "losses are equal" if equal else f"losses differ: {runs[0].losses}, {runs[1].losses}"
    return verdict(
        equal and not different, f"{words}; {different} of {len(first)} weights differ", different=different
    )


# ------------------------------------------------------------------------------------------------------ verdicts


def judge_vae(found: Values) -> Values:
    """Pass where the errors of the latents are small, and TF32 is not slower than float32."""
    figure = f"fp32 {found['fp32 s']:.3g} s, " + ", ".join(
        f"{name} {found[f'{name} s']:.3g} s (error {found[f'{name} error']:.1e})" for name in ERRORS
    )
    return verdict(all(found[f"{name} error"] <= most for name, most in ERRORS.items()), figure, **found)


def judge_norms(found: Values) -> Values:
    """Pass where every norm of queries and keys returns the dtype of the values."""
    gain = 1 - found["after s"] / found["before s"]
    kept = f"{found['before kept']:.0%} of queries and keys in bf16 before, {found['after kept']:.0%} after"
    return verdict(
        found["after kept"] == 1, f"{kept}; {1e3 * found['after s']:.3g} ms per step, {gain:+.1%} saved", **found
    )


def judge_lengths(exact: Values, rounded: Values, avoided: Values) -> Values:
    """Pass where the default for one caption, its own length, is not slower over captions of new lengths.

    On a CPU, whose kernels know no plans, nothing is judged.
    """
    named = {"exact": exact, "--text_multiple 32": rounded, "exact, plans kept": avoided}
    totals = {name: 1e3 * (found["later s"] + max(found["unseen s"], 0.0)) for name, found in named.items()}
    figure = "; ".join(
        f"{name}: {1e3 * found['later s']:.3g} ms, {1e3 * found['unseen s']:+.3g} ms at a new length"
        for name, found in named.items()
    )
    passed = exact["device"] == "cpu" or totals["exact"] <= 1.05 * totals["--text_multiple 32"]
    return verdict(passed, figure, **totals)


def judge_segments(found: Values, fixed: Values) -> Values:
    """Pass where expandable segments reserve no more."""
    figure = f"{found['reserved GiB']:.3g} GiB with, {fixed['reserved GiB']:.3g} without, {found['allocated GiB']:.3g} of tensors"
    passed = found["reserved GiB"] <= 1.02 * fixed["reserved GiB"]
    return verdict(passed, figure, **{"with GiB": found["reserved GiB"], "without GiB": fixed["reserved GiB"]})


def judge_views(view: Values, copied: Values) -> Values:
    """Pass where gradients are views of DDP's buckets, and the peak is lower by nearly their size."""
    figure = f"{view['gradients']} gradients in {view['storages']} storages, {copied['storages']} without"
    passed = view["storages"] < copied["storages"]
    if "peak GiB" in view:
        saved = copied["peak GiB"] - view["peak GiB"]
        passed &= saved >= 0.5 * view["gradients GiB"]
        figure += f"; peak {view['peak GiB']:.3g} GiB, {copied['peak GiB']:.3g} without"
        return verdict(passed, figure, **{"saved GiB": saved})
    return verdict(passed, figure)


def judge_launches(found: Values) -> Values:
    """Pass in any case: the figure is for --launch_tokens."""
    figure = f"{found['us per launch']:.3g} us per launch; {found['launches']:,.0f} of a step take {1e3 * found['whole s']:.3g} ms"
    return verdict(True, f"{figure}: --launch_tokens {found['tokens']:.0f}", **found)


def judge_copy(found: Values) -> Values:
    """Pass in any case: the figure is what --latent_cache saves."""
    figure = f"{found['exposed s']:.3g} s per micro-batch for {found['GB']:.3g} GB of the text encoder"
    return verdict(True, figure, **found)


def judge_kernel(found: Values) -> Values:
    """Pass where both are the same."""
    return verdict(found["printed"] == found["seen"], f"printed {found['printed']}, ran {found['operators']}")


def judge_graphs(found: Values) -> Values:
    """Pass where later sizes need no new graph, and gradients are close."""
    passed = found["after two"] == found["after all"] <= found["most"] and found["difference"] <= 2e-3
    figure = f"{found['after two']} graphs after 2 sizes, {found['after all']} after all; gradients within {found['difference']:.1e}"
    return verdict(passed, figure, **found)


# --------------------------------------------------------------------------------------------------------- cases


def one(
    name: str,
    budget: float,
    expected: str,
    measure: Callable[[torch.device], Values],
    judge: Callable[..., Values] | None = None,
    *others: tuple[Callable[[torch.device], Values], Mapping[str, str]],
) -> Case:
    """Return a check; without judge it runs the train scripts, and measures and judges itself."""
    probes = tuple(Probe(*each) for each in others)
    return Case("checks", (name,), budget, expect(expected), measure, probes, judge, apart=judge is None)


def checks(scale: Scale) -> Iterator[Case]:
    """Yield all checks; those that restart the measuring process for its environment last."""
    smallest, budget = next(iter(scale.wan.values())), scale.budget
    usual, tokens = scale.sizes[scale.usual], token_count(scale.sizes[scale.usual])
    graphs = {"wan2.1": SMALL.wan["Wan2.1 1.3B"], "hunyuanvideo": SMALL.hunyuan}
    yield one("attention kernel, printed and seen", budget, "the same", kernel_seen, judge_kernel)
    yield one(
        "queries and keys in the dtype of values", budget, "3 to 5 % saved",
        partial(norm_dtypes, smallest, usual), judge_norms,
    )  # fmt: skip
    for family in vae_classes(scale):
        yield one(
            f"VAE of {family[0]}: fp32, TF32, bf16", 2 * budget, "TF32 a quarter to a fifth of the time of fp32",
            partial(vae_precisions, family, scale), judge_vae,
        )  # fmt: skip
    yield one("launches of kernels", budget, "4 to 7 us", partial(launch_seconds, smallest), judge_launches)
    yield one(
        "gradient_as_bucket_view under DDP", budget, "peak lower by the gradients",
        partial(ddp_gradients, smallest, usual, True), judge_views, (partial(ddp_gradients, smallest, usual, False), {}),
    )  # fmt: skip
    yield one("--low_vram, exposed copy", budget, "0.23 to 0.3 s", partial(exposed_copy, scale), judge_copy)
    yield one("two --deterministic runs", 2 * scale.runs.seconds, "bit-identical", partial(deterministic_runs, scale))
    yield one("export of FSDP1", scale.runs.seconds, "all weights", partial(export_fsdp1, scale))
    lengths = partial(text_lengths, scale.hunyuan, tokens)
    yield one(
        f"attention of HunyuanVideo, {len(LENGTHS)} lengths of captions", 2 * budget, "0.1 to 1 s at a new length with cuDNN",
        partial(lengths, 1), judge_lengths, (partial(lengths, 32), {}), (partial(lengths, 1), KEEP_PLANS),
    )  # fmt: skip
    sizes = partial(reserved, smallest, scale.many)
    yield one(
        f"expandable_segments, {len(scale.many)} sizes", 2 * budget, "reserved close to tensors",
        sizes, judge_segments, (sizes, FIXED_SEGMENTS),
    )  # fmt: skip
    for family, config in graphs.items():
        yield one(
            f"--compile of {family}, 30 sizes", 4 * budget, "no graph after the second size",
            partial(compiled_graphs, family, config), judge_graphs,
        )  # fmt: skip
