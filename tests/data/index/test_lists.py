"""Tests of lists as other tools write them: names of columns, formats under another suffix, encodings, captions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from videox.data.index.captions import unpack_captions
from videox.data.index.index import DataLocation, Index, build_index
from videox.data.index.metadata import Metadata, read_metadata
from videox.errors import DATA, UserError

WANTED = [("sub/a.mp4", "a dog"), ("b.png", "a cat")]


def read(path: Path, data_dir: Path | None = None, **options: bool) -> Metadata:
    return read_metadata(path, data_dir or path.parent, **options)


def read_error(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.exit_code == DATA and "\n" not in caught.value.line()
    return caught.value


def rows_of(metadata: Metadata) -> list[tuple[str, str]]:
    assert set(metadata.problem) == {""}
    return list(zip(metadata.file_path, metadata.text, strict=True))


def table_of(path: str = "file_path", text: str = "text", **more: object) -> list[dict[str, object]]:
    return [{path: name, text: caption, **more} for name, caption in WANTED]


def as_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def as_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def as_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


FORMATS: dict[str, Callable[[Path, list[dict]], Path]] = {
    ".json": as_json, ".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------- names of columns


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("path", "caption"), ("file_name", "text"), ("video", "prompt"), ("video_path", "caption"),
        ("image", "text"), ("image_path", "caption"), ("media_path", "prompt"), (" Video ", "Prompt"),
    ],
)  # fmt: skip
def test_columns_are_found_by_the_names_of_other_tools(tmp_path: Path, suffix: str, path: str, text: str) -> None:
    metadata = read(FORMATS[suffix](tmp_path / f"m{suffix}", table_of(path, text)))
    assert rows_of(metadata) == WANTED
    (note,) = metadata.notes
    assert repr(path) in note and (text == "text" or repr(text) in note)


def test_own_names_need_no_note(tmp_path: Path) -> None:
    assert read(as_json(tmp_path / "m.json", table_of(caption="a dog", text="a dog"))).notes != []
    assert read(as_json(tmp_path / "n.json", table_of(other="x"))).notes == []


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("more", "named"),
    [({"video": "c.mp4"}, ("'file_path'", "'video'", "'c.mp4'")), ({"prompt": "a fox"}, ("'text'", "'prompt'", "'a fox'"))],
)  # fmt: skip
def test_two_columns_that_differ_are_refused_by_both_names(
    tmp_path: Path, suffix: str, more: dict[str, str], named: tuple[str, ...]
) -> None:
    rows = [{**row, **dict.fromkeys(more)} for row in table_of()]
    rows[1] |= more
    error = read_error(FORMATS[suffix](tmp_path / f"m{suffix}", rows))
    assert "row 1" in error.where and all(name in str(error) for name in named)


def test_columns_of_which_each_row_has_one_are_merged(tmp_path: Path) -> None:
    rows = [
        {"video_path": "a.mp4", "image_path": None, "caption": "x", "prompt": "x"},
        {"video_path": None, "image_path": "b.png", "caption": float("nan"), "prompt": "y"},
        {"image_path": "c.png", "caption": "z", "prompt": ""},
    ]
    for path in (as_json(tmp_path / "m.json", rows), as_jsonl(tmp_path / "m.jsonl", rows)):
        assert rows_of(read(path)) == [("a.mp4", "x"), ("b.png", "y"), ("c.png", "z")]


def test_a_key_that_occurs_twice_is_refused_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4", "video": "b.mp4", "prompt": "x"}')
    assert "key video" in str(read_error(tmp_path / "m.jsonl"))


# --------------------------------------------------------------------------------------- formats under another suffix


def as_stream(path: Path, rows: list[dict]) -> Path:
    """Objects over several lines each, one after another."""
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("write", [as_json, as_jsonl, as_stream])
@pytest.mark.parametrize("rows", [table_of(), table_of()[:1], table_of("video", "prompt")[:1]])
def test_json_and_jsonl_are_read_under_either_suffix(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[dict]], Path], rows: list[dict]
) -> None:
    assert rows_of(read(write(tmp_path / f"m{suffix}", rows))) == WANTED[: len(rows)]


def test_a_list_on_one_line_may_be_named_jsonl(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(f"\n {json.dumps(table_of())} \n\n")
    assert rows_of(read(tmp_path / "m.jsonl")) == WANTED


# -------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_byte_order_mark_decides_the_encoding(tmp_path: Path, suffix: str, encoding: str) -> None:
    rows = [{"file_path": "ü.mp4", "text": "ein Füchschen \u2028 \U0001f98a"}]
    path = FORMATS[suffix](tmp_path / f"m{suffix}", rows)
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert rows_of(read(path)) == [("ü.mp4", "ein Füchschen \u2028 \U0001f98a")]


def test_utf_16_big_endian_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"\xfe\xff" + "video,prompt\na.mp4,é\n".encode("utf-16-be"))
    assert rows_of(read(tmp_path / "m.csv")) == [("a.mp4", "é")]


# -------------------------------------------------------------------------------------------------------- backslashes


@pytest.mark.parametrize("suffix", FORMATS)
def test_backslashes_are_read_as_slashes(tmp_path: Path, suffix: str) -> None:
    rows = [{"file_path": name, "text": ""} for name in ("sub\\a.mp4", "b.png", ".\\sub\\deep\\c.mp4")]
    metadata = read(FORMATS[suffix](tmp_path / f"m{suffix}", rows))
    assert metadata.file_path == ["sub/a.mp4", "b.png", "./sub/deep/c.mp4"]
    assert metadata.notes == ["2 rows: \\ in file_path is read as / (first: row 0, 'sub\\\\a.mp4')"]


def test_a_file_whose_name_has_a_backslash_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "odd\\name.mp4").write_bytes(b"x")
    path = as_json(tmp_path / "m.json", [{"file_path": "odd\\name.mp4", "text": ""}])
    assert (read(path).file_path, read(path).notes) == (["odd\\name.mp4"], [])


@pytest.mark.parametrize("name", ["C:\\clips\\a.mp4", "d:/clips/a.mp4"])
def test_a_path_on_a_drive_is_refused_by_name(tmp_path: Path, name: str) -> None:
    error = read_error(as_json(tmp_path / "m.json", [{"file_path": name, "text": ""}]))
    assert repr(name) in error.what and "drive" in error.what


def test_backslashes_cannot_leave_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = as_json(tmp_path / "data" / "m.json", [{"file_path": "..\\..\\etc\\passwd", "text": ""}])
    assert "outside of train_data_dir" in read_error(path).what


# ------------------------------------------------------------------------------------------------------ missing values


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_nan_counts_as_not_given_in_every_optional_column(tmp_path: Path, suffix: str) -> None:
    nan = float("nan")
    names = ("text", "type", "width", "height", "num_frames", "fps", "weight")
    rows = [{"file_path": "a.mp4", **dict.fromkeys(names, nan)}, {"file_path": nan, "text": nan}]
    if suffix == ".parquet":
        columns = {name: pa.array([nan, nan]) for name in names}
        pq.write_table(pa.table({"file_path": ["a.mp4", None], **columns}), tmp_path / "m.parquet")
        metadata = read(tmp_path / "m.parquet")
    else:
        metadata = read(FORMATS[suffix](tmp_path / f"m{suffix}", rows))
    assert metadata.problem == ["", "no_file_path"] and metadata.text == ["", ""]
    assert (metadata.kind[0], metadata.width[0], metadata.height[0], metadata.num_frames[0]) == ("", 0, 0, 0)
    assert (metadata.fps[0], metadata.weight[0], metadata.notes) == (0.0, 1.0, [])


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "None", "<NA>"])
def test_missing_values_of_a_csv(tmp_path: Path, cell: str) -> None:
    (tmp_path / "m.csv").write_text(f"file_path,text,type,fps,weight\na.mp4,nan,{cell},{cell},{cell}\n")
    metadata = read(tmp_path / "m.csv")
    assert (metadata.kind, metadata.fps, metadata.weight, metadata.notes) == ([""], [0.0], [1.0], [])
    assert metadata.text == ["nan"]  # free text: this one is a caption


@pytest.mark.parametrize("value", ["much", -1, [1], True])
def test_a_weight_that_is_no_number_is_still_refused(tmp_path: Path, value: object) -> None:
    error = read_error(as_json(tmp_path / "m.json", [{"file_path": "a", "text": "", "weight": value}]))
    assert "key weight" in error.where


@pytest.mark.parametrize("cell", ["0", "0.0", "0.00", 0, 0.0, "-0.0"])
def test_a_weight_of_zero_may_be_written_in_any_way(tmp_path: Path, cell: object) -> None:
    rows = [{"file_path": "a.mp4", "text": "", "weight": cell}, {"file_path": "b.mp4", "text": "", "weight": "2.5"}]
    assert read(as_csv(tmp_path / "m.csv", rows)).weight == [0.0, 2.5]
    assert read(as_json(tmp_path / "m.json", rows)).weight == [0.0, 2.5]


def test_decimals_of_a_database_are_numbers(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"path": ["a"], "text": ["x"], "weight": pa.array([Decimal("2.5")])}), tmp_path / "m.parquet"
    )
    assert read(tmp_path / "m.parquet").weight == [2.5]


# ------------------------------------------------------------------------------------------------------ separators


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("head", ["", "\ufeff", "\r\n\n", "sep={}\r\n"])
def test_cells_may_be_separated_by_other_signs(tmp_path: Path, suffix: str, separator: str, head: str) -> None:
    lines = [["video", "caption", "score"], ["sub/a.mp4", '"a dog, or; a\twolf"', "1"], ["b.png", "a cat", ""]]
    text = head.format(separator) + "\r\n".join(map(separator.join, lines))
    (tmp_path / f"m{suffix}").write_text(text, encoding="utf-8", newline="")
    assert rows_of(read(tmp_path / f"m{suffix}")) == [("sub/a.mp4", "a dog, or; a\twolf"), ("b.png", "a cat")]


# --------------------------------------------------------------------------------------------------- several captions


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_row_may_have_a_list_of_captions(tmp_path: Path, suffix: str) -> None:
    lists = [["a dog", "a wolf, running"], ["a cat"], [], ["", " "]]
    rows = [{"video": f"{row}.mp4", "caption": captions} for row, captions in enumerate(lists)]
    metadata = read(FORMATS[suffix](tmp_path / f"m{suffix}", rows))
    found = [unpack_captions(text).captions for text in metadata.text]
    assert found == [("a dog", "a wolf, running"), ("a cat",), ("",), ("",)]
    assert metadata.text[1] == "a cat" and set(metadata.problem) == {""}


@pytest.mark.parametrize(
    ("column", "captions"),
    [
        (pa.array([["x", None, "y"]], pa.list_(pa.string())), ("x", "y")),
        (pa.array([["x", "y"]], pa.large_list(pa.large_string())), ("x", "y")),
        (pa.array([["x", "y"]], pa.list_(pa.string(), 2)), ("x", "y")),
        (pa.array([["x", "y"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))), ("x", "y")),
        (pa.array([None], pa.list_(pa.string())), ("",)),
    ],
)
def test_lists_of_parquet(tmp_path: Path, column: pa.Array, captions: tuple[str, ...]) -> None:
    pq.write_table(pa.table({"file_path": ["a.mp4"], "text": column}), tmp_path / "m.parquet")
    metadata = read(tmp_path / "m.parquet")
    assert metadata.problem == [""] and unpack_captions(metadata.text[0]).captions == captions


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['a dog' 'a cat']", ("a dog", "a cat")),  # numpy, as pandas writes a column of arrays
        ("['a dog'\n \"it's a cat\"]", ("a dog", "it's a cat")),
        ("['a', None]", ("a",)),
        ("[None, 'a', nan]", ("a",)),
        ('["a", null]', ("a",)),
        ("[]", ("",)),
        ("['a', 'b',]", ("a", "b")),
    ],
)
def test_lists_in_the_notation_of_other_libraries(tmp_path: Path, cell: str, captions: tuple[str, ...]) -> None:
    path = as_csv(tmp_path / "m.csv", [{"file_path": "a.mp4", "text": cell}])
    assert unpack_captions(read(path).text[0]).captions == captions


@pytest.mark.parametrize("value", [[["a"], ["b"]], ["a", 3], {"en": "a"}, 7, [{"text": "a"}]])
def test_other_nested_values_are_a_problem_of_the_row(tmp_path: Path, value: object) -> None:
    path = as_json(tmp_path / "m.json", [{"file_path": "a.mp4", "text": value}, {"file_path": "b.mp4", "text": "b"}])
    assert read(path).problem == ["bad_text", ""]


def test_nested_lists_of_parquet_are_a_problem_of_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file_path": ["a.mp4"], "text": [[["a"], ["b"]]]}), tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet").problem == ["bad_text"]


@pytest.mark.parametrize(
    "cell",
    ["[trigger] a man", "[a, b]", "['open", '["a", 3]', "['a'] + ['b']", "[['a']]", "['a'][0]", "['a' b]", "[b'a']"],
)
def test_other_cells_in_brackets_are_captions(tmp_path: Path, cell: str) -> None:
    path = as_csv(tmp_path / "m.csv", [{"file_path": "a.mp4", "text": cell}])
    assert rows_of(read(path)) == [("a.mp4", cell)]


def test_a_lone_surrogate_in_a_list_is_replaced(tmp_path: Path) -> None:
    path = as_json(tmp_path / "m.json", [{"file_path": "a", "text": ["x\ud800", "y"]}])
    pa.array(read(path).text)
    assert unpack_captions(read(path).text[0]).captions == ("x\ufffd", "y")


# ------------------------------------------------------------------------------------------------------ caption files


def test_caption_files_of_both_suffixes_are_read(tmp_path: Path) -> None:
    for name, captions in {
        "a.mp4": {".caption": "a dog\n"}, "b.png": {".txt": "a cat"}, "c.webp": {".CAPTION": "\ufeffa fox"},
        "d.mp4": {".txt": "same", ".caption": "same\n"}, "e.mp4": {},
    }.items():  # fmt: skip
        media = tmp_path / name
        media.write_bytes(b"x")
        for suffix, text in captions.items():
            media.with_suffix(suffix).write_text(text, encoding="utf-8")
    (tmp_path / "f.caption").write_text("no media file")
    (tmp_path / "g.mp4").write_bytes(b"x")
    (tmp_path / "g.txt").write_bytes("ein Bär".encode("utf-16"))
    metadata = read(tmp_path, tmp_path)
    assert dict(zip(metadata.file_path, metadata.text, strict=True)) == {
        "a.mp4": "a dog", "b.png": "a cat", "c.webp": "a fox", "d.mp4": "same", "e.mp4": "", "g.mp4": "ein Bär",
    }  # fmt: skip
    assert any("e.mp4" in note for note in metadata.notes) and any("'f'" in note for note in metadata.notes)
    (tmp_path / "d.caption").write_text("another")
    error = read_error(tmp_path)
    assert "d.txt" in error.what and "d.caption" in error.what


def build(metadata: Path, data_dir: Path, **options: bool) -> Index:
    location = DataLocation(metadata, data_dir, metadata.with_name("index.arrow"), **options)
    return build_index(location, workers=1, progress=False)


def test_a_changed_caption_file_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "a.png")
    (data / "a.caption").write_text("cat")
    assert build(data, data).caption(0) == "cat"
    (data / "a.caption").write_text("a dog")
    assert build(data, data).caption(0) == "a dog"


def test_captions_survive_the_index(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [{"file_path": "a.png", "text": value} for value in (["a", "b"], "a", None, "\x1eodd")]
    index = build(as_json(tmp_path / "m.json", rows), tmp_path)
    for _ in range(2):  # the second one is read from the saved index
        assert [index.captions(row).captions for row in range(4)] == [("a", "b"), ("a",), ("",), ("\x1eodd",)]
        assert index.usable.all()
        index = build(tmp_path / "m.json", tmp_path)


# ----------------------------------------------------------------------------------------------------- absolute paths


def test_absolute_paths_need_no_data_folder(tmp_path: Path) -> None:
    """VideoX-Fun's DATASET_NAME="": the list is anywhere, and its paths say where the files are."""
    clips, lists = tmp_path / "clips", tmp_path / "lists"
    clips.mkdir()
    lists.mkdir()
    Image.new("RGB", (32, 32)).save(clips / "a.png")
    (lists / "link.png").symlink_to(clips / "a.png")
    path = as_json(lists / "m.json", [{"file_path": str(clips / "a.png"), "text": "x"}])
    with pytest.raises(UserError, match="outside of train_data_dir"):
        build(path, lists)
    index = build(path, lists, allow_absolute=True)
    assert index.usable.all() and index.file(0) == clips / "a.png"
    for outside in ("../clips/a.png", "link.png"):  # relative ones still must be inside
        as_json(path, [{"file_path": outside, "text": "x"}])
        with pytest.raises(UserError, match="outside of train_data_dir"):
            build(path, lists, allow_absolute=True)
    inside = as_json(clips / "m.json", [{"file_path": str(clips / "a.png"), "text": "x"}])
    assert build(inside, clips).usable.all()


def test_an_index_of_an_older_reader_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    path = as_json(tmp_path / "m.json", [{"file_path": "a.png", "text": "x"}])
    os.utime(path, ns=(10**18, 10**18))
    build(path, tmp_path)
    read_again: list[Path] = []
    import videox.data.index.index as index_module

    real = index_module.read_metadata
    monkeypatch.setattr(index_module, "read_metadata", lambda *a, **k: read_again.append(a[0]) or real(*a, **k))
    build(path, tmp_path)
    assert not read_again
    monkeypatch.setattr(index_module, "READER", index_module.READER + 1)
    assert np.all(build(path, tmp_path).width == 32) and read_again == [path]
