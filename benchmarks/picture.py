"""Makes the picture in the README: one row for each prompt, time from left to right.

Run as `python benchmarks/picture.py`.
"""

from pathlib import Path

from PIL import Image, ImageDraw

import genstream
from genstream.cli.pipeline import frames_of_chunk
from genstream.streaming.controls import PromptControl

PROMPTS = (
    "a red circle moving right",
    "a small yellow star bouncing",
    "a large cyan triangle moving up and a purple square moving left",
)
SWITCHED = ("a green square moving down", "an orange circle moving right")
SECONDS = 6.0
COLUMNS = 8
SEED = 0
_GAP_PX = 4
_CAPTION_PX = 18
_TARGET = Path(__file__).parent / "pictures" / "readme.png"


def frames_of(
    pipe: genstream.CausalVideoPipeline, prompt: str, switched_to: str | None = None
) -> list[Image.Image]:
    """COLUMNS frames, evenly over SECONDS; the prompt is switched in the middle, if at all."""
    state = pipe.start(pipe.request(prompt, seconds=SECONDS, seed=SEED))
    frames: list[Image.Image] = []
    for chunk in pipe.run(state):
        frames += [Image.fromarray(frame) for frame in frames_of_chunk(chunk)]
        if switched_to is not None and len(frames) >= SECONDS / 2 * pipe.config.default_fps:
            state.submit(PromptControl(prompt=switched_to))
            switched_to = None
    return [frames[round(column * (len(frames) - 1) / (COLUMNS - 1))] for column in range(COLUMNS)]


def contact_sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Captions with their frames below."""
    width, height = next(iter(rows.values()))[0].size
    step = height + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (COLUMNS * (width + _GAP_PX) - _GAP_PX, len(rows) * step - _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, frames) in enumerate(rows.items()):
        draw.text((2, row * step + 2), caption, fill="black", font_size=_CAPTION_PX - 6)
        for column, frame in enumerate(frames):
            sheet.paste(frame, (column * (width + _GAP_PX), row * step + _CAPTION_PX))
    return sheet


def main() -> None:
    """Generate all rows and write the picture."""
    pipe = genstream.CausalVideoPipeline.from_pretrained("toyworld")
    rows = {prompt: frames_of(pipe, prompt) for prompt in PROMPTS}
    rows[f"{SWITCHED[0]}, then: {SWITCHED[1]}"] = frames_of(pipe, *SWITCHED)
    _TARGET.parent.mkdir(exist_ok=True)
    contact_sheet(rows).save(_TARGET, optimize=True)


if __name__ == "__main__":
    main()
