"""Recurrent layers read at every linear call: held against stacks unrolled by hand."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import aim_surgery
from aim_surgery import AimConfig, CaptureError, Plan, PlanError, transform
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.nn.inside import View
from aim_surgery.nn.memory import Memory
from aim_surgery.verification.coverage import check_coverage
from aim_surgery.verification.samples import samples_for
from tests.cases import assert_same
from tests.test_inside import filled

SMALL = AimConfig(budget=None, memory=7, write="none")
STEPS, BATCH, INPUT, HIDDEN = 4, 3, 5, 6

KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rnn": (nn.RNN, {}),
    "rnn, relu, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    "gru, two layers": (nn.GRU, {"num_layers": 2}),
    "gru, no bias": (nn.GRU, {"num_layers": 2, "bias": False, "bidirectional": True}),
    "lstm, batch first": (nn.LSTM, {"batch_first": True}),
    "lstm, three layers": (nn.LSTM, {"num_layers": 3, "bidirectional": True}),
    "lstm, no bias": (nn.LSTM, {"num_layers": 2, "bias": False}),
    "lstm, projected": (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    "lstm, projected, no bias": (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bias": False}),
}
SEQUENCE = torch.randn(
    STEPS, BATCH, INPUT, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
)


class Around(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.enter, self.rnn = nn.Linear(INPUT, INPUT), layer
        both = 2 if layer.bidirectional else 1
        self.leave = nn.Linear(both * (layer.proj_size or layer.hidden_size), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.rnn(self.enter(x))[0])


def around(kind: Callable[..., Any], **options: Any) -> Around:
    torch.manual_seed(0)
    return Around(kind(INPUT, HIDDEN, **options)).double()


# By hand --------------------------------------------------------------------------------------


def cell_by_hand(
    mode: str, wide: Tensor, own: dict[str, Tensor], x: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """One step, from gates of what comes in and of the state, as torch's documentation has it.

    Where the weight of the state is wide, it works on cat[h, m], with the m that ends x.
    """
    incoming = x @ wide.T + own.get("bias_ih", torch.zeros(()))
    columns = [state[0], x[:, x.shape[1] - (own["weight_hh"].shape[1] - state[0].shape[1]) :]]
    hidden = torch.cat(columns, -1) @ own["weight_hh"].T + own.get("bias_hh", torch.zeros(()))
    if mode == "GRU":
        (ir, iz, i_n), (hr, hz, hn) = incoming.chunk(3, -1), hidden.chunk(3, -1)
        z, n = (iz + hz).sigmoid(), (i_n + (ir + hr).sigmoid() * hn).tanh()
        return ((1 - z) * n + z * state[0],)
    if mode == "LSTM":
        i, f, g, o = (incoming + hidden).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h @ own["weight_hr"].T if "weight_hr" in own else h, c)
    gates = incoming + hidden
    return (gates.tanh() if mode == "RNN_TANH" else gates.relu(),)


def unrolled(layer: nn.RNNBase, x: Tensor, beside: dict[str, Tensor], memory: Tensor) -> Tensor:
    """A stack whose every linear call works on wide weights: [W_ih W_hh W_m], a GRU's two apart."""
    x = x.transpose(0, 1) if layer.batch_first else x
    names = ("weight_hh", "bias_ih", "bias_hh", "weight_hr")
    for number in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            place = f"_l{number}{suffix}"
            own = {n: getattr(layer, n + place) for n in names if hasattr(layer, n + place)}
            wide = torch.cat([getattr(layer, f"weight_ih{place}"), beside[f"weight_ih{place}"]], 1)
            if layer.mode == "GRU":
                own["weight_hh"] = torch.cat([own["weight_hh"], beside[f"weight_hh{place}"]], 1)
            zeros = x.new_zeros(x.shape[1], layer.hidden_size)
            state = (zeros[:, : layer.proj_size or None], zeros)
            steps = []
            for step in reversed(x) if suffix else x:
                joined = torch.cat([step, memory.expand(len(step), -1)], -1)
                state = cell_by_hand(layer.mode, wide, own, joined, state)
                steps.append(state[0])
            outputs.append(torch.stack(steps[::-1] if suffix else steps))
        x = torch.cat(outputs, -1)
    return x.transpose(0, 1) if layer.batch_first else x


