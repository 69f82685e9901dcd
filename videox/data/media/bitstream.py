"""What a packet of a video stream contains, read from its headers: pictures, fields, and places to start decoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# Profiles whose sequence parameter set states a chroma format (H.264, 7.3.2.1.1).
_H264_HIGH_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)
_H264_SLICES = (1, 2, 5)  # NAL unit types whose payload begins with a slice header (H.264, table 7-1)
_H264_IDR, _H264_SEI, _H264_SPS, _H264_PPS = 5, 6, 7, 8
_HEVC_SEI = 39  # a message before the picture (H.265, table 7-1)
# In 4:4:4 pictures, versions of x264 before this one coded some coefficients wrongly. FFmpeg's decoder knows the
# version from a message that is in the first packet only, and decodes wrongly after a seek.
_X264, _X264_CORRECT = re.compile(rb"x264 - core (\d+)"), 151
_ORIENTATION = 47  # payload type of the display orientation in both (H.264 and H.265, annex D)
_HEVC_CLOSED = (19, 20)  # IDR_W_RADL and IDR_N_LP (H.265, table 7-1): no frame after them refers to one before them
_HEVC_VCL = range(32)
_HEVC_VPS, _HEVC_SPS, _HEVC_PPS = 32, 33, 34
_B_PICTURES = {"mpeg4": 2, "mpeg1video": 3, "mpeg2video": 3}  # the coding type that means a B-picture
_SMALL = 20  # bytes; an MPEG-4 packet below this may be a placeholder that gives no frame

_Identity = tuple[int, int]  # of a parameter set: its NAL unit type and its number


class Content(NamedTuple):
    """What a packet contains.

    Attributes:
        frames: frames that begin in it: 1, except 0 for the second field of a frame, for frames that are not displayed
            and for packets without a picture, and 2 or more for packed frames.
        closed: every frame after it can be decoded from here on; None if its headers do not say.
        reordered: it is a B-picture, which comes out of the decoder before a picture that precedes it in the stream;
            None if its headers do not say.
        certain: `frames` is known; if not, only decoding shows how many frames come of it.
        standalone: a decoder that starts here has the parameter sets that are in force; if not, they are in an earlier
            packet and differ from those that the container states.
        turned: it has a message of H.264 or HEVC that says how frames are turned and mirrored for display.
        after_loss: a picture that H.264 pictures refer to is missing before it, by their numbers.
    """

    frames: int
    closed: bool | None = None
    reordered: bool | None = None
    certain: bool = True
    standalone: bool = True
    turned: bool = False
    after_loss: bool = False


def content_reader(codec: str, extradata: bytes | None) -> Callable[[bytes], Content]:
    """Return the function that reads the content of the packets of one stream, called once for each, in order.

    Args:
        codec: FFmpeg's name of the codec.
        extradata: the codec's headers as the container stores them.
    """
    if codec == "h264":
        return H264(extradata or b"").read
    if codec == "hevc":
        return _HEVC(extradata or b"").read
    if codec in _B_PICTURES:
        return lambda data: _mpeg(data, codec)
    return {"vp8": _vp8, "vp9": _vp9}.get(codec, _one_frame)


def may_be_interlaced(codec: str, extradata: bytes | None) -> bool:
    """Return whether the frames of a stream may be stored as two packets, one for each field."""
    if codec != "h264":
        return False
    sets = H264(extradata or b"").sequences.values()
    return not sets or any(not sequence.frames_only for sequence in sets)


class _Sequence(NamedTuple):
    """What reading a slice header needs of a sequence parameter set."""

    frame_number_bits: int
    frames_only: bool
    separate_planes: bool
    full_chroma: bool  # 4:4:4
    gaps_allowed: bool  # frame numbers may be left out, as those of temporal layers that were removed


class _ParameterSets:
    """The parameter sets of an H.264 or HEVC stream: those that the container states, and those in force.

    A file whose packets contain other sets than its container states, and not at each keyframe, is decoded correctly
    from its beginning only. Repacking a stream by its encoder's options, or joining two, makes such files.

    Args:
        stated: (identity, NAL unit) of the sets that the container states.
    """

    def __init__(self, stated: Iterable[tuple[_Identity, bytes]]) -> None:
        self._stated = {identity: unit.rstrip(b"\0") for identity, unit in stated}
        self._in_force = dict(self._stated)
        self._own: set[_Identity] = set()

    def begin_packet(self) -> None:
        self._own.clear()

    def take(self, identity: _Identity, unit: bytes) -> None:
        self._in_force[identity] = unit.rstrip(b"\0")  # zeros between units do not belong to them
        self._own.add(identity)

    @property
    def standalone(self) -> bool:
        """Whether the container and the current packet give all sets that are in force."""
        return all(
            identity in self._own or self._stated.get(identity) == unit for identity, unit in self._in_force.items()
        )


class H264:
    """Reads the packets of an H.264 stream (ITU-T H.264, 7.3) as far as the fields in the slice headers.

    Args:
        extradata: an avcC box (ISO 14496-15), or NAL units after start codes.
    """

    def __init__(self, extradata: bytes) -> None:
        self.sequences: dict[int, _Sequence] = {}
        self._sequence_of_picture: dict[int, int] = {}
        self._first_field: tuple[int, bool] | None = None  # (frame number, bottom) of a field without its second
        self._last_number: int | None = None  # frame number of the last picture that others may refer to
        self._length_size = 0
        if len(extradata) > 6 and extradata[0] == 1:
            self._length_size = (extradata[4] & 3) + 1
            stated = [*_avcc_parameter_sets(extradata)]
        else:
            stated = [*_units(extradata, 0)]
        identities = [self._parameter_set(unit) for unit in stated]
        self._sets = _ParameterSets((name, unit) for name, unit in zip(identities, stated, strict=True) if name)

    def read(self, data: bytes) -> Content:
        """Return the content of the next packet. A field is paired with the field before it as FFmpeg's decoder does:
        if it has the same frame number and the other parity.
        """
        frames, closed, reordered, turned, lost = 0, False, False, False, False
        pictures = 0
        self._sets.begin_packet()
        # As FFmpeg's decoder: start codes, though the container states lengths. Some programs write such MP4 files.
        if self._length_size == 4 and data.startswith(b"\0\0\0\1") and int.from_bytes(data[5:9]) > len(data) > 8:
            self._length_size = 0
        for unit in _units(data, self._length_size):
            kind = unit[0] & 31
            identity = self._parameter_set(unit)
            if identity:
                self._sets.take(identity, unit)
            turned = turned or (kind == _H264_SEI and _has_orientation(unit[1:]))
            if kind == _H264_SEI and self._is_old_x264(unit):
                self._sets.take((_H264_SEI, 0), unit)
            if kind not in _H264_SLICES or len(unit) < 3:
                continue
            bits = _Bits(_without_emulation(unit[1:33]))
            if bits.ue() != 0 and pictures:  # first_mb_in_slice: not the first slice of a picture
                continue
            pictures += 1
            slice_type, sequence = bits.ue() % 5, self._sequence_of(bits.ue())
            number, bottom = _frame_number(bits, sequence)
            closed = closed or kind == _H264_IDR
            reordered = reordered or slice_type == 1
            lost = self._is_after_loss(sequence, number, kind == _H264_IDR, bool(unit[0] & 0x60)) or lost
            if bottom is None:
                self._first_field = None
                return Content(frames + 1, closed, reordered, True, self._sets.standalone, turned, lost)
            frames += self._begins_frame((number, bottom))
        return Content(frames, closed and frames > 0, reordered, True, self._sets.standalone, turned, lost)

    def _is_old_x264(self, message: bytes) -> bool:
        found = _X264.search(message)
        full_chroma = any(sequence.full_chroma for sequence in self.sequences.values())
        return full_chroma and found is not None and int(found[1]) < _X264_CORRECT

    def _begins_frame(self, field: tuple[int, bool]) -> bool:
        first = self._first_field
        if first is not None and first == (field[0], not field[1]):
            self._first_field = None
            return False
        self._first_field = field
        return True

    def _sequence_of(self, picture_set: int) -> _Sequence | None:
        sequence = self.sequences.get(self._sequence_of_picture.get(picture_set, -1))
        if sequence is None and len(self.sequences) == 1:
            sequence = next(iter(self.sequences.values()))
        return sequence

    def _is_after_loss(self, sequence: _Sequence | None, number: int, is_idr: bool, is_reference: bool) -> bool:
        """Return whether a picture's frame number is neither that of the last reference picture nor the next one
        (H.264, 7.4.3), so that a reference picture between them is missing.
        """
        lost = False
        if sequence is not None and self._last_number is not None and not is_idr and not sequence.gaps_allowed:
            lost = (number - self._last_number) % (1 << sequence.frame_number_bits) > 1
        if is_idr or is_reference:
            self._last_number = number
        return lost

    def _parameter_set(self, unit: bytes) -> _Identity | None:
        """Keep what slice headers need of a parameter set, and return its identity; None for any other unit."""
        kind = unit[0] & 31 if unit else 0
        if kind not in (_H264_SPS, _H264_PPS):
            return None
        bits = _Bits(_without_emulation(unit[1:]))
        if kind == _H264_SPS:
            number, sequence = _sequence_parameter_set(bits)
            self.sequences[number] = sequence
        else:
            number = bits.ue()
            self._sequence_of_picture[number] = bits.ue()
        return kind, number


def _sequence_parameter_set(bits: _Bits) -> tuple[int, _Sequence]:
    profile = bits.u(8)
    bits.u(16)
    number, separate, chroma = bits.ue(), False, 1
    if profile in _H264_HIGH_PROFILES:
        chroma = bits.ue()
        separate = chroma == 3 and bool(bits.u(1))
        bits.ue(), bits.ue(), bits.u(1)
        if bits.u(1):
            _skip_scaling_lists(bits, 8 if chroma != 3 else 12)
    frame_number_bits = bits.ue() + 4
    order_type = bits.ue()
    if order_type == 0:
        bits.ue()
    elif order_type == 1:
        bits.u(1), bits.ue(), bits.ue()
        for _ in range(min(bits.ue(), 255)):
            bits.ue()
    bits.ue()  # number of reference frames
    gaps_allowed = bool(bits.u(1))
    bits.ue(), bits.ue()  # width, height
    return number, _Sequence(frame_number_bits, bool(bits.u(1)), separate, chroma == 3, gaps_allowed)


def _frame_number(bits: _Bits, sequence: _Sequence | None) -> tuple[int, bool | None]:
    """Return the frame number of a picture, and whether it is a bottom field; None for a frame.

    Args:
        bits: of a slice header, after pic_parameter_set_id (H.264, 7.3.3).
        sequence: that of the picture; without it, the picture is taken for a frame.
    """
    if sequence is None:
        return 0, None
    if sequence.separate_planes:
        bits.u(2)
    number = bits.u(sequence.frame_number_bits)
    is_field = not sequence.frames_only and bool(bits.u(1))
    return number, bool(bits.u(1)) if is_field else None


def _skip_scaling_lists(bits: _Bits, lists: int) -> None:
    for number in range(lists):
        if not bits.u(1):
            continue
        last = following = 8
        for _ in range(16 if number < 6 else 64):
            if following:
                code = bits.ue()  # signed: 0, 1, -1, 2, -2, ...
                following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
            last = following or last


class _Bits:
    """Reads unsigned and Exp-Golomb numbers (H.264, 9.1) from bytes; past the end, bits are 0."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def u(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            return 0
        return self._value >> self._left & ((1 << count) - 1)

    def ue(self) -> int:
        zeros = 0
        while self._left > 0 and not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    """Yield the NAL units of a packet, each after its length, or after a start code if length_size is 0."""
    if not length_size or data[: length_size + 1] in (b"\0\0\0\1\x09", b"\0\0\1\x09"):
        at = data.find(b"\0\0\1")
        while at >= 0:
            end = data.find(b"\0\0\1", at + 3)
            unit = data[at + 3 : end if end >= 0 else len(data)]
            if unit:
                yield unit
            at = end
        return
    at = 0
    while at + length_size < len(data):
        length = int.from_bytes(data[at : at + length_size])
        at += length_size
        unit = data[at : at + length]
        if unit:
            yield unit
        at += length


