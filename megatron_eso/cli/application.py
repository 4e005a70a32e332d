"""The form that all commands share: plain help text, plain tracebacks, no shell completion."""

from typing import Any

import typer


def application(**settings: Any) -> typer.Typer:
    """Return a command or a group of commands; ``settings`` go to Typer."""
    return typer.Typer(
        rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, **settings
    )
