"""Which kernel a device gets, and that every kernel's calls fit this torch's operators; no GPU needed."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eso.errors import ConfigError
from megatron_eso.model import compiled, rotary
from megatron_eso.model.attention import kernels, split, store
from megatron_eso.model.attention.core import EsoCoreAttention
from megatron_eso.model.attention.kernels import Facts, choose_kernel
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.model.attention.split import split_attention
from megatron_eso.model.rotary import rotate
from megatron_eso.parallel.device import be_deterministic
from tests.replaced import replaced

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("facts", "dtype", "head_size", "name"),
    [
        pytest.param(Facts("cpu"), FP32, 20, "cpu flash", id="cpu"),
        pytest.param(Facts("cuda", HOPPER, 91900), BF16, 128, "cudnn", id="hopper"),
        pytest.param(Facts("cuda", (10, 0), 91900), BF16, 64, "cudnn", id="blackwell"),
        pytest.param(Facts("cuda", HOPPER, 91000), BF16, 128, "flash", id="broken-cudnn"),
        pytest.param(Facts("cuda", HOPPER, 91001), BF16, 128, "flash", id="broken-cudnn-2"),
        pytest.param(Facts("cuda", HOPPER, 91002), BF16, 128, "cudnn", id="mended-cudnn"),
        pytest.param(Facts("cuda", HOPPER, 0), BF16, 128, "flash", id="no-cudnn"),
        pytest.param(Facts("cuda", HOPPER, 91900, True), BF16, 128, "flash", id="deterministic"),
        pytest.param(Facts("cuda", HOPPER, 91900), BF16, 192, "flash", id="wide-heads"),
        pytest.param(Facts("cuda", AMPERE, 91900), BF16, 128, "flash", id="ampere"),
        pytest.param(Facts("cuda", HOPPER, 91900), BF16, 512, "memory-efficient", id="wider-heads"),
        pytest.param(Facts("cuda", TURING, 91900), torch.float16, 64, "memory-efficient", id="turing"),
        pytest.param(Facts("cuda", HOPPER, 91900), FP32, 128, "memory-efficient", id="fp32"),
    ],
)  # fmt: skip
def test_the_kernel_follows_from_device_format_and_head_size(facts, dtype, head_size, name):
    assert choose_kernel(facts, dtype, head_size).name == name


@pytest.mark.parametrize(
    ("dtype", "head_size", "message"),
    [(BF16, 36, "multiple of 8"), (FP32, 6, "multiple of 4"), (torch.float64, 64, "dense")],
)
def test_what_no_kernel_computes_is_refused_with_what_helps(dtype, head_size, message):
    with pytest.raises(ConfigError, match=message):
        choose_kernel(Facts("cuda", HOPPER, 91900), dtype, head_size)


class LogSumExps(TorchDispatchMode):
    """Records the shape of each log-sum-exp that an attention operator returns or receives."""

    def __init__(self):
        super().__init__()
        self.returned, self.given = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():
            names = [argument.name for argument in func._schema.arguments]
            if "logsumexp" in names:
                self.given.append(tuple(args[names.index("logsumexp")].shape))
            else:
                self.returned.append(tuple(result[1].shape))
        return result


@pytest.mark.parametrize(
    ("facts", "dtype", "operator_shape"),
    [
        pytest.param(Facts("cuda", HOPPER, 91900), BF16, (2, 4, 50, 1), id="cudnn"),
        pytest.param(Facts("cuda", AMPERE, 91900), BF16, (2, 4, 50), id="flash"),
        pytest.param(Facts("cuda", HOPPER, 91900), FP32, (2, 4, 64), id="memory-efficient"),
    ],
)
def test_split_attention_fits_the_operators_of_this_torch(
    monkeypatch, facts, dtype, operator_shape
):
    """On the meta device, operators check their arguments and shapes but compute nothing."""
    monkeypatch.setattr(kernels, "facts_of", lambda device: facts)
    inputs = [
        torch.empty(5, heads, 50, 64, dtype=dtype, device="meta", requires_grad=True)
        for heads in (4, 2, 2)
    ]
    with LogSumExps() as seen:
        out = split_attention(*inputs, num_pairs=2, scale=0.1)
        out.sum().backward()
    assert (out.shape, out.dtype) == ((5, 4, 50, 64), dtype)
    assert all(x.grad.shape == x.shape for x in inputs)
    assert seen.returned[1] == operator_shape  # Z rows; D and X rows come first
    assert sorted(seen.given) == sorted(seen.returned)


@pytest.mark.parametrize(
    ("dtype", "length", "computed_in"),
    [
        pytest.param(BF16, 128, FP32, id="short rows in bf16"),
        pytest.param(BF16, 512, BF16, id="long rows in bf16"),
        pytest.param(torch.float64, 128, torch.float64, id="float64"),
    ],
)
def test_short_rows_of_bf16_have_float32_gradients_on_a_cpu(dtype, length, computed_in):
    """PyTorch's backward kernel takes longer in bf16 there (docs/performance.md)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, 3, length, 32, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(4)
    )
    forward = kernels.causal_forward(query, key, value, 0.2)
    ours = kernels.causal_backward(grad, query, key, value, forward, 0.2)
    expected = kernels.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.to(computed_in) for x in (grad, query, key, value, forward.out)),
        forward.lse, 0.0, True, scale=0.2,
    )  # fmt: skip
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype is dtype
        assert torch.equal(mine, theirs.to(dtype))


