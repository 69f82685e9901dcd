"""Damaged configurations of model folders: each is refused by one line that names the file, or does no harm."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import runs
import tiny
import torch
from accelerate import Accelerator
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from mutants import mutants

from videox.errors import MODEL, UserError
from videox.models.transformer import load_transformer

COUNT = int(os.environ.get("VIDEOX_MUTANTS", "40"))  # of each file; a thorough check takes 1000
SECONDS = 5.0  # of processor time for each
BUILD: dict[str, tuple[str, Callable[..., Path], dict[str, object]]] = {
    "wan": ("wan2.1", tiny.build_wan_t2v, {}),
    "wan_i2v": ("wan2.1", tiny.build_wan_i2v, {"train_mode": "i2v"}),
    "hunyuan": ("hunyuanvideo", tiny.build_hunyuan_t2v, {}),
    "hunyuan_i2v": ("hunyuanvideo", tiny.build_hunyuan_i2v, {"train_mode": "i2v"}),
}


class Model:
    """A tiny model, and everything that a run reads of its folder."""

    def __init__(self, name: str, folder: Path) -> None:
        family, build, self.settings = BUILD[name]
        self.script: ModuleType = runs.train_script(family)
        self.folder = build(folder / "model")
        self.argv = runs.train_flags(family, self.folder, folder / "data.json", folder / "out", **self.settings)
        self.transformer_class = WanTransformer3DModel if family == "wan2.1" else HunyuanVideoTransformer3DModel

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


def configurations(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    built: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in built:
            built[name] = Model(name, tmp_path_factory.mktemp(name))
        return built[name]

    return model


def faults_of(model: Model, file: str, count: int, *, weights: bool = True) -> list[str]:
    """Return what is wrong with how mutants of a file are treated, one sentence each."""
    path, found = model.folder / file, list[str]()
    content = path.read_bytes()
    try:
        for number, (words, mutant) in enumerate(mutants(content, count, seed=len(file))):
            path.write_bytes(mutant)
            begin = time.process_time()
            outcome = _outcome(model, file, weights=weights)
            seconds = time.process_time() - begin
            if seconds > SECONDS:
                outcome = f"{outcome} took {seconds:.1f} s"
            if outcome:
                found.append(f"{file}, mutant {number} ({words}): {outcome}")
    finally:
        path.write_bytes(content)
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
        return "" if named and len(line) < 2000 and error.exit_code in (MODEL, 2) else f"not named: {line[:300]}"
    except (Exception, RecursionError) as error:  # noqa: BLE001 - what a user would see as a traceback
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


@pytest.mark.slow
def test_the_whole_model_is_read_and_one_damaged_file_is_named(models: Callable[[str], Model]) -> None:
    model = models("wan")
    model.read()
    assert faults_of(model, "tokenizer/tokenizer.json", 2) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_mutants_of_every_configuration_are_refused_by_name_or_harmless(
    models: Callable[[str], Model], name: str
) -> None:
    model = models(name)
    faults = [fault for file in configurations(model.folder) for fault in faults_of(model, file, COUNT)]
    assert faults == [], "\n".join([f"{len(faults)} faults", *faults])


# -------------------------------------------------------------------------------------------------------- tokenizers


def damaged(tmp_path: Path, models: Callable[[str], Model], name: str) -> Model:
    """Return a copy of a model whose files a test may change."""
    model = models(name)
    copy = object.__new__(Model)
    vars(copy).update(vars(model))
    copy.folder = shutil.copytree(model.folder, tmp_path / "model")
    copy.argv = [str(copy.folder) if word == str(model.folder) else word for word in model.argv]
    return copy


@pytest.mark.parametrize(
    ("name", "part", "files"),
    [
        ("wan", "tokenizer", ["tokenizer.json"]),
        pytest.param("hunyuan", "tokenizer_2", ["tokenizer.json", "vocab.json", "merges.txt"], marks=pytest.mark.slow),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_refused(
    models: Callable[[str], Model], tmp_path: Path, name: str, part: str, files: list[str]
) -> None:
    model = damaged(tmp_path, models, name)
    for file in files:
        (model.folder / part / file).unlink(missing_ok=True)
    with pytest.raises(UserError) as caught:
        model.read()
    assert caught.value.exit_code == MODEL and str(model.folder / part) in caught.value.line()
    assert "hf download" in caught.value.hint


@pytest.mark.slow
def test_the_tokenizer_of_another_model_is_refused(models: Callable[[str], Model], tmp_path: Path) -> None:
    model, other = damaged(tmp_path, models, "wan"), models("hunyuan")
    shutil.rmtree(model.folder / "tokenizer")
    shutil.copytree(other.folder / "tokenizer", model.folder / "tokenizer")
    with pytest.raises(UserError, match=r"makes a tokenizer of .* tokens, and the text encoder's embedding has"):
        model.read()
