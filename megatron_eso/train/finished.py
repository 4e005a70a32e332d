"""Whether a run had finished before it was started again: then there is nothing to do.

Its metrics, TensorBoard files and ledger stay as they are: the same points would be in them twice.
"""

import logging
from typing import Any

from megatron_eso.checkpoint.find import newest_valid_together
from megatron_eso.config.schema import RunConfig
from megatron_eso.files import read_json
from megatron_eso.parallel.exchange import from_first_rank
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.session import Session
from megatron_eso.train.spare_output import SpareOutput
from megatron_eso.train.training_data import changed_data, open_training_data

log = logging.getLogger(__name__)


def has_finished(session: Session, folder: RunFolder, earlier: RunConfig | None) -> bool:
    """Return whether an earlier start has trained, saved and evaluated all that is asked for.

    A run on other data than the checkpoint's has not. All ranks must call this.

    Args:
        session: the run.
        folder: its folder.
        earlier: on the first rank, the configuration of the run in the folder, if there is one.
    """
    config, device = session.config, session.torch_device
    total = session.derived.total_steps

    def look() -> bool:
        if earlier is None or _evaluated(earlier) != _evaluated(config):
            return False
        status = read_json(folder.path / "status.json")
        has_ended = (status.get("state"), status.get("step")) == ("finished", total)
        return has_ended and (folder.path / "evaluation.json").is_file()

    if not from_first_rank(look, device):
        return False
    hashes = config.checkpoint.verify_hashes
    newest = newest_valid_together(folder.checkpoints, hashes=hashes, device=device)
    if newest is None or newest.step != total:
        return False
    reader = open_training_data(config, device)
    changed = changed_data(from_first_rank(newest.sidecar, device)["data"], reader)
    reader.close()
    return not changed


def leave_finished(folder: RunFolder, total_steps: int) -> None:
    """Say that there is nothing to do, and give the folder back. For the first rank."""
    log.info(
        "%s has finished already: its %d steps are done, saved and evaluated; a larger train.steps goes on",
        folder.path, total_steps,
    )  # fmt: skip
    # A launcher believes only a status that its own attempt wrote.
    status = {"step": total_steps, "total_steps": total_steps}
    SpareOutput("status.json").attempt(lambda: folder.write_status("finished", **status))
    folder.give_back()


def _evaluated(config: RunConfig) -> tuple[Any, ...]:
    """Return the settings of the evaluation, which may change after a run has finished."""
    return config.eval, config.data.validation
