"""Prompts of sample clips: strings, or files with one prompt a line, with options for size, length, seed and more.

The options are those of kohya's trainers and of musubi-tuner, such as `--w 832 --h 480 --f 81`; docs/samples.md lists
them. Imports no torch, so that a wrong prompt file is reported before anything slow.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from videox.errors import UserError

FLAG = "--validation_prompts"
FILE_SUFFIXES = (".txt", ".yaml", ".yml", ".json", ".toml")
MOST_NAME_BYTES = 255  # of a file name; a longer string is a prompt
_OPTION = re.compile(r"(?<=\s)--(?=[A-Za-z])")
_NAME_AND_VALUE = re.compile(r"([A-Za-z_]\w*)(?:\s*=\s*|\s+|$)(.*)", re.DOTALL)


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt and what its options say; None where an option was not given.

    Attributes:
        text: the prompt; may be empty.
        place: where it was written, for messages.
        width: of the clip, in pixels, as written.
        height: of the clip, in pixels, as written.
        frames: of the clip, as written.
        fps: frames per second of the written clip.
        seed: of the noise.
        steps: denoising steps.
        guidance: embedded guidance scale (--g).
        cfg: classifier-free guidance scale (--l).
        flow_shift: of the noise levels in sampling.
        negative: negative prompt.
        image: picture that the clip starts from.
        last_image: picture that the clip ends with.
    """

    text: str
    place: str
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg: float | None = None
    flow_shift: float | None = None
    negative: str | None = None
    image: Path | None = None
    last_image: Path | None = None


def _whole(low: int, high: int, text: str) -> int:
    """Return a whole number within [low, high]; raises ValueError with what is wrong."""
    if not re.fullmatch(r"[+-]?\d+", text):
        raise ValueError(f"{text!r} is not a whole number")
    if not low <= int(text) <= high:
        raise ValueError(f"{text} is outside {low} to {high}")
    return int(text)


def _real(low: float, high: float, text: str) -> float:
    """Return a finite number within [low, high]; raises ValueError with what is wrong."""
    try:
        value = float(text)
    except ValueError as why:
        raise ValueError(f"{text!r} is not a number") from why
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{text} is outside {low:g} to {high:g}")
    return value


def _path(text: str) -> Path:
    """Return a path; raises ValueError for an empty one."""
    if not text:
        raise ValueError("a path is missing")
    return Path(text)


@dataclass(frozen=True)
class _Option:
    """An option: the field it sets, its names on a prompt's line, its further names as a key of yaml, and its type."""

    field: str
    names: tuple[str, ...]
    keys: tuple[str, ...]
    convert: Callable[[str], Any]


# Keys: of this project, then those of musubi-tuner's json and toml files, and of ai-toolkit's yaml.
OPTIONS = (
    _Option("width", ("w", "width"), (), partial(_whole, 16, 8192)),
    _Option("height", ("h", "height"), (), partial(_whole, 16, 8192)),
    _Option("frames", ("f", "frames"), ("frame_count", "num_frames"), partial(_whole, 1, 10_000)),
    _Option("fps", ("fps",), ("frame_rate",), partial(_real, 0.1, 1000)),
    _Option("seed", ("d", "seed"), (), partial(_whole, 0, 2**63 - 1)),
    _Option("steps", ("s", "steps"), ("sample_steps", "num_inference_steps"), partial(_whole, 1, 1000)),
    _Option("guidance", ("g", "guidance"), ("guidance_scale",), partial(_real, 0, 100)),
    _Option("cfg", ("l", "cfg"), ("cfg_scale", "scale", "true_cfg_scale"), partial(_real, 0, 100)),
    _Option("flow_shift", ("fs", "flow_shift"), ("discrete_flow_shift",), partial(_real, 0.001, 999)),
    _Option("negative", ("n", "negative"), ("negative_prompt", "neg"), str),
    _Option("image", ("i", "image"), ("image_path",), _path),
    _Option("last_image", ("ei", "last_image"), ("end_image_path",), _path),
)
BY_NAME: Mapping[str, _Option] = {name: option for option in OPTIONS for name in option.names}
BY_KEY: Mapping[str, _Option] = {**BY_NAME, **{key: option for option in OPTIONS for key in option.keys}}
# Options of other models' prompts, which the models here do not take.
OF_OTHER_MODELS: Mapping[str, str] = {
    "ci": "a control image",
    "cim": "a mask of a control image",
    "cn": "a control video",
    "of": "one-frame inference",
    "am": "multipliers of several LoRAs",
    "ss": "another sampler: clips are made with the model's own",
}


