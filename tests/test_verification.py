import copy
import dataclasses
import random
import sys
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, CaptureError, PlanError, plan, transform
from aim_surgery.capture.nested import named_leaves
from aim_surgery.errors import MissingInputsError
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.surgery.notes import noted_sites
from aim_surgery.verification import verify
from aim_surgery.verification.comparison import TOLERANCES, Case, Comparison
from aim_surgery.verification.coverage import check_coverage
from aim_surgery.verification.pair import Pair
from aim_surgery.verification.samples import Samples, samples_for

FULL = AimConfig(budget=None, memory=64)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.up(self.depthwise(self.norm(self.stem(x)).relu()))
        return {"logits": self.head(self.drop(x.mean((-2, -1)))), "features": x}


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(), nn.Linear(16, 3)
        )


class Einsum(nn.Module):
    """A product that is no site; the plan lists it as left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return torch.einsum("bi,io,bo->b", x, self.mix, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.table(ids)).relu())


class FrozenNorm(nn.Module):
    """Keeps its norm in evaluation mode, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.bn.eval()
        return self


@pytest.fixture
def net() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture
def gm(net: ConvNet) -> AimGraphModule:
    return transform(net, IMAGES, config=FULL)


def broken(gm: AimGraphModule, edit: Any) -> AimGraphModule:
    """A copy whose parameters have been edited by name."""
    twin = copy.deepcopy(gm)
    with torch.no_grad():
        edit(dict(twin.named_parameters()))
    return twin


def detach(gm: AimGraphModule, target: str) -> None:
    """Stop the gradient behind a call of a module."""
    for graph in graphs_of(gm):
        node = next(node for node in graph.nodes if node.target == target)
        users = list(node.users)
        with graph.inserting_after(node):
            stop = graph.call_method("detach", (node,))
        for user in users:
            user.replace_input_with(node, stop)
    gm.recompile()


# What passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [AimConfig(budget="auto"), FULL])
def test_a_convolutional_network_passes(net, config) -> None:
    result = verify(net, transform(net, IMAGES, config=config), IMAGES)
    assert result.ok, str(result)
    assert result.largest_difference < 1e-5
    cases = {comparison.case for comparison in result.equivalence.comparisons}
    assert {
        "evaluation, batch 2, float64", "evaluation, batch 1, float64",
        "evaluation, batch 3, float64", "evaluation, size 12x12, float64",
        "training, batch 2, float64", "training, batch 3, float64",
    } <= cases  # fmt: skip
    assert result.equivalence.largest("buffers") is not None
    assert set(result.coverage.covered) == {
        "stem.weight", "depthwise.weight", "up.weight", "head.weight"
    }  # fmt: skip
    assert result.gradients.mode == "training"
    assert {"aim.memory.weight", "aim.memory.bias", "up.weight"} <= set(result.gradients.reached)
    assert result.gradients.memory == 1.0


def test_an_mlp_passes_on_noise_of_the_plans_shapes() -> None:
    model = Mlp().eval()
    result = verify(model, transform(model, config=FULL))
    assert result.ok, str(result)
    assert len(str(result).splitlines()) <= 4 + len(result.notes)


def test_tied_weights_pass_and_count_under_any_name() -> None:
    model = Tied()
    gm = transform(model, torch.zeros(2, 7, dtype=torch.int64), config=FULL)
    result = verify(model, gm, torch.randint(11, (2, 7)))
    assert result.ok, str(result)
    assert "aim.reads.head.weight" in result.gradients.reached


def test_listed_weights_are_skipped_with_their_reason() -> None:
    model = Einsum()
    result = verify(model, transform(model, torch.randn(2, 6), config=FULL))
    assert result.ok, str(result)
    ((name, reason),) = result.coverage.skipped
    assert name == "mix"
    assert "no site" in reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pass(dtype) -> None:
    model = Mlp().to(dtype).eval()
    result = verify(model, transform(model, config=FULL))
    assert result.ok, str(result)
    assert result.equivalence.own.dtype == dtype


def test_a_model_that_computes_in_float32_by_itself_gets_its_tolerance() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.float().softmax(-1).to(x.dtype))

    model = Casts()
    result = verify(model, transform(model, torch.randn(2, 8), config=FULL))
    assert result.ok, str(result)
    assert {comparison.limit for comparison in result.equivalence.comparisons} == {1e-5, 1e-3}
    assert "partly in float32" in str(result)


