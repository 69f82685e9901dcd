"""Tiny models of every task, and runs that train them over one tiny data set, with or without a latent cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import runs
import tiny

# name -> (family, train_mode, builder of the model folder)
MODELS: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "wan": ("wan2.1", "normal", tiny.build_wan_t2v),
    "wan-i2v": ("wan2.1", "i2v", tiny.build_wan_i2v),
    "wan-inpaint": ("wan2.1", "inpaint", lambda folder: tiny.build_wan_i2v(folder, image_embedder=False)),
    "hunyuan": ("hunyuanvideo", "normal", tiny.build_hunyuan_t2v),
    "hunyuan-i2v": ("hunyuanvideo", "i2v", tiny.build_hunyuan_i2v),
}


class TinyModels:
    """A tiny data set, and a tiny model of each name in MODELS, built on first use.

    Args:
        folder: where data set and models are written.
        copies: how often each row of the data set is repeated.
    """

    def __init__(self, folder: Path, copies: int = 1) -> None:
        self.folder = folder
        self._models: dict[str, Path] = {}
        self.metadata = tiny.make_dataset(folder / "data", copies=copies)

    def command(self, name: str, output_dir: Path, **changes: object) -> list[str]:
        """Return the flags of a run.

        Args:
            name: a key of MODELS.
            output_dir: output folder of the run.
            changes: flags that differ from the defaults here; metadata and model replace these paths.
        """
        family, train_mode, build_model = MODELS[name]
        if name not in self._models:
            self._models[name] = build_model(self.folder / name)
        flags = {"train_mode": train_mode, "num_train_epochs": 2, "train_batch_size": 2}
        flags |= {"gradient_accumulation_steps": 2, "caption_dropout": 0.3}
        flags |= {"tokenizer_max_length": 16 if name == "wan" else None}
        paths = {"metadata": self.metadata, "model": self._models[name]}
        paths |= {path: changes.pop(path) for path in list(changes) if path in paths}
        return runs.train_flags(family, paths["model"], paths["metadata"], output_dir, **{**flags, **changes})

    def train(self, name: str, output_dir: Path, **changes: object) -> runs.Outcome:
        """Train in this process and return the outcome of a run that must succeed; arguments as for `command`."""
        outcome = runs.train(self.command(name, output_dir, **changes), runs.train_script(MODELS[name][0]))
        assert outcome.code == 0, outcome.stderr
        return outcome
