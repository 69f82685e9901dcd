"""Serves the latent cache: the same numbers with it as without, whole after a kill, and nothing stale in it."""

from __future__ import annotations

import os
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
from crashes import die, fork, status_of, strike
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from videox.data.cache import cache as cache_module
from videox.data.cache.cache import Cache, CacheField, SampleKey, key_of, restore_zeros, trim_zeros
from videox.data.cache.maintenance import clean, contents, verify
from videox.errors import STOPPED, STORAGE, UserError
from videox.shapes import Bucket
from videox.training import precompute as cache_fill

NOTE = {"part": "moments", "encoder": "e", "file": "a.mp4", "size": 3, "mtime_ns": 4}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
KINDS: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "wan": ("wan2.1", "normal", tiny.build_wan_t2v),
    "wan-i2v": ("wan2.1", "i2v", tiny.build_wan_i2v),
    "wan-inpaint": ("wan2.1", "inpaint", lambda folder: tiny.build_wan_i2v(folder, image_embedder=False)),
    "hunyuan": ("hunyuanvideo", "normal", tiny.build_hunyuan_t2v),
    "hunyuan-i2v": ("hunyuanvideo", "i2v", tiny.build_hunyuan_i2v),
}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def tensor_of(number: int, size: int = 300) -> torch.Tensor:
    return torch.full((size,), float(number))


def filled(folder: Path, numbers: range) -> Cache:
    cache = Cache(folder)
    for number in numbers:
        cache.put(key(number), tensor_of(number), NOTE)
    cache.publish()
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


# ------------------------------------------------------------------------------------------ files and keys


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=5), DTYPES), min_size=1, max_size=8), st.integers(0, 99)
)
def test_what_was_put_in_comes_out(
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
    with safe_open(shards(folder)[0], framework="pt") as file:  # any reader of safetensors opens it
        assert set(file.keys()) >= {"blob", "key", "place", "notes"}


CLIP = SampleKey("a.mp4", 10, 20, 3, 2, Bucket(9, 64, 96), "first", "a dog")
PART = CacheField("moments", "vae", ("clip", "mask", "caption"))


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "b.mp4"}, {"size": 11}, {"mtime_ns": 21}, {"start": 4}, {"pace": 3}, {"mask": "nothing"},
        {"bucket": Bucket(5, 64, 96)}, {"bucket": Bucket(9, 96, 64)}, {"caption": "a cat"},
    ],
)  # fmt: skip
def test_a_key_depends_on_all_that_a_tensor_is_made_from(changed: dict[str, object]) -> None:
    assert key_of(PART, CLIP) == key_of(PART, SampleKey(*CLIP))
    assert key_of(PART, CLIP) != key_of(PART, CLIP._replace(**changed))
    assert key_of(PART, CLIP) != key_of(PART._replace(encoder="another"), CLIP)
    text, frame = PART._replace(uses=("caption",)), PART._replace(uses=("frame",))
    assert (key_of(text, CLIP) == key_of(text, CLIP._replace(**changed))) == ("caption" not in changed)
    of_frame = {"file", "size", "mtime_ns", "start"} & changed.keys() or changed == {"bucket": Bucket(9, 96, 64)}
    assert (key_of(frame, CLIP) == key_of(frame, CLIP._replace(**changed))) == (not of_frame)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6), st.integers(0, 3))
def test_padding_is_taken_off_and_put_back(values: list[float], more: int) -> None:
    text = torch.tensor(values + [0.0] * more)[:, None].repeat(1, 2)
    kept = trim_zeros(text)
    assert len(kept) == max([i + 1 for i, value in enumerate(values) if value], default=1)
    assert torch.equal(restore_zeros(kept, len(text)), text)


