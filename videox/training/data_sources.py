"""Where the data of a run is, from its flags: one list or folder, several, or a dataset configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from videox.data.index.importers.config_file import read_config
from videox.data.index.sources import Source, common_folder, index_name
from videox.errors import UserError


@dataclass(frozen=True)
class DataSources:
    """The sources of a run.

    Attributes:
        sources: in the order of their rows.
        lines: about the dataset configuration, for the start report; () without one.
        config: the dataset configuration; None without one.
    """

    sources: tuple[Source, ...]
    lines: tuple[str, ...] = ()
    config: Path | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a single list or folder, read as it is."""
        return len(self.sources) == 1 and self.sources[0].is_plain

    @property
    def data_dir(self) -> Path:
        """The folder that the rows' file_path is relative to."""
        return common_folder(self.sources)

    def index_path(self) -> Path:
        """Return where the index is stored if that folder is writable: next to the configuration or the first list."""
        if self.config is not None and not self.is_plain:
            config = self.config.resolve()
            return config.with_name(f"{config.name}.videox-index.arrow")
        return self.sources[0].metadata_path.resolve().with_name(index_name(self.sources))


def sources_of(args: argparse.Namespace) -> DataSources:
    """Return the sources that the flags name.

    Raises:
        UserError: no flag names any, two flags contradict each other, or the dataset configuration cannot be used.
    """
    meta = args.train_data_meta or args.train_data_dir
    if args.dataset_config:
        for flag in ("train_data_meta", "train_data_dir"):
            if getattr(args, flag):
                what = f"contradicts --{flag}: it names the folders and lists itself"
                raise UserError("--dataset_config", what, "use one of them")
        config = Path(args.dataset_config)
        found = read_config(config)
        return DataSources(tuple(found.sources), tuple(found.lines(config)), config)
    if not meta:
        hint = "name one or more lists or folders, or a dataset configuration with --dataset_config"
        raise UserError("--train_data_meta", "is required", hint)
    paths = [Path(path) for path in (meta if isinstance(meta, list) else [meta])]
    return DataSources(
        tuple(
            Source(path, _data_dir_of(path, args.train_data_dir), allow_absolute=not args.train_data_dir)
            for path in paths
        )
    )


def validation_source(args: argparse.Namespace) -> Source:
    """The list or folder of --validation_meta; its files are in --train_data_dir, as those of --train_data_meta."""
    path = Path(args.validation_meta)
    given = None if path.is_dir() else args.train_data_dir
    return Source(path, _data_dir_of(path, given), allow_absolute=not given)


def _data_dir_of(path: Path, given: str | None) -> Path:
    """Return the folder that the file_path values of a list or folder are relative to."""
    if given:
        return Path(given)
    return path if path.is_dir() else path.parent
