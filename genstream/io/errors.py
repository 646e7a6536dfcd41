"""What goes wrong with files, as one exception."""


class OutputError(OSError):
    """An output path cannot be written; the message names the path and what is allowed."""
