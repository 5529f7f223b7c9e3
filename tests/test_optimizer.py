"""Optimizer state through surgery: a resumed run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn, optim

import aim_surgery
from aim_surgery import AimConfig, CheckpointError, freeze_base, restore
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.checkpoint.optimizer import carry_optimizer, carry_scheduler, restore_optimizer
from aim_surgery.checkpoint.optimizer.moments import memory_axis, narrow_entry, widen_entry
from aim_surgery.surgery.modules import widened_reads

TOLERANCE = 1e-12
STEPS = 4


class Net(nn.Module):
    """Grouped, depthwise and transposed convolutions, batch norms, a shortcut, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2, groups=2)
        self.sequence = nn.Conv1d(12, 8, 3)
        self.fc = nn.Linear(8, 24)
        self.tied = nn.Linear(24, 24, bias=False)
        self.again = nn.Linear(24, 24, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.depthwise(self.grouped(x))))
        x = self.sequence(self.up(x).flatten(2)).mean(-1)
        x = F.gelu(self.fc(x))
        return self.head(F.gelu(self.again(F.gelu(self.tied(x)))))


BATCHES = [
    (
        torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(i)).double(),
        torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(i)),
    )
    for i in range(2 * STEPS)
]

Make = Callable[[Any], optim.Optimizer]


def hf_adafactor(parameters: Any, **options: Any) -> optim.Optimizer:
    """That of transformers."""
    import_torchvision()  # in whose place transformers would import another
    from transformers.optimization import Adafactor

    return Adafactor(parameters, **options)


def timm_optimizer(name: str, **options: Any) -> Make:
    def make(parameters: Any) -> optim.Optimizer:
        import_torchvision()
        from timm.optim._optim_factory import create_optimizer_v2

        return create_optimizer_v2(list(parameters), opt=name, **options)

    return make


UNSCALED: Any = {
    "lr": 1e-3, "scale_parameter": False, "relative_step": False, "clip_threshold": 1e9,
}  # fmt: skip
EXACT: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2),
    "amsgrad": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw_foreach": lambda p: optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_fused": lambda p: optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p),
    "nadam": lambda p: optim.NAdam(p),
    "radam": lambda p: optim.RAdam(p),
    "rprop": lambda p: optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: optim.ASGD(p, lr=1e-2),
    "transformers_adafactor": lambda p: hf_adafactor(p, **UNSCALED),
    "transformers_adafactor_beta1": lambda p: hf_adafactor(p, **UNSCALED, beta1=0.9),
    "timm_adafactorbv": timm_optimizer("adafactorbv", lr=1e-3, min_dim_size_to_factor=4),
    "timm_lion": timm_optimizer("lion", lr=1e-3),
    "timm_lamb": timm_optimizer("lamb", lr=1e-3),
}  # fmt: skip
ADAFACTORS: dict[str, Make] = {
    "torch": lambda p: optim.Adafactor(p, lr=1e-2),
    "transformers": lambda p: hf_adafactor(p),
    "timm": timm_optimizer("adafactor", lr=1e-3),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(
    model: nn.Module, optimizer: optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]]
) -> list[float]:
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def operated(model: nn.Module, *, frozen: bool, write: Any = "sample", **changes: Any) -> Any:
    """With a memory that can't be other than zero, if frozen.

    The memory and what writes to it are zero and not trained; so gradients of W_m, products with
    the memory, are zero, and weight decay leaves zeros alone.
    """
    config = AimConfig(**{"memory": 40, "budget": None, "write": write, **changes})
    gm = aim_surgery.transform(model, BATCHES[0][0], config=config)
    if frozen:
        for name, parameter in gm.aim.named_parameters():
            parameter.requires_grad_(False)
            if name.startswith("memory") or ".out." in name:
                parameter.data.zero_()
    return gm


def started(make: Make, parameters: Any = nn.Module.parameters) -> tuple[Net, Any, list[float]]:
    """A run that stops after some steps, and what it would have computed afterwards."""
    model = net()
    optimizer = make(parameters(model))
    train(model, optimizer, BATCHES[:STEPS])
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, BATCHES[STEPS:])
    resumed = net()
    resumed.load_state_dict(saved[0])
    return resumed, saved[1], expected


