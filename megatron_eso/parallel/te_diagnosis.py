"""What ``megatron-eso doctor`` says about Transformer Engine, and whether it can run a configuration."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron_eso.config.precision_rules import (
    OLDEST_TE,
    Machine,
    Version,
    broken,
    wants_te_attention,
)
from megatron_eso.config.precision_table import MACHINE_RULES
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.parallel.te_adapter import (
    BACKENDS,
    AttentionChoice,
    attention_choice,
    require_fused_attention,
    version_of,
)

# Each goes with Transformer Engine OLDEST_TE to NEWEST_TE; tests/test_te_versions.py has the corners.
MEGATRON_RELEASES: tuple[Version, ...] = ((0, 16), (0, 19))
NEWEST_TE: Version = (2, 20)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    consequence: str


def te_findings(machine: Machine, megatron: Version, config: RunConfig) -> list[Finding]:
    """Return what is installed and what follows; asks Transformer Engine only if it and a GPU are there.

    Args:
        machine: what was found.
        megatron: version of Megatron-Core.
        config: the run whose choice of attention is asked for.
    """
    if machine.te is None:
        follows = "backend=auto takes Megatron-Core's own layers; fp8 and attention=te are refused"
        return [Finding("Transformer Engine", machine.te_failure, follows)]
    works = not broken(MACHINE_RULES, config, machine)
    layers = "these" if works else "Megatron-Core's own layers, not these"
    found = [
        Finding("Transformer Engine", _dots(machine.te), f"backend=auto takes {layers}"),
        Finding("release pair", *_pair(machine.te, megatron)),
    ]
    if not machine.gpu:
        return [*found, Finding("TE attention", "no GPU", "its backends cannot be asked about")]
    found.append(Finding("cuDNN (TE's)", _dots(machine.cudnn), "fused and FP8 attention"))
    return [*found, *_of_choice(attention_choice(config))]


def refusals(machine: Machine, config: RunConfig) -> list[str]:
    """Return why this machine would refuse a run, also for its choice of attention."""
    found = broken(MACHINE_RULES, config, machine)
    if not found and wants_te_attention(config):
        try:
            require_fused_attention(config)
        except ConfigError as error:
            found.append(str(error))
    return found


def megatron_version() -> Version:
    """Return the installed Megatron-Core's version; (0,) if its metadata is missing."""
    return _installed("megatron-core")


def require_pair() -> None:
    """Raise a :class:`ConfigError` unless the installed packages are a pair that docs/gpu.md names.

    Reads only metadata, so that an image build can check without a GPU.
    """
    te, megatron = _installed("transformer-engine"), megatron_version()
    if not _is_pair(te, megatron):
        raise ConfigError(": ".join(_pair(te, megatron)))


def _of_choice(choice: AttentionChoice) -> list[Finding]:
    follows = (
        "what attention=te uses" if choice.chosen == BACKENDS[1] else "attention=te is refused"
    )
    rejected = [Finding("  rejected", reason, "") for reason in choice.reasons]
    return [Finding("TE attention chooses", choice.chosen or "nothing", follows), *rejected]


def _pair(te: Version, megatron: Version) -> tuple[str, str]:
    """Return the two versions, and whether they are a pair that docs/gpu.md names."""
    both = f"megatron-core {_dots(megatron)} with Transformer Engine {_dots(te)}"
    if _is_pair(te, megatron):
        return both, "a pair that docs/gpu.md names"
    wanted = (
        f"megatron-core {' or '.join(map(_dots, MEGATRON_RELEASES))} "
        f"with {_dots(OLDEST_TE)} to {_dots(NEWEST_TE)}"
    )
    return both, f"not a pair that docs/gpu.md names (wanted: {wanted}); neither tried nor refused"


def _is_pair(te: Version, megatron: Version) -> bool:
    return megatron[:2] in MEGATRON_RELEASES and OLDEST_TE <= te[:2] <= NEWEST_TE


def _installed(name: str) -> Version:
    try:
        return version_of(version(name))
    except PackageNotFoundError:
        return (0,)


def _dots(numbers: Version) -> str:
    return ".".join(map(str, numbers))
