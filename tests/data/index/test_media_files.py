"""Tests of videox.data.index.media_files: a folder is searched by content, and says what was passed over."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from videox.data.index import media_files
from videox.data.index.index import DataLocation, Index, build_index
from videox.data.media.container import format_of
from videox.errors import DATA, UserError


def write_video(path: Path, container: str, codec: str = "mpeg2video") -> None:
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(3):
            picture = np.full((48, 64, 3), 40 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def build(folder: Path) -> Index:
    return build_index(DataLocation(folder, folder, folder.with_suffix(".arrow")), workers=1, progress=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened to find out what they are."""
    names: list[str] = []
    monkeypatch.setattr(media_files, "format_of", lambda path: names.append(path.name) or format_of(path))
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "card").mkdir(parents=True)
    write_video(folder / "card" / "00001.MTS", "mpegts")
    write_video(folder / "phone.3gp", "3gp", "mpeg4")
    write_video(folder / "dvd.vob", "mpeg")
    write_video(folder / "clip.dat", "mpeg")
    write_video(folder / "no suffix", "matroska")
    write_video(folder / "clip.part1", "avi", "mpeg4")
    Image.new("RGB", (40, 30)).save(folder / "still.jfif", "JPEG")
    Image.new("RGB", (40, 30)).save(folder / "web.image", "WEBP")
    for name in ("card/00001", "phone", "clip", "still"):
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    return folder


def test_images_and_videos_are_found_by_their_content(folder: Path) -> None:
    index = build(folder)
    assert index.usable.all()
    captions = dict(zip(index.file_path.to_pylist(), index.text.to_pylist(), strict=True))
    assert captions == {
        "card/00001.MTS": "caption of card/00001", "phone.3gp": "caption of phone", "still.jfif": "caption of still",
        "clip.dat": "caption of clip", "clip.part1": "caption of clip", "dvd.vob": "", "no suffix": "", "web.image": "",
    }  # fmt: skip
    assert sum(index.kind.tolist()) == 6


def test_what_was_passed_over_is_counted_by_suffix(folder: Path) -> None:
    for name in ("a.json", "b.json", "c.srt", "notes", "song.mp3", "voice.m4a", "empty.bin"):
        (folder / name).write_text("" if name == "empty.bin" else "{}")
    (folder / "link.lst").symlink_to("nowhere")
    (note,) = [note for note in build(folder).notes if "neither image, video nor caption" in note]
    assert note.startswith("8 files are neither")
    for counted in ("2 .json", "1 .srt", "1 without suffix", "1 .mp3", "1 .m4a", "1 .bin", "1 .lst"):
        assert counted in note


@pytest.mark.parametrize("name", ["metadata.json", "metadata.jsonl", "metadata.csv"])
def test_a_list_in_the_folder_is_named_where_captions_are_missing(tmp_path: Path, name: str) -> None:
    """As VideoX-Fun's and Hugging Face's folders are: the list is beside the clips, which have no .txt files."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_video(folder / "a.mp4", "mov", "mpeg4")
    (folder / name).write_text('[{"file_path": "a.mp4", "text": "a dog"}]')
    warning = f"warning: {name} is not read for captions, --train_data_meta {folder / name} reads it"
    assert warning in build(folder).notes
    (folder / "a.txt").write_text("a dog")
    assert warning not in build(folder).notes


def test_a_pointer_with_the_suffix_of_a_video_is_a_bad_row(folder: Path) -> None:
    (folder / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    (problem,) = build(folder).problems()
    assert problem[1:3] == ("lfs.mp4", "unrecognised")
    assert "git lfs pull" in problem[3]


def test_names_in_other_forms_and_encodings(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in (b"e\xcc\x81.mov", b"caf\xe9.mov"):  # as macOS writes e with an accent; Latin-1
        write_video(Path(os.fsdecode(bytes(folder) + b"/" + name)), "mov", "mpeg4")
    (folder / "\xe9.txt").write_text("one letter")
    index = build(folder)
    assert dict(zip(index.text.to_pylist(), index.usable.tolist(), strict=True)) == {"one letter": True, "": False}
    (problem,) = index.problems()
    assert problem[2:] == ("bad_file_path", "file_path is no text, or not UTF-8: rename the file")


@pytest.mark.parametrize("content", ["none", "texts", "links"])
def test_a_folder_without_media_says_where_it_looked(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    if content == "texts":
        for name in ("a.txt", "sub/b.txt", "sub/c.json"):
            (folder / name).write_text("{}")
    if content == "links":
        (folder / "clips").symlink_to(tmp_path)
    with pytest.raises(UserError, match="0 samples") as refused:
        build(folder)
    assert refused.value.exit_code == DATA
    expected = {
        "none": f"0 samples: {folder} has no files",
        "texts": f"0 samples: no image or video among the 3 files in 2 folders at and below {folder} (2 .txt, 1 .json)",
        "links": f"0 samples: {folder} has no files; 1 link to a folder is not followed (first: 'clips')",
    }
    assert refused.value.what == expected[content]


def test_an_unchanged_folder_is_not_opened_again(folder: Path, opened: list[str]) -> None:
    (folder / "c.json").write_text("{}")
    build(folder)
    assert sorted(opened) == ["c.json", "clip.dat", "clip.part1", "no suffix", "web.image"]  # each one once
    opened.clear()
    assert len(build(folder)) == 8
    assert opened == []
    write_video(folder / "c.json", "matroska")  # another content under the same name
    assert len(build(folder)) == 9
    assert len(opened) == len({*opened}) == 5
