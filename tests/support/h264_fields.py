"""Writes H.264 streams of separate fields, as camcorders do and encoders of FFmpeg do not (ITU-T H.264, 7.3)."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av

WIDTH = HEIGHT = 32
_I, _P, _B = 2, 0, 1  # slice types, table 7-6
_PCM = {_I: 25, _P: 30, _B: 48}  # mb_type of a macroblock of raw samples in each


class _Writer:
    def __init__(self) -> None:
        self.bits = ""

    def u(self, value: int, count: int = 1) -> _Writer:
        self.bits += f"{value:0{count}b}"
        return self

    def ue(self, *values: int) -> _Writer:
        for value in values:
            code = f"{value + 1:b}"
            self.bits += "0" * (len(code) - 1) + code
        return self

    def unit(self, header: int) -> bytes:
        """Return the NAL unit, after a start code."""
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        payload, zeros = bytearray(), 0
        for byte in int(bits, 2).to_bytes(len(bits) // 8):
            if zeros >= 2 and byte <= 3:
                payload.append(3)
                zeros = 0
            payload.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([header]) + bytes(payload)


def parameter_sets(reorder: int) -> bytes:
    """Return the parameter sets of 32x32 pixels; reorder: frames that may be displayed late."""
    sequence = _Writer().u(77, 8).u(0, 8).u(30, 8).ue(0, 0, 0, 4, 2).u(0).ue(1, 0).u(0).u(0).u(1).u(0)
    sequence.u(1).u(0, 8).u(1).u(1).ue(0, 0, 10, 10, reorder, 2)
    picture = _Writer().ue(0, 0).u(0, 2).ue(0, 0, 0).u(0, 3).ue(0, 0, 0).u(1).u(0, 2)
    return sequence.unit(0x67) + picture.unit(0x68)


def _picture(value: int, kind: int, number: int, order: int, field: int | None, idr: bool, reference: bool) -> bytes:
    """Return a field (0 top, 1 bottom) or frame (None) whose pixels all have this value."""
    slices = _Writer().ue(0, kind, 0).u(number % 16, 4)
    slices.u(0) if field is None else slices.u(1).u(field)
    if idr:
        slices.ue(0)
    slices.u(order % 256, 8)
    if kind == _B:
        slices.u(1)
    if kind != _I:
        slices.u(0).u(0)
    if kind == _B:
        slices.u(0)
    if reference:
        slices.u(0, 2) if idr else slices.u(0)
    slices.ue(0).ue(1)
    for _ in range(4 if field is None else 2):
        if kind != _I:
            slices.ue(0)
        slices.ue(_PCM[kind])
        slices.bits += "0" * (-(len(slices.bits) + 8) % 8)
        slices.bits += f"{value:08b}" * 256 + f"{128:08b}" * 128
    return slices.unit((0x60 if reference else 0) | (5 if idr else 1))


def pictures(
    count: int,
    *,
    group: int = 6,
    b_frames: bool = False,
    progressive: tuple[int, ...] = (),
    bottom_first: bool = False,
) -> list[tuple[int, list[bytes]]]:
    """Return (number of the frame in the order of display, its pictures), in the order of the stream.

    Args:
        count: frames.
        group: frames from one keyframe to the next.
        b_frames: every second frame of a group, except its last, is a B-frame.
        progressive: frames that are stored as one picture.
        bottom_first: the bottom field comes first.
    """
    order = []
    for start in range(0, count, group):
        numbers = list(range(start, min(start + group, count)))
        if b_frames:
            for at in range(1, len(numbers) - 1, 2):
                numbers[at], numbers[at + 1] = numbers[at + 1], numbers[at]
        order += [(number, start) for number in numbers]
    frames, frame_number = [], 0
    for at, (number, start) in enumerate(order):
        is_b = at + 1 <= len(order) and at > 0 and order[at - 1][0] > number
        idr = number == start
        frame_number = 0 if idr else frame_number
        parities = (None,) if number in progressive else (1, 0) if bottom_first else (0, 1)
        stored = []
        for parity in parities:
            first = parity == parities[0]
            kind = _I if idr and first else _B if is_b else _P
            place = 2 * (number - start) + (0 if parity is None or first else 1)
            stored.append(_picture(value_of(number), kind, frame_number, place, parity, idr and first, not is_b))
        frames.append((number, stored))
        if not is_b:
            frame_number += 1
    return frames


def value_of(number: int) -> int:
    """Return the luma of all pixels of a frame."""
    return 20 + number * 7 % 200


def write_fields(path: Path, count: int = 20, *, together: bool = False, times: str = "all", **layout: object) -> Path:
    """Write a file whose video has a packet for each field.

    Args:
        path: the file; its suffix names the container.
        count: frames.
        together: both fields of a frame in one packet of the container, with one time.
        times: all: each packet has its own presentation time; decoding: presentation times are those of decoding.
        **layout: of `pictures`.
    """
    frames = pictures(count, **layout)  # type: ignore[arg-type]
    reorder = 1 if layout.get("b_frames") else 0
    raw = parameter_sets(reorder) + b"".join(b"".join(stored) for _, stored in frames)
    tick = Fraction(1, 50)
    with av.open(io.BytesIO(raw), format="h264") as source, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        stream.time_base = tick
        dts = 0
        for at, (number, stored) in enumerate(frames):
            access_unit = [
                b"\0\0\0\1\x09\xf0" + (parameter_sets(reorder) if at == 0 else b"") + stored[0],
                *stored[1:],
            ]
            for field, data in enumerate([b"".join(access_unit)] if together else access_unit):
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.dts = stream, tick, dts
                packet.pts = dts if times == "decoding" else 2 * (number + reorder) + field
                packet.duration = ticks = 2 if together or len(stored) == 1 else 1
                packet.is_keyframe = number % layout.get("group", 6) == 0 and field == 0  # type: ignore[operator]
                file.mux(packet)
                dts += ticks
    return path
