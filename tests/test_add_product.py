"""A convolution of each sample's own memory, added in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from aim_surgery.nn.add_product import add_product
from tests.cases import assert_same

CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
GEOMETRIES = [
    (dims, kernel, stride, padding, dilation)
    for dims in (1, 2, 3)
    for kernel, stride, padding, dilation in (
        (1, 1, 0, 1), (1, 2, 0, 1), (1, 1, 1, 1), (3, 1, 1, 1), (3, 2, 0, 1), (2, 1, 2, 2),
    )
]  # fmt: skip


def operands(geometry: tuple[int, ...], samples: int = 2) -> tuple[Any, ...]:
    """The result to add to, view, weight, options."""
    dims, kernel, *options = geometry
    view = torch.randn(samples, 2, *(5, 4, 6)[:dims], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, *(kernel,) * dims, dtype=torch.float64, requires_grad=True)
    each = tuple((option,) * dims for option in options)
    t = torch.randn_like(CONVS[dims](view, weight, None, *each)).requires_grad_()
    return t, view, weight, *each


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_is_a_convolution(geometry: tuple[int, ...]) -> None:
    t, view, weight, *options = operands(geometry)
    convolve = CONVS[geometry[0]]
    expected = t + convolve(view, weight, None, *options)
    into = t.detach().clone()
    with torch.no_grad():
        assert add_product(into, view, weight, *options) is into
    assert_same(into, expected)
    by_name = torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t)
    theirs = torch.autograd.grad((expected * by_name).sum(), (t, view, weight))
    ours = torch.autograd.grad((add_product(t * 1, view, weight, *options) * by_name).sum(),
                               (t, view, weight))  # fmt: skip
    for a, e in zip(ours, theirs, strict=True):
        assert_same(a, e)


@pytest.mark.parametrize("geometry", [(2, 1, 1, 0, 1), (2, 3, 1, 1, 1), (1, 3, 2, 1, 1)], ids=str)
def test_second_derivatives(geometry: tuple[int, ...]) -> None:
    t, view, weight, *options = operands(geometry)

    def function(t: Tensor, view: Tensor, weight: Tensor) -> Tensor:
        return add_product(t * 1, view, weight, *options).sin()

    assert torch.autograd.gradcheck(function, (t, view, weight))
    assert torch.autograd.gradgradcheck(function, (t, view, weight))


def test_what_has_no_batch_no_samples_or_another_layout() -> None:
    geometry = (2, 3, 1, 1, 1)
    t, view, weight, *options = operands(geometry)
    expected = F.conv2d(view, weight, None, *options)
    with torch.no_grad():
        alone = add_product(torch.zeros_like(t)[0], view[0], weight, *options)
        assert_same(alone, expected[0])
        last = torch.zeros_like(t).contiguous(memory_format=torch.channels_last)
        assert_same(add_product(last, view, weight, *options), expected)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert add_product(t[:0].clone(), view[:0], weight, *options).shape == t[:0].shape


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own imports
def test_under_transforms_and_compilers() -> None:
    t, view, weight, *options = operands((2, 3, 1, 1, 1))

    def function(view: Tensor) -> Tensor:
        return add_product(torch.zeros_like(t).detach(), view, weight, *options).sum()

    expected = torch.autograd.grad(function(view), view)[0]
    assert_same(torch.func.grad(function)(view), expected)
    along = torch.func.jvp(function, (view.detach(),), (torch.ones_like(view),))[1]
    assert_same(along, expected.sum())
    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(view), function(view))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit as a whole
def test_under_torchscript() -> None:
    t, view, weight, *options = operands((2, 3, 1, 1, 1))

    def function(t: Tensor, view: Tensor, weight: Tensor) -> Tensor:
        return add_product(t + 0, view, weight, *options)

    given = [operand.detach() for operand in (t, view, weight)]
    traced: Any = torch.jit.trace(function, tuple(given))
    others = [operand + 1 for operand in given]
    assert_same(traced(*others), function(*others))
