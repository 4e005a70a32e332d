"""A row in the terminal that fills in place; a token's color shows in which step it was decided."""

from typing import Any

from torch import Tensor

from megatron_eso.data.tokenizer import MASK_MARK, decode

# From early (blue) to late (red); given tokens stay plain.
_COLOURS = ("blue", "cyan", "green", "yellow", "bright_red", "red")


class LiveRow:
    """Shows the first row of a batch; use as ``Choice.on_step`` inside a ``with``."""

    def __init__(self, console: Any, tokenizer: Any, num_steps: int, mask_id: int) -> None:
        from rich.live import Live

        self._live = Live(console=console, refresh_per_second=12, transient=False)
        self._tokenizer, self._num_steps, self._mask_id = tokenizer, max(num_steps, 1), mask_id
        self._step_of: dict[int, int] = {}
        self._known: set[int] = set()
        self._padding = 0

    def __enter__(self) -> "LiveRow":
        """Start to draw."""
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last picture on the screen."""
        self._live.stop()

    def begin(self, row: Tensor, padding: int = 0) -> None:
        """Note which columns of the row [L] are given; the first ``padding`` are not shown."""
        self._padding = padding
        self._known = {i for i, token in enumerate(row.tolist()) if token != self._mask_id}

    def on_step(self, step: int, tokens: Tensor) -> None:
        """Draw the row after a step."""
        row = tokens[0].tolist()
        for column, token in enumerate(row):
            if token != self._mask_id and column not in self._known:
                self._step_of.setdefault(column, step)
        self._live.update(self._text(row, step))

    def _text(self, row: list[int], step: int) -> Any:
        from rich.text import Text

        text = Text()
        for begin, end, style in self._spans(row):
            ids = row[begin:end]
            is_open = ids[0] == self._mask_id
            text.append(MASK_MARK * len(ids) if is_open else decode(self._tokenizer, ids), style)
        text.append(f"\n[step {step + 1} of {self._num_steps}]", "dim")
        return text

    def _spans(self, row: list[int]) -> list[tuple[int, int, str]]:
        """Return runs of columns of one style, to decode together: several tokens may be a character."""
        spans: list[tuple[int, int, str]] = []
        for column, token in enumerate(row[self._padding :], self._padding):
            style = "dim" if token == self._mask_id else self._style(column)
            if spans and spans[-1][2] == style:
                spans[-1] = (spans[-1][0], column + 1, style)
            else:
                spans.append((column, column + 1, style))
        return spans

    def _style(self, column: int) -> str:
        step = self._step_of.get(column)
        if step is None:
            return ""
        return _COLOURS[min(step * len(_COLOURS) // self._num_steps, len(_COLOURS) - 1)]
