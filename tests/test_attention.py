"""Split attention against the dense mask, and the dense mask against the definition of the passes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_eso.model.attention.dense import copies_mask, dense_attention, plain_mask
from megatron_eso.model.attention.flex import flex_rows_attention
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.model.attention.split import split_attention
from megatron_eso.objective.rows import Pattern


def random_inputs(rows, heads, groups, length, size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, h, length, size, generator=generator, dtype=dtype).requires_grad_()
        for h in (heads, groups, groups)
    ]


def outputs_and_gradients(function, inputs, **settings):
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*copies, **settings)
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in copies)]


@pytest.mark.parametrize("length", [1, 2, 13, 64, 130])
@pytest.mark.parametrize(("rows", "pairs"), [(3, 0), (2, 1), (5, 2), (4, 2)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_split_equals_dense_forward_and_backward(length, rows, pairs, heads, groups):
    inputs = random_inputs(rows, heads, groups, length, 8)
    settings = {"num_pairs": pairs, "scale": 0.3}
    split = outputs_and_gradients(split_attention, inputs, **settings)
    dense = outputs_and_gradients(dense_attention, inputs, **settings)
    for a, b in zip(split, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [1, 13, 130])
@pytest.mark.parametrize(
    ("pattern", "block_size", "is_padded"),
    [
        (Pattern.CAUSAL, 0, False),
        (Pattern.BLOCK, 4, False),
        (Pattern.BLOCK, 4, True),
        (Pattern.BIDIRECTIONAL, 0, False),
        (Pattern.BIDIRECTIONAL, 0, True),
    ],
)
def test_flex_equals_dense_forward(length, pattern, block_size, is_padded):
    inputs = [x.detach() for x in random_inputs(5, 4, 2, length, 8)]
    is_valid = None
    if is_padded:
        is_valid = torch.arange(length) < torch.tensor([length, 1, 2, length, 5])[:, None]
    settings = {
        "num_pairs": 0 if pattern is Pattern.BIDIRECTIONAL else 2, "scale": 0.3,
        "pattern": pattern, "block_size": block_size, "is_valid": is_valid,
    }  # fmt: skip
    dense = dense_attention(*inputs, **settings)
    torch.testing.assert_close(
        flex_rows_attention(*inputs, **settings), dense, rtol=1e-10, atol=1e-10
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*that is not a leaf.*")  # PyTorch's compiler causes it
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", [Pattern.CAUSAL, Pattern.BLOCK])
def test_flex_equals_dense_backward_on_a_gpu(pattern):
    inputs = [x.detach().float().cuda() for x in random_inputs(5, 4, 2, 256, 32)]
    settings = {"num_pairs": 2, "scale": 0.3, "pattern": pattern, "block_size": 16}
    flex = outputs_and_gradients(flex_rows_attention, inputs, **settings)
    for a, b in zip(flex, outputs_and_gradients(dense_attention, inputs, **settings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_split_is_accurate_in_low_precision(dtype, bound, device):
    inputs = random_inputs(4, 2, 2, 64, 16)
    exact = outputs_and_gradients(dense_attention, inputs, num_pairs=2, scale=0.25)
    low = outputs_and_gradients(
        split_attention, [x.detach().to(device, dtype) for x in inputs], num_pairs=2, scale=0.25
    )
    for a, b in zip(low, exact, strict=True):
        assert (a.cpu().double() - b).abs().max() < bound * b.abs().max()


def test_a_copy_sees_itself_and_the_true_tokens_before_it():
    """The official 2L mask: z_i sees x_j for j < i and z_i; slot r holds copy r + 1, the last copy 0."""
    length = 7
    mask = copies_mask(length, Pattern.CAUSAL, 0, None, torch.device("cpu"))
    for slot in range(length):
        copy = (slot + 1) % length
        assert mask[slot, :length].tolist() == [x < copy for x in range(length)]
        assert mask[slot, length:].nonzero()[:, 0].tolist() == [slot]


def test_blocks_of_one_are_the_sequential_pass():
    """BD3-LM with block size 1: a copy sees the earlier true tokens and itself (not shifted)."""
    length = 6
    blocks = copies_mask(length, Pattern.BLOCK, 1, None, torch.device("cpu"))
    ours = copies_mask(length, Pattern.CAUSAL, 0, None, torch.device("cpu"))
    assert torch.equal(blocks[:, :length].roll(-1, 0), ours[:, :length])
    plain = plain_mask(length, Pattern.BLOCK, 1, None, torch.device("cpu"))
    assert torch.equal(plain, torch.ones(length, length, dtype=torch.bool).tril())


def test_an_entry_never_depends_on_what_it_may_not_see():
    inputs = random_inputs(3, 2, 2, 12, 4)
    settings = {"num_pairs": 1, "scale": 0.5}
    before = split_attention(*inputs, **settings)
    q, k, v = (x.detach().clone() for x in inputs)
    k[1, :, 7:], v[1, :, 7:] = 5.0, 5.0  # X's entries from slot 7 on
    after = split_attention(q, k, v, **settings)
    assert torch.equal(after[0], before[0])  # the D row
    assert torch.equal(after[1, :, :7], before[1, :, :7])
    assert torch.equal(after[2, :, :7], before[2, :, :7])  # copies 1..7 see x_0..x_6
    assert torch.equal(after[2, :, -1], before[2, :, -1])  # copy 0 sees itself alone
    assert not torch.allclose(after[2, :, 7:-1], before[2, :, 7:-1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attend", [dense_attention, flex_rows_attention])
def test_padding_in_blocks_is_seen_by_nobody_else(attend):
    """Pairs with 10, 3 and 0 valid entries of 12, in blocks of 4: the last pair's results stay finite."""
    valid = torch.arange(12) < torch.tensor([10, 3, 0])[:, None]
    is_valid = valid.repeat(2, 1)
    q, k, v = (x.detach() for x in random_inputs(6, 2, 2, 12, 4))
    settings = {"num_pairs": 3, "scale": 0.5, "pattern": Pattern.BLOCK, "block_size": 4}
    before = attend(q, k, v, is_valid=is_valid, **settings)
    k, v = (x.where(is_valid[:, None, :, None], 3.0) for x in (k, v))
    after = attend(q, k, v, is_valid=is_valid, **settings)
    assert torch.isfinite(before).all()
    assert torch.equal(after.transpose(1, 2)[is_valid], before.transpose(1, 2)[is_valid])
    whole = attend(q[[0, 3]], k[[0, 3]], v[[0, 3]], **{**settings, "num_pairs": 1})
    # Entries before the block with padding see what they would see without any padding.
    torch.testing.assert_close(before[[0, 3], :, :8], whole[:, :, :8], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kept", "new"), [(0, 5), (6, 1), (4, 3)])
def test_a_segment_sees_what_is_kept_and_is_causal_within_itself(kept, new):
    q, k, v = (x.detach() for x in random_inputs(2, 4, 2, kept + new, 8))
    whole = dense_attention(q, k, v, num_pairs=0, scale=0.4)
    rows = AttentionRows(cos=q.new_zeros(0))
    mask = rows.segment_mask(new, kept + new, q.dtype)
    segment = scaled_dot_product_attention(
        q[:, :, kept:], k, v, attn_mask=mask, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(segment, whole[:, :, kept:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_scores_in_the_slot_that_sees_only_itself_do_no_harm(dtype):
    """Copy 0's score with the tokens it must not see can exceed its own by any amount."""
    q, k, v = (x.detach().to(dtype) for x in random_inputs(2, 1, 1, 16, 8))
    q[1, :, -1] = 30.0
    k[0] = k[0].abs() * 20
    k[1, :, -1] = -30.0
    settings = {"num_pairs": 1, "scale": 1.0}
    split = outputs_and_gradients(split_attention, [q, k, v], **settings)
    dense = outputs_and_gradients(dense_attention, [x.double() for x in (q, k, v)], **settings)
    for a, b in zip(split, dense, strict=True):
        assert torch.isfinite(a).all()
        bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
        assert (a.double() - b).abs().max() <= bound * b.abs().max()
