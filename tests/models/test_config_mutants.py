"""Damaged configurations of model folders: each is refused by one line that names the file, or does no harm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from config_faults import BUILD, Model, faults_of

from videox.errors import MODEL, UserError

COUNT = int(os.environ.get("VIDEOX_MUTANTS", "40"))  # of each file; a thorough check takes 1000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    built: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in built:
            built[name] = Model(name, tmp_path_factory.mktemp(name))
        return built[name]

    return model


@pytest.mark.slow
def test_the_whole_model_is_read_and_one_damaged_file_is_named(models: Callable[[str], Model]) -> None:
    model = models("wan")
    model.read()
    assert faults_of(model, "tokenizer/tokenizer.json", 2, seed=24) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_mutants_of_every_configuration_are_refused_by_name_or_harmless(
    models: Callable[[str], Model], name: str
) -> None:
    model = models(name)
    files = model.configurations()
    faults = [fault for file in files for fault in faults_of(model, file, COUNT, seed=len(file))]
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
