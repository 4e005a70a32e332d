"""The configuration of a run: schema, loading, rules between settings, derived numbers."""

from megatron_eso.config.check import check, check_start, violations
from megatron_eso.config.derive import Derived
from megatron_eso.config.load import load_config, load_run, save_config, to_yaml
from megatron_eso.config.schema import RunConfig

__all__ = [
    "Derived",
    "RunConfig",
    "check",
    "check_start",
    "load_config",
    "load_run",
    "save_config",
    "to_yaml",
    "violations",
]
