"""Every module imports on a machine without Transformer Engine, Apex, triton or a GPU."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDDEN = ["transformer_engine", "apex", "flash_attn", "fused_weight_gradient_mlp_cuda"]
if version("megatron-core").startswith("0.16."):  # later ones import triton themselves
    HIDDEN.append("triton")


@pytest.mark.slow
def test_everything_imports_without_packages_for_gpus():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "megatron_eso").rglob("*.py"))
        # Run as scripts, or copied beside exported weights and imported by transformers.
        if path.stem != "__main__" and "hf" not in path.parts
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {HIDDEN!r}: sys.modules[name] = None\n"
        "import torch\n"
        "torch.cuda.is_available = lambda: False\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "from megatron_eso.parallel.te_adapter import describe_machine\n"
        "assert describe_machine().te is None\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules, 'PyTorch\\'s compiler is loaded'\n"
        "assert torch.compile.__module__ == 'torch'\n"
        "print('all', torch.cuda.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.endswith("all False\n"), done.stderr[-2000:]
    assert len(modules) > 150
