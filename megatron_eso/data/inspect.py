"""``data inspect``: shows what a split holds, as text and as a plot of its documents' lengths."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.manifest import Manifest
from megatron_eso.data.output import require_writable
from megatron_eso.data.shards import ShardedRows
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError
from megatron_eso.files import write_figure
from megatron_eso.log_axis import make_logarithmic

ROWS_AT_ONCE = 4096


def document_lengths(split: ShardedRows, max_rows: int | None = None) -> NDArray[np.int64]:
    """Return each document's number of tokens, end token included, in the first ``max_rows`` rows."""
    manifest = split.manifest
    stop = min(split.num_samples, max_rows or split.num_samples)
    ends, passed = [np.array([-1], np.int64)], 0
    for begin in range(0, stop, ROWS_AT_ONCE):
        rows = split.read(np.arange(begin, min(begin + ROWS_AT_ONCE, stop)))
        stream = rows[:, :-1][rows[:, :-1] != manifest.mask_id]  # every token once
        ends.append(np.flatnonzero(stream == manifest.end_of_document_id) + passed)
        passed += len(stream)
    return np.diff(np.concatenate(ends))


def decoded_rows(split: ShardedRows, tokenizer: Tokenizer, rows: list[int]) -> list[str]:
    """Return the text of some rows, without padding.

    Raises:
        DataError: if the split has no such row.
    """
    wrong = [row for row in rows if not 0 <= row < split.num_samples]
    if wrong:
        raise DataError(
            f"row {wrong[0]} does not exist: the split has rows 0 to {split.num_samples - 1}"
        )
    read = split.read(np.array(rows, np.int64))
    return [tokenizer.decode(row[row != split.manifest.mask_id].tolist()) for row in read]


def require_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn, before rows are read for it.

    Raises:
        DataError: if matplotlib is missing or does not know the format, or the folder is not writable.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise DataError("a picture needs matplotlib: pip install matplotlib") from None
    known = FigureCanvasBase.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower() or "png"
    if ending not in known:
        raise DataError(f"--picture {path}: .{ending} is not one of {', '.join(sorted(known))}")
    if path.is_dir():
        raise DataError(f"--picture {path} is a folder; name a file")
    require_writable(path.parent, f"--picture {path}")


def draw_lengths(lengths: NDArray[np.int64], manifest: Manifest, path: Path) -> None:
    """Write a histogram of document lengths (logarithmic bins) as a picture.

    Raises:
        DataError: if matplotlib is missing or there are no documents.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("a picture needs matplotlib: pip install matplotlib") from None
    if not len(lengths):
        raise DataError("the rows read hold no whole document to draw; raise --max-rows")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bins = np.geomspace(max(lengths.min(), 1) * 0.99, lengths.max() * 1.01, 41)
    axes.hist(lengths, bins=bins.tolist(), color="#4269d0")
    axes.axvline(
        manifest.sequence_length, color="#ff725c", label=f"row, {manifest.sequence_length}"
    )
    axes.axvline(float(np.median(lengths)), color="black", ls="--",
                 label=f"median, {np.median(lengths):.0f}")  # fmt: skip
    make_logarithmic(axes.xaxis)
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.set_title(f"{manifest.split}: {len(lengths):,} documents, {int(lengths.sum()):,} tokens")
    axes.legend()
    write_figure(path, figure, dpi=150)
