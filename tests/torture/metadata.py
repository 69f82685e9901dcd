"""Area metadata: damaged and absurd metadata files of five formats."""

from __future__ import annotations

import csv
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.torture.cases import Area, Outcome, Row
from tests.torture.media import mutate
from videox.data.index.metadata import read_metadata
from videox.errors import DATA, FLAGS, UserError

FILES = 40  # per case
MOST_SECONDS = 1.0  # of processor time for one file
ROWS = [
    {"file_path": "a.mp4", "text": 'a, "quoted"\ncaption', "type": "video", "width": 640, "height": 480, "fps": 25.0},
    {"file_path": "b/c d#.png", "text": "", "type": "image", "num_frames": 1, "control_file_path": "x"},
    {"file_path": "ü.mp4", "text": "\u2028 emoji \U0001f600 שלום \x1b[31m", "width": "640.0"},
]
EVIL: tuple[object, ...] = (
    None, True, 0, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\0", "..", "../../etc/passwd",
    "/dev/zero", "\ud800", "x" * 100_000, "a\nb", "=1+1", "http://x/y.mp4", [], {}, [[[]]], {"a": {"b": [1]}}, ["a", None],
)  # fmt: skip
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def rows_of(draw: random.Random) -> list[dict]:
    """Return some rows in which keys are missing or new and values are absurd."""
    rows = [dict(draw.choice(ROWS)) for _ in range(draw.randrange(5))]
    for row in rows:
        for _ in range(draw.choice((0, 1, 1, 3))):
            name = draw.choice((*row, "text", "file_path", "other", "caption", "weight"))
            if draw.random() < 0.2:
                row.pop(name, None)
            else:
                row[name] = draw.choice(EVIL)
    return rows


def content_of(rows: list[dict], suffix: str, draw: random.Random) -> bytes:
    """Return the rows as the content of a file."""
    names = sorted({name for row in rows for name in row}) or ["file_path"]
    if suffix == ".parquet":
        columns = {name: [None if row.get(name) is None else ascii(row[name]) for row in rows] for name in names}
        buffer = io.BytesIO()
        pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), buffer)
        return buffer.getvalue()
    if suffix == ".json":
        text = json.dumps(rows, indent=draw.choice((None, 1)))
        if draw.random() < 0.05:
            text = "[" * draw.choice((10, 100_000)) + text
    elif suffix == ".jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        buffer_of_text = io.StringIO()
        writer = csv.DictWriter(buffer_of_text, names, restval="", delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer_of_text.getvalue()
    encoding = draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
    return text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


class MetadataFiles(Area):
    """Any file loads, or is refused by one line, within a second."""

    rows = (
        Row(
            "any",
            "damaged and absurd .json, .jsonl, .csv, .tsv, .parquet: loaded, or one line with code 2 or 3, within 1 s",
            200_000,
        ),
    )

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        read = read_without_care if self.broken else read_metadata
        problems = []
        for number in range(FILES):
            suffix = draw.choice(SUFFIXES)
            content = content_of(rows_of(draw), suffix, draw)
            if content and draw.random() < 0.6:
                content = mutate(content, draw)[: draw.choice((len(content), draw.randrange(len(content)) + 1))]
            path = self.folder / f"rows{suffix}"
            path.write_bytes(content)
            if found := problem_of(path, read):
                problems.append(f"file {number} of the case ({suffix}): {found}")
        return Outcome("any", f"{FILES} files", tried=FILES, problems=problems)


def problem_of(path: Path, read: Callable[..., object]) -> str:
    """Return what is wrong with how a file is read, "" if nothing."""
    begin = time.process_time()
    try:
        metadata = read(path, path.parent)
    except UserError as error:
        if error.exit_code not in (DATA, FLAGS) or not error.line().isprintable():
            return f"code {error.exit_code}: {error.line()!r}"
    except Exception as error:  # noqa: BLE001 - anything else is what is looked for
        return f"{type(error).__name__}: {error}"
    else:
        columns = (metadata.text, metadata.kind, metadata.width, metadata.height, metadata.num_frames, metadata.fps)
        if {len(column) for column in columns} != {len(metadata.file_path)}:
            return "the columns have different lengths"
    seconds = time.process_time() - begin
    return f"it took {seconds:.1f} s" if seconds > MOST_SECONDS else ""


def read_without_care(path: Path, data_dir: Path) -> object:
    """Broken on purpose: reads every file as JSON and lets every error through."""
    json.loads(path.read_bytes())
    return read_metadata(path, data_dir)