def read_by_hand(gm: nn.Module, path: str) -> tuple[dict[str, Tensor], Tensor]:
    """W_m by weight, and the memory's view, of what reads under a path."""
    reads = [r for r in plan_of(gm).reads if r.site.layer.startswith(f"{path}.weight_")]
    assert reads
    memory = gm.get_submodule("aim.memory")
    assert isinstance(memory, Memory)
    weights: dict[str, Tensor] = {
        read.site.layer.removeprefix(f"{path}."): gm.get_parameter(
            f"aim.reads.{read.site.layer}.weight"
        )
        for read in reads
    }
    return weights, View(memory, reads[0].planes, ()).for_input(next(iter(weights.values())))


@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("name", KINDS)
def test_it_reads_as_wide_layers_by_hand(name: str, emit: Any) -> None:
    kind, options = KINDS[name]
    model = around(kind, **options)
    gm = transform(model, SEQUENCE, config=SMALL, emit=emit)
    torch.testing.assert_close(gm(SEQUENCE), model(SEQUENCE), rtol=1e-12, atol=0)
    filled(gm)
    layer: Any = gm.get_submodule("rnn")
    expected_sites = (2 if layer.bidirectional else 1) * (2 if layer.mode == "GRU" else 1)
    weights, memory = read_by_hand(gm, "rnn")
    assert len(weights) == expected_sites * layer.num_layers
    x = SEQUENCE.transpose(0, 1).contiguous() if layer.batch_first else SEQUENCE
    inputs = {n: p for n, p in gm.named_parameters() if n.startswith(("rnn.", "aim."))}
    mine = layer(x)[0]
    by_hand = unrolled(layer, x, weights, memory)
    torch.testing.assert_close(mine, by_hand, rtol=1e-10, atol=1e-14)
    target = torch.randn_like(mine)
    used = [n for n in inputs if n.startswith(("rnn.", "aim.memory", "aim.reads.rnn"))]
    found = torch.autograd.grad((mine * target).sum(), [inputs[n] for n in used])
    wanted = torch.autograd.grad((by_hand * target).sum(), [inputs[n] for n in used])
    for mine, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-13)
        assert own.any()
    for weight in weights.values():
        with torch.no_grad():
            before = weight.clone()
            weight.zero_()
            assert not torch.allclose(layer(x)[0], by_hand)  # the comparison can fail
            weight.copy_(before)


CELLS: dict[str, tuple[Callable[..., nn.Module], str, int]] = {
    "tanh": (nn.RNNCell, "RNN_TANH", 1),
    "relu": (lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k), "RNN_RELU", 1),
    "gru": (nn.GRUCell, "GRU", 1),
    "lstm": (nn.LSTMCell, "LSTM", 2),
}


class Steps(nn.Module):
    """A cell in a loop, with an output of each step."""

    def __init__(self, cell: nn.Module, states: int) -> None:
        super().__init__()
        self.cell, self.states, self.leave = cell, states, nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind():
            state = self.cell(step, state)
            outputs.append(self.leave(state[0] if self.states > 1 else state))
        return torch.stack(outputs)