def test_a_size_that_the_graph_refuses_openly_is_a_note() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x if x.shape[-1] == 16 else x.flip(-1)).mean((-2, -1))

    model = Branches()
    result = verify(model, transform(model, IMAGES, config=FULL), IMAGES)
    assert result.ok, str(result)
    assert any("size 12x12" in note and "refused" in note for note in result.notes)


def test_frozen_submodules_keep_their_own_mode(net) -> None:
    net.train()
    net.norm.eval()
    result = verify(net, transform(net, IMAGES, config=FULL), IMAGES)
    assert result.ok, str(result)
    by_hand = [c for c in result.equivalence.comparisons if c.case.startswith("modes set by hand")]
    assert [c.what for c in by_hand] == ["outputs", "gradients", "buffers"]


def test_a_train_of_the_models_own_is_reproduced() -> None:
    model = FrozenNorm()  # nobody has called `train` yet: as it stands, the norm still learns
    result = verify(model, transform(model, IMAGES, config=FULL), IMAGES)
    assert result.ok, str(result)
    assert "modes set by hand, batch 2, float64" in {c.case for c in result.equivalence.comparisons}


def test_modes_set_by_hand_are_compared_as_they_are(net, gm) -> None:
    net.eval()
    net.drop.train()
    gm.get_submodule("drop").p = 0.4
    failed = {c.case.partition(",")[0] for c in verify(net, gm, IMAGES).equivalence.offenders}
    assert failed == {"modes set by hand", "training"}


def test_modes_as_train_sets_them_are_no_extra_case(net, gm) -> None:
    comparisons = verify(net, gm, IMAGES).equivalence.comparisons
    assert not [c for c in comparisons if c.case.startswith("modes set by hand")]
    modes = [(c.case, c.ok) for c in comparisons if c.what == "modes"]
    assert modes == [("after train(False)", True), ("after train(True)", True)]


