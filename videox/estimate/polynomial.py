"""Polynomials in the tokens of a sample, up to the square."""

from __future__ import annotations

from typing import NamedTuple


class Polynomial(NamedTuple):
    """constant + linear S + quadratic S^2."""

    constant: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def __call__(self, tokens: float) -> float:
        """Return the value at S = tokens."""
        return self.constant + self.linear * tokens + self.quadratic * tokens * tokens


def total(*parts: Polynomial) -> Polynomial:
    """Return the sum of polynomials."""
    return Polynomial(*(sum(column) for column in zip(*parts, strict=True))) if parts else Polynomial()
