"""What models do that a graph of calls can't see: kept exactly, or named; never silently lost."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, CaptureError
from aim_surgery.capture import capture
from tests.cases import SmallNet, assert_same

LITERAL = AimConfig(memory=16, budget=None)
X = torch.randn(3, 8, dtype=torch.float64)


class Net(nn.Module):
    """A linear layer; the cases below say what happens around it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)


def operated(model: nn.Module, *inputs: Any) -> Any:
    return aim_surgery.transform(model, inputs or (X,), config=LITERAL)


def both(model: nn.Module, gm: nn.Module, *inputs: Any) -> None:
    assert_same(gm(*(inputs or (X,))), model(*(inputs or (X,))))


# Modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_grad_mode_is_put_back(fails: bool) -> None:
    class Frozen(Net):
        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).view(3, -1)

    gm = operated(Frozen().double())
    if fails:
        with pytest.raises(RuntimeError, match="invalid"):
            gm(torch.zeros(2, 8, dtype=torch.float64))
    else:
        assert not gm(X).requires_grad
    assert torch.is_grad_enabled()


class Adapter(nn.Linear):
    """Merges its low rank when evaluation begins, as loralib does."""

    def __init__(self, fails: bool) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.merged, self.fails = False, fails

    def train(self, mode: bool = True) -> Any:
        if self.fails:
            raise RuntimeError("this one is for inference alone")
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plain = torch.nn.functional.linear(input, self.weight, self.bias)
        return plain if self.merged else plain + input @ self.down.T @ self.up.T


@pytest.mark.parametrize("fails", [False, True])
def test_a_train_that_does_more_is_not_called_on_the_users_model(fails: bool) -> None:
    model = nn.Sequential(Adapter(fails), nn.ReLU(), nn.Linear(8, 8)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = aim_surgery.transform(model, X, emit="graph")
    assert not model[0].merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same(gm(X), model(X))


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_the_callers_random_numbers_are_what_they_would_have_been(emit: Any) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:
                return x
            return self.fc(x) * (1 + 0 * random.random() + 0 * np.random.rand() + 0 * torch.rand(1))

    model = nn.Sequential(Draws(), nn.Dropout(), nn.Linear(8, 8)).double()

    def states() -> Any:
        numpy: Any = np.random.get_state(legacy=False)
        return torch.get_rng_state().tolist(), random.getstate(), numpy["state"]["key"].tolist()

    gm = aim_surgery.transform(model, X, emit=emit)  # draws what is new, of torch's
    before = states()
    aim_surgery.plan(model, X, emit=emit)
    assert states() == before
    aim_surgery.verify(model, gm, X)
    assert states() == before
    model(X)
    assert states() != before


def test_frozen_batch_norm_stays_frozen() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.bn.eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x))

    model: Any = Frozen().double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gm = operated(model.eval(), x)
    for mode in (True, False, True):
        both(model.train(mode), gm.train(mode), x)
        assert gm.training is mode
        assert not gm.bn.training
        assert torch.equal(gm.bn.running_mean, model.bn.running_mean)


class Doubled(torch.autograd.Function):
    """A backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2


class Reversal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(x)  # type: ignore[return-value]


doubled = Doubled.apply  # taken before any trace, as libraries do


class ReversalByName(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(x)  # type: ignore[return-value]


class Region(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.t()


@pytest.mark.parametrize(
    ("inner", "reason"),
    [(Reversal(), "Doubled"), (ReversalByName(), "Doubled"), (Region(), "autocast")],
)
def test_regions_that_no_graph_holds_stay_python(inner: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), inner, nn.Identity())
    x = X.float().requires_grad_()
    gm = operated(model, x)
    (opaque,) = capture(model, x).traces[0].opaque
    assert opaque.path == "1"
    assert reason in opaque.reason
    results: list[Any] = []
    for module in (model, gm):
        x.grad = None
        output = module(x)
        output.float().sum().backward()
        results.append((output.detach(), x.grad))
    assert results[0][0].dtype == results[1][0].dtype
    assert_same(results[1], results[0], tolerance=1e-5)


def test_a_region_in_the_model_itself_is_named() -> None:
    with pytest.raises(CaptureError, match=r"autocast region.*submodule of its own"):
        capture(Region(), X)


def test_capture_does_not_mind_the_caller_autocasting() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = capture(model, x)
    for captured in (inside, capture(model, x)):
        values = [node.meta["val"] for node in captured.graph.nodes if node.op == "call_module"]
        assert {value.dtype for value in values} == {torch.float32}


# The input model is left alone ---------------------------------------------------------------


class Collects(Net):
    """Keeps what it saw in a list and a dict, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = [1]
        self.cache: dict[Any, Any] = {"a": 1}
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(x)
        self.cache["b"] = x
        return self.fc(x)


