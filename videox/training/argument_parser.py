"""argparse with one-line errors that name the fix, the nearest flag for a mistyped one, and types with ranges."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from videox.distributed.cuda_variables import set_cuda_variables
from videox.errors import FLAGS, INTERRUPTED, PeerFailed, UserError, error_text
from videox.training.run_files import flags_from_files, switch_booleans
from videox.training.synonyms import hint_for, nearest_hint

NEAR_CHOICE = 0.6  # difflib ratio from which a value is taken for a mistyped choice
AUTO = "auto"  # value of a flag that is then decided by the model
NEVER_READ = "the original trainer parsed it and never used it: remove it"
REMOVED = {
    "auto_tile_batch_size": "use --slot_fill cost, which fills a micro-batch with other small clips, never with one clip twice",
    "keep_all_node_same_token_length": "remove it: the plan decides the sizes of all processes before the first step",
    "enable_text_encoder_in_dataloader": "use --latent_cache, which encodes each caption once, not once per epoch",
    "multi_stream": "use --latent_cache, with which no encoder runs during training",
    "report_model_info": "remove it: loss, gradient norm and speed of every step are in metrics.jsonl",
    **dict.fromkeys(
        (
            "noise_offset", "snr_loss", "random_flip", "max_train_samples", "input_perturbation", "prediction_type",
            "variant", "revision", "non_ema_revision", "push_to_hub", "hub_model_id", "hub_token", "cache_dir", "local_rank",
        ),
        NEVER_READ,
    ),
}  # fmt: skip


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description and its example command as written; shows defaults that say something."""

    def __init__(self, prog: str, **settings: Any) -> None:  # noqa: ANN401 - argparse's own keywords
        super().__init__(prog, **{"max_help_position": 34, **settings})

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        says_nothing = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
        return text if says_nothing or action.required else f"{text} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        is_place = action.dest.endswith(("path", "dir", "meta", "from", "from_checkpoint", "paths"))
        return getattr(action.type, "metavar", "PATH" if is_place else "VALUE")


class OneOrMore(argparse.Action):
    """Stores a single value as itself and several as a list, so that args.json is that of older runs for one value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse's own signature
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401 - argparse's own signature
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Store the values of one occurrence of the flag."""
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for every mistake and names the nearest flag for an unknown one.

    Args:
        recipes: the folder of recipes of --recipe; None: the script has no run files.
        introduction: printed instead of an error if the command line is empty.
        settings: of argparse.ArgumentParser.
    """

    def __init__(self, *, recipes: Path | None = None, introduction: str | None = None, **settings: Any) -> None:  # noqa: ANN401
        defaults = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(**{**defaults, **settings})
        self._recipes, self._introduction = recipes, introduction
        self._files: dict[str, Path] = {}

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        flag = next((word.rstrip(":,") for word in message.split() if word.startswith("--")), "command line")
        where = f"{flag} in {self._files[flag]}" if flag in self._files else flag
        raise UserError(where, message.removeprefix(f"argument {flag}: "), _choice_hint(message) or "see --help")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line; every word must belong to a flag.

        Args:
            argv: words of the command line; None reads sys.argv.

        Raises:
            UserError: a flag was removed, is unknown or mistyped, or a value is out of range.
        """
        words = list(argv if argv is not None else sys.argv[1:])
        if not words and self._introduction:
            self.exit(FLAGS, self._introduction)
        for word in words:
            if word.startswith("--") and word.endswith(
                "=--"
            ):  # argparse drops the two dashes and stores an empty list
                raise UserError(word.removesuffix("=--"), "'--' is not a value", "see --help")
        # Before argparse, which would rather report that the flag which was meant is missing. A word with a space is a
        # value such as "--a dog"; a word with one dash may be a value, too, unless it is a known synonym.
        for word in (word.split("=", 1)[0] for word in words if word.startswith("-") and " " not in word):
            if word in self._option_string_actions:
                continue
            if (name := word[2:].replace("-", "_")) in REMOVED and word.startswith("--"):
                raise UserError(word, "was removed", REMOVED[name])
            if word.startswith("--") or hint_for(word, self._option_string_actions) is not None:
                raise self._unknown(word)
        from_files, files = flags_from_files(words, self._option_string_actions, self._recipes)
        self._files = {flag: path for flag, path in files.items() if flag not in {w.split("=", 1)[0] for w in words}}
        args, unknown = self.parse_known_args(switch_booleans([*from_files, *words], self._option_string_actions))
        if unknown:
            raise self._unknown(unknown[0].split("=", 1)[0])
        return args

    def _unknown(self, word: str) -> UserError:
        return UserError(word, "is not a flag of this script", nearest_hint(word, list(self._option_string_actions)))


def _choice_hint(message: str) -> str:
    """Return the choice that is spelled most like the value of argparse's message, as a hint; "" if none is near."""
    found = re.search(r"invalid choice: '?([^']*)'? \(choose from (.*)\)$", message)
    if found is None:
        return ""
    near = difflib.get_close_matches(found[1].lower(), found[2].replace("'", "").split(", "), 1, NEAR_CHOICE)
    return f"did you mean {near[0]}" if near else ""


def parse_or_exit(
    parse: Callable[[], Any],
    plan: Callable[[argparse.Namespace], int] | None = None,
    planned: Callable[[argparse.Namespace], object] = bool,
) -> None:
    """Parse the command line and exit at once with one line on stderr if it is wrong, or after --help.

    A script calls it above its heavy imports, so that --help and a mistyped flag are answered before torch is loaded;
    its main parses again. The variables that torch and CUDA read when they start are set here, too.

    Args:
        parse: returns the flags, or raises UserError.
        plan: a dry run, which returns the exit code; None: flags alone are checked.
        planned: whether these flags ask for a plan that needs none of the heavy imports.
    """
    try:
        parsed = parse()
        set_cuda_variables(os.environ, deterministic=getattr(parsed, "deterministic", False))
        if plan is not None and planned(parsed):
            sys.exit(plan(parsed))
    except UserError as error:
        sys.stderr.write(f"{error_text(error)}\n")
        sys.exit(error.exit_code)
    except PeerFailed as error:  # another process of this machine reports it
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was trained\n")
        sys.exit(INTERRUPTED)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite int or float within [low, high]."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError as why:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number" if kind is int else f"{text!r} is not a number"
            ) from why
        if not low <= value <= high or (math.isinf(value)):
            bottom, top = (str(bound) if kind is int else f"{bound:g}" for bound in (low, high))
            reach = "or more" if math.isinf(high) else f"to {top}"
            raise argparse.ArgumentTypeError(f"{text} is outside {bottom} {reach}")
        return value

    parse.metavar = "N" if kind is int else "X"  # type: ignore[attr-defined]
    return parse


def number_or_auto(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """An argparse type: a finite int or float within [low, high], or the word AUTO."""
    parse_number = number(kind, low, high)

    def parse(text: str) -> float | str:
        return AUTO if text == AUTO else parse_number(text)

    parse.metavar = f"{'N' if kind is int else 'X'}|{AUTO}"  # type: ignore[attr-defined]
    return parse


COUNT = number(int, 1, 10**9)
COUNT_OR_ZERO = number(int, 0, 10**9)
SHARE = number(float, 0, 1)
