"""Calls of widened layers, given input, memory and the whole weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aim_surgery import AimConfig, lower, transform
from aim_surgery.nn import widened as module
from aim_surgery.nn.add_product import CONVS
from aim_surgery.nn.widened import widened_conv, widened_linear
from tests.cases import assert_same

LINEAR = [
    (lead, seen, biased)
    for lead, seen in (
        ((), ()), ((3,), ()), ((2, 5), ()), ((3,), (3,)), ((2, 5), (2, 1)), ((0,), ()),
        ((0, 5), (0, 1)), ((2, 3, 4), (2, 1, 4)),
    )
    for biased in (False, True)
]  # fmt: skip
CONV = [
    (dims, kernel, groups, padding, samples, batched)
    for dims in (1, 2, 3)
    for kernel, groups, padding in ((3, 1, 1), (3, 2, 1), (3, 1, "same"), (1, 1, 0), (1, 1, 1))
    for samples, batched in ((2, False), (2, True), (1, False), (1, True), (None, False), (0, True))
]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def linear_operands(case: Any) -> tuple[Any, ...]:
    """x, W, bias, view."""
    torch.manual_seed(0)
    lead, seen, biased = case
    return noise(*lead, 4), noise(7, 6), noise(7) if biased else None, noise(*seen, 2)


def linear_plainly(x: Tensor, weight: Tensor, bias: Any, view: Tensor) -> Tensor:
    return F.linear(torch.cat([x, view.expand(*x.shape[:-1], -1)], -1), weight, bias)


def conv_operands(case: Any) -> tuple[Any, ...]:
    """x, W, bias, view, and the options."""
    torch.manual_seed(0)
    dims, kernel, groups, padding, samples, batched = case
    sizes, lead = (7, 6, 5)[:dims], () if samples is None else (samples,)
    x, view = noise(*lead, 4, *sizes), noise(*lead * batched, 2, *sizes)
    weight = noise(8, 4 // groups + 2, *(kernel,) * dims)
    padded = padding if padding == "same" else (padding,) * dims
    return x, weight, noise(8), view, (1,) * dims, padded, (1,) * dims, groups


def conv_plainly(x: Tensor, weight: Tensor, bias: Any, view: Tensor, *options: Any) -> Tensor:
    own, memory = weight.split((weight.shape[1] - 2, 2), 1)
    convolve = CONVS[len(options[0])]
    return convolve(x, own, bias, *options) + convolve(view, memory, None, *options[:3])


def gradients(function: Callable[..., Tensor], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The output, changed in place by what follows, and the gradients of all operands."""
    output = function(*given).relu_()
    tensors = [t for t in given if isinstance(t, Tensor)]
    by_name = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * by_name).sum(), tensors)


class Operations(TorchDispatchMode):
    """Notes down what is carried out, and the largest result of each."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            name = func._overloadpacket.__name__
            self.largest[name] = max(self.largest.get(name, 0), result.numel())
        return result


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even few inputs are joined."""
    monkeypatch.setattr(module, "FEW", -1)


@pytest.mark.parametrize("way", ["joined", "apart", "slices"])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(case: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = linear_operands(case)
    if way != "joined":
        monkeypatch.setattr(module, "FEW", -1)
    if way == "slices":
        monkeypatch.setattr(module, "are_plain", lambda *_: False)
    with Operations() as operations:
        ours = gradients(widened_linear, given)
    one = given[0].shape[:-1].numel() == 1
    apart = way == "apart" and not one
    assert ("_Linear" in str(widened_linear(*given).grad_fn)) == apart
    joins = operations.largest.get("cat") == given[0].numel() // 4 * 6
    assert joins == (way == "joined" or one)
    for a, e in zip(ours, gradients(linear_plainly, given), strict=True):
        assert a.shape == e.shape
        assert_same(a, e) if e.numel() else None


@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv(case: Any) -> None:
    given = conv_operands(case)
    for a, e in zip(gradients(widened_conv, given), gradients(conv_plainly, given), strict=True):
        assert a.shape == e.shape
        assert_same(a, e) if e.numel() else None


@pytest.mark.parametrize("case", [((3,), (), True), ((2, 5), (2, 1), False)], ids=str)
def test_second_derivatives(case: Any, apart: None) -> None:
    x, weight, bias, view = linear_operands(case)
    tensors = [t for t in (x, weight, view, bias) if t is not None]

    def function(x: Tensor, weight: Tensor, view: Tensor, bias: Any = None) -> Tensor:
        return widened_linear(x, weight, bias, view).sin()

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradients_of_a_linear_weight_are_not_put_together(apart: None) -> None:
    """Written where they belong: no tensor of the weight's size is made but its gradient."""
    given = linear_operands(((3,), (), True))
    with Operations() as ours:
        widened_linear(*given).sum().backward()
    assert "cat" not in ours.largest
    assert ours.largest["mm"] == given[1][:, :4].numel()
    x, weight, bias, view = (t.detach().requires_grad_() for t in given)
    own, memory = weight.split((4, 2), 1)
    with Operations() as slices:
        F.linear(x, own, F.linear(view, memory, bias)).sum().backward()
    assert slices.largest["cat"] == weight.numel()


def test_one_sample_is_joined() -> None:
    given = conv_operands((2, 3, 1, 1, 1, False))
    with Operations() as one:
        widened_conv(*given)
    assert one.largest["cat"] == given[0].numel() + given[3].numel()
    assert "clone" not in one.largest
    with Operations() as two:
        widened_conv(*conv_operands((2, 3, 1, 1, 2, False)))
    assert "cat" not in two.largest
    last = given[0].detach().contiguous(memory_format=torch.channels_last)
    result = widened_conv(last, *given[1:])
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_what_is_frozen_has_no_gradient(apart: None) -> None:
    x, weight, bias, view = linear_operands(((3,), (3,), True))
    found = widened_linear(x.detach(), weight, bias.detach(), view.detach()).grad_fn
    gradients = module._Linear.backward(found, torch.ones(3, len(weight), dtype=x.dtype))
    assert [gradient is None for gradient in gradients] == [True, False, True, True]
    frozen = widened_linear(x, weight.detach(), bias, view)
    assert "_Linear" not in str(frozen.grad_fn)
    with torch.no_grad():
        assert_same(widened_linear(x, weight, bias, view), frozen)


def test_autocast_and_other_types(apart: None) -> None:
    x, weight, bias, view = (t.detach().float() for t in linear_operands(((3,), (), True)))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert widened_linear(x, weight, bias, view).dtype == torch.bfloat16
    halves = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias, view)]
    widened_linear(*halves).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in halves)


