"""Read a configuration: defaults, included files, the file itself, ``key=value`` overrides.

A YAML file may start with ``include: [path, ...]``; paths are relative to the file, later ones win,
and the file itself wins over what it includes. Every error names the file or override it stands in.
"""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError

INCLUDE_KEY = "include"


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, schema: type = RunConfig
) -> Any:
    """Return the frozen configuration object of a YAML file with overrides applied.

    Args:
        path: YAML file; None starts from the defaults alone.
        overrides: ``section.key=value`` strings, applied last, in order.
        schema: dataclass that defines the valid keys.

    Raises:
        ConfigError: for a missing file, a wrong key (with the nearest valid ones) or a wrong value.
    """
    merged = OmegaConf.structured(schema)
    for source, content in _layers(path, overrides or []):
        _refuse_unknown_keys(content, schema, source)
        try:
            merged = OmegaConf.merge(merged, content)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_first_lines(error)}") from None
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'overrides'}: {_first_lines(error)}") from None


def to_yaml(config: Any) -> str:
    """Return the configuration as YAML, every field spelled out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_config(config: Any, path: Path) -> None:
    """Write the configuration as YAML; see :func:`write_whole`."""
    write_whole(path, to_yaml(config).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or as before, also after a crash; alone if it is that already.

    Raises:
        OSError: with the file's name, if it cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _layers(path: str | Path | None, overrides: list[str]) -> list[tuple[str, DictConfig]]:
    layers = _file_layers(Path(path), ()) if path is not None else []
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}' is not of the form section.key=value")
        try:
            layers.append((f"override '{override}'", OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(f"override '{override}': {_first_lines(error)}") from None
    return layers


def _file_layers(path: Path, including: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    path = path.resolve()
    if path in including:
        chain = " -> ".join(str(p) for p in (*including, path))
        raise ConfigError(f"configuration files include each other in a circle: {chain}")
    if not path.is_file():
        by = f" (included by {including[-1]})" if including else ""
        raise ConfigError(f"configuration file {path} does not exist{by}")
    try:
        content = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: expected sections with keys, found a list")
    includes = content.pop(INCLUDE_KEY, [])
    layers = []
    for include in [includes] if isinstance(includes, str) else includes:
        layers += _file_layers(path.parent / include, (*including, path))
    return [*layers, (str(path), content)]


def _refuse_unknown_keys(content: DictConfig, schema: type, source: str) -> None:
    problems = list(_unknown_keys(content, schema, "", schema))
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))


def _unknown_keys(content: Any, schema: Any, prefix: str, root: Any) -> Iterator[str]:
    """Yield one message per key that the schema does not have."""
    if not isinstance(content, DictConfig) or not is_dataclass(schema):
        return
    types = {f.name: f.type for f in fields(schema)}
    for key in content:
        full = f"{prefix}{key}"
        if key not in types:
            near = _elsewhere(str(key), root) or get_close_matches(str(key), types, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(types)}"
            yield f"unknown key '{full}'; {hint}"
            continue
        field_type = types[key]
        if content._get_node(key) is not None and not OmegaConf.is_interpolation(content, str(key)):
            value = content._get_node(key)
            if get_args(field_type) and is_dataclass(get_args(field_type)[0]):
                continue  # lists of sections: omegaconf itself names the wrong key
            yield from _unknown_keys(value, field_type, f"{full}.", root)


def _elsewhere(key: str, schema: Any) -> list[str]:
    """Return ``section.key`` names of other sections that hold a field of this name."""
    sections = [(f.name, f.type) for f in fields(schema) if is_dataclass(f.type)]
    return [f"{name}.{key}" for name, kind in sections if key in {g.name for g in fields(kind)}]


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    keep = [
        line for line in lines if line and not line.startswith(("object_type", "reference_type"))
    ]
    return "; ".join(keep)
