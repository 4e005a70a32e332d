"""Many samples of one model: plans by objective, batches, and their results."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_eso.config.schema import ObjectiveConfig
from megatron_eso.errors import ConfigError
from megatron_eso.model.replica import Replica
from megatron_eso.sample.decoders import check_prompts
from megatron_eso.sample.plan import (
    DecodingPlan,
    check_prefix,
    make_block_plan,
    make_plan,
)
from megatron_eso.sample.prompt import Canvas
from megatron_eso.sample.sampler import Choice, Sampled, check_choice, fill_rows
from megatron_eso.sample.settings import PlanSettings, check_settings


@dataclass(frozen=True)
class Batch:
    """Rows that were filled together."""

    first_row: int
    plan: DecodingPlan
    sampled: Sampled
    padding: Tensor

    def token_rows(self, stop_token: int | None = None) -> list[list[int]]:
        """Return each row's tokens without its padding, up to the first stop token that was decided."""
        rows = []
        given = self.plan.order[:, : self.plan.num_given].tolist()
        whole = zip(self.sampled.tokens.tolist(), given, self.padding.tolist(), strict=True)
        for tokens, known, padding in whole:
            decided = set(range(len(tokens))).difference(known)
            ends = (place for place in sorted(decided) if tokens[place] == stop_token)
            rows.append(tokens[padding : next(ends, len(tokens))])
        return rows


def check_request(
    objective: ObjectiveConfig, canvas: Canvas, settings: PlanSettings, choice: Choice
) -> None:
    """Refuse what the objective, the rows or the settings do not allow, before a model is loaded.

    Raises:
        ConfigError: naming what to change.
    """
    check_choice(choice)
    # Every row has the same number of open tokens, so the first one's plan stands for all.
    one = Canvas(canvas.tokens[:1], canvas.is_given[:1], canvas.padding[:1])
    plan = plan_for(objective, one, settings, choice)
    check_prompts(objective, plan.num_given, canvas.padding)


def plan_for(
    objective: ObjectiveConfig, canvas: Canvas, settings: PlanSettings, choice: Choice
) -> DecodingPlan:
    """Return the plan that the model's objective follows.

    Raises:
        ConfigError: for settings that do not apply to the objective.
    """
    check_settings(settings)
    left = canvas.num_open
    common = {"seed": choice.seed, "first_row": choice.first_row}
    steps = settings.num_steps
    if settings.tokens_per_step:
        steps = max(round(left / settings.tokens_per_step), 1)
    _refuse_what_does_not_apply(objective, settings, left, steps)
    if objective.name == "ar":
        check_prefix(
            canvas.is_given, canvas.is_given.shape[1] - left, "a model of objective.name=ar"
        )
        return make_plan(canvas.is_given, alpha_0=0.0, method="left-to-right", **common)
    method = "binomial" if settings.method == "auto" else settings.method
    if objective.name == "bd3lm":
        size = objective.block_size
        return make_block_plan(
            canvas.is_given,
            block_size=size,
            num_steps=steps,
            method=method,
            **common,  # type: ignore[arg-type]
        )
    alpha_0 = _alpha_0(objective, settings)
    if settings.tokens_per_step:
        steps = max(round(alpha_0 * left / settings.tokens_per_step), 1)
    return make_plan(
        canvas.is_given,
        alpha_0=alpha_0,
        num_steps=steps,
        method=method,
        **common,  # type: ignore[arg-type]
    )


def _alpha_0(objective: ObjectiveConfig, settings: PlanSettings) -> float:
    """Return the share of the tokens decided by diffusion."""
    if settings.alpha_0 is not None:
        return settings.alpha_0
    # A strided plan decides every token by diffusion, whatever the training did.
    return objective.alpha_0 if objective.name == "eso" and settings.method != "strided" else 1.0


def _refuse_what_does_not_apply(
    objective: ObjectiveConfig, settings: PlanSettings, num_open: int, steps: int | None
) -> None:
    if steps is not None and steps > num_open:
        raise ConfigError(f"--num-steps {steps} is more than the {num_open} tokens to decide")
    if objective.name == "ar":
        if settings.method not in ("auto", "left-to-right") or settings.alpha_0 or steps:
            raise ConfigError(
                "a model of objective.name=ar decides one token at a time from left to right: --plan, "
                "--alpha-0, --num-steps and --tokens-per-step do not apply; leave them out"
            )
        return
    if objective.name != "eso" and settings.alpha_0 not in (None, 1.0):
        raise ConfigError(
            f"--alpha-0 {settings.alpha_0}: a model of objective.name={objective.name} decides every "
            "token by diffusion; leave --alpha-0 out (or 1)"
        )
    if settings.method == "left-to-right" and (settings.alpha_0 or steps):
        raise ConfigError(
            "--plan left-to-right decides one token at a time: --alpha-0, --num-steps and "
            "--tokens-per-step do not apply; leave them out or take another plan"
        )
    if steps and _alpha_0(objective, settings) == 0:
        trained = " (as trained)" if settings.alpha_0 is None else ""
        raise ConfigError(
            f"with alpha_0 = 0{trained} every token is decided alone and there is no diffusion step: "
            "--num-steps and --tokens-per-step do not apply; leave them out or raise --alpha-0"
        )


def generate(
    replica: Replica,
    canvas: Canvas,
    settings: PlanSettings,
    choice: Choice,
    *,
    batch_rows: int = 16,
    on_plan: Callable[[DecodingPlan], None] = lambda plan: None,
) -> Iterator[Batch]:
    """Yield the canvas's rows filled, ``batch_rows`` at a time; rows do not depend on the batch size.

    Args:
        replica: the model; every rank of the replica must make the same call.
        canvas: all rows.
        settings: how they are decided.
        choice: temperature, nucleus, seed.
        batch_rows: rows at once.
        on_plan: called with each batch's plan before it is filled.
    """
    if batch_rows < 1:
        raise ConfigError(f"--batch {batch_rows} must be at least 1")
    for first in range(0, len(canvas.tokens), batch_rows):
        part = slice(first, first + batch_rows)
        rows = Canvas(canvas.tokens[part], canvas.is_given[part], canvas.padding[part])
        mine = replace(choice, first_row=choice.first_row + first)
        plan = plan_for(replica.config.objective, rows, settings, mine)
        on_plan(plan)
        sampled = fill_rows(replica, rows.tokens, plan, mine, padding=rows.padding)
        yield Batch(mine.first_row, plan, sampled, rows.padding)
