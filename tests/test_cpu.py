"""Widened products: the values of bf16 hardware, storage untouched, nothing left behind."""

import pytest
import torch

from loract.cpu import WidenedProducts, fast_bf16, native_bf16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b, bias: a @ b.T,
        lambda a, b, bias: torch.nn.functional.linear(a, b, bias),
        lambda a, b, bias: torch.bmm(a[None], b.T[None]),
        lambda a, b, bias: torch.baddbmm(bias.expand(1, 5, 7), a[None], b.T[None]),
        lambda a, b, bias: torch.mm(a, b.T, out=a.new_empty(5, 7)),
        lambda a, b, bias: torch.addmm(bias, a, b.T, out=a.new_empty(5, 7)),
        lambda a, b, bias: torch.bmm(a[None], b.T[None], out=a.new_empty(1, 5, 7)),
    ],
    ids=["mm", "addmm", "bmm", "baddbmm", "mm-out", "addmm-out", "bmm-out"],
)
def test_products_are_rounded_once(product):
    operands = normal(5, 64), normal(7, 64, seed=1), normal(7, seed=2)
    with WidenedProducts():
        ours = product(*operands)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, product(*(t.float() for t in operands)).bfloat16())


def test_gradients_pass_through_attention():
    q, k, v = (normal(1, 2, 16, 8, seed=s).requires_grad_() for s in range(3))
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = torch.autograd.grad(attend(*wide, is_causal=True).sum(), wide)
    with WidenedProducts():
        ours = torch.autograd.grad(attend(q, k, v, is_causal=True).sum(), (q, k, v))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() <= 0.02 * b.norm()


def test_other_dtypes_and_results_are_untouched():
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with WidenedProducts():
        assert torch.equal(a @ a, torch.mm(a, a))
        assert (a.double() @ a.double()).dtype == torch.float64
    plain = normal(4, 4) @ normal(4, 4)
    with WidenedProducts():
        pass
    assert torch.equal(normal(4, 4) @ normal(4, 4), plain)


def test_fast_bf16_widens_only_where_it_must():
    assert isinstance(fast_bf16(), WidenedProducts) is not native_bf16()