def test_collections_and_counters_are_put_back_and_noted() -> None:
    model = Collects().double()
    plan = aim_surgery.plan(model, X, config=LITERAL)
    assert (model.seen, model.cache, model.calls) == ([1], {"a": 1}, 0)
    for name in ("seen", "cache", "calls"):
        assert any(note.startswith(f"{name} is set inside forward") for note in plan.notes)


def test_parametrizations_are_not_run() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    model = nn.Sequential(layer).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    operated(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_states_are_left_alone() -> None:
    class OnData(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(1) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(8, 8), OnData()).double()
    before = torch.get_rng_state(), random.getstate()
    aim_surgery.plan(model, X, config=LITERAL)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


class Rolls(Net):
    """Adds a number that it draws where no graph sees it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.own = {
            "python's": random.Random(0),
            "numpy's": np.random.default_rng(0),
            "old numpy's": np.random.RandomState(0),
            "torch's": torch.Generator().manual_seed(0),
        }
        own: Any = self.own
        self.draw = {
            "random": random.random,
            "numpy": np.random.rand,
            "torch": lambda: torch.Tensor(1).uniform_(),
            "python's": own["python's"].random,
            "numpy's": own["numpy's"].random,
            "old numpy's": own["old numpy's"].rand,
            "torch's": lambda: torch.Tensor(1).uniform_(generator=own["torch's"]),
        }[source]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.draw()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "source", ["random", "numpy", "torch", "python's", "numpy's", "old numpy's", "torch's"]
)
def test_numbers_drawn_where_no_graph_sees_it_are_refused(source: str, alone: bool) -> None:
    model, twin = Rolls(source).double(), Rolls(source).double()
    ended = threading.Event()
    other = threading.Thread(target=ended.wait, daemon=True)  # Jupyter and tqdm have some
    if not alone:
        other.start()
    try:
        with pytest.raises(CaptureError, match="the forward draws from the random state of"):
            capture(model, X)
        gm = aim_surgery.transform(model, X, config=LITERAL)
    finally:
        ended.set()
    own = source not in ("random", "numpy", "torch")
    assert not own or model.draw() == twin.draw(), "its own source has moved"
    assert not torch.equal(gm(X), gm(X))


def test_what_other_threads_draw_is_not_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=torch.rand, args=(1,))  # of another's, meanwhile
            thread.start()
            thread.join()
            return self.fc(x)

    monkeypatch.setattr(threading, "active_count", lambda: 2)
    model = Drawn().double()
    assert_same(aim_surgery.transform(model, X, emit="graph")(X), model(X))


def test_torch_normal_is_drawn_at_each_call() -> None:
    class Draws(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + torch.normal(0.0, 1.0, size=(8,))

    gm = operated(Draws().double())
    assert not torch.equal(gm(X), gm(X))


# Answers ------------------------------------------------------------------------------------


def test_sizes_in_names_are_assumptions() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1)
            self.scale = {"c8": 2.0, "c4": 3.0}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x[:, :1]) * self.scale[f"c{x.shape[-1]}"]

    gm = operated(ByName().double())
    with pytest.raises(AssertionError, match=r"x\.shape\[-1\] is 8"):
        gm(X[:, :4])


def test_an_argument_given_as_example_must_be_given_again() -> None:
    class Masked(Net):
        def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
            return self.fc(x) * (1 if mask is None else 2)

    model = Masked().double()
    gm = operated(model, X, torch.ones(8))
    both(model, gm, X, torch.ones(8))
    with pytest.raises(AssertionError, match="mask is given"):
        gm(X)


def test_a_python_call_that_returns_none() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return None if x.sum() > -1e9 else x

    class Uses(Net):
        def __init__(self) -> None:
            super().__init__()
            self.maybe = Nothing()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y if self.maybe(y) is None else y * 2

    model = Uses().double()
    both(model, operated(model))


def test_data_is_not_assigned_unseen() -> None:
    class MaxNorm(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.fc.weight.data = torch.renorm(self.fc.weight.data, 2, 0, 0.1)
            return self.fc(x)

    model = MaxNorm().double()
    with pytest.raises(CaptureError, match=r"assigns .*\.data"):
        capture(model, X)
    kept = operated(model)
    assert type(kept) is MaxNorm
    both(model, kept)


def test_a_counter_in_a_buffer_counts() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return self.fc(x) * self.steps

    model = Counts().double()
    gm = operated(model)
    for _ in range(3):
        both(model, gm)
    assert float(gm.steps) == 3


A, B = torch.full((8,), 3.0, dtype=torch.float64), torch.full((8,), 5.0, dtype=torch.float64)


def test_constants_of_two_modes_stay_apart() -> None:
    class TwoModes(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y + A if self.training else y * B

    model = TwoModes().double()
    gm = operated(model)
    both(model.train(), gm.train())
    both(model.eval(), gm.eval())


@pytest.mark.parametrize("kind", [OrderedDict, defaultdict])
def test_kinds_of_dicts(kind: Any) -> None:
    class Returns(Net):
        def forward(self, x: torch.Tensor) -> Any:
            result = kind()
            result[0] = self.fc(x)
            return result

    model = Returns().double()
    if kind is defaultdict:
        with pytest.raises(CaptureError, match="can't make a defaultdict"):
            capture(model, X)
    got = operated(model)(X)
    assert type(got) is kind
    assert list(got) == [0]
    assert_same(got, model(X))


class Found(NamedTuple):
    """What GoogLeNet and many others return."""

    main: torch.Tensor
    aside: torch.Tensor | None


def test_named_tuples() -> None:
    class Returns(Net):
        def forward(self, x: torch.Tensor) -> list[Found]:
            return [Found(self.fc(x), None), Found(x, self.fc(x) * 2)]

    model = Returns().double()
    got = operated(model)(X)
    assert [type(found) for found in got] == [Found, Found]
    assert got[0].aside is None
    assert_same(got[1].aside, model(X)[1].aside)


# Sites --------------------------------------------------------------------------------------


def test_one_weight_in_several_kernels() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.conv2d(F.conv2d(x, self.w, padding=1), self.w[:, :, 1:2, 1:2])
            return F.conv_transpose2d(x, self.w)

    model, x = Several().double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    gm = operated(model, x)
    assert [read.site.layer for read in gm.plan.reads] == ["w", "w_2", "w_3"]
    both(model, gm, x)


def test_hooks_that_change_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).double()
    model[0].register_forward_pre_hook(lambda module, args: (F.pad(args[0], (1, 1, 1, 1)),))
    pool: Any = F.max_pool2d
    model[1].register_forward_hook(lambda module, args, output: pool(output, 2))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    gm = operated(model, x)
    assert [read.site.name for read in gm.plan.reads] == ["2"]
    assert {skip.name: skip.reason for skip in gm.plan.skips}.keys() == {"0", "1"}
    assert "hooks change the shape" in gm.plan.skips[0].reason
    both(model, gm, x)


def test_an_output_size_beside() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)
            self.up.register_forward_hook(lambda module, args, output: None)

        def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return self.up(x, output_size=like.size())

    model = Up().double()
    x, like = torch.randn(2, 3, 5, 5).double(), torch.randn(2, 3, 10, 10).double()
    gm = operated(model, x, like)
    assert not gm.plan.reads[0].site.widens
    both(model, gm, x, like)


def test_a_weight_of_a_python_call_that_a_graph_uses_stays_as_it_is() -> None:
    class OnData(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y * 3 if y.sum() > 0 else y * 2

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = OnData(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.last(self.inner(x))
            return nn.functional.linear(x, self.inner.fc.weight, self.inner.fc.bias)

    model = Shares().double()
    gm = operated(model)
    why = {read.site.name: read.site.why_beside for read in gm.plan.reads}
    assert set(why) == {"last", "inner.fc"}
    assert "stays a Python call" in why["inner.fc"]
    for x in (X, -X):
        both(model, gm, x)


def test_frozen_weights_get_memory_weights_that_learn() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    model.requires_grad_(False)
    gm = operated(model)
    learning = {name for name, p in gm.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in gm.named_parameters() if name.startswith("aim.")}
    assert {"aim.memory.weight", "aim.reads.0.weight", "aim.reads.2.weight"} < learning
    both(model, gm)
    gm(X).sum().backward()
    assert gm.get_parameter("aim.reads.0.weight").grad.abs().max() > 0


# Hooks and threads --------------------------------------------------------------------------


def test_hooks_of_blocks_are_noted() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)).double()
    model[0].register_full_backward_hook(lambda module, before, after: None)
    plan = aim_surgery.plan(model, X, config=LITERAL)
    assert any(note.startswith("hooks of 0") for note in plan.notes)


def test_threads_do_not_meet() -> None:
    originals = nn.Module.__setattr__, torch.arange, torch.is_tensor, torch.autocast.__enter__
    failures: list[Exception] = []
    bystander, x = SmallNet().eval(), torch.randn(1, 3, 32, 32)
    expected = bystander(x)

    def operate() -> None:
        try:
            for _ in range(4):
                aim_surgery.transform(SmallNet(), x, config=LITERAL)
        except Exception as err:
            failures.append(err)

    def run() -> None:
        try:
            for _ in range(40):
                assert_same(bystander(x), expected, tolerance=1e-5)
        except Exception as err:
            failures.append(err)

    threads = [threading.Thread(target=target) for target in (operate, operate, operate, run)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    now = nn.Module.__setattr__, torch.arange, torch.is_tensor, torch.autocast.__enter__
    assert now == originals
    assert "training" not in vars(nn.Module)


def test_capture_inside_a_captured_forward_is_refused() -> None:
    inner = nn.Linear(8, 8).double()

    class Nested(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            aim_surgery.plan(inner, X)
            return self.fc(x)

    with pytest.raises(CaptureError, match="inside the forward of one being captured"):
        capture(Nested().double(), X)


def test_operating_under_inference_mode_gives_weights_that_train() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).double()
    with torch.inference_mode():
        gm = aim_surgery.transform(model, X, config=LITERAL)
    gm(X).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())


# What is compiled, or becomes so ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("emit", ["auto", "graph", "module"])
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_a_torchscript_submodule_stays_a_call(compiled: Any, emit: Any) -> None:
    inner = compiled(nn.Linear(8, 8).double())
    model = nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 2)).double()
    gm: Any = aim_surgery.transform(model, X, emit=emit)
    assert_same(gm(X), model(X))
    assert {read.site.name for read in gm.aim.plan.reads} == {"0", "2"}
    assert [skip.weights for skip in gm.aim.plan.skips] == [("1.weight",)]
    assert aim_surgery.verify(model, gm, X).ok


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_operated_models_can_be_quantized() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    gm: Any = aim_surgery.transform(model, X.float()).eval()
    assert gm.plan.writes
    small = torch.ao.quantization.quantize_dynamic(gm, {nn.Linear}, dtype=torch.qint8)
    assert (small(X.float()) - gm(X.float())).abs().max() < 0.1
