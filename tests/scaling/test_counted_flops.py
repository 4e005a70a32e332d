"""Our formula against torch's counter, run on the real model and the real rows of each objective.

The counter sees every pair of a row, so the convention "all pairs" is compared; the head is counted
on the entries that really carry loss, drawn with the step's own masks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = """
import json, os, sys
import torch
from torch.utils.flop_counter import FlopCounterMode
from megatron_eso.config import load_config
from megatron_eso.launch.environment import Ranks
from megatron_eso.parallel.exchange import Rows
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.train.session import build_session
from megatron_eso.train.step import micro_batches_of_rank, stack_rows_of_step

def pairs(query, key, value, *rest, out_shape=None, **named):
    b, h, length, d = query
    return 4 * b * h * length * key[2] * d

attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: pairs}
found = []
for settings in json.loads(sys.argv[1]):
    config = load_config(None, settings)
    session = build_session(config, Ranks.from_environment(os.environ))
    length, number = config.train.sequence_length, config.train.global_batch_rows
    tokens = torch.randint(0, config.model.vocab_size - 1, (number, length + 1))
    batches = micro_batches_of_rank(session)
    order = [row for batch in batches for row in batch.rows]
    rows = Rows(tokens[order], torch.ones(number, length + 1, dtype=torch.bool))
    stack = stack_rows_of_step(session, rows, batches)
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
        for part in stack:
            session.chunks[0](part)
    expected = model_flops_per_step(config.model, config.objective, sequence_length=length, rows=number)
    entries = sum(len(part.loss_entries) for part in stack)
    ours = expected.layers + expected.attention_full + expected.head
    found.append((settings[-1], counter.get_total_flops(), ours, entries))
print("RESULT" + json.dumps(found))
os._exit(0)
"""
OBJECTIVES = {
    "ar": ["objective.name=ar"],
    "mdlm": ["objective.name=mdlm"],
    "bd3lm-16": ["objective.name=bd3lm", "objective.block_size=16"],
    "eso-1": ["objective.alpha_0=1"],
    "eso-0.5": ["objective.alpha_0=0.5"],
    "eso-0.25": ["objective.alpha_0=0.25"],
    "eso-0": ["objective.alpha_0=0"],
}
SIZES = {"48x2": (48, 2, 2, None), "64x3": (64, 3, 4, 2), "96x4": (96, 4, 4, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_formula_equals_the_counters_count_to_one_percent(size):
    hidden, layers, heads, kv_heads = SIZES[size]
    shape = [
        f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.num_heads={heads}",
        f"model.num_kv_heads={kv_heads or 'null'}", "model.vocab_size=256", "train.sequence_length=256",
        "train.steps=1", "train.global_batch_rows=32", "train.micro_batch_rows=4",
        "precision.dtype=fp32",
    ]  # fmt: skip
    settings = [[*shape, *objective] for objective in OBJECTIVES.values()]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + hidden), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(settings)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    for name, counted, ours, _ in json.loads(done.stdout.split("RESULT")[1].splitlines()[0]):
        assert ours == pytest.approx(counted, rel=0.01), name
