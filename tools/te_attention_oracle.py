"""Ask the released Transformer Engine which attention it takes on machines that are not here; no GPU.

    python -m tools.te_attention_oracle LIBRARY --out tests/data/te_attention.json

LIBRARY is libtransformer_engine.so of the wheel transformer_engine_cu13 2.11.0. Its choice among cuDNN's
kernels depends on the GPU's compute capability, cuDNN's version and the shapes alone, so a small
library, put before CUDA's (LD_PRELOAD), answers for the first two. Needs a CUDA build of PyTorch, for the
libraries that LIBRARY was linked with, and a C compiler.
"""

import argparse
import ctypes
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0)]
CUDNN = [
    (9, 1, 0), (9, 2, 0), (9, 2, 1), (9, 6, 0), (9, 7, 0), (9, 9, 0), (9, 10, 0), (9, 10, 1),
    (9, 10, 2), (9, 14, 0), (9, 19, 0),
]  # fmt: skip
DTYPES = {"bf16": 6, "fp8": 7}  # NVTEDType: kNVTEBFloat16, kNVTEFloat8E4M3
HEAD_SIZES = [20, 64, 72, 128, 192, 256]
LENGTHS = [64, 1000, 4096]
_SBHD_SBHD_SBHD, _NO_BIAS, _CAUSAL_MASK, _VANILLA_SOFTMAX = 4, 0, 2, 0
_ANSWERS = {-1: None, 0: "F16_max512_seqlen", 1: "F16_arbitrary_seqlen", 2: "FP8"}

_MADE_UP = r"""
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
static int number(const char *name) { const char *s = getenv(name); return s ? atoi(s) : 0; }
static int nothing(int *p) { if (p) *p = 0; return 0; }
int cudaGetDevice(int *p) { return nothing(p); }
int cudaGetDeviceCount(int *p) { *p = 1; return 0; }
int cudaDriverGetVersion(int *p) { *p = 13000; return 0; }
int cudaDeviceGetAttribute(int *p, int which, int device) {
  *p = which == 75 ? number("MADE_UP_MAJOR") : which == 76 ? number("MADE_UP_MINOR") : 0;
  return 0;
}
/* cudaDeviceProp of CUDA 13: 1008 bytes, with major and minor at 360. */
int cudaGetDeviceProperties(char *p, int device) {
  memset(p, 0, 1008);
  ((int *)p)[90] = number("MADE_UP_MAJOR");
  ((int *)p)[91] = number("MADE_UP_MINOR");
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char *n, void **f, unsigned v, unsigned long long g, int *r) {
  *f = (void *)nothing;
  if (r) *r = 0;
  return 0;
}
size_t cudnnGetVersion(void) { return (size_t)number("MADE_UP_CUDNN"); }
"""


def main() -> None:
    """Write the answers for all compute capabilities or, in a process with a made-up one, print its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("library", type=Path, help="libtransformer_engine.so of the wheel")
    parser.add_argument("--out", type=Path, help="JSON file of all answers; required")
    arguments = parser.parse_args()
    if "MADE_UP_MAJOR" in os.environ:
        print(json.dumps(answers(arguments.library)))
        return
    if arguments.out is None or not arguments.library.is_file():
        parser.error("give libtransformer_engine.so and --out FILE")
    found = [row for capability in CAPABILITIES for row in ask(arguments.library, capability)]
    header = '"columns": ["capability", "cudnn", "dtype", "head_size", "length", "answer"]'
    lines = ",\n".join(map(json.dumps, found))
    arguments.out.write_text(f'{{{header},\n"rows": [\n{lines}\n]}}\n')
    print(f"{len(found)} answers in {arguments.out}")


def ask(library: Path, capability: tuple[int, int]) -> list[Any]:
    """Return the answers for GPUs of one compute capability, from a new process, which asks for it once."""
    with tempfile.TemporaryDirectory() as folder:
        made_up = Path(folder) / "made_up.so"
        compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(made_up)]
        subprocess.run(compiler, input=_MADE_UP, text=True, check=True)
        machine = {"MADE_UP_MAJOR": str(capability[0]), "MADE_UP_MINOR": str(capability[1])}
        spec = importlib.util.find_spec("nvidia")
        packages = spec.submodule_search_locations if spec else []  # pip's CUDA libraries
        folders = [
            str(folder) for package in packages or [] for folder in Path(package).glob("*/lib")
        ]
        machine["LD_LIBRARY_PATH"] = ":".join(folders)
        done = subprocess.run(
            [sys.executable, "-m", "tools.te_attention_oracle", str(library)],
            env={**os.environ, "LD_PRELOAD": str(made_up), **machine},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [[list(capability), *row] for row in json.loads(done.stdout)]


def answers(library: Path) -> list[Any]:
    """Return [cuDNN, format, head size, row length, answer] for causal rows in training, on this GPU."""
    importlib.import_module("torch")  # loads CUDA's libraries
    ctypes.CDLL(
        "libnvrtc.so.13", mode=ctypes.RTLD_GLOBAL
    )  # the library uses it but does not name it
    choose = ctypes.CDLL(str(library)).nvte_get_fused_attn_backend
    size, flag = ctypes.c_size_t, ctypes.c_bool
    choose.argtypes = [
        flag, *[ctypes.c_int] * 6, ctypes.c_float, *[size] * 6, ctypes.c_int64, ctypes.c_int64, flag, flag,
    ]  # fmt: skip
    choose.restype = ctypes.c_int
    found = []
    for cudnn, (name, dtype), head_size, length in itertools.product(
        CUDNN, DTYPES.items(), HEAD_SIZES, LENGTHS
    ):
        major, minor, patch = cudnn
        os.environ["MADE_UP_CUDNN"] = str(major * 10000 + minor * 100 + patch)
        kinds = dtype, dtype, _SBHD_SBHD_SBHD, _NO_BIAS, _CAUSAL_MASK, _VANILLA_SOFTMAX
        shapes = 32, 8, length, length, head_size, head_size
        answer = choose(True, *kinds, 0.0, *shapes, -1, 0, False, False)
        found.append([list(cudnn), name, head_size, length, _ANSWERS[answer]])
    return found


if __name__ == "__main__":
    main()
