"""Tries the cases of an area until its time is over, and records each one as a line of a JSON file."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

from tests.torture.cases import Area, Unavailable

AREAS = {
    "kills": "Kills", "signals": "Signals", "disk": "Disk", "media": "Media", "media_kinds": "MediaKinds", "metadata": "MetadataFiles",
    "configs": "Configs", "checkpoints": "Checkpoints", "ranks": "Ranks", "failures": "Failures", "watchdog": "Hangs",
    "alarms": "Alarms", "hunyuanvideo": "Hunyuan", "soak": "Soak", "small_cards": "SmallCards", "experts": "Experts",
}  # fmt: skip


def area_class(name: str) -> type[Area]:
    """Return the class of an area: a module of tests/torture, imported only if the area is used."""
    return getattr(importlib.import_module(f"tests.torture.{name}"), AREAS[name])


def read_cases(results: Path, name: str) -> list[dict]:
    """Return the cases of an area that were tried; a last line that a kill has cut off is left out."""
    path = results / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def try_area_in(processes: int, name: str, seconds: float, results: Path, first: int) -> list[dict]:
    """Try cases of an area in several processes, which share the seeds; return the cases."""
    if processes == 1:
        return try_area(name, seconds, results, first)
    context = multiprocessing.get_context("spawn")
    shares = [(name, seconds, results, first + number, False, processes) for number in range(processes)]
    started = [context.Process(target=try_area, args=share) for share in shares]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if codes := [process.exitcode for process in started if process.exitcode]:
        raise SystemExit(f"error: area {name}: {len(codes)} of {processes} processes ended with {codes}")
    return [case for case in read_cases(results, name) if case["seed"] >= first]


def try_area(name: str, seconds: float, results: Path, first: int, broken: bool = False, step: int = 1) -> list[dict]:
    """Try cases of an area until the time is over (at least one), and append them to its file.

    Args:
        name: of the area.
        seconds: its time.
        results: folder of the file.
        first: seed of the first case.
        broken: as for Area.
        step: from one seed to the next.
    """
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
            seed += step
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
