"""A checkpoint's facts: they are read as they were written, and are plain JSON."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_eso.checkpoint.folder import (
    FORMAT_VERSION,
    SIDECAR,
    CheckpointFolder,
    tokenizer_path,
)
from megatron_eso.checkpoint.load import require_same_model
from megatron_eso.checkpoint.replica import run_config_of
from megatron_eso.config import load_config
from megatron_eso.config.schema import ParallelConfig
from megatron_eso.data.manifest import sha256_of
from megatron_eso.errors import CheckpointError
from megatron_eso.files import write_json
from megatron_eso.train.keeper import facts_of_run
from megatron_eso.train.session import TrainState

RUNS = sorted((Path(__file__).parent.parent / "configs" / "run").glob("*.yaml"))
STATE = TrainState(step=7, left_out=[3], losses=[2.5, 2.25])


def facts(config, kept_tokenizer=Path("none"), **data):
    """Return the facts of a run at step 7."""
    session: Any = SimpleNamespace(
        config=config, state=STATE, average=object(), ranks=SimpleNamespace(world_size=8)
    )
    return facts_of_run(session, data, kept_tokenizer)


def written(folder, facts):
    path = folder / "checkpoints" / "step_0000000007"
    path.mkdir(parents=True)
    write_json(path / SIDECAR, facts)
    return CheckpointFolder(path)


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_facts_are_read_back_as_the_configuration_that_they_are_of(tmp_path, run):
    config = load_config(run)
    said = facts(config)
    assert json.loads(json.dumps(said)) == said  # no tuple, no key that is a number
    folder = written(tmp_path, said)
    assert folder.sidecar() == said
    assert (folder.step, said["format_version"], said["has_ema"]) == (7, FORMAT_VERSION, True)
    layout = ParallelConfig(tensor=2)
    again = run_config_of(folder, layout)
    assert (again.model, again.objective, again.parallel) == (
        config.model,
        config.objective,
        layout,
    )
    assert again.train.sequence_length == config.train.sequence_length
    assert ParallelConfig(**said["parallel"]) == config.parallel
    assert TrainState(**said["train_state"]) == STATE
    assert said["mask_token_id"] == config.model.vocab_size - 1
    assert (said["tokenizer"], said["num_ranks"]) == (None, 8)


def test_facts_tell_another_model_and_the_tokenizer(tmp_path):
    config = load_config(RUNS[0])
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    folder = written(tmp_path, facts(config, tokenizer, tokenizer=sha256_of(tokenizer)))
    assert tokenizer_path(folder) == tokenizer
    require_same_model(folder.path, folder.sidecar(), config.model)
    deeper = replace(config.model, num_layers=config.model.num_layers + 1)
    with pytest.raises(CheckpointError, match=r"model\.num_layers"):
        require_same_model(folder.path, folder.sidecar(), deeper)


def test_facts_are_a_snapshot():
    """A save is written while the state keeps changing."""
    sources = ["a"]
    said = facts(load_config(RUNS[0]), sources=sources)
    sources.append("b")
    assert said["data"] == {"sources": ["a"]}
    STATE.losses.append(0.0)
    assert said["train_state"]["losses"] == [2.5, 2.25]
    STATE.losses.pop()
