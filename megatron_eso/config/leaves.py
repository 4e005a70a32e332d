"""Every setting of a configuration, for facts that its declaration states (ranges, paths)."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Yield the name, the dataclass field and the value of each setting that is not a section.

    Lists yield only the settings of the sections they hold.

    Args:
        settings: dataclass of a configuration; nested sections and lists of sections are included.
        prefix: put before the names, such as ``cluster.``.
    """
    for item in fields(settings):
        name, value = prefix + item.name, getattr(settings, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from leaves(entry, f"{name}[{i}].")
        else:
            yield name, item, value
