"""Which settings hold paths, stated where the setting is declared.

``init_from: str | None = path_to(Place.SHARED, None)`` in a configuration's dataclass gives the default
and says on which file system the path lies. :func:`with_paths` changes all paths (load.py expands a ~ at
the start); :func:`paths` lists them (launch/mounts.py finds what a container must see).
"""

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from megatron_eso.config.leaves import leaves


class Place(Enum):
    """Where a path leads to."""

    RUN = "the run's own folder"
    SHARED = "the shared file system"
    DATA = "a split of a data set on the shared file system, or in an object store"
    NODE = "the node itself: its memory or a local disk"


@dataclass(frozen=True)
class NamedPath:
    """A path that a configuration gives."""

    setting: str
    place: Place
    path: str


def path_to(place: Place, default: str | None) -> Any:
    """Return a dataclass field that holds a path and has this default."""
    return field(default=default, metadata=mark(place))


def mark(place: Place) -> dict[str, Place]:
    """Return the metadata of a dataclass field that holds a path, or a dict of named paths."""
    return {"path": place}


def place_of(setting: Field) -> Place | None:
    """Return where the path of a dataclass field leads; None: the field holds no path."""
    return setting.metadata.get("path")


def paths(settings: Any) -> Iterator[NamedPath]:
    """Yield the paths of a configuration, including its sections and lists of sections."""
    for name, item, value in leaves(settings):
        place = place_of(item)
        if place and isinstance(value, dict):
            yield from (NamedPath(f"{name}.{key}", place, entry) for key, entry in value.items())
        elif place and value:
            yield NamedPath(name, place, value)


def with_paths(settings: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a configuration with ``change`` applied to every path."""

    def changed(item: Field) -> Any:
        value = getattr(settings, item.name)
        if is_dataclass(value):
            return with_paths(value, change)
        if isinstance(value, list):
            return [with_paths(entry, change) if is_dataclass(entry) else entry for entry in value]
        if place_of(item) and isinstance(value, dict):
            return {name: change(entry) for name, entry in value.items()}
        return change(value) if place_of(item) and value else value

    return replace(settings, **{item.name: changed(item) for item in fields(settings)})
