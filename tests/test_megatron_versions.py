"""Recipes in Megatron-Core's own configuration classes, and the trainer, on both supported versions.

The installed version is always tested. The newer one has no wheel for Python 3.11. Its wheel is pure
Python except for a part that is not used here, so it is unpacked, with a stand-in for triton, which it
imports immediately for kernels that no CPU runs.
"""

import numpy as np
import pytest

from tests import released
from tests.version_jobs import RECIPES, megatron_settings

NEWER, NEWER_TE = "0.19.2", "2.20.2"
OFF = {
    "bf16": True,
    "fp8": None,
    "fp8_param": False,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "first_last_layers_bf16": False,
    "attention_backend": "auto",
    "params_dtype": "torch.bfloat16",
    "gather_fp8": False,
    "optimizer_recipe": None,
}
ON = {
    **OFF,
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "optimizer_recipe": "tensorwise",
}
EXPECTED = {
    "fp32": {**OFF, "bf16": False, "params_dtype": "torch.float32"},
    "bf16": OFF,
    "bf16, te attention": {**OFF, "attention_backend": "fused"},
    "delayed": {
        **ON,
        "fp8_recipe": "delayed",
        "optimizer_recipe": "delayed",
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
    },
    "tensorwise": ON,
    "bf16 ends": {
        **ON,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2,
    },
    "fp8 attention": {**ON, "fp8_dot_product_attention": True, "attention_backend": "fused"},
    "fp8 parameters": {**ON, "fp8_param": True, "gather_fp8": True},
}


def require_expected(found):
    assert EXPECTED.keys() == RECIPES.keys()
    for name, expected in EXPECTED.items():
        assert {field: found[name][field] for field in expected} == expected, name


@pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")
def test_every_recipe_becomes_the_installed_megatrons_settings():
    require_expected(megatron_settings())


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """Return two ranks on the newer Megatron-Core, over the stand-ins."""
    pool = released.te_pool(tmp_path_factory.mktemp, NEWER_TE, NEWER)
    yield pool.run
    pool.close()


@pytest.mark.slow
def test_every_recipe_becomes_the_newer_megatrons_settings(newer):
    found = newer("version_jobs.megatron_settings")[0]
    assert found["version"] == NEWER
    require_expected(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "near"),
    [
        pytest.param(["parallel.tensor=2"], 1e-6, id="tensor"),
        pytest.param(["parallel.pipeline=2"], 1e-6, id="pipeline"),
        pytest.param(["precision.dtype=bf16"], 5e-4, id="data-bf16"),
    ],
)
def test_the_newer_megatron_trains_saves_and_resumes_like_the_installed_one(
    newer, two_ranks, tmp_path, layout, near
):
    """The newer one uses Transformer Engine's Adam, the other PyTorch's; they round in different order."""
    settings = [*layout, "precision.backend=torch"]
    expected = two_ranks.run("train", settings, 4)[0]["losses"]
    found = newer("train", settings, 4, str(tmp_path), 2)[0]["losses"]
    np.testing.assert_allclose(found, expected, rtol=near)
    again = newer("train", settings, 4, str(tmp_path), None, True)[0]["losses"]
    assert again == found[2:]
    # Checkpoints move between the two.
    moved = two_ranks.run("train", settings, 4, str(tmp_path), None, True)[0]["losses"]
    np.testing.assert_allclose(moved, expected[2:], rtol=near)


@pytest.mark.slow
def test_layers_run_from_cuda_graphs_on_the_newer_megatron(newer):
    """Uses the stand-in of tests/cpu_graphs.py."""
    settings = ["parallel.tensor=2", "parallel.overlap=true", "precision.backend=torch"]
    plain = newer("graph_jobs.train", settings)[0]
    graphed = newer("graph_jobs.train", [*settings, "parallel.cuda_graphs=true"])[0]
    assert graphed["replays"] > 0
    assert graphed["losses"] == plain["losses"]


@pytest.mark.slow
def test_te_layers_train_on_the_newer_megatron(newer):
    settings = ["model.qk_norm=true", "parallel.tensor=2"]
    torch, te = (
        newer("te_jobs.on_h100", "train", [*settings, f"precision.backend={b}"], 3)[0]["losses"]
        for b in ("torch", "te")
    )
    np.testing.assert_allclose(te, torch, rtol=1e-6)
    fp8 = ["precision.dtype=bf16", "precision.fp8=delayed"]
    losses = newer("te_jobs.on_h100", "train", [*settings, *fp8], 3)[0]["losses"]
    np.testing.assert_allclose(losses, torch, rtol=0.05)
