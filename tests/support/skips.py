"""The one way to skip a test: name the tool or version that is missing. The end of the run counts what was skipped."""

from __future__ import annotations

from typing import NoReturn

import pytest


def skip_missing(tool: str, effect: str) -> NoReturn:
    """Skip the running test.

    Args:
        tool: what is missing, with the version if it matters, such as "a C++ compiler" or "torch 2.13.0".
        effect: what is not tested without it.
    """
    pytest.skip(f"needs {tool}: {effect} is not tested")