def _avcc_parameter_sets(extradata: bytes) -> Iterator[bytes]:
    at = 5
    for mask in (31, 255):  # sequence parameter sets, then picture parameter sets
        if at >= len(extradata):
            return
        count = extradata[at] & mask
        at += 1
        for _ in range(count):
            length = int.from_bytes(extradata[at : at + 2])
            yield extradata[at + 2 : at + 2 + length]
            at += 2 + length


def _without_emulation(data: bytes) -> bytes:
    return data.replace(b"\0\0\3", b"\0\0")


def _hevc_length_size(extradata: bytes) -> int:
    """Return the bytes of a NAL unit's length in an hvcC stream (ISO 14496-15); 0 for start codes."""
    is_hvcc = len(extradata) > 22 and (extradata[0] or extradata[1] or extradata[2] > 1)
    return (extradata[21] & 3) + 1 if is_hvcc else 0


def _hvcc_parameter_sets(extradata: bytes) -> Iterator[bytes]:
    at = 23
    for _ in range(extradata[22]):
        count = int.from_bytes(extradata[at + 1 : at + 3])
        at += 3
        for _ in range(count):
            length = int.from_bytes(extradata[at : at + 2])
            yield extradata[at + 2 : at + 2 + length]
            at += 2 + length


class _HEVC:
    """Reads the packets of an HEVC stream (ITU-T H.265, 7.3) as far as the type of the first slice.

    Args:
        extradata: an hvcC box (ISO 14496-15), or NAL units after start codes.
    """

    def __init__(self, extradata: bytes) -> None:
        self._length_size = _hevc_length_size(extradata)
        stated = [*(_hvcc_parameter_sets(extradata) if self._length_size else _units(extradata, 0))]
        identities = [_hevc_identity(unit) for unit in stated]
        self._sets = _ParameterSets((name, unit) for name, unit in zip(identities, stated, strict=True) if name)

    def read(self, data: bytes) -> Content:
        """Return the content of the next packet."""
        self._sets.begin_packet()
        turned = False
        for unit in _units(data, self._length_size):
            kind = unit[0] >> 1 & 63
            identity = _hevc_identity(unit)
            if identity:
                self._sets.take(identity, unit)
            turned = turned or (kind == _HEVC_SEI and _has_orientation(unit[2:]))
            if kind in _HEVC_VCL:
                return Content(1, kind in _HEVC_CLOSED, standalone=self._sets.standalone, turned=turned)
        return Content(0, False, turned=turned)