def test_the_callers_state_is_left_alone() -> None:
    class Careless(nn.Module):
        """Changes all that is global, and leaves it so."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    def careless(module: nn.Module, args: Any) -> None:
        random.random()
        np.random.rand()
        torch.rand(1)
        torch.set_autocast_enabled("cpu", not torch.is_autocast_enabled("cpu"))
        torch.set_autocast_dtype("cpu", torch.float16)

    def switching_off(module: nn.Module, args: Any, output: Any) -> None:
        torch.set_grad_enabled(not torch.is_grad_enabled())

    def state() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()
        return (
            torch.get_rng_state().tolist(), random.getstate(), kind, list(keys), rest,
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        )  # fmt: skip

    model = Careless()
    gm = transform(model, torch.randn(2, 6), config=FULL)
    for module in (model, gm):
        module.register_forward_pre_hook(careless)
        module.register_forward_hook(switching_off)
    x = torch.randn(2, 6)
    for around in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with around():
            before = state()
            result = verify(model, gm, x)
            assert state() == before
        assert result.ok, str(result)
    with torch.autocast("cpu", torch.bfloat16):
        before = state()
        verify(model, gm, x)
        assert state() == before
    with pytest.raises(AimSurgeryError, match="does not run"):
        verify(model, gm, torch.randn(2, 5))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_nothing_is_changed(net, gm) -> None:
    net.train()
    net.norm.eval()
    gm.eval()
    net(IMAGES)["logits"].sum().backward()
    modules = (net, gm)
    states = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    modes = [[m.training for m in module.modules()] for module in modules]
    grads = [[None if p.grad is None else p.grad.clone() for p in m.parameters()] for m in modules]
    images, random_state = IMAGES.clone(), torch.get_rng_state()
    assert verify(net, gm, images).ok
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images, IMAGES)
    for module, state, mode, grad in zip(modules, states, modes, grads, strict=True):
        assert [m.training for m in module.modules()] == mode
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), name
        for parameter, before in zip(module.parameters(), grad, strict=True):
            assert (parameter.grad is None) == (before is None)
            assert before is None or torch.equal(parameter.grad, before)


# Equivalence is shown to fail --------------------------------------------------------------------


def test_one_changed_entry_is_found(net, gm) -> None:
    result = verify(net, broken(gm, lambda p: p["stem.weight"][3, 1, 2, 2].add_(1e-6)), IMAGES)
    assert not result.equivalence.ok
    assert result.coverage.ok
    assert result.gradients.ok
    assert "output['logits']" in str(result)
    assert all(
        c.difference > c.limit for c in result.equivalence.comparisons if c.what == "outputs"
    )


@pytest.mark.parametrize("init", ["fresh", "trained"])
def test_another_function_is_said_to_be_one(net, init) -> None:
    config = AimConfig(budget=None, memory=64, init="fresh" if init == "fresh" else "preserve")
    gm = transform(net, IMAGES, config=config)
    if init == "trained":
        gm(IMAGES)["logits"].square().sum().backward()
        torch.optim.SGD(gm.parameters(), lr=0.1).step()
    result = verify(net, gm, IMAGES)
    assert not result.ok
    assert not result.equivalence.ok
    assert result.largest_difference > 1e-5


def test_a_difference_in_training_mode_only_is_found(net, gm) -> None:
    gm.get_submodule("drop").p = 0.4
    result = verify(net, gm, IMAGES)
    failed = {c.case.partition(",")[0] for c in result.equivalence.offenders}
    assert failed == {"training"}


def test_a_train_that_is_lost_is_named(monkeypatch) -> None:
    model = FrozenNorm().train()
    gm = transform(model, IMAGES, config=FULL)

    def plain(self: AimGraphModule, mode: bool = True) -> AimGraphModule:
        return nn.Module.train(self, mode)  # type: ignore[return-value]

    monkeypatch.setattr(AimGraphModule, "train", plain)
    equivalence = verify(model, gm, IMAGES).equivalence
    assert not equivalence.ok
    (modes,) = [c for c in equivalence.offenders if c.what == "modes"]
    assert modes.case == "after train(True)"
    assert modes.offenders == ("bn is in training mode, not evaluation",)
    assert str(modes) == f"modes differ, after train(True): {modes.offenders[0]}"
    assert {c.what for c in equivalence.offenders} == {"modes", "outputs", "gradients", "buffers"}


def test_a_train_that_fails_is_found(net, gm, monkeypatch) -> None:
    def failing(self: AimGraphModule, mode: bool = True) -> AimGraphModule:
        raise ValueError("no modes here")

    monkeypatch.setattr(AimGraphModule, "train", failing)
    offenders = verify(net, gm, IMAGES).equivalence.offenders
    assert "the operated model fails: ValueError: no modes here" in str(offenders[0])
    assert "modes" in {c.what for c in offenders}


def test_running_statistics_that_part_ways_are_named(net, gm) -> None:
    gm.get_submodule("norm").momentum = 0.2
    found = [c for c in verify(net, gm, IMAGES).equivalence.offenders if c.what == "buffers"]
    assert any("norm.running_mean" in text for text in found[0].offenders)


def test_a_small_defect_of_running_statistics_is_no_rounding() -> None:
    """As small as what rounding does to a detector's buffers in float32."""
    model = ConvNet()
    other = copy.deepcopy(model)
    other.norm.momentum = 0.1 * (1 + 5e-5)
    pair = Pair(model, other, plan(model, IMAGES), TOLERANCES[torch.float32])
    found = pair.compare(Case(True, Samples((IMAGES,), {}), "batch 2", torch.float32), [])
    assert not isinstance(found, str)
    buffers = next(c for c in found if c.what == "buffers")
    assert 1e-5 < buffers.difference < 1e-4
    assert any("norm.running" in text for text in buffers.offenders)


def test_a_gradient_that_is_lost_is_named(net, gm) -> None:
    detach(gm, "depthwise")
    failed = [c for c in verify(net, gm, IMAGES).equivalence.offenders if c.what == "gradients"]
    assert any(text.startswith("stem.weight") for text in failed[0].offenders)
    assert not any(text.startswith("head.weight") for text in failed[0].offenders)


def test_an_operated_model_that_does_not_run_is_found(net, gm) -> None:
    del gm.get_submodule("head").weight
    result = verify(net, gm, IMAGES)
    assert not result.ok
    assert "the operated model fails" in str(result)
    assert not result.gradients.ok


def test_outputs_of_another_form_are_found() -> None:
    @dataclass
    class Output:
        logits: torch.Tensor
        states: tuple[Any, ...]

    one, two = torch.zeros(2), torch.ones(3)
    leaves = named_leaves(Output(one, ({"a": two}, None)))
    assert list(leaves) == ["output.logits", "output.states[0]['a']", "output.states[1]"]


# Coverage is shown to fail -----------------------------------------------------------------------


