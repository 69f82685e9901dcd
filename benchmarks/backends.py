"""Trains each family under each launch recipe, compares it with one process, and writes a table.

    python benchmarks/backends.py [--kinds "hunyuanvideo i2v" ...] [--output benchmarks/backends.md]

Each cell runs the published launch command on a small model of the real classes for ten steps, with gradient clipping
active in each step. The run is compared with one process at an equal global batch, resumed from the middle, converted
by `scripts/zero_to_bf16.py`, resumed once more with the converted folder present, and loaded by diffusers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

import diffusers
import forkserver
import launch_checks
import launches
import runs
import tiny
import torch
from machine import machine_line

families = tiny.load_script("benchmarks/families.py")

STEPS = 10
RECIPES = ("plain", "ddp", "zero2", "zero3", "fsdp1", "fsdp2")
SETTINGS = {"learning_rate": "1e-03", "max_grad_norm": 0.05}
HEADER = ("family", "mode", "recipe", "loss distance", "cosine", "trained", "resumed", "converted")
PROMPT = "a red fox"


@dataclass
class CellResult:
    """Outcome of a cell: distances from the one-process run, and the failed checks by column."""

    loss_distance: float = float("nan")
    cosine: float = float("nan")
    wrong: dict[str, str] = field(default_factory=dict)

    def note(self, column: str, check: Callable[..., object], *arguments: object, **settings: object) -> None:
        """Run a check and record its assertion error under `column`."""
        try:
            check(*arguments, **settings)
        except AssertionError as why:
            self.wrong[column] = self.wrong.get(column, "") + f"{check.__name__}: {why}"


def train_baseline(kind: str, folder: Path) -> launches.BackendRuns:
    """Build a model and a data set, and train the baseline: one process with two micro-batches per step."""
    setup = launches.BackendRuns(folder, kind, STEPS, **SETTINGS)
    norms = [line["grad_norm"] for line in forkserver.read_steps(setup.baseline)]
    assert min(norms) > SETTINGS["max_grad_norm"], f"gradient clipping is not active in each step: {norms}"
    return setup


def run_cell(setup: launches.BackendRuns, recipe: str, folder: Path) -> CellResult:
    """Train, resume, convert and resume again; the run is written to `folder`."""
    result, world_size = CellResult(), 1 if recipe == "plain" else 2
    changes: dict[str, object] = {"gradient_accumulation_steps": 2 // world_size}
    if setup.mode == "normal":
        changes["validation_prompts"] = [PROMPT]
    result.note("trained", launch_checks.check_launch, setup, recipe, folder, world_size, **changes)
    if result.wrong:
        result.wrong |= dict.fromkeys(("resumed", "converted"), "not tried")
        return result
    losses = [[line["loss"] for line in forkserver.read_steps(run)] for run in (folder, setup.baseline)]
    result.loss_distance = max(abs(a - b) for a, b in zip(*losses, strict=True))
    moved = [launch_checks.weight_change(setup.model, run / "transformer") for run in (folder, setup.baseline)]
    result.cosine = float(torch.nn.functional.cosine_similarity(*moved, dim=0))
    for check in (launch_checks.check_matches_baseline, launch_checks.check_export):
        result.note("trained", check, setup, folder)
    result.note("trained", launch_checks.check_checkpoint, setup, recipe, folder, world_size)
    result.note("resumed", launch_checks.check_resume, setup, recipe, folder, world_size, **changes)
    result.note("converted", check_converted, setup, recipe, folder)
    result.note("resumed", check_resume_next_to_outputs, setup, recipe, folder, world_size, **changes)
    return result


def check_converted(setup: launches.BackendRuns, recipe: str, folder: Path) -> None:
    """Check that the published command writes the trained weights cast to bfloat16, and that diffusers loads them."""
    converted = launch_checks.convert_checkpoint(folder, STEPS)
    files = launch_checks.CHECKPOINT_FILES[recipe]
    if "transformer" in files:
        source = "ZeRO-2 of" if "pytorch_model" in files else "full float32 weights in transformer"
        for words in (source, "already contains the full weights"):
            assert words in converted.stdout, converted.stdout
    weights, trained = (runs.read_weights(place) for place in (converted.folder, folder / "transformer"))
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in trained.items()), "different weights"
    kind = getattr(diffusers, launches.TRANSFORMER_CLASSES[setup.family])
    loaded = kind.from_pretrained(converted.folder, torch_dtype=torch.bfloat16)
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in loaded.state_dict().items())


def check_resume_next_to_outputs(
    setup: launches.BackendRuns, recipe: str, folder: Path, world_size: int, **changes: object
) -> None:
    """Check that `latest` selects the newest checkpoint, not the folder that the conversion wrote next to it."""
    more = {**changes, "max_train_steps": STEPS + 1, "resume_from_checkpoint": "latest"}
    ranks = setup.run_ranks(recipe, folder, world_size, **more)
    assert launches.exit_codes(ranks) == [0] * world_size, launches.output_of(ranks)
    assert [line["step"] for line in forkserver.read_steps(folder)] == list(range(1, STEPS + 2))
    assert (folder / f"checkpoint-{STEPS}-outputs").is_dir()


def read_rows(file: Path) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the rows of an existing table, by family, mode and recipe."""
    split = (tuple(line.strip("| ").split(" | ")) for line in file.read_text(encoding="utf-8").splitlines())
    return {
        line[:3]: line for line in split if len(line) == len(HEADER) and " ".join(line[:2]) in launches.MODEL_BUILDERS
    }


