"""The head's loss against torch's cross entropy of all logits, and its bytes."""

import pytest
import torch

from loract import InvalidSpec, LoractError
from loract.head import IGNORED, head_loss
from loract.memory import step_bytes


def case(tokens=37, vocabulary=50, features=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, features, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, features, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return hidden, weight, labels


def oracle(hidden, weight, labels):
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, labels, ignore_index=IGNORED)
    return loss, torch.autograd.grad(3 * loss, wide)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients(chunk, dtype, tolerance):
    tensors = case(dtype=dtype)
    expected, wanted = oracle(*tensors)
    loss = head_loss(*tensors, chunk=chunk)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for tensor, gradient in zip(tensors, wanted, strict=False):
        assert tensor.grad.dtype == dtype
        assert (tensor.grad.double() - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = case()
    _, wanted = oracle(*tensors)
    tensors[frozen].requires_grad_(False)
    (3 * head_loss(*tensors)).backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad.double(), wanted[1 - frozen], rtol=1e-4, atol=1e-6)


def test_no_label_counts():
    hidden, weight, labels = case()
    loss = head_loss(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_the_weight_is_never_copied():
    hidden, weight, labels = case(tokens=64, vocabulary=5000, features=64, dtype=torch.bfloat16)
    saved, peak = step_bytes(
        lambda: head_loss(hidden, weight, labels, chunk=4), lambda x: x.backward(), [hidden, weight]
    )
    logits = 4 * 5000 * 4
    assert weight.nbytes + hidden.nbytes <= saved <= weight.nbytes + hidden.nbytes + 1000
    assert peak <= weight.nbytes + hidden.nbytes + 1.6 * logits


def test_backward_runs_once():
    tensors = case()
    loss = head_loss(*tensors)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_shapes():
    hidden, weight, labels = case()
    with pytest.raises(InvalidSpec, match="flatten tokens"):
        head_loss(hidden[None], weight, labels)
    with pytest.raises(InvalidSpec, match="chunk=0"):
        head_loss(hidden, weight, labels, chunk=0)


def test_second_derivatives_are_refused():
    with pytest.raises(LoractError, match="create_graph=True"):
        head_loss(*case()).backward(create_graph=True)