def test_a_weight_that_the_plan_forgets_is_named(net, gm) -> None:
    reads = tuple(read for read in gm.plan.reads if read.site.layer != "depthwise")
    gm.aim.plan = dataclasses.replace(gm.plan, reads=reads)
    coverage = check_coverage(net, gm, gm.plan, Samples((IMAGES,), {}))
    assert [name for name, _ in coverage.unaccounted] == ["depthwise.weight"]
    assert "convolution" in coverage.unaccounted[0][1]


def test_a_product_that_the_plan_forgets_is_named() -> None:
    model = Einsum()
    gm = transform(model, torch.randn(2, 6), config=FULL)
    gm.aim.plan = dataclasses.replace(gm.plan, skips=())
    result = verify(model, gm)
    assert [name for name, _ in result.coverage.unaccounted] == ["mix"]
    assert "coverage     FAILED" in str(result)


@pytest.mark.parametrize(
    "module", [nn.LSTM(6, 5), nn.MultiheadAttention(6, 2), nn.Bilinear(6, 6, 2)]
)
def test_packed_kernels_use_their_weights(module) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.packed = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if isinstance(module, nn.LSTM):
                return self.packed(x)[0]
            if isinstance(module, nn.Bilinear):
                return self.packed(x, x)
            return self.packed(x, x, x)[0]

    model = Packed()
    x = torch.randn(2, 4, 6)
    gm = transform(model, x, config=FULL)
    reads = tuple(read for read in gm.plan.reads if read.site.layer == "first")
    emptied = dataclasses.replace(gm.plan, skips=(), reads=reads)
    found = check_coverage(model, gm, emptied, samples_for(model, gm.plan, x))
    expected = {f"packed.{n}" for n, p in module.named_parameters() if p.ndim >= 2}
    assert {name for name, _ in found.unaccounted} == expected
    assert check_coverage(model, gm, gm.plan, samples_for(model, gm.plan, x)).ok


def test_weights_are_followed_through_views_arithmetic_and_data() -> None:
    class Computed(nn.Module):
        through_data = False

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.scaled = nn.Parameter(torch.randn(12, 6))
            self.down = nn.Parameter(torch.randn(2, 6))
            self.up = nn.Parameter(torch.randn(6, 2))
            self.hidden = nn.Parameter(torch.randn(6, 6))
            self.position = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x) + self.position
            x = x @ (self.scaled / self.scaled.norm()).chunk(2)[1].t()
            x = torch.nn.functional.linear(x, self.up @ self.down)
            return x @ (self.hidden.data if self.through_data else self.hidden)

    model = Computed()
    gm = transform(model, torch.randn(2, 4, 6), config=FULL)
    model.through_data = True
    emptied = dataclasses.replace(
        gm.plan, skips=(), reads=tuple(r for r in gm.plan.reads if r.site.layer == "first")
    )
    found = check_coverage(model, gm, emptied, samples_for(model, gm.plan, None))
    assert {name for name, _ in found.unaccounted} == {"scaled", "down", "hidden"}
    assert found.covered == ("first.weight",)
    assert any(note.startswith("up ") for note in found.notes)


def test_a_read_without_weights_is_named(net, gm) -> None:
    unwidened = copy.deepcopy(gm)
    unwidened.get_submodule("stem").weight = nn.Parameter(net.stem.weight.detach().clone())
    coverage = check_coverage(net, unwidened, gm.plan, Samples((IMAGES,), {}))
    ((name, reason),) = coverage.unaccounted
    assert name == "stem.weight"
    assert "widened" in reason
    tied = Tied()
    ids = torch.zeros(2, 7, dtype=torch.int64)
    beside = transform(tied, ids, config=FULL)
    delattr(beside.get_submodule("aim.reads.head"), "weight")
    coverage = check_coverage(tied, beside, beside.plan, Samples((ids,), {}))
    assert "aim.reads.head.weight is missing" in coverage.unaccounted[0][1]


# Gradients are shown to fail ---------------------------------------------------------------------


def test_a_memory_that_is_detached_is_named(net, gm) -> None:
    detach(gm, "aim.memory")
    result = verify(net, gm, IMAGES)
    assert result.equivalence.ok
    assert {n for n, _ in result.gradients.unreached} == {"aim.memory.weight", "aim.memory.bias"}
    assert result.gradients.memory == 0.0
    assert "aim.memory.weight" in str(result)


