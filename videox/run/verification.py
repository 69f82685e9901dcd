"""Checks the hashes of a checkpoint before a resume: each process hashes its share of the files."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from videox.errors import plural
from videox.run.checkpoint import read_manifest, verify


class SharedVerification:
    """Verifies checkpoints on all ranks together; the main rank asks by `check`, the others answer in `follow`.

    Args:
        gather: collective that returns every rank's value, in rank order.
        hashes: compare the bytes of all files (sha256), not only their sizes and headers.

    Attributes:
        notes: a line on the last checkpoint whose hashes were checked: how many files, and how long it took.
    """

    def __init__(self, gather: Callable[[object], list[Any]], *, hashes: bool) -> None:
        self._gather, self._hashes = gather, hashes
        self.notes: tuple[str, ...] = ()

    def check(self, checkpoint: Path) -> list[str]:
        """Return what is wrong with a checkpoint, one sentence per file; called on the main rank."""
        problems = verify(checkpoint)
        if problems or not self._hashes:
            return problems
        begun = time.monotonic()
        self._gather(checkpoint)
        problems = self._hash_share(checkpoint)
        if not problems:
            sizes = [entry["size"] for entry in read_manifest(checkpoint)["files"].values()]
            amount = f"{len(sizes)} {plural(len(sizes), 'file')}, {sum(sizes) / 1e9:.2f} GB"
            self.notes = (f"{checkpoint.name}: hashes verified ({amount}, {time.monotonic() - begun:.1f} s)",)
        return problems

    def follow(self) -> Any:  # noqa: ANN401 - whatever the main rank decides
        """Hash a share of each checkpoint that the main rank checks; return what it then gathers instead of a path."""
        while isinstance(order := self._gather(None)[0], Path):
            self._hash_share(order)
        return order

    def _hash_share(self, checkpoint: Path) -> list[str]:
        token = secrets.token_hex(8)  # by which a rank finds its position
        tokens = self._gather(token)
        share = (tokens.index(token), len(tokens))
        return [
            problem for problems in self._gather(verify(checkpoint, hashes=True, share=share)) for problem in problems
        ]
