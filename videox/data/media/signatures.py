"""First bytes of files: the format that a decoder may open a file as, or in words what a file is that is no media."""

from __future__ import annotations

import re

HEAD_BYTES = 4096  # bytes of a file that `recognise` and `describe` need

# Names of formats: those of FFmpeg's demuxers for videos and of Pillow's plugins for images. Saved indexes refer to
# them by position, so new ones are appended. The first stands for an unknown format.
FORMATS = (
    "", "PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "HEIF", "mov", "matroska", "mpeg", "flv", "ogg", "asf",
    "avi", "mpegts", "ivf", "yuv4mpegpipe", "mxf", "dv", "mpegvideo", "m4v", "h264", "hevc", "vc1", "obu", "rm", "nut",
    "wtv", "gxf",
)  # fmt: skip
# Streams without a container, which store no times.
ELEMENTARY_FORMATS = ("mpegvideo", "m4v", "h264", "hevc", "vc1", "obu")
_IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "HEIF")

_PREFIXES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"FLV\1", "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"DKIF\0\0", "ivf"),
    (b"YUV4MPEG2 ", "yuv4mpegpipe"),
    (b".RMF\0\0\0", "rm"),
    (b"nut/multimedia container\0", "nut"),
    (b"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d", "wtv"),
    (b"\0\0\0\0\1\xbc\0\0", "gxf"),
)
_TOP_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"meta", b"free", b"skip", b"wide", b"uuid", b"pnot")
_AVIF_BRANDS, _MIXED_BRANDS = (b"avif", b"avis"), (b"mif1", b"msf1")
# Without msf1 (ISO 23008-12, 10.2): a file that is mainly a sequence is a video for FFmpeg, and unknown to Pillow.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_MXF_PARTITION = b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01"  # SMPTE 377-1, 7.1; may follow a run-in
_DV_HEADER = re.compile(rb"\x1f\x07\0[\x3f\xbf]")  # header block of a DIF sequence (IEC 61834-2)
_TS_SYNC = b"\x47"
_TS_STEPS = (188, 192, 204)  # a packet alone, after a timestamp of 4 bytes (Blu-ray), before 16 bytes of parity
_TS_PACKETS = 5  # an offset of the first packet is accepted if so many packets begin with the sync byte
_H264_PROFILES = (44, 66, 77, 83, 86, 88, 100, 110, 118, 122, 128, 138, 139, 134, 135, 244)  # ITU-T H.264, 7.4.2.1.1
# First payload bytes of the Ogg streams of a file (at the beginning of its first pages).
_OGG_VIDEO = (b"\x80theora", b"OVP80", b"BBCD", b"\x01video\0")
_OGG_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")

