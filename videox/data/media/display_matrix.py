"""Display matrices of video frames: how a stored frame is mirrored and turned to become upright."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np


@dataclass(frozen=True, slots=True)
class DisplayTransform:
    """How a stored frame becomes upright: rows and columns are exchanged, then their order is reversed.

    Attributes:
        transpose: exchange rows and columns; first of the three.
        reverse_rows: reverse the order of the rows (mirror top and bottom).
        reverse_columns: reverse the order of the columns (mirror left and right).
    """

    transpose: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False

    @property
    def mirrors(self) -> bool:
        """Whether it mirrors the frame; otherwise it only turns it."""
        return bool((self.transpose + self.reverse_rows + self.reverse_columns) % 2)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return a view of a stored frame [h, w, channels] that is upright."""
        pixels = pixels.transpose(1, 0, 2) if self.transpose else pixels
        return pixels[:: -1 if self.reverse_rows else 1, :: -1 if self.reverse_columns else 1]


AS_STORED = DisplayTransform()


def display_transform(frame: av.VideoFrame) -> DisplayTransform:
    """Return the mirroring and the quarter turns of a frame's display matrix; AS_STORED if it has no matrix.

    The matrix (ISO 14496-12, 8.3.2) maps the stored pixel (x, y) to (a * x + c * y, b * x + d * y), with 16 fractional
    bits; it is stored as [a, b, u, c, d, v, tx, ty, w]. Angles between quarter turns are rounded to the nearest one.
    Scaling and translation are ignored.
    """
    side_data: Any = frame.side_data  # the type in PyAV's stubs does not have this key
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return AS_STORED
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return DisplayTransform(reverse_rows=d < 0, reverse_columns=a < 0)
    return DisplayTransform(transpose=True, reverse_rows=b < 0, reverse_columns=c < 0)
