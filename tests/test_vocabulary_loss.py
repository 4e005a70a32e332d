"""The chunked head and loss against log_softmax and autograd over all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eso.parallel import vocabulary_loss
from megatron_eso.parallel.vocabulary_loss import Head, target_log_probs

NUMBER, WIDTH, VOCAB, REAL = 23, 8, 40, 36


class OneRank:
    """A tensor-parallel group of one."""

    def rank(self):
        return 0

    def size(self):
        return 1


@pytest.fixture
def many_chunks(monkeypatch):
    """Make chunks of five entries and pieces of two."""
    monkeypatch.setattr(vocabulary_loss, "_CHUNK_ELEMENTS", {"cpu": 5 * VOCAB})
    monkeypatch.setattr(vocabulary_loss, "_PIECE_ELEMENTS", 2 * VOCAB)


def make_inputs(*, has_bias, number=NUMBER, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(number, WIDTH), (VOCAB, WIDTH), *([(VOCAB,)] if has_bias else [])]
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]
    targets = torch.randint(0, REAL, (number,), generator=generator)
    gradient = -torch.rand(number, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, targets, gradient


def ours(inputs, targets, gradient, known):
    hidden, weight, *bias = inputs
    head = Head(weight, bias[0] if bias else None, REAL, OneRank())
    found = target_log_probs(hidden, targets, head, loss_gradient=known)
    return found, torch.autograd.grad(found, inputs, gradient)


def plain(inputs, targets, gradient):
    hidden, weight, *bias = inputs
    logits = torch.nn.functional.linear(hidden, weight, bias[0] if bias else None)[:, :REAL]
    found = torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
    return found, torch.autograd.grad(found, inputs, gradient)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("factor", [None, 1.0, 0.25, "none in common"])
def test_values_and_gradients_are_those_of_all_logits_at_once(many_chunks, has_bias, factor):
    inputs, targets, gradient = make_inputs(has_bias=has_bias)
    known = (
        None
        if factor is None
        else gradient.clone()
        if isinstance(factor, str)
        else gradient / factor
    )
    if isinstance(factor, str):
        known[3] *= 1.01
    found, expected = ours(inputs, targets, gradient, known), plain(inputs, targets, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("known", "times"), [(True, 1), (False, 2)])
def test_a_known_gradient_saves_the_second_computation_of_the_logits(
    many_chunks, monkeypatch, known, times
):
    inputs, targets, gradient = make_inputs(has_bias=False)
    made = []
    chunk = vocabulary_loss._Chunk
    monkeypatch.setattr(vocabulary_loss, "_Chunk", lambda *args: made.append(1) or chunk(*args))
    ours(inputs, targets, gradient, gradient * 3 if known else None)
    assert len(made) == 5 * times


class NoWaiting(TorchDispatchMode):
    """Refuses operators that would make a CPU wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_not_waited_for_and_a_wrong_promise_gives_no_number(many_chunks, monkeypatch):
    monkeypatch.setattr(vocabulary_loss, "_waiting_is_cheap", lambda device: False)
    inputs, targets, gradient = make_inputs(has_bias=True)
    with NoWaiting():
        _, grads = ours(inputs, targets, gradient, gradient * 3)
    for found, expected in zip(grads, plain(inputs, targets, gradient)[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    wrong = gradient.clone()
    wrong[3] *= 1.01
    _, grads = ours(inputs, targets, gradient, wrong)
    assert all(torch.isnan(x).all() for x in grads)


def test_without_gradients_none_are_computed(many_chunks, monkeypatch):
    inputs, targets, gradient = make_inputs(has_bias=True)
    monkeypatch.setattr(vocabulary_loss, "_Gradients", None)
    head = Head(inputs[1], inputs[2], REAL, OneRank())
    with torch.no_grad():
        found = target_log_probs(inputs[0], targets, head, loss_gradient=gradient)
    monkeypatch.undo()
    torch.testing.assert_close(found, plain(inputs, targets, gradient)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_as_near_as_their_products(many_chunks, dtype):
    inputs, targets, gradient = make_inputs(has_bias=True, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, grads = ours(inputs, targets, gradient.float(), gradient.float())
    expected, expected_grads = plain(exact, targets, gradient.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert found.dtype is torch.float32
    for a, b in zip([found, *grads], [expected, *expected_grads], strict=True):
        assert (a.double() - b).abs().max() <= bound * b.abs().max()
    assert [g.dtype for g in grads] == [dtype] * 3


def test_a_token_of_almost_no_probability_has_a_finite_log_probability():
    hidden = torch.full((1, 1), 300.0, requires_grad=True)
    weight = torch.zeros(VOCAB, 1)
    weight[0] = 1.0
    head = Head(weight.requires_grad_(), None, REAL, OneRank())
    found = target_log_probs(hidden, torch.tensor([5]), head)
    assert found.item() == pytest.approx(-300.0)
    found.sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_a_micro_batch_without_loss_has_gradients_of_zero():
    inputs, targets, gradient = make_inputs(has_bias=True, number=0)
    found, grads = ours(inputs, targets, gradient, gradient)
    assert found.shape == (0,)
    assert [float(g.abs().sum()) for g in grads] == [0.0, 0.0, 0.0]


def test_no_tensor_of_all_entries_and_the_vocabulary_is_made(many_chunks):
    """The largest tensor created is a chunk of logits or the weight's gradient."""
    inputs, targets, gradient = make_inputs(has_bias=True, number=200)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    for known in (gradient, None):
        with Sizes():
            ours(inputs, targets, gradient, known)
    assert max(sizes) <= max(5 * VOCAB, VOCAB * WIDTH, 200 * WIDTH)
