"""What a user may ask of a sampler. It needs no torch: wrong settings are refused immediately."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_eso.errors import ConfigError

Method = Literal["binomial", "fixed", "strided", "left-to-right"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class PlanSettings:
    """How rows are decided; settings that do not apply to the model's objective are refused."""

    method: Method | Literal["auto"] = "auto"
    """binomial, fixed, strided or left-to-right; auto: binomial, and for ar left-to-right."""
    alpha_0: float | None = None
    """Share of the tokens by diffusion; None: as trained."""
    num_steps: int | None = None
    """Diffusion steps; None: as many as tokens."""
    tokens_per_step: int | None = None
    """Instead of num_steps: tokens of a diffusion step, on average."""


def check_settings(settings: PlanSettings) -> None:
    """Refuse settings out of range, or two for one thing, before a model is loaded.

    Raises:
        ConfigError: naming the option.
    """
    if settings.method not in ("auto", *METHODS):
        raise ConfigError(f"--plan {settings.method} is not one of auto, {', '.join(METHODS)}")
    if settings.alpha_0 is not None and not 0 <= settings.alpha_0 <= 1:
        raise ConfigError(f"--alpha-0 {settings.alpha_0} must be in [0, 1]")
    for name in ("num_steps", "tokens_per_step"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if settings.num_steps and settings.tokens_per_step:
        raise ConfigError("--num-steps and --tokens-per-step say the same thing; give one of them")
