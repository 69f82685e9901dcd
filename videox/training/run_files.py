"""Run files: flags from YAML files (--config), from recipes by name (--recipe) and from the args.json of a run.

The flags of a file are put before those of the command line, so that the command line wins. A boolean flag of a file
is switched off by `--flag=false`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from videox.errors import UserError
from videox.training.synonyms import nearest_hint

FILE_FLAGS = ("config", "recipe", "list_recipes", "help")  # not allowed inside a file
LAUNCH = "# Launch: "  # begins the line of a recipe with its launch command
MISTYPED = 0.9  # difflib ratio from which a name is taken for a mistyped recipe
FIGURES = "figures.json"  # in the folder above the recipes of a family
# Flags of an args.json that say how that run was started, and not what it trained.
_NOT_REPEATED = (
    *FILE_FLAGS, "resume_from_checkpoint", "accept_data_change", "verify", "skip_verify", "dry_run", "explain", "dry_run_plan", "dry_run_processes",
    "dry_run_backend", "dry_run_deepspeed_config", "cache_only", "dump_steps",
)  # fmt: skip
_WORDS = {"true": True, "false": False}


class ListRecipes(argparse.Action):
    """Prints the table of recipes and exits, as --help does.

    Args:
        folder: the recipes of a family.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, folder: Path, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)
        self.folder = folder

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the table and exit with code 0."""
        sys.stdout.write("".join(f"{line}\n" for line in recipe_table(self.folder)))
        parser.exit(0)


def flags_from_files(
    words: Sequence[str], actions: Mapping[str, argparse.Action], recipes: Path | None
) -> tuple[list[str], dict[str, Path]]:
    """Return the command-line words of all run files that `words` names, and the file of each flag.

    Recipes come first, then the --config files in their order; a later file replaces a value of an earlier one, and
    null in a later file removes it.

    Args:
        words: the command line.
        actions: the parser's actions, by option string such as "--seed".
        recipes: the folder of the family's recipes; None: the script has no --config and no --recipe.

    Raises:
        UserError: a file cannot be read, or names a flag that does not exist or a value of another type.
    """
    if recipes is None:
        return [], {}
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--recipe")
    files.add_argument("--config", nargs="+", default=[])
    try:
        args, _ = files.parse_known_args(list(words))
    except argparse.ArgumentError:
        return [], {}  # the full parser reports it
    paths = [recipe_path(args.recipe, recipes)] if args.recipe else []
    merged: dict[str, tuple[Path, list[str]]] = {}
    for path in [*paths, *map(Path, args.config)]:
        for name, value in read_run_file(path).items():
            flag = f"--{name}"
            if name in FILE_FLAGS or flag not in actions:
                raise _unknown_key(path, name, actions)
            merged.pop(flag, None)
            if value is not None:
                merged[flag] = path, _words_of(path, actions[flag], flag, value)
    in_order = [word for _, flag_words in merged.values() for word in flag_words]
    return in_order, {flag: path for flag, (path, _) in merged.items()}


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the flags of a run file by name, without `--`.

    Args:
        path: a YAML file of flag names and values, or the args.json of a run.

    Raises:
        UserError: the file cannot be read, or is not a mapping.
    """
    hint = "write one `flag_name: value` per line, or pass the args.json of a run"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--config", f"{path} cannot be read ({error})", "pass the path of a run file") from error
    try:
        content = _flags_of_record(text) if path.suffix == ".json" else _read_yaml(text)
    except ValueError as error:
        raise UserError(
            "--config", f"{path} is not a run file ({' '.join(str(error).split())[:200]})", hint
        ) from error
    return {str(name): value for name, value in content.items()}


def _flags_of_record(text: str) -> dict[str, Any]:
    """Return the flags of an args.json; raises ValueError for other content."""
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("asked"), dict):
        raise ValueError("it has no key `asked` with the flags of a run")
    flags = {
        name: value
        for name, value in content["asked"].items()
        if name not in _NOT_REPEATED and value not in ([], False)
    }
    resolved = content.get("resolved", {})
    if flags.get("seed") is None:
        flags["seed"] = resolved.get("seed")  # the seed that the run drew
    if flags.get("flow_shift", "auto") == "auto" and "shift" in resolved:
        flags["flow_shift"] = resolved["shift"]  # of the model, of a yaml, or of the checkpoint that it resumed from
    return flags


def _read_yaml(text: str) -> dict[Any, Any]:
    """Return the mapping of a YAML text with its interpolations resolved; raises ValueError for other content."""
    import yaml  # imported where a file is read: a command line without one is answered sooner
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping of flag names to values")
    return content


