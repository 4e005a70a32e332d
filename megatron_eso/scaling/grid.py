"""A sweep file becomes a grid of runs: objective (with its alpha_0) x size x budget.

Every cell has its own resolved run configuration. What follows by a rule (steps, learning rate, warmup)
keeps the rule beside the value. Illegal cells stay in the grid with the reason.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eso.config.check import violations
from megatron_eso.config.load import load_config, to_yaml
from megatron_eso.config.ranges import out_of_range
from megatron_eso.config.schema import ObjectiveConfig, RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.plan.hardware import Hardware, load_hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.parameters import num_parameters
from megatron_eso.plan.step_time import step_time
from megatron_eso.scaling.conventions import published_forward_macs
from megatron_eso.scaling.sweep_config import SweepConfig


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    name: str
    """OBJECTIVE_SIZE_BUDGET; also the name of its folder."""
    run: RunConfig
    objective: str
    """Its name in tables; see :func:`objective_names`."""
    size: str
    """Name of the model's file, without its ending."""
    budget: float
    """Training FLOPs that were asked for; of a token ladder the level."""
    num_parameters: int
    """All weights, embedding and head included."""
    num_parameters_without_embeddings: int
    """Weights without embedding and head."""
    tokens: int
    """Data tokens of the whole run."""
    flops: float
    """Training FLOPs of the whole run, as this trainer computes."""
    flops_full_attention: float
    """The same with all pairs of attention, also those that are masked."""
    flops_published: float
    """The same as the published study counts; see :mod:`megatron_eso.scaling.conventions`."""
    gpu_hours: float
    """Estimate; 0 for an illegal cell."""
    dollars: float
    """Estimate; 0 for an illegal cell."""
    rules: dict[str, str]
    """Setting -> its value and how it follows."""
    problems: tuple[str, ...] = ()
    """Why the cell is illegal; empty: it is legal."""
    tokens_per_parameter: float | None = None
    """The level of a token ladder; None in a grid of budgets."""
    base_ranks: int = 1
    """parallel.local_ranks of the base. It decides nothing; fingerprints are taken with it."""

    @property
    def fingerprint(self) -> str:
        """Hash (16 hexadecimal digits) of the settings that decide the result."""
        parallel = replace(self.run.parallel, local_ranks=self.base_ranks)
        text = to_yaml(replace(self.run, folder="", name="", parallel=parallel))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_grid(path: Path, overrides: list[str] | None = None) -> tuple[SweepConfig, list[Cell]]:
    """Return the sweep's settings and its cells, legal or not.

    Raises:
        ConfigError: for wrong settings, an empty grid, duplicate cells, or no legal cell at all.
    """
    sweep = load_config(path, overrides, schema=SweepConfig)
    _check_axes(sweep, path)
    hardware = load_hardware(sweep.hardware)
    cells = [
        _cell(
            sweep,
            _base_run(sweep, path.parent, model, objective),
            name,
            Path(model).stem,
            level,
            hardware,
        )
        for name, objective in zip(objective_names(sweep.objectives), sweep.objectives, strict=True)
        for model in sweep.models
        for level in sweep.budgets or sweep.tokens_per_parameter
    ]
    names = [cell.name for cell in cells]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(
            f"{path}: duplicate cells {', '.join(doubles[:5])}; list different objectives, names of model "
            "files, or budgets that differ in their first three digits"
        )
    if all(cell.problems for cell in cells):
        raise ConfigError(f"{path}: none of {len(cells)} cells is legal; {cells[0].problems[0]}")
    return sweep, cells


def objective_names(objectives: list[ObjectiveConfig]) -> list[str]:
    """Return the objectives as tables and legends call them: ar, mdlm, eso-0.25.

    To a name that several share, the settings in which these differ are added:
    eso-1-loss_weight-constant.
    """
    short = [f"eso-{o.alpha_0:g}" if o.name == "eso" else o.name for o in objectives]
    names = []
    for name, objective in zip(short, objectives, strict=True):
        same = [asdict(o) for n, o in zip(short, objectives, strict=True) if n == name]
        own = asdict(objective)
        differing = [k for k in own if k != "alpha_0" and any(o[k] != own[k] for o in same)]
        names.append("-".join([name, *(f"{key}-{_word(own[key])}" for key in differing)]))
    return names


