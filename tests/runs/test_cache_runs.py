"""Tests of training from the latent cache: bit-identical to training without, for all tasks, backends and resumes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import forkserver
import launches
import pytest
import runs
import tiny
import torch
from caches import MODELS, TinyModels

from videox.data.cache import cache as cache_module
from videox.data.cache.cache import Cache
from videox.data.cache.maintenance import clean, verify
from videox.errors import STOPPED
from videox.families import wan
from videox.models.folder import load_class

cache_memory = tiny.load_script("benchmarks/cache_memory.py")
pytestmark = pytest.mark.slow
SLOTS = 4  # micro-batches per step, for any number of processes
STOP_AT, NO_ENCODER, NO_MODEL, FAMILY = "CACHE_STOP_AT", "CACHE_NO_ENCODER", "CACHE_NO_MODEL", "CACHE_FAMILY"
TASKS = ("wan", "wan-i2v", "hunyuan", "hunyuan-i2v")


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"), copies=2)


def fail_if_called(*args: object, **kwargs: object) -> None:
    raise AssertionError("this run must not load it")


def allow_only_on_meta(kind: type, *args: object, **kwargs: object) -> object:
    """Replacement of __new__: allow a module on the meta device (to read its configuration), and nowhere else."""
    assert torch.empty(0).device.type == "meta", f"{kind.__name__} is created, which this run must not do"
    return object.__new__(kind)


def encoder_classes(script: ModuleType) -> list[type]:
    """Return the classes of a family's frozen encoders."""
    tables = [script.CLASSES] if "CLASSES" in vars(script) else [script.classes_of(mode) for mode in script.TASKS]
    return [load_class(kind) for table in tables for name, kind in table.items() if name != "transformer"]


def train_with_restrictions() -> int:
    """Entry point of a forked trainer: its own main, with shards of four entries.

    Environment variables set the step in which it receives a stop signal, as from a batch system, and what it must not
    do: load an encoder, or load the model that trains.
    """
    cache_module.MAX_SHARD_ENTRIES = 4
    script = runs.train_script(os.environ[FAMILY])
    if os.environ.get(NO_ENCODER):
        script.load_encoders = script.load_frozen = wan.load_frozen = fail_if_called
        for kind in encoder_classes(script):
            kind.from_pretrained, kind.__new__ = fail_if_called, allow_only_on_meta
    if os.environ.get(NO_MODEL):
        script.build.load_transformer = script.build.build_engine = fail_if_called
    if stop_at := int(os.environ.get(STOP_AT, 0)):
        script.dump_folder = stop_in_step(script.dump_folder, stop_at)
    return script.main()


def stop_in_step(dump_folder: Callable[[Path, int, object], object], step: int) -> Callable:
    """Wrap dump_folder, which each micro-batch calls first, so that it sends SIGTERM in the given step."""

    def dump_folder_and_stop(output_dir: Path, number: int, dumped: object) -> object:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return dump_folder(output_dir, number, dumped)

    return dump_folder_and_stop


