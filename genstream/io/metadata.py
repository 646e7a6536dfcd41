"""What a generated file says about itself."""

from dataclasses import dataclass

from genstream import __version__


@dataclass(frozen=True, kw_only=True)
class VideoMetadata:
    """Prompt, seed and model that made a file; `tags` are written into every format."""

    prompt: str
    seed: int
    model: str

    def tags(self) -> dict[str, str]:
        """Name and text of each tag, the note that the file is AI-generated among them."""
        return {
            "title": self.prompt,
            "prompt": self.prompt,
            "seed": str(self.seed),
            "model": self.model,
            "comment": f"AI-generated (genstream {__version__})",
        }

    def line(self) -> str:
        """All of it as one text, for formats with a single comment field."""
        return f"{self.tags()['comment']}; prompt: {self.prompt}; seed: {self.seed}; model: {self.model}"
