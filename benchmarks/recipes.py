"""Memory, time and disk of every recipe, estimated by dry runs on one reference data set.

    python benchmarks/recipes.py          # compare config/recipes/figures.json with fresh dry runs
    python benchmarks/recipes.py --write  # write figures.json and the "Dry run" line of each recipe

Each recipe is dry-run by the train.py of its family, for the GPU that it names.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "config" / "recipes"
FAMILIES = ("wan2.1", "wan2.2", "hunyuanvideo")
DATA = "200x5s@24fps:1280x720"
DATA_WORDS = "200 clips of 5 s at 24 fps, 1280x720"
GIB = 2**30


def train_script(family: str) -> ModuleType:
    """Return the train.py of a family as a module."""
    name = f"train_{family.replace('.', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / family / "train.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def comment(path: Path, key: str) -> str:
    """Return the text after `# key:` in the comment of a recipe."""
    found = re.search(rf"^# {key}: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no comment `# {key}: ...`")
    return found[1]


def dry_run(family: str, name: str, folder: Path, *more: str) -> dict[str, Any]:
    """Return plan_report.json of a recipe's dry run on the reference data set; more: flags added to it."""
    words = ["--recipe", name, "--dry_run", "--dry_run_data", DATA, "--output_dir", str(folder), *more]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_script(family).main(words)
    if code != 0:
        raise RuntimeError(f"the dry run of {family} {name} ended with {code}")
    report: dict[str, Any] = json.loads((folder / "plan_report.json").read_text(encoding="utf-8"))
    return report


def figures(family: str, name: str, folder: Path) -> dict[str, Any]:
    """Return the row of a recipe in figures.json."""
    report, path = dry_run(family, name, folder), RECIPES / family / f"{name}.yaml"
    counted = re.search(r"--num_processes (\d+)", comment(path, "Launch"))
    return {
        "what": comment(path, "For").rstrip("."),
        "gpus": int(counted[1]) if counted else 1,
        "card_gib": round(report["gpu_memory"] / GIB, 1),
        "gib": round(report["memory"]["total"] / GIB, 1),
        "seconds_per_step": report["seconds"]["step"],
        "hours": float(f"{report['seconds']['run'] / 3600:.3g}"),
        "disk_gb": float(f"{report['disk'] / 1e9:.3g}"),
    }


def all_figures() -> dict[str, Any]:
    """Return the content of figures.json."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            names = sorted(path.stem for path in (RECIPES / family).glob("*.yaml"))
            rows[family] = {name: figures(family, name, Path(folder)) for name in names}
    return {"data": DATA_WORDS, "recipes": rows}


def line_of(row: dict[str, Any]) -> str:
    """Return the "Dry run" line of a recipe."""
    spare = row["card_gib"] - row["gib"]
    return (
        f"{row['gib']:.1f} of {row['card_gib']:g} GiB ({spare:.1f} to spare), {row['seconds_per_step']:.3g} s per step, "
        f"{row['hours']:g} h for the run on {DATA_WORDS}, {row['disk_gb']:g} GB of disk."
    )


def write(content: dict[str, Any]) -> None:
    """Write figures.json and the "Dry run" line of each recipe."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (RECIPES / "figures.json").write_text(f"{text}\n", encoding="utf-8")
    for family, rows in content["recipes"].items():
        for name, row in rows.items():
            path = RECIPES / family / f"{name}.yaml"
            old = path.read_text(encoding="utf-8")
            path.write_text(
                re.sub(r"^# Dry run: .*$", f"# Dry run: {line_of(row)}", old, flags=re.M), encoding="utf-8"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the figures instead of comparing them")
    args = parser.parse_args()
    content = all_figures()
    if args.write:
        write(content)
    different = json.loads((RECIPES / "figures.json").read_text(encoding="utf-8")) != content
    for family, rows in content["recipes"].items():
        for name, row in rows.items():
            print(f"{family:<13} {name:<28} {row['gpus']:>2} GPU  {line_of(row)}")
    print("figures.json differs: python benchmarks/recipes.py --write" if different else "figures.json is up to date")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