def launch(
    tiny_models: TinyModels,
    name: str,
    folder: Path,
    *,
    world_size: int,
    backend: str = "ddp",
    code: int = 0,
    environment: dict[str, str] | None = None,
    **changes: object,
) -> str:
    """Fork all ranks of a launch, wait for them, check their exit codes, and return the output of rank 0."""
    kind = f"{MODELS[name][0]} {MODELS[name][1]}"
    launcher_variables = launches.launcher_environment(backend if world_size > 1 else "plain", kind, world_size)
    changes = {"gradient_accumulation_steps": SLOTS // world_size, "train_batch_size": 1, **changes}
    log = folder.with_name(f"{folder.name}-{len(list(folder.parent.glob('*.log')))}.log")
    ranks = forkserver.shared().start_ranks(
        world_size,
        tiny_models.command(name, folder, **changes),
        log,
        ["tests.runs.test_cache_runs:train_with_restrictions"] * world_size,
        {**launcher_variables, FAMILY: MODELS[name][0], **(environment or {})},
    )
    codes = [rank.wait() for rank in ranks]
    assert codes == [code] * world_size, "\n".join(rank.output()[-3000:] for rank in ranks)
    return ranks[0].output()


def differences(folder: Path, plain: Path) -> list[str]:
    """Return what is not bit-identical in two runs: "steps", "validation", or names of weights."""
    found = [] if forkserver.read_steps(folder) == forkserver.read_steps(plain) else ["steps"]
    validations = [runs.read_lines(run / "validation.jsonl") for run in (folder, plain)]
    found += [] if validations[0] == validations[1] != [] else ["validation"]
    weights, expected = (runs.read_weights(run / "transformer") for run in (folder, plain))
    assert weights.keys() == expected.keys()
    return found + [name for name, tensor in weights.items() if not torch.equal(tensor, expected[name])]


def check_stopped_and_resumed(
    launch_run: Callable[..., str], folder: Path, plain: Path, stop_at: int, environment: dict[str, str]
) -> str:
    """Check that a stopped and resumed run is bit-identical to an uninterrupted run without a cache."""
    launch_run(folder, code=STOPPED, environment={**environment, STOP_AT: str(stop_at)})
    assert len(forkserver.read_steps(folder)) == stop_at
    output = launch_run(folder, environment=environment, resume_from_checkpoint="latest")
    assert differences(folder, plain) == []
    return output


# ----------------------------------------------------------------------------------------------- tasks and world sizes


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("variants", [1, 3])
@pytest.mark.parametrize("name", TASKS)
def test_cached_training_is_bit_identical(
    tiny_models: TinyModels, tmp_path: Path, name: str, variants: int, world_size: int
) -> None:
    flags = {"cache_variants": variants, "num_train_epochs": variants + 1, "validation_rows": 1}
    flags["dataloader_num_workers"] = int(variants == 3)  # entries are read by data workers, and without them

    def launch_run(folder: Path, **changes: object) -> str:
        return launch(tiny_models, name, folder, world_size=world_size, **{**flags, **changes})

    plain, cache = tmp_path / "plain", tmp_path / "cache"
    launch_run(plain)
    per_epoch, left = divmod(len(forkserver.read_steps(plain)), variants + 1)
    assert per_epoch >= 2 and not left
    flags["latent_cache"] = cache
    # Stopped during an epoch: the rest of it is encoded after the resume, repeated samples are not.
    check_stopped_and_resumed(launch_run, tmp_path / "filling", plain, 1, {})
    entries = len(Cache(cache))
    output = check_stopped_and_resumed(launch_run, tmp_path / "cached", plain, per_epoch + 1, {NO_ENCODER: "yes"})
    assert "no encoder is needed for training" in output and len(Cache(cache)) == entries and not verify(cache)[1]
    flags["latent_cache"] = tmp_path / "prefilled"
    output = launch_run(tmp_path / "only", cache_only=True, environment={NO_MODEL: "yes"})
    assert (
        "the latent cache has everything that the run needs" in output
        and not (tmp_path / "only/metrics.jsonl").exists()
    )
    assert len(Cache(tmp_path / "prefilled")) == entries and clean(tmp_path / "prefilled").get("duplicate", 0) == 0
    launch_run(tmp_path / "only", environment={NO_ENCODER: "yes"})
    assert differences(tmp_path / "only", plain) == []


# ---------------------------------------------------------------------------------------------------- sharded models


@pytest.mark.parametrize("backend", launches.SHARDED_BACKENDS)
@pytest.mark.parametrize("name", ["wan", "hunyuan-i2v"])
def test_sharded_model_trains_from_a_prefilled_cache(
    tiny_models: TinyModels, tmp_path: Path, name: str, backend: str
) -> None:
    flags = {"cache_variants": 1, "validation_rows": 1, "latent_cache": tmp_path / "cache"}

    def launch_run(folder: Path, **changes: object) -> str:
        return launch(tiny_models, name, folder, world_size=2, backend=backend, **{**flags, **changes})

    output = launch_run(tmp_path / "prefilled", cache_only=True, environment={NO_MODEL: "yes"})
    assert f"backend     {backend} (" in output and "the latent cache has everything that the run needs" in output
    intact, errors = verify(tmp_path / "cache")
    assert intact == len(Cache(tmp_path / "cache")) > 0 and not errors
    assert clean(tmp_path / "cache").get("duplicate", 0) == 0  # each tensor was encoded by one rank only
    plain = tmp_path / "plain"
    launch_run(plain, latent_cache=None)
    launch_run(tmp_path / "filling", latent_cache=tmp_path / "another")
    assert differences(tmp_path / "filling", plain) == [] and len(Cache(tmp_path / "another")) == intact
    check_stopped_and_resumed(launch_run, tmp_path / "cached", plain, 3, {NO_ENCODER: "yes"})
    assert verify(tmp_path / "cache") == (intact, [])


def launch_prefix(backend: str, name: str) -> Sequence[str]:
    family, mode, _ = MODELS[name]
    return [*launches.launcher_flags(backend, f"{family} {mode}", 2), "--main_process_port", "0"]


@pytest.mark.parametrize("backend", ["ddp", *launches.SHARDED_BACKENDS])
def test_launch_command_prefills_the_cache(tiny_models: TinyModels, tmp_path: Path, backend: str) -> None:
    flags = tiny_models.command(
        "wan", tmp_path / "out", latent_cache=tmp_path / "cache", cache_variants=1, cache_only=True
    )
    outcome = runs.launch(flags, launch_prefix(backend, "wan"))
    assert outcome.code == 0, outcome.stdout[-2000:] + outcome.stderr[-6000:]
    assert f"backend     {backend} (" in outcome.stdout and "processes   2\n" in outcome.stdout
    assert "the latent cache has everything that the run needs" in outcome.stdout
    assert verify(tmp_path / "cache")[0] > 0 and outcome.status["state"] == "finished"
    assert not any((tmp_path / "out" / name).exists() for name in ("metrics.jsonl", "transformer"))
    assert "Traceback" not in outcome.stderr


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_of_encoders_with_and_without_a_cache(tmp_path: Path) -> None:
    model, size = cache_memory.build_model(tmp_path / "model")
    metadata, encoders = tiny.make_dataset(tmp_path / "data", copies=2), [model / "vae", model / "text_encoder"]
    settings = {"max_train_steps": 8, "num_train_epochs": None, "cache_variants": 1, "tokenizer_max_length": 32}

    def measure(name: str, world_size: int, **changes: object) -> tuple[int, int, frozenset[str]]:
        folder = tmp_path / f"{name}-{world_size}"
        flags = runs.wan_flags(
            model, metadata, folder, **settings, gradient_accumulation_steps=SLOTS // world_size, **changes
        )
        memory = cache_memory.memory_of(flags, folder, encoders, world_size)
        return memory.peak, memory.resident, memory.named

    vae = str(next((model / "vae").glob("*.safetensors")))
    for world_size in (1, 2):
        cache = {"latent_cache": tmp_path / f"cache-{world_size}"}
        uncached, without = measure("uncached", world_size), {vae} if world_size == 1 else {vae, cache_memory.SHARED}
        filling = measure("filling", world_size, **cache)
        cached = measure("cached", world_size, **cache)
        print(f"{size / 1e6:.0f} MB of text encoder; {world_size}: {uncached}, {filling}, {cached}")
        assert uncached[2] == filling[2] == without and not cached[2]
        assert uncached[0] - cached[0] > 0.8 * size
        for resident in (uncached[1], filling[1]):  # one copy for all ranks, in addition to each rank's own memory
            assert 0.8 * size < resident - cached[1] < 1.3 * size