def read_prompts(given: Sequence[str], flag: str = FLAG) -> list[SamplePrompt]:
    """Return the prompts that a flag's values name, in order; files are read where they are named.

    Args:
        given: prompts with their options, or paths that end in one of FILE_SUFFIXES.
        flag: that has them, for messages.

    Raises:
        UserError: a file cannot be read or has no prompts, or an option is unknown or has a wrong value.
    """
    prompts: list[SamplePrompt] = []
    for number, item in enumerate(given):
        if (path := _file_of(item, flag)) is not None:
            prompts += _read_file(path, flag)
        else:
            prompts.append(parse_line(item, f"{flag}, prompt {number}"))
    return prompts


def _file_of(item: str, flag: str) -> Path | None:
    """Return the path that a value names, None if it is a prompt; raises UserError for a file that does not exist."""
    if not item.lower().endswith(FILE_SUFFIXES) or len(item.encode()) > MOST_NAME_BYTES or "\n" in item:
        return None
    path = Path(item)
    if path.is_file():
        return path
    if any(character.isspace() for character in item):  # a sentence that ends in .txt
        return None
    hint = f"pass a prompt, or a file that exists and ends in {', '.join(FILE_SUFFIXES)}"
    raise UserError(flag, f"{item} does not exist", hint)


def _read_file(path: Path, flag: str) -> list[SamplePrompt]:
    """Return the prompts of a file; pictures that do not exist as named are looked up beside it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as why:
        raise UserError(flag, f"{path} cannot be read ({why})", "pass a text file in UTF-8") from why
    if path.suffix.lower() == ".txt":
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        prompts = [parse_line(line, f"{path}, line {number}") for number, line in lines if line and line[0] != "#"]
    else:
        prompts = _of_content(_parse_content(path, text, flag), str(path))
    if not prompts:
        raise UserError(flag, f"{path} has no prompts", "write one prompt a line, or a yaml list of prompts")
    return [_beside(prompt, path.parent) for prompt in prompts]


def _beside(prompt: SamplePrompt, folder: Path) -> SamplePrompt:
    def find(image: Path | None) -> Path | None:
        here = image is None or image.is_absolute() or image.exists() or not (folder / image).exists()
        return image if here or image is None else folder / image

    return replace(prompt, image=find(prompt.image), last_image=find(prompt.last_image))


def _parse_content(path: Path, text: str, flag: str) -> Any:  # noqa: ANN401 - whatever a file has
    import yaml  # imported where a file is read: a command line without one is answered sooner

    try:
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as why:
        what = f"{path} cannot be parsed ({' '.join(str(why).split())[:200]})"
        raise UserError(flag, what, "write a list of prompts, each a string or a mapping with the key prompt") from why


def _of_content(content: Any, place: str) -> list[SamplePrompt]:  # noqa: ANN401 - as above
    """Return the prompts of a parsed file.

    It has a list of prompts; or a mapping with the key `prompts` and defaults for all of them; or, as in kohya's toml,
    a mapping `prompt` with defaults and a list `subset`.
    """
    defaults: Mapping[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict) and len(content) == 1:
        defaults = content["prompt"]
        content = defaults.get("subset", [{}])
        defaults = {key: value for key, value in defaults.items() if key != "subset"}
    elif isinstance(content, dict) and "prompts" in content:
        defaults = {key: value for key, value in content.items() if key != "prompts"}
        content = content["prompts"]
    elif isinstance(content, dict) and "prompt" in content:
        content = [content]
    if not isinstance(content, list):
        what = f"has {type(content).__name__} in place of a list of prompts"
        raise UserError(place, what, "write a list, or a mapping with the key prompts")
    return [_of_item(item, defaults, f"{place}, prompt {number}") for number, item in enumerate(content)]


def _of_item(item: Any, defaults: Mapping[str, Any], place: str) -> SamplePrompt:  # noqa: ANN401 - as above
    """Return the prompt of a string with options, or of a mapping; the item's own values win over the defaults."""
    own = dict(item) if isinstance(item, dict) else {}
    text = {**defaults, **own}.get("prompt") if isinstance(item, dict) else item
    if not isinstance(text, str):
        what = f"{str(item)[:80]!r} is not a prompt"
        raise UserError(place, what, "write a string in quotes, or a mapping with the key prompt")
    fields: dict[str, Any] = {}
    for values in (defaults, own):
        for key, value in values.items():
            if key != "prompt" and value is not None:
                option = BY_KEY.get(str(key).lower())
                if option is None:
                    raise _unknown(str(key), place, list(BY_KEY), dashes="")
                fields[option.field] = _convert(option, value, str(key), place)
    line = parse_line(text, place)
    of_line = {option.field: getattr(line, option.field) for option in OPTIONS}
    given = {name: value for name, value in of_line.items() if value is not None}
    return replace(line, **{**fields, **given})