def test_writers_and_readers_share_a_folder(tmp_path: Path) -> None:
    reader, first, second = (Cache(tmp_path) for _ in range(3))
    first.put(key(1), tensor_of(1), NOTE)
    second.put(key(1), tensor_of(1), NOTE)
    second.put(key(2), tensor_of(2), NOTE)
    assert reader.read(key(1)) is None and not reader.clear_up()  # both writers live
    first.publish()
    assert torch.equal(reader.read(key(1)), tensor_of(1)) and reader.read(key(2)) is None
    second.publish()
    assert torch.equal(reader.read(key(2)), tensor_of(2))
    assert len(shards(tmp_path)) == 2 and clean(tmp_path) == {"second copy": 1}
    assert len(shards(tmp_path)) == 1 and verify(tmp_path) == (2, [])
    assert torch.equal(reader.read(key(1)), tensor_of(1))  # by its open file


def test_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "UNIT_ENTRIES", 10)
    filled(tmp_path, range(35))
    assert len(shards(tmp_path)) == 4 and len(Cache(tmp_path)) == 35


@pytest.mark.parametrize("damage", ["truncated", "bit", "columns", "header"])
def test_damage_is_found_and_named_and_the_rest_stands(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, range(4))
    filled(tmp_path, range(4, 8))
    path = shards(tmp_path)[0]
    content = bytearray(path.read_bytes())
    lost = 1 if damage == "bit" else 4
    if damage == "truncated":
        content = content[:-100]
    else:
        content[{"bit": 4096 + 500, "columns": 4096 + 4 * 1200 + 9, "header": 30}[damage]] ^= 4
    path.write_bytes(content)
    whole, faults = verify(tmp_path)
    assert whole == 8 - lost and len(faults) == 1 and path.name in faults[0]
    assert tiny.load_script("scripts/cache.py").main(["verify", str(tmp_path)]) == 5
    said = capsys.readouterr().out
    assert path.name in said and f"{whole} entries are whole, 1 faults" in said
    cache = Cache(tmp_path)
    missing = [number for number in range(8) if cache.read(key(number)) is None]
    assert len(missing) == lost and len(cache.damage()) == 1 and path.name in cache.damage()[0]
    for number in missing:  # rebuilt where it belongs
        cache.put(key(number), tensor_of(number), NOTE)
    cache.publish()
    again = Cache(tmp_path)
    assert all(torch.equal(again.read(key(number)), tensor_of(number)) for number in range(8))
    assert sum(clean(tmp_path).values()) == 1 and verify(tmp_path) == (8, [])


def test_clearing_up_drops_what_was_named_and_nothing_else(tmp_path: Path) -> None:
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
    assert clean(tmp_path / "cache", data_dir=tmp_path / "data") == {"of a file that changed or is gone": 1}
    assert [key(n) in Cache(tmp_path / "cache") for n in range(3)] == [True, False, True]
    assert clean(tmp_path / "cache", encoders=["text"]) == {"of that encoder": 1}
    assert contents(tmp_path / "cache") == [("moments", "vae", 1, 1200)]


def test_a_writer_that_dies_at_any_file_operation_leaves_a_whole_cache(tmp_path: Path) -> None:
    filled(tmp_path, range(2))
    for at in range(1, 30):

        def work(at: int = at) -> None:
            struck = strike(tmp_path, at, die, reads=False)
            filled(tmp_path, range(2, 4))
            os._exit(3 if not struck else 0)

        status = status_of(fork(work))
        cache = Cache(tmp_path)
        assert verify(tmp_path)[1] == [] and all(key(number) in cache for number in range(2))
        swept = cache.clear_up()
        assert not list(tmp_path.glob(".tmp-*")) and len(swept) <= 1
        if status == 3:
            break
    else:
        raise AssertionError("the writer never came through")
    assert at > 3 and all(key(number) in Cache(tmp_path) for number in range(4))


# ------------------------------------------------------------------------------------------ runs


