"""lm-eval runs offline on an exported folder and scores what the model itself says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_eso.export.exporter import export
from megatron_eso.export.hf import register
from tests.test_export import small_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")
ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_example_tasks_run_offline_and_report_the_order(two_ranks, tmp_path):
    two_ranks.run("export_checkpoint", ["model.max_length=128"], str(tmp_path / "checkpoint"))
    tokenizer = small_tokenizer(tmp_path / "t.json", 60)
    export(tmp_path / "checkpoint", tmp_path / "out", use_ema=False, tokenizer=tokenizer)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_eso.eval.lm_eval", "run", "--model", "esolm",
         "--model_args", f"pretrained={tmp_path / 'out'},order=3,alpha_0=0.5,seed=2,dtype=float32",
         "--include_path", "configs/lm_eval", "--device", "cpu", "--batch_size", "3", "--log_samples",
         "--tasks", "example_choice,example_perplexity,example_generate",
         "--output_path", str(tmp_path / "r")],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
             "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "r").rglob("results*.json")).read_text())
    assert results["config"]["esolm_order"] == "log mean of 3 random order(s), alpha_0=0.5, seed 2"
    assert results["results"]["example_perplexity"]["bits_per_byte,none"] > 0
    assert "exact_match,none" in results["results"]["example_generate"]
    check_choices(tmp_path)


def check_choices(tmp_path):
    """Every logged score is the model's own: request n has the random orders of row n."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    file = next((tmp_path / "r").rglob("samples_example_choice*.jsonl"))
    number = 0
    for line in sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"]):
        for arguments, answer in zip(
            line["arguments"].values(), line["filtered_resps"], strict=True
        ):
            context, whole = arguments["arg_0"], arguments["arg_0"] + arguments["arg_1"]
            first, ids = tokenizer(context)["input_ids"], tokenizer(whole)["input_ids"]
            expected = model.log_likelihood(
                [first], [ids[len(first) :]], order=3, alpha_0=0.5, seed=2, row_numbers=[number]
            )
            assert float(answer[0]) == pytest.approx(float(expected.log_likelihood), abs=1e-3)
            number += 1
    assert number == 9
