"""Tests of streams that state their orientation themselves, in messages of H.264 and HEVC at keyframes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from tests.data.media.test_video_frames import H264, HEVC_CLOSED, write_clip
from videox.data.media.container import TURNED_IN_STREAM
from videox.data.media.video import READERS, probe, read_clip

FRAMES = 40
# Display orientation of HEVC (ITU-T H.265, D.2.17): not cancelled, no mirroring, turned by 90 degrees, until the end.
HEVC_MESSAGE = b"\0\0\0\1\x4e\x01\x2f\x03" + int("000" + f"{0x4000:016b}" + "1" + "1000", 2).to_bytes(3) + b"\x80"


def with_message(source: Path, target: Path) -> Path:
    """Copy a clip and add a message to its first keyframe (HEVC), or to all (H.264): turned by 90 degrees.

    The filter of H.264 writes start codes, also where the header of the copy, an MP4, says that there are none.
    """
    with av.open(str(source)) as file, av.open(str(target), "w") as copy:
        template = file.streams.video[0]
        stream = copy.add_stream_from_template(template)
        is_hevc = template.codec_context.name == "hevc"
        change = (
            None if is_hevc else BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", template)
        )
        for packet in file.demux(template):
            packets = change.filter(packet if packet.size else None) if change else [packet] if packet.size else []
            for number, out in enumerate(packets):
                if is_hevc and out.pts is not None and out.is_keyframe and number == 0:
                    data, times = HEVC_MESSAGE + bytes(out), (out.pts, out.dts, out.time_base)
                    out = av.Packet(data)
                    out.pts, out.dts, out.time_base, out.is_keyframe = *times, True
                out.stream = stream
                copy.mux(out)
    return target


@pytest.mark.parametrize(
    ("codec", "options", "suffix"),
    [("libx264", H264, "ts"), ("libx264", H264, "mp4"), ("libx265", HEVC_CLOSED, "ts")],
)
def test_all_frames_are_turned_as_the_first_one(
    tmp_path: Path, codec: str, options: dict[str, str], suffix: str
) -> None:
    between = "ts" if codec == "libx265" or suffix == "ts" else "mp4"  # start codes, or lengths
    plain = write_clip(tmp_path / f"plain.{between}", codec, options, frames=FRAMES)
    turned = with_message(plain, tmp_path / f"turned.{suffix}")
    with av.open(str(plain)) as file:
        expected = np.stack(
            [np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC")) for frame in file.decode(video=0)]
        )
    with av.open(str(turned)) as file:
        stated = ["DISPLAYMATRIX" in frame.side_data for frame in file.decode(video=0)]
    assert stated[0] and (codec == "libx265" or not all(stated))  # of H.264, FFmpeg tells it at keyframes only
    height, width = expected.shape[1:3]
    info = probe(turned)
    assert (info.height, info.width, info.frames) == (height, width, FRAMES)
    assert info.decoding & TURNED_IN_STREAM and not probe(plain).decoding
    for reader in READERS:
        for indices in ([*range(FRAMES)], [5, 6], [FRAMES - 1]):
            np.testing.assert_array_equal(read_clip(turned, indices, height, width, reader), expected[indices])
