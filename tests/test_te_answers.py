"""Our rules, our choice of kernel and the stand-in, against what the compiled Transformer Engine answers.

tests/data/te_attention.json holds which attention release 2.11.0 chooses for causal rows in training on
many kinds of machines; tools/te_attention_oracle.py asked its compiled library.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_eso.config import load_config
from megatron_eso.config.check import check
from megatron_eso.config.precision_rules import BROKEN_CUDNN, Machine, broken
from megatron_eso.config.precision_table import MACHINE_RULES
from megatron_eso.model.attention.kernels import CUDNN, Facts, choose_kernel

ANSWERS = [
    (tuple(capability), tuple(cudnn), *rest)
    for capability, cudnn, *rest in json.loads(
        (Path(__file__).parent / "data" / "te_attention.json").read_text()
    )["rows"]
]
ON_FP8 = ["precision.fp8=tensorwise", "precision.fp8_attention=true"]


def broken_rules(capability, cudnn, dtype, length):
    config = load_config(
        None,
        [
            "model.hidden_size=4096", "model.num_layers=2", "model.num_heads=32",
            "model.num_kv_heads=8", "model.max_length=4096", f"train.sequence_length={length}",
            "train.steps=1", "precision.dtype=bf16", "precision.attention=te",
            *(ON_FP8 if dtype == "fp8" else []),
        ],
    )  # fmt: skip
    check(config)
    machine = Machine("a GPU", capability, (2, 11, 0), "", cudnn, "DelayedScaling")
    return broken(MACHINE_RULES, config, machine)


def test_a_run_is_refused_for_the_machine_where_transformer_engine_has_no_fp8_attention():
    asked = [row for row in ANSWERS if row[2] == "fp8" and row[3] == 128]
    assert {row[5] for row in asked} == {None, "FP8"}
    for capability, cudnn, dtype, _, length, answer in asked:
        is_refused = bool(broken_rules(capability, cudnn, dtype, length))
        expected = answer is None or cudnn in BROKEN_CUDNN  # not without its bf16 layers
        assert is_refused is expected, (capability, cudnn, length, answer)


def test_no_rule_refuses_bf16_attention_that_transformer_engine_computes():
    asked = [row for row in ANSWERS if row[2] == "bf16" and row[3] == 128]
    refused = {row[:2] for row in asked if broken_rules(row[0], row[1], row[2], row[4])}
    assert refused == {row[:2] for row in asked if row[1] in BROKEN_CUDNN}
    assert all(row[5] is None for row in asked if row[:2] in refused)


def test_cudnn_is_chosen_only_where_transformer_engine_takes_it():
    chosen = 0
    for capability, (major, minor, patch), dtype, head_size, length, answer in ANSWERS:
        if dtype == "fp8" or head_size % 8:
            continue
        facts = Facts("cuda", capability, major * 10000 + minor * 100 + patch)
        if choose_kernel(facts, torch.bfloat16, head_size) is CUDNN:
            chosen += 1
            assert answer == "F16_arbitrary_seqlen", (capability, facts.cudnn, head_size, length)
    assert chosen


@pytest.mark.slow
def test_the_stand_in_answers_as_the_compiled_library(te_ranks):
    asked = [row for row in ANSWERS if row[:2] == ((9, 0), (9, 14, 0))]
    found = te_ranks.run("te_jobs.kernels", [row[2:5] for row in asked])[0]
    assert found == [row[5] for row in asked]
    assert {None, "FP8", "F16_arbitrary_seqlen"} == set(found)
