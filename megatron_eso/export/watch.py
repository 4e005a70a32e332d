"""Export a running job's checkpoints as they appear; upload an exported folder."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from megatron_eso.checkpoint.folder import list_folders
from megatron_eso.errors import CheckpointError

log = logging.getLogger(__name__)


def watch_run(
    run: Path,
    out: Path,
    export_one: Callable[[Path, Path], None],
    *,
    poll_seconds: float = 10.0,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Export each committed checkpoint of a run to ``out/NAME``; return when ``is_over`` says so.

    A folder that already exists was exported before, so a restarted watch continues. A checkpoint that
    training removed during its export is passed over.

    Args:
        run: run folder, or its checkpoints folder.
        out: parent of the exported folders.
        export_one: writes one checkpoint to one folder.
        poll_seconds: pause between rounds.
        is_over: asked after each round; the command line stops on Ctrl-C.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a folder; --watch needs a run folder")
    while True:
        # Checked in each round: a run that has just started makes the folder at its first save.
        root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
        for folder in list_folders(root):
            target = out / folder.path.name
            if not folder.is_committed or target.exists():
                continue
            try:
                export_one(folder.path, target)
            except CheckpointError as error:
                if folder.is_committed:
                    raise
                log.warning("%s was removed while it was exported: %s", folder.path, error)
        if is_over():
            return
        time.sleep(poll_seconds)


def push_folder(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hugging Face hub; return its address.

    Raises:
        CheckpointError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"--push {repository} failed: {error}; {folder} is complete: push it again with "
            f"`hf upload {repository} {folder}`"
        ) from None
