"""Import graph of the packages: docs/import_graph.md as a list, docs/images/import_graph.png as a picture.

    make map    # or: python benchmarks/import_graph.py

The graph is read from the import statements (Python's ast), nothing is imported. A package's level is one above the
highest package that it imports; the files directly under videox/ are one node, `videox/*.py`, at level 0.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUND, SCRIPTS = "videox/*.py", "scripts"
LIST, PICTURE = ROOT / "docs/import_graph.md", ROOT / "docs/images/import_graph.png"

Graph = Mapping[str, frozenset[str]]  # package -> the packages that it imports

ABOUT = """\
# Import graph

Written by `make map`; `tests/test_house.py` fails when it is out of date. Each package imports only from lower levels.
`videox/*.py` are the files directly under `videox/`; what each package is for is in [map.md](map.md).

![Packages in rows by level, arrows from the importing package down to the imported one](images/import_graph.png)

"""


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name or "") of every import statement of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def package_of(module: str, name: str = "") -> str | None:
    """Return the package of videox that `from module import name` reads, GROUND for a file directly under videox/.

    None: the module does not belong to videox.
    """
    parts = [*module.split("."), *([name] if name else [])]
    if parts[0] != "videox":
        return None
    return parts[1] if len(parts) > 1 and (ROOT / "videox" / parts[1]).is_dir() else GROUND


def import_graph() -> Graph:
    """Return the packages of videox and `scripts` with the packages that each imports."""
    owners = {path: package_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in sources("videox")}
    owners |= dict.fromkeys(sources("scripts"), SCRIPTS)
    graph: dict[str, set[str]] = {owner: set() for owner in owners.values() if owner}
    for path, owner in owners.items():
        found = {package_of(module, name) for module, name in imported_names(path)}
        graph[str(owner)] |= {package for package in found if package and package != owner}
    return {package: frozenset(imported) for package, imported in graph.items()}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def levels(graph: Graph) -> dict[str, int]:
    """Return each package's level, 0 for a package that imports no other; raises CycleError for a circle."""
    level: dict[str, int] = {}
    for package in TopologicalSorter(graph).static_order():
        level[package] = max((level[below] + 1 for below in graph[package]), default=0)
    return level


def direct(graph: Graph) -> Graph:
    """Return the transitive reduction: the imports of a package that it does not also reach through another one."""
    reach: dict[str, frozenset[str]] = {}
    for package in TopologicalSorter(graph).static_order():
        reach[package] = graph[package].union(*(reach[below] for below in graph[package]))
    return {
        package: frozenset(below for below in imported if not any(below in reach[other] for other in imported))
        for package, imported in graph.items()
    }


def table(graph: Graph) -> str:
    """Return the graph as a Markdown table of the packages, from the highest level to the lowest."""
    level = levels(graph)
    lines = ["| level | package | imports |", "| --- | --- | --- |"]
    for package in sorted(graph, key=lambda package: (-level[package], package)):
        imported = sorted(graph[package], key=lambda below: (-level[below], below))
        lines.append(f"| {level[package]} | `{package}` | {', '.join(f'`{below}`' for below in imported) or '-'} |")
    return "\n".join(lines)


def page(graph: Graph) -> str:
    """Return the text of docs/import_graph.md."""
    return f"{ABOUT}{table(graph)}\n"


# ------------------------------------------------------------------------------------------------------- picture

WIDTH, HEIGHT = 1.9, 1.3  # distances of neighbours in a row and of two rows
HALF = (0.62, 0.17)  # half the size of a box
BENDS = (0.0, 0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.4, -0.4, 0.5, -0.5)  # curvatures of an arrow, the straight one first

Point = tuple[float, float]


def places(graph: Graph) -> dict[str, Point]:
    """Return the centre of each package: y follows its level, x the packages that import it (barycentre)."""
    level = levels(graph)
    importers = {package: [other for other in graph if package in graph[other]] for package in graph}
    place: dict[str, Point] = {}
    for height in sorted(set(level.values()), reverse=True):
        row = [package for package in graph if level[package] == height]
        centre = {p: sum(place[o][0] for o in importers[p]) / max(len(importers[p]), 1) for p in row}
        row.sort(key=lambda package: (centre[package], package))
        for number, package in enumerate(row):
            place[package] = (WIDTH * (number - (len(row) - 1) / 2), HEIGHT * height)
    return place


def curve(start: Point, end: Point, bend: float) -> list[Point]:
    """Return points of the quadratic curve that matplotlib's connection style arc3 draws."""
    (x, y), (to_x, to_y) = start, end
    middle = ((x + to_x) / 2 + bend * (to_y - y), (y + to_y) / 2 - bend * (to_x - x))
    steps = [number / 20 for number in range(1, 20)]
    return [
        tuple((1 - t) ** 2 * a + 2 * t * (1 - t) * m + t * t * b for a, m, b in zip(start, middle, end, strict=True))
        for t in steps
    ]


def clear_bend(start: Point, end: Point, others: Sequence[Point]) -> float:
    """Return the smallest curvature at which an arrow crosses the fewest boxes."""

    def crossed(bend: float) -> int:
        points = curve(start, end, bend)
        return sum(any(abs(x - u) < HALF[0] and abs(y - v) < HALF[1] + 0.08 for x, y in points) for u, v in others)

    return min(BENDS, key=crossed)


def draw(graph: Graph, path: Path) -> None:
    """Draw the graph: dark arrows for direct imports, light ones for packages that are also reached through others."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch
    from pictures import save_small

    shown = {package: imported - {GROUND} for package, imported in graph.items() if package != GROUND}
    needed, place = direct(shown), places(shown)
    shown[SCRIPTS] = needed[SCRIPTS]  # scripts may import every package: the arrows would only hide the others
    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    axes = figure.subplots()
    for package, imported in shown.items():
        for below in imported:
            dark = below in needed[package]
            (x, y), (to_x, to_y) = place[package], place[below]
            start, end = (x, y - HALF[1]), (to_x, to_y + HALF[1])
            bend = clear_bend(start, end, [place[other] for other in place if other not in (package, below)])
            axes.add_patch(
                FancyArrowPatch(
                    start, end, arrowstyle="-|>", mutation_scale=12 if dark else 8, shrinkA=0, shrinkB=0,
                    connectionstyle=f"arc3,rad={bend}", color="#3b6ea8" if dark else "#c3cedb",
                    linewidth=1.5 if dark else 0.9, zorder=2 if dark else 1,
                )
            )  # fmt: skip
    for package, (x, y) in place.items():
        style = {"boxstyle": "round,pad=0.4", "facecolor": "#eef3f8", "edgecolor": "#3b6ea8"}
        axes.text(x, y, package, ha="center", va="center", fontsize=11, bbox=style, zorder=3)
    xs, ys = zip(*place.values(), strict=True)
    words = (
        "dark: imported directly; light: also imported through another package\n"
        "not drawn: scripts import every package, and every package may import the files directly under videox/"
    )
    axes.text((min(xs) + max(xs)) / 2, min(ys) - 0.75, words, ha="center", va="center", fontsize=9, color="#555555")
    axes.set(xlim=(min(xs) - 1.0, max(xs) + 1.0), ylim=(min(ys) - 1.0, max(ys) + 0.4), aspect="equal")
    axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=95)
    buffer.seek(0)
    save_small(buffer, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    graph = import_graph()
    LIST.parent.mkdir(parents=True, exist_ok=True)
    LIST.write_text(page(graph), encoding="utf-8")
    draw(graph, PICTURE)
    print(table(graph))
    print(f"written to {LIST.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
