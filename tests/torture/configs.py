"""Area configs: mutants of every configuration in a model's folder, read as a run reads the model."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from config_faults import BUILD, SECONDS, Model, faults_of

from tests.torture.cases import Area, Outcome, Row

MUTANTS = 8  # of a case; each kind of mutant once
FILES = {"wan": 7, "wan_i2v": 9, "hunyuan": 10, "hunyuan_i2v": 12}  # configurations of each model


class Configs(Area):
    """Each mutant is read without harm, or refused by one line that names the file."""

    rows = tuple(
        Row(
            name, f"wrong types, absurd numbers, deep nesting and damage of each .json of a {name} model: read, or one line with code 2 or 4 that names it, within {SECONDS:g} s",
            1000 * files,
        ) for name, files in FILES.items()
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.model = cache(self._model)

    def _model(self, name: str) -> Model:
        model = Model(name, self.folder / name)
        if self.broken:
            model.read = lambda **_: read_without_care(model)  # type: ignore[method-assign]
        return model

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        del draw
        name = list(BUILD)[seed % len(BUILD)]
        model = self.model(name)
        files = model.configurations()
        file = files[seed // len(BUILD) % len(files)]
        # Every second case reads the weights, too: that takes ten times as long.
        weights = seed // len(BUILD) // len(files) % 2 == 1
        problems = faults_of(model, file, MUTANTS, seed=seed, weights=weights)
        return Outcome(name, f"{MUTANTS} mutants of {file}", tried=MUTANTS, problems=problems)


def read_without_care(model: Model) -> None:
    """Broken on purpose: reads every configuration and lets every error through."""
    for file in model.configurations():
        json.loads((model.folder / file).read_bytes())
