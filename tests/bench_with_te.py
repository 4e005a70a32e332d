"""Run the sections of tools/bench_gpu.py that need Transformer Engine on a CPU, over its stand-in.

python -m tests.bench_with_te FOLDER_OF_TRANSFORMER_ENGINE RESULTS.json
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch._inductor.runtime.triton_compat  # before the stand-in's triton is on the path

from tests.released import STAND_INS


def main() -> None:
    """Run the sections with tiny shapes; head size 128, which FP8 attention needs."""
    sys.path[:0] = [str(STAND_INS), sys.argv[1]]
    from megatron_eso.garbage import look_at_new_objects
    from megatron_eso.train import session
    from tests.replaced import replaced
    from tests.te_jobs import H100
    from tools import bench_gpu, bench_gpu_fp8, bench_gpu_report, bench_gpu_sizes

    shape = [
        "model.hidden_size=256",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.vocab_size=64",
    ]
    sizes = replace(
        bench_gpu_sizes.SMOKE,
        shapes={"tiny": shape},
        lengths=(128,),
        head_size=128,
        checked_length=256,
        step_tokens=1024,
    )
    look_at_new_objects()  # benchmarks collect garbage between measurements
    report = bench_gpu_report.Report(Path(sys.argv[2]), {})
    with replaced(
        [
            (session, "describe_machine", lambda: H100),
            (bench_gpu, "HAS_TE", True),
            (bench_gpu_fp8, "HAS_TE", True),
        ]
    ):
        for section in ("correctness", "fp8", "fp8_losses"):
            report.section(section)
            with report.trying(section):
                bench_gpu.SECTIONS[section](sizes, report)
    raise SystemExit(report.failures > 0)


if __name__ == "__main__":
    assert torch  # imported only for the order of imports
    main()