def parse_line(line: str, place: str) -> SamplePrompt:
    """Return the prompt of a line such as `a red fox --w 832 --h 480 --n blurry`; a later option of a kind wins.

    An option begins with two dashes between a space and a letter, and its value ends where the next one begins; its
    name may have any case. Other dashes belong to the text, also those at its beginning.

    Args:
        line: the prompt and its options.
        place: for messages.

    Raises:
        UserError: an option is unknown, or its value is wrong.
    """
    text, *parts = _OPTION.split(line)
    fields: dict[str, Any] = {}
    for part in parts:
        match = _NAME_AND_VALUE.fullmatch(part.strip())
        name, value = (match[1].lower(), match[2].strip()) if match else (part.strip(), "")
        option = BY_NAME.get(name)
        if option is None:
            raise _unknown(name, place, list(BY_NAME), dashes="--")
        fields[option.field] = _convert(option, value, f"--{name}", place)
    return SamplePrompt(text.strip(), place, **fields)


def _convert(option: _Option, value: Any, name: str, place: str) -> Any:  # noqa: ANN401 - a number, text or path
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(place, f"{name} is {value!r}", "write a number or a text in quotes")
    try:
        return option.convert(str(value))
    except ValueError as why:
        raise UserError(place, f"{name}: {why}", f"write, for example, {example_of(option.names[0])}") from why


def _unknown(name: str, place: str, known: Sequence[str], dashes: str) -> UserError:
    word = name.lower()
    if word in OF_OTHER_MODELS:
        what = f"{dashes}{name} is {OF_OTHER_MODELS[word]}, which the models here do not take"
        return UserError(place, what, "remove it")
    near = difflib.get_close_matches(word, known, 1, 0.5)
    hint = f"did you mean {dashes}{near[0]}" if near else f"use {', '.join(f'--{o.names[0]}' for o in OPTIONS)}"
    return UserError(place, f"{dashes}{name} is not an option of a prompt", hint)


def example_of(name: str) -> str:
    """Return an option with a value that is right, by the option's first name."""
    values = {
        "n": "blurry",
        "i": "fox.png",
        "ei": "end.png",
        "w": "832",
        "h": "480",
        "f": "81",
        "fps": "16",
        "d": "42",
        "s": "30",
    }
    return f"--{name} {values.get(name, '5')}"