def recipe_path(name: str, folder: Path) -> Path:
    """Return the file of a recipe; raises UserError with the nearest name for an unknown one."""
    names = recipe_names(folder)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, MISTYPED) or difflib.get_close_matches(name, names, 4, 0.3)
        meant = f"use {', '.join(sorted(near))}, or " if near else ""
        raise UserError("--recipe", f"{name} is not a recipe of this script", f"{meant}see --list_recipes")
    return folder / f"{name}.yaml"


def recipe_names(folder: Path) -> list[str]:
    """Return the names of all recipes in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def recipe_table(folder: Path) -> list[str]:
    """Return the table of recipes with the figures that `benchmarks/recipes.py` wrote."""
    try:
        content = json.loads((folder.parent / FIGURES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"  {name}" for name in recipe_names(folder)]
    figures = content["recipes"][folder.name]
    rows: list[tuple[str, ...]] = [("recipe", "GPUs", "memory", "samples", "per step", "run", "disk", "")]
    launches = []
    for name in recipe_names(folder):
        row, text = figures[name], (folder / f"{name}.yaml").read_text(encoding="utf-8")
        memory = f"{row['gib']:.1f} of {row['card_gib']:g} GiB"
        side, frames = (_value_in(text, key) for key in ("video_sample_size", "video_sample_n_frames"))
        times = f"{row['seconds_per_step']:.1f} s", f"{row['hours']:g} h"
        samples, disk = f"{frames} x {side} x {side}", f"{row['disk_gb']:.0f} GB"
        rows.append((name, f"{row['gpus']} x {_value_in(text, 'gpu')}", memory, samples, *times, disk, row["what"]))
        if not (launch := launch_in(text)).startswith("python "):
            launches.append(f"{name}: {launch} --recipe {name} ...")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"estimated for {content['data']}; `--recipe NAME --dry_run` estimates for your data",
        "samples: at most so many frames x the sides of a square with as many pixels",
    ]
    return [*table, "", *notes, *(["", "recipes that need a launcher:", *launches] if launches else [])]


def launch_in(text: str) -> str:
    """Return the launch command in the comment of a recipe, "" without one; text: of its file."""
    return next((line.removeprefix(LAUNCH) for line in text.splitlines() if line.startswith(LAUNCH)), "")


def _value_in(text: str, key: str) -> str:
    """Return the value of a key of a recipe as its file has it, without a YAML parser, which would take longer."""
    return next((line.partition(": ")[2] for line in text.splitlines() if line.startswith(f"{key}: ")), "?")


def _words_of(path: Path, action: argparse.Action, flag: str, value: Any) -> list[str]:  # noqa: ANN401 - a YAML value
    """Return a value of a run file as words of the command line."""
    where = f"{path}, key {flag[2:]}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(where, f"{value!r} is neither true nor false", "write true or false")
        return [f"{flag}={str(value).lower()}"]
    if isinstance(value, dict):
        raise UserError(where, "has keys of its own", "write one value" if action.nargs is None else "write a list")
    if isinstance(value, list):
        if action.nargs is None:
            raise UserError(where, "is a list", "write one value")
        nested = next((item for item in value if isinstance(item, (dict, list))), None)
        if nested is not None:
            raise UserError(where, f"the item {nested} is not a single value", "put quotes around text with a colon")
        return [flag, *(_word(action, item) for item in value)] if value else []
    return [f"{flag}={_word(action, value)}"] if action.nargs is None else [flag, _word(action, value)]


def _word(action: argparse.Action, value: Any) -> str:  # noqa: ANN401 - a YAML value
    # YAML reads the words no and off as false, and yes and on as true.
    if isinstance(value, bool) and action.choices:
        meant = ("yes", "on") if value else ("no", "off")
        return next((word for word in meant if word in action.choices), str(value).lower())
    return str(value)


def _unknown_key(path: Path, name: str, actions: Mapping[str, argparse.Action]) -> UserError:
    if name in FILE_FLAGS:
        return UserError(f"{path}, key {name}", "is not allowed in a run file", "pass it on the command line")
    return UserError(f"{path}, key {name}", "is not a flag of this script", nearest_hint(name, list(actions)))


def switch_booleans(words: Iterable[str], actions: Mapping[str, argparse.Action]) -> list[str]:
    """Return the words with each `--flag=true` as `--flag`, and without the flags that a later `=false` switches off.

    Raises:
        UserError: a boolean flag has another value.
    """
    result: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        action = actions.get(flag)
        if not equals or action is None or action.nargs != 0:
            result.append(word)
        elif value.lower() not in _WORDS:
            raise UserError(flag, f"{value} is neither true nor false", f"use {flag}, or {flag}=false")
        elif _WORDS[value.lower()]:
            result.append(flag)
        else:
            result = [earlier for earlier in result if earlier != flag]
    return result
