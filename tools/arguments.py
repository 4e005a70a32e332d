"""Types of the tools' arguments: an impossible value is an argparse message, not a later traceback."""

import argparse
from pathlib import Path

from megatron_eso.errors import UserError
from megatron_eso.plan.hardware import Hardware, load_hardware


def at_least_1(value: str) -> int:
    """Return a whole number above 0."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def text_file(value: str) -> Path:
    """Return the path of a file that holds UTF-8 text."""
    path = Path(value)
    try:
        if not path.read_text(encoding="utf-8"):
            raise argparse.ArgumentTypeError(f"{path} is empty")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as text: {error}") from None
    return path


def hardware(value: str) -> Hardware:
    """Return a hardware profile, given its name or file."""
    try:
        return load_hardware(value)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
