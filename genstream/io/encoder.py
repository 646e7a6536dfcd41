"""mp4, webm and gif through ffmpeg, one frame at a time."""

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from genstream.io.errors import OutputError
from genstream.io.metadata import VideoMetadata
from genstream.io.partial import partial_path

# The matrix is set and tagged: untagged files are shown with other colours by some players.
_BT709 = (
    "-vf scale=out_color_matrix=bt709:out_range=tv -colorspace bt709 -color_primaries bt709 -color_trc bt709"
)

# Each encoder gives its output away at once (no look-ahead, short fragments), so that a file cut off at
# any moment plays up to there. gif: one palette per frame, since a common one would need all frames at once.
_CODEC_ARGUMENTS: Mapping[str, str] = {
    ".mp4": f"{_BT709} -c:v libx264 -preset veryfast -crf 18 -pix_fmt yuv420p -threads 2"
    " -tune zerolatency -g 16 -flush_packets 1"
    " -movflags +frag_keyframe+empty_moov+default_base_moof+use_metadata_tags -f mp4",
    ".webm": f"{_BT709} -c:v libvpx-vp9 -deadline realtime -cpu-used 6 -crf 24 -b:v 0 -pix_fmt yuv420p"
    " -threads 2 -g 16 -lag-in-frames 0 -cluster_time_limit 1000 -flush_packets 1 -f webm",
    ".gif": "-filter_complex split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
    " -flush_packets 1 -f gif",
}
VIDEO_SUFFIXES = tuple(_CODEC_ARGUMENTS)
_GIF_TRAILER = b"\x3b"
_GIF_COMMENT = b"\x21\xfe"
_GIF_SUB_BLOCK_BYTES = 255


class Encoder:
    """An ffmpeg process that turns frames into the partial file of `path`.

    It runs in a session of its own: Ctrl-C at the terminal does not reach it, and it completes the file
    when its input ends, be that by `close` or by the death of this process.
    """

    def __init__(self, path: Path, *, fps: float, width: int, height: int, metadata: VideoMetadata) -> None:
        self._path = path
        self._partial = partial_path(path)
        self._metadata = metadata
        self._messages = tempfile.TemporaryFile()
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-hide_banner", "-loglevel", "error"]
        command += [
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{width}x{height}",
            "-r",
            str(fps),
            "-i",
            "pipe:0",
        ]
        command += ["-fps_mode", "passthrough", *_CODEC_ARGUMENTS[path.suffix.lower()].split()]
        for name, text in metadata.tags().items():
            command += ["-metadata", f"{name}={text}"]
        self._process = subprocess.Popen(
            [*command, _as_file_name(self._partial)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            start_new_session=True,
        )

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Encode `frames` uint8 [F, H, W, 3]; waits while ffmpeg is busy, so nothing piles up."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).data)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def close(self) -> None:
        """Complete the file; raises OutputError where ffmpeg could not."""
        self.release()
        if self._process.returncode != 0:
            raise self._death()
        self._messages.close()
        if self._path.suffix.lower() == ".gif":
            try:
                self._append_gif_comment()
            except OSError as error:
                reason = error.strerror or str(error)
                raise OutputError(f"cannot write output path {str(self._path)!r}: {reason}") from error

    def release(self) -> None:
        """End the process and wait for it, whatever became of the file."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died before; close() reports why
        self._process.wait()

    def _death(self) -> OutputError:
        code = self._process.wait()
        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").split("\n")
        reason = next((line.rpartition(": ")[2] for line in said if "No space left" in line), "")
        reason = reason or "; ".join(line for line in said[:2] if line) or f"ffmpeg ended with code {code}"
        return OutputError(f"cannot write output path {str(self._path)!r}: {reason}")

    def _append_gif_comment(self) -> None:
        """Put a comment block in front of the trailer; ffmpeg's gif writer drops metadata."""
        data = self._metadata.line().encode()
        starts = range(0, len(data), _GIF_SUB_BLOCK_BYTES)
        parts = [data[start : start + _GIF_SUB_BLOCK_BYTES] for start in starts]
        with self._partial.open("r+b") as file:
            file.seek(-1, 2)
            if file.read(1) != _GIF_TRAILER:
                raise OutputError(f"cannot write output path {str(self._path)!r}: the gif is cut off")
            file.seek(-1, 2)
            file.write(
                _GIF_COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0" + _GIF_TRAILER
            )


def _as_file_name(path: Path) -> str:
    """`path` so that ffmpeg takes neither a colon for a protocol nor a dash for an option."""
    return f"file:{path}"
