"""The architecture: levels of imports, who may import Megatron, sizes of files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_eso"
LEVELS = {
    "errors": 0, "files": 0, "garbage": 0, "log_axis": 0, "config": 1, "objective": 2, "plan": 2,
    "launch": 2, "scaling": 3, "data": 3, "parallel": 3, "model": 4, "checkpoint": 4.5, "resilience": 4,
    "export": 5, "sample": 5.5, "eval": 6, "train": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
DOOR = {"parallel", "model", "checkpoint"}
TORCH_FREE = {"config", "plan", "launch", "scaling", "errors", "files", "garbage", "log_axis"}
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path):
    inner = path.relative_to(PACKAGE).parts
    return inner[0].removesuffix(".py")


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module


def parsed():
    return [
        (path, ast.parse(path.read_text()))
        for path in FILES
        if path.parent != PACKAGE or path.stem != "__init__"
    ]


def test_imports_go_downwards_only():
    wrong = []
    for path, tree in parsed():
        own = package_of(path)
        for _, name in imports_of(tree):
            parts = name.split(".")
            if (
                parts[0] == "megatron_eso"
                and len(parts) > 1
                and parts[1] != own
                and LEVELS[parts[1]] >= LEVELS[own]
            ):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_only_three_packages_open_the_door_to_megatron():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, tree in parsed()
        for _, name in imports_of(tree)
        if name.split(".")[0] in ("megatron", "transformer_engine") and package_of(path) not in DOOR
    ]
    assert not wrong, wrong


def test_megatron_training_is_never_imported():
    assert not [
        path for path, tree in parsed() for _, name in imports_of(tree)
        if name.startswith("megatron.") and not name.startswith("megatron.core")
    ]  # fmt: skip


READS_OWN_PICKLES = {"parallel/fp8_state.py"}  # Transformer Engine's, made in this process


def test_no_file_is_unpickled_without_restriction():
    """A file may come from others; torch_dist.py and inert_pickle.py read pickles without running them."""
    wrong = []
    for path, tree in parsed():
        place = path.relative_to(PACKAGE).as_posix()
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                wrong.append(f"{place}: {name}")
            if name in ("pickle.load", "pickle.loads") and place not in READS_OWN_PICKLES:
                wrong.append(f"{place}: {name}")
            if name in ("dist_checkpointing.load", "FileSystemReader") or "allow_pickle" in options:
                wrong.append(f"{place}: {name}")
    assert not wrong, wrong


def test_files_and_functions_stay_readable():
    wrong = []
    for path, tree in parsed():
        lines = len(path.read_text().splitlines())
        if lines > 400:
            wrong.append(f"{path.relative_to(PACKAGE)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node, clean=False)
                body = (node.end_lineno or 0) - node.body[0].lineno + 1
                body -= len(doc.splitlines()) if doc else 0
                if body > 60:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.name}: {body} lines")
    assert not wrong, wrong


def test_every_file_says_what_it_is():
    assert not [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]


def module_name(path):
    inner = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("megatron_eso", *inner)).removesuffix(".__init__")


@pytest.mark.parametrize("package", sorted(TORCH_FREE))
def test_the_top_runs_without_torch(package):
    """Modules of these packages import on a machine that has no torch, megatron or tokenizers."""
    modules = [module_name(path) for path in FILES if package_of(path) == package]
    script = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'tokenizers', 'transformer_engine'): sys.modules[name] = None\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