def test_a_read_that_is_detached_is_named() -> None:
    model = Tied()
    gm = transform(model, torch.zeros(2, 7, dtype=torch.int64), config=FULL)
    detach(gm, "aim.reads.head")
    result = verify(model, gm, torch.randint(11, (2, 7)))
    unreached = {name for name, _ in result.gradients.unreached}
    # and with it the update block, whose memory nobody else reads
    assert {name for name in unreached if ".writes." not in name} == {"aim.reads.head.weight"}
    assert "aim.writes.relu.out.weight" in unreached


def test_a_block_is_excused_where_all_that_reads_after_it_is_idle(net) -> None:
    class Dead(type(net)):
        """A ReLU that no activation passes: nothing that comes before it learns."""

        def forward(self, x):
            return super().forward(x)["logits"].sub(1e9).relu()

    dead = Dead()
    gm = transform(dead, IMAGES, config=FULL)
    assert gm.plan.writes
    assert verify(dead, gm, IMAGES).gradients.unreached == (
        ("aim.memory.weight", "no gradient reaches it"),
        ("aim.memory.bias", "no gradient reaches it"),
    )


def test_a_block_before_frozen_layers_is_not_excused(net) -> None:
    gm = transform(net, IMAGES, config=FULL)
    (write, *_) = gm.plan.writes
    for read in gm.plan.reads:
        for name in read.site.weights:
            weight = gm.get_parameter(name).requires_grad_(False)
            weight.data.normal_(std=0.1)  # zeros would pass nothing on to the memory
    assert not any(write.name in n for n, _ in verify(net, gm, IMAGES).gradients.unreached)
    detach(gm, f"aim.writes.{write.name}")
    unreached = {name for name, _ in verify(net, gm, IMAGES).gradients.unreached}
    assert f"aim.writes.{write.name}.out.weight" in unreached


def test_a_gradient_that_is_not_finite_is_named(net, gm) -> None:
    twin = broken(gm, lambda p: p["aim.memory.bias"][0].fill_(float("nan")))
    result = verify(net, twin, IMAGES)
    assert not result.gradients.ok
    assert "not finite" in str(result)


def test_what_a_norm_takes_away_is_a_note() -> None:
    model = Mlp()
    gradients = verify(model, transform(model, torch.randn(4, 12), config=FULL)).gradients
    assert gradients.ok
    assert any("only rounding" in note and "0.weight" in note for note in gradients.notes)


# Refusals ----------------------------------------------------------------------------------------


def test_refusals(net, gm) -> None:
    with pytest.raises(AimSurgeryError, match="operated model as its second argument, got ConvNet"):
        verify(net, net, IMAGES)
    with pytest.raises(AimSurgeryError, match="does not run on the example inputs"):
        verify(net, gm, torch.randn(2, 5, 16, 16))
    with torch.device("meta"):
        on_meta = ConvNet()
    with pytest.raises(AimSurgeryError, match="meta device"):
        verify(on_meta, gm, IMAGES)
    gm.aim.plan = dataclasses.replace(
        gm.plan, inputs=dataclasses.replace(plan(net, IMAGES).inputs, args=None)
    )
    with pytest.raises(MissingInputsError, match="pass example_inputs"):
        verify(net, gm)


def test_a_frozen_base_passes_with_a_note() -> None:
    net = ConvNet()
    gm = aim_surgery.freeze_base(transform(net, IMAGES, config=FULL))
    result = verify(net, gm, IMAGES)
    assert result.ok, str(result)
    assert any("frozen in the operated model" in note for note in result.notes)
    with torch.no_grad():
        next(p for p in gm.parameters() if not p.requires_grad).add_(1)
    assert not verify(net, gm, IMAGES).ok


