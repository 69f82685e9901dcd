"""Tokenizers: loaded from a model folder, or refused where they do not fit the text encoder or split text wrongly."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from videox.errors import MODEL, UserError
from videox.models.config_files import read_json
from videox.models.configured import Component
from videox.models.downloads import download_hint
from videox.models.folder import convert_load_errors

SENTENCE = (
    "a red fox runs over the hill, 2 years old"  # of words and characters that every tokenizer of the models has
)
LEAST_SHARE = 0.9  # of the rows of the text encoder's embedding that are tokens; the published ones have over 0.99
LENGTH = 64  # tokens, more than SENTENCE has in any of them
PARTS = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path, encoder_class: Any, encoder: Component, probe: str) -> Any:  # noqa: ANN401 - of transformers
    """Return the tokenizer of a folder, after checks that need no weights.

    transformers builds a tokenizer of a few special tokens where files are missing, and its classes may rebuild one
    from its vocabulary with other rules. Neither is an error there: captions would lose their words or spaces.

    Args:
        folder: the tokenizer's folder.
        encoder_class: class of the text encoder, of transformers.
        encoder: the text encoder.
        probe: a text with every kind of character that the family's prompts may contain.

    Raises:
        UserError: (MODEL) a file is damaged; the number of tokens does not fit the text encoder's embedding; a
            sentence is not the same after encoding and decoding; it pads on the left; or it splits the probe in
            another way than its tokenizer.json.
    """
    for name in PARTS:
        if (folder / name).is_file():
            read_json(folder / name)
    reference = None
    if (folder / "tokenizer.json").is_file():
        with _refusing(folder / "tokenizer.json"):
            reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
            reference.no_padding()
            reference.no_truncation()
    with _refusing(folder / PARTS[0]):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        size = max([len(tokenizer), *(1 + number for number in tokenizer.get_vocab().values())])
    _check_size(folder, size, _embedding_rows(encoder_class, encoder))
    with _refusing(folder / PARTS[0]):
        encoded = tokenizer(SENTENCE, padding="max_length", max_length=LENGTH, truncation=True)
        mask = list(encoded.attention_mask)
        decoded = str(tokenizer.decode(encoded.input_ids, skip_special_tokens=True))
        split, expected = tokenizer(probe).input_ids, reference.encode(probe).ids if reference else None
    if "".join(decoded.lower().split()) != SENTENCE.replace(" ", ""):
        what = f"turns the text {SENTENCE!r} into {decoded[:100]!r}"
        raise UserError(str(folder), what, download_hint(folder), MODEL)
    if mask != sorted(mask, reverse=True):
        what = "pads texts on the left, and the text encoder is used with padding on the right"
        raise UserError(str(folder / PARTS[0]), what, "set its padding_side to right", MODEL)
    if expected is not None and split != expected:
        what = f"is loaded as {type(tokenizer).__name__}, which splits text differently from its tokenizer.json"
        hint = "set the tokenizer_class that its tokenizer_config.json was saved with"
        raise UserError(str(folder), what, hint, MODEL)
    return tokenizer


def _embedding_rows(encoder_class: Any, encoder: Component) -> int:  # noqa: ANN401 - of transformers
    """Return the number of rows of the text encoder's embedding, by its configuration."""
    with convert_load_errors(encoder_class, encoder.path):
        config = encoder_class.config_class.from_dict(dict(encoder.config))
        return int(getattr(config, "vocab_size", None) or config.text_config.vocab_size)


def _check_size(folder: Path, size: int, rows: int) -> None:
    """Raise UserError if a tokenizer has ids that the embedding does not have, or far fewer."""
    if LEAST_SHARE * rows <= size <= rows:
        return
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    what = f"makes a tokenizer of {size:,} tokens, and the text encoder's embedding has {rows:,} rows (found: {found})"
    raise UserError(str(folder), what, download_hint(folder), MODEL)


class _refusing(AbstractContextManager[None]):
    """Turns what transformers and tokenizers raise for a damaged file into a UserError that names it.

    tokenizers raises plain Exceptions, and PanicException, a BaseException, for errors that it did not foresee.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        panic = kind is not None and kind.__name__ == "PanicException"
        if isinstance(error, UserError) or not (isinstance(error, Exception) or panic):
            return
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"does not load as a tokenizer ({cause})"
        raise UserError(str(self.path), what, download_hint(self.path.parent), MODEL) from error
