"""Mutants of the configurations in a model's folder, and what is wrong with how a run treats them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import runs
import tiny
import torch
from accelerate import Accelerator
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from mutants import mutants

from videox.errors import FLAGS, MODEL, UserError
from videox.models.transformer import load_transformer

SECONDS = 5.0  # of processor time for a mutant
BUILD: dict[str, tuple[str, Callable[..., Path], dict[str, object]]] = {
    "wan": ("wan2.1", tiny.build_wan_t2v, {}),
    "wan_i2v": ("wan2.1", tiny.build_wan_i2v, {"train_mode": "i2v"}),
    "hunyuan": ("hunyuanvideo", tiny.build_hunyuan_t2v, {}),
    "hunyuan_i2v": ("hunyuanvideo", tiny.build_hunyuan_i2v, {"train_mode": "i2v"}),
}


class Model:
    """A tiny model, and everything that a run reads of its folder.

    Args:
        name: a key of BUILD.
        folder: where the model is written.
    """

    def __init__(self, name: str, folder: Path) -> None:
        family, build, self.settings = BUILD[name]
        self.script: ModuleType = runs.train_script(family)
        self.folder = build(folder / "model")
        self.argv = runs.train_flags(family, self.folder, folder / "data.json", folder / "out", **self.settings)
        self.transformer_class = WanTransformer3DModel if family == "wan2.1" else HunyuanVideoTransformer3DModel

    def configurations(self) -> list[str]:
        """Return the JSON files of the folder, by their path in it."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.json"))

    def read(self, *, weights: bool = True) -> None:
        """Read the model as a run does. Raises UserError.

        Args:
            weights: False reads configurations alone: what a dry run reads, and the specifications of the encoders.
        """
        args = self.script.parse_args(self.argv, check=lambda _: None)
        components, accelerator = self.script.check_model(args), Accelerator(cpu=True)
        describe = getattr(self.script, "describe", None) or self.script.profile_and_shift
        profile, shift = describe(args, components, None)
        profile.network(half=True)
        self.script.encoding_specs(args, components, lambda: None, torch.bfloat16)
        if weights:
            encoders = self.script.load_encoders(args, components, shift.value, accelerator, lambda value: [value])
            transformer = load_transformer(self.transformer_class, components["transformer"], accelerator)
            given = [] if self.transformer_class is WanTransformer3DModel else [args]
            encode = SimpleNamespace(device=torch.device("cpu"))
            self.script.build_model(*given, components, shift.value, transformer, lambda: encoders, encode)


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, and write it again at the end."""
    content = path.read_bytes()
    try:
        yield content
    finally:
        path.write_bytes(content)


def faults_of(model: Model, file: str, count: int, *, seed: int, weights: bool = True) -> list[str]:
    """Return what is wrong with how mutants of a file are treated, one sentence each.

    Args:
        model: whose folder has the file.
        file: one of its configurations.
        count: number of mutants.
        seed: of the mutants.
        weights: as for Model.read.
    """
    path, found = model.folder / file, list[str]()
    with restored(path) as content:
        for number, (words, mutant) in enumerate(mutants(content, count, seed=seed)):
            path.write_bytes(mutant)
            begin = time.process_time()
            outcome = _outcome(model, file, weights=weights)
            seconds = time.process_time() - begin
            if seconds > SECONDS:
                outcome = f"{outcome} took {seconds:.1f} s"
            if outcome:
                found.append(f"{file}, mutant {number} ({words}): {outcome}")
    return found


def _outcome(model: Model, file: str, *, weights: bool) -> str:
    """Return what is wrong with how the model's folder is read now, "" if nothing."""
    try:
        with runs.restored_process_state():
            model.read(weights=weights)
    except UserError as error:
        line = error.line()
        folder, _, name = file.rpartition("/")
        # a pipeline of another kind: the flag names the model's folder
        named = name in line or (folder and folder in line) or (not folder and "--pretrained_model_name" in line)
        return "" if named and len(line) < 2000 and error.exit_code in (MODEL, FLAGS) else f"not named: {line[:300]}"
    except (Exception, RecursionError) as error:  # noqa: BLE001 - what a user would see as a traceback
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""