class NanInDouble(nn.Module):
    """A mask that only float32 holds: cast down from float64 it is minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        mask = torch.full_like(x, torch.finfo(x.dtype).min).float()
        return (x.float() + mask).softmax(-1).to(x.dtype)


def test_nan_in_float64_alone_is_no_fault_of_the_operation() -> None:
    model, x = NanInDouble(), torch.randn(2, 4)
    result = verify(model, transform(model, (x,)), (x,))
    assert "the original gives NaN in float64: compared in float32" in result.notes
    assert {c.dtype for c in result.equivalence.comparisons} == {torch.float32}
    assert result.equivalence.ok
    assert result.gradients.mode == "training"


def test_nan_in_every_type_is_compared_as_it_is() -> None:
    class Nan(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * torch.tensor([1.0, torch.nan], dtype=input.dtype)

    model, x = Nan(4, 2), torch.randn(2, 4)
    result = verify(model, transform(model, (x,)), (x,))
    assert {c.dtype for c in result.equivalence.comparisons} == {torch.float64}


class Codebook(nn.Module):
    """Looks up what a product chose: gradients reach the table, and not the product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(4, 4), nn.Embedding(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        chosen = (x @ self.table.weight.T).argmax(-1)
        return x + self.table(chosen)


class Chooses(nn.Module):
    """(N, 8) -> N indices; or what they are of."""

    def __init__(self, chooses: bool) -> None:
        super().__init__()
        self.fc, self.chooses = nn.Linear(8, 8), chooses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return x.argmax(-1) if self.chooses else x


def test_a_model_that_gives_no_gradient_need_not_give_any_after_it() -> None:
    x = torch.randn(3, 8)
    model = Chooses(True)
    result = verify(model, transform(model, x), x)
    assert result.ok, str(result)
    assert "no output of the original has a gradient" in str(result)
    assert not verify(Chooses(False), transform(model, x), x).ok


def test_a_product_that_only_chooses_gets_no_gradient() -> None:
    model, x = Codebook(), torch.randn(3, 4)
    gm = transform(model, (x,))
    result = verify(model, gm, (x,))
    assert result.ok, str(result)
    assert result.gradients.unreached == ()
    dead = "what they are added to passes no gradient on: aim.reads.table.weight"
    assert dead in result.notes


def test_a_read_that_is_not_added_is_still_named() -> None:
    model, x = Codebook(), torch.randn(3, 4)
    model.forward = lambda x: model.first(x) @ model.table.weight.T  # type: ignore[method-assign]
    gm = transform(model, (x,))
    product = next(node for node, note in noted_sites(gm.graph) if note.site == "table")
    (total,) = product.users
    total.replace_all_uses_with(product)  # without the memory's part
    gm.recompile()
    unreached = dict(verify(model, gm, (x,)).gradients.unreached)
    assert "aim.reads.table.weight" in unreached


class Sparse(nn.Module):
    """A graph's adjacency: a buffer and outputs that are no strided tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.linear(torch.sparse.mm(self.get_buffer("adjacency"), x))
        return scores, scores.detach().relu().to_sparse()


def test_sparse_tensors_are_compared() -> None:
    model, x = Sparse(), torch.randn(4, 6)
    gm = transform(model, x, config=FULL)
    assert verify(model, gm, x).ok
    with torch.no_grad():
        gm.get_parameter("linear.bias").add_(1)
    assert {"output[0]", "output[1]"} <= {
        offender.partition(" ")[0]
        for item in verify(model, gm, x).equivalence.offenders
        for offender in item.offenders
    }


class ChangesItsState(nn.Module):
    """In evaluation, backward stops half-way: a tensor that it needs was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if not self.training:
            state = hidden.sigmoid()
            hidden = hidden * state.square()
            state += 1
        return self.last(hidden)


def test_a_backward_that_fails_leaves_no_gradients_for_the_next_case() -> None:
    model, x = ChangesItsState(), torch.randn(3, 4)
    result = verify(model, transform(model, x), x)
    assert result.ok, str(result)
    assert any("the original fails in backward" in note for note in result.notes)
    assert any(
        c.what == "gradients" and "training" in c.case for c in result.equivalence.comparisons
    )


class Cancels(nn.Module):
    """Statistics of a small difference between large products; `flipped`: summed backwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight * (1 + 1e-3 * torch.rand(8, 64)))
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.flipped = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.first.weight, self.second.weight
        if self.flipped:
            x, first, second = x.flip(-1), first.flip(-1), second.flip(-1)
        products = [torch.nn.functional.linear(x, weight) for weight in (first, second)]
        return self.norm(3e3 * (products[1] - products[0])).tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_are_left_out_only_where_rounding_moves_them_as_far(dtype) -> None:
    x = torch.randn(6, 64, dtype=dtype, generator=torch.Generator().manual_seed(2)) + 1

    def compared(change) -> tuple[Comparison, list[str]]:
        model, notes = Cancels().to(dtype), []
        other = copy.deepcopy(model)
        change(other)
        pair = Pair(model, other, plan(nn.Linear(64, 8), x.float()), TOLERANCES[dtype])
        found = pair.compare(Case(True, Samples((x,), {}), "batch 6", dtype), notes)
        assert not isinstance(found, str)
        before = {name: value.clone() for name, value in model.named_buffers()}
        twin = Cancels().to(dtype).train()
        twin(x)  # the original's own buffers are those of one run
        assert all(torch.equal(value, before[name]) for name, value in twin.named_buffers())
        return next(c for c in found if c.what == "buffers"), notes

    def flip(model: Cancels) -> None:
        model.flipped = True

    def wrong(model: Cancels) -> None:
        flip(model)
        model.norm.momentum = 0.1 * (1 + 1e-2 if dtype == torch.float32 else 1 + 1e-9)

    rounded, notes = compared(flip)
    assert rounded.ok, str(rounded)
    needed = any("buffers are not judged" in note for note in notes)
    assert needed == (dtype == torch.float32)
    defect, _ = compared(wrong)
    assert any("running_mean" in text for text in defect.offenders)


class Caches(nn.Module):
    """A table that forward rebuilds for another size; `persistent`: state dicts hold it."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("table", torch.zeros(1), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1]) / 10
        return self.linear(x) * self.table[:, None]


def test_caches_that_forward_replaces_are_not_compared_but_what_state_dicts_keep_is() -> None:
    for persistent in (False, True):
        model, x = Caches(persistent=persistent), torch.randn(2, 5, 6)
        result = verify(model, transform(copy.deepcopy(model), x, config=FULL), x)
        assert result.ok is not persistent, str(result)
        named = any("replaces them" in note and "table" in note for note in result.notes)
        assert named is not persistent


def test_sizes_that_both_models_refuse_are_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    class Rows(nn.Module):
        """Takes as many samples as its example has, and says so."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            print("called", file=sys.stderr)
            return self.fc(x)[rows]

    inputs = (torch.randn(4, 8), torch.tensor([[0, 3]]))
    model = Rows()
    gm = aim_surgery.transform(model, inputs, emit="graph")
    capfd.readouterr()
    assert verify(model, gm, inputs).ok
    said = capfd.readouterr().err
    assert "called" in said
    assert "Traceback" not in said


class KeptByType(nn.Module):
    """Keeps a table for each dtype, as coordinates and anchors are kept."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.tables: dict[torch.dtype, torch.Tensor] = {}
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if x.dtype not in self.tables:
            self.tables[x.dtype] = torch.ones(8, dtype=x.dtype)
        return x + self.tables[x.dtype] * (3 if self.wrong else 1)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_graph_of_one_precision_is_compared_in_it(wrong: bool) -> None:
    gm = aim_surgery.transform(KeptByType(), torch.randn(4, 8), emit="graph")
    with pytest.raises(AssertionError, match=r"dtype is torch\.float32"):
        copy.deepcopy(gm).double()(torch.randn(4, 8).double())
    model = KeptByType(wrong)
    model.load_state_dict({k: gm.state_dict()[k][..., :8] for k in model.state_dict()})
    report = verify(model, gm, torch.randn(4, 8))
    assert report.ok != wrong
    assert any("captured in another precision" in note for note in report.equivalence.notes)


class Spectral(nn.Module):
    """Complex convolutions, linear layers and products between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(8, 8), nn.Linear(4, 2)
        self.conv = nn.Conv1d(2, 4, 3, padding=1, dtype=torch.cfloat)
        self.mix = nn.Linear(4, 4, dtype=torch.cfloat)
        self.modes = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(torch.fft.fft(self.enter(x))).transpose(1, 2)
        return self.out(torch.einsum("btc,cd->btd", self.mix(x), self.modes).abs())


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_complex_weights_are_told_and_missed(emit: Any) -> None:
    model, x = Spectral(), torch.randn(3, 2, 8)
    gm = transform(model, x, config=FULL, emit=emit)
    made = gm.aim.plan
    reasons = {name: skip.reason for skip in made.skips for name in skip.weights}
    assert reasons.keys() == {"conv.weight", "mix.weight", "modes"}
    assert all("complex" in reason for reason in reasons.values())
    assert verify(model, gm, x).ok
    silent = dataclasses.replace(made, skips=())
    found = check_coverage(model, gm, silent, samples_for(model, silent, x))
    assert {name for name, _ in found.unaccounted} == reasons.keys()


def test_a_model_of_complex_weights_alone_is_told_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat))
    with pytest.raises(PlanError, match="0: its weights are complex numbers"):
        plan(model, torch.randn(3, 4, dtype=torch.cfloat))


class OneStep(nn.Module):
    """One call of a cell, from a state that is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x, x.new_zeros(len(x), 6)))


