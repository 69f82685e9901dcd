"""Opening a video file for PyAV, and the errors of FFmpeg."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from videox.data.media.container import MAX_PIXELS, BadMedia, Container, check_pixels, raise_system_error
from videox.errors import plural

# FFmpeg uses these numbers of the operating system for states of its own, such as an index without a keyframe.
_NOT_OF_THE_SYSTEM = (errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EDOM, errno.ERANGE)


@contextmanager
def open_video(path: Path, container: Container) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream that is not a cover picture, single-threaded, in the recognised format only.

    Raises:
        BadMedia: no_video_stream, too_large, unreadable, or undecodable; also for errors of the block.
    """
    with (
        ffmpeg_errors_to_bad_media(),
        av.open(
            str(path.absolute()),  # absolute, so that FFmpeg does not interpret the name as a protocol
            format=container.format,
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        ) as file,
    ):
        videos = [video for video in file.streams.video if not is_cover(video)]
        if not videos:
            raise BadMedia("no_video_stream", _streams_without_video(file))
        context = videos[0].codec_context
        if context is None:
            raise BadMedia("undecodable", "FFmpeg does not know its video codec; encrypted videos look like this too")
        check_pixels(context.width, context.height)
        context.thread_count = 1
        context.copy_opaque = True  # frames carry the number of their packet
        # Checked again by the decoder: the stream may state another size than its container.
        context.options = {"max_pixels": str(MAX_PIXELS)}
        yield file, videos[0]


def is_cover(stream: VideoStream) -> bool:
    """Return whether a stream is a cover picture, as music files have."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _streams_without_video(file: InputContainer) -> str:
    counts = Counter("cover picture" if stream.type == "video" else f"{stream.type} stream" for stream in file.streams)
    names = ", ".join(f"{count} {plural(count, name)}" for name, count in counts.items())
    only_sound = "audio only: " if counts["audio stream"] else ""
    return f"{only_sound}{names or 'no streams'}, no video stream"


@contextmanager
def ffmpeg_errors_to_bad_media() -> Iterator[None]:
    """Raise BadMedia for errors of FFmpeg: unreadable where the system failed, else undecodable."""
    try:
        yield
    except av.error.FFmpegError as error:
        if error.errno in _NOT_OF_THE_SYSTEM:
            raise BadMedia("undecodable", f"FFmpeg cannot read it ({error.__class__.__name__})") from error
        raise_system_error(error)
        raise BadMedia("undecodable", f"{error.strerror}") from error


def data_packets(file: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yield the stream's packets in decoding order, without the empty ones, which decoders take for the end.

    Raises:
        BadMedia: undecodable, for a stream that is encrypted from its beginning: decoders may return noise for it.
    """
    for number, packet in enumerate(file.demux(stream)):
        if number == 0 and packet.has_sidedata("encryption_info"):
            raise BadMedia("undecodable", "it is encrypted (DRM)")
        if packet.size:
            yield packet
