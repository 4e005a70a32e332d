"""The ``megatron-eso`` command: finds the file of a subcommand and prints user errors as messages.

A subcommand's module is imported only when the subcommand is called, so ``plan`` or ``submit`` on a
login node never import torch.
"""

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from megatron_eso.cli.application import application
from megatron_eso.errors import UserError
from megatron_eso.garbage import look_no_more, look_rarely
from megatron_eso.launch.said import is_first_to_say

# command -> (module that defines `app` or `command`, one line for the overview)
COMMANDS = {
    "data": ("data", "Prepare, inspect, verify and combine data sets."),
    "train": ("train", "Train a model from a run configuration."),
    "launch": ("launch", "Train under supervision: restart after crashes and hangs."),
    "checkpoint": ("checkpoint", "List, inspect, verify, prune and compare checkpoints."),
    "goodput": ("goodput", "Show where a run's time went: effective share, faults, timeline."),
    "submit": ("submit", "Submit a run to Slurm; it requeues itself until it is done."),
    "status": ("status", "Show where submitted runs are and where their time went."),
    "logs": ("logs", "Print the output of a run, submitted or not."),
    "cancel": ("cancel", "End the job of a run, at once or after a checkpoint."),
    "requeue": ("requeue", "Let a held or failed job try again."),
    "watch": ("watch", "Start requeued jobs without the credential wait."),
    "eval": ("evaluate", "Score held-out data: NELBO, likelihood bound, perplexity."),
    "sample": ("sample", "Generate text from a checkpoint."),
    "bench-sample": ("bench_sample", "Compare the speed and quality of samplers, with a plot."),
    "export": ("export", "Write a checkpoint as a verified Hugging Face folder."),
    "import": ("import_", "Turn Hugging Face or official Eso-LM weights into a checkpoint."),
    "verify": (
        "verify",
        "Compare an export with its source, or a checkpoint with the official code.",
    ),
    "inspect": ("inspect", "List the tensors and count the parameters of a checkpoint or export."),
    "plan": ("plan", "Estimate memory, speed, best layout, cost and goodput without a GPU."),
    "sweep": ("sweep", "Plan, run, collect, fit and report a scaling study."),
    "config": ("config", "Show a resolved configuration."),
    "doctor": ("doctor", "Show what this machine can do and which backends would be chosen."),
}


class LazyGroup(TyperGroup):
    """A command group that imports a subcommand's module only when the subcommand is named."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the command names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, importing its module."""
        if cmd_name not in COMMANDS:
            return None
        module_name, summary = COMMANDS[cmd_name]
        module = importlib.import_module(f"megatron_eso.cli.{module_name}")
        command: Any = typer.main.get_command(module.app)
        for documented in (command, *getattr(command, "commands", {}).values()):
            # \b keeps the help text from joining the lines of an example.
            documented.help = (documented.help or "").replace("Examples:", "\b\nExamples:")
        command.name, command.short_help = cmd_name, summary
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Print the overview from the table, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = application(
    cls=LazyGroup,
    no_args_is_help=True,
    help="Pretrain, evaluate and sample Eso-LM language models on Megatron-Core.",
)


@app.callback()
def _root() -> None:
    """Hold the options shared by all commands (none so far)."""


def main() -> None:
    """Run the command line; a :class:`UserError` becomes a message and its exit code."""
    look_rarely()
    try:
        app(prog_name="megatron-eso")
    except UserError as error:
        if is_first_to_say(str(error), os.environ):  # all ranks may find the same error
            sys.stderr.write(f"error: {error}\n")  # one write: print sends the newline separately
        raise SystemExit(error.exit_code) from None
    finally:
        look_no_more()


if __name__ == "__main__":
    main()
