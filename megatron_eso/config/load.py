"""Read a configuration: defaults, included files, the file itself, ``key=value`` overrides.

A YAML file may hold ``include: [path, ...]``. Paths are relative to the file; later ones win, and
the file itself wins over what it includes. Every error names its file or override.

YAML guesses a type from how a value looks: 4:00:00 is a number in base 60, 010 one in base 8, off is
false. Where the schema has text, the value is the text as written, except null.
"""

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from os.path import expanduser
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from omegaconf.omegaconf import get_yaml_loader  # pyright: ignore[reportPrivateImportUsage]
from yaml import MappingNode, Node, ScalarNode, SequenceNode, YAMLError

from megatron_eso.config.paths import with_paths
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.files import write_whole

INCLUDE_KEY = "include"
TEXT_TAG, NULL_TAG, MERGE_TAG = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))


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
    for source, content in _layers(path, overrides or [], schema):
        _refuse_wrong_keys(content, schema, source)
        try:
            merged = OmegaConf.unsafe_merge(merged, content)  # merge() would copy everything
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_first_lines(error)}") from None
    try:
        found = OmegaConf.to_object(merged)
    except InterpolationResolutionError as error:
        raise ConfigError(
            f"{path or 'overrides'}: {_first_lines(error)}; ${{...}} stands for another setting; a text "
            "that holds it is written \\${...}"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'overrides'}: {_first_lines(error)}") from None
    return with_paths(found, expanduser)  # no shell expands a ~ in these values


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Return the configuration of a run that is to start or to go on; see :func:`load_config`.

    Raises:
        ConfigError: also for the file in a run's own folder, where that was moved or copied and no
            ``folder`` is given: a run would begin, or go on, in the folder that it had before.
    """
    config, here = load_config(path, overrides), path.absolute().parent
    is_a_runs_own = path.name == "config.yaml" and (here / "checkpoints").is_dir()
    is_given = any(override.startswith("folder=") for override in overrides or ())
    if is_a_runs_own and not is_given and Path(config.folder).resolve() != here.resolve():
        raise ConfigError(
            f"{path} is of a run that was moved: it names folder={config.folder}; give folder={here} to "
            "go on here, or folder=runs/NEW for a new run with its settings"
        )
    return config


def to_yaml(config: Any) -> str:
    """Return the configuration as YAML with every field; reading it gives the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(asdict(config))))


def as_literal(text: str) -> str:
    """Return a text escaped for a file or an override, so that ``${`` in it is no reference."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def save_config(config: Any, path: Path) -> None:
    """Write the configuration as YAML; see :func:`megatron_eso.files.write_whole`."""
    write_whole(path, to_yaml(config))


def _literal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(inner) for inner in value]
    return as_literal(value) if isinstance(value, str) else value


def _layers(
    path: str | Path | None, overrides: list[str], schema: type
) -> list[tuple[str, DictConfig]]:
    layers = _file_layers(Path(path), (), schema) if path is not None else []
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}' is not of the form section.key=value")
        try:
            layers.append((f"override '{override}'", _override(override, schema)))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(f"override '{override}': {_first_lines(error)}") from None
    return layers


def _override(override: str, schema: type) -> DictConfig:
    key, text = re.split(r"(?<!\\)=", override, maxsplit=1)
    content = OmegaConf.from_dotlist([f"{key}=null"])
    kind, inner = schema, OmegaConf.to_container(content)
    while isinstance(inner, dict):  # one level with a single key for each part of the dotted key
        ((part, inner),) = inner.items()
        kind = _kind_below(kind, str(part))
    OmegaConf.update(content, key, _read_yaml(text, kind))
    return content


def _file_layers(
    path: Path, including: tuple[Path, ...], schema: type
) -> list[tuple[str, DictConfig]]:
    path = path.resolve()
    if path in including:
        chain = " -> ".join(str(p) for p in (*including, path))
        raise ConfigError(f"configuration files include each other in a circle: {chain}")
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder; give a configuration file, such as the config.yaml of a run"
        )
    if not path.is_file():
        by = f" (included by {including[-1]})" if including else ""
        raise ConfigError(f"configuration file {path} does not exist{by}")
    try:
        with path.open(encoding="utf-8") as file:
            content = _read_yaml(file, schema)
        if not isinstance(content, dict | None):
            raise ConfigError(f"{path}: expected sections with keys, found {content!r:.80}")
        content = OmegaConf.create(content or {})
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    layers = []
    for include in _includes(content, path):
        layers += _file_layers(path.parent / include, (*including, path), schema)
    return [*layers, (str(path), content)]


def _includes(content: DictConfig, path: Path) -> list[str]:
    """Remove the included paths from a file's content and return them."""
    found = content.pop(INCLUDE_KEY, [])
    paths = list(found) if isinstance(found, list | ListConfig) else [found]
    if not all(isinstance(item, str) for item in paths):
        raise ConfigError(
            f"{path}: {INCLUDE_KEY} is {found}, which is neither a path nor a list of paths; write "
            f"{INCLUDE_KEY}: [FILE.yaml], or leave {INCLUDE_KEY} out"
        )
    return paths


