"""Tests of the index across versions: which files are probed again, and animations as images or videos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from videox.data.index import scan
from videox.data.index.index import DataLocation, Index, build_index
from videox.data.index.table import header_of, load_table, write_table
from videox.data.media.container import ANIMATION, PROBE_VERSIONS
from videox.data.media.signatures import FORMATS

FILES = ("a.gif", "b.png", "c.jpg", "d.mp4", "e.bmp")


def write_gif(path: Path, frames: int = 6) -> None:
    pictures = [Image.new("RGB", (40, 30), (40 * number, 0, 0)) for number in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80)


def write_video(path: Path, frames: int = 5) -> None:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.full((48, 64, 3), 40 * number % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def write_rows(folder: Path, rows: Sequence[dict]) -> None:
    (folder / "metadata.json").write_text(json.dumps([{"text": "", **row} for row in rows]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gif(tmp_path / "a.gif")
    write_video(tmp_path / "d.mp4")
    for name in ("b.png", "c.jpg", "e.bmp"):
        Image.new("RGB", (32, 16), "red").save(tmp_path / name)
    write_rows(tmp_path, [{"file_path": name} for name in FILES])
    return tmp_path


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


def build(folder: Path, said: list[str] | None = None, **options: object) -> Index:
    location = DataLocation(folder / "metadata.json", folder, folder / "index.arrow")
    notify = None if said is None else said.append
    return build_index(location, workers=1, progress=False, notify=notify, **options)


def make_old(folder: Path, version: int = 2) -> None:
    """Rewrite the index as an older version wrote it, which knew neither formats nor animations."""
    path = folder / "index.arrow"
    table = load_table(path)
    header = {name: value for name, value in header_of(table).items() if name != "probed"} | {"version": version}
    animated = table["decoding"].to_numpy() & ANIMATION != 0
    for name, still in (("kind", 0), ("frames", 1), ("fps", 0)):
        values = table[name].to_numpy()
        column = pa.array(np.where(animated, still, values).astype(values.dtype))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    table = table.drop_columns(["format", "decoding", *(["declared_weight"] if version == 1 else [])])
    write_table(table.combine_chunks(), header, path)


@pytest.mark.parametrize("version", [1, 2])
def test_only_kinds_that_are_measured_otherwise_are_probed_again(
    folder: Path, probed: list[str], version: int
) -> None:
    fresh = build(folder)
    make_old(folder, version)
    probed.clear()
    said: list[str] = []
    index = build(folder, said)
    assert sorted(probed) == ["a.gif", "b.png", "d.mp4"]  # neither JPEG nor BMP
    assert said == [
        "index: 3 files are probed again, since an earlier version read some files of their formats otherwise"
        " (1 GIF, 1 PNG, 1 mov)",
        "index: 1 of them are decoded otherwise than by an earlier version; their cached tensors are computed again"
        " (an animation: 1)",
    ]
    assert (index.kind.tolist(), index.frames.tolist()) == ([1, 0, 0, 1, 0], [6, 1, 1, 5, 1])
    assert [FORMATS[code] for code in index.format] == ["GIF", "PNG", "JPEG", "mov", "BMP"]
    assert index.fingerprint() == fresh.fingerprint()
    probed.clear()
    said.clear()
    build(folder, said)
    assert (probed, said) == ([], [])


def test_files_that_could_not_be_read_are_probed_again(folder: Path, probed: list[str]) -> None:
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    build(folder)
    make_old(folder)
    probed.clear()
    assert build(folder).usable.tolist() == [True, False, True, True, True]
    assert sorted(probed) == ["a.gif", "b.png", "d.mp4"]
    probed.clear()
    build(folder)
    assert probed == []


def test_a_later_version_probes_the_formats_that_it_names(
    folder: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder)
    monkeypatch.setitem(PROBE_VERSIONS, "JPEG", 2)
    probed.clear()
    said: list[str] = []
    build(folder, said)
    assert probed == ["c.jpg"]
    assert len(said) == 1 and "1 file is probed again" in said[0] and "(1 JPEG)" in said[0]
    probed.clear()
    build(folder)
    assert probed == []


def test_a_dry_run_with_an_old_index_does_not_hide_what_is_outdated(folder: Path, probed: list[str]) -> None:
    build(folder)
    make_old(folder)
    probed.clear()
    assert build(folder, trust_metadata=True).kind.tolist() == [0, 0, 0, 1, 0]
    assert probed == []
    assert build(folder).kind.tolist() == [1, 0, 0, 1, 0]
    assert sorted(probed) == ["a.gif", "b.png", "d.mp4"]


def test_an_animation_is_an_image_where_its_row_says_so(folder: Path, probed: list[str]) -> None:
    rows = [{"file_path": "a.gif", "type": kind} for kind in ("image", "video", "")]
    for order in ((0, 1, 2), (2, 0, 1)):
        write_rows(folder, [rows[number] for number in order])
        for _ in range(2):
            index = build(folder)
            values = zip(index.kind.tolist(), index.frames.tolist(), index.fps.tolist(), strict=True)
            kinds = [((0, 1, 0.0), (1, 6, 12.5), (1, 6, 12.5))[number] for number in order]
            assert list(values) == kinds
            assert index.decoding.tolist() == [ANIMATION * kind[0] for kind in kinds]
            what = "3 animations (3 GIF) are trained: 2 as videos, 1 as images of their first frame"
            assert any(note.startswith(what) for note in index.notes)
            assert not any("type differs" in note for note in index.notes)
    assert probed == ["a.gif"]


def test_animations_of_all_formats_are_counted(tmp_path: Path) -> None:
    names = ("a.gif", "a.webp", "a.png", "a.avif")
    for name in names:
        write_gif(tmp_path / name)
    write_rows(tmp_path, [{"file_path": name} for name in names])
    index = build(tmp_path)
    assert (index.kind.tolist(), index.frames.tolist()) == ([1] * 4, [6] * 4)
    assert "4 animations (1 AVIF, 1 GIF, 1 PNG, 1 WEBP) are trained: 4 as videos" in index.notes
