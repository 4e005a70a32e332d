"""One line that says how far a long command is, how fast it runs, and how long it will take."""

import sys
import time
from typing import TextIO

SECONDS_BETWEEN_LINES = 1.0
SECONDS_BETWEEN_LOG_LINES = 15.0  # if the output is a file or pipe


class Progress:
    """Prints progress to a stream: a line rewritten in place on a terminal, sparse lines elsewhere."""

    def __init__(self, total_bytes: int = 0, stream: TextIO | None = None) -> None:
        self.total_bytes = total_bytes
        self._stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._done_bytes = self._done_tokens = 0
        self._is_terminal = self._stream.isatty()

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def begin(self, total_bytes: int) -> None:
        """Start the clock for ``total_bytes`` of input."""
        self.total_bytes = total_bytes
        self._start = self._last = time.monotonic()

    def add(self, num_bytes: int, num_tokens: int) -> None:
        """Count finished work; print the line if it is due."""
        self._done_bytes += num_bytes
        self._done_tokens += num_tokens
        now = time.monotonic()
        gap = SECONDS_BETWEEN_LINES if self._is_terminal else SECONDS_BETWEEN_LOG_LINES
        if now - self._last >= gap:
            self._last = now
            end = "\r" if self._is_terminal else "\n"
            print(f"{self._line(now):<78}", end=end, file=self._stream, flush=True)

    def finish(self) -> None:
        """Print the last line."""
        if self._done_tokens:
            print(f"{self._line(time.monotonic()):<78}", file=self._stream, flush=True)

    def _line(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-9)
        share = min(self._done_bytes / max(self.total_bytes, 1), 1.0)
        left = elapsed / share - elapsed if share else 0.0
        speed = self._done_tokens / elapsed
        return (
            f"{share:4.0%} of {self.total_bytes / 1e6:.1f} MB, {self._done_tokens / 1e6:.2f} M tokens, "
            f"{speed / 1e3:.0f} k tokens/s, {left:.0f} s left"
        )
