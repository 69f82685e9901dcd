"""Tries faults on runs, files and ranks, each drawn by a seed, and writes what was asked, tried, right and wrong.

    python benchmarks/torture.py [--areas kills,disk,...] [--seconds N] [--continue] [--output benchmarks/torture.md]
    python benchmarks/torture.py --table --note "shared with other work" --output benchmarks/torture.md
    python benchmarks/torture.py --only disk:17

Each area appends one line per case to outputs/torture/<area>.jsonl. With --continue it goes on after the last seed
there; otherwise the earlier file is kept under another name and the seeds begin at 0. The table has all areas that
have such a file. --only tries one case alone and prints what was wrong; nothing is written then.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from machine import machine_line

from tests.torture.cases import Area, Row, Unavailable
from videox.files import unique_path

ROOT = Path(__file__).resolve().parents[1]
AREAS = {
    "kills": "Kills", "signals": "Signals", "disk": "Disk", "media": "Media", "metadata": "MetadataFiles",
    "configs": "Configs", "checkpoints": "Checkpoints", "ranks": "Ranks", "failures": "Failures", "watchdog": "Hangs",
    "alarms": "Alarms", "hunyuanvideo": "Hunyuan", "soak": "Soak", "small_cards": "SmallCards", "experts": "Experts",
}  # fmt: skip
RESULTS = ROOT / "outputs" / "torture"
HEADER = ("area", "what must hold", "asked", "tried", "right", "wrong", "command")
SHOWN, LONGEST = 20, 300  # wrong cases below the table, and characters of each


def area_class(name: str) -> type[Area]:
    """Return the class of an area: a module of tests/torture, imported only if the area is used."""
    return getattr(importlib.import_module(f"tests.torture.{name}"), AREAS[name])


def read_cases(results: Path, name: str) -> list[dict]:
    """Return the cases of an area that were tried; a last line that a kill has cut off is left out."""
    path = results / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def try_area(name: str, seconds: float, results: Path, first: int, broken: bool = False) -> list[dict]:
    """Try cases of an area from a seed on until the time is over (at least one), and append them to its file."""
    results.mkdir(parents=True, exist_ok=True)
    tried: list[dict] = []
    with tempfile.TemporaryDirectory(prefix=f"videox-torture-{name}-") as folder:
        area = area_class(name)(Path(folder), broken=broken)
        area.seconds = seconds
        begin = time.monotonic()  # building models and reference runs is not counted
        seed = first
        while not tried or time.monotonic() - begin < seconds:
            tried.append(one_case(area, name, seed))
            with (results / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(tried[-1])}\n")  # on a line of its own, also after one that was cut off
            seed += 1
    return tried


def one_case(area: Area, name: str, seed: int) -> dict:
    """Try one case, print it if it is wrong, and return its line."""
    begin = time.monotonic()
    try:
        found = area.try_case(seed)
        case = {"row": found.row, "what": found.what, "tried": found.tried, "problems": list(found.problems)}
    except Unavailable as why:
        case = {"row": "", "what": str(why), "tried": 0, "problems": []}
    except AssertionError as error:  # a run that hangs, or one of the suite's own runs that failed
        case = {"row": area.rows[0].name, "what": "the case ended early", "tried": 1, "problems": [str(error)[-3000:]]}
    if case["problems"]:
        print(f"wrong: --only {name}:{seed} ({case['what']})", *case["problems"], sep="\n  ", flush=True)
    return {"area": name, "seed": seed, **case, "seconds": round(time.monotonic() - begin, 2)}


def table_line(name: str, row: Row, cases: Sequence[dict]) -> tuple[object, ...]:
    """Return the line of the table for a row of an area."""
    mine = [case for case in cases if case["row"] == row.name]
    tried, wrong = sum(case["tried"] for case in mine), sum(len(case["problems"][: case["tried"]]) for case in mine)
    command = f"`python benchmarks/torture.py --areas {name}`"
    return f"{name}: {row.name}", row.goal, f"{row.asked:,}", f"{tried:,}", f"{tried - wrong:,}", wrong, command


def page(results: Path, note: str = "") -> str:
    """Return the report as Markdown: a line per row of each area, the wrong cases, and what could not be tried.

    Args:
        results: folder of the tried cases.
        note: words on the machine.
    """
    lines, wrong, notes = [], [], []
    for name in AREAS:
        cases = read_cases(results, name)
        lines += [table_line(name, row, cases) for row in area_class(name).rows]
        wrong += [(f"{name}:{case['seed']}", case) for case in cases if case["problems"]]
        notes += [case["what"] for case in cases if not case["row"]]
    shown = [f"- `--only {key}`: {case['what']}: {short(case['problems'][0])}" for key, case in wrong[:SHOWN]]
    more = [f"- and {len(wrong) - SHOWN} more, in outputs/torture"] if len(wrong) > SHOWN else []
    return "\n".join([
        "# Faults that were tried",
        "",
        "Written by `python benchmarks/torture.py`; `make torture` tries all areas for hours. Each case is drawn by its seed, runs the real",
        "train script on the small Wan2.1, Wan2.2 or HunyuanVideo of tests/support/tiny.py, and is compared with a run that nothing disturbed. What was asked is",
        "the goal of a night; what was tried is less where less time was given.",
        "",
        *("| " + " | ".join(map(str, line)) + " |" for line in (HEADER, ["---"] * len(HEADER), *lines)),
        "",
        f"{datetime.date.today():%-d %B %Y}; {machine_line('torch')}{f'; {note}' if note else ''}.",
        "",
        *(["## Wrong", "", *shown, *more, ""] if wrong else []),
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
    parser.add_argument("--only", metavar="AREA:SEED", help="try one case")
    parser.add_argument("--table", action="store_true", help="try nothing, write the table of what was tried")
    parser.add_argument("--note", default="", help="words on the machine below the table, such as what else it did")
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
    tried: list[dict] = []
    for name in [] if args.table else names:
        first, file = (
            1 + max((case["seed"] for case in read_cases(RESULTS, name)), default=-1),
            RESULTS / f"{name}.jsonl",
        )
        if not args.goes_on and file.exists():
            file.rename(unique_path(file.with_name(f"{name}-superseded.jsonl")))
            first = 0
        found = try_area(name, args.seconds, RESULTS, first)
        tried += found
        right = sum(not case["problems"] for case in found)
        print(f"{name}: {right} of {len(found)} cases right", flush=True)
    text = page(RESULTS, args.note)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 1 if any(case["problems"] for case in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
