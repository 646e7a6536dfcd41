"""An argument parser whose errors are exceptions, reported like all others."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` with a hint at the help."""
        raise ValueError(f"{message} (see {self.prog} --help)")
