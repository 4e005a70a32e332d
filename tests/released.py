"""Released packages that tests use beside the installed ones: wheels, unpacked and put first on a path."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_eso.config.precision_rules import DPA_RECIPE
from tests.rank_pool import RankPool

STAND_INS = Path(__file__).parent / "stand_in"
STAND_IN_TRITON = Path(__file__).parent / "stand_in_triton"


def unpacked(asked: str, folder: Path, python: str = "3.12") -> str:
    """Return a folder with the modules of a downloaded wheel; skip the test if the download fails.

    Args:
        asked: name and version ("megatron-core==0.19.2").
        folder: a new folder.
        python: version of Python for which the wheel is built.
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


def te_pool(make_folder: Callable[[str], Path], te: str, megatron: str = "") -> RankPool:
    """Return two ranks with a released Transformer Engine on a CPU; see tests/stand_in.

    Args:
        make_folder: creates a new folder whose name starts with its argument.
        te: version of Transformer Engine.
        megatron: version of Megatron-Core to use instead of the installed one; empty: the installed one.
    """
    folders = [str(STAND_INS), unpacked(f"transformer_engine=={te}", make_folder("te"))]
    if megatron:
        newer = unpacked(f"megatron-core=={megatron}", make_folder("megatron"))
        folders = [newer, *folders, str(STAND_IN_TRITON)]
    # Read once, when Transformer Engine is imported; the command also sets it beforehand.
    return RankPool(2, *folders, **{DPA_RECIPE: "DelayedScaling"})
