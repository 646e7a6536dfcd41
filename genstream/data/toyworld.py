"""The toy world: endless procedural captioned video with true tracks."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from genstream.data.captions import TRAINING_STYLE, describe
from genstream.data.rendering import paint, signed_distance
from genstream.data.scene import ObjectSpec, Scene, Split, sample_scene
from genstream.data.vocabulary import BACKGROUND_RGB, COLOUR_RGB

__all__ = ["POINTS_PER_OBJECT", "ObjectSpec", "Scene", "Split", "ToyClip", "ToyWorld"]

# Tracked points in radii: the centre, then right, below, left and above; inside of every shape.
_POINTS = np.array([[0.0, 0.0], [0.45, 0.0], [0.0, 0.45], [-0.45, 0.0], [0.0, -0.45]])
POINTS_PER_OBJECT: Final = len(_POINTS)
MINIMUM_SIDE_PX: Final = 32


@dataclass(frozen=True, kw_only=True)
class ToyClip:
    """A window of a scene.

    Args:
        frames: [F, H, W, 3].
        tracks: (x, y) in pixels, [P, F, 2]; object by object, POINTS_PER_OBJECT each, the centre first.
        visible: Whether the point is in the frame and not covered by the object in front, [P, F].
    """

    scene: Scene
    caption: str
    frames: NDArray[np.uint8]
    tracks: NDArray[np.float32]
    visible: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ToyWorld:
    """Renders scenes at one size and frame rate; holds no state."""

    height: int = 128
    width: int = 128
    fps: int = 16

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if (side := getattr(self, name)) < MINIMUM_SIDE_PX:
                raise ValueError(f"{name} must be at least {MINIMUM_SIDE_PX}, got {side}")
        if self.fps < 1:
            raise ValueError(f"fps must be at least 1, got {self.fps}")

    def scene(self, seed: int, split: Split = "train") -> Scene:
        """The scene of a seed, the same forever."""
        return sample_scene(seed, split)

    def caption(self, scene: Scene, variant: int = 0) -> str:
        """One of many captions that hold for the scene; variant 0 is the one its clips carry."""
        return describe(scene, np.random.default_rng((scene.phrasing_seed, variant)), TRAINING_STYLE)

    def frames(self, scene: Scene, num_frames: int, start_frame: int = 0) -> NDArray[np.uint8]:
        """Frames start_frame to start_frame + num_frames - 1 of the endless scene, [F, H, W, 3]."""
        return self._render(scene, self._centres(scene, num_frames, start_frame))

    def clip(self, scene: Scene, num_frames: int, start_frame: int = 0) -> ToyClip:
        """The same frames with their caption and true tracks."""
        centres = self._centres(scene, num_frames, start_frame)
        tracks, visible = self._tracks(scene, centres)
        return ToyClip(
            scene=scene,
            caption=self.caption(scene),
            frames=self._render(scene, centres),
            tracks=tracks,
            visible=visible,
        )

    @property
    def short_side(self) -> int:
        """Pixels."""
        return min(self.height, self.width)

    def _centres(self, scene: Scene, num_frames: int, start_frame: int) -> list[NDArray[np.float64]]:
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if start_frame < 0:
            raise ValueError(f"start_frame must be at least 0, got {start_frame}")
        times_s = np.arange(start_frame, start_frame + num_frames) / self.fps
        return [item.centres(times_s, self.height, self.width) for item in scene.objects]

    def _render(self, scene: Scene, centres: list[NDArray[np.float64]]) -> NDArray[np.uint8]:
        frames = np.empty((len(centres[0]), self.height, self.width, 3), dtype=np.uint8)
        # Filled through one row: filling three channels pixel by pixel is four times slower.
        frames[:] = np.tile(np.array(BACKGROUND_RGB[scene.background], dtype=np.uint8), (self.width, 1))
        for item, path in zip(scene.objects, centres, strict=True):
            paint(frames, item.shape, item.radius * self.short_side, path, COLOUR_RGB[item.colour])
        return frames

    def _tracks(
        self, scene: Scene, centres: list[NDArray[np.float64]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        tracks, visible = [], []
        size = (self.width, self.height)
        for index, (item, path) in enumerate(zip(scene.objects, centres, strict=True)):
            points = path + _POINTS[:, None] * item.radius * self.short_side  # [P, F, 2]
            seen = ((points >= 0) & (points < size)).all(axis=-1)
            for front, front_path in zip(scene.objects[index + 1 :], centres[index + 1 :], strict=True):
                offset = (points - front_path).astype(np.float32)
                radius = front.radius * self.short_side
                seen &= signed_distance(front.shape, offset[..., 0], offset[..., 1], radius) > 0
            tracks.append(points.astype(np.float32))
            visible.append(seen)
        return np.concatenate(tracks), np.concatenate(visible)
