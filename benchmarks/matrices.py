"""Results of `make test-all` as tables: one row per parametrized slow test, one row per file for the others.

    make test-all
    python benchmarks/matrices.py --output benchmarks/matrices.md

`make test-all` writes its results to outputs/test-all.xml (JUnit). A slow test function is a row, each set of its
parameters a cell; functions that `make test` runs too are counted by file. With several --results, the last result of
a test counts. Slow tests that are in none of the results are listed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from machine import machine_line

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cell:
    """One test: file, function, parameters ("" = none), whether it passed, and its duration in seconds."""

    file: str
    function: str
    parameters: str
    passed: bool
    seconds: float


def read_results(path: Path) -> list[Cell]:
    """Return the tests of a JUnit file; raises FileNotFoundError."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        function, _, parameters = case.get("name", "").partition("[")
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        file = case.get("classname", "").split(".")[-1]
        found.append(Cell(file, function, parameters.removesuffix("]"), not ended, float(case.get("time", 0))))
    return found


def slow_functions() -> dict[tuple[str, str], int]:
    """Return file and function of the tests that only `make test-all` runs, with the number of cells of each."""
    asked = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "slow", "-p", "no:cacheprovider"]
    lines = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.partition("[")[0].split("::") for line in lines if "::" in line]
    return Counter((Path(name[0]).stem, name[-1]) for name in names)


def grouped(cells: Iterable[Cell], slow: Collection[tuple[str, str]]) -> tuple[dict, dict]:
    """Return the cells of each slow function, and the other cells by file."""
    matrices, rest = defaultdict(list), defaultdict(list)
    for cell in cells:
        if (cell.file, cell.function) in slow:
            matrices[cell.file, cell.function].append(cell)
        else:
            rest[cell.file].append(cell)
    return matrices, rest


def line(*columns: object) -> str:
    return "| " + " | ".join(map(str, columns)) + " |"


def counts(cells: list[Cell]) -> tuple[str, str]:
    return f"{sum(cell.passed for cell in cells)} of {len(cells)}", f"{sum(cell.seconds for cell in cells):.0f}"


def page(cells: list[Cell], slow: Mapping[tuple[str, str], int], workers: int, again: int) -> str:
    """Return the report as Markdown; again: number of tests that are in several results."""
    matrices, rest = grouped(cells, slow)
    failed = [f"{cell.file}::{cell.function}[{cell.parameters}]" for cell in cells if not cell.passed]
    absent = [
        f"{size - len(matrices[name])} of {name[0]}::{name[1]}"
        for name, size in sorted(slow.items())
        if len(matrices[name]) < size
    ]
    return "\n".join(
        [
            "# Results of `make test-all`",
            "",
            "Written by `make test-all`, then `python benchmarks/matrices.py --output benchmarks/matrices.md`. Files and functions",
            "have the names of the tests at the time of the run.",
            "",
            f"{counts(cells)[0]} tests passed; {counts(cells)[1]} seconds of tests, {workers} files in parallel.",
            *([f"{again} of them were run again after later changes; the last result counts."] if again else []),
            f"Not passed: {', '.join(failed) if failed else 'none'}.",
            f"Not run: {', '.join(absent) if absent else 'none'}.",
            "",
            "## Slow tests: functions that only `make test-all` runs",
            "",
            line("file", "function", "cells passed", "seconds"),
            line("---", "---", "---", "---"),
            *(line(*name, *counts(found)) for name, found in sorted(matrices.items()) if found),
            "",
            "## Other tests, by file",
            "",
            line("file", "tests passed", "seconds"),
            line("---", "---", "---"),
            *(line(file, *counts(found)) for file, found in sorted(rest.items())),
            "",
            f"{machine_line('torch')}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[ROOT / "outputs" / "test-all.xml"])
    parser.add_argument("--workers", type=int, default=2, help="test files run in parallel (WORKERS of the Makefile)")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    read = [c for path in args.results for c in read_results(path)]
    cells = list({(c.file, c.function, c.parameters): c for c in read}.values())
    text = page(cells, slow_functions(), args.workers, len(read) - len(cells))
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0 if all(cell.passed for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