# What files are that cannot be trained on, by their first bytes.
_OTHER_PREFIXES = (
    (b"PK\3\4", "a zip archive: unpack it"),
    (b"PK\5\6", "an empty zip archive"),
    (b"Rar!\x1a\7", "a RAR archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it"),
    (b"\x1f\x8b\x08", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"%PDF-", "a PDF document"),
    (b"8BPS", "a Photoshop image: save it as PNG or JPEG"),
    (b"\xff\x0a", "a JPEG XL image: convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image: convert it to PNG or JPEG"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image: convert it to PNG or JPEG"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image: convert it to PNG or JPEG"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image: convert it to PNG or JPEG"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"PAR1", "a parquet table: pass it as --train_data_meta"),
    (b"ARROW1", "an Arrow table"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a Windows program"),
    (b"FWS", "a Flash animation: convert it to mp4"),
    (b"CWS", "a Flash animation: convert it to mp4"),
    (b"d8:announce", "a torrent: download what it names"),
    (b"DDS ", "a DDS texture: convert it to PNG"),
    (b"icns", "an icon"),
    (b"qoif", "a QOI image: convert it to PNG"),
    (b"\1\xda", "an SGI image: convert it to PNG"),
    (b"\xc5\xd0\xd3\xc6", "an EPS drawing: convert it to PNG"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile: convert it to PNG"),
    (b"SIMPLE  =", "a FITS image: convert it to PNG"),
    (b"BLP1", "a BLP texture: convert it to PNG"),
    (b"BLP2", "a BLP texture: convert it to PNG"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office or FlashPix document"),
    (b"\0\5\x16\7", "what macOS stores beside a file of the same name without ._: leave it out"),
    (b"\0\0\0\1Bud1", "a .DS_Store of macOS: leave it out"),
    (b"L\0\0\0\1\x14\2\0", "a Windows shortcut: copy the file that it names"),
    (b"gimp xcf", "a GIMP image: save it as PNG or JPEG"),
    (b"BIK", "a Bink video: convert it to mp4"),
    (b"KB2", "a Bink video: convert it to mp4"),
    (b"SMK2", "a Smacker video: convert it to mp4"),
    (b"SMK4", "a Smacker video: convert it to mp4"),
    (b"BBCD", "a Dirac video without a container; convert it to mp4"),
)
_RAW_TIFF = rb"II\*\0.{4}CR"  # a CR2 file: a TIFF file whose first picture is a preview
# The same for formats whose first bytes are not constant.
_OTHER_HEADS = tuple(
    (re.compile(pattern, re.DOTALL), what)
    for pattern, what in (
        (_RAW_TIFF + rb"|IIU\0|IIR[OS]|MMOR|FUJIFILMCCD-RAW", "a raw photo of a camera: save it as PNG or JPEG"),
        (rb"P[1-6]\s+[#\d]|P7\n|P[Ff]\s+\d", "a Netpbm image: convert it to PNG"),
        # The number of images in it, then a reserved byte of the first one.
        (rb"\x00\x00[\x01\x02]\x00[\x01-\x40]\x00...\x00", "an icon"),
        (rb"\x0a[\x00-\x05]\x01[\x01\x02\x04\x08]", "a PCX image: convert it to PNG"),
        (rb"....[\x11\x12\x44]\xaf", "a FLIC animation: convert it to mp4"),
        (rb"....RED[12]", "a RED raw video: convert it to mp4"),
        (rb"PG.{8}[\x14-\x17\x80]\x00", "subtitles (PGS)"),
        # The length of the header, then the header.
        (rb".{5}\x00{3}\{\s*\"", "tensors (safetensors)"),
        (rb"\x80[\x02-\x05][\x95cX}\]]", "a Python pickle"),
    )
)
_AUDIO_PREFIXES = (
    (b"ID3", "MP3"), (b"fLaC", "FLAC"), (b"#!AMR", "AMR"), (b".snd", "AU"), (b"caff", "CAF"), (b"wvpk", "WavPack"),
    (b"MAC ", "Monkey's Audio"), (b"MThd", "MIDI"),
)  # fmt: skip
_RIFF_AUDIO = {b"WAVE": "WAV", b"AIFF": "AIFF", b"AIFC": "AIFF"}
_TEXTS = (
    (r"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer in place of the file: run git lfs pull"),
    (r"(\.\./)*\.git/annex/objects/|/annex/objects/", "a git-annex pointer in place of the file: run git annex get"),
    (r"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype html|<html|<head|<body|<script)", "a web page (HTML) in place of the file: download it again"),
    (r"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg|<svg)", "an SVG drawing: convert it to PNG"),
    (r"(<\?xml[^>]*>\s*)?<Error>", "an error message of a storage service in place of the file: download it again"),
    (r"(<\?xml[^>]*>\s*)?<MPD\b", "a DASH playlist: download the video that it names"),
    (r"<\?xml", "an XML text"),
    (r"#EXTM3U", "a playlist (m3u): download the video that it names"),
    (r"ffconcat version", "a list of files for FFmpeg's concat: join them into one file"),
    (r"WEBVTT\b", "subtitles (WebVTT)"),
    (r"\d+\s*\n\d{1,2}:\d\d:\d\d[,.]\d{3} --> ", "subtitles (SubRip)"),
    (r"\[Script Info\]", "subtitles (ASS)"),
    (r"\{\d+\}\{\d+\}", "subtitles (MicroDVD)"),
    (r"%PDF-", "a PDF document"),
    (r"%!PS", "an EPS drawing or PostScript: convert it to PNG"),
    (r"/\* XPM|#define \w*_width ", "an X11 pixmap: convert it to PNG"),
    (r"#\?RADIANCE", "a Radiance image: convert it to PNG or JPEG"),
    (r"d8:announce", "a torrent: download what it names"),
)  # fmt: skip
_TEXT_CONTROLS = {9, 10, 12, 13, 27}  # the control characters that texts have: tab, line and page breaks, escape
_SHOWN_CHARACTERS, _SHOWN_BYTES = 40, 8


def kind_of(format_name: str) -> str:
    """Return "image" or "video" for one of FORMATS; an animation is an "image" too."""
    return "image" if format_name in _IMAGE_FORMATS else "video"


def recognise(head: bytes) -> str:
    """Return the format, one of FORMATS, of a file that begins with these bytes; "" if none is known.

    Args:
        head: the first HEAD_BYTES bytes, or the whole file if it is shorter.
    """
    for prefix, format_name in _PREFIXES:
        if head.startswith(prefix):
            return "" if re.match(_RAW_TIFF, head, re.DOTALL) else format_name
    found = _recognise_riff(head) or _recognise_boxes(head) or _recognise_bmp(head) or _recognise_ogg(head)
    # Before the start codes, since the timestamp before a packet may look like one.
    found = found or _recognise_ts(head, (0, 4)) or _recognise_elementary(head)
    if not found and _MXF_PARTITION in head:
        return "mxf"
    return found or _recognise_ts(head, range(max(_TS_STEPS)))  # cut between the beginnings of two packets


def describe(head: bytes) -> tuple[str, str]:
    """Return what a file is that `recognise` does not know.

    Args:
        head: the first HEAD_BYTES bytes, or the whole file if it is shorter.

    Returns:
        A class of BadMedia (no_video_stream for sound, else unrecognised), and one line for people. The bytes
        are shown in hexadecimal only if nothing is known of them.
    """
    for pattern, what in _OTHER_HEADS:
        if pattern.match(head):
            return "unrecognised", what
    if text := _text_of(head):
        return "unrecognised", _describe_text(text)
    if audio := _audio_of(head):
        return "no_video_stream", f"audio only ({audio})"
    for prefix, what in _OTHER_PREFIXES:
        if head.startswith(prefix):
            return "unrecognised", what
    if head[257:262] == b"ustar":
        return "unrecognised", "a tar archive: unpack it"
    if not head.strip(b"\0"):
        return "unrecognised", f"its first {len(head)} bytes are all zero, as of a download that did not finish"
    return "unrecognised", f"no known image or video format begins with {head[:_SHOWN_BYTES].hex(' ')}"


def brands_of(head: bytes) -> set[bytes]:
    """Return the major and the compatible brands of an ISO base media file that begins with an ftyp box."""
    if head[4:8] != b"ftyp":
        return set()
    return {head[8:12]} | {head[i : i + 4] for i in range(16, min(int.from_bytes(head[:4]), len(head)), 4)}


def _recognise_riff(head: bytes) -> str:
    known = {b"WEBP": "WEBP", b"AVI ": "avi", b"AVI\x19": "avi"}
    return known.get(head[8:12], "") if head.startswith(b"RIFF") else ""


def _recognise_boxes(head: bytes) -> str:
    if head[4:8] not in _TOP_BOXES:
        return ""
    major = head[8:12] if head[4:8] == b"ftyp" else b""
    brands = brands_of(head)
    if major in (*_AVIF_BRANDS, *_MIXED_BRANDS) and brands & set(_AVIF_BRANDS):
        return "AVIF"
    return "HEIF" if major in _HEIF_BRANDS else "mov"


def _recognise_bmp(head: bytes) -> str:
    is_bmp = head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return "BMP" if is_bmp else ""


def _recognise_ogg(head: bytes) -> str:
    # A file whose streams are all of sound is not opened as a video. Of unknown streams, the decoder decides.
    sound_only = any(name in head for name in _OGG_AUDIO) and not any(name in head for name in _OGG_VIDEO)
    return "ogg" if head.startswith(b"OggS") and not sound_only else ""


def _recognise_ts(head: bytes, offsets: range | tuple[int, ...]) -> str:
    """Return "mpegts" if packets of a transport stream begin at one of these offsets."""
    for first in offsets:
        if head[first : first + 1] != _TS_SYNC:
            continue
        for step in _TS_STEPS:
            found = head[first::step][:_TS_PACKETS]
            # A short file with the first packet at its beginning has fewer packets than are required elsewhere.
            enough = len(found) == _TS_PACKETS or (first in (0, 4) and len(found) >= 3)
            if enough and not found.strip(_TS_SYNC) and not _text_of(head):
                return "mpegts"
    return ""


def _recognise_elementary(head: bytes) -> str:
    """Recognise MPEG program streams, and video streams without a container, by their first start code.

    The codes: ISO 13818-2 table 6-1, ISO 13818-1 table 2-22, ISO 14496-2 table 6-3, ITU-T H.264 table 7-1, ITU-T H.265
    table 7-1, SMPTE 421M annex E, AV1 specification 5.3.
    """
    if head.startswith(b"\x12\0\x0a"):  # temporal delimiter and sequence header, each with its size
        return "obu"
    if _DV_HEADER.match(head):
        return "dv"
    at = 4 if head.startswith(b"\0\0\0\1") else 3
    if at == 3 and not head.startswith(b"\0\0\1"):
        return ""
    code, following = head[at : at + 1], head[at + 1 : at + 2]
    if at == 3 and code and (code in b"\xba\xbb\xbd" or 0xC0 <= code[0] <= 0xEF):
        return "mpeg"  # a pack, a system header, or a packet of a program stream that was cut
    if at == 3 and code in (b"\xb3", b"\xb8"):
        return "mpegvideo"  # sequence or group of pictures
    if at == 3 and (code in (b"\xb0", b"\xb5") or head[3:8] == b"\0\0\0\1\x20"):
        return "m4v"  # visual object sequence, visual object, or video object with its layer
    if at == 3 and code == b"\x0f":
        return "vc1"
    if code in (b"\x40", b"\x42", b"\x46", b"\x4e") and following == b"\x01":
        return "hevc"  # video or sequence parameter set, access unit delimiter, supplemental information
    is_sequence = code in (b"\x67", b"\x27", b"\x47") and following and following[0] in _H264_PROFILES
    return "h264" if is_sequence or code in (b"\x09", b"\x06") else ""


def _describe_text(text: str) -> str:
    for pattern, what in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return what
    begin = " ".join(text[:_SHOWN_CHARACTERS].split())
    return f"a text, not an image or video; it begins with {begin!r}" if begin else "a text of spaces alone"


def _audio_of(head: bytes) -> str:
    """Return the name of the format of a file with sound only, "" if it is none."""
    for prefix, name in _AUDIO_PREFIXES:
        if head.startswith(prefix):
            return name
    if head.startswith((b"RIFF", b"FORM", b"RF64")) and head[8:12] in _RIFF_AUDIO:
        return _RIFF_AUDIO[head[8:12]]
    if head.startswith(b"OggS"):
        return "Ogg"
    # Frame headers of MPEG audio (layer 1 to 3) and of AAC: 11 or 12 bits that are all set, then no reserved value.
    if len(head) > 3 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC"
    is_mpeg = (
        len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 and head[1] & 0x18 != 0x08
    )
    return "MP3" if is_mpeg and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C else ""


def _text_of(head: bytes) -> str:
    """Return the first bytes as a text without leading spaces, "" if they are none."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    # The last character may be cut: up to three bytes of it are left out.
    for cut in range(4 if len(head) >= HEAD_BYTES else 1):
        try:
            text = head[: len(head) - cut].decode(encoding)
        except UnicodeDecodeError:
            continue
        is_text = all(ord(character) >= 32 or ord(character) in _TEXT_CONTROLS for character in text)
        return (text.lstrip() or text) if is_text else ""
    return ""
