"""Tests of videox.data.index.sources: several lists and folders as one index."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from PIL import Image

from videox.data.index import scan
from videox.data.index.captions import CaptionRules, draw_caption, rows_without_caption
from videox.data.index.folders import FolderRules
from videox.data.index.index import DataLocation, Index, build_index
from videox.data.index.metadata import MAX_WEIGHT
from videox.data.index.sources import CaptionEdits, Source, common_folder, index_name
from videox.errors import DATA, UserError
from videox.estimate.data_report import caption_lines

OLD = 10**10  # nanoseconds: a file of this age has a reliable modification time


def write_image(path: Path, text: str | None = None, suffix: str = ".txt", width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 16), "red").save(path)
    if text is not None:
        path.with_suffix(suffix).write_text(text, encoding="utf-8")
    return path


def write_list(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    os.utime(path, ns=(time.time_ns() - OLD,) * 2)
    return path


def location_of(sources: Sequence[Source], place: Path, **changes: object) -> DataLocation:
    first = sources[0].metadata_path
    return DataLocation(first, common_folder(sources), place / index_name(sources), sources=tuple(sources), **changes)


def build(sources: Sequence[Source], place: Path, **changes: object) -> Index:
    return build_index(location_of(sources, place, **changes), workers=1, progress=False)


def trained_captions(index: Index, **rules: object) -> list[str]:
    """Return the caption that a sample of each row has, of the row's only one."""
    return [draw_caption(index.captions(row), CaptionRules(**rules), 0) for row in range(len(index))]


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
def data(tmp_path: Path) -> tuple[Source, Source]:
    """A folder with two captioned images, and a list of two rows in another folder."""
    one, two = tmp_path / "data" / "one", tmp_path / "data" / "deep" / "two"
    write_image(one / "a.png", "first")
    write_image(one / "b.png", "second")
    write_image(two / "a.png", width=64)
    rows = [{"file_path": "a.png", "text": "third", "weight": 2}, {"file_path": "a.png", "text": "fourth"}]
    return Source(one, one), Source(write_list(two / "list.jsonl", rows), two, weight=3)


def test_several_sources_become_one_index(data: tuple[Source, Source], tmp_path: Path, probed: list[str]) -> None:
    index = build(data, tmp_path)
    assert index.data_dir == tmp_path / "data"
    assert index.file_path.to_pylist() == ["one/a.png", "one/b.png", "deep/two/a.png", "deep/two/a.png"]
    assert [index.caption(row) for row in range(4)] == ["first", "second", "third", "fourth"]
    assert index.weight.tolist() == [1, 1, 6, 3]
    assert index.width.tolist() == [32, 32, 64, 64] and index.usable.all()
    assert all(index.file(row).is_file() for row in range(4))
    assert index.notes[:2] == (
        f"rows 0 to 1: {data[0].metadata_path}", f"rows 2 to 3: {data[1].metadata_path} (repeats 3)"
    )  # fmt: skip
    assert len(probed) == 3
    assert build(data, tmp_path).fingerprint() == index.fingerprint() and len(probed) == 3


def test_a_changed_caption_or_list_is_noticed(data: tuple[Source, Source], tmp_path: Path, probed: list[str]) -> None:
    before = build(data, tmp_path)
    (data[0].metadata_path / "a.txt").write_text("another one", encoding="utf-8")
    changed = build(data, tmp_path)
    assert changed.caption(0) == "another one" and changed.fingerprint() != before.fingerprint()
    write_list(data[1].metadata_path, [{"file_path": "a.png", "text": "only"}])
    assert build(data, tmp_path).text.to_pylist() == ["another one", "second", "only"]
    assert len(probed) == 3


def test_the_common_folder_may_be_moved(data: tuple[Source, Source], tmp_path: Path, probed: list[str]) -> None:
    before = build(data, tmp_path / "data")
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "data", moved)
    copies = [
        Source(moved / s.metadata_path.relative_to(tmp_path / "data"), moved / s.data_dir.relative_to(tmp_path / "data"),
               weight=s.weight) for s in data
    ]  # fmt: skip
    location = location_of(copies, moved)
    # An index has the name of its list of sources, which has changed with their paths.
    (moved / index_name(data)).rename(location.index_path)
    probed.clear()
    index = build_index(location, workers=1, progress=False)
    assert index.fingerprint() == before.fingerprint()
    assert index.file(0) == moved / "one/a.png"


def test_one_source_has_the_rows_of_a_plain_list(data: tuple[Source, Source], tmp_path: Path) -> None:
    folder = data[0]
    plain = build_index(
        DataLocation(folder.metadata_path, folder.data_dir, tmp_path / "plain.arrow"), workers=1, progress=False
    )
    index = build([folder], tmp_path)
    assert index.fingerprint() == plain.fingerprint()
    assert index.file_path.equals(plain.file_path) and index.data_dir == plain.data_dir


