"""Translates the command line of VideoX-Fun's train_lora.py to that of train.py. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from videox.errors import UserError
from videox.training.argument_parser import Parser, number, parse_or_exit

RANK, ALPHA = 128, 64  # the defaults of VideoX-Fun's train_lora.py
NO_COUNTERPART = {
    "lora_skip_name": "name the layers to train with --target_name",
    "train_text_encoder": "remove it: text encoders are frozen",
    "noise_share_in_frames": "remove it: each sample has noise of its own in every frame",
    "noise_share_in_frames_ratio": "remove it: each sample has noise of its own in every frame",
}
SAME = {"--lora_rank": "--rank", "--lora_alpha": "--network_alpha", "--lora_target_modules": "--target_name"}
WHOLE_NAMES = (
    "without --use_peft_lora, VideoX-Fun adapts each layer whose name contains a name of --target_name anywhere (k is in "
    "blocks); here, whole components of the layers' names are compared, as VideoX-Fun does with --use_peft_lora"
)


@dataclass(frozen=True)
class LayerNames:
    """How the layers of a family's transformer are called in VideoX-Fun.

    Attributes:
        diffusers: name in VideoX-Fun -> name in diffusers, each of one or more components.
        every: names that contain every linear layer, in diffusers. VideoX-Fun adapts them all without --use_peft_lora
            and --target_name.
        choices: flag that VideoX-Fun's script of this family has -> the flag of train.py, and its values by those of
            VideoX-Fun.
    """

    diffusers: Mapping[str, str]
    every: tuple[str, ...]
    choices: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)

    def translate(self, name: str) -> str:
        """Return a layer's name in diffusers; components that have the same name in both are unchanged."""
        parts, found = name.split("."), []
        while parts:
            taken = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.diffusers), 0)
            found.append(self.diffusers[".".join(parts[:taken])] if taken else parts[0])
            parts = parts[max(taken, 1) :]
        return ".".join(found)


def make_lora_parser() -> Parser:
    """The parser of the flags that train_lora.py has and train.py has not."""
    parser = Parser(add_help=False, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("flags of VideoX-Fun's train_lora.py").add_argument
    add("--rank", type=number(int, 1, 4096), default=RANK, help="as --lora_rank")
    add("--network_alpha", type=number(float, 1e-6, 1e6), default=ALPHA, help="as --lora_alpha")
    add("--target_name", help="as --lora_target_modules, with commas and VideoX-Fun's names: q,k,v,ffn.0,ffn.2")
    implementation = (
        "VideoX-Fun's choice between two implementations; here peft is used always. Without it and without "
    )
    add("--use_peft_lora", action="store_true", help=f"{implementation}--target_name, every linear layer is adapted")
    add("--save_state", action="store_true", help="has no effect: every checkpoint contains the state to resume from")
    return parser


class Translation(NamedTuple):
    """A command line of train.py, without the script's name, and lines that say where its meaning differs."""

    words: list[str]
    notes: list[str]


def translate(words: Sequence[str], names: LayerNames) -> Translation:
    """Return the command line of train.py for one of VideoX-Fun's train_lora.py; other flags are left as they are.

    Args:
        words: the command line without the script's name.
        names: the names of the family's layers.

    Raises:
        UserError: a flag has no counterpart here, or a value is wrong.
    """
    parser = make_lora_parser()
    own, other = split_words(words, parser)
    other = [*_chosen(other, names.choices)]
    for position, word in enumerate(other):
        flag, _, value = word.partition("=")
        if flag.removeprefix("--") in NO_COUNTERPART and flag.startswith("--"):
            raise UserError(flag, "has no counterpart here", NO_COUNTERPART[flag[2:]])
        value = value or "".join(other[position + 1 : position + 2])
        if flag == "--resume_from_checkpoint" and value.endswith(".safetensors"):
            what = f"{value} contains the weights of a LoRA only, without the state of its training"
            raise UserError(flag, what, f"start a new run from them with --init_lora_from={value}")
    _check_given_once(own, other)
    args = parser.parse(own)
    found, notes = [f"--lora_rank={args.rank}", f"--lora_alpha={args.network_alpha:g}"], []
    targets: tuple[str, ...] = () if args.use_peft_lora else names.every
    if args.target_name is not None:
        # A Chinese keyboard writes other commas.
        given = [name.strip() for name in re.split("[,;\uff0c\u3001]", args.target_name) if name.strip()]
        targets = tuple(names.translate(name) for name in given)
        if not targets:
            raise UserError("--target_name", f"{args.target_name!r} names no layer", "write it as q,k,v,ffn.0,ffn.2")
        if not args.use_peft_lora:
            notes.append(WHOLE_NAMES)
    return Translation([*found, *(["--lora_target_modules", *targets] if targets else []), *other], notes)


def _chosen(words: Sequence[str], choices: Mapping[str, tuple[str, Mapping[str, str]]]) -> Iterator[str]:
    """Yield the words with the flags and values of `choices` translated. Raises UserError for another value."""
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag not in choices:
            yield word
            continue
        here, values = choices[flag]
        value = value if equals else next(remaining, "")
        if value not in values:
            raise UserError(flag, f"{value!r} has no counterpart here", f"use {' or '.join(values)}")
        yield f"{here}={values[value]}"


def _check_given_once(own: Sequence[str], other: Sequence[str]) -> None:
    """Raise UserError for a flag of train_lora.py together with that of train.py which it is translated to."""
    given = {word.partition("=")[0] for word in own}
    for word in other:
        name = word.partition("=")[0]
        if (same := SAME.get(name)) in given:
            raise UserError(name, f"is given together with {same}, which means the same", "remove one of them")


def split_words(words: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Split a command line into the words of a parser's flags with their values, and all others, each in order."""
    own: list[str] = []
    other: list[str] = []
    takes_value = False
    for word in words:
        action = parser._option_string_actions.get(word.partition("=")[0])
        (own if action is not None or takes_value else other).append(word)
        takes_value = action is not None and action.nargs is None and "=" not in word
    return own, other


def run_translated(train: Path, names: LayerNames) -> NoReturn:
    """Run a family's train.py with the translated command line; it ends the process with its exit code.

    Args:
        train: path of train.py.
        names: the names of the family's layers.
    """
    found: list[Translation] = []
    parse_or_exit(lambda: found.append(translate(sys.argv[1:], names)))
    words, notes = found[0]
    if {"-h", "--help"} & {*words}:
        sys.stdout.write(f"{make_lora_parser().format_help()}\nAll other flags are those of {train}:\n\n")
    elif os.environ.get("RANK", "0") == "0":  # printed by one process
        lines = [*(f"note: {note}" for note in notes), f"train_lora.py: running {train} {shlex.join(words)}"]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    sys.argv = [str(train), *words]
    runpy.run_path(str(train), run_name="__main__")
    sys.exit(0)
