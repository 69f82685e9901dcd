"""Tries faults on runs, files and ranks, each drawn by a seed, and writes what was asked, tried, right and wrong.

    python benchmarks/torture.py [--areas kills,disk,...] [--seconds N] [--continue] [--output benchmarks/torture.md]
    python benchmarks/torture.py --table --note "shared with other work" --output benchmarks/torture.md
    python benchmarks/torture.py --keep --note "mended; right when tried again"
    python benchmarks/torture.py --only disk:17

Each area appends one line per case to outputs/torture/<area>.jsonl. With --continue it goes on after the last seed
there and in benchmarks/torture.csv; otherwise the earlier file is put aside under another name and the seeds begin at
0. --keep adds the counts of these files to benchmarks/torture.csv, which stays with the code, and puts the files
aside. The table adds up both. --only tries one case alone and prints what was wrong; nothing is written then.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from machine import machine_line

from tests.torture.attempts import AREAS, area_class, one_case, read_cases, try_area_in
from tests.torture.cases import Row
from videox.files import unique_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "outputs" / "torture"
EARLIER = ROOT / "benchmarks" / "torture.csv"
COLUMNS = ("date", "area", "row", "tried", "wrong", "next_seed", "remark")
HEADER = ("area", "what must hold", "asked", "tried", "right", "wrong", "command")
SHOWN, LONGEST = 20, 300  # wrong cases below the table, and characters of each


def read_earlier(path: Path) -> list[dict[str, str]]:
    """Return the lines of benchmarks/torture.csv, of which each has the counts of one row until one day."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def keep(results: Path, earlier: Path, remark: str) -> None:
    """Add the counts of the tried cases to a file as `read_earlier` reads, and put the files of the cases aside."""
    lines = read_earlier(earlier)
    for name in AREAS:
        cases = read_cases(results, name)
        for row in area_class(name).rows if cases else ():
            tried, wrong = counts([case for case in cases if case["row"] == row.name])
            values = (datetime.date.today(), name, row.name, tried, wrong, next_seed(name, results, earlier))
            lines += [dict(zip(COLUMNS, (*map(str, values), remark if wrong else ""), strict=True))] if tried else []
    with earlier.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    for path in sorted(results.glob("*.jsonl")):
        if path.stem in AREAS:
            put_aside(path)


def put_aside(path: Path) -> None:
    path.rename(unique_path(path.with_name(f"{path.stem}-superseded.jsonl")))


def next_seed(name: str, results: Path, earlier: Path) -> int:
    """Return the seed after the last one of an area that was tried."""
    kept = [int(line["next_seed"]) for line in read_earlier(earlier) if line["area"] == name]
    return max([0, *kept, *(case["seed"] + 1 for case in read_cases(results, name))])


def counts(cases: Sequence[dict]) -> tuple[int, int]:
    """Return how many units cases tried, and how many of them were wrong."""
    return sum(case["tried"] for case in cases), sum(len(case["problems"][: case["tried"]]) for case in cases)


def table_line(name: str, row: Row, cases: Sequence[dict], earlier: Sequence[dict[str, str]]) -> tuple[object, ...]:
    """Return the line of the table for a row of an area."""
    tried, wrong = counts([case for case in cases if case["row"] == row.name])
    kept = [line for line in earlier if (line["area"], line["row"]) == (name, row.name)]
    tried, wrong = tried + sum(int(line["tried"]) for line in kept), wrong + sum(int(line["wrong"]) for line in kept)
    command = f"`python benchmarks/torture.py --areas {name}`"
    return f"{name}: {row.name}", row.goal, f"{row.asked:,}", f"{tried:,}", f"{tried - wrong:,}", wrong, command


