"""Open video containers of unknown origin."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import av

from keygrip.data.bad_samples import convert_errors, is_of_the_machine
from keygrip.data.untrusted_files import MAX_PIXELS, regular_file

# Containers that contain the images themselves; detected by a file's content, not by its ending. For lists and
# playlists (ffconcat, m3u8, ...) FFmpeg would read the files that they name, from the disk or the network.
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "h264", "hevc")
SAFELY = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}


def _absolute_path(path: str | Path) -> str:
    """Return an absolute path: FFmpeg would interpret the text before a colon in a relative path as a protocol."""
    return str(Path(path).absolute())


def open_source(source: bytes | str | Path) -> tuple[Any, Any]:
    """Open the container and its video stream. One thread decodes: loader workers run in parallel. Raise OSError if the
    file cannot be opened, is none of `CONTAINERS`, or has no video stream or too large frames."""
    if not isinstance(source, bytes):
        regular_file(source)
    try:
        container = av.open(
            io.BytesIO(source) if isinstance(source, bytes) else _absolute_path(source), "r", options=SAFELY
        )
    except (av.FFmpegError, OSError) as error:
        if is_of_the_machine(error):
            raise
        refused = error.errno == errno.EINVAL  # by the whitelist, before any file that it names is read
        reason = f"it is none of the kinds of video that are read: {', '.join(CONTAINERS)}" if refused else str(error)
        raise OSError(f"the video cannot be opened ({reason}); it is cut off or not a video") from error
    stream: Any = container.streams.best("video")  # the stream that players show, not a cover image or a preview
    if stream is None:
        container.close()
        raise OSError("it has no video stream; it is cut off or not a video")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        container.close()
        raise OSError(f"its frames have more than the {MAX_PIXELS} pixels that an image may have")
    stream.thread_type = "NONE"
    # each frame states its own size; larger ones are not decoded. Factor 2: decoders count their padding as pixels too
    stream.codec_context.options = {"max_pixels": str(2 * MAX_PIXELS)}
    return container, stream


def open_container(path: Path) -> tuple[Any, Any]:
    """Open a container as `open_source` does; OSError also names the file."""
    with convert_errors(path, lambda where, what: OSError(f"{where}: {what}")):
        return open_source(path)