@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_read_at_every_step(name: str, bias: bool, emit: Any) -> None:
    make, mode, states = CELLS[name]
    torch.manual_seed(0)
    model = Steps(make(INPUT, HIDDEN, bias=bias), states).double()
    gm = transform(model, SEQUENCE, config=SMALL, emit=emit)
    torch.testing.assert_close(gm(SEQUENCE), model(SEQUENCE), rtol=1e-12, atol=0)
    (read,) = (r for r in plan_of(gm).reads if r.site.layer == "cell.weight_ih")
    columns = INPUT if mode == "GRU" else INPUT + HIDDEN
    assert (read.site.in_channels, read.site.positions) == (columns, STEPS)
    assert read.site.out_channels == model.cell.get_parameter("weight_ih").shape[0]
    assert read.macs == STEPS * read.parameters
    filled(gm)
    weights, memory = read_by_hand(gm, "cell")
    cell = gm.get_submodule("cell")
    own = {n: p for n, p in cell.named_parameters(recurse=False) if n != "weight_ih"}
    wide = torch.cat([cell.get_parameter("weight_ih"), weights["weight_ih"]], 1)
    if mode == "GRU":
        own["weight_hh"] = torch.cat([own["weight_hh"], weights["weight_hh"]], 1)
    state = tuple(torch.zeros(BATCH, HIDDEN, dtype=torch.float64) for _ in range(2))
    for step in SEQUENCE:
        joined = torch.cat([step, memory.expand(BATCH, -1)], -1)
        state = cell_by_hand(mode, wide, own, joined, state)
    last = gm.get_submodule("leave")
    assert isinstance(last, nn.Linear)
    head = next(r for r in plan_of(gm).reads if r.site.layer == "leave")
    assert head.site.widens
    joined = torch.cat([state[0], memory.expand(BATCH, -1)], -1)
    by_hand = torch.nn.functional.linear(joined, last.weight, last.bias)
    found = gm(SEQUENCE)[-1]
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-13)
    del own["weight_hh"]
    parameters = [
        cell.get_parameter("weight_hh"),
        *own.values(),
        *weights.values(),
        gm.get_parameter("aim.memory.weight"),
    ]
    mine = torch.autograd.grad(found.square().sum(), parameters)
    wanted = torch.autograd.grad(by_hand.square().sum(), parameters)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


