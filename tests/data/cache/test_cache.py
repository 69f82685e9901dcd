"""Tests of videox.data.cache and scripts/cache.py: shards, keys, maintenance, and runs with and without a cache."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import forkserver
import numpy as np
import pytest
import runs
import tiny
import torch
from caches import MODELS, TinyModels
from crashes import fork, inject_fault, kill_self, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from videox.data.cache import cache as cache_module
from videox.data.cache.cache import (
    FINGERPRINTS,
    Cache,
    CacheField,
    SampleKey,
    cache_key,
    read_memo,
    restore_zeros,
    trim_zeros,
    write_memo,
)
from videox.data.cache.maintenance import clean, summarize, verify
from videox.errors import STOPPED, STORAGE, UserError
from videox.shapes import Bucket
from videox.training import precompute as cache_fill

NOTE = {"part": "moments", "encoder": "e", "file": "a.mp4", "size": 3, "mtime_ns": 4}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def tensor_of(number: int, size: int = 300) -> torch.Tensor:
    return torch.full((size,), float(number))


def fill(folder: Path, numbers: range) -> Cache:
    cache = Cache(folder)
    for number in numbers:
        cache.put(key(number), tensor_of(number), NOTE)
    cache.publish()
    return cache


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


# ------------------------------------------------------------------------------------------ files and keys


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=5), DTYPES), min_size=1, max_size=8), st.integers(0, 99)
)
def test_cache_returns_what_was_stored(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[list[int], torch.dtype]], seed: int
) -> None:
    folder, generator = tmp_path_factory.mktemp("cache"), torch.Generator().manual_seed(seed)
    cache = Cache(folder)
    tensors = [torch.randint(0, 200, shape, generator=generator).to(dtype) for shape, dtype in made]
    for number, tensor in enumerate(tensors):
        cache.put(key(number), tensor, NOTE)
    unpublished = [cache.read(key(number)) for number in range(len(tensors))]
    cache.publish()
    for reader in (cache, Cache(folder)):
        assert len(reader) == len(tensors) and reader.read(key(99)) is None
        for number, tensor in enumerate(tensors):
            for found in (reader.read(key(number)), unpublished[number]):
                assert found is not None and found.dtype == tensor.dtype
                assert torch.equal(found, tensor) and found.shape == tensor.shape
    assert verify(folder) == (len(tensors), [])
    with safe_open(shard_files(folder)[0], framework="pt") as file:  # any safetensors reader can open it
        assert set(file.keys()) >= {"blob", "key", "place", "notes"}


CLIP = SampleKey("a.mp4", 10, 20, 3, 2, Bucket(9, 64, 96), "first", "a dog")
FIELD = CacheField("moments", "vae", ("clip", "mask", "caption"))


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "b.mp4"}, {"size": 11}, {"mtime_ns": 21}, {"start": 4}, {"pace": 3}, {"mask": "nothing"},
        {"bucket": Bucket(5, 64, 96)}, {"bucket": Bucket(9, 96, 64)}, {"caption": "a cat"},
        {"decoding": 1},
    ],
)  # fmt: skip
def test_key_depends_on_every_input_of_a_tensor(changed: dict[str, object]) -> None:
    assert cache_key(FIELD, CLIP) == cache_key(FIELD, SampleKey(*CLIP))
    assert cache_key(FIELD, CLIP) != cache_key(FIELD, CLIP._replace(**changed))
    assert cache_key(FIELD, CLIP) != cache_key(FIELD._replace(encoder="another"), CLIP)
    text, frame = FIELD._replace(uses=("caption",)), FIELD._replace(uses=("frame",))
    assert (cache_key(text, CLIP) == cache_key(text, CLIP._replace(**changed))) == ("caption" not in changed)
    names = {"file", "size", "mtime_ns", "start", "decoding"}
    of_frame = names & changed.keys() or changed == {"bucket": Bucket(9, 96, 64)}
    assert (cache_key(frame, CLIP) == cache_key(frame, CLIP._replace(**changed))) == (not of_frame)


def test_key_of_a_file_that_every_version_decodes_alike_is_that_of_older_caches() -> None:
    assert CLIP.decoding == 0
    assert cache_key(FIELD, CLIP).hex() == "a44346ac7d70eb6c32186a21388c7a95"
    assert cache_key(FIELD._replace(uses=("caption",)), CLIP) == cache_key(
        FIELD._replace(uses=("caption",)), CLIP._replace(decoding=1)
    )


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6), st.integers(0, 3))
def test_zero_rows_are_trimmed_and_restored(values: list[float], more: int) -> None:
    text = torch.tensor(values + [0.0] * more)[:, None].repeat(1, 2)
    kept = trim_zeros(text)
    assert len(kept) == max([i + 1 for i, value in enumerate(values) if value], default=1)
    assert torch.equal(restore_zeros(kept, len(text)), text)


def test_writers_and_readers_share_a_folder(tmp_path: Path) -> None:
    reader, first, second = (Cache(tmp_path) for _ in range(3))
    first.put(key(1), tensor_of(1), NOTE)
    second.put(key(1), tensor_of(1), NOTE)
    second.put(key(2), tensor_of(2), NOTE)
    assert reader.read(key(1)) is None and not reader.delete_unfinished()  # both writers are alive
    first.publish()
    assert torch.equal(reader.read(key(1)), tensor_of(1)) and reader.read(key(2)) is None
    second.publish()
    assert torch.equal(reader.read(key(2)), tensor_of(2))
    assert len(shard_files(tmp_path)) == 2 and clean(tmp_path) == {"duplicate": 1}
    assert len(shard_files(tmp_path)) == 1 and verify(tmp_path) == (2, [])
    assert torch.equal(reader.read(key(1)), tensor_of(1))  # through the file that it has open


def test_shard_is_published_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_SHARD_ENTRIES", 10)
    fill(tmp_path, range(35))
    assert len(shard_files(tmp_path)) == 4 and len(Cache(tmp_path)) == 35


@pytest.mark.parametrize("damage", ["truncated", "bit", "columns", "header"])
def test_corruption_is_reported_and_other_entries_stay_readable(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(4))
    fill(tmp_path, range(4, 8))
    path = shard_files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    lost = 1 if damage == "bit" else 4  # one entry, or all four of the shard
    if damage == "truncated":
        content = content[:-100]
    else:
        content[{"bit": 4096 + 500, "columns": 4096 + 4 * 1200 + 9, "header": 30}[damage]] ^= 4
    path.write_bytes(content)
    intact, errors = verify(tmp_path)
    assert intact == 8 - lost and len(errors) == 1 and path.name in errors[0]
    assert tiny.load_script("scripts/cache.py").main(["verify", str(tmp_path)]) == 5
    output = capsys.readouterr().out
    assert path.name in output and f"{intact} entries are intact, 1 error" in output
    cache = Cache(tmp_path)
    missing = [number for number in range(8) if cache.read(key(number)) is None]
    (message,) = cache.corruption_messages()
    assert len(missing) == lost and path.name in message
    for number in missing:  # stored again
        cache.put(key(number), tensor_of(number), NOTE)
    cache.publish()
    reopened = Cache(tmp_path)
    assert all(torch.equal(reopened.read(key(number)), tensor_of(number)) for number in range(8))
    assert sum(clean(tmp_path).values()) == 1 and verify(tmp_path) == (8, [])


def test_a_changed_bit_or_a_lost_end_is_found_wherever_it_is(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (path,) = shard_files(tmp_path)
    content, draw = path.read_bytes(), random.Random(0)
    for number in range(300):
        damaged = bytearray(content)
        at = draw.randrange(len(content))
        if number % 5:
            damaged[at] ^= 1 << draw.randrange(8)
        else:
            del damaged[at:]
        path.write_bytes(damaged)
        intact, errors = verify(tmp_path)
        assert intact < 3 and errors and all(path.name in error for error in errors), (number, at)
        cache = Cache(tmp_path)
        found = [cache.read(key(entry)) for entry in range(3)]
        assert all(tensor is None or torch.equal(tensor, tensor_of(entry)) for entry, tensor in enumerate(found))
        assert len(cache.corruption_messages()) >= 1, (number, at)


def test_damaged_hashes_of_weights_are_computed_again(tmp_path: Path) -> None:
    hashes = {"/models/vae.safetensors 12 345": "ab" * 32}
    write_memo(tmp_path, hashes)
    path = tmp_path / FINGERPRINTS
    content = path.read_bytes()
    assert read_memo(tmp_path) == hashes
    path.write_bytes(content.replace(b"abab", b"acab", 1))
    assert read_memo(tmp_path) == {}
    path.write_text(json.dumps(hashes))  # of an older version
    assert read_memo(tmp_path) == hashes


def test_clean_drops_only_the_requested_entries(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    kept, changed = tmp_path / "data/kept.mp4", tmp_path / "data/changed.mp4"
    cache = Cache(tmp_path / "cache")
    for number, path in enumerate((kept, changed)):
        path.write_bytes(b"clip")
        now = path.stat()
        note = {"part": "moments", "encoder": "vae", "file": path.name, "size": 4, "mtime_ns": now.st_mtime_ns}
        cache.put(key(number), tensor_of(number), note)
    cache.put(key(2), tensor_of(2), {**NOTE, "part": "prompt_embeds", "encoder": "text", "file": None})
    cache.publish()
    changed.write_bytes(b"other")
    assert clean(tmp_path / "cache") == {}
    assert clean(tmp_path / "cache", data_dir=tmp_path / "data") == {"media file changed or missing": 1}
    assert [key(n) in Cache(tmp_path / "cache") for n in range(3)] == [True, False, True]
    assert clean(tmp_path / "cache", encoders=["text"]) == {"dropped encoder": 1}
    assert summarize(tmp_path / "cache") == [("moments", "vae", 1, 1200)]


def test_writer_killed_at_any_file_operation_leaves_intact_cache(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    for at in range(1, 30):

        def write_until_killed(at: int = at) -> None:
            injected = inject_fault(tmp_path, at, kill_self, reads=False)
            fill(tmp_path, range(2, 4))
            os._exit(3 if not injected else 0)

        status = wait_for(fork(write_until_killed))
        cache = Cache(tmp_path)
        assert verify(tmp_path)[1] == [] and all(key(number) in cache for number in range(2))
        deleted = cache.delete_unfinished()
        assert not list(tmp_path.glob(".tmp-*")) and len(deleted) <= 1
        if status == 3:
            break
    else:
        raise AssertionError("the writer never finished")
    assert at > 3 and all(key(number) in Cache(tmp_path) for number in range(4))


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


def steps_of(outcome: runs.Outcome) -> list[dict]:
    return forkserver.read_steps(outcome.folder)


def same_run(first: runs.Outcome, second: runs.Outcome) -> bool:
    a, b = first.weights(), second.weights()
    equal_weights = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal_weights and steps_of(first) == steps_of(second)


def record_encoder_loads(monkeypatch: pytest.MonkeyPatch, family: str = "wan2.1") -> list[int]:
    """Return a list that gets one more element each time the encoders are loaded."""
    script, loaded = runs.train_script(family), []
    load = script.load_encoders
    monkeypatch.setattr(script, "load_encoders", lambda *args: loaded.append(1) or load(*args))
    return loaded


def check_cache_changes_nothing(
    tiny_models: TinyModels, name: str, variants: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = record_encoder_loads(monkeypatch, MODELS[name][0])
    flags = {"cache_variants": variants, "validation_rows": 1}
    plain = tiny_models.train(name, tmp_path / "plain", **flags)
    filling = tiny_models.train(name, tmp_path / "filling", **flags, latent_cache=tmp_path / "cache")
    assert len(loaded) == 2 and same_run(filling, plain) and filling.validation == plain.validation
    check_full_cache(tiny_models, name, CachedRun(plain, tmp_path / "cache", flags), tmp_path, monkeypatch)


class CachedRun(NamedTuple):
    """A run without a cache, a cache that contains every tensor of that run, and the flags of both."""

    plain: runs.Outcome
    cache: Path
    settings: dict[str, object]


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> CachedRun:
    folder, settings = tmp_path_factory.mktemp("full"), {"cache_variants": 1, "validation_rows": 1}
    plain = tiny_models.train("wan", folder / "plain", **settings)
    filling = tiny_models.train("wan", folder / "filling", **settings, latent_cache=folder / "cache")
    assert same_run(filling, plain) and filling.validation == plain.validation
    return CachedRun(plain, folder / "cache", settings)


def check_full_cache(
    tiny_models: TinyModels, name: str, reference: CachedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a full cache needs no encoder and changes nothing, also if --cache_only filled it in advance."""
    loaded, settings = record_encoder_loads(monkeypatch, MODELS[name][0]), reference.settings
    cached = tiny_models.train(name, tmp_path / "cached", **settings, latent_cache=reference.cache)
    assert not loaded and "no encoder is needed for training" in cached.stdout
    assert same_run(cached, reference.plain) and cached.validation == reference.plain.validation
    prefilled = {**settings, "latent_cache": tmp_path / "prefilled"}
    only = tiny_models.train(name, tmp_path / "only", **prefilled, cache_only=True)
    assert ": 0 of " in only.stdout and " to encode, at most " in only.stdout
    assert len(loaded) == 1 and not only.metrics and not (only.folder / "transformer").exists()
    assert same_run(tiny_models.train(name, tmp_path / "only", **prefilled), reference.plain)
    assert len(loaded) == 1 and verify(reference.cache)[1] == verify(tmp_path / "prefilled")[1] == []