def row(kind: str, recipe: str, result: CellResult) -> tuple[str, ...]:
    """Return one row of the table."""
    words = ["NO" if column in result.wrong else "yes" for column in ("trained", "resumed", "converted")]
    return (*kind.split(), recipe, f"{result.loss_distance:.4f}", f"{result.cosine:.4f}", *words)


def page(lines: list[tuple[str, ...]]) -> str:
    """Return the report as Markdown."""
    table = [HEADER, ("---",) * len(HEADER), *lines]
    return "\n".join(
        [
            "# Each family under each launch recipe",
            "",
            "Measured by `python benchmarks/backends.py`: the published launch commands on small models of the real classes,",
            f"{STEPS} steps in bf16 at learning rate 1e-3 and `max_grad_norm` 0.05, which the gradient norm exceeds in every step.",
            "`plain` is one process with two micro-batches per step, the others are two processes over gloo.",
            "",
            *("| " + " | ".join(line) + " |" for line in table),
            "",
            "- Loss distance: the largest difference of a step's loss from the loss of one process.",
            "- Cosine: similarity of the changes of all parameters to those of one process.",
            "- Trained: the same samples and learning rates, losses within 0.02, gradient norms within 2 %; backend, number of",
            "  processes and checkpoint as expected; diffusers loads the export.",
            "- Resumed: from the middle, the second half is bit-identical; resumed once more by `latest` after the conversion.",
            "- Converted by `scripts/zero_to_bf16.py`: equal to the trained weights cast to bfloat16, loaded by diffusers.",
            "",
            f"{machine_line('torch', 'diffusers')}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=launches.MODEL_BUILDERS,
        default=list(launches.MODEL_BUILDERS),
        help="families and modes",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="Markdown file to update: rows of other families and modes are kept (default: print only)",
    )
    args = parser.parse_args()
    lines = read_rows(args.output) if args.output and args.output.exists() else {}
    wrong = []
    with tempfile.TemporaryDirectory(prefix="videox-backends-") as name:
        for kind in args.kinds:
            setup = train_baseline(kind, Path(name) / kind.replace(" ", "-"))
            for recipe in RECIPES:
                begin = time.monotonic()
                result = run_cell(setup, recipe, setup.folder / recipe)
                lines[*kind.split(), recipe] = row(kind, recipe, result)
                wrong += [f"{kind} {recipe}: {column}: {why}" for column, why in result.wrong.items()]
                print(*lines[*kind.split(), recipe], f"{time.monotonic() - begin:.0f} s", sep="\t", flush=True)
    print("\n".join(wrong), file=sys.stderr)
    cells = [(*kind.split(), recipe) for kind in launches.MODEL_BUILDERS for recipe in RECIPES]
    text = page([lines[cell] for cell in cells if cell in lines])
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