def test_measurements_of_a_plain_run_are_reused(
    data: tuple[Source, Source], tmp_path: Path, probed: list[str]
) -> None:
    folder = data[0]
    beside = folder.metadata_path.parent / index_name([folder])
    build_index(DataLocation(folder.metadata_path, folder.data_dir, beside), workers=1, progress=False)
    assert sorted(probed) == ["a.png", "b.png"]
    build(data, tmp_path)
    assert probed[2:] == ["a.png"]  # the file of the list alone
    # A source fewer changes the common folder: what was measured is still found.
    (tmp_path / index_name(data)).rename(tmp_path / index_name([data[1]]))
    index = build([data[1]], tmp_path)
    assert len(probed) == 3 and index.width.tolist() == [64, 64]


def test_a_path_must_stay_in_the_folder_of_its_own_source(data: tuple[Source, Source], tmp_path: Path) -> None:
    rows = [{"file_path": "a.png", "text": ""}, {"file_path": "../../one/a.png", "text": ""}]
    write_list(data[1].metadata_path, rows)
    with pytest.raises(UserError) as error:
        build(data, tmp_path)
    assert error.value.where == f"{data[1].metadata_path} row 1, key file_path"
    index = build(data, tmp_path, allow_outside_data_dir=True)
    assert index.usable.all() and index.file(3).samefile(tmp_path / "data/one/a.png")


def test_a_link_that_leaves_its_source_later_is_refused(data: tuple[Source, Source], tmp_path: Path) -> None:
    build(data, tmp_path)
    file = data[1].data_dir / "a.png"
    file.unlink()
    file.symlink_to(tmp_path / "data/one/a.png")
    with pytest.raises(UserError) as error:
        build(data, tmp_path)
    assert error.value.where == f"{data[1].metadata_path} row 0, key file_path"


def test_a_source_without_any_of_its_files_is_named(data: tuple[Source, Source], tmp_path: Path) -> None:
    (data[1].data_dir / "a.png").unlink()
    with pytest.raises(UserError) as error:
        build(data, tmp_path)
    assert error.value.exit_code == DATA and error.value.where == str(data[1].metadata_path)
    assert "none of its 1 file exists" in error.value.what


def test_repeats_have_a_limit(data: tuple[Source, Source], tmp_path: Path) -> None:
    heavy = Source(data[1].metadata_path, data[1].data_dir, weight=MAX_WEIGHT)
    with pytest.raises(UserError) as error:
        build([data[0], heavy], tmp_path)
    assert error.value.where == str(heavy.metadata_path) and "20000 times" in error.value.what


