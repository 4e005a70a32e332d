"""What a run in a container must see beyond its own folder: data and checkpoints on the shared file system.

Folders of the shared file system are mounted under their own names. Folders of the node itself (copies
in its memory, the cache of remote data) must be mounted by the profile: we cannot know here whether they
exist there.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megatron_eso.config.paths import Place, paths
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ClusterError
from megatron_eso.files import is_remote

_ALWAYS_THERE = ("/dev/shm",)


def mounts_of(configs: list[RunConfig], given: list[str], seen: list[Path]) -> list[str]:
    """Return the ``host:container`` pairs of all folders that runs need and nothing else mounts.

    Args:
        configs: the run, or every task of an array.
        given: the profile's pairs.
        seen: folders that the job script itself mounts.

    Raises:
        ClusterError: if the profile does not mount a folder of the node, or a folder cannot be mounted.
    """
    inside = [*map(str, seen), *_ALWAYS_THERE]
    inside += [pair.split(":")[1 if ":" in pair else 0] for pair in given]
    found: list[str] = []
    for setting, path in (named for config in configs for named in _of_the_node(config)):
        if not _is_below(path, inside):
            raise ClusterError(
                f"{setting}={path} is a folder of the node that the container does not see; add it to "
                f"cluster.container.mounts, as {path}:{path}"
            )
    for setting, path in (named for config in configs for named in _shared(config)):
        if _is_below(path, [*inside, *found]):
            continue
        if ":" in path or "," in path:
            raise ClusterError(
                f"{setting}: {path!r} has ':' or ',' in its name, which separate the mounts of a container"
            )
        found.append(path)
    return [f"{path}:{path}" for path in found]


def _of_the_node(config: RunConfig) -> Iterator[tuple[str, str]]:
    for named in paths(config):
        if named.place is Place.NODE:
            yield named.setting, os.path.abspath(named.path)


def _shared(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the shared folders to mount; the job script already mounts the run's own folder."""
    for named in paths(config):
        if named.place is Place.DATA and not is_remote(named.path):
            split = PurePosixPath(os.path.abspath(named.path))
            # The tokenizer lies beside the splits of a data set.
            yield named.setting, str(split if len(split.parts) < 3 else split.parent)
        elif named.place is Place.SHARED:
            yield named.setting, os.path.abspath(named.path)


def _is_below(path: str, folders: list[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(folder) for folder in folders)
