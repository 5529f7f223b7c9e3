"""Pointwise convolutions of input and memory, as products of matrices."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import aim_surgery
from aim_surgery import AimConfig, lower, transform
from aim_surgery.nn import pointwise as module
from aim_surgery.nn import widened
from aim_surgery.nn.add_product import add_product
from aim_surgery.nn.pointwise import Pointwise2d, pointwise, wide
from tests.cases import assert_same

CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CASES = [
    (dims, stride, batched, biased, inputs)
    for dims, stride in ((1, 1), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2))
    for batched in (False, True)
    for biased in (False, True)
    for inputs in (3, 40)  # 40: more channels than positions
]


def operands(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """x, W_x, bias, view, W_m, stride: both weights are slices of one."""
    dims, stride, batched, biased, inputs = case
    torch.manual_seed(0)
    sizes = {1: (30,), 2: (8, 7), 3: (4, 5, 6)}[dims]
    lead = (2,) * batched

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, view = noise(2, inputs, *sizes), noise(*lead, 2, *sizes)
    weight, beside = noise(4, inputs + 2, *(1,) * dims).split((inputs, 2), 1)
    return x, weight, noise(4) if biased else None, view, beside, (stride,) * dims


def plainly(
    x: Tensor, weight: Tensor, bias: Any, view: Tensor, beside: Tensor, stride: Any
) -> Tensor:
    convolve = CONVS[len(stride)]
    return convolve(x, weight, bias, stride) + convolve(view, beside, None, stride)


def gradients(function: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    output = function(*given)
    tensors = [t for t in given if isinstance(t, Tensor)]
    by_name = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * by_name).sum(), tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_convolutions(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(case)
    theirs = gradients(plainly, given)
    for matrices in (True, False):
        monkeypatch.setattr(module, "_as_matrices", lambda *_, given=matrices: given)
        for ours, expected in zip(gradients(pointwise, given), theirs, strict=True):
            assert_same(ours, expected)


def test_only_wide_products_are_matrices() -> None:
    assert wide(2, 64, 256, 56 * 56)
    assert not wide(2, 512, 2048, 7 * 7)
    assert not wide(1, 64, 256, 56 * 56)
    assert not wide(0, 3, 4, 1000)
    assert "_AsMatrices" in str(pointwise(*operands((2, 1, False, True, 3))).grad_fn)
    assert "_AsMatrices" not in str(pointwise(*operands((2, 4, False, True, 40))).grad_fn)


@pytest.mark.parametrize("case", [(2, 2, False, True, 3), (1, 1, True, False, 3)], ids=str)
def test_second_derivatives(case: tuple[Any, ...]) -> None:
    *given, stride = operands(case)
    tensors = tuple(t for t in given if t is not None)

    def function(*tensors: Tensor) -> Tensor:
        all_of_them = [*tensors] if given[2] is not None else [*tensors[:2], None, *tensors[2:]]
        return pointwise(*all_of_them, stride).sin()  # type: ignore[call-arg, arg-type]

    tensors = tuple(t.detach()[:, :2].requires_grad_() if t.ndim > 1 else t for t in tensors)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_what_it_leaves_to_convolutions() -> None:
    x, weight, bias, view, beside, stride = operands((2, 1, False, True, 3))
    expected = plainly(x, weight, bias, view, beside, stride)
    last = x.contiguous(memory_format=torch.channels_last)
    ours = pointwise(last, weight, bias, view, beside, stride)
    assert_same(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    alone = pointwise(x[0], weight, bias, view, beside, stride)
    assert_same(alone, expected[0])
    assert pointwise(x[:0], weight, bias, view, beside, stride).shape == expected[:0].shape
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        single = [t.float() for t in (x, weight, bias, view, beside)]
        assert pointwise(*single, stride).dtype == torch.bfloat16  # type: ignore[call-arg]
    with torch.inference_mode():
        assert_same(pointwise(x, weight, bias, view, beside, stride), expected)


def test_the_result_may_be_changed_in_place() -> None:
    given = operands((2, 1, False, True, 3))
    theirs = gradients(lambda *given: plainly(*given).relu(), given)
    ours = gradients(lambda *given: pointwise(*given).relu_(), given)
    for a, e in zip(ours, theirs, strict=True):
        assert_same(a, e)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own imports
def test_under_transforms_and_compilers() -> None:
    x, *rest = operands((2, 1, False, True, 3))
    given = [t.detach() if isinstance(t, Tensor) else t for t in rest]

    def function(x: Tensor) -> Tensor:
        return pointwise(x, *given).sin().sum()  # type: ignore[call-arg]

    expected = torch.autograd.grad(function(x), x)[0]
    assert_same(torch.func.grad(function)(x), expected)
    along = torch.func.jvp(function, (x.detach(),), (torch.ones_like(x),))[1]
    assert_same(along, expected.sum())
    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), function(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("added", [False, True])
def test_batched_gradients(added: bool, stride: int) -> None:
    torch.manual_seed(0)
    x, view = (torch.randn(3, n, 24, 24, dtype=torch.float64) for n in (4, 2))
    weight, beside = (torch.randn(4, n, 1, 1, dtype=torch.float64) for n in (4, 2))
    operands = [t.requires_grad_() for t in (x, weight, view, beside)]
    strides = (stride, stride)
    if added:
        product = F.conv2d(x, weight, stride=stride)
        total = add_product(product, view, beside, strides, (0, 0), (1, 1))
    else:
        total = pointwise(x, weight, None, view, beside, strides)
    assert str(total.grad_fn).startswith(f"<torch.autograd.function.{'_Add' if added else '_AsM'}")
    directions = torch.randn(2, *total.shape, dtype=total.dtype)
    batched = torch.autograd.grad(total, operands, directions, True, is_grads_batched=True)
    for index, direction in enumerate(directions):
        alone = torch.autograd.grad(total, operands, direction, True)
        assert_same([gradient[index] for gradient in batched], list(alone))


@pytest.mark.parametrize("write", ["none", "sample"])
def test_split_uses_it(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers of any stride without padding and groups; the way back is whole, too."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(True), nn.Conv2d(8, 8, 1, 2, bias=False), nn.ReLU(True),
              nn.Conv2d(8, 8, 1, padding=1), nn.Conv2d(8, 8, 1, groups=2), nn.Flatten(),
              nn.Linear(288, 5), nn.Linear(5, 5, bias=False)]  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    at = None if write == "none" else ("1",)
    config = AimConfig(budget=None, memory=64, write=write, write_at=at, init="fresh")
    gm: Any = transform(nn.Sequential(*layers).double(), x, config=config)
    split = lower(gm, "split")
    expected, calls = gm(x), []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(
        widened, "pointwise", lambda *a: (calls.append(pointwise), pointwise(*a))[1]
    )
    with Watch():
        assert_same(split(x), expected)
    assert calls.count(pointwise) == (2 if write == "none" else 3)  # with the update block
    assert calls.count(F.conv2d) == (4 if write == "none" else 2)
    back = lower(split, "concat")
    assert_same(back(x), expected)
    base = aim_surgery.restore(split, measure=False)
    assert [tuple(p.shape) for p in base.parameters()] == [
        tuple(p.shape) for p in nn.Sequential(*layers).parameters()
    ]


@pytest.mark.parametrize("write", ["none", "sample"])
def test_whole_models_run_as_matrices(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients, of wide layers and of one that is frozen, against concat."""
    calls = []
    whole = module._AsMatrices.apply
    monkeypatch.setattr(
        module._AsMatrices, "apply", lambda *a: (calls.append(len(a)), whole(*a))[1]
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(True), nn.Conv2d(8, 8, 1, 2), nn.ReLU(True),
                        nn.Conv2d(8, 8, 1), nn.ReLU(True), nn.Conv2d(8, 5, 1))  # fmt: skip
    x = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    at = None if write == "none" else ("1",)
    config = AimConfig(budget=None, memory=144, write=write, write_at=at, init="fresh")
    gm: Any = transform(net.double(), x, config=config)
    gm.get_parameter("4.weight").requires_grad_(False)
    split: Any = lower(gm, "split")
    found = []
    for model in (gm, split):
        given = x.clone().requires_grad_(True)
        output = model(given)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(output.square().sum(), [given, *named.values()])
        found.append((output, *grads))
    assert_same(found[1], found[0])
    blocks = 0 if write == "none" else 1
    assert len(calls) == 4 + 2 * blocks
    folded: Any = aim_surgery.fold(gm.eval())
    calls.clear()
    actual = folded(x)
    assert len(calls) == 4 + blocks
    assert_same(actual, gm(x))