def as_run(cell: Cell, run: RunConfig) -> Cell:
    """Return a cell with the settings ``run`` that it ran with, and their sizes, tokens and FLOPs."""
    return replace(cell, run=run, **_counts(run))


def grid_table(cells: list[Cell]) -> str:
    """Return the grid as text: a line a cell, the totals, and the rules of the first legal cell."""
    lines = [
        f"{'cell':<28}{'M params':>9}{'steps':>9}{'M tokens':>10}{'FLOPs':>10}{'all pairs':>10}"
        f"{'published':>10}{'rate':>10}{'GPU h':>10}{'dollars':>9}"
    ]
    for cell in cells:
        lines.append(
            f"{cell.name:<28}{cell.num_parameters / 1e6:>9.3g}{cell.run.train.steps:>9}"
            f"{cell.tokens / 1e6:>10.4g}{cell.flops:>10.3g}{cell.flops_full_attention:>10.3g}"
            f"{cell.flops_published:>10.3g}{cell.run.optimizer.learning_rate:>10.3g}"
            f"{cell.gpu_hours:>10.3g}{cell.dollars:>9.3g}"
        )
        lines += [f"    not run: {problem}" for problem in cell.problems]
    legal = [cell for cell in cells if not cell.problems]
    lines.append(
        f"{len(legal)} of {len(cells)} cells are legal: {sum(c.gpu_hours for c in legal):,.4g} GPU hours, "
        f"{sum(c.dollars for c in legal):,.4g} dollars, {sum(c.flops for c in legal):.3g} FLOPs"
    )
    lines += [f"rule of {key}, {legal[0].name}: {v}" for key, v in legal[0].rules.items()]
    return "\n".join(lines)


def _word(value: object) -> str:
    """Return a setting's value as a part of a name."""
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower()


def _check_axes(sweep: SweepConfig, path: Path) -> None:
    for name in ("models", "objectives"):
        if not getattr(sweep, name):
            raise ConfigError(f"{path}: the grid is empty: '{name}' lists nothing")
    if bool(sweep.budgets) == bool(sweep.tokens_per_parameter):
        raise ConfigError(f"{path}: give exactly one of budgets and tokens_per_parameter")
    levels = [*sweep.budgets, *sweep.tokens_per_parameter]
    wrong = [f"{level:g}" for level in levels if not 0 < level < math.inf]
    if wrong:
        raise ConfigError(
            f"{path}: budgets and tokens_per_parameter must be positive and finite, not {', '.join(wrong)}"
        )
    beyond = [message for _, message in out_of_range(sweep)]
    if beyond:
        raise ConfigError(f"{path}: {'; '.join(beyond)}")


def _base_run(
    sweep: SweepConfig, folder: Path, model: str, objective: ObjectiveConfig
) -> RunConfig:
    base = load_config(folder / sweep.base if sweep.base else None)
    ranks = base.parallel.local_ranks
    if ranks not in (1, sweep.num_gpus):
        raise ConfigError(
            f"{sweep.base} asks for parallel.local_ranks={ranks}, but the sweep trains each cell on "
            f"num_gpus={sweep.num_gpus}; set num_gpus={ranks} or leave parallel.local_ranks out"
        )
    if not base.data.validation:
        raise ConfigError(
            f"{sweep.base or 'base'}: data.validation names no set, so cells would end without the loss "
            "that is fitted; name held-out data there, as configs/sweep/laptop_base.yaml does"
        )
    rows = sweep.batch_rows or base.train.global_batch_rows
    return replace(
        base,
        model=load_config(folder / model).model,
        objective=objective,
        train=replace(base.train, global_batch_rows=rows),
    )