class Shop:
    """A data set and a model of each kind, made when first asked for."""

    def __init__(self, folder: Path, copies: int = 1) -> None:
        self.folder, self._models = folder, {}
        self.metadata = tiny.make_dataset(folder / "data", copies=copies)

    def command(self, name: str, output_dir: Path, **changes: object) -> list[str]:
        family, mode, build = KINDS[name]
        if name not in self._models:
            self._models[name] = build(self.folder / name)
        base = {"train_mode": mode, "num_train_epochs": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
        base |= {"caption_dropout": 0.3, "tokenizer_max_length": 16 if name == "wan" else None}
        where = {"metadata": self.metadata, "model": self._models[name]}
        where |= {key: changes.pop(key) for key in list(changes) if key in where}
        return runs.plain(family, where["model"], where["metadata"], output_dir, **{**base, **changes})

    def train(self, name: str, output_dir: Path, **changes: object) -> runs.Outcome:
        outcome = runs.train(self.command(name, output_dir, **changes), runs.script(KINDS[name][0]))
        assert outcome.code == 0, outcome.stderr
        return outcome


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


def steps(outcome: runs.Outcome) -> list[dict]:
    return forkserver.steps(outcome.folder)


def same(one: runs.Outcome, other: runs.Outcome) -> bool:
    a, b = one.weights(), other.weights()
    return steps(one) == steps(other) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def count_encoders(monkeypatch: pytest.MonkeyPatch, family: str = "wan2.1") -> list[int]:
    """Returns a list that grows by one whenever the encoders are loaded."""
    script, loaded = runs.script(family), []
    load = script.load_encoders
    monkeypatch.setattr(script, "load_encoders", lambda *given: loaded.append(1) or load(*given))
    return loaded


def check_equal(shop: Shop, name: str, variants: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = count_encoders(monkeypatch, KINDS[name][0])
    more = {"cache_variants": variants, "validation_rows": 1}
    plain = shop.train(name, tmp_path / "plain", **more)
    filling = shop.train(name, tmp_path / "filling", **more, latent_cache=tmp_path / "cache")
    assert len(loaded) == 2 and same(filling, plain) and filling.validation == plain.validation
    check_cached(shop, name, Full(plain, tmp_path / "cache", more), tmp_path, monkeypatch)


class Full(NamedTuple):
    """A run without a cache, a cache that has all that it needs, and what both were asked for."""

    plain: runs.Outcome
    cache: Path
    settings: dict[str, object]


@pytest.fixture(scope="module")
def full(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Full:
    folder, settings = tmp_path_factory.mktemp("full"), {"cache_variants": 1, "validation_rows": 1}
    plain = shop.train("wan", folder / "plain", **settings)
    filling = shop.train("wan", folder / "filling", **settings, latent_cache=folder / "cache")
    assert same(filling, plain) and filling.validation == plain.validation
    return Full(plain, folder / "cache", settings)


def check_cached(shop: Shop, name: str, full: Full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that a full cache needs no encoder and changes nothing, and that one filled ahead is as good."""
    loaded, settings = count_encoders(monkeypatch, KINDS[name][0]), full.settings
    cached = shop.train(name, tmp_path / "cached", **settings, latent_cache=full.cache)
    assert not loaded and "training needs no encoder" in cached.stdout
    assert same(cached, full.plain) and cached.validation == full.plain.validation
    ahead = {**settings, "latent_cache": tmp_path / "ahead"}
    only = shop.train(name, tmp_path / "only", **ahead, cache_only=True)
    assert ": 0 of " in only.stdout and " MB at most; " in only.stdout
    assert len(loaded) == 1 and not only.metrics and not (only.folder / "transformer").exists()
    assert same(shop.train(name, tmp_path / "only", **ahead), full.plain)
    assert len(loaded) == 1 and verify(full.cache)[1] == verify(tmp_path / "ahead")[1] == []


def test_a_full_cache_needs_no_encoder_and_changes_nothing(
    shop: Shop, full: Full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_cached(shop, "wan", full, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variants"), [*((name, 0) for name in KINDS), ("wan-inpaint", 1), ("wan-inpaint", 3)]
)
def test_the_same_holds_for_every_kind(
    shop: Shop, name: str, variants: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal(shop, name, variants, tmp_path, monkeypatch)


def test_so_many_variants_serve_every_epoch(shop: Shop, tmp_path: Path) -> None:
    where = {"latent_cache": tmp_path / "cache", "caption_dropout": 0}
    shop.train("wan", tmp_path / "out", cache_only=True, cache_variants=2, num_train_epochs=2, **where)
    full = len(Cache(tmp_path / "cache"))
    shop.train("wan", tmp_path / "more", cache_only=True, cache_variants=2, num_train_epochs=7, **where)
    assert len(Cache(tmp_path / "cache")) == full
    shop.train("wan", tmp_path / "new", cache_only=True, cache_variants=3, num_train_epochs=7, **where)
    assert len(Cache(tmp_path / "cache")) > full


def edit_clip(shop: Shop, folder: Path) -> dict[str, object]:
    """Another clip under an old name: of the same length, so that the schedule stays."""
    metadata = tiny.make_dataset(folder / "data")
    for path in folder.glob("data/*"):  # the same files, by size and time, as far as they are the same
        at = (shop.metadata.parent / path.name).stat()
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    tiny.write_clip(folder / "data/wide_long.mp4", 41, 160, 96, 24.0, seed=77)
    return {"metadata": metadata}


def other_vae(shop: Shop, folder: Path) -> dict[str, object]:
    return {"vae_path": tiny.build_wan_t2v(folder / "other", seed=5) / "vae"}


def other_text(shop: Shop, folder: Path) -> dict[str, object]:
    return {"tokenizer_max_length": 12}


def counts_of(cache: Path) -> Counter[str]:
    """Returns the entries of a cache by part."""
    counts: Counter[str] = Counter()
    for part, _, entries, _ in contents(cache):
        counts[part] += entries
    return counts


@pytest.mark.parametrize(
    ("change", "part", "anew"),
    [
        (edit_clip, "moments", 1),
        pytest.param(other_vae, "moments", None, marks=pytest.mark.slow),
        pytest.param(other_text, "prompt_embeds", None, marks=pytest.mark.slow),
    ],
)
def test_only_what_changed_is_encoded_anew(
    shop: Shop, full: Full, tmp_path: Path, change: Callable[[Shop, Path], dict[str, object]], part: str,
    anew: int | None,
) -> None:  # fmt: skip
    cache, changes = shutil.copytree(full.cache, tmp_path / "cache"), {**full.settings, **change(shop, tmp_path)}
    before, number = counts_of(cache), anew or counts_of(cache)[part]  # None = all of it
    cached = shop.train("wan", tmp_path / "cached", latent_cache=cache, **changes)
    assert f"; {number} to make, " in cached.stdout
    assert counts_of(cache) - before == {part: number}
    plain = shop.train("wan", tmp_path / "plain", **changes)
    assert same(cached, plain) and cached.validation == plain.validation
    assert not same(plain, full.plain) or plain.validation != full.plain.validation
    if anew:
        assert clean(cache, data_dir=tmp_path / "data") == {"of a file that changed or is gone": anew}


@pytest.mark.parametrize(
    "damage",
    ["bit", pytest.param("truncated", marks=pytest.mark.slow), pytest.param("header", marks=pytest.mark.slow)],
)
def test_damage_is_named_and_mended_in_training(
    shop: Shop, full: Full, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(full.cache, tmp_path / "cache")
    settings = {**full.settings, "latent_cache": cache}
    (path,) = shards(cache)
    content = bytearray(path.read_bytes())
    content[30 if damage == "header" else 4096 + 50] ^= 1
    path.write_bytes(content[:-100] if damage == "truncated" else content)
    loaded = count_encoders(monkeypatch)
    mended = shop.train("wan", tmp_path / "mended", **settings)
    assert same(mended, full.plain) and len(loaded) == 1
    named = mended.stderr if damage == "bit" else mended.stdout  # an entry when it is read, a file when it is opened
    assert path.name + (", entry 0" if damage == "bit" else ": it") in named and "is made anew" in named
    assert len(shards(cache)) == 2 and len(verify(cache)[1]) == 1
    assert set(clean(cache).values()) == {1} and verify(cache) == (sum(counts_of(full.cache).values()), [])
    assert same(shop.train("wan", tmp_path / "again", **settings), full.plain) and len(loaded) == 1


def test_a_resumed_run_finds_what_it_made(shop: Shop, full: Full, tmp_path: Path) -> None:
    settings, last = {**full.settings, "latent_cache": tmp_path / "cache"}, len(steps(full.plain))
    shop.train("wan", tmp_path / "out", **settings, max_train_steps=last - 1)
    made = counts_of(tmp_path / "cache")
    settings |= {"resume_from_checkpoint": "latest", "max_train_steps": last}
    assert steps(shop.train("wan", tmp_path / "out", **settings)) == steps(full.plain)
    assert counts_of(tmp_path / "cache")["moments"] == made["moments"] == counts_of(full.cache)["moments"]
    assert verify(tmp_path / "cache") == (len(Cache(tmp_path / "cache")), [])  # nothing is there twice


def test_an_unusable_place_and_too_small_a_disk_are_refused(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    refused = runs.train(shop.command("wan", tmp_path / "out", latent_cache=tmp_path / "file"))
    assert refused.code == 5 and "--latent_cache" in refused.stderr
    alone = runs.train(shop.command("wan", tmp_path / "out", cache_only=True))
    assert alone.code == 2 and "--cache_only" in alone.stderr
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_fill.shutil, "disk_usage", lambda folder: disk._replace(free=5000))
    small = runs.train(shop.command("wan", tmp_path / "out", latent_cache=tmp_path / "cache"))
    assert small.code == 5 and "0.01 MB are free" in small.stderr and not shards(tmp_path / "cache")


def test_clearing_up_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    filled(tmp_path / "cache", range(2))
    filled(tmp_path / "cache", range(2, 4))
    main, given = tiny.load_script("scripts/cache.py").main, ["gc", str(tmp_path / "cache")]
    with pytest.raises(UserError, match="--data_dir"):
        main([*given, "--data_dir", str(tmp_path / "nowhere")])
    (tmp_path / "unmounted").mkdir()
    with pytest.raises(UserError, match="has none of the 1 files"):
        main([*given, "--data_dir", str(tmp_path / "unmounted")])
    for command in ("list", "verify", "gc"):
        with pytest.raises(UserError, match="holds nothing of a cache"):
            main([command, str(tmp_path / "unmounted")])
    with pytest.raises(UserError, match="nothing here was made by other"):
        main([*given, "--drop_encoder", "e", "other"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be cleared up"):
            main(given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert verify(tmp_path / "cache") == (4, []) and not list((tmp_path / "cache").glob(".tmp-*"))
    assert main(given) == 0 and len(shards(tmp_path / "cache")) == 1
    (kept,) = shards(tmp_path / "cache")
    assert main(given) == 0 and shards(tmp_path / "cache") == [kept]  # nothing to drop: nothing is written anew


# ------------------------------------------------------------------------------------------ kills and several ranks


@pytest.fixture(scope="module")
def server() -> Iterator[forkserver.ForkServer]:
    yield forkserver.shared()


def train_in_small_files() -> int:
    """What a forked trainer runs here: its own main, with files of four entries."""
    cache_module.UNIT_ENTRIES = 4
    return runs.script(os.environ["CACHE_FAMILY"]).main()


WORK = {"work": "tests.data.cache.test_cache:train_in_small_files", "environment": {"CACHE_FAMILY": "wan2.1"}}


def kill_while_filling(shop: Shop, server: forkserver.ForkServer, tmp_path: Path, kills: int) -> None:
    """Kills a fill again and again at random instants; what was published stays, and is never made again."""
    many = tiny.make_dataset(tmp_path / "data", copies=4)
    settings = {"cache_variants": 4, "num_train_epochs": 4, "latent_cache": tmp_path / "cache", "cache_only": True}
    flags, random = shop.command("wan", tmp_path / "out", metadata=many, **settings), np.random.default_rng(5)
    published, killed = 0, 0
    for number in range(kills):
        there = len(shards(tmp_path / "cache"))
        trainer = server.start(flags, tmp_path / f"{number}.log", **WORK)
        trainer.until(lambda there=there: len(shards(tmp_path / "cache")) > there)
        time.sleep(random.uniform(0, 0.1))
        trainer.kill()
        killed += trainer.wait() == -signal.SIGKILL
        whole, faults = verify(tmp_path / "cache")
        assert not faults and whole >= published
        published = whole
    assert killed >= kills // 2 and published > 0
    last = server.run(flags, tmp_path / "last.log", **WORK)
    assert last.code == 0 and f"{published} of " in last.said()
    assert clean(tmp_path / "cache") == {}  # nothing was made twice, and nothing unfinished is left
    shop.train("wan", tmp_path / "out", metadata=many, **{**settings, "cache_only": None}, max_train_steps=1)
    assert verify(tmp_path / "cache")[0] == len(Cache(tmp_path / "cache"))


def test_a_killed_fill_goes_on(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "UNIT_ENTRIES", 4)
    cache, asked = tmp_path / "cache", {"cache_variants": 2, "cache_only": True}

    def work() -> None:
        strike(cache, 8, die, reads=False)
        shop.train("wan", tmp_path / "out", latent_cache=cache, **asked)

    assert status_of(fork(work)) == -signal.SIGKILL
    published, faults = verify(cache)
    assert published and published % 4 == 0 and not faults
    last = shop.train("wan", tmp_path / "out", latent_cache=cache, **asked)
    assert f"{published} of " in last.stdout and verify(cache) == (len(Cache(cache)), [])
    assert len(Cache(cache)) > published and not list(cache.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_fill_that_is_stopped_keeps_what_it_made(
    shop: Shop, server: forkserver.ForkServer, tmp_path: Path, number: signal.Signals
) -> None:
    many = tiny.make_dataset(tmp_path / "data", copies=4)
    settings = {"cache_variants": 4, "num_train_epochs": 4, "latent_cache": tmp_path / "cache", "cache_only": True}
    flags = shop.command("wan", tmp_path / "out", metadata=many, **settings)
    trainer = server.start(flags, tmp_path / "stopped.log", **WORK)
    trainer.until(lambda: shards(tmp_path / "cache"))
    trainer.signal_all(number)
    assert trainer.wait() == STOPPED and f"stopped by {number.name}" in trainer.said()
    whole, faults = verify(tmp_path / "cache")
    assert whole and not faults and not list((tmp_path / "cache").glob(".tmp-*"))
    assert forkserver.status(tmp_path / "out")["state"] == "stopped"
    last = server.run(flags, tmp_path / "last.log", **WORK)
    assert last.code == 0 and f"{whole} of " in last.said() and clean(tmp_path / "cache").get("second copy", 0) == 0


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_published(shop: Shop, server: forkserver.ForkServer, tmp_path: Path) -> None:
    flags = shop.command("wan", tmp_path / "out", latent_cache=tmp_path / "cache", cache_variants=1, cache_only=True)
    full = server.run(flags, tmp_path / "full.log", largest_file=30_000, **WORK)
    assert full.code == STORAGE and "--latent_cache" in full.complaint() and "File too large" in full.complaint()
    assert not verify(tmp_path / "cache")[1] and not list((tmp_path / "cache").glob(".tmp-*"))
    assert server.run(flags, tmp_path / "last.log", **WORK).code == 0


@pytest.mark.slow
def test_a_fill_that_is_killed_twenty_times_ends_whole(
    shop: Shop, server: forkserver.ForkServer, tmp_path: Path
) -> None:
    kill_while_filling(shop, server, tmp_path, 20)
