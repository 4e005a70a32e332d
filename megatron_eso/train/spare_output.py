"""Output that a run can do without: a failure to write is logged once, until a write succeeds again."""

import logging
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_eso.files import require_room

log = logging.getLogger(__name__)


class SpareOutput:
    """Tries to write. A full disk costs this output, with a warning, but never the run."""

    def __init__(self, what: str) -> None:
        self._what, self._is_failing = what, False

    def attempt(self, write: Callable[[], None]) -> None:
        """Write; warn if that fails and the attempt before did not."""
        try:
            write()
        except OSError as error:
            if not self._is_failing:
                log.warning("%s cannot be written: %s; the run goes on", self._what, error)
            self._is_failing = True
        else:
            self._is_failing = False


class Board:
    """TensorBoard's event files."""

    def __init__(self, folder: Path) -> None:
        """Open the first event file.

        Raises:
            OSError: if the folder cannot be written.
        """
        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder))

    def add(self, values: dict[str, float], step: int) -> None:
        """Write numbers by their tags, to a new file if the last one has failed.

        Raises:
            OSError: if they, or numbers from an earlier call, cannot be written: a thread writes them,
                and its first failure ends it for good.
        """
        if self._writer is None:
            require_room(self._folder)  # else every try would leave an empty file
            self._writer = SummaryWriter(str(self._folder))
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        except OSError:
            self._drop()
            raise

    def close(self) -> None:
        """Write out what is buffered.

        Raises:
            OSError: if it cannot be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.flush()  # unlike close, this says when the thread has failed
            finally:
                writer.close()

    def _drop(self) -> None:
        try:
            self.close()
        except OSError:
            pass  # what was not yet written is lost; the caller reports it
