"""Frames, latent frames and tokens: the only place that converts between them.

A causal video VAE with temporal ratio r turns the first latent frame into one frame and every later
one into r frames: F = 1 + r (T - 1).
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from numbers import Integral, Real


def frames_of(latent_frames: int, temporal_ratio: int) -> int:
    """Frames that `latent_frames` (>= 1) decode to: F = 1 + r (T - 1)."""
    check_count("latent_frames", latent_frames)
    return 1 + temporal_ratio * (latent_frames - 1)


def latent_frames_of(frames: int, temporal_ratio: int) -> int:
    """Latent frames of a clip of exactly `frames` frames, which must be 1 + r k with k >= 0."""
    remainder = (frames - 1) % temporal_ratio
    if frames < 1 or remainder:
        below = frames - remainder
        nearest = "the nearest is 1" if below < 1 else f"the nearest are {below} and {below + temporal_ratio}"
        raise ValueError(f"num_frames must be 1 + {temporal_ratio}k, got {frames}; {nearest}")
    return latent_frames_covering(frames, temporal_ratio)


def latent_frames_covering(frames: int, temporal_ratio: int) -> int:
    """Fewest latent frames that decode to at least `frames` (>= 1) frames."""
    check_count("frames", frames)
    return 1 + -(-(frames - 1) // temporal_ratio)


def frames_for_seconds(seconds: float, fps: float) -> int:
    """Exactly round(seconds * fps) frames; a duration that rounds to no frame is an error."""
    check_positive("fps", fps)
    check_positive("seconds", seconds)
    if not seconds * fps < float("inf"):
        raise ValueError(f"seconds must give a number of frames at {fps} fps, got {seconds}")
    frames = round(seconds * fps)
    if frames < 1:
        raise ValueError(f"seconds must be long enough for one frame at {fps} fps, got {seconds}")
    return frames


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    check_number(name, value)
    if not 0 < value < float("inf"):  # type: ignore[operator]
        raise ValueError(f"{name} must be a positive number, got {value}")


def check_not_negative(**values: object) -> None:
    """Raise ValueError unless each is a finite number of at least 0, by name."""
    for name, value in values.items():
        check_number(name, value)
        if not 0 <= value < float("inf"):  # type: ignore[operator]
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_guidance(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a guidance scale."""
    check_number(name, value)
    if not 1 <= value < float("inf"):  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 1 (off) and finite, got {value}")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number, of numpy's too."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_unused(settings: object, names: Iterable[str], why: str) -> None:
    """Raise ValueError if any of these settings was given a value that nothing would use.

    Args:
        settings: a dataclass with defaults.
        names: of the settings; their defaults, 0 and None are no such values.
        why: what makes them useless, as "where ..." or "for ...".
    """
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if field.name in names and value not in (field.default, 0, None):
            raise ValueError(f"{field.name} must be left at {field.default!r} {why}, got {value!r}")


def check_whole(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an int, of numpy's too."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    check_whole(name, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_counts(**values: object) -> None:
    """`check_count` of numbers and of each number of lists, by name."""
    for name, value in values.items():
        for each in value if isinstance(value, Sequence) else (value,):
            check_count(name, each)


def check_exclusive(**values: object) -> None:
    """Raise ValueError if two are given, of which one would be ignored."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other, got both")


def check_divides(name: str, value: int, divisor: int) -> None:
    """Raise ValueError unless `value` is a positive multiple of `divisor`."""
    check_whole(name, value)
    if value >= 1 and value % divisor == 0:
        return
    below = value - value % divisor
    nearest = f"the nearest is {divisor}" if below < 1 else f"the nearest are {below} and {below + divisor}"
    raise ValueError(f"{name} must be a positive multiple of {divisor}, got {value}; {nearest}")


def check_same_size(name: str, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raise ValueError unless a picture has the size of the video; both are (height, width) in pixels."""
    if found == wanted:
        return
    (height, width), (video_height, video_width) = found, wanted
    raise ValueError(
        f"{name} is {width}x{height}, the video is {video_width}x{video_height}; resize it first"
        f" (PIL.ImageOps.fit crops what does not fit), or ask for a video of its size, if the model makes one"
    )


def tokens_per_frame(height: int, width: int, spatial_ratio: int, patch: int) -> int:
    """Tokens of one latent frame: (h / patch) (w / patch), with height and width in pixels."""
    pixels_per_token = spatial_ratio * patch
    check_divides("height", height, pixels_per_token)
    check_divides("width", width, pixels_per_token)
    return (height // pixels_per_token) * (width // pixels_per_token)