def test_a_read_that_reaches_activations_by_way_of_a_bias() -> None:
    model, x = OneStep(), torch.randn(3, 4)
    gm = transform(model, x, config=FULL)
    assert "cell.weight_hh" in {read.site.weights[0] for read in gm.plan.reads}
    assert verify(model, gm, x).ok


class Forces(nn.Module):
    """An energy, and its derivative by what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_(True)
        energy = self.layers(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -slope


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_takes_derivatives_in_its_forward(inside: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), Forces()) if inside else Forces()
    x = torch.randn(3, 6)
    gm: Any = transform(model, x, config=FULL)
    assert gm.aim.plan.emit == "module"
    assert len(gm.aim.plan.reads) == 2 + inside
    assert verify(model, gm, x).ok
    with torch.no_grad():
        gm.get_parameter("1.layers.0.bias" if inside else "layers.0.bias").add_(1)
    assert not verify(model, gm, x).ok
    with pytest.raises(CaptureError, match=r"tracing stops .*`\(slope,\) = .*by itself runs: emit"):
        transform(model, x, emit="graph")
    with pytest.raises(CaptureError, match=r"failed with the example inputs \(float32\[3, 5\]\)"):
        transform(model, torch.randn(3, 5), emit="module")


class Result:
    """Attributes of its own, some in slots; and itself, as a cycle."""

    __slots__ = ("__dict__", "logits")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.itself, self.made_by = logits, self, nn.Identity()


class GivesObjects(nn.Module):
    """(N, 12) -> what `wrap` makes of (N, 4)."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(12, 16), nn.Linear(16, 4), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.second(self.first(x).relu()))