def _cell(
    sweep: SweepConfig,
    run: RunConfig,
    objective: str,
    size: str,
    level: float,
    hardware: Hardware,
) -> Cell:
    base_ranks = run.parallel.local_ranks
    inner = parameters_without_embeddings(run)
    batch_tokens = run.train.global_batch_rows * run.train.sequence_length
    honest, _, published = _flops_per_step(run)
    counted = honest if sweep.flops_convention == "honest" else published
    exact = level / counted if sweep.budgets else level * inner / batch_tokens
    steps = round(exact)
    name = f"{objective}_{size}_{level:.3g}".replace("+", "")
    run = _with_rules(sweep, run, name, steps, inner)
    problems = _problems(sweep, run, exact, steps * batch_tokens / inner)
    seconds = 0.0 if problems else step_time(Job(run, sweep.num_gpus), hardware).total
    hours = seconds * steps * sweep.num_gpus / 3600
    rule, rate = sweep.learning_rate, run.optimizer.learning_rate
    how = f"{level:.3g} / {counted:.4g} FLOPs a step ({sweep.flops_convention})"
    if not sweep.budgets:
        how = f"{level:g} tokens x {inner} parameters / {batch_tokens} tokens a step"
    return Cell(
        name=name,
        run=run,
        objective=objective,
        size=size,
        budget=level,
        **_counts(run),
        gpu_hours=hours,
        dollars=hours * hardware.dollars_per_gpu_hour,
        rules={
            "train.steps": f"{steps} = {how}",
            "optimizer.learning_rate": f"{rate:.3g} = {rule.reference:g} x ({inner:.3g} / "
            f"{rule.reference_parameters:.3g}) ^ {rule.exponent:g}",
            "optimizer.warmup_steps": f"{run.optimizer.warmup_steps} = {sweep.warmup_share:g} x steps",
        },
        problems=tuple(problems),
        tokens_per_parameter=None if sweep.budgets else level,
        base_ranks=base_ranks,
    )


def parameters_without_embeddings(run: RunConfig) -> int:
    """Return the number of weights without embedding and head."""
    tables = 1 if run.model.tie_embeddings else 2
    return num_parameters(run.model) - tables * run.model.hidden_size * run.model.vocab_size


def _with_rules(sweep: SweepConfig, run: RunConfig, name: str, steps: int, inner: int) -> RunConfig:
    rule = sweep.learning_rate
    rate = float(f"{rule.reference * (inner / rule.reference_parameters) ** rule.exponent:.4g}")
    decays = run.optimizer.schedule != "constant"
    return replace(
        run,
        name=name,
        folder=str(Path(sweep.folder) / "cells" / name / "run"),
        train=replace(run.train, steps=steps, tokens=None),
        parallel=replace(run.parallel, local_ranks=sweep.num_gpus),
        optimizer=replace(
            run.optimizer,
            learning_rate=rate,
            min_learning_rate=rate * sweep.min_learning_rate_share if decays else 0.0,
            warmup_steps=min(math.ceil(sweep.warmup_share * steps), max(steps - 1, 0)),
        ),
    )


def _counts(run: RunConfig) -> dict[str, Any]:
    """Return the fields of a cell that follow from its settings alone."""
    steps = run.train.steps or 0
    honest, full, published = _flops_per_step(run)
    return {
        "num_parameters": num_parameters(run.model),
        "num_parameters_without_embeddings": parameters_without_embeddings(run),
        "tokens": steps * run.train.global_batch_rows * run.train.sequence_length,
        "flops": honest * steps,
        "flops_full_attention": full * steps,
        "flops_published": published * steps,
    }


def _flops_per_step(run: RunConfig) -> tuple[float, float, float]:
    rows, length = run.train.global_batch_rows, run.train.sequence_length
    honest = model_flops_per_step(run.model, run.objective, sequence_length=length, rows=rows)
    published = 3 * 2 * published_forward_macs(run.model, run.objective, length) * rows
    return honest.training, honest.training_full_attention, published


def _problems(
    sweep: SweepConfig, run: RunConfig, exact: float, tokens_per_parameter: float
) -> list[str]:
    if round(exact) < 1:
        setting = "budgets" if sweep.budgets else "tokens_per_parameter"
        return [f"{exact:.2g} steps, less than one; raise {setting} or lower batch_rows"]
    if tokens_per_parameter < sweep.min_tokens_per_parameter:
        return [
            f"{tokens_per_parameter:.2g} tokens a parameter, below min_tokens_per_parameter="
            f"{sweep.min_tokens_per_parameter:g}"
        ]
    return violations(run, sweep.num_gpus)
