"""Forms: one function of the same parameters, written in two ways."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, transform
from aim_surgery.lowering import lower
from aim_surgery.lowering.forms import rewrite_as
from aim_surgery.nn.inside import JoinMemory
from aim_surgery.nn.split_memory import SplitMemory
from aim_surgery.surgery.notes import noted_sites
from tests.cases import CASES, Case, assert_rounds_alike, assert_same, conv_geometries

FULL = AimConfig(budget=None, memory=48, init="fresh")
WRITES = ("none", "sample", "batch")


def inputs_of(case: Case) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(case.shape, dtype=torch.float64)


def operated(model: nn.Module, *inputs: Any, write: Any = "none") -> Any:
    torch.manual_seed(2)
    config = AimConfig(budget=None, memory=48, init="fresh", write=write)
    gm: Any = transform(model.double(), inputs, config=config)
    with torch.no_grad():
        for parameter in gm.aim.parameters():
            parameter.normal_()
    return gm


def gradients(gm: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients by name and of the first input."""
    gm.zero_grad(set_to_none=True)
    x = inputs[0].clone().requires_grad_(inputs[0].is_floating_point())
    torch.manual_seed(3)
    output = gm(x, *inputs[1:])
    (
        output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    ).sum().backward()
    found = {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}
    if x.grad is not None:
        found["the input"] = x.grad
    return output.detach(), found


def assert_one_function(first: nn.Module, second: nn.Module, *inputs: Tensor) -> None:
    """Outputs and gradients are those of the other, in both modes."""
    for training in (True, False):
        ours, ours_by_name = gradients(copy.deepcopy(first).train(training), *inputs)
        theirs, theirs_by_name = gradients(copy.deepcopy(second).train(training), *inputs)
        assert_same(ours, theirs)
        assert ours_by_name.keys() == theirs_by_name.keys()
        sizes = {name: float(gradient.abs().max()) for name, gradient in theirs_by_name.items()}
        rounding = 1e-15 * max(sizes.values())  # before a norm, gradients are nothing else
        for name, gradient in ours_by_name.items():
            difference = float((gradient - theirs_by_name[name]).abs().max())
            limit = max(1e-12 * sizes[name], rounding)
            assert difference <= limit, f"{name}: {difference} of {sizes[name]}"


def split_sites(gm: Any) -> list[str]:
    return [note.site for node, note in noted_sites(gm.graph) if note.sliced]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_site(case: Case, write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aim_surgery.nn.widened.FEW", -1)  # few inputs would be concatenated
    x = inputs_of(case)
    gm = operated(case.build(), x, write=write)
    split = lower(gm, "split")
    assert len(split_sites(split)) == sum(read.site.widens for read in gm.plan.reads)
    assert list(split.state_dict()) == list(gm.state_dict())
    assert_one_function(split, gm, x)
    back = lower(split, "concat")
    assert not split_sites(back)
    assert_one_function(back, gm, x)
    assert len(back.graph.nodes) - len(gm.graph.nodes) <= 2 * len(gm.plan.reads)  # shapes


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_geometries(dims: int) -> None:
    torch.manual_seed(0)
    for options in conv_geometries():
        options = dict(options)
        if options.pop("dims") != dims:
            continue
        conv = getattr(nn, f"Conv{dims}d")(4, 8, 3, **options)
        x = torch.randn(2, 4, *(9, 8, 7)[:dims], dtype=torch.float64)
        gm = operated(nn.Sequential(conv, nn.ReLU()), x)
        assert_same(lower(gm, "split")(x), gm(x))


class Upsampling(nn.Module):
    """Calls transposed convolutions with an output size."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, groups=groups)
        self.twice = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x), output_size=list(x.shape[-2:]))
        return self.twice(y, [y.shape[-2] * 2 + 1, y.shape[-1] * 2])


@pytest.mark.parametrize("groups", [1, 2])
def test_output_sizes(groups: int) -> None:
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    gm = operated(Upsampling(groups), x)
    split = lower(gm, "split")
    assert split_sites(split) == ["down", "up", "twice"]
    for size in (x, x[..., :6, :7]):
        assert_one_function(split, gm, size)
        assert_one_function(lower(split, "concat"), gm, size)


class OnValues(nn.Module):
    """Stays a Python call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="circular")
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = self.up(x, output_size=[2 * x.shape[-2] + 2, 2 * x.shape[-1] + 1])
        x = self.fc(x.mT.flatten(1, 2)[..., :6])
        return x if float(x.detach().sum()) > 1e9 else x * 2


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_reads_inside_python_calls(emit: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), OnValues()).double()
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    gm: Any = transform(model, x, config=FULL, emit=emit)
    split = lower(gm, "split")
    assert sum("Split" in type(vars(m).get("forward")).__name__ for m in split.modules()) >= 3
    assert not any(
        isinstance(h, JoinMemory) for m in split.modules() for h in m._forward_pre_hooks.values()
    )
    assert list(split.state_dict()) == list(gm.state_dict())
    assert_one_function(split, gm, x)
    assert_one_function(copy.deepcopy(split), gm, x)
    assert_one_function(pickle.loads(pickle.dumps(split)), gm, x)
    back = lower(split, "concat")
    assert not any(isinstance(vars(m).get("forward"), SplitMemory) for m in back.modules())
    assert_one_function(back, gm, x)