def furthest(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - e) / abs(e) for a, e in zip(losses, expected, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_the_losses_continue_as_without_surgery(name: str) -> None:
    make = EXACT[name]
    model, state, expected = started(make)
    gm = operated(model, frozen=True)
    optimizer = make(gm.parameters())
    optimizer.load_state_dict(carry_optimizer(state, model, gm))
    assert furthest(train(gm, optimizer, BATCHES[STEPS:]), expected) <= TOLERANCE
    if name == "sgd":
        return  # it remembers nothing
    without = make((gm := operated(model, frozen=True)).parameters())
    assert furthest(train(gm, without, BATCHES[STEPS:]), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("name", EXACT)
def test_a_resumed_run_trains_what_is_new(name: str) -> None:
    make = EXACT[name]
    model, state, _ = started(make)
    gm = operated(model, frozen=False)
    optimizer = make(gm.parameters())
    optimizer.load_state_dict(carry_optimizer(state, model, gm))
    before = copy.deepcopy(gm.state_dict())
    train(gm, optimizer, BATCHES[STEPS:])
    still = [n for n, p in gm.named_parameters() if torch.equal(before[n], p)]
    assert still == []
    for read in gm.plan.reads:
        if read.site.widens:
            wide = gm.get_parameter(read.site.weights[0])
            axis, groups = memory_axis(read)
            each = wide.unflatten(axis, (groups, -1))
            assert each.narrow(axis + 1, each.shape[axis + 1] - read.planes, read.planes).any()
    assert all(torch.isfinite(p).all() for p in gm.parameters())


@pytest.mark.parametrize("name", ADAFACTORS)
def test_adafactor_is_exact_where_memory_weights_live_beside(name: str) -> None:
    """Where weights are widened, its steps are scaled by more entries: near, and not the same."""
    make = ADAFACTORS[name]
    model, state, expected = started(make)
    found = {}
    for beside in (True, False):
        gm = operated(model, frozen=True)
        if beside:
            freeze_base(gm)
            for parameter in gm.parameters():
                parameter.requires_grad_(True)
            for parameter in gm.aim.parameters():
                parameter.requires_grad_(False)
        optimizer = make(gm.parameters())
        optimizer.load_state_dict(carry_optimizer(state, model, gm))
        found[beside] = furthest(train(gm, optimizer, BATCHES[STEPS:]), expected)
    without = make((gm := operated(model, frozen=True)).parameters())
    dropped = furthest(train(gm, without, BATCHES[STEPS:]), expected)
    assert found[True] <= TOLERANCE
    assert TOLERANCE < found[False] < dropped


# Which parameter is which -------------------------------------------------------------------


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    every = list(model.named_parameters())
    return [
        {"params": [p for _, p in every if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]


def head_first(model: nn.Module) -> list[dict[str, Any]]:
    """What is new has no part in it: it comes with the rest, which is the last group."""
    head = [p for n, p in model.named_parameters() if n.startswith("head")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    return [{"params": head, "lr": 3e-3}, {"params": rest}]


def by_part(model: nn.Module) -> list[dict[str, Any]]:
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(name.partition(".")[0], []).append(parameter)
    return [{"params": part, "lr": 1e-3 * (1 + i)} for i, part in enumerate(parts.values())]


def names_of(groups: list[dict[str, Any]], model: nn.Module) -> list[list[str]]:
    by_id = {id(p): n for n, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in groups]


def one_each(model: nn.Module) -> list[dict[str, Any]]:
    """As detectron2 makes them."""
    return [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in model.parameters()]


GROUPS: dict[str, tuple[Callable[[nn.Module], list[dict[str, Any]]], Any]] = {
    "decay": (decay_groups, None),
    "head_first": (head_first, None),
    "by_part": (by_part, "own"),
    "one_each": (one_each, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_several_groups_are_told_apart_by_the_models_order(name: str) -> None:
    grouped, new_group = GROUPS[name]

    def make(groups: Any) -> optim.Optimizer:
        return optim.AdamW(groups, lr=1e-2)

    model, state, expected = started(make, grouped)
    gm = operated(model, frozen=True)
    carried = carry_optimizer(state, model, gm, new_group=new_group)
    optimizer = make(grouped(gm))
    optimizer.load_state_dict(carried)
    assert furthest(train(gm, optimizer, BATCHES[STEPS:]), expected) <= TOLERANCE
    entries = optimizer.state_dict()["state"]
    for group, names in zip(optimizer.param_groups, names_of(grouped(gm), gm), strict=True):
        assert [id(p) for p in group["params"]] == [id(gm.get_parameter(n)) for n in names]
    assert len(entries) == len(state["state"])  # frozen ones got none


def test_new_parameters_of_a_group_each_decay_as_the_resumed_script_wants() -> None:
    model, state, _ = started(lambda g: optim.AdamW(g, lr=1e-2), one_each)
    gm = operated(model, frozen=False)
    fresh = optim.AdamW(one_each(gm), lr=1e-2)
    wanted = [group["weight_decay"] for group in fresh.param_groups]
    fresh.load_state_dict(carry_optimizer(state, model, gm))
    assert [group["weight_decay"] for group in fresh.param_groups] == wanted
    back = restore_optimizer(fresh.state_dict(), gm)
    assert back["param_groups"] == state["param_groups"]


def test_new_parameters_go_where_the_caller_says() -> None:
    model, state, _ = started(lambda g: optim.AdamW(g, lr=1e-2), head_first)
    gm = operated(model, frozen=False)
    count = len(list(gm.aim.parameters()))
    sizes = [len(group["params"]) for group in state["param_groups"]]
    choices: tuple[tuple[Any, list[int]], ...] = (
        (0, [sizes[0] + count, sizes[1]]), (-1, [sizes[0], sizes[1] + count]),
        ("own", [*sizes, count]), ({"lr": 0.5}, [*sizes, count]),
    )  # fmt: skip
    for new_group, expected in choices:
        carried = carry_optimizer(state, model, gm, new_group=new_group)
        assert [len(group["params"]) for group in carried["param_groups"]] == expected
        flat = [key for group in carried["param_groups"] for key in group["params"]]
        assert flat == list(range(sum(expected)))
        if isinstance(new_group, dict):
            assert [g["lr"] for g in carried["param_groups"]] == [3e-3, 1e-2, 0.5]
    for wrong in (2, True, "last", {"params": []}):
        with pytest.raises(CheckpointError, match="new_group"):
            carry_optimizer(state, model, gm, new_group=wrong)  # type: ignore[arg-type]


def test_states_by_name_and_groups_with_names_need_no_order() -> None:
    def backwards(model: nn.Module) -> list[tuple[str, Tensor]]:
        return list(reversed(list(model.named_parameters())))

    model, state, expected = started(lambda p: optim.Adam(p, lr=1e-2), backwards)
    gm = operated(model, frozen=True)
    carried = carry_optimizer(state, model, gm)
    names = carried["param_groups"][0]["param_names"]
    new = [name for name, _ in gm.named_parameters() if name.startswith("aim.")]
    assert names == [*(name for name, _ in backwards(model)), *new]
    optimizer = optim.Adam([(n, gm.get_parameter(n)) for n in names], lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(carried))
    assert furthest(train(gm, optimizer, BATCHES[STEPS:]), expected) <= TOLERANCE

    given = state["param_groups"][0]["param_names"]
    for prefix in ("module.", "net.", "students.0._orig_mod."):
        keyed = {
            "state": {f"{prefix}{n}": state["state"][i] for i, n in enumerate(given)},
            "param_groups": [{"lr": 1e-2, "params": [f"{prefix}{n}" for n in given]}],
        }
        by_name = carry_optimizer(keyed, model, gm)
        assert by_name["param_groups"][0]["params"] == [f"{prefix}{n}" for n in names]
        for index, name in enumerate(given):
            for key, value in carried["state"][index].items():
                assert torch.equal(value, by_name["state"][f"{prefix}{name}"][key])
    wrong = keyed["param_groups"][0]["params"].pop(0)
    keyed["param_groups"][0]["params"].append("another.weight")
    keyed["state"]["another.weight"] = keyed["state"].pop(wrong)
    with pytest.raises(CheckpointError, match=r"names 1 parameters .* has not: another"):
        carry_optimizer(keyed, model, gm)
    unnamed = {**state, "param_groups": [
        {k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]
    ]}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"in their order.*names.*--drop-optimizer"):
        carry_optimizer(unnamed, model, gm)
    told = carry_optimizer(unnamed, model, gm, names=[given])
    assert told["state"].keys() == carried["state"].keys()
    with pytest.raises(CheckpointError, match="one name a parameter"):
        carry_optimizer(unnamed, model, gm, names=[given[1:]])
    keyed["param_groups"][0]["params"] = [f"other.{n}_" for n in given]
    keyed["state"] = {}
    with pytest.raises(CheckpointError, match=r"parameters that the model has not: other\.head"):
        carry_optimizer(keyed, model, gm)


@pytest.mark.parametrize("listed", ["head", "not_the_stem"])
def test_frozen_parameters_may_be_left_out_of_groups(listed: str) -> None:
    def some(model: nn.Module) -> list[Tensor]:
        if listed == "head":
            return [p for n, p in model.named_parameters() if n.startswith(("head", "fc"))]
        return [p for n, p in model.named_parameters() if not n.startswith("stem")]

    model, state, expected = started(lambda p: optim.Adam(p, lr=1e-2), some)
    gm = operated(model, frozen=True)
    optimizer = optim.Adam([*some(gm)], lr=1e-2)
    carried = carry_optimizer(state, model, gm)
    new = [p for n, p in gm.named_parameters() if n.startswith("aim.")]
    assert [len(g["params"]) for g in carried["param_groups"]] == [len(some(model)) + len(new)]
    optimizer = optim.Adam([*(p for p in some(gm) if all(p is not q for q in new)), *new], lr=1e-2)
    optimizer.load_state_dict(carried)
    assert furthest(train(gm, optimizer, BATCHES[STEPS:]), expected) <= TOLERANCE


def test_what_could_be_several_parameters_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 16)
    plan = aim_surgery.plan(model, x, config=AimConfig(memory=8, budget=None, write="none"))
    gm = aim_surgery.apply(model, plan.without("b").with_planes({"a": 2}))
    optimizer = optim.Adam([model.b.weight])
    model(x).sum().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"doesn't tell which of the model's parameters"):
        carry_optimizer(optimizer.state_dict(), model, gm)
    assert carry_optimizer(optimizer, model, gm)["state"][0]["exp_avg"].shape == (16, 16)
    optimizer = optim.Adam([{"params": model.c.parameters()}, {"params": model.a.parameters()}])
    optimizer.step()
    carried = carry_optimizer(optimizer, model, gm)
    assert [e["exp_avg"].shape[-1] for e in carried["state"].values()] == [24, 16, 18, 16]
    carried["state"][0]["step"] += 1  # is not the optimizer's own
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_another_models_state_is_refused() -> None:
    model, state, _ = started(EXACT["adam"])
    gm = operated(model, frozen=False)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with pytest.raises(CheckpointError, match="not made from this model"):
        carry_optimizer(state, other, gm)
    foreign = optim.Adam(other.parameters())
    other(torch.ones(1, 3).double()).sum().backward()
    foreign.step()
    with pytest.raises(
        CheckpointError, match=r"is none that surgery can widen.*exp_avg is of shape"
    ):
        carry_optimizer(foreign.state_dict(), model, gm)
    with pytest.raises(CheckpointError, match="parameters that the model has not: pass the model"):
        carry_optimizer(foreign, model, gm)
    with pytest.raises(CheckpointError, match=r"expected an optimizer's state dict.*got epoch"):
        carry_optimizer({"epoch": 3}, model, gm)


def test_unknown_optimizers_are_refused_with_the_way_out() -> None:
    model = net()
    gm = operated(model, frozen=False)
    lbfgs = optim.LBFGS(model.parameters(), max_iter=2)
    x, y = BATCHES[0]

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    lbfgs.step(closure)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"is none that surgery can widen.*--drop-optimizer"):
        carry_optimizer(lbfgs.state_dict(), model, gm)
    _, state, _ = started(EXACT["adam"])
    for strange in (torch.zeros(16, 16), torch.zeros(16, 3, 3, 3, dtype=torch.uint8), [1, 2]):
        broken = copy.deepcopy(state)
        broken["state"][0]["preconditioner"] = strange
        with pytest.raises(CheckpointError, match=r"'?0'?.*preconditioner.*--drop-optimizer"):
            carry_optimizer(broken, model, gm)
    _, state, _ = started(EXACT["asgd"])
    fresh = operated(model, frozen=False, init="fresh")
    with pytest.raises(CheckpointError, match=r"ax is a copy of the parameter"):
        carry_optimizer(state, model, fresh)


# The way back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_there_and_back_again(name: str) -> None:
    make = EXACT[name]
    model, state, expected = started(make)
    gm = operated(model, frozen=True)
    back = through_a_file(restore_optimizer(carry_optimizer(state, model, gm), gm))
    assert back["param_groups"] == state["param_groups"]
    base = restore(gm)
    optimizer = make(base.parameters())
    optimizer.load_state_dict(back)
    assert furthest(train(base, optimizer, BATCHES[STEPS:]), expected) <= TOLERANCE


@pytest.mark.parametrize("new_group", [None, "own", 0])
def test_back_from_a_trained_one(new_group: Any) -> None:
    model, state, _ = started(lambda g: optim.AdamW(g, lr=1e-2), decay_groups)
    gm = operated(model, frozen=False)
    carried = carry_optimizer(state, model, gm, new_group=new_group)
    optimizer = optim.AdamW(decay_groups(gm), lr=1e-2)
    if new_group is None:
        optimizer.load_state_dict(carried)
        train(gm, optimizer, BATCHES[STEPS:])
        carried = optimizer.state_dict()
    back = restore_optimizer(carried, gm)
    base = restore(gm)
    resumed = optim.AdamW(decay_groups(base), lr=1e-2)
    resumed.load_state_dict(back)
    for name, parameter in base.named_parameters():
        assert resumed.state[parameter]["exp_avg"].shape == parameter.shape
        if new_group is None:
            read = widened_reads(gm.plan).get(name)
            there = optimizer.state[gm.get_parameter(name)]["exp_avg"]
            here = resumed.state[parameter]["exp_avg"]
            if read is None or read.site.kind != "conv_transpose":
                assert torch.equal(here, there[:, : here.shape[1]] if read else there)
    train(base, resumed, BATCHES[STEPS:])


# Moments ------------------------------------------------------------------------------------


def factored(moments: Tensor, over: tuple[int, int], keepdim: bool) -> tuple[Tensor, Tensor]:
    row, col = over
    return moments.mean(row, keepdim=keepdim), moments.mean(col, keepdim=keepdim)


LAYOUTS = {
    "torch": (("row_var", "col_var"), (-1, -2), True, {}),
    "transformers": (("exp_avg_sq_row", "exp_avg_sq_col"), (-1, -2), False, {}),
    "timm": (
        ("exp_avg_sq_row", "exp_avg_sq_col"), (1, 0), False,
        {"min_dim_size_to_factor": 2, "eps_scale": 1e-3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", ["stem", "grouped", "depthwise", "up", "sequence", "fc", "head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_are_those_of_the_wider_moments(layer: str, layout: str) -> None:
    names, over, keepdim, options = LAYOUTS[layout]
    gm = operated(net(), frozen=False)
    read = widened_reads(gm.plan)[f"{layer}.weight"]
    weight = net().get_parameter(f"{layer}.weight")
    if layout == "timm" and (weight.ndim == 2 or weight.shape[1] <= 2):
        over = (-1, -2)
    rows = torch.rand(weight.shape[over[1]]).double() + 0.1  # a product, as Adafactor takes it
    shape = [1] * weight.ndim
    shape[over[1]] = -1
    moments = torch.rand(
        [1 if i == over[1] % weight.ndim else n for i, n in enumerate(weight.shape)]
    )
    moments = moments.double() * rows.reshape(shape)
    entry = dict(zip(names, factored(moments, over, keepdim), strict=True), step=3, RMS=0.5)
    wide = widen_entry({"exp_avg": moments}, tuple(weight.shape), read, options)["exp_avg"]
    carried = widen_entry(entry, tuple(weight.shape), read, options)
    axes = over
    if layout == "timm":
        first = wide.ndim > 2 and min(wide.shape[:2]) > 2
        axes = (1, 0) if first else (-1, -2)
    for name, expected in zip(names, factored(wide, axes, keepdim), strict=True):
        torch.testing.assert_close(carried[name], expected, rtol=1e-12, atol=1e-15)
    assert (carried["step"], carried["RMS"]) == (3, 0.5)
    back = narrow_entry(carried, tuple(wide.shape), read, options)
    for name in names:
        torch.testing.assert_close(back[name], entry[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["torch", "transformers"])
@pytest.mark.parametrize("sizes", [(1, 16, 4), (4, 16, 1)])
def test_means_of_one_value_are_means_and_no_counters(name: str, sizes: tuple[int, ...]) -> None:
    """Of a layer with one input, and of one with one output."""
    torch.manual_seed(0)
    inputs, hidden, outputs = sizes
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    x, make = torch.randn(8, inputs), ADAFACTORS[name]
    optimizer = make(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    gm = aim_surgery.transform(model, x, config=AimConfig(memory=8, budget=None, write="none"))
    resumed = make(gm.parameters())
    resumed.load_state_dict(carry_optimizer(optimizer.state_dict(), model, gm))
    row = {"torch": "row_var", "transformers": "exp_avg_sq_row"}[name]
    for old, new in zip(model, gm.children(), strict=False):
        if isinstance(old, nn.Linear):
            before, after = optimizer.state[old.weight][row], resumed.state[new.weight][row]
            share = old.in_features / new.in_features
            assert share < 1
            torch.testing.assert_close(after, before * share)
    gm(x).square().sum().backward()
    resumed.step()
    back = restore_optimizer(resumed.state_dict(), gm)
    again = make(restore(gm).parameters())
    again.load_state_dict(back)


def test_timm_changes_its_axes_with_the_size() -> None:
    """A weight of (64, 15) has whole moments below a size of 16, one of (64, 20) has means."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(15, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    x = torch.randn(4, 15)
    for name in ("adafactor", "adafactorbv"):
        model = Small()
        make = timm_optimizer(name, lr=1e-3)
        optimizer = make(model.parameters())
        model(x).square().sum().backward()
        optimizer.step()
        config = AimConfig(memory=8, budget=None, write="none")
        gm = aim_surgery.transform(model, x, config=config)
        resumed = make(gm.parameters())
        resumed.load_state_dict(carry_optimizer(optimizer.state_dict(), model, gm))
        keys = set(resumed.state[gm.get_parameter("first.weight")])
        assert ("exp_avg_sq" in keys) == (name == "adafactorbv")
        gm(x).square().sum().backward()
        resumed.step()
        back = restore_optimizer(resumed.state_dict(), gm)
        again = make(restore(gm).parameters())
        again.load_state_dict(back)
        assert "exp_avg_sq" in again.state[again.param_groups[0]["params"][0]]


def test_a_scheduler_learns_of_a_new_group() -> None:
    model, _, _ = started(EXACT["sgd"])
    optimizer = EXACT["sgd"](model.parameters())
    scheduler = optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            optim.lr_scheduler.LinearLR(optimizer),
            optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        ],
        milestones=[2],
    )
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    gm = operated(model, frozen=False)
    carried = carry_optimizer(optimizer, model, gm, new_group={"lr": 0.3})
    state = carry_scheduler(scheduler.state_dict(), 1, 2)
    assert carry_scheduler(state, 2, 1) == scheduler.state_dict()
    assert state["_milestones"] == [2]
    base = [p for n, p in gm.named_parameters() if not n.startswith("aim.")]
    resumed = optim.SGD([{"params": base}, {"params": gm.aim.parameters()}], lr=0.05)
    again = optim.lr_scheduler.SequentialLR(
        resumed,
        [optim.lr_scheduler.LinearLR(resumed), optim.lr_scheduler.CosineAnnealingLR(resumed, 9)],
        milestones=[2],
    )
    resumed.load_state_dict(carried)
    again.load_state_dict(state)
    assert [group["lr"] for group in resumed.param_groups][1] == 0.3
    optimizer.step()
    scheduler.step()
    resumed.step()
    again.step()
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
