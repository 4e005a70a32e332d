"""Reads Transformer Engine's modules with what asks for a GPU's memory taken as answered.

A tensor's attribute ``is_cuda`` is true, and ``.cuda()`` is ``.cpu()``: both belong to tensors, which are
PyTorch's own, so the words are replaced where the module is read. Modules of triton's kernels and of the
export to ONNX have no content: they need packages of their own and no test uses them.
"""

import ast
import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_PACKAGE = "transformer_engine.pytorch"
_EMPTY = (f"{_PACKAGE}.triton", f"{_PACKAGE}.onnx_extensions")


class _OnCpu(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Constant(True), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr, node.args = "cpu", []
        return node


class _OnCpuLoader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **settings: Any) -> Any:
        tree = ast.fix_missing_locations(_OnCpu().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True)

    def path_stats(self, path: Any) -> Any:
        raise OSError("no compiled file is read or written: it would be of the words as released")


class _EmptyLoader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _nothing  # type: ignore[method-assign]


def _nothing(name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.startswith(_EMPTY):
            return ModuleSpec(name, _EmptyLoader(), is_package=True)
        if not name.startswith(_PACKAGE):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            spec.loader = _OnCpuLoader(name, spec.origin)
        return spec


def install() -> None:
    """Read every module that is imported from here on so.

    PyTorch's compiler is imported first, without the tests' stand-in for triton, which it would take for
    the real one.
    """
    before = sys.modules.get("triton")
    sys.modules["triton"] = None  # type: ignore[assignment]
    importlib.import_module("torch._dynamo")
    del sys.modules["triton"]
    if before is not None:
        sys.modules["triton"] = before
    sys.meta_path.insert(0, _Finder())
