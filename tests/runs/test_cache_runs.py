"""Serves the latent cache: what trains from it equals what trains without, for every task, launch and resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import forkserver
import pytest
import runs
import test_backends
import tiny
import torch
from test_cache import KINDS, Shop

from videox.data.cache import cache as cache_module
from videox.data.cache.cache import Cache
from videox.data.cache.maintenance import clean, verify
from videox.errors import STOPPED

cache_memory = tiny.load_script("benchmarks/cache_memory.py")
pytestmark = pytest.mark.slow
SLOTS = 4  # micro-batches of a step, whatever the number of processes
STOP_AT, NO_ENCODER, NO_MODEL, FAMILY = "CACHE_STOP_AT", "CACHE_NO_ENCODER", "CACHE_NO_MODEL", "CACHE_FAMILY"
TASKS = ("wan", "wan-i2v", "hunyuan", "hunyuan-i2v")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"), copies=2)


def refuse(*given: object, **named: object) -> None:
    raise AssertionError("this run has no use for it")


def described_alone(kind: type, *given: object, **named: object) -> object:
    """Makes a module without memory for its weights, as who asks for its configuration does, and no other."""
    assert torch.empty(0).device.type == "meta", f"{kind.__name__} is made, for which this run has no use"
    return object.__new__(kind)


def encoder_classes(script: ModuleType) -> list[type]:
    """Returns the classes of a family's frozen encoders."""
    tables = [script.CLASSES] if "CLASSES" in vars(script) else [script.classes_of(mode) for mode in script.TASKS]
    return [kind for table in tables for name, kind in table.items() if name != "transformer"]


def train_as_told() -> int:
    """What a forked trainer runs here: its own main, with files of four entries.

    The environment says in which step it is asked to stop, as by a batch system, and what it must not do: make an
    encoder, or make the model that trains.
    """
    cache_module.UNIT_ENTRIES = 4
    script = runs.script(os.environ[FAMILY])
    if os.environ.get(NO_ENCODER):
        script.load_encoders = script.load_frozen = refuse
        for kind in encoder_classes(script):
            kind.from_pretrained, kind.__new__ = refuse, described_alone
    if os.environ.get(NO_MODEL):
        script.load_transformer = script.wiring.open_engine = refuse
    if stop_at := int(os.environ.get(STOP_AT, 0)):
        script.dump_folder = asked_to_stop(script.dump_folder, stop_at)
    return script.main()


def asked_to_stop(dump_folder: Callable[[Path, int, object], object], step: int) -> Callable:
    """Returns dump_folder, which every step begins with, and a SIGTERM in the step of that number."""

    def asked(output_dir: Path, number: int, dumped: object) -> object:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return dump_folder(output_dir, number, dumped)

    return asked


