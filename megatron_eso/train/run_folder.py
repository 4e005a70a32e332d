"""The run folder: what it holds, who may write to it, and whether it belongs to the same run.

config.yaml      resolved configuration      run.json     commit, versions, layout
log.txt          plain log                   metrics.jsonl  one object per logged step
status.json      where the run is            tensorboard/  event files
checkpoints/     see checkpoint/folder.py    evaluation.json
tokenizer.json   a copy, so that the run can be sampled from without its data
"""

import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_eso.checkpoint.folder import list_folders
from megatron_eso.config.load import load_config, save_config
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.files import require_room, write_json, write_whole
from megatron_eso.launch import lease
from megatron_eso.launch.environment import is_of_job_script

# What may differ when a run continues: how it is computed and reported, not what is computed.
_FREE_SECTIONS = {"parallel", "precision", "checkpoint", "eval", "resilience"}
_FREE_KEYS = {
    "name", "folder", "train.steps", "train.tokens", "train.micro_batch_rows",
    "train.log_every_steps", "train.profile_steps", "train.profile_ranks",
    "train.eval_every_steps", "train.save_every_steps",
    "data.num_workers", "data.prefetch_shards", "data.cache_dir", "data.cache_limit_gib",
    "data.retries", "data.timeout_seconds", "data.verify_hashes", "data.validation",
}  # fmt: skip


class RunFolder:
    """A run's paths, and its files that are written once or replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer.json"

    def take(self) -> None:
        """Make the folder and take its lease, before anything in it is touched.

        Raises:
            CheckpointError: if another run or a newer attempt holds the lease.
            OSError: if the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lease.acquire(self.checkpoints, lease.owner_name(os.environ))
        require_room(self.path)

    def is_taken(self) -> bool:
        """Return whether this process still holds the folder's lease."""
        try:
            held = lease.read(self.checkpoints)
        except OSError:
            return False
        return held is not None and held["owner"] == lease.owner_name(os.environ)

    def give_back(self) -> None:
        """Release the lease if this process holds it, unless it is the job script's."""
        if self.is_taken() and not is_of_job_script(os.environ):
            lease.release(self.checkpoints, lease.owner_name(os.environ))

    def earlier_config(self, config: RunConfig) -> RunConfig | None:
        """Return the configuration of the run in the folder; None if there is no run.

        Raises:
            ConfigError: if that run has other settings than ``config``.
        """
        stored = self.path / "config.yaml"
        has_checkpoint = any(
            folder.is_committed or folder.is_set_aside for folder in list_folders(self.checkpoints)
        )
        # A start that failed before its first step leaves nothing worth keeping.
        has_begun = has_checkpoint or (self.path / "metrics.jsonl").exists()
        if not stored.exists() or not has_begun:
            return None
        earlier = load_config(stored)
        # A checkpoint's fingerprint tells whether the data is the same, wherever it now lies.
        changed = _differences(
            _compared(earlier, with_paths=not has_checkpoint),
            _compared(config, with_paths=not has_checkpoint),
        )
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with other settings:\n  - "
                + "\n  - ".join(changed)
                + "\nchoose another folder=... (or name=...), or remove that one"
            )
        return earlier

    def describe(self, config: RunConfig, tokenizer: bytes) -> None:
        """Write configuration, provenance and a copy of the tokenizer, each whole or not at all.

        Raises:
            OSError: if a file cannot be written; names the file.
        """
        save_config(config, self.path / "config.yaml")
        write_json(self.path / "run.json", _provenance())
        write_whole(self.tokenizer, tokenizer)

    def open_log(self) -> None:
        """Send log messages to log.txt and the terminal."""
        # With a full disk the line is still on the terminal; logging's traceback would add nothing.
        logging.raiseExceptions = False
        handlers = [
            logging.FileHandler(self.path / "log.txt"),
            logging.StreamHandler(sys.stdout),
        ]
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(message)s",
            datefmt="%H:%M:%S",
            handlers=handlers,
            force=True,
        )
        for noisy in ("megatron", "torch"):
            logging.getLogger(noisy).setLevel(logging.ERROR)

    def write_status(self, state: str, **facts: Any) -> None:
        """Write the run's state: running, finished, stopped or failed."""
        status = {"state": state, **facts, "updated": time.time()}
        write_json(self.path / "status.json", status, durable=False)  # written often, for observers


def _compared(config: RunConfig, *, with_paths: bool) -> dict[str, Any]:
    """Return the settings, with or without the paths of the training data."""
    settings = asdict(config)
    for source in settings["data"]["sources"]:
        if not with_paths:
            del source["path"]
    return settings


def _differences(stored: dict, asked: dict) -> list[str]:
    found = []
    for section, value in asked.items():
        if section in _FREE_SECTIONS or section in _FREE_KEYS:
            continue
        for key, new in value.items():
            old = stored[section].get(key)
            if old != new and f"{section}.{key}" not in _FREE_KEYS:
                found.append(f"{section}.{key}: {old!r} there, {new!r} asked")
    return found


def _provenance() -> dict[str, Any]:
    return {
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in ("megatron-core", "transformer-engine")},
        "host": platform.node(),
        "num_ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("SLURM_JOB", "NCCL_"))
        },
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
