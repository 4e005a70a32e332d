"""The form that all commands share: plain help texts, plain tracebacks, no shell completion."""

from typing import Any

import typer


def application(**settings: Any) -> typer.Typer:
    """Return a command or a group of commands; further settings are Typer's."""
    return typer.Typer(
        rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, **settings
    )
