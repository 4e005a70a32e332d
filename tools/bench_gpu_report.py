"""The report of the GPU benchmark's results: printed as they come and kept in a file."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_eso.errors import ConfigError
from megatron_eso.files import write_json
from tools.bench_gpu_parts import free_memory


class Report:
    """Prints results as they come and keeps them in a file, beside those of earlier calls."""

    def __init__(self, out: Path | None, machine: dict[str, Any]) -> None:
        """Begin with the results in ``out``, if there are any.

        Raises:
            ConfigError: if they come from another machine or other software.
        """
        self._out, self._rows = out, []
        self.failures = 0
        if out is not None and out.is_file():
            self._rows = json.loads(out.read_text())
            before = self._rows[0]
            changed = {k: (before.get(k), v) for k, v in machine.items() if before.get(k) != v}
            if changed:
                said = ", ".join(f"{name}: {a}, now {b}" for name, (a, b) in changed.items())
                raise ConfigError(
                    f"{out} holds results of another machine ({said}); name another --out"
                )
        self.section("machine")
        self.row("machine", **machine)

    def section(self, title: str) -> None:
        """Begin a table."""
        self._title = title
        print(f"\n## {title}\n", flush=True)

    def row(self, what: str, **values: Any) -> None:
        """Add a result, replacing an earlier one of the same name; lists are kept but not printed."""
        same = {"section": self._title, "what": what}
        places = [i for i, row in enumerate(self._rows) if same.items() <= row.items()]
        at = places[0] if places else len(self._rows)
        self._rows[at : at + 1] = [{**same, **values}]
        shown = [(k, v) for k, v in values.items() if not isinstance(v, list)]
        print(f"{what:<44} " + "  ".join(f"{k} {_shown(v)}" for k, v in shown), flush=True)
        if self._out is not None:
            write_json(self._out, self._rows)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Report an error that stops one result, and continue with the others."""
        try:
            yield
        except ConfigError as error:
            self.row(what, result=f"not measured: {error}")
        except torch.OutOfMemoryError:
            self.row(what, result="out of memory")
        except Exception as error:  # a kernel's compiler may fail in any way
            self.failures += 1
            self.row(what, result=f"failed: {type(error).__name__}: {error}"[:300])
            traceback.print_exc()
        free_memory()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "-" if value is None else str(value)