@pytest.mark.parametrize("emit", ["auto", "module"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: torch.distributions.Categorical(logits=logits),
        Result,
        lambda logits: {"a": (Result(logits), 1)},
        lambda logits: logits.detach().numpy(),
    ],
)
def test_tensors_in_objects_are_compared(wrap: Any, emit: Any) -> None:
    torch.manual_seed(0)
    model, x = GivesObjects(wrap), torch.randn(4, 12)
    gm: Any = transform(model, x, emit=emit, config=FULL)
    found = verify(model, gm, x)
    assert found.ok, found
    assert not any("not compared: output" in note for note in found.notes)
    with torch.no_grad():
        gm.get_submodule("second").weight.mul_(-3)
    assert not verify(model, gm, x).equivalence.ok


def test_what_can_not_be_looked_into_is_named() -> None:
    model, x = GivesObjects(lambda logits: {logits}), torch.randn(4, 12)
    notes = verify(model, transform(model, x, config=FULL), x).equivalence.notes
    assert "outputs are not compared: output (set)" in notes
    assert any("no outputs are left that would say anything" in note for note in notes)


class LogsNumbers(nn.Module):
    """(N, 3, H, W) -> (N, 10), and numbers of Python's; `scale` makes one of them wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 48, 3), nn.Conv2d(48, 64, 3)
        self.c, self.scale = nn.Linear(64, 10), 1.0

    def forward(self, x: torch.Tensor) -> Any:
        y = self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return y, self.scale * y.sum().item(), complex(y.square().sum().item() * 1e3, 1)


@pytest.mark.parametrize("seed", range(4))
def test_python_floats_are_compared_as_tensors_are(seed: int) -> None:
    x = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    model = LogsNumbers()
    gm = transform(model, x)
    found = verify(model, gm, x)
    assert found.ok, found
    assert found.equivalence.largest("gradients") is not None
    model.scale = 1.0001
    offenders = verify(model, gm, x).equivalence.offenders
    assert offenders
    assert all("output[1]" in str(one) for one in offenders)


class Siamese(nn.Module):
    """(N, 8), (N, 8) -> (N, 1): what is alike in both is taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head((self.trunk(a) - self.trunk(b)).abs())


def test_what_a_difference_takes_away_is_a_note() -> None:
    model, x = Siamese(), (torch.randn(4, 8), torch.randn(4, 8))
    config = AimConfig(write="none", budget=None, memory=8)
    gradients = verify(model, transform(model, x, config=config), x).gradients
    assert gradients.ok
    assert any("only rounding" in note and "trunk.2.weight" in note for note in gradients.notes)
