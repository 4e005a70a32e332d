"""Released packages that tests read beside the installed ones: wheels, unpacked and put first on a path."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parent / "stand_in"
STAND_IN_TRITON = Path(__file__).parent / "stand_in_triton"
# What is read once when Transformer Engine is imported; the command sets it before, as here.
TE_ENVIRONMENT = {"NVTE_DPA_FP8_RECIPE": "DelayedScaling"}


def unpacked(asked: str, folder: Path, python: str = "3.12") -> str:
    """Return a folder of the modules of a wheel, which is downloaded; skip the test if it cannot be.

    Args:
        asked: name and version ("megatron-core==0.19.2").
        folder: a new folder.
        python: the version of Python that the wheel is for.
    """
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
        "--python-version", python, "--dest", str(folder), asked,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"NOT TESTED: {asked} could not be downloaded within 120 s")
    if done.returncode:
        pytest.skip(f"NOT TESTED: {asked} cannot be downloaded: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "unpacked")
    return str(folder / "unpacked")


def transformer_engine(version: str, folder: Path) -> tuple[str, str]:
    """Return the folders with which the released Transformer Engine runs on a CPU; see tests/stand_in."""
    return str(STAND_INS), unpacked(f"transformer_engine=={version}", folder)