def _read_yaml(source: str | IO[str], kind: Any) -> Any:
    """Return the value of YAML whose schema type is ``kind``, with text as it was written."""
    loader = get_yaml_loader()(source)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_as_written(node, kind, {}))
    finally:
        loader.dispose()


def _as_written(node: Node, kind: Any, done: dict[tuple[int, Any], Node]) -> Node:
    """Return a copy of a YAML node in which a scalar is a string where the schema has text.

    ``done`` holds the copy of each node, so that aliases share it and a node may contain itself.
    """
    if (id(node), kind) in done:
        return done[id(node), kind]
    written = done[id(node), kind] = copy(node)
    if isinstance(node, ScalarNode):
        written.tag = TEXT_TAG if _is_text(kind) and node.tag != NULL_TAG else node.tag
    elif isinstance(node, SequenceNode):  # where the schema has a mapping: a merge key's list
        item = _kind_below(kind, "") if get_origin(kind) is list else kind
        written.value = [_as_written(value, item, done) for value in node.value]
    elif isinstance(node, MappingNode):
        written.value = [
            (key, _as_written(value, kind, done)) if key.tag == MERGE_TAG
            else (_as_written(key, str, done), _as_written(value, _kind_below(kind, key.value), done))
            for key, value in node.value
        ]  # fmt: skip
    return written


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in get_args(kind))
    return kind is str


def _kind_below(kind: Any, key: str) -> Any:
    """Return the type, without None, of a key's value or a list's items; None if there is no such key."""
    if is_dataclass(kind):
        below = next((f.type for f in fields(kind) if f.name == key), None)
    else:
        below = get_args(kind)[-1] if get_origin(kind) in (list, dict) else None
    others = [other for other in get_args(below) if other is not NoneType]
    return others[0] if isinstance(below, UnionType) and len(others) == 1 else below


def _refuse_wrong_keys(content: DictConfig, schema: type, source: str) -> None:
    problems = list(_wrong_keys(content, schema, "", schema))
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))


def _wrong_keys(content: Any, schema: Any, prefix: str, root: Any) -> Iterator[str]:
    """Yield one message per key that the schema lacks, or whose value is no whole list or mapping there."""
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
        value, kind = content._get_node(key), types[key]
        if value is None or OmegaConf.is_interpolation(content, str(key)):
            continue
        misfit = _misfit(value, kind, full)
        if misfit:
            yield f"'{full}' {misfit}"
        # Inside lists of sections, omegaconf itself names the wrong key.
        yield from _wrong_keys(value, kind, f"{full}.", root)


def _misfit(value: Any, kind: Any, full: str) -> str:
    """Return why a value is no section, list or mapping where the schema has one; empty if it fits."""
    is_map, is_list = isinstance(value, DictConfig), isinstance(value, ListConfig)
    plain = "a list" if is_list else "named values" if is_map else repr(value._value())[:80]
    found = "null" if plain == "None" else plain
    if is_dataclass(kind) and not is_map:
        return f"is a section, not {found}: write {full}.KEY=VALUE, or leave it out"
    if get_origin(kind) is dict and not is_map:
        return f"holds named values, not {found}: write {full}={_form(kind)}"
    if get_origin(kind) is not list:
        return ""
    if is_map:
        return f"is a list, which can only be replaced whole: write {full}={_form(kind)}"
    if not is_list:
        return f"is a list, not {found}: write {full}={_form(kind)}"
    items = [
        value._get_node(i) for i in range(len(value)) if not OmegaConf.is_interpolation(value, i)
    ]
    if is_dataclass(get_args(kind)[0]) and not all(isinstance(one, DictConfig) for one in items):
        return f"is a list of named values: write {full}={_form(kind)}"
    return ""


def _form(kind: Any) -> str:
    """Return how to write a list, or a mapping of names to values."""
    if get_origin(kind) is dict:
        return "{NAME: ..., NAME: ...}"
    item = get_args(kind)[0]
    keys = ", ".join(f"{f.name}: ..." for f in fields(item)) if is_dataclass(item) else ""
    return f"[{{{keys}}}, ...]" if keys else "[..., ...]"


def _elsewhere(key: str, schema: Any) -> list[str]:
    """Return the ``section.key`` names of all sections that hold a field of this name."""
    sections = [(f.name, f.type) for f in fields(schema) if is_dataclass(f.type)]
    return [f"{name}.{key}" for name, kind in sections if key in {g.name for g in fields(kind)}]


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    keep = [
        line for line in lines if line and not line.startswith(("object_type", "reference_type"))
    ]
    return "; ".join(keep)
