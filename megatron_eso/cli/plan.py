"""``megatron-eso plan``: memory, speed, layout, cost and goodput, without torch or a GPU."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application
from megatron_eso.errors import UserError

app = application()


# question -> the options that change its answer
APPLY = {
    "plan": ("gpus", "chart"),
    "search": ("gpus", "by", "fp8", "max_context"),
    "goodput": ("gpus",),
    "sampling": (),
    "calibrate": (),
}
ALWAYS = ("config", "overrides", "cluster", "as_json")


@app.command()
def plan(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="Run configuration (YAML)")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    cluster: Annotated[str, typer.Option(help="Hardware profile: name or YAML file")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs")] = 8,
    search: Annotated[bool, typer.Option("--search", help="Rank all legal layouts")] = False,
    by: Annotated[
        str, typer.Option(help="With --search: time or cost (GPU counts up to --gpus)")
    ] = "time",
    fp8: Annotated[bool, typer.Option("--fp8", help="With --search: try FP8 products too")] = False,
    max_context: Annotated[
        int, typer.Option(min=1, help="With --search: try up to this many context ranks")
    ] = 1,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Estimate the effective training time under failures")
    ] = False,
    sampling: Annotated[
        int | None, typer.Option(help="Estimate the cost of sampling a row of this length")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Fit the constants to run folders or tables; repeatable"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON")] = False,
    chart: Annotated[
        Path | None, typer.Option(help="Write a chart of the plan: .png, .svg or .html")
    ] = None,
) -> None:
    """Say whether a run fits, how fast it goes, what it costs, and which layout is best.

    Examples:
        megatron-eso plan configs/run/quickstart.yaml --cluster h100 --gpus 2 --chart plan.html
        megatron-eso plan configs/run/1b.yaml --gpus 64 --search
        megatron-eso plan configs/run/1b.yaml --gpus 64 --goodput
        megatron-eso plan configs/run/1b.yaml --sampling 2048
        megatron-eso plan --calibrate configs/calibration/h100_published.yaml
    """
    from megatron_eso.plan import commands
    from megatron_eso.plan.hardware import load_hardware

    question = _question(context)
    hardware = load_hardware(cluster)
    if calibrate:
        result = commands.calibrate_command(calibrate, hardware)
    else:
        run = commands.load_run(config, overrides)
        if question == "search":
            result = commands.search_command(
                run, gpus, hardware, by=by, allow_fp8=fp8, max_context=max_context
            )
        elif question == "goodput":
            result = commands.goodput_command(run, gpus, hardware)
        elif sampling is not None:
            result = commands.sampling_command(run, hardware, sampling)
        else:
            result = commands.plan_command(run, gpus, hardware, chart)
    typer.echo(json.dumps(result.data, indent=1) if as_json else result.text)


def _question(context: typer.Context) -> str:
    """Return the question that the options ask.

    Raises:
        UserError: for two questions, or for an option that the question ignores.
    """
    given = [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    asked = [name for name in given if name in APPLY]
    if len(asked) > 1:
        raise UserError(
            f"{_flag(asked[0])} and {_flag(asked[1])} ask two questions: give one of them"
        )
    question = asked[0] if asked else "plan"
    if question == "calibrate" and context.params["config"]:
        raise UserError(
            f"--calibrate reads measured runs, not a run configuration ({context.params['config']}); "
            "repeat --calibrate for each run folder or table"
        )
    for name in given:
        if name not in (*ALWAYS, question, *APPLY[question]):
            others = [_flag(other) for other, options in APPLY.items() if name in options]
            at = "in the plain plan" if question == "plan" else f"with {_flag(question)}"
            raise UserError(
                f"{_flag(name)} has no effect {at}; it applies to {' or '.join(others)}"
            )
    return question


def _flag(name: str) -> str:
    """Return the name of a parameter on the command line."""
    return "the plain plan" if name == "plan" else "--" + name.replace("_", "-")