def page(results: Path, note: str = "", earlier_file: Path = EARLIER) -> str:
    """Return the report as Markdown: a line per row of each area, the wrong cases, and what could not be tried.

    Args:
        results: folder of the tried cases.
        note: words on the machine.
        earlier_file: as `read_earlier` reads.
    """
    lines, wrong, notes, earlier = [], [], [], read_earlier(earlier_file)
    for name in AREAS:
        cases = read_cases(results, name)
        lines += [table_line(name, row, cases, earlier) for row in area_class(name).rows]
        wrong += [(f"{name}:{case['seed']}", case) for case in cases if case["problems"]]
        notes += [case["what"] for case in cases if not case["row"]]
    shown = [f"- `--only {key}`: {case['what']}: {short(case['problems'][0])}" for key, case in wrong[:SHOWN]]
    shown += [
        f"- {line['date']}, {line['area']}: {line['row']}: {line['wrong']} of {line['tried']}: {line['remark']}"
        for line in earlier
        if int(line["wrong"])
    ]
    more = [f"- and {len(wrong) - SHOWN} more, in outputs/torture"] if len(wrong) > SHOWN else []
    return "\n".join([
        "# Faults that were tried",
        "",
        "Written by `python benchmarks/torture.py`; `make torture` tries all areas for hours. Each case is drawn by its seed, runs the real",
        "train script on the small Wan2.1, Wan2.2 or HunyuanVideo of tests/support/tiny.py, and is compared with a run that nothing disturbed. What was asked is",
        "the goal of a night; what was tried is less where less time was given. The counts add up since the first day of torture.csv, while",
        "the code went on: each case is tried once, with the code of its day.",
        "",
        *("| " + " | ".join(map(str, line)) + " |" for line in (HEADER, ["---"] * len(HEADER), *lines)),
        "",
        f"{datetime.date.today():%-d %B %Y}; {machine_line('torch')}{f'; {note}' if note else ''}.",
        "",
        *(["## Wrong", "", *shown, *more, ""] if shown else []),
        *(["## Not tried", "", *(f"- {note}" for note in sorted(set(notes))), ""] if notes else []),
    ])  # fmt: skip


def short(text: str) -> str:
    """Return a problem as one line of limited length that Markdown shows as it is, without temporary folders."""
    line = " ".join(text.split()).replace("|", "/").replace("`", "'")
    line = re.sub(r"\S*/videox-torture-[^/ ]+/", "", line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--areas", default=",".join(AREAS), help="areas, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each area")
    parser.add_argument(
        "--continue", dest="goes_on", action="store_true", help="go on after the last case of each area"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes that share the cases of an area")
    parser.add_argument("--keep", action="store_true", help="add the counts to benchmarks/torture.csv, try nothing")
    parser.add_argument("--only", metavar="AREA:SEED", help="try one case")
    parser.add_argument("--table", action="store_true", help="try nothing, write the table of what was tried")
    parser.add_argument(
        "--note", default="", help="words on the machine below the table; with --keep, what became of the wrong cases"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args(argv)
    names = [args.only.partition(":")[0]] if args.only else args.areas.split(",")
    if unknown := [name for name in names if name not in AREAS]:
        parser.error(f"no such area: {', '.join(unknown)} (there are {', '.join(AREAS)})")
    if args.only:
        with tempfile.TemporaryDirectory(prefix="videox-torture-") as folder:
            case = one_case(area_class(names[0])(Path(folder)), names[0], int(args.only.partition(":")[2]))
        print(json.dumps(case, indent=1))
        return 1 if case["problems"] else 0
    if args.keep:
        keep(RESULTS, EARLIER, args.note)
        return 0
    tried: list[dict] = []
    for name in [] if args.table else names:
        first, file = next_seed(name, RESULTS, EARLIER) if args.goes_on else 0, RESULTS / f"{name}.jsonl"
        if not args.goes_on and file.exists():
            put_aside(file)
        found = try_area_in(args.processes, name, args.seconds, RESULTS, first)
        tried += found
        right = sum(not case["problems"] for case in found)
        print(f"{name}: {right} of {len(found)} cases right", flush=True)
    text = page(RESULTS, args.note, EARLIER)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 1 if any(case["problems"] for case in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
