"""Writes MPEG-2 videos whose frames are two field pictures each, as DVDs and broadcasts have them; no encoder does.

Every macroblock is intra and flat: a block is its DC coefficient alone (ISO 13818-2).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av

WIDTH = HEIGHT = 64
ROWS, COLUMNS = HEIGHT // 32, WIDTH // 16  # macroblocks of a field
# Codes of the number of bits of a DC difference, 0 to 8 (tables B-12 and B-13).
LUMA = ("100", "00", "01", "101", "110", "1110", "11110", "111110", "1111110")
CHROMA = ("00", "01", "10", "110", "1110", "11110", "111110", "1111110", "11111110")
END_OF_BLOCK, INTRA, INTRA_IN_P = "10", "1", "00011"
TOP, BOTTOM = 1, 2


def unit(code: int, *fields: tuple[int, int] | str) -> bytes:
    """Return a start code and its fields, (value, bits) or bits as text, with zeros up to a whole byte."""
    text = "".join(field if isinstance(field, str) else f"{field[0]:0{field[1]}b}" for field in fields)
    text += "0" * (-len(text) % 8)
    return bytes((0, 0, 1, code)) + int(text, 2).to_bytes(len(text) // 8)


def block(value: int, before: int, sizes: tuple[str, ...]) -> str:
    """Return the bits of a flat block (7.2.1); value, before: 0 to 255, of this block and of the one before it."""
    difference = value - before
    size = abs(difference).bit_length()
    bits = f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}" if size else ""
    return sizes[size] + bits + END_OF_BLOCK


def field_picture(number: int, parity: int, shades: list[list[int]], *, predicted: bool) -> bytes:
    """Return a field picture.

    Args:
        number: of the frame in its group, in the order of display.
        parity: TOP or BOTTOM.
        shades: of each macroblock, 0 to 255, [ROWS][COLUMNS].
        predicted: of type P, as the second field of an I-frame usually is; its macroblocks are intra nevertheless.
    """
    kind = ((2, 3), (0xFFFF, 16), (0, 1), (7, 3)) if predicted else ((1, 3), (0xFFFF, 16))
    codes = ((1, 4), (1, 4), (15, 8)) if predicted else ((15, 8), (15, 8))
    picture = unit(0, (number, 10), *kind, (0, 1))
    picture += unit(0xB5, (8, 4), *codes, (0, 2), (parity, 2), (0, 10))
    for row in range(ROWS):
        luma, bits = 128, "000010"  # quantiser scale 1, no extra information
        for column in range(COLUMNS):
            bits += "1" + (INTRA_IN_P if predicted else INTRA)
            for _ in range(4):
                bits += block(shades[row][column], luma, LUMA)
                luma = shades[row][column]
            bits += 2 * block(128, 128, CHROMA)
        picture += unit(1 + row, bits)
    return picture


def shades_of(number: int) -> list[list[int]]:
    """Return the luma of each macroblock of both fields of a frame, [ROWS][COLUMNS]."""
    return [[40 + (number * 9 + 30 * row + 11 * column) % 170 for column in range(COLUMNS)] for row in range(ROWS)]


def frames(count: int, group: int) -> list[bytes]:
    """Return `count` frames of two field pictures; each `group` of them begins with a sequence header."""
    sequence = unit(0xB3, (WIDTH, 12), (HEIGHT, 12), (1, 4), (3, 4), (5000, 18), (1, 1), (100, 10), (0, 3))
    sequence += unit(0xB5, (1, 4), (0x48, 8), (0, 1), (1, 2), (0, 16), (1, 1), (0, 8), (1, 1), (0, 7))
    made = []
    for number in range(count):
        first = field_picture(number % group, TOP, shades_of(number), predicted=False)
        second = field_picture(number % group, BOTTOM, shades_of(number), predicted=True)
        made.append((b"" if number % group else sequence + unit(0xB8, (0, 25), (1, 1), (0, 1))) + first + second)
    return made


def write_mpeg2_fields(path: Path, count: int = 20, *, group: int = 6, dropped: int = 0, apart: bool = False) -> Path:
    """Write a video; its suffix names the container, and .m2v is a stream without one.

    Args:
        path: of the file.
        count: number of frames.
        group: frames from one sequence header to the next.
        dropped: frames left out at the beginning.
        apart: the two fields of a frame are two packets for the container.
    """
    stream_file = path.with_suffix(".m2v")
    made = frames(count, group)
    stream_file.write_bytes(b"".join(made))
    if path.suffix == ".m2v":
        stream_file.write_bytes(b"".join(made[dropped:]))
        return path
    with av.open(str(stream_file)) as file, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(file.streams.video[0])
        stream.time_base = Fraction(1, 50)
        for number, frame in enumerate(made[dropped:]):
            cut = frame.rindex(b"\0\0\1\0") if apart else len(frame)
            for half, data in enumerate(filter(None, (frame[:cut], frame[cut:]))):
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, Fraction(1, 50)
                packet.pts = packet.dts = 2 * number + half
                packet.is_keyframe = not half and (number + dropped) % group == 0
                copy.mux(packet)
    stream_file.unlink()
    return path
