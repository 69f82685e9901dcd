"""Tests of videox.data.index.metadata: every format, every error with its position, and no traceback for any bytes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from videox.data.index.metadata import ROW_PROBLEMS, Metadata, read_metadata
from videox.errors import DATA, FLAGS, UserError

ROWS = [
    {"file_path": "a.mp4", "text": 'a, "quoted"\ncaption', "type": "video", "width": 640, "height": 480, "fps": 25.0},
    {"file_path": "b/c d#.png", "text": "", "type": "image", "num_frames": 1, "control_file_path": "x"},
    {"file_path": "ü.mp4", "text": "\u2028 emoji \U0001f600 שלום \x1b[31m", "width": "640.0"},
]


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the suffix, independently of the readers."""
    names = list({name: None for row in rows for name in row})
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), newline="")
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
    else:
        columns = {name: [row.get(name) for row in rows] for name in names}
        if "width" in columns:
            columns["width"] = [None if value is None else str(value) for value in columns["width"]]
        pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, **options: bool) -> Metadata:
    return read_metadata(path, path.parent, **options)


def read_error(path: Path, data_dir: Path | None = None, **options: bool) -> UserError:
    with pytest.raises(UserError) as caught:
        read_metadata(path, data_dir or path.parent, **options)
    assert "\n" not in caught.value.line()
    return caught.value


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".JSON"])
def test_every_format_gives_the_same_columns(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"m{suffix.lower()}", ROWS).rename(tmp_path / f"m{suffix}")
    metadata = read(path)
    assert metadata.file_path == ["a.mp4", "b/c d#.png", "ü.mp4"]
    assert metadata.text == [row["text"] for row in ROWS]
    assert metadata.kind == ["video", "image", ""]
    assert (metadata.width, metadata.height, metadata.num_frames) == ([640, 0, 640], [480, 0, 0], [0, 1, 0])
    assert metadata.fps == [25.0, 0.0, 0.0]
    assert metadata.problem == ["", "", ""]
    assert metadata.source == path


def test_folder_of_pairs_is_read(tmp_path: Path) -> None:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for name, text in {"b.mp4": " a dog\n", "sub/a.png": "\ufeffa cat", "lonely.JPG": None, "bad.webm": None}.items():
        media = tmp_path / "set" / name
        media.write_bytes(b"")
        if text is not None:
            media.with_suffix(".txt").write_text(text)
    (tmp_path / "set" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "set" / "orphan.txt").write_text("no media file of this name")
    (tmp_path / "set" / "notes.md").write_text("no media")
    (tmp_path / "set" / "._b.mp4").write_bytes(b"")
    metadata = read_metadata(tmp_path / "set", tmp_path)
    assert metadata.file_path == ["set/b.mp4", "set/bad.webm", "set/lonely.JPG", "set/sub/a.png"]
    assert metadata.text == ["a dog", "", "", "a cat"]
    assert metadata.problem == ["", "bad_text", "", ""]
    assert any("lonely.JPG" in note for note in metadata.notes)
    assert any("orphan" in note for note in metadata.notes)
    assert read_metadata(tmp_path / "set", tmp_path / "set").file_path[0] == "b.mp4"


def test_folder_without_media_has_no_samples(tmp_path: Path) -> None:
    assert read_error(tmp_path).exit_code == DATA


@pytest.mark.parametrize("value", [0, -1, "", "x", None, True, 1e400, 10**400, 2**40, [3], "nan", 640.5, "6_4x"])
def test_invalid_size_counts_as_not_given(tmp_path: Path, value: object) -> None:
    content = json.dumps([{"file_path": "a", "text": "", "width": value}]).replace("Infinity", "1e999")
    path = tmp_path / "m.json"
    path.write_text(content)
    assert read(path).width == [0]


@pytest.mark.parametrize("value", ["640", "640.0", 640, 640.0, " 640 "])
def test_size_may_be_a_number_or_a_string(tmp_path: Path, value: object) -> None:
    assert read(write(tmp_path / "m.json", [{"file_path": "a", "text": "", "width": value}])).width == [640]


def test_type_ignores_case_and_rejects_unknown_values(tmp_path: Path) -> None:
    rows = [{"file_path": "a", "text": "", "type": kind} for kind in ("Video", "IMAGE ", "", None)]
    assert read(write(tmp_path / "m.json", rows)).kind == ["video", "image", "", ""]
    rows[2]["type"] = "movie"
    error = read_error(write(tmp_path / "m.json", rows))
    assert "row 2" in error.where
    assert "'movie'" in error.what
    assert "image, video" in error.hint
    assert error.exit_code == DATA