@pytest.fixture
def cases():
    """Make a CPU compile what a GPU would; return a counter of the compiled cases."""
    torch.compiler.reset()
    compiled._compiled.cache_clear()
    counter = CompileCounter()
    compile_ = partial(torch.compile, backend=counter, fullgraph=True)
    everywhere = lambda x: True  # noqa: E731
    places = [(compiled, "is_compiled"), (rotary, "is_compiled"), (split, "is_compiled")]
    with replaced([(where, name, everywhere) for where, name in places]):
        with replaced([(torch, "compile", compile_)]):
            yield counter
    compiled._compiled.cache_clear()
    torch.compiler.reset()


def rows_of(length, rows, heads, groups, *, needs_gradient=True):
    """Return queries, keys and values [L, R, ., d] as slices of one projection's output, and angles."""
    generator = torch.Generator().manual_seed(length + rows)
    shape = (length, rows, groups, (heads // groups + 2) * 8)
    mixed = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(
        needs_gradient
    )
    query, key, value = mixed.split([heads // groups * 8, 8, 8], dim=3)
    angles = torch.randn(2, length, rows, 1, 4, generator=generator, dtype=torch.float64)
    return mixed, query.reshape(length, rows, heads, 8), key, value, *angles


def pass_of_a_layer(shape, **settings):
    """Rotate, attend and run backward, for rows of which the last four are pairs; return the results."""
    mixed, query, key, value, cos, sin = rows_of(*shape, **settings)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    of_heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = split_attention(*of_heads, num_pairs=min(2, shape[1] // 2), scale=0.3)
    if out.requires_grad:
        out.square().sum().backward()
    return out.detach(), mixed.grad


# Training, a last batch, evaluations of other lengths, one row, no gradient.
SHAPES = [(16, 6), (16, 4), (16, 5), (48, 6), (7, 2), (128, 4)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)], ids=["heads", "grouped"])
def test_what_a_gpu_compiles_is_the_same_in_few_cases(cases, heads, groups):
    """After eight cases of a function, PyTorch runs it uncompiled and says little about it."""
    found = [
        pass_of_a_layer((*shape, heads, groups), needs_gradient=is_trained)
        for shape in SHAPES
        for is_trained in (True, False)
    ]
    # Rotation and its inverse, for queries and keys; self term and gradients, for one pair and for more.
    assert cases.frame_count == 2 * (1 if heads == groups else 2) + 2 * 2
    with replaced([(m, "is_compiled", lambda x: False) for m in (rotary, split)]):
        for (out, grad), shape in zip(found[::2], SHAPES, strict=True):
            expected, expected_grad = pass_of_a_layer((*shape, heads, groups))
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_the_deterministic_mode_sets_the_environment_and_refuses_a_contrary_one():
    before = torch.are_deterministic_algorithms_enabled()
    environ = {"NCCL_ALGO": "Tree,Ring"}
    try:
        be_deterministic(environ)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)
    assert (environ["NCCL_ALGO"], environ["CUBLAS_WORKSPACE_CONFIG"]) == ("Tree,Ring", ":4096:8")
    with pytest.raises(ConfigError, match="NCCL_ALGO=NVLS"):
        be_deterministic({"NCCL_ALGO": "NVLS"})


def test_a_sampler_does_not_use_the_kernel_that_plans_anew_for_each_number_of_keys():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    found = []

    class Store:
        def extend(self, layer, key, value):
            return (x.permute(1, 2, 0, 3) for x in (key, value))

    def attend(query, *rest, **settings):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return query

    segment = torch.zeros(1, 2, 2, 8)
    rows = AttentionRows(cos=torch.ones(1, 2, 1, 4), store=Store())
    with replaced([(store, "scaled_dot_product_attention", attend)]):
        EsoCoreAttention.attend_rotated(
            SimpleNamespace(backend="split", layer_number=1, scale=1.0), *[segment] * 3, rows
        )
    assert found == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() is before is True


def test_a_cudnn_that_pytorch_was_not_built_with_is_named():
    def version():
        raise RuntimeError("cuDNN version incompatibility: compiled against (9, 19, 0)\nmore")

    with (
        replaced([(torch.backends.cudnn, "version", version)]),
        pytest.raises(ConfigError, match=r"CUDNN_HOME and LD_LIBRARY_PATH .*\(9, 19, 0\)$"),
    ):
        kernels._cudnn_version()
