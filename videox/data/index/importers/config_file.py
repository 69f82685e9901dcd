"""Reads a dataset configuration: finds out by its content which tool it is of, and reads it into sources."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from videox.data.index.formats import encoding_of, read_bytes
from videox.data.index.importers import ai_toolkit, diffusion_pipe, kohya, musubi, own, simpletuner
from videox.data.index.importers.entry import Imported
from videox.errors import DATA, UserError

FORMATS = (
    "ours (yaml with sources), musubi-tuner (toml), diffusion-pipe (toml), SimpleTuner (multidatabackend.json), "
    "ai-toolkit (yaml with datasets), kohya's sd-scripts (toml)"
)
_DATA_SET_KEYS = (*musubi.TABLE.obeyed, *ai_toolkit.TABLE.obeyed, "subsets")


def read_config(path: Path) -> Imported:
    """Read a dataset configuration of ours or of another tool.

    Args:
        path: a .toml, .json, .yaml or .yml file.

    Raises:
        UserError: (FLAGS) the file cannot be read; (DATA) its content is of no known format, or cannot be used.
    """
    config = _parse(path)
    found = _reader_of(config, path)(config, path)
    if not found.sources:
        what = f"{found.tool} without any data set to train"
        raise UserError(str(path), what, "add one, or enable one", DATA)
    return found


def _parse(path: Path) -> Any:  # noqa: ANN401 - any value of a configuration file
    content = read_bytes(path)
    try:
        text = content.decode(encoding_of(content)).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"is not text ({error})", "save the file as UTF-8", DATA) from error
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix == ".json":
            return json.loads(text)
    except ValueError as error:
        what = f"not valid {suffix[1:].upper()} ({error})"
        hint = "correct the file at this position"
        if "\\" in text:
            hint += "; in a path, write / in place of \\"
        raise UserError(str(path), what, hint, DATA) from error
    if suffix in (".yaml", ".yml"):
        return _parse_yaml(text, path)
    raise UserError(str(path), f"unknown suffix {suffix!r}", f"use a file of one of these: {FORMATS}")


def _parse_yaml(text: str, path: Path) -> Any:  # noqa: ANN401 - any value of a configuration file
    # Imported here: only a yaml needs them.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:
        what = f"not a valid yaml ({' '.join(str(error).split())})"
        raise UserError(str(path), what, "correct the file at this position", DATA) from error


def _reader_of(config: Any, path: Path) -> Callable[[Any, Path], Imported]:  # noqa: ANN401 - any value
    """Return the reader for a parsed configuration."""
    if isinstance(config, list):
        return simpletuner.read
    if not isinstance(config, Mapping):
        raise UserError(str(path), "is not a dataset configuration", f"use one of these: {FORMATS}", DATA)
    for key, reader in (("sources", own.read), ("directory", diffusion_pipe.read)):
        if isinstance(config.get(key), list):
            return reader
    listed = [entry for process in ai_toolkit.processes(config) for entry in _listed(process.get("datasets"))]
    keys = {str(key) for entry in listed for key in entry}
    for names, reader in (
        (("subsets",), kohya.read),
        ((*musubi.FOLDERS, *musubi.LISTS), musubi.read),
        (("folder_path", "dataset_path"), ai_toolkit.read),
    ):
        if keys.intersection(names):
            return reader
    if isinstance(config.get("dataset"), str):
        what = "is diffusion-pipe's main configuration"
        raise UserError(str(path), what, f"pass its dataset file, {config['dataset']}", DATA)
    found = sorted(keys) or list(map(str, config))
    near = {key: difflib.get_close_matches(key, _DATA_SET_KEYS, 1) for key in found}
    named = ", ".join(key + (f" (did you mean {match[0]})" if match else "") for key, match in near.items())
    what = f"is of no known format; keys found: {named or 'none'}"
    raise UserError(str(path), what, f"use one of these: {FORMATS}", DATA)


def _listed(datasets: Any) -> list[Mapping[str, Any]]:  # noqa: ANN401 - any value of a configuration file
    return [entry for entry in datasets if isinstance(entry, Mapping)] if isinstance(datasets, list) else []