def test_bad_row_keeps_its_number_and_has_one_problem(tmp_path: Path) -> None:
    rows = [
        {"file_path": "a", "text": "fine"},
        {"text": "no path"},
        {"file_path": "", "text": None},
        {"file_path": 7, "text": "t"},
        {"file_path": "nul\0", "text": "t"},
        {"file_path": "lone\udc80", "text": "t"},
        {"file_path": "b"},
        {"file_path": "b", "text": None},
        {"file_path": "b", "text": ["t", 3]},
        {"file_path": "b", "text": "lone \ud800 nul \0"},
    ]
    metadata = read(write(tmp_path / "m.json", rows))
    expected = ["", "no_file_path", "no_file_path", "bad_file_path", "bad_file_path", "bad_file_path"]
    assert metadata.problem == [*expected, "", "", "bad_text", ""]
    assert set(metadata.problem) - {""} == set(ROW_PROBLEMS) - {"no_text"}
    assert metadata.text[6:9] == ["", "", ""]
    assert metadata.text[-1] == "lone \ufffd nul \0"
    pa.array(metadata.file_path + metadata.text)  # all of it can be stored as Arrow strings


def test_unnamed_columns_at_the_end_of_a_csv_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("file_path,text,,\na.mp4,b,,\n")
    assert (read(path).file_path, read(path).text) == (["a.mp4"], ["b"])