class Frozen(nn.Module):
    """A part without gradients, and a path of its own in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.aside = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(self.stem(x))
        x = self.body(x)
        return x + self.aside(x) if self.training else x


def test_no_grad_regions_and_two_graphs() -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    gm = operated(Frozen(), x)
    split = lower(gm, "split")
    assert_one_function(split, gm, x)
    assert_one_function(lower(split, "concat"), gm, x)


def test_parameters_are_shared_and_structure_is_not() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    gm = operated(nn.Sequential(*layers), x, write="sample")
    before = gm(x)
    split = lower(gm, "split")
    assert [id(p) for p in split.parameters()] == [id(p) for p in gm.parameters()]
    assert [id(b) for b in split.buffers()] == [id(b) for b in gm.buffers()]
    assert split.aim.form == "split"
    assert gm.aim.form == "concat"
    split.eval()
    assert gm.training
    aim_surgery.freeze_base(split)  # takes its layers apart for good, and not those of gm
    assert split.aim.form == "concat"
    assert not any(read.site.widens for read in split.plan.reads)
    assert_same(gm(x), before)
    assert_same(split.train()(x), before)


def test_what_a_pass_says_it_did() -> None:
    x = inputs_of(CASES[0])
    gm = operated(CASES[0].build(), x)
    code = gm.code
    assert not rewrite_as(gm, "concat")
    assert gm.code == code
    assert rewrite_as(gm, "split")
    assert gm.code != code
    assert not rewrite_as(gm, "split")
    assert rewrite_as(gm, "concat")


def test_fewer_operations() -> None:
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    layers = [nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 3)]
    gm = operated(nn.Sequential(*layers), x)
    split = lower(gm, "split")
    functions = [node.target for node in split.graph.nodes]
    assert torch.cat not in functions
    assert "expand" not in functions
    shapes: list[torch.Size] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is F.conv2d:
                shapes.append(result.shape)
            return result

    with Watch(), torch.no_grad():
        split(x)
    assert [len(shape) for shape in shapes] == [4, 3, 4, 3]  # the memory's part has no batch


def test_layouts_and_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    gm: Any = transform(model, x, config=FULL)
    split = lower(gm, "split")
    assert split(x).is_contiguous(memory_format=torch.channels_last)
    assert_rounds_alike(gm, lambda gm: lower(gm, "split"), x)


def test_verify_notebook_save_and_load(tmp_path: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    gm: Any = transform(model, x, form="split")
    assert gm.aim.form == "split"
    result = aim_surgery.verify(model, gm, x)
    assert result.ok, str(result)
    assert aim_surgery.read_memory(gm, x)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.normal_()
    with aim_surgery.disable(gm):
        off = gm(x)
    assert not torch.equal(off, gm(x))
    aim_surgery.save(gm, tmp_path / "aim.safetensors")
    loaded = aim_surgery.load(tmp_path / "aim.safetensors", model)
    torch.testing.assert_close(loaded(x), gm(x), rtol=1e-4, atol=1e-4)
    assert aim_surgery.apply(model, gm.plan, form="split").aim.form == "split"


def test_errors() -> None:
    x = inputs_of(CASES[0])
    gm = operated(CASES[0].build(), x)
    with pytest.raises(AimSurgeryError, match="expected an operated model"):
        lower(nn.Linear(2, 2), "split")
    with pytest.raises(AimSurgeryError, match="form must be"):
        lower(gm, "folded")  # type: ignore[arg-type]
    case = next(case for case in CASES if case.name == "functional")
    split = lower(operated(case.build(), inputs_of(case)), "split")
    total = next(node for node in split.graph.nodes if node.target == "add_")
    node = total.args[0]
    total.replace_all_uses_with(node, lambda user: user is not total)
    split.graph.erase_node(total)
    with pytest.raises(AimSurgeryError, match="its sum is no longer in it"):
        lower(split, "concat")
    node, note = next(noted_sites(gm.graph))
    node.meta["aim"] = note._replace(view="gone")
    with pytest.raises(AimSurgeryError, match="has been changed since surgery wrote it"):
        lower(gm, "split")


def test_a_site_right_after_a_widened_one() -> None:
    """What it works on is another node in split form; W_m lies beside, as W is computed."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU()]
    x = torch.randn(3, 8, dtype=torch.float64)
    gm = operated(nn.Sequential(*layers), x)
    assert [read.site.widens for read in gm.plan.reads] == [True, False]
    split = lower(gm, "split")
    back = lower(split, "concat")
    for model in (split, back, lower(back, "split")):
        assert_one_function(model, gm, x)
        assert_same(aim_surgery.fold(copy.deepcopy(model).eval())(x), gm.eval()(x))
        aim_surgery.restore(model, measure=False)


