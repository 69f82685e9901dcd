"""Tests of videox.estimate.advice: proposed changes fit, are needed, and no cheaper single one would do."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CONFIGS

from videox.estimate.advice import (
    HOST,
    MORE_GPUS,
    OTHER_TRAINING,
    TIME,
    Change,
    Proposal,
    SmallerSamples,
    possible_changes,
    propose,
)
from videox.estimate.flops import cross_attention_network
from videox.estimate.host_limit import propose_on_host
from videox.estimate.host_report import missing_lines
from videox.estimate.memory import (
    BlockWeights,
    Encoders,
    Memory,
    MemorySetup,
    Parameters,
    memory_of,
    peak_of_host,
)
from videox.optim.registry import check_supported

GIB = 2**30
MODELS = {
    "1.3b": ("Wan2.1-T2V-1.3B", Parameters(1_418_996_800, 1_418_996_800, 45_000_000, 50_000_000), 22_000_000),
    "14b": ("Wan2.1-T2V-14B", Parameters(14_288_491_584, 14_288_491_584, 351_000_000, 247_000_000), 77_000_000),
}
ENCODERS = Encoders({"text_encoder": 11 * 10**9, "vae": 5 * 10**8}, vae_peak=4e9)
SETUP = MemorySetup(
    "single", 1, 1, half=False, recompute_share=0.0, offload_encoders=False, workers=0, tokens=20_480, batch=4, zero={},
    vae_mini_batch=32,
)  # fmt: skip
SMALLER = [SmallerSamples("--token_sample_size 512", 13_312), SmallerSamples("--token_sample_size 256", 3_328)]


def memory_for(model: str):
    name, full, adapters = MODELS[model]

    def memory(setup: MemorySetup) -> Memory:
        parameters = full
        if setup.lora:
            trained = adapters * setup.lora_rank // 32
            parameters = replace(full, total=full.total + trained, trainable=trained)
        network = cross_attention_network(CONFIGS[name], text_tokens=512, image_tokens=0, half=setup.half)
        return memory_of(parameters, replace(network, frozen=setup.lora), ENCODERS, setup)

    return memory


def changes_of(setup: MemorySetup, installed: bool = True) -> list[Change]:
    return possible_changes(setup, sharded_backend="zero3", smaller=SMALLER, installed=lambda name: installed)


def proposals(model: str, setup: MemorySetup, gib: float) -> list[Proposal]:
    return propose(setup, gib * GIB, memory_for(model), changes_of(setup))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["1.3b", "14b"]), st.floats(8, 140), st.sampled_from([("single", 1), ("ddp", 8), ("zero2", 8), ("zero3", 8)]),
    st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0, 64]),
)  # fmt: skip
def test_proposals_fit_and_contain_nothing_unnecessary(
    model: str, gib: float, launch: tuple[str, int], half: bool, recomputed: float, rank: int
) -> None:
    backend, processes = launch
    setup = replace(
        SETUP,
        backend=backend,
        processes=processes,
        per_host=processes,
        half=half,
        recompute_share=recomputed,
        lora_rank=rank,
    )
    estimate, changes, limit = memory_for(model), changes_of(setup), gib * GIB
    if estimate(setup).total() <= limit:
        return
    for proposal in propose(setup, limit, estimate, changes):
        applied, memory = [step.change for step in proposal.changes], estimate
        if proposal.filled:
            setup = replace(setup, cached=True)
            memory = lambda changed: estimate(changed).without("encoding")  # noqa: E731
            if not applied:
                assert memory(setup).total() <= limit
                continue
        assert applied, "a proposal changes something"
        reached = setup
        for change in applied:
            changed = change.apply(reached)
            assert changed is not None
            reached = changed
        assert proposal.changes[-1].total == memory(reached).total()
        assert proposal.fits == (memory(reached).total() <= limit)
        if not proposal.fits:
            continue
        for left_out in applied:
            fewer: MemorySetup | None = setup
            for change in applied:
                if change is not left_out and fewer is not None:
                    fewer = change.apply(fewer)
            if len(applied) > 1 and fewer is not None:
                assert memory(fewer).total() > limit, f"{left_out.flags} is not needed"


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["1.3b", "14b"]), st.floats(8, 140), st.booleans(), st.sampled_from([0, 64]))
def test_no_cheaper_single_change_fits(model: str, gib: float, half: bool, rank: int) -> None:
    setup = replace(SETUP, half=half, lora_rank=rank)
    memory, changes, limit = memory_for(model), changes_of(setup), gib * GIB
    if memory(setup).total() <= limit:
        return
    first = propose(setup, limit, memory, changes)[0]
    if not first.fits:
        return
    most_expensive = max(changes.index(step.change) for step in first.changes)
    for change in changes[:most_expensive]:
        changed = change.apply(setup)
        if changed is not None and change.group < first.changes[-1].change.group:
            assert memory(changed).total() > limit, f"{change.flags} alone would have fitted"


def test_the_defaults_of_the_small_model_on_a_card_of_20_gib() -> None:
    (proposal,) = proposals("1.3b", replace(SETUP, lora_rank=32), 20)
    assert proposal.fits
    assert "--gradient_checkpointing" in proposal.flags and "--train_batch_size 1" in proposal.flags
    assert "--lora_rank" not in proposal.flags and "accelerate" not in proposal.flags


def test_full_fine_tuning_is_offloaded_before_a_lora_is_proposed() -> None:
    one_gpu, more_gpus = proposals("14b", SETUP, 48)
    assert one_gpu.changes[-1].change.group == HOST and "cpu_offload.json" in one_gpu.flags
    assert more_gpus.changes[-1].change.group == MORE_GPUS and "--lora_rank" not in more_gpus.flags
    lora, *_ = proposals("14b", SETUP, 16)
    assert lora.changes[-1].change.group == OTHER_TRAINING and "--lora_rank" in lora.flags


@pytest.mark.parametrize(
    ("optimizer", "backend", "processes", "gib"),
    [
        ("adamw", "ddp", 8, 16), ("adamw_bf16", "single", 1, 16), ("adamw_bf16_offload", "single", 1, 16),
        ("adamw_offload", "ddp", 8, 40), ("adamw_bf16", "fsdp2", 8, 16),
    ],
)  # fmt: skip
def test_no_proposal_names_a_flag_twice_or_an_optimizer_that_does_not_work(
    optimizer: str, backend: str, processes: int, gib: float
) -> None:
    setup = replace(SETUP, half=True, optimizer=optimizer, backend=backend, processes=processes, per_host=processes)
    for proposal in propose(setup, gib * GIB, memory_for("14b"), changes_of(setup)):
        names = re.findall(r"--(?!optimizer)\w+", proposal.flags)
        assert len(names) == len({*names}) and proposal.flags.count("accelerate launch") <= 1, proposal.flags
        typed = [optimizer, *re.findall(r"--optimizer (\S+)", proposal.flags)]  # the last one counts
        last = proposal.changes[-1].setup
        assert typed[-1] == last.optimizer
        check_supported(last.optimizer, last.backend, "bf16", lora=last.lora)


def test_the_samples_of_a_step_stay_the_same() -> None:
    """Micro-batches of 4, 6 of them in a step: one at a time, these are 24."""
    changes = possible_changes(SETUP, sharded_backend="zero3", smaller=[], installed=lambda name: True, accumulation=6)
    assert "--train_batch_size 1 --gradient_accumulation_steps 24" in {change.flags for change in changes}


def test_launches_state_the_number_of_processes_and_the_backend_that_is_estimated() -> None:
    """The configuration files start 8 processes; their DeepSpeed files compute in bfloat16."""
    setup = replace(SETUP, backend="ddp", processes=2, per_host=2)
    for change in changes_of(setup):
        changed = change.apply(setup)
        if changed is not None and (found := re.search(r"accelerate/(\w+).yaml --num_processes (\d+)", change.flags)):
            assert (changed.backend, changed.processes) == (found[1], int(found[2]))
            assert changed.half and "--mixed_precision bf16" in change.flags and not changed.zero


def test_full_fine_tuning_on_one_large_card_offloads_the_optimizer() -> None:
    one_gpu, more_gpus = proposals("14b", SETUP, 79)
    assert one_gpu.changes[-1].change.group == HOST and more_gpus.changes[-1].setup.processes > 1


def test_what_cannot_fit_is_said_with_the_smallest_that_was_found() -> None:
    (proposal,) = proposals("14b", SETUP, 3)
    assert not proposal.fits and proposal.changes[-1].total > 3 * GIB
    totals = [step.total for step in proposal.changes]
    assert totals == sorted(totals, reverse=True)


def test_an_optimizer_that_zero3_does_not_shard_is_replaced_before_a_lora_is_proposed() -> None:
    """All weights go on training: DeepSpeed offloads AdamW, so that the proposal names it."""
    setup = replace(SETUP, half=True, recompute_share=1.0, offload_encoders=True, batch=1, vae_mini_batch=1)
    first = proposals("14b", replace(setup, optimizer="adamw_bf16"), 75)[0]
    assert first.fits and first.changes[-1].change.group == HOST and not first.changes[-1].setup.lora
    assert first.flags.endswith(" --optimizer adamw") and first.changes[-1].setup.optimizer == "adamw"


def test_a_change_that_helps_only_after_others_is_found() -> None:
    """The cache reduces the memory of encoding, which is the largest phase once activations are recomputed."""
    first = proposals("1.3b", replace(SETUP, lora_rank=32), 12.8)[0]
    assert first.fits and first.changes[-1].change.group == TIME, first.flags
    assert "--latent_cache" in first.flags and "--gradient_checkpointing" in first.flags


def test_where_the_encoders_alone_do_not_fit_the_cache_is_filled_before() -> None:
    """The text encoder takes 10.2 GiB of 11; the training of a small LoRA without it fits."""
    found = proposals("1.3b", replace(SETUP, lora_rank=32, half=True), 11.5)
    assert [(proposal.fits, proposal.filled) for proposal in found] == [(False, False), (True, True)]
    filled, reached = found[1], replace(SETUP, lora_rank=32, half=True, cached=True)
    for applied in filled.changes:
        reached = applied.change.apply(reached) or reached
    memory = memory_for("1.3b")(reached)
    assert memory.total() > 11.5 * GIB >= memory.without("encoding").total() == filled.changes[-1].total
    (enough,) = [
        p
        for p in proposals("1.3b", replace(SETUP, lora_rank=32, half=True), 20)
        if p.changes[-1].change.group < MORE_GPUS
    ]
    assert enough.fits and not enough.filled


def test_optimizers_that_are_not_installed_are_not_proposed() -> None:
    names = {change.flags for change in changes_of(SETUP, installed=False)}
    assert not any(name.startswith("--optimizer") for name in names)
    assert "--optimizer adamw8bit" in {change.flags for change in changes_of(SETUP)}


# ------------------------------------------------------------------------------------------------- small cards

LINEAR = 8 * 5120**2 + 2 * 5120 * 13_824
BLOCKS = (BlockWeights(LINEAR + 100_000, LINEAR, 9 * 5120 + 13_824, 5120 * 13_824),) * 40
LORA = replace(
    SETUP, half=True, recompute_share=1.0, lora_rank=32, batch=1, cached=True, offload_encoders=True, tokens=13_312,
    vae_mini_batch=1,
)  # fmt: skip


def small_card(
    gib: float, setup: MemorySetup = LORA, host: float = math.inf, *, installed: bool = True
) -> list[Proposal]:
    """Return the proposals for Wan2.1 14B, whose blocks may be streamed and quantised.

    host: GiB of a machine; installed: the packages of optimizers in host memory are there.
    """
    name, full, adapters = MODELS["14b"]

    def memory(changed: MemorySetup) -> Memory:
        trained = adapters * changed.lora_rank // 32 if changed.lora else full.total
        total = full.total + (trained if changed.lora else 0)
        blocks = BLOCKS if changed.lora else tuple(replace(block, trained=block.elements) for block in BLOCKS)
        parameters = replace(full, total=total, trainable=trained, blocks=blocks)
        network = cross_attention_network(CONFIGS[name], text_tokens=512, image_tokens=0, half=changed.half)
        return memory_of(parameters, replace(network, frozen=changed.lora), ENCODERS, changed).without("encoding")

    changes = possible_changes(
        setup, sharded_backend="zero3", smaller=SMALLER, installed=lambda name: installed, blocks=len(BLOCKS)
    )
    return propose_on_host(setup, gib * GIB, host * GIB, memory, changes)


def test_a_14b_lora_is_made_to_fit_without_rounding_where_that_is_enough() -> None:
    (found, *_) = small_card(24)
    assert found.fits and found.flags in ("--stream_blocks all", "--offload_activations --stream_blocks all")
    assert found.changes[-1].host["streamed blocks"] == 40 * 2 * BLOCKS[0].elements


def test_weights_are_rounded_before_something_else_is_trained() -> None:
    """On a machine whose launch already shards nothing and streams: 8 bits, then 4."""
    streamed = replace(LORA, streamed=40, offload_activations=True)
    needed = small_card(1, streamed)[0]
    assert not needed.fits
    groups = [step.change.group for step in needed.changes]
    assert groups == sorted(groups)
    resident = replace(LORA, backend="ddp", processes=1, recompute_share=0.5)
    flags = [step.change.flags for proposal in small_card(20, resident) for step in proposal.changes]
    assert not any(flag.startswith("--lora_rank") for flag in flags)


@pytest.mark.parametrize("host", [20, 30, 48, 96])
def test_proposals_fit_in_host_memory(host: float) -> None:
    """Streamed blocks in bfloat16 need 27 GiB at rest and as much while loading, besides the text encoder."""
    (found, *_) = small_card(16, host=host)
    assert found.fits and peak_of_host(found.changes[-1].host) <= host * GIB
    assert ("--base_precision" in found.flags) == (host < 48), found.flags
    assert all(applied.total < 100 * GIB for applied in found.changes)
    assert missing_lines([found], host * GIB, "here") == []


def test_what_is_missing_of_host_memory_is_named_where_nothing_fits_in_it() -> None:
    (found, *_), (free, *_) = small_card(16, host=4), small_card(16)
    assert found.flags == free.flags
    (line,) = missing_lines([found], 4 * GIB, "of --host_memory")
    peak = peak_of_host(found.changes[-1].host) / GIB
    assert line.startswith(f"  with {found.flags}: {peak:.2f} GiB of host memory, more than 4 GiB (of --host_memory)")
    assert f"{peak - 4:.1f} GiB too much" in line


def test_a_full_training_is_proposed_a_streamed_lora_for_a_small_card() -> None:
    (found, *_) = small_card(16, replace(LORA, lora_rank=0), installed=False)
    assert found.fits and "--lora_rank" in found.flags
    assert "--stream_blocks all" in found.flags or "--base_precision" in found.flags


def test_a_full_training_streams_its_blocks_where_an_optimizer_works_in_host_memory() -> None:
    """With the optimizer alone 14B need 56 GB; its weights and gradients go to the host, too, before a LoRA."""
    (found, *_) = small_card(24, replace(LORA, lora_rank=0))
    assert found.fits and found.flags == "--optimizer adamw_bf16_offload --stream_blocks all"
    host, elements = found.changes[-1].host, 40 * BLOCKS[0].elements
    assert host["streamed blocks"] == host["streamed gradients"] == 2 * elements
    assert host["offloaded optimizer"] == 8 * MODELS["14b"][1].total
    for other in (
        {"backend": "ddp", "processes": 2},
        {"ema_device": "accelerator"},
        {"recompute_share": 0.5},
        {"optimizer": "adamw_bf16"},
    ):
        setup = replace(LORA, lora_rank=0, **{"optimizer": "adamw_bf16_offload", **other})
        for change in possible_changes(
            setup, sharded_backend="zero3", smaller=[], installed=lambda name: True, blocks=40
        ):
            if change.flags == "--stream_blocks all":
                assert change.apply(setup) is None, other


def test_the_text_encoder_is_quantised_where_encoding_does_not_fit() -> None:
    """Before anything else is trained, and not where only the training is too large."""

    def encoders(setup: MemorySetup) -> Encoders:
        saved = {"int8": 4_600_000_000, "nf4": 6_900_000_000}.get(setup.text_precision, 0)
        return replace(ENCODERS, weights={**ENCODERS.weights, "text_encoder": 11_000_000_000 - saved})

    def memory(setup: MemorySetup) -> Memory:
        network = cross_attention_network(CONFIGS[MODELS["1.3b"][0]], text_tokens=512, image_tokens=0, half=setup.half)
        trained = MODELS["1.3b"][2] * setup.lora_rank // 32
        full = MODELS["1.3b"][1]
        parameters = replace(full, total=full.total + trained, trainable=trained)
        return memory_of(parameters, replace(network, frozen=True), encoders(setup), setup)

    (int8, *_) = propose(LORA, 10.8 * GIB, memory, changes_of(LORA))
    assert int8.fits and int8.flags == "--text_encoder_precision int8"
    (nf4, *_) = propose(LORA, 7 * GIB, memory, changes_of(LORA))
    assert nf4.fits and "--text_encoder_precision nf4" in nf4.flags and "int8" not in nf4.flags
    assert memory(LORA).total() > 10.8 * GIB
    training = propose(replace(LORA, tokens=75_600), 14 * GIB, memory, changes_of(LORA))
    assert not any("--text_encoder" in proposal.flags for proposal in training if proposal.fits)


def test_streamed_or_quantised_weights_are_not_proposed_with_sharding() -> None:
    for change in possible_changes(
        LORA, sharded_backend="zero3", smaller=[], installed=lambda name: True, blocks=len(BLOCKS)
    ):
        for setup in (replace(LORA, streamed=40), replace(LORA, base_precision="int8")):
            after = change.apply(replace(setup, processes=8, backend="ddp"))
            assert after is None or after.backend == "ddp"
        if change.flags.startswith(("--stream_blocks", "--base_precision")):
            assert change.apply(replace(LORA, backend="zero3")) is None
            assert change.apply(replace(LORA, lora_rank=0)) is None