def test_batched_gradients(apart: None) -> None:
    operands = linear_operands(((3,), (3,), True))
    total = widened_linear(*operands)
    directions = torch.randn(4, *total.shape, dtype=total.dtype)
    batched = torch.autograd.grad(total, operands, directions, True, is_grads_batched=True)
    for index, direction in enumerate(directions):
        alone = torch.autograd.grad(total, operands, direction, True)
        assert_same([gradient[index] for gradient in batched], list(alone))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own imports
@pytest.mark.parametrize("samples", [1, 3])
def test_under_transforms_and_compilers(samples: int) -> None:
    x, *rest = linear_operands(((samples,), (), True))
    image, *others = conv_operands((2, 3, 1, 1, samples, False))
    given: list[Any] = [
        [t.detach() if isinstance(t, Tensor) else t for t in each] for each in (rest, others)
    ]

    def function(x: Tensor, image: Tensor) -> Tensor:
        sums = widened_linear(x, *given[0]), widened_conv(image, *given[1])
        return sums[0].sin().sum() + sums[1].sin().sum()

    expected = torch.autograd.grad(function(x, image), (x, image))
    for a, e in zip(torch.func.grad(function, (0, 1))(x, image), expected, strict=True):
        assert_same(a, e)
    tangents = torch.ones_like(x), torch.ones_like(image)
    along = torch.func.jvp(function, (x.detach(), image.detach()), tangents)[1]
    assert_same(along, expected[0].sum() + expected[1].sum())
    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, image), function(x, image))
    torch._dynamo.reset()


@pytest.mark.parametrize("write", ["none", "sample"])
def test_split_uses_them(write: Any) -> None:
    """One call a layer, whatever its mode of padding; also where one sample is joined."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(True),
              nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(True), nn.Conv2d(8, 4, 1), nn.Flatten(),
              nn.Linear(144, 5)]  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    at = None if write == "none" else ("1",)
    config = AimConfig(budget=None, memory=64, write=write, write_at=at, init="fresh")
    gm: Any = transform(nn.Sequential(*layers).double(), x, config=config)
    split: Any = lower(gm, "split")
    targets = [node.target for node in split.graph.nodes]
    assert (targets.count(widened_conv), targets.count(widened_linear)) == (3, 1)
    padded = [node for node in split.graph.nodes if node.kwargs.get("mode") == "circular"]
    assert [node.target for node in padded] == [F.pad, F.pad]
    assert "split" not in targets
    for given in (x, x[:1]):
        assert_same(split(given), gm(given))
    back: Any = lower(split, "concat")
    assert not {node.target for node in back.graph.nodes} & {widened_conv, widened_linear}
    assert not any("mode" in node.kwargs for node in back.graph.nodes)
    assert_same(back(x), gm(x))
    exported = torch.export.export(split, (x,)).module()
    assert_same(exported(x), gm(x))


class Functional(nn.Module):
    """Calls functions with its weights; one option is a number that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.first.weight, bias=self.first.bias, stride=2, padding="valid").relu()
        x = F.conv2d(x, self.second.weight, None, 1, (x.shape[-1] // 2, 1)).relu()
        return F.linear(x.mean((2, 3)), self.last.weight, self.last.bias)


def test_functions_are_whole_calls_unless_options_are_computed() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    config = AimConfig(budget=None, memory=64, write="none", init="fresh")
    gm: Any = transform(Functional().double(), x, config=config)
    split: Any = lower(gm, "split")
    back: Any = lower(split, "concat")
    targets = [[node.target for node in model.graph.nodes] for model in (gm, split, back)]
    kinds = (widened_conv, widened_linear, "split", F.conv2d, F.linear)
    counts = [[found.count(kind) for kind in kinds] for found in targets]
    assert counts == [[0, 0, 0, 2, 1], [1, 1, 1, 2, 0], [0, 0, 0, 2, 1]]
    for model in (split, back):
        assert_same(model(x), gm(x))


def test_memory_of_few_planes_is_added_as_it_is_computed() -> None:
    """Columns that are more than the result itself would be the larger part."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)]
    x = torch.randn(2, 3, 8, 8)
    config = AimConfig(budget=None, memory=64, write="sample", write_at=("1",), widths=(2,))
    gm: Any = transform(nn.Sequential(*layers), x, config=config)
    assert [read.planes for read in gm.plan.reads] == [1, 1, 2]
    weights: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is F.unfold:
                weights.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        lower(gm, "split")(x)
    assert weights == [1]  # 9 numbers a position for 64 channels, and not 18 for 8