def test_rules_of_a_folder_select_files_and_captions(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    write_image(folder / "red_car.png", "a car\nsecond line", ".caption")
    write_image(folder / "x.PNG", "ignored", ".txt")
    write_image(folder / "deep" / "y.png", "deeper", ".caption")
    (folder / "z.mp4").write_bytes(b"not read")
    rules = FolderRules((".caption",), recursive=False, kind="image")
    for captions, expected in {
        CaptionEdits(): ["a car\nsecond line", ""],
        CaptionEdits(first_line=True, missing="none", prefix="<", suffix=">"): ["<a car>", "<none>"],
        CaptionEdits(from_name=True, prefix="my "): ["my red car", "my x"],
        CaptionEdits(fixed="same"): ["same", "same"],
    }.items():
        index = build([Source(folder, folder, rules, captions)], tmp_path)
        assert index.file_path.to_pylist() == ["red_car.png", "x.PNG"]
        assert trained_captions(index) == expected
    notes = "\n".join(index.notes)
    assert "2 files are not read (first: 'deep/y.png')" in notes
    assert "1 media file has no .caption file, its caption is empty (first: 'x.PNG')" in notes


def test_each_of_several_captions_is_changed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [{"video_path": "a.png", "caption": ["one, b\nrest", "two"]}, {"video_path": "a.png", "caption": None}]
    listed = write_list(tmp_path / "list.jsonl", rows)
    edits = CaptionEdits(first_line=True, missing="none", prefix="<", suffix=">")
    index = build([Source(listed, tmp_path, captions=edits)], tmp_path)
    assert index.captions(0).captions == ("one, b", "two") and index.captions(1).captions == ("none",)
    drawn = {draw_caption(index.captions(0), CaptionRules(), key) for key in range(40)}
    assert drawn == {"<one, b>", "<two>"}
    # Prefix and suffix stay around the shuffled tags; prefix and trigger word of the run are put before them.
    shuffled = {
        draw_caption(index.captions(0), CaptionRules("film", "ohwx", shuffle_tags=True), key) for key in range(80)
    }
    assert shuffled == {"ohwx, film <one, b>", "ohwx, film <b, one>", "ohwx, film <two>"}
    fixed = build([Source(listed, tmp_path, captions=CaptionEdits(fixed="same"))], tmp_path)
    assert fixed.text.to_pylist() == ["same", "same"]


def test_rows_without_a_caption_are_trained_with_the_prefix_and_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    listed = write_list(tmp_path / "list.jsonl", [{"file_path": "a.png", "text": ""}] * 2)
    edits = CaptionEdits(prefix="a cartoon ", suffix="!")
    index = build([Source(listed, tmp_path, captions=edits), Source(listed, tmp_path)], tmp_path)
    assert trained_captions(index) == ["a cartoon !"] * 2 + [""] * 2
    assert rows_without_caption(index.text).all()
    (line,) = caption_lines(index, CaptionRules())
    assert line.startswith("4 rows have no caption and are trained with an empty caption or the caption 'a cartoon !'")


def test_caption_files_of_one_image_must_agree_unless_the_source_names_its_own_suffixes(tmp_path: Path) -> None:
    write_image(tmp_path / "clips/x.png", "one", ".txt")
    (tmp_path / "clips/x.caption").write_text("two", encoding="utf-8")
    (tmp_path / "clips/x.wan.txt").write_text("three", encoding="utf-8")
    clips = tmp_path / "clips"
    with pytest.raises(UserError, match="state different captions of one media file"):
        build([Source(clips, clips)], tmp_path)
    for suffixes, expected in {
        (".caption",): "two", (".caption", ".txt"): "two", (".txt",): "one", (".wan.txt", ".txt"): "three",
    }.items():  # fmt: skip
        assert build([Source(clips, clips, FolderRules(suffixes))], tmp_path).text.to_pylist() == [expected]


def test_the_kind_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    tiny.write_clip(write_image(clips / "clip.mp4.png").with_name("clip.mp4"), 5, 32, 16, 24.0)
    (clips / "clip.mp4").rename(clips / "clip_named.png")  # a video
    (clips / "clip.mp4.png").rename(clips / "still_without_suffix")
    pictures = [Image.new("RGB", (32, 16), color) for color in ("red", "blue", "green")]
    pictures[0].save(clips / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].save(clips / "still.gif")
    (clips / "broken.mp4").write_bytes(b"\0" * 100)
    rules = {kind: FolderRules(kind=kind) for kind in ("image", "video")}
    images, videos = (build([Source(clips, clips, rules[kind])], tmp_path) for kind in ("image", "video"))
    assert images.file_path.to_pylist() == ["moving.gif", "still.gif", "still_without_suffix"]
    assert images.usable.all() and not images.kind.any() and (images.frames == 1).all()
    assert videos.file_path.to_pylist() == ["broken.mp4", "clip_named.png", "moving.gif"]
    assert videos.usable.tolist() == [False, True, True] and videos.frames.tolist()[1:] == [5, 3]
    assert "2 files are not read (first: 'broken.mp4'): only images" in images.notes[1]
    # A file that becomes one of the other kind is noticed.
    pictures[0].save(clips / "moving.gif")
    assert build([Source(clips, clips, rules["video"])], tmp_path).file_path.to_pylist() == [
        "broken.mp4",
        "clip_named.png",
    ]


def test_a_folder_without_files_of_its_kind_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "clips/deep/x.png")
    clips = tmp_path / "clips"
    with pytest.raises(UserError, match="0 samples: no video among the 1 file in 1 folder"):
        build([Source(clips, clips, FolderRules(kind="video"))], tmp_path)
    with pytest.raises(UserError, match="the folders in it are not read"):
        build([Source(clips, clips, FolderRules(recursive=False))], tmp_path)


def test_absolute_paths_are_allowed_by_source(data: tuple[Source, Source], tmp_path: Path) -> None:
    outside = write_image(tmp_path / "elsewhere/z.png", width=48)
    listed = write_list(data[1].metadata_path, [{"file_path": str(outside), "text": "z"}])
    with pytest.raises(UserError, match="outside of train_data_dir"):
        build(data, tmp_path)
    allowed = Source(listed, data[1].data_dir, allow_absolute=True)
    index = build([data[0], allowed], tmp_path)
    assert index.file(2) == outside and index.width.tolist() == [32, 32, 48]
    write_image(outside, width=64)  # probed again, and its path checked again
    assert build([data[0], allowed], tmp_path).width.tolist() == [32, 32, 64]
    write_list(listed, [{"file_path": "../../one/a.png", "text": "z"}])
    with pytest.raises(UserError, match="outside of train_data_dir"):
        build([data[0], allowed], tmp_path)