def test_csv_row_without_a_path_is_a_problem_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("file_path,text\r\n,a\r\n\r\nb.mp4,\r\n", newline="")
    metadata = read(path)
    assert (metadata.problem, metadata.text) == (["no_file_path", ""], ["a", ""])


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("m.json", b'[{"file_path": "a", "text": "b"},\n {"file_path": "c", "te', "2:"),
        ("m.json", b'[\n{"file_path": "a", "text": "b",}]', "2:"),
        ("m.json", b'[{"file_path": "Infinity \\" NaN",\n  "text": Infinity}]', "2:11"),
        ("m.jsonl", b'{"file_path": "a", "text": "b"}\n\n{"file_path": "a", "fps": -Infinity}\n', "3:27"),
        ("m.json", b'{"rows": [{"file_path": "a", "text": "b"}]}', "an object"),
        (
            "m.jsonl",
            b'[{"file_path": "a", "text": "b"}]\n[{"file_path": "a", "text": "b"}]',
            "row 0: the row is a list",
        ),
        ("m.json", b'{"file_path": "a", "text": "b"}\n\n{"file_path": "c", "te', "3:"),
        ("m.json", b'[{"file_path": "a", "text": "b"}] and more', "1:35"),
        ("m.json", b'[{"file_path": "a", "text": "b"}, 3]', "row 1"),
        ("m.json", b'[{"file_path": "a", "text": "b", "text": "c"}]', "row 0, key text"),
        ("m.jsonl", b'{"file_path": "a", "text": "b"}\n{"file_path" "a"}\n', "2:14"),
        ("m.json", b"[" * 100_000, "too deeply"),
        ("m.json", b'[{"file_path": "a", "text": "b", "width": ' + b"9" * 5000 + b"}]", "digits"),
        ("m.csv", b"file_path,text\na,b\na,b,c\n", "row 1"),
        ("m.csv", b"file_path,text\na,b\na\n", "line 3 has 1 columns"),
        ("m.csv", b"file_path,text,text\na,b,c\n", "'text' occurs 2 times"),
        ("m.csv", b'file_path,text\na,"b\nc,d\n', "not valid CSV"),
        ("m.csv", b"file_path|text\na|b\n", "'file_path|text'"),
        ("m.csv", b'"file_path"x,text\na,b\n', "not valid CSV"),
        ("m.csv", b"source,label\na,b\n", "'source', 'label'"),
        ("m.json", b'[{"file": "a", "text": "b"}]', "no row has file_path"),
        ("m.json", b'[{"file_path": "a", "label": "b"}]', "no row has text"),
        ("m.json", '[{"file_path": "ä"}]'.encode("latin-1"), "byte 16 (0xe4)"),
        ("m.json", '[{"file_path": "ä"}]'.encode("utf-16-le"), "seems to be UTF-16"),
        ("m.json", '[{"file_path": "ä"}]'.encode("utf-16")[:-1], "is not UTF-16"),
        ("m.csv", "file_path,text\na,b".encode("utf-16-le"), "byte 1 "),
        ("m.json", b"", "0 samples"),
        ("m.json", b"[]", "0 samples"),
        ("m.jsonl", b"\n\n", "0 samples"),
        ("m.csv", b"", "0 samples"),
        ("m.csv", b"file_path,text\n", "0 samples"),
        ("m.parquet", b"PAR1 or not", "parquet"),
        ("m.parquet", b"", "parquet"),
    ],
)
def test_error_of_the_file_names_its_position(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = read_error(tmp_path / name)
    assert place in str(error)
    assert error.exit_code == DATA


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    paths = pa.array(["a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"file_path": paths, "text": [[1], None], "width": [1.0, None]}), tmp_path / "m.parquet")
    metadata = read(tmp_path / "m.parquet")
    assert (metadata.file_path, metadata.problem, metadata.width) == (["a", "b"], ["bad_text", ""], [1, 0])
    pq.write_table(
        pa.table({"file_path": paths.slice(0, 0), "text": pa.array([], pa.string())}), tmp_path / "m.parquet"
    )
    assert "0 samples" in read_error(tmp_path / "m.parquet").what


def test_byte_order_mark_and_long_caption_are_accepted(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = tmp_path / "m.csv"
    path.write_text("file_path,text\na," + "x" * 10_000_000, encoding="utf-8-sig")
    assert len(read(path).text[0]) == 10_000_000
    assert csv.field_size_limit() == limit
    path = tmp_path / "m.json"
    path.write_text('[{"file_path": "a", "text": "b"}]', encoding="utf-8-sig")
    assert read(path).file_path == ["a"]


def test_invalid_numbers_are_reported(tmp_path: Path) -> None:
    valid = {
        "file_path": "a.mp4",
        "text": "",
        "type": "video",
        "width": 64,
        "height": "48",
        "num_frames": 9,
        "fps": 24.5,
    }
    image = {**valid, "type": "image", "num_frames": 0, "fps": 0}
    assert read(write(tmp_path / "m.json", [valid, image, {"file_path": "a", "text": ""}])).notes == []
    invalid = {"width": -5, "height": "abc", "num_frames": 0, "fps": 0}
    metadata = read(write(tmp_path / "m.json", [valid, {**valid, **invalid}, {**valid, "width": 0.5}]))
    assert metadata.notes == [
        "2 rows: width is not an integer above 0 and is ignored (first: row 1, -5)",
        "1 row: height is not an integer above 0 and is ignored (first: row 1, 'abc')",
        "1 row: num_frames is not an integer above 0 and is ignored (first: row 1, 0)",
        "1 row: fps is not a positive number and is ignored (first: row 1, 0)",
    ]


@pytest.mark.parametrize("name", ["missing.json", "missing", "x" * 300 + ".json", "folder.json", "m.txt", "pipe.csv"])
def test_unusable_metadata_path_is_a_flag_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "m.txt").write_text("[]")
    os.mkfifo(tmp_path / "pipe.csv")
    assert read_error(tmp_path / name).exit_code == FLAGS


def test_unknown_suffix_and_missing_folder_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "m.txt"
    path.write_text("")
    assert ".json, .jsonl, .csv, .parquet" in read_error(path).hint
    assert "nowhere" in read_error(write(tmp_path / "m.json", ROWS), tmp_path / "nowhere").where


@pytest.mark.parametrize(
    "outside", ["/etc/passwd", "../other/a.mp4", "sub/../../other/a.mp4", "link.mp4", "folder/a.mp4"]
)
def test_path_outside_of_the_data_folder_is_rejected(tmp_path: Path, outside: str) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.mp4").write_bytes(b"")
    (data / "link.mp4").symlink_to("../other/a.mp4")
    (data / "folder").symlink_to("../other")
    path = write(tmp_path / "m.json", [{"file_path": "fine.mp4", "text": ""}, {"file_path": outside, "text": ""}])
    error = read_error(path, data)
    assert (error.where, error.exit_code) == (f"{path} row 1, key file_path", DATA)
    assert "--allow_outside_data_dir" in error.hint
    assert read_metadata(path, data, allow_outside_data_dir=True).file_path[1] == outside


def test_links_and_dots_inside_the_data_folder_are_accepted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "a.mp4").write_bytes(b"")
    (data / "link.mp4").symlink_to("sub/a.mp4")
    (tmp_path / "alias").symlink_to("data")
    inside = [
        "link.mp4",
        "sub/../sub/a.mp4",
        "./sub//a.mp4",
        str(data / "sub" / "a.mp4"),
        "-b 12:30, x.mp4",
        "gone/x.mp4",
    ]
    path = write(tmp_path / "m.json", [{"file_path": name, "text": ""} for name in inside])
    assert read_metadata(path, data).file_path == inside
    assert read_metadata(path, tmp_path / "alias").file_path == inside


@pytest.mark.parametrize(
    "name", ["http://x/a.mp4", "concat:a|b", "subfile,,start,0,end,9,,:a.mp4", "file:a.mp4", "pipe:0", "-", "S3://b/k"]
)
def test_protocols_of_the_decoder_are_rejected(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.json", [{"file_path": name, "text": ""}])
    for allowed in (False, True):
        error = read_error(path, allow_outside_data_dir=allowed)
        assert "not a local file" in error.what
        assert error.exit_code == DATA


def test_control_characters_are_escaped_in_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", [{"file_path": "../\x1b[2J\n", "text": ""}])
    assert "\x1b" not in read_error(path).line()


def test_hundred_thousand_rows_are_read_in_seconds(tmp_path: Path) -> None:
    rows = [{"file_path": f"d{i % 100}/{i}.mp4", "text": f"caption {i}", "width": 640} for i in range(100_000)]
    path = write(tmp_path / "m.json", rows)
    code = "import time; from pathlib import Path; from videox.data.index.metadata import read_metadata; t = time.process_time()"
    code += f"; n = len(read_metadata(Path({str(path)!r}), Path({str(tmp_path)!r})).text); print(n, time.process_time() - t)"
    rows_read, seconds = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert int(rows_read) == 100_000
    assert float(seconds) < 4  # 0.5 s on the development machine


def test_reading_metadata_imports_no_torch() -> None:
    code = "import sys, videox.data.index.metadata as _; print([m for m in ('torch', 'av', 'diffusers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


fuzzing_settings = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
records = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("file_path", "text", "type", "width", "fps", "other"), values)),
    max_size=4,
)


def check_loads_or_raises(path: Path, content: bytes) -> None:
    """Check that any bytes either load as columns of equal length or raise a UserError with one line."""
    path.write_bytes(content)
    try:
        metadata = read(path)
    except UserError as error:
        assert error.exit_code == DATA
        assert error.line().isprintable()
        return
    columns = (metadata.text, metadata.kind, metadata.width, metadata.height, metadata.num_frames, metadata.fps)
    assert {len(column) for column in (*columns, metadata.problem)} == {len(metadata.file_path)}
    pa.array(metadata.file_path + metadata.text)


@fuzzing_settings
@given(content=st.binary(max_size=64), suffix=st.sampled_from((".json", ".jsonl", ".csv", ".parquet")))
def test_any_bytes_load_or_raise_user_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    check_loads_or_raises(tmp_path / f"m{suffix}", content)


@fuzzing_settings
@given(rows=records, lines=st.booleans(), at=st.integers(0, 400), put=st.binary(max_size=3), cut=st.integers(0, 9))
@example(rows=[{"file_path": "a", "text": "b"}], lines=False, at=400, put=b"", cut=0)
def test_broken_json_loads_or_raises_user_error(
    tmp_path: Path, rows: list[dict], lines: bool, at: int, put: bytes, cut: int
) -> None:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    content = text.encode()
    check_loads_or_raises(tmp_path / f"m.json{'l' * lines}", content[:at] + put + content[at + cut :])


@fuzzing_settings
@given(
    table=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=2, max_size=4), max_size=4),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)),
    at=st.integers(0, 200),
    put=st.binary(max_size=3),
)
def test_broken_csv_loads_or_raises_user_error(
    tmp_path: Path, table: list[list[str]], delimiter: str, quoting: int, at: int, put: bytes
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([["file_path", "text"], *table])
    content = text.getvalue().encode()
    check_loads_or_raises(tmp_path / "m.csv", content[:at] + put + content[at:])


@fuzzing_settings
@given(at=st.integers(0, 2000), put=st.binary(min_size=1, max_size=4))
def test_broken_parquet_loads_or_raises_user_error(tmp_path: Path, at: int, put: bytes) -> None:
    content = write(tmp_path / "whole.parquet", ROWS).read_bytes()
    at %= len(content)
    check_loads_or_raises(tmp_path / "m.parquet", content[:at] + put + content[at + len(put) :])