def test_slices_are_taken_where_they_are_used() -> None:
    """So that backward holds the gradients of one weight's slices at a time."""
    layers = [nn.ConvTranspose2d(4, 4, 3) for _ in range(3)]
    split = lower(operated(nn.Sequential(*layers), torch.randn(2, 4, 5, 5)), "split")
    targets = [node.target for node in split.graph.nodes]
    splits = [index for index, target in enumerate(targets) if target == "split"]
    sums = [index for index, target in enumerate(targets) if target == "add_"]
    assert len(splits) == len(sums) == 3
    assert all(a < b for a, b in zip(sums, splits[1:], strict=False))


def test_hooks_put_on_since() -> None:
    """A hook would see one of two products, or none: that is said, not done."""
    x = inputs_of(CASES[0])
    torch.manual_seed(0)
    gm = operated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    handle = gm.get_submodule("2").register_forward_hook(lambda module, args, output: 2 * output)
    for change in (lambda: lower(gm, "split"), lambda: aim_surgery.fold(gm.eval())):
        with pytest.raises(AimSurgeryError, match="2: this layer has forward hooks"):
            change()
    handle.remove()
    assert_same(lower(gm, "split")(x), gm(x))

    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    gm.get_submodule("2").__class__ = Doubled
    with pytest.raises(AimSurgeryError, match=r"a forward of its own \(Doubled\)"):
        lower(gm, "split")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("emit", ["graph", "module"])
def test_weights_that_a_call_has_computed_are_copied(norm: Any, emit: Any) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).double()
    config = AimConfig(memory=48, budget=None, init="fresh", write="none")
    gm = transform(model, x, config=config, emit=emit).eval()
    expected = gm(x)
    assert expected.requires_grad  # so the weight has a history
    assert_same(lower(gm, "split")(x), expected)
    assert_same(aim_surgery.fold(gm)(x), expected)


def test_what_reads_beside_its_layer_is_one_graph_in_either_form() -> None:
    case = CASES[0]
    gm = aim_surgery.freeze_base(operated(case.build(), inputs_of(case)))
    split = lower(gm, "split")
    assert (gm.aim.form, split.aim.form) == ("concat", "split")
    assert split.code == gm.code
    assert not any(read.site.widens for read in gm.plan.reads)
