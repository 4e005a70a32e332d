"""Dense matrix peaks of known GPUs, by the driver's name for them; vendor figures, without sparsity."""

from typing import NamedTuple


class Peak(NamedTuple):
    """FLOP/s of one GPU."""

    bf16: float
    fp8: float
    """0: the GPU has no FP8 products."""


# The first of these that a GPU's name contains counts, so the more special ones stand first.
_PEAKS = {
    "H100 PCIe": Peak(756e12, 1513e12),
    "H100 NVL": Peak(835e12, 1671e12),
    "H100": Peak(989e12, 1979e12),
    "H800": Peak(989e12, 1979e12),
    "H200": Peak(989e12, 1979e12),
    "GH200": Peak(989e12, 1979e12),
    "H20": Peak(148e12, 296e12),
    "B200": Peak(2250e12, 4500e12),
    "A100": Peak(312e12, 0.0),
    "A800": Peak(312e12, 0.0),
    "L40S": Peak(362e12, 733e12),
    "L4": Peak(121e12, 242e12),
}


def peak_of(gpu_name: str) -> Peak | None:
    """Return the peaks of a GPU ("NVIDIA H100 80GB HBM3"); None if it is not known."""
    words = f" {gpu_name} ".replace("-", " ")
    return next((peak for name, peak in _PEAKS.items() if f" {name} " in words), None)
