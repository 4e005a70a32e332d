"""The GPU's code path on a device that computes nothing: what a GPU would refuse shows on a laptop.

Not tested: numbers, speed, memory, and kernels' own conditions beyond those of PyTorch's meta functions.
"""

import pytest

from tests.rank_pool import RankPool

pytestmark = pytest.mark.slow

BF16, FP32 = "precision.dtype=bf16", "precision.dtype=fp32"
HEADS = "model.head_size=64"
NEW_CUDNN = 91900
CASES = {
    "flash": ([BF16], 1, 0),
    "cudnn": ([BF16, HEADS], 1, NEW_CUDNN),
    "memory-efficient": ([FP32], 1, 0),
    "dense": ([BF16, "precision.attention=dense"], 1, 0),
    "tensor": ([BF16, HEADS, "parallel.tensor=2"], 2, NEW_CUDNN),
    "tensor-without-sequence": ([BF16, "parallel.tensor=2", "parallel.sequence=false"], 2, 0),
    "context": ([BF16, HEADS, "parallel.context=2"], 2, NEW_CUDNN),
    "data": ([BF16], 2, 0),
    "recompute-layers": ([BF16, "parallel.recompute=full"], 1, 0),
    "recompute-attention": ([BF16, "parallel.recompute=attention"], 1, 0),
    "official-shape": (
        [BF16, "model.norm=layernorm", "model.activation=gelu", "model.mlp_bias=true",
         "model.head_bias=true", "model.attention_bias=true", "model.qk_norm=true",
         "model.dropout=0.1"], 1, 0,
    ),
    "ar": ([BF16, "objective.name=ar", "model.tie_embeddings=true"], 1, 0),
    "mdlm": ([BF16, "objective.name=mdlm"], 1, 0),
    "bd3lm": ([BF16, "objective.name=bd3lm", "objective.block_size=4"], 1, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def rank():
    pool = RankPool(1)
    yield lambda job, *args: pool.run(f"meta_jobs.{job}", *args)[0]
    pool.close()


@pytest.mark.parametrize("case", CASES)
def test_a_step_and_an_evaluation_stay_on_the_gpu(rank, case):
    """Covers everything up to the norm of the gradients, the update, and an evaluation up to its result."""
    settings, num_ranks, cudnn = CASES[case]
    found = rank("step_and_evaluation", settings, num_ranks, cudnn)
    assert found["num_operators"] > 1000
    assert found["devices"] == ["meta"]
    assert "Cannot copy out of meta tensor" in found["evaluation_ended"]


@pytest.mark.parametrize(
    ("objective", "padded"),
    [
        ("eso", False),
        ("eso", True),
        ("ar", False),
        ("mdlm", False),
        ("mdlm", True),
        ("bd3lm", False),
    ],
)
def test_no_step_of_a_sampler_waits_for_the_gpu(rank, objective, padded):
    """Launching the next step's kernels need not wait for the tokens of this one."""
    assert rank("sample", objective, padded) > 500


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("mixed", "takes tensors of the GPU and of the host"),
        ("index", "takes tensors of the GPU and of the host"),
        ("item", "waits for the GPU"),
        ("mask", "waits for the GPU"),
    ],
)
def test_the_watch_sees(rank, mistake, says):
    assert says in rank("complaint", mistake)
