"""Serves every set of flags: a parser whose complaints are one line with the way out, and ranges of numbers."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from videox.errors import UserError

NEVER_READ = "the original parsed it and never read it: leave it out"
GONE = {
    "auto_tile_batch_size": "use --slot_fill cost, which fills a slot with other small clips, never with one clip twice",
    "keep_all_node_same_token_length": "leave it out: the plan decides every process's sizes before the first step",
    "enable_text_encoder_in_dataloader": "use --latent_cache, which encodes each caption once, not once per epoch",
    "multi_stream": "use --latent_cache, with which no encoder runs beside the model",
    "report_model_info": "leave it out: loss, gradient norm and speed of every step are in metrics.jsonl",
    **dict.fromkeys(
        (
            "noise_offset", "snr_loss", "random_flip", "max_train_samples", "input_perturbation", "prediction_type",
            "variant", "revision", "non_ema_revision", "push_to_hub", "hub_model_id", "hub_token", "cache_dir", "local_rank",
        ),
        NEVER_READ,
    ),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every complaint is a UserError, whose unknown flags name the nearest one."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own keywords
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter, **settings}
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        flag = next((word.rstrip(":,") for word in message.split() if word.startswith("--")), "command line")
        raise UserError(flag, message.removeprefix(f"argument {flag}: "), "see --help")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Returns the flags; every word of the command line must be one of them.

        Raises:
            UserError: a flag that is gone, unknown, misspelt or out of range.
        """
        words = list(argv if argv is not None else self._command_line())
        # before argparse, which would rather say that the flag meant is missing; a value such as "--a dog" has a space
        for word in (word.split("=", 1)[0] for word in words if word.startswith("--") and " " not in word):
            if word[2:] in GONE:
                raise UserError(word, "is gone", GONE[word[2:]])
            if word not in self._option_string_actions:
                raise self._unknown(word)
        args, unknown = self.parse_known_args(words)
        if unknown:
            raise self._unknown(unknown[0].split("=", 1)[0])
        return args

    def _unknown(self, word: str) -> UserError:
        near = difflib.get_close_matches(word, list(self._option_string_actions), 1, 0.5)
        return UserError(word, "is not a flag of this script", f"did you mean {near[0]}" if near else "see --help")

    @staticmethod
    def _command_line() -> list[str]:
        return sys.argv[1:]


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Returns an argparse type: a finite int or float within [low, high]."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError as why:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number" if kind is int else f"{text!r} is no number"
            ) from why
        if not low <= value <= high or (math.isinf(value)):
            bottom, top = (str(bound) if kind is int else f"{bound:g}" for bound in (low, high))
            reach = "or more" if math.isinf(high) else f"to {top}"
            raise argparse.ArgumentTypeError(f"{text} is outside {bottom} {reach}")
        return value

    return parse


COUNT = number(int, 1, 10**9)
COUNT_OR_ZERO = number(int, 0, 10**9)
SHARE = number(float, 0, 1)
