"""The ledger as a picture: one bar over time, colored by cause; the title counts the faults."""

from pathlib import Path

from megatron_eso.errors import UserError
from megatron_eso.files import write_figure
from megatron_eso.launch.ledger import CAUSES, Ledger

_COLORS = ("tab:green", "tab:red", "tab:blue", "tab:cyan", "tab:purple", "black", "tab:orange",
           "lightgray")  # fmt: skip


def write_timeline(ledger: Ledger, out: Path) -> None:
    """Write the picture; the file name's ending sets the format (.png, .svg, .pdf).

    Raises:
        UserError: if matplotlib is missing or the format is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install -e '.[plots]'") from None
    unit, name = (3600.0, "hours") if ledger.elapsed > 7200 else (1.0, "seconds")
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    axis = figure.subplots()
    for cause, color in zip(CAUSES, _COLORS, strict=True):
        spans = [(s.begin / unit, s.seconds / unit) for s in ledger.stretches if s.cause == cause]
        if spans:
            label = f"{cause} {ledger.seconds(cause) / max(ledger.elapsed, 1e-9):.1%}"
            axis.broken_barh(spans, (0, 1), facecolors=color, label=label)
    axis.set(
        xlabel=f"{name} since the first start", yticks=[], xlim=(0, max(ledger.elapsed / unit, 1e-9)),
        title=f"effective training time {ledger.effective_share:.1%}, {len(ledger.faults)} faults",
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_figure(out, figure, dpi=120)
    except (ValueError, OSError) as error:
        raise UserError(f"--plot {out}: {error}") from None
