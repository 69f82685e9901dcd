"""Measures one GPU in at most eight minutes: training end to end, a whole step, memory, kernels, encoders, transfers.

    python benchmarks/gpu.py [--output outputs/gpu.json] [--markdown benchmarks/gpu.md] [--parts smoke step] [--small]

Layers have the published widths and random weights; nothing is downloaded. Predictions are beside the measurements.
Without a GPU everything runs at small size on the CPU, which only shows that the command works.

The results are written after each measurement. Ctrl-C or SIGTERM ends the command with a table of what there is; the
same command continues, and repeats a part that has ended only with --again. Measurements run in a separate process,
which is restarted when a measurement exceeds its time or ends the process.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import videox  # noqa: F401 - before the libraries, whose warnings it filters

# isort: split

import diffusers
import torch
from gpu.process import NOT_FINISHED, PARTS, Measurer, cases
from gpu.report import figure, page, whole_model
from gpu.results import NOT_STARTED, Results, Row, failures
from gpu.scales import REAL, SMALL, Case, Scale, Values, attempt
from gpu.training_runs import LATE, WORKSPACE
from machine import processor

from videox.distributed.cuda_variables import set_cuda_variables
from videox.errors import UserError
from videox.estimate.mfu import peak_of

MINUTES = 8.0
# Seconds of each part: measurements that remain after them are not started.
BUDGETS = {
    "ceilings": 8, "smoke": 110, "step": 40, "memory": 30, "flags": 75, "checks": 75, "attention": 30, "blocks": 35,
    "vae": 35, "transfers": 25,
}  # fmt: skip
OUTPUT = Path(__file__).resolve().parents[1] / "outputs/gpu.json"


class Interruption(BaseException):
    """Ctrl-C or SIGTERM; code: the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@dataclass
class Session:
    """One call of the command. share: of the time that each part has by default."""

    scale: Scale
    device: str
    results: Results
    share: float = 1.0

    def run(self, names: Sequence[str], report: Callable[[Row], None]) -> None:
        """Measure the parts that have not ended yet, in their order; call `report` for each new row."""
        numbered = list(enumerate(cases(self.scale, PARTS)))
        with Measurer(self.scale, self.device) as measurer:
            for name in PARTS:
                if name in names and not (name in self.results.parts and self.results.parts[name].finished):
                    part = self.results.begin(name)
                    known = {row.words for row in part.rows}
                    missing = [(n, case) for n, case in numbered if case.section == name and case.words not in known]
                    self._run_part(missing, BUDGETS[name] * self.share, measurer, report)
                    self.results.finish(name)

    def _run_part(
        self,
        missing: Sequence[tuple[int, Case]],
        seconds: float,
        measurer: Measurer,
        report: Callable[[Row], None],
    ) -> None:
        end = time.monotonic() + seconds
        for number, case in missing:
            begun = time.monotonic()
            values: Values = {}
            predict = cache(case.predict)
            if begun >= end:
                reason = f"{NOT_STARTED}: {seconds:.0f} s of the part were over"
            else:
                limit = min(case.budget, end - begun)
                if case.apart:
                    measurer.end()  # its memory is needed
                    WORKSPACE.end = begun + limit
                    values, reason = attempt(case.measure, torch.device(self.device))
                else:
                    values, reason = measurer.measure(number, case.budget, predict, end)
                if reason.startswith((NOT_FINISHED, LATE)) and time.monotonic() >= end:
                    reason = f"{NOT_STARTED} early enough: {seconds:.0f} s of the part were over"
            predicted = predict()
            taken = values.get("forward + backward ms", values.get("ms"))
            if taken and "TFLOP" in predicted:
                values["TFLOP/s"] = predicted["TFLOP"] / taken * 1e3
            row = Row(case.section, case.words, predicted, values, reason, time.monotonic() - begun)
            self.results.add(row)
            report(row)