def test_full_cache_needs_no_encoder_and_changes_nothing(
    tiny_models: TinyModels, reference: CachedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_full_cache(tiny_models, "wan", reference, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variants"), [*((name, 0) for name in MODELS), ("wan-inpaint", 1), ("wan-inpaint", 3)]
)
def test_cache_changes_nothing_for_every_model(
    tiny_models: TinyModels, name: str, variants: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_cache_changes_nothing(tiny_models, name, variants, tmp_path, monkeypatch)


def test_cache_variants_bound_the_entries_of_all_epochs(tiny_models: TinyModels, tmp_path: Path) -> None:
    flags = {"latent_cache": tmp_path / "cache", "caption_dropout": 0}
    tiny_models.train("wan", tmp_path / "out", cache_only=True, cache_variants=2, num_train_epochs=2, **flags)
    entries = len(Cache(tmp_path / "cache"))
    tiny_models.train("wan", tmp_path / "more", cache_only=True, cache_variants=2, num_train_epochs=7, **flags)
    assert len(Cache(tmp_path / "cache")) == entries
    tiny_models.train("wan", tmp_path / "new", cache_only=True, cache_variants=3, num_train_epochs=7, **flags)
    assert len(Cache(tmp_path / "cache")) > entries


def edited_clip(tiny_models: TinyModels, folder: Path) -> dict[str, object]:
    """Replace a clip by another one of the same name and length, so that the schedule is unchanged."""
    metadata = tiny.make_dataset(folder / "data")
    for path in folder.glob("data/*"):  # copy the times, so that the unchanged files count as unchanged
        original = (tiny_models.metadata.parent / path.name).stat()
        os.utime(path, ns=(original.st_atime_ns, original.st_mtime_ns))
    tiny.write_clip(folder / "data/wide_long.mp4", 41, 160, 96, 24.0, seed=77)
    return {"metadata": metadata}


def other_vae(tiny_models: TinyModels, folder: Path) -> dict[str, object]:
    return {"vae_path": tiny.build_wan_t2v(folder / "other", seed=5) / "vae"}


def other_text(tiny_models: TinyModels, folder: Path) -> dict[str, object]:
    return {"tokenizer_max_length": 12}


def count_entries(cache: Path) -> Counter[str]:
    """Return the number of entries of a cache per tensor name."""
    counts: Counter[str] = Counter()
    for part, _, entries, _ in summarize(cache):
        counts[part] += entries
    return counts


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        (edited_clip, "moments", 1),
        pytest.param(other_vae, "moments", None, marks=pytest.mark.slow),
        pytest.param(other_text, "prompt_embeds", None, marks=pytest.mark.slow),
    ],
)
def test_only_changed_inputs_are_encoded_again(
    tiny_models: TinyModels, reference: CachedRun, tmp_path: Path, change: Callable[[TinyModels, Path], dict[str, object]], name: str,
    expected: int | None,
) -> None:  # fmt: skip
    cache = shutil.copytree(reference.cache, tmp_path / "cache")
    changes = {**reference.settings, **change(tiny_models, tmp_path)}
    before, number = count_entries(cache), expected or count_entries(cache)[name]  # None = all entries of the name
    cached = tiny_models.train("wan", tmp_path / "cached", latent_cache=cache, **changes)
    assert f"; {number} to encode, " in cached.stdout
    assert count_entries(cache) - before == {name: number}
    plain = tiny_models.train("wan", tmp_path / "plain", **changes)
    assert same_run(cached, plain) and cached.validation == plain.validation
    assert not same_run(plain, reference.plain) or plain.validation != reference.plain.validation
    if expected:
        assert clean(cache, data_dir=tmp_path / "data") == {"media file changed or missing": expected}


