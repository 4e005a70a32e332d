"""Of two cuDNNs on a machine, PyTorch's own is loaded, whichever Transformer Engine would choose."""

import ast
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_eso.parallel.megatron_patches import load_cudnn_of_torch
from tests import released
from tests.replaced import replaced

NAMES = ["libcudnn.so.9", "libcudnn_adv.so.9", "libcudnn_graph.so.9", "libcudnn_ops.so.9"]


@pytest.fixture
def packages(tmp_path):
    """Return a folder of packages that contains cuDNN."""
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(b"")
    return tmp_path


@pytest.fixture
def loaded():
    """Return the names of the libraries that the test loads, in order."""
    found = []
    finds = SimpleNamespace(name="transformer_engine")
    with replaced(
        [
            (ctypes, "CDLL", lambda path: found.append(Path(path).name)),
            (sys.modules[load_cudnn_of_torch.__module__], "find_spec", lambda name: finds),
        ]
    ):
        yield found


def test_a_library_comes_after_those_that_it_is_linked_with(packages, loaded):
    environment = {}
    load_cudnn_of_torch(environment, packages)
    assert loaded[:2] == ["libcudnn_graph.so.9", "libcudnn_ops.so.9"]
    assert sorted(loaded) == NAMES
    assert environment == {"CUDNN_HOME": str(packages / "nvidia" / "cudnn")}


def test_libraries_that_cannot_be_loaded_stop_nobody(packages, loaded):
    def fails(path):
        loaded.append(path)
        raise OSError("libz.so.1: cannot open shared object file")

    with replaced([(ctypes, "CDLL", fails)]):
        load_cudnn_of_torch({}, packages)
    assert len(loaded) == len(NAMES)


def test_a_cudnn_that_is_named_is_left_alone(packages, loaded):
    environment = {"CUDNN_HOME": "/opt/cudnn"}
    load_cudnn_of_torch(environment, packages)
    assert environment == {"CUDNN_HOME": "/opt/cudnn"}
    assert not loaded


def test_a_pytorch_with_a_systems_cudnn_is_left_alone(tmp_path, loaded):
    environment = {}
    load_cudnn_of_torch(environment, tmp_path)
    assert not environment
    assert not loaded


@pytest.mark.slow
@pytest.mark.parametrize("te", ["2.9.0", "2.11.0", "2.20.2"])
def test_transformer_engine_still_prefers_a_systems_cudnn(te, packages, tmp_path_factory):
    """If this fails, its loader may have changed: check whether the patch can go."""
    wheel = released.unpacked(f"transformer_engine=={te}", tmp_path_factory.mktemp("te"))
    source = (Path(wheel) / "transformer_engine" / "common" / "__init__.py").read_text()
    wanted = ("_load_cuda", "_load_cudnn", "_get_sys", "_load_nvidia")
    parts = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.FunctionDef) and node.name.startswith(wanted))
    ]
    names = [node.name for node in parts if isinstance(node, ast.FunctionDef)]
    call = "_load_cudnn()" if "_load_cudnn" in names else "_load_cuda_library('cudnn')"
    system = packages / "system" / "lib64"
    system.mkdir(parents=True)
    (system / "libcudnn.so").write_bytes(b"")
    own = "from transformer_engine"
    lines = [ast.unparse(node) for node in parts if not ast.unparse(node).startswith(own)]
    code = "\n".join([*lines, "ctypes.CDLL = lambda path, mode=0: print(path)", call])
    for home, expected in (("", "system/lib64"), ("nvidia/cudnn", "nvidia/cudnn/lib")):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDNN", "CUDA"))}
        environment["CUDA_HOME"] = str(packages / "system")
        if home:
            environment["CUDNN_HOME"] = str(packages / home)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert f"{packages}/{expected}/libcudnn.so" in done.stdout.splitlines()[0]
