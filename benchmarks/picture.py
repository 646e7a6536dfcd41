"""Makes the picture in the README: one row for each prompt, time from left to right.

Run as `python benchmarks/picture.py`.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import genstream
from genstream.cli.contact_sheet import contact_sheet, evenly
from genstream.cli.pipeline import frames_of_chunk
from genstream.streaming.controls import PromptControl

PROMPTS = (
    "a red circle moving right over a navy background",
    "a blue star bouncing over a teal background",
    "a large cyan triangle moving up and a purple square moving left on brown",
)
SWITCHED = ("a green square moving down", "an orange circle moving right")
SECONDS = 6.0
COLUMNS = 8
SEED = 0
_TARGET = Path(__file__).parent / "pictures" / "readme.png"


def frames_of(
    pipe: genstream.CausalVideoPipeline, prompt: str, switched_to: str | None = None
) -> NDArray[np.uint8]:
    """COLUMNS frames, evenly over SECONDS; the prompt is switched in the middle, if at all."""
    state = pipe.start(pipe.request(prompt, seconds=SECONDS, seed=SEED))
    frames: list[NDArray[np.uint8]] = []
    for chunk in pipe.run(state):
        frames += [*frames_of_chunk(chunk)]
        if switched_to is not None and len(frames) >= SECONDS / 2 * pipe.config.default_fps:
            state.submit(PromptControl(prompt=switched_to))
            switched_to = None
    return evenly(np.stack(frames), COLUMNS)


def main() -> None:
    """Generate all rows and write the picture."""
    pipe = genstream.CausalVideoPipeline.from_pretrained("toyworld")
    rows = [(prompt, frames_of(pipe, prompt)) for prompt in PROMPTS]
    rows.append((f"{SWITCHED[0]}, then: {SWITCHED[1]}", frames_of(pipe, *SWITCHED)))
    _TARGET.parent.mkdir(exist_ok=True)
    contact_sheet(rows).save(_TARGET, optimize=True)


if __name__ == "__main__":
    main()