@pytest.mark.parametrize(
    "damage",
    ["bit", pytest.param("truncated", marks=pytest.mark.slow), pytest.param("header", marks=pytest.mark.slow)],
)
def test_training_reports_and_replaces_corrupted_entries(
    tiny_models: TinyModels, reference: CachedRun, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(reference.cache, tmp_path / "cache")
    settings = {**reference.settings, "latent_cache": cache}
    (path,) = shard_files(cache)
    content = bytearray(path.read_bytes())
    content[30 if damage == "header" else 4096 + 50] ^= 1
    path.write_bytes(content[:-100] if damage == "truncated" else content)
    loaded = record_encoder_loads(monkeypatch)
    repaired = tiny_models.train("wan", tmp_path / "repaired", **settings)
    assert same_run(repaired, reference.plain) and len(loaded) == 1
    # A corrupted entry is found when it is read, a corrupted file when it is opened.
    output = repaired.stderr if damage == "bit" else repaired.stdout
    assert path.name + (", entry 0" if damage == "bit" else ": it") in output and "is encoded again" in output
    assert len(shard_files(cache)) == 2 and len(verify(cache)[1]) == 1
    assert set(clean(cache).values()) == {1} and verify(cache) == (sum(count_entries(reference.cache).values()), [])
    assert same_run(tiny_models.train("wan", tmp_path / "again", **settings), reference.plain) and len(loaded) == 1


def test_resumed_run_reuses_its_cache_entries(tiny_models: TinyModels, reference: CachedRun, tmp_path: Path) -> None:
    settings, last = {**reference.settings, "latent_cache": tmp_path / "cache"}, len(steps_of(reference.plain))
    tiny_models.train("wan", tmp_path / "out", **settings, max_train_steps=last - 1)
    stored = count_entries(tmp_path / "cache")
    settings |= {"resume_from_checkpoint": "latest", "max_train_steps": last}
    assert steps_of(tiny_models.train("wan", tmp_path / "out", **settings)) == steps_of(reference.plain)
    assert (
        count_entries(tmp_path / "cache")["moments"] == stored["moments"] == count_entries(reference.cache)["moments"]
    )
    assert verify(tmp_path / "cache") == (len(Cache(tmp_path / "cache")), [])  # no entry is stored twice


def test_unusable_folder_and_full_disk_are_rejected(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    rejected = runs.train(tiny_models.command("wan", tmp_path / "out", latent_cache=tmp_path / "file"))
    assert rejected.code == 5 and "--latent_cache" in rejected.stderr
    without_cache = runs.train(tiny_models.command("wan", tmp_path / "out", cache_only=True))
    assert without_cache.code == 2 and "--cache_only" in without_cache.stderr
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_fill.shutil, "disk_usage", lambda folder: disk._replace(free=5000))
    small = runs.train(tiny_models.command("wan", tmp_path / "out", latent_cache=tmp_path / "cache"))
    assert small.code == 5 and "0.01 MB free disk space" in small.stderr and not shard_files(tmp_path / "cache")


def test_cache_script_rejects_wrong_arguments_and_full_disk(tmp_path: Path) -> None:
    fill(tmp_path / "cache", range(2))
    fill(tmp_path / "cache", range(2, 4))
    main, command = tiny.load_script("scripts/cache.py").main, ["gc", str(tmp_path / "cache")]
    with pytest.raises(UserError, match="--data_dir"):
        main([*command, "--data_dir", str(tmp_path / "nowhere")])
    (tmp_path / "unmounted").mkdir()
    with pytest.raises(UserError, match="contains none of the 1 media file of"):
        main([*command, "--data_dir", str(tmp_path / "unmounted")])
    for name in ("list", "verify", "gc"):
        with pytest.raises(UserError, match="contains no cache"):
            main([name, str(tmp_path / "unmounted")])
    with pytest.raises(UserError, match="the cache has no entries of other"):
        main([*command, "--drop_encoder", "e", "other"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be cleaned up"):
            main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert verify(tmp_path / "cache") == (4, []) and not list((tmp_path / "cache").glob(".tmp-*"))
    assert main(command) == 0 and len(shard_files(tmp_path / "cache")) == 1
    (kept,) = shard_files(tmp_path / "cache")
    assert main(command) == 0 and shard_files(tmp_path / "cache") == [kept]  # nothing to drop: nothing is rewritten


# ------------------------------------------------------------------------------------------ kills and several ranks


@pytest.fixture(scope="module")
def server() -> Iterator[forkserver.ForkServer]:
    yield forkserver.shared()


def train_with_small_shards() -> int:
    """Entry point of a forked trainer: its own main, with shards of four entries."""
    cache_module.MAX_SHARD_ENTRIES = 4
    return runs.train_script(os.environ["CACHE_FAMILY"]).main()


SMALL_SHARDS = {
    "entry_point": "tests.data.cache.test_cache:train_with_small_shards",
    "environment": {"CACHE_FAMILY": "wan2.1"},
}


def check_repeated_kills(tiny_models: TinyModels, server: forkserver.ForkServer, tmp_path: Path, kills: int) -> None:
    """Kill a cache fill repeatedly at random times; published entries must stay and are never encoded again."""
    many = tiny.make_dataset(tmp_path / "data", copies=4)
    settings = {"cache_variants": 4, "num_train_epochs": 4, "latent_cache": tmp_path / "cache", "cache_only": True}
    flags, random = tiny_models.command("wan", tmp_path / "out", metadata=many, **settings), np.random.default_rng(5)
    published, killed = 0, 0
    for number in range(kills):
        before = len(shard_files(tmp_path / "cache"))
        trainer = server.start(flags, tmp_path / f"{number}.log", **SMALL_SHARDS)
        trainer.wait_until(lambda before=before: len(shard_files(tmp_path / "cache")) > before)
        time.sleep(random.uniform(0, 0.1))
        trainer.kill()
        killed += trainer.wait() == -signal.SIGKILL
        intact, errors = verify(tmp_path / "cache")
        assert not errors and intact >= published
        published = intact
    assert killed >= kills // 2 and published > 0
    last = server.run(flags, tmp_path / "last.log", **SMALL_SHARDS)
    assert last.code == 0 and f"{published} of " in last.output()
    assert clean(tmp_path / "cache") == {}  # no entry was stored twice, and no unfinished file is left
    tiny_models.train("wan", tmp_path / "out", metadata=many, **{**settings, "cache_only": None}, max_train_steps=1)
    assert verify(tmp_path / "cache")[0] == len(Cache(tmp_path / "cache"))


def test_killed_cache_fill_continues(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_SHARD_ENTRIES", 4)
    cache, flags = tmp_path / "cache", {"cache_variants": 2, "cache_only": True}

    def fill_until_killed() -> None:
        inject_fault(cache, 8, kill_self, reads=False)
        tiny_models.train("wan", tmp_path / "out", latent_cache=cache, **flags)

    assert wait_for(fork(fill_until_killed)) == -signal.SIGKILL
    published, errors = verify(cache)
    assert published and published % 4 == 0 and not errors
    last = tiny_models.train("wan", tmp_path / "out", latent_cache=cache, **flags)
    assert f"{published} of " in last.stdout and verify(cache) == (len(Cache(cache)), [])
    assert len(Cache(cache)) > published and not list(cache.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopped_cache_fill_keeps_its_entries(
    tiny_models: TinyModels, server: forkserver.ForkServer, tmp_path: Path, number: signal.Signals
) -> None:
    many = tiny.make_dataset(tmp_path / "data", copies=4)
    settings = {"cache_variants": 4, "num_train_epochs": 4, "latent_cache": tmp_path / "cache", "cache_only": True}
    flags = tiny_models.command("wan", tmp_path / "out", metadata=many, **settings)
    trainer = server.start(flags, tmp_path / "stopped.log", **SMALL_SHARDS)
    trainer.wait_until(lambda: shard_files(tmp_path / "cache"))
    trainer.signal_all(number)
    assert trainer.wait() == STOPPED and f"stopped by {number.name}" in trainer.output()
    intact, errors = verify(tmp_path / "cache")
    assert intact and not errors and not list((tmp_path / "cache").glob(".tmp-*"))
    assert forkserver.read_status(tmp_path / "out")["state"] == "stopped"
    last = server.run(flags, tmp_path / "last.log", **SMALL_SHARDS)
    assert last.code == 0 and f"{intact} of " in last.output() and clean(tmp_path / "cache").get("duplicate", 0) == 0


@pytest.mark.slow
def test_full_disk_keeps_published_entries(
    tiny_models: TinyModels, server: forkserver.ForkServer, tmp_path: Path
) -> None:
    flags = tiny_models.command(
        "wan", tmp_path / "out", latent_cache=tmp_path / "cache", cache_variants=1, cache_only=True
    )
    failed = server.run(flags, tmp_path / "full.log", largest_file=30_000, **SMALL_SHARDS)
    assert failed.code == STORAGE
    assert "--latent_cache" in failed.error_line() and "File too large" in failed.error_line()
    assert not verify(tmp_path / "cache")[1] and not list((tmp_path / "cache").glob(".tmp-*"))
    assert server.run(flags, tmp_path / "last.log", **SMALL_SHARDS).code == 0


@pytest.mark.slow
def test_cache_fill_survives_twenty_kills(
    tiny_models: TinyModels, server: forkserver.ForkServer, tmp_path: Path
) -> None:
    check_repeated_kills(tiny_models, server, tmp_path, 20)