# The whole operation ----------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque
        self.rnn = nn.GRU(INPUT, HIDDEN, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque and float(x.detach().sum()) > 1e9:
            return x
        return self.rnn(x)[0]


@pytest.fixture(params=["graph", "module", "opaque"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model and what it becomes; "opaque": the recurrent part branches on data."""

    torch.manual_seed(0)
    middle = Branching(opaque=request.param == "opaque")
    model = nn.Sequential(nn.Linear(INPUT, INPUT), middle, nn.Linear(HIDDEN, 2)).double()
    emit = "module" if request.param == "module" else "graph"
    return model, transform(model, SEQUENCE, config=SMALL, emit=emit)


def test_every_check_passes(pair: tuple[nn.Module, nn.Module]) -> None:
    model, gm = pair
    names = [read.site.layer for read in plan_of(gm).reads]
    gates = [f"1.rnn.weight_{what}_l{number}" for what in ("hh", "ih") for number in (0, 1)]
    assert sorted(names) == ["0", *gates, "2"]
    assert plan_of(gm).skips == ()
    result = aim_surgery.verify(model, gm, SEQUENCE)
    assert result.ok, str(result)
    assert {*gates} <= set(result.coverage.covered)
    assert result.coverage.skipped == ()
    assert result.gradients.memory == 1
    filled(gm)
    assert not aim_surgery.verify(model, gm, SEQUENCE).equivalence.ok


def test_the_audit_sees_a_read_that_is_none(pair: tuple[nn.Module, nn.Module]) -> None:
    model, gm = pair
    samples = samples_for(model, plan_of(gm), SEQUENCE)
    assert check_coverage(model, gm, plan_of(gm), samples).ok
    deaf = copy.deepcopy(gm)
    for weight in ("weight_ih_l1", "weight_hh_l0"):
        deaf = copy.deepcopy(gm)
        vars(deaf.get_submodule("1.rnn"))["forward"].reads.pop(weight)
        found = check_coverage(model, deaf, plan_of(gm), samples)
        assert [name for name, _ in found.unaccounted] == [f"1.rnn.{weight}"]
        assert "reach no activation" in found.unaccounted[0][1]
    del deaf.get_submodule("1.rnn")._parameters["weight_ih_l0"]  # so that it does not run
    found = check_coverage(model, deaf, plan_of(gm), samples)
    assert "the operated model does not run" in found.unaccounted[-1][1]
    reads = plan_of(gm).reads
    forgetful = dataclasses.replace(
        plan_of(gm), reads=tuple(read for read in reads if "hh" not in read.site.name)
    )
    found = check_coverage(model, gm, forgetful, samples)
    assert {n for n, _ in found.unaccounted} == {"1.rnn.weight_hh_l0", "1.rnn.weight_hh_l1"}


def test_only_projections_are_listed() -> None:
    model = around(nn.LSTM, proj_size=2, num_layers=2)
    gm = transform(model, SEQUENCE, config=SMALL)
    (site, *_) = (r.site for r in gm.plan.reads if r.site.name == "rnn.weight_ih_l1")
    assert site.weights == ("rnn.weight_ih_l1", "rnn.weight_hh_l1")
    assert site.in_channels == 2 + 2
    assert [skip.weights for skip in gm.plan.skips] == [
        ("rnn.weight_hr_l0",),
        ("rnn.weight_hr_l1",),
    ]
    assert all("projects the state" in skip.reason for skip in gm.plan.skips)
    result = aim_surgery.verify(model, gm, SEQUENCE)
    assert result.ok, str(result)
    assert {"rnn.weight_hh_l0", "rnn.weight_ih_l0"} <= set(result.coverage.covered)


def test_copies_pickles_files_and_dtypes(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, gm = pair
    filled(gm).eval()
    expected = gm(SEQUENCE)
    assert not torch.allclose(expected, model.eval()(SEQUENCE))
    twin = copy.deepcopy(gm)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(gm(SEQUENCE), expected)  # nothing of it is the copy's
    assert not twin(SEQUENCE).any()
    assert_same(pickle.loads(pickle.dumps(gm))(SEQUENCE), expected)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(SEQUENCE), expected)
    aim_surgery.save(gm, tmp_path / "gm.safetensors")
    loaded = aim_surgery.load(tmp_path / "gm.safetensors", model).eval()
    assert_same(loaded(SEQUENCE), expected)
    single = copy.deepcopy(gm).float()
    torch.testing.assert_close(single(SEQUENCE.float()).double(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert single(SEQUENCE.float()).isfinite().all()


def test_a_plan_goes_round_and_holds_for_its_model_only(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model, gm = pair
    plan = plan_of(gm)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    applied = aim_surgery.apply(copy.deepcopy(model), again)
    assert applied.state_dict().keys() == gm.state_dict().keys()
    assert_same(applied.eval()(SEQUENCE), gm.eval()(SEQUENCE))
    new = sum(p.numel() for p in gm.parameters()) - sum(p.numel() for p in model.parameters())
    assert plan.new_parameters == new
    for options, words in (({"hidden_size": 8}, "out_channels"), ({"num_layers": 1}, "no such")):
        other = copy.deepcopy(model)
        size = {"input_size": INPUT, "hidden_size": HIDDEN, "num_layers": 2, **options}
        other[1].rnn = nn.GRU(**size, batch_first=True).double()  # type: ignore[index]
        other[2] = nn.Linear(size["hidden_size"], 2).double()  # type: ignore[operator]
        with pytest.raises((PlanError, aim_surgery.AimSurgeryError), match=words):
            aim_surgery.apply(other, again.without("2"))


def test_the_notebook(pair: tuple[nn.Module, nn.Module]) -> None:
    model, gm = pair
    expected = filled(copy.deepcopy(gm)).eval()
    assert_same(aim_surgery.freeze_base(copy.deepcopy(expected))(SEQUENCE), expected(SEQUENCE))
    filled(aim_surgery.freeze_base(gm)).eval()
    expected = gm(SEQUENCE)
    trained = {name for name, parameter in gm.named_parameters() if parameter.requires_grad}
    assert {"aim.reads.1.rnn.weight_ih_l0.weight", "aim.memory.weight"} <= trained
    assert all(name.startswith("aim.") for name in trained)
    assert {id(p) for p in aim_surgery.memory_parameters(gm)} == {
        id(gm.get_parameter(name)) for name in trained
    }
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    optimizer = torch.optim.AdamW(aim_surgery.memory_parameters(gm), lr=0.1)
    gm(SEQUENCE).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in gm.state_dict().items() if not value.equal(before[name])}
    assert changed == trained
    assert not torch.allclose(gm(SEQUENCE), expected)
    with aim_surgery.disable(gm):
        assert_same(gm(SEQUENCE), model.eval()(SEQUENCE))
    memory = aim_surgery.read_memory(gm, SEQUENCE)["memory"]
    assert_same(memory, gm.get_submodule("aim.memory")())


def test_filters_and_fresh_weights() -> None:
    model = around(nn.LSTM, num_layers=2, bidirectional=True)
    config = dataclasses.replace(SMALL, exclude="rnn.weight_ih_l1*", init="fresh")
    gm = transform(model, SEQUENCE, config=config)
    reads = [r.site.layer for r in gm.plan.reads if r.site.inside]
    assert reads == ["rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse"]
    reasons = {skip.name: skip.reason for skip in gm.plan.skips}
    assert reasons["rnn.weight_ih_l1"] == "excluded by 'rnn.weight_ih_l1*'"
    bound = HIDDEN**-0.5  # as torch's recurrent layers start
    largest = gm.get_parameter("aim.reads.rnn.weight_ih_l0.weight").abs().max()
    assert 0.9 * bound < largest <= bound
    assert check_coverage(model, gm, gm.plan, samples_for(model, gm.plan, SEQUENCE)).ok


def test_a_budget_counts_them() -> None:
    model = around(nn.LSTM, num_layers=2)
    plan = aim_surgery.plan(model, SEQUENCE, config=AimConfig(budget=0.5, write="none"))
    assert {read.planes for read in plan.reads} != {0}
    assert plan.new_parameters <= 0.5 * plan.base_parameters
    gates = [read for read in plan.reads if read.site.inside]
    assert [read.parameters for read in gates] == [4 * HIDDEN * read.planes for read in gates]


def test_writes_are_not_seen_and_the_plan_says_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, INPUT, 3, padding=1), nn.Conv1d(INPUT, INPUT, 1)
            self.rnn, self.head = nn.LSTM(INPUT, HIDDEN), nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).relu()).relu()
            return self.head(self.rnn(x.permute(2, 0, 1))[1][0][0])

    config = AimConfig(budget=None, memory=8, write_at="first", write="batch")
    gm = transform(Net().double(), torch.randn(2, 3, 8).double(), config=config)
    versions = {read.site.name: read.version for read in gm.plan.reads}
    assert versions == {"first": 0, "second": 1, "rnn.weight_ih_l0": 0, "head": 1}
    assert any("recurrent layers: rnn.weight_ih_l0" in note for note in gm.plan.notes)
    with pytest.raises(PlanError, match="let it read version 0"):
        gm.plan.with_versions({"rnn.*": 1})


def test_a_bare_layer_keeps_its_class() -> None:
    layer = nn.LSTM(INPUT, HIDDEN, num_layers=2).double()
    gm = transform(layer, SEQUENCE, config=SMALL, emit="module")
    assert type(gm) is nn.LSTM
    result = aim_surgery.verify(layer, gm, SEQUENCE)
    assert result.ok, str(result)
    filled(gm)
    assert not torch.allclose(gm(SEQUENCE)[0], layer(SEQUENCE)[0])
    assert_same(copy.deepcopy(gm)(SEQUENCE), gm(SEQUENCE))
    assert type(transform(layer, SEQUENCE, config=SMALL)) is nn.LSTM  # what "auto" chooses
    with pytest.raises(CaptureError, match=r"nn.Sequential\(layer\)"):
        transform(layer, SEQUENCE, config=SMALL, emit="graph")
    with pytest.raises(PlanError, match="whole model"):  # its weight's name has no path
        transform(nn.Linear(4, 4), torch.zeros(2, 4), config=SMALL, emit="module")


# Ways to use them -------------------------------------------------------------------------------


class Translator(nn.Module):
    """A layer called twice, a state handed on, packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.LSTM(INPUT, HIDDEN, num_layers=2, batch_first=True)
        self.target = nn.LSTM(INPUT, HIDDEN, num_layers=2, batch_first=True, bias=False)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.source(x)
        _, state = self.source(hx=state, input=x.flip(1))
        out, state = self.target(y, state)
        again, _ = self.target(y[0], (state[0][:, 0], state[1][:, 0]))  # without a batch
        return self.head(out) + self.head(again)


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_a_translator(emit: Any) -> None:
    torch.manual_seed(0)
    model = Translator().double()
    inputs = (torch.randn(2, 5, INPUT).double(), torch.randn(2, 3, INPUT).double())
    gm = transform(model, inputs, config=SMALL, emit=emit)
    result = aim_surgery.verify(model, gm, inputs)
    assert result.ok, str(result)
    sites = {r.site.layer: r.site.positions for r in plan_of(gm).reads if r.site.layer != "head"}
    layers = ("source.weight_ih_l0", "source.weight_ih_l1", "target.weight_ih_l0")
    assert sites == dict.fromkeys((*layers, "target.weight_ih_l1"), 2)
    filled(gm)
    with torch.no_grad():
        assert_same(gm(*inputs), gm(*inputs))  # views shared or not
    assert not torch.allclose(gm(*inputs), model(*inputs))


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(INPUT, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = (mask > 0).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.packing = nn.Linear(INPUT, INPUT), Packing()
        self.leave = nn.Linear(2 * HIDDEN, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.leave(self.packing(self.enter(x), mask))


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_packed_sequences(emit: Any) -> None:
    torch.manual_seed(0)
    model = Tagger().double()
    lengths = [2, 5, 3]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).double()
    inputs = (torch.randn(3, 5, INPUT).double(), mask)
    gm = transform(model, inputs, config=SMALL, emit=emit)
    assert_same(gm(*inputs), model(*inputs))
    result = aim_surgery.verify(model, gm, inputs)
    assert result.ok, str(result)
    assert len(result.coverage.covered) == 10
    filled(gm)
    layer: Any = gm.get_submodule("packing.rnn")
    weights, memory = read_by_hand(gm, "packing.rnn")
    found = gm.get_submodule("packing")(*inputs)
    for row, length in enumerate(lengths):
        alone = unrolled(layer, inputs[0][row : row + 1, :length], weights, memory)
        torch.testing.assert_close(found[row, :length], alone[0], rtol=1e-10, atol=1e-13)


class Own(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_a_forward_of_its_own_is_listed(emit: Any) -> None:
    model = nn.Sequential(nn.Linear(INPUT, INPUT), Own(INPUT, HIDDEN)).double()
    gm = transform(model, SEQUENCE, config=SMALL, emit=emit)
    assert [read.site.layer for read in plan_of(gm).reads] == ["0"]
    reasons = {weight: skip.reason for skip in plan_of(gm).skips for weight in skip.weights}
    assert reasons.keys() == {"1.weight_ih_l0", "1.weight_hh_l0"}
    words = {"graph": "a call of lstm", "module": "forward of its own"}
    assert all(words[emit] in reason for reason in reasons.values())
    result = aim_surgery.verify(model, gm, SEQUENCE)
    assert result.ok, str(result)


def _old_norm(layer: nn.RNNBase) -> None:
    weight_norm(layer, "weight_ih_l0")


def _norm(layer: nn.RNNBase) -> None:
    parametrizations.weight_norm(layer, "weight_ih_l0_reverse")
    parametrizations.weight_norm(layer, "weight_hh_l1")


def _pruned(layer: nn.RNNBase) -> None:
    prune.l1_unstructured(layer, "weight_ih_l1", 0.3)


def _doubled(layer: nn.RNNBase) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    parametrize.register_parametrization(layer, "bias_ih_l0", Double())


def _tied(layer: nn.RNNBase) -> None:
    layer.weight_ih_l1_reverse = layer.weight_ih_l1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("change", [_old_norm, _norm, _pruned, _doubled, _tied])
def test_computed_and_shared_weights(change: Callable[[nn.RNNBase], None], emit: Any) -> None:
    model = around(nn.LSTM, num_layers=2, bidirectional=True)
    change(model.rnn)
    model(SEQUENCE)
    before = [*map(id, model.rnn._flat_weights)]
    gm = transform(model, SEQUENCE, config=SMALL, emit=emit)
    assert [*map(id, model.rnn._flat_weights)] == before
    assert_same(gm(SEQUENCE), model(SEQUENCE))
    result = aim_surgery.verify(model, gm, SEQUENCE)
    assert result.ok, str(result)
    assert len([read for read in plan_of(gm).reads if read.site.inside]) == 4 + 2 * (
        emit == "module"
    )
    filled(gm)
    weights, memory = read_by_hand(gm, "rnn")
    layer: Any = gm.get_submodule("rnn")
    expected = unrolled(layer, SEQUENCE, weights, memory)
    torch.testing.assert_close(layer(SEQUENCE)[0], expected, rtol=1e-10, atol=1e-13)


def test_threads_replicas_and_direct_calls() -> None:
    gm = filled(transform(around(nn.LSTM, num_layers=2), SEQUENCE, config=SMALL)).eval()
    expected = gm(SEQUENCE)

    def call(index: int) -> Tensor:
        with torch.set_grad_enabled(index % 2 == 0):
            return gm(SEQUENCE)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(40)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    layer: Any = gm.get_submodule("rnn")
    direct = layer.forward(SEQUENCE)[0]
    assert_same(direct, layer(SEQUENCE)[0])
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 2)
    twice = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    assert_same(replica(SEQUENCE)[0], twice(SEQUENCE)[0])
    assert_same(layer(SEQUENCE)[0], direct)


def test_another_layer_in_its_place_is_refused() -> None:
    gm = transform(around(nn.LSTM), SEQUENCE, config=SMALL)
    other = nn.LSTM(INPUT, HIDDEN).double()
    other._forward_pre_hooks.update(gm.get_submodule("rnn")._forward_pre_hooks)  # as torch.ao does
    gm.rnn = other
    with pytest.raises(RuntimeError, match="would not read"):
        gm(SEQUENCE)


def test_a_failing_call_leaves_nothing_behind() -> None:
    gm = filled(transform(around(nn.GRU, bias=False), SEQUENCE, config=SMALL))
    before = {key: id(value) for key, value in vars(gm.get_submodule("rnn")).items()}
    expected = gm(SEQUENCE)
    with pytest.raises(RuntimeError):
        gm.get_submodule("rnn")(SEQUENCE[..., :2])
    assert_same(gm(SEQUENCE), expected)
    assert {key: id(value) for key, value in vars(gm.get_submodule("rnn")).items()} == before


def test_derivatives() -> None:
    torch.manual_seed(0)
    gm = filled(transform(around(nn.GRU, num_layers=2), SEQUENCE, config=SMALL))
    x = SEQUENCE[:2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(gm, x)
    assert torch.autograd.gradgradcheck(gm, x)
    names = ("aim.memory.weight", "aim.reads.rnn.weight_ih_l1.weight")
    start = tuple(gm.get_parameter(name).detach().clone().requires_grad_() for name in names)

    def function(*values: Tensor) -> Tensor:
        state: dict[str, Tensor] = dict(zip(names, values, strict=True))
        return torch.func.functional_call(gm, state, (SEQUENCE[:2, :2],))

    assert torch.autograd.gradcheck(function, start)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["layer", "cell"])
def test_compiled_it_computes_the_same(name: str) -> None:
    """`torch.compile` takes in cells; at layers, it breaks its graph as it always does."""
    torch.manual_seed(0)
    model = around(nn.LSTM) if name == "layer" else Steps(nn.GRUCell(INPUT, HIDDEN), 1).double()
    for emit in ("graph", "module"):
        gm = filled(transform(model, SEQUENCE, config=SMALL, emit=emit))
        expected = gm(SEQUENCE)
        whole = name == "cell" and emit == "graph"
        compiled = torch.compile(gm, backend="eager", fullgraph=whole)
        torch.testing.assert_close(compiled(SEQUENCE), expected, rtol=1e-12, atol=0)
        torch._dynamo.reset()
