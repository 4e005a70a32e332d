"""The same exported folder on transformers 4.57 and 5: same logits, same greedy text, same likelihood.

Each version is installed into its own folder, which comes before this environment's packages; torch and
the rest are shared.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_eso.export.exporter import export
from tests.test_export import small_tokenizer

# Installed without dependencies, so torch is not fetched again; what a version needs beyond ours is named.
VERSIONS = {
    "4.57.6": ["transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2"],
    "5.0.0": ["transformers==5.0.0", "huggingface_hub>=1.3,<2", "tokenizers==0.22.2", "httpx", "httpcore",
              "h11", "anyio", "typer-slim"],
}  # fmt: skip
SCRIPT = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
kind, folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
own = kind == "esolm"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own).eval()
ids = tokenizer("w1 w2 w3 w4 w5 w6", return_tensors="pt")["input_ids"]
found = {"version": transformers.__version__, "theta": model.config.rope_theta if own else None}
with torch.no_grad():
    if own:
        canvas = ids.clone()
        canvas[:, 2:5] = model.config.mask_token_id
        mask = torch.ones_like(ids)
        logits = model(input_ids=canvas, attention_mask=mask).logits[..., :-1]
        text = model.generate(ids, max_new_tokens=8, alpha_0=0.5, seed=1, do_sample=False)
        asked = GenerationConfig(max_length=ids.shape[1] + 8)  # 4.57 writes defaults into the rest
        same = model.generate(ids, generation_config=asked, alpha_0=0.5, seed=1)
        assert torch.equal(same, text)
        asked = model.generate(ids, generation_config=GenerationConfig(), alpha_0=0.5, seed=1)
        assert asked.shape[1] == ids.shape[1] + model.generation_config.max_new_tokens
        found["text"] = tokenizer.decode(text[0])
        found["likelihood"] = float(model.log_likelihood(ids[:, :3], ids[:, 3:]).log_likelihood)
        model.train()
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids, generator=generator).loss
            loss.backward()
        found["loss"] = loss.item()
        model.save_pretrained(out + "_saved")
        again = AutoModelForCausalLM.from_pretrained(out + "_saved", trust_remote_code=True).eval()
        assert torch.equal(again(input_ids=canvas).logits[..., :-1], logits)
    else:
        logits = model(input_ids=ids).logits
found["logits"] = logits.tolist()
json.dump(found, open(out, "w"))
"""


@pytest.fixture(scope="module")
def folders(two_ranks, tmp_path_factory):
    """Return exported folders, esolm and backbone, with a rotary base that a misread config would lose."""
    root = tmp_path_factory.mktemp("versions")
    tokenizer = small_tokenizer(root / "t.json", 60)
    overrides = ["model.qk_norm=true", "model.rotary_base=500000"]
    two_ranks.run("export_checkpoint", overrides, str(root / "checkpoint"))
    for kind in ("esolm", "backbone"):
        export(root / "checkpoint", root / kind, kind=kind, use_ema=False, tokenizer=tokenizer)
    return root


def run(folders, kind, version, packages=None):
    out = folders / f"{kind}_{version}.json"
    environment = {**os.environ, "HF_HOME": str(folders / f"home_{version}"), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(packages or "")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(folders / kind), str(out)],
        capture_output=True, text=True, env=environment, cwd=folders, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=VERSIONS)
def packages(request, tmp_path_factory):
    """Install one version into its own folder; skip visibly where there is no package index."""
    target = tmp_path_factory.mktemp("packages")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target),
         *VERSIONS[request.param]],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"NOT CHECKED on transformers {request.param}: pip said {done.stderr[-300:]}")
    return request.param, target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["esolm", "backbone"])
def test_a_version_of_transformers_gives_the_same_results(folders, packages, kind):
    version, target = packages
    here, there = run(folders, kind, "here"), run(folders, kind, version, target)
    assert there.pop("version") == version
    assert here.pop("version") != version
    a, b = torch.tensor(here.pop("logits")), torch.tensor(there.pop("logits"))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert there == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for name, value in here.items()
    }
