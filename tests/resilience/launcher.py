"""`megatron-eso launch` with ranks that have faults: python -m tests.resilience.launcher JSON."""

import json
import sys
from pathlib import Path

from megatron_eso.launch.supervisor import Supervision, supervise

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    given["run"] = Path(given["run"])
    raise SystemExit(supervise(Supervision(module="tests.resilience.faulty_rank", **given)))