def machine(device: str) -> dict[str, Any]:
    """Return the device and the versions that the figures depend on."""
    known: dict[str, Any] = {"device": "none", "cores": os.cpu_count(), "processor": processor()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {"device": properties.name, "memory GiB": properties.total_memory / 2**30}
        known |= {"sheet TFLOP/s": (peak_of(properties.name) or 0.0) / 1e12, "cuda": torch.version.cuda}
        known["cudnn"] = torch.backends.cudnn.version()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    return known | versions


def print_row(row: Row) -> None:
    """Print a row as soon as it is measured."""
    shown = {key: value for key, value in row.measured.items() if not key.startswith("loss ")}
    values = row.reason or ", ".join(f"{key} {figure(value)}" for key, value in shown.items())
    print(row.section, *row.words, values, f"[{row.seconds:.1f} s]", sep="  ", flush=True)


def predictions(parts: Collection[str]) -> list[Row]:
    """Return a row for each case of the published widths, without measurements."""
    return [Row(case.section, case.words, case.predict(), {}, "", 0.0) for case in cases(REAL, parts)]


def end_report(results: Results, markdown: Path | None, *, predict: bool) -> int:
    """Write JSON and page, print what failed and what was not started; return the exit code.

    Args:
        results: so far.
        markdown: the page; None writes it beside the JSON file.
        predict: the page of results at small size begins with the predictions for the published widths.
    """
    results.write(whole_model=whole_model(SMALL if results.small else REAL, results.rows))
    markdown = markdown or (results.path.with_suffix(".md") if results.path else None)
    if markdown:
        dates = {name: part.finished for name, part in results.parts.items()}
        predicted = (predictions(results.parts) if predict else []) if results.small else None
        markdown.write_text(page(results.machine, results.rows, predicted, REAL, dates), encoding="utf-8")
        print(f"results: {results.path}, table: {markdown}")
    late = {row.section for row in results.rows if row.reason.startswith(NOT_STARTED)}
    if late:
        print(f"not everything was measured in time: the same command measures the rest of {', '.join(sorted(late))}")
    failed = failures(results.rows)
    print(*(f"fail: {line}" for line in failed), sep="\n", end="\n" if failed else "")
    return 1 if failed or not any(row.measured for row in results.rows) else 0


def raise_interrupted(number: int, frame: object) -> None:
    """Handle a signal: end the measurement, then the command."""
    del frame
    raise Interruption(number)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="JSON file of results, which is continued (default: %(default)s)"
    )
    parser.add_argument("--markdown", type=Path, help="table to write (default: beside --output)")
    parser.add_argument("--small", action="store_true", help="narrow models on the CPU (the default without a GPU)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="parts to measure (default: all)"
    )
    parser.add_argument("--again", action="store_true", help="repeat these parts if they have ended before")
    parser.add_argument(
        "--minutes", type=float, help=f"time for all parts (default: {MINUTES:g} on a GPU, none at small size)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    small = args.small or not torch.cuda.is_available()
    scale, device = (SMALL, "cpu") if small else (REAL, "cuda")
    if small:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, which would warn
        print("no GPU is used: everything runs at small size on the CPU, and no figure says anything about a GPU")
    try:
        results = Results(args.output, machine(device), small)
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    if args.again:
        for name in args.parts:
            results.parts.pop(name, None)
    set_cuda_variables(os.environ, deterministic=False)  # of the processes that measure, as training sets them
    minutes = args.minutes or (float("inf") if small else MINUTES)
    handlers = {number: signal.signal(number, raise_interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    try:
        Session(scale, device, results, minutes / MINUTES).run(args.parts, print_row)
    except Interruption as interruption:
        code = interruption.code
        print(f"interrupted by {interruption}: the same command continues")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        WORKSPACE.close()
    ended = end_report(results, args.markdown, predict=not code)
    return code or ended


if __name__ == "__main__":
    sys.exit(main())