def _hevc_identity(unit: bytes) -> _Identity | None:
    """Return the type and number of a parameter set (H.265, 7.3.2); None for any other unit."""
    kind = unit[0] >> 1 & 63 if unit else 0
    bits = _Bits(_without_emulation(unit[2:66]))
    if kind == _HEVC_VPS:
        return kind, bits.u(4)
    if kind == _HEVC_PPS:
        return kind, bits.ue()
    if kind != _HEVC_SPS:
        return None
    bits.u(4)
    layers = bits.u(3)  # temporal sub-layers below the highest
    bits.u(1 + 96)  # general profile, tier and level (7.3.3)
    present = [(bits.u(1), bits.u(1)) for _ in range(layers)]  # of each sub-layer: profile, level
    bits.u(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.u(88 * profile + 8 * level)
    return kind, bits.ue()


def _has_orientation(messages: bytes) -> bool:
    """Return whether one of the messages (H.264 and H.265, 7.3.2.3) after a unit's header is a display orientation."""
    data, at = _without_emulation(messages), 0
    while at + 2 < len(data):
        numbers = []
        for _ in range(2):  # payload type, payload size: bytes of 255, and a last one, are added up
            number = 0
            while at < len(data) and data[at] == 255:
                number, at = number + 255, at + 1
            numbers.append(number + (data[at] if at < len(data) else 0))
            at += 1
        if numbers[0] == _ORIENTATION:
            return True
        at += numbers[1]
    return False


def _mpeg(data: bytes, codec: str) -> Content:
    """Return the content of an MPEG-1, MPEG-2 or MPEG-4 packet.

    MPEG-4 packets of AVI files may hold two pictures ("packed bitstream") or a placeholder of a few bytes. MPEG-1 and
    MPEG-2 packets hold one frame, of one or two pictures.
    """
    code = b"\0\0\1\xb6" if codec == "mpeg4" else b"\0\0\1\0"
    at = data.find(code)
    if at < 0:
        return Content(0, False, False, certain=codec != "mpeg4")
    if codec == "mpeg4":
        second = data.find(code, at + 4)
        kind = data[at + 4] >> 6 if at + 4 < len(data) else 0
        return Content(1, None, kind == _B_PICTURES[codec], certain=second < 0 and len(data) >= _SMALL)
    kind = data[at + 5] >> 3 & 7 if at + 5 < len(data) else 0
    return Content(1, None, kind == _B_PICTURES[codec])


def _one_frame(data: bytes) -> Content:
    del data
    return Content(1)


def _vp8(data: bytes) -> Content:
    """VP8 stores frames that are only referred to, never displayed; bit 4 is the display flag (RFC 6386, 9.1)."""
    return Content(1 if data and data[0] & 0x10 else 0)


def _vp9(data: bytes) -> Content:
    """A packet of one VP9 frame that is not displayed gives none; a superframe ends in a frame that is displayed."""
    if not data or data[-1] & 0xE0 == 0xC0:
        return Content(1)
    bits = _Bits(data[:2])
    bits.u(2)
    if (bits.u(1) | bits.u(1) << 1) == 3:  # profile; the fourth has a reserved bit
        bits.u(1)
    if bits.u(1):  # show_existing_frame
        return Content(1)
    bits.u(1)
    return Content(bits.u(1))