def test_what_is_frozen_holds_no_input() -> None:
    x, weight, _, view, beside, stride = operands((2, 1, False, False, 3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        pointwise(x, weight.detach(), None, view, beside, stride)
    assert x.shape not in kept
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        pointwise(x, weight, None, view, beside, stride)
    assert x.shape in kept


def test_other_precisions_of_products_are_left_to_convolutions() -> None:
    x = torch.randn(2, 3, 8, 8)
    weight, stride = torch.randn(4, 3, 1, 1), (1, 1)
    assert module._as_matrices(x, weight, (), stride)
    try:
        torch.set_float32_matmul_precision("medium")
        assert not module._as_matrices(x, weight, (), stride)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_fold_uses_it() -> None:
    """Layers keep their names and parameters; exports see a convolution as ever."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 1, 2),
              nn.Conv2d(8, 8, 1, groups=2)]  # fmt: skip
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    config = AimConfig(budget=None, memory=64, write="none", init="fresh")
    gm: Any = transform(nn.Sequential(*layers).double(), x, config=config).eval()
    expected = gm(x)
    folded: Any = aim_surgery.fold(gm)
    kinds = [type(folded.get_submodule(str(index))) for index in (0, 3, 4)]
    assert kinds == [Pointwise2d, Pointwise2d, nn.Conv2d]
    assert type(gm.get_submodule("0")) is nn.Conv2d
    assert_same(folded(x), expected)
    assert_same(pickle.loads(pickle.dumps(folded))(x), expected)
    assert_same(folded(x[:1]), expected[:1])
    assert_same(torch.export.export(folded, (x,)).module()(x), expected)