def launch(
    shop: Shop,
    name: str,
    folder: Path,
    *,
    world_size: int,
    backend: str = "ddp",
    code: int = 0,
    environment: dict[str, str] | None = None,
    **changes: object,
) -> str:
    """Forks the processes of a launch, waits for all of them, and returns what the first one said."""
    kind = f"{KINDS[name][0]} {KINDS[name][1]}"
    told = test_backends.variables(backend if world_size > 1 else "plain", kind, world_size)
    changes = {"gradient_accumulation_steps": SLOTS // world_size, "train_batch_size": 1, **changes}
    log = folder.with_name(f"{folder.name}-{len(list(folder.parent.glob('*.log')))}.log")
    ranks = forkserver.shared().start_ranks(
        world_size,
        shop.command(name, folder, **changes),
        log,
        ["tests.runs.test_cache_runs:train_as_told"] * world_size,
        {**told, FAMILY: KINDS[name][0], **(environment or {})},
    )
    codes = [rank.wait() for rank in ranks]
    assert codes == [code] * world_size, "\n".join(rank.said()[-3000:] for rank in ranks)
    return ranks[0].said()


def differences(folder: Path, plain: Path) -> list[str]:
    """Returns in what a run differs from one without a cache, to the last bit: metrics, validation, weights."""
    said = [] if forkserver.steps(folder) == forkserver.steps(plain) else ["steps"]
    looks = [runs.read_lines(run / "validation.jsonl") for run in (folder, plain)]
    said += [] if looks[0] == looks[1] != [] else ["validation"]
    weights, wanted = (runs.read_weights(run / "transformer") for run in (folder, plain))
    assert weights.keys() == wanted.keys()
    return said + [name for name, tensor in weights.items() if not torch.equal(tensor, wanted[name])]


def check_stopped_and_resumed(
    launched: Callable[..., str], folder: Path, plain: Path, stop_at: int, environment: dict[str, str]
) -> str:
    """Checks that a run which is stopped and goes on equals one without a cache that was never stopped."""
    launched(folder, code=STOPPED, environment={**environment, STOP_AT: str(stop_at)})
    assert len(forkserver.steps(folder)) == stop_at
    said = launched(folder, environment=environment, resume_from_checkpoint="latest")
    assert differences(folder, plain) == []
    return said


# ------------------------------------------------------------------------------------------------- tasks and processes


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("variants", [1, 3])
@pytest.mark.parametrize("name", TASKS)
def test_training_from_a_cache_equals_training_without(
    shop: Shop, tmp_path: Path, name: str, variants: int, world_size: int
) -> None:
    asked = {"cache_variants": variants, "num_train_epochs": variants + 1, "validation_rows": 1}
    asked["dataloader_num_workers"] = int(variants == 3)  # entries that are read by workers, and by the loop itself

    def launched(folder: Path, **changes: object) -> str:
        return launch(shop, name, folder, world_size=world_size, **{**asked, **changes})

    plain, cache = tmp_path / "plain", tmp_path / "cache"
    launched(plain)
    per_epoch, left = divmod(len(forkserver.steps(plain)), variants + 1)
    assert per_epoch >= 2 and not left
    asked["latent_cache"] = cache
    # in the midst of an epoch: what is left of it is encoded after the resume, what comes again is not
    check_stopped_and_resumed(launched, tmp_path / "filling", plain, 1, {})
    entries = len(Cache(cache))
    said = check_stopped_and_resumed(launched, tmp_path / "cached", plain, per_epoch + 1, {NO_ENCODER: "yes"})
    assert "training needs no encoder" in said and len(Cache(cache)) == entries and not verify(cache)[1]
    asked["latent_cache"] = tmp_path / "ahead"
    said = launched(tmp_path / "only", cache_only=True, environment={NO_MODEL: "yes"})
    assert "the latent cache has all that the run needs" in said and not (tmp_path / "only/metrics.jsonl").exists()
    assert len(Cache(tmp_path / "ahead")) == entries and clean(tmp_path / "ahead").get("second copy", 0) == 0
    launched(tmp_path / "only", environment={NO_ENCODER: "yes"})
    assert differences(tmp_path / "only", plain) == []


# ---------------------------------------------------------------------------------------------------- divided models


@pytest.mark.parametrize("backend", test_backends.DIVIDED)
@pytest.mark.parametrize("name", ["wan", "hunyuan-i2v"])
def test_a_divided_model_trains_from_a_cache_that_its_launch_filled(
    shop: Shop, tmp_path: Path, name: str, backend: str
) -> None:
    asked = {"cache_variants": 1, "validation_rows": 1, "latent_cache": tmp_path / "cache"}

    def launched(folder: Path, **changes: object) -> str:
        return launch(shop, name, folder, world_size=2, backend=backend, **{**asked, **changes})

    said = launched(tmp_path / "ahead", cache_only=True, environment={NO_MODEL: "yes"})
    assert f"backend     {backend} (" in said and "the latent cache has all that the run needs" in said
    whole, faults = verify(tmp_path / "cache")
    assert whole == len(Cache(tmp_path / "cache")) > 0 and not faults
    assert clean(tmp_path / "cache").get("second copy", 0) == 0  # the processes shared the work
    plain = tmp_path / "plain"
    launched(plain, latent_cache=None)
    launched(tmp_path / "filling", latent_cache=tmp_path / "another")
    assert differences(tmp_path / "filling", plain) == [] and len(Cache(tmp_path / "another")) == whole
    check_stopped_and_resumed(launched, tmp_path / "cached", plain, 3, {NO_ENCODER: "yes"})
    assert verify(tmp_path / "cache") == (whole, [])


def command_of(backend: str, name: str) -> Sequence[str]:
    family, mode, _ = KINDS[name]
    return [*test_backends.launcher(backend, f"{family} {mode}", 2), "--main_process_port", "0"]


@pytest.mark.parametrize("backend", ["ddp", *test_backends.DIVIDED])
def test_a_launch_line_fills_ahead(shop: Shop, tmp_path: Path, backend: str) -> None:
    flags = shop.command("wan", tmp_path / "out", latent_cache=tmp_path / "cache", cache_variants=1, cache_only=True)
    found = runs.launch(flags, command_of(backend, "wan"))
    assert found.code == 0, found.stdout[-2000:] + found.stderr[-6000:]
    assert f"backend     {backend} (" in found.stdout and "processes   2\n" in found.stdout
    assert "the latent cache has all that the run needs" in found.stdout
    assert verify(tmp_path / "cache")[0] > 0 and found.status["state"] == "finished"
    assert not any((tmp_path / "out" / name).exists() for name in ("metrics.jsonl", "transformer"))
    assert "Traceback" not in found.stderr


# ------------------------------------------------------------------------------------------------------------ memory


def test_a_cached_run_holds_no_encoder_and_an_uncached_one_a_copy_per_machine(tmp_path: Path) -> None:
    model, size = cache_memory.build_model(tmp_path / "model")
    metadata, encoders = tiny.make_dataset(tmp_path / "data", copies=2), [model / "vae", model / "text_encoder"]
    asked = {"max_train_steps": 8, "num_train_epochs": None, "cache_variants": 1, "tokenizer_max_length": 32}

    def held(name: str, world_size: int, **changes: object) -> tuple[int, int, frozenset[str]]:
        folder = tmp_path / f"{name}-{world_size}"
        flags = runs.wan_plain(
            model, metadata, folder, **asked, gradient_accumulation_steps=SLOTS // world_size, **changes
        )
        found = cache_memory.memory_of(flags, folder, encoders, world_size)
        return found.peak, found.resident, found.named

    vae = str(next((model / "vae").glob("*.safetensors")))
    for world_size in (1, 2):
        cache = {"latent_cache": tmp_path / f"cache-{world_size}"}
        uncached, without = held("uncached", world_size), {vae} if world_size == 1 else {vae, cache_memory.SHARED}
        filling = held("filling", world_size, **cache)
        cached = held("cached", world_size, **cache)
        print(f"{size / 1e6:.0f} MB of text encoder; {world_size}: {uncached}, {filling}, {cached}")
        assert uncached[2] == filling[2] == without and not cached[2]
        assert uncached[0] - cached[0] > 0.8 * size
        for resident in (uncached[1], filling[1]):  # one copy for all; what each process works with comes on top
            assert 0.8 * size < resident - cached[1] < 1.3 * size
