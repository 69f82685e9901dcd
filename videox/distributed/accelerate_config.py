"""What `accelerate launch` was asked for: its command line, and the default configuration that it reads unasked.

`accelerate config` writes default_config.yaml to the user's cache, and every later `accelerate launch` reads it, in
any project. A file that was written for another machine then changes launches in which nobody thinks of it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCHER_FILES = ("accelerate", "accelerate-launch", "launch.py", "accelerate.commands.launch")
CONFIG_OPTION = "--config_file"


@dataclass(frozen=True)
class AccelerateConfig:
    """A configuration file of accelerate and its settings; problem: why it cannot be read, "" if it can."""

    path: Path
    settings: Mapping[str, Any]
    problem: str = ""

    def number(self, name: str) -> int:
        """Return a setting that is a number of machines or processes; 1 if it is missing or none."""
        value = self.settings.get(name)
        return value if isinstance(value, int) and value > 0 else 1

    def text(self, name: str) -> str:
        """Return a setting as text, "" if it is missing; "fsdp_config.x" is x in the part fsdp_config."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return "" if value is None else str(value)

    @property
    def set_aside(self) -> str:
        """The command that moves the file out of accelerate's way."""
        return f"`mv {shlex.quote(str(self.path))} {shlex.quote(f'{self.path}.off')}`"


def default_path(environment: Mapping[str, str]) -> Path:
    """Return where accelerate looks for its default configuration; the file need not exist."""
    cache = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.path.expandvars(environment.get("HF_HOME", f"{cache}/huggingface"))).expanduser()
    paths = [home / "accelerate" / f"default_config.{suffix}" for suffix in ("yaml", "json")]
    return next((path for path in paths if path.is_file()), paths[0])


def read_config(path: Path) -> AccelerateConfig:
    """Return the settings of a configuration file; a file that cannot be read has a `problem` instead."""
    try:
        import yaml  # here, because `python -m videox.doctor` also runs where packages are missing

        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except ImportError:
        return AccelerateConfig(path, {}, "pyyaml is not installed")
    except (OSError, ValueError, yaml.YAMLError) as why:
        return AccelerateConfig(path, {}, " ".join(str(why).split()))
    if not isinstance(content, Mapping):
        return AccelerateConfig(path, {}, "it has no settings")
    return AccelerateConfig(path, content)


def default_config(environment: Mapping[str, str]) -> AccelerateConfig | None:
    """Return the default configuration; None if there is no file."""
    path = default_path(environment)
    return read_config(path) if path.is_file() else None


def parent_command(pid: int | None = None) -> list[str]:
    """Return the command line of the process that started this one (Linux); empty where it cannot be read."""
    try:
        content = Path(f"/proc/{os.getppid() if pid is None else pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode("utf-8", "replace") for word in content.split(b"\0") if word]


def launch_options(command: Sequence[str]) -> dict[str, str] | None:
    """Return the options that `accelerate launch` got before the script, by name with "--"; None for other commands.

    An option's value is the rest of its word after "=", or the next word ("" if that is an option, too).
    """
    names = [Path(word).name for word in command]
    start = next((i for i, name in enumerate(names[:4]) if name in LAUNCHER_FILES), None)
    if start is None or (names[start] == "accelerate" and names[start + 1 : start + 2] != ["launch"]):
        return None
    if names[start] == "launch.py" and "accelerate" not in command[start]:
        return None
    words = list(command[start + (2 if names[start] == "accelerate" else 1) :])
    options: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.endswith(".py"):
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            following = next(iter(words[i + 1 : i + 2]), "")
            takes_it = not following.startswith("--") and not following.endswith(".py")
            options[name.replace("-", "_").replace("__", "--", 1)] = value if equals else following if takes_it else ""
    return options


def unasked_config(environment: Mapping[str, str], options: Mapping[str, str] | None) -> AccelerateConfig | None:
    """Return the default configuration if the launcher read it unasked; None if it did not.

    Args:
        environment: of the launcher.
        options: of `accelerate launch`; None: another launcher, or not known.
    """
    if options is None or CONFIG_OPTION in options or "--cpu" in options:
        return None
    return default_config(environment)
