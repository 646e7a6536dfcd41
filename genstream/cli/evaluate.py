"""`genstream evaluate toyworld`: scores a model on prompts it was never trained on."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
