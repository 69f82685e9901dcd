"""Tests of videox.estimate.stand_in_data: data described on the command line."""

from __future__ import annotations

import pytest

from videox.errors import UserError
from videox.estimate.stand_in_data import describe_data


def test_clips_and_images_are_described() -> None:
    index = describe_data(["2x5s@24fps:1280x720", "3:1024x768", "1x2.5s@29.97fps:720x1280"])
    assert index.kind.tolist() == [1, 1, 0, 0, 0, 1]
    assert index.frames.tolist() == [120, 120, 1, 1, 1, 75]
    assert index.width.tolist() == [1280, 1280, 1024, 1024, 1024, 720]
    assert index.height.tolist() == [720, 720, 768, 768, 768, 1280]
    assert index.fps.tolist() == pytest.approx([24, 24, 0, 0, 0, 29.97], rel=1e-6)
    assert index.usable.all()


@pytest.mark.parametrize(
    "text", ["", "200", "200x5s", "200x5@24fps:1280x720", "200x5s@24fps", "0x5s@24fps:10x10", "5:0x3", "-1:3x3", "1x0s@24fps:9x9", "99999999999:1x1"]
)  # fmt: skip
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="200x5s@24fps:1280x720"):
        describe_data([text])
