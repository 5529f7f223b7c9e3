"""Leaks: where a write over tokens would tell what a model hides, and none is placed by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.capture import Capture, capture
from aim_surgery.checkpoint.operated import open_original, operate_checkpoint, plan_checkpoint
from aim_surgery.checkpoint.reading.kinds import open_source
from aim_surgery.sites import Boundary, find_calls, find_stages, match_boundaries, why_not_pooled
from aim_surgery.sites.one_way import goes_one_way


class Places:
    """Where is written in a model if nothing is named, and what is left out."""

    def __init__(self, model: nn.Module, *inputs: Any) -> None:
        self.captured: Capture = capture(model, inputs)
        self.stages = find_stages(self.captured)
        self.refused = {
            point.name: reason
            for point, reason in why_not_pooled(self.captured, self.stages.chosen).items()
        }
        self.chosen = [p.name for p in self.stages.chosen if p.name not in self.refused]

    def named(self, name: str) -> Boundary:
        """The place that a user names."""
        return match_boundaries(self.stages, self.captured, name)[0]


class Encoder(nn.Module):
    """Tokens, an attention mask as input, and time first inside: what transformers libraries do."""

    def __init__(self, causal: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8),
            "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(2))  # fmt: skip
        self.head = nn.Linear(8, 3)
        self.causal = causal
        self.register_buffer("table", torch.ones(6, 6).tril() if causal == "table" else None)

    def attend(self, x: torch.Tensor, block: Any, mask: torch.Tensor | None) -> torch.Tensor:
        time, batch, _ = x.shape
        q, k, v = block["qkv"](x).view(time, batch, 3, 2, 4).permute(2, 1, 3, 0, 4).unbind(0)
        place = torch.arange(time)
        bias = torch.zeros(1, 1, 1, time) if mask is None else mask[:, None, None, :]
        table: Any = self.table
        if self.causal == "triu":
            bias = bias + torch.full((time, time), -1e9).triu(1)
        elif self.causal == "table":
            bias = bias.masked_fill(table[:time, :time] == 0, -1e9)
        elif self.causal == "arange":
            bias = bias.masked_fill(place[:, None] < place, -1e9)
        elif self.causal == "difference":
            bias = bias + torch.where((place[None] - place[:, None]).le(0), 0.0, -1e9)
        elif self.causal == "cumsum":
            bias = bias.masked_fill(torch.eye(time).cumsum(0) == 0, -1e9)
        elif self.causal == "in place":
            allowed = torch.zeros(time, time)
            for row in range(time):
                allowed[row, : row + 1] = 1
            bias = bias.masked_fill(allowed == 0, -1e9)
        elif self.causal == "band":  # looks both ways
            bias = bias.masked_fill((place[None] - place[:, None]).abs() > 2, -1e9)
        elif self.causal == "flag":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, bias)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(tokens).transpose(0, 1)
        mask = None if mask is None else (1.0 - mask) * -1e9
        block: Any
        for block in self.blocks:
            y = self.attend(x, block, mask).permute(2, 0, 1, 3).reshape(x.shape)
            x = block["norm"](x + block["proj"](y))
            x = x + block["down"](F.gelu(block["up"](x)))
        return self.head(x[0])


def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (3, 6))


def test_masks_are_no_way_around_a_block_and_time_may_come_first() -> None:
    places = Places(Encoder("band"), tokens())
    assert not places.refused
    point, head = places.stages.chosen
    assert (point.name, point.positions, point.sample_axis) == ("blocks.0.norm", 6, 1)
    assert (point.channels, point.channel_axis, point.spatial) == (8, 2, ())
    assert (head.name, head.sample_axis) == ("head", 0)
    calls = find_calls(places.captured, places.captured.graph)
    assert [call.site.sample_axis for call in calls] == [1] * 8 + [0]


@pytest.mark.parametrize(
    "causal", ["flag", "triu", "table", "arange", "difference", "cumsum", "in place"]
)
def test_causal_models_are_not_written_over_tokens(causal: str) -> None:
    places = Places(Encoder(causal), tokens())
    assert places.chosen == ["head"]
    ((name, reason),) = places.refused.items()
    assert name == "blocks.0.norm"
    assert "causal" in reason
    assert "write_at" in reason
    assert places.named(name).positions == 6  # named by hand, it may


class Sequence1d(nn.Module):
    """Positions last, as convolutions have them; what makes them one sequence is chosen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.enter, self.qkv = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 12, 1)
        self.lstm = nn.LSTM(4, 2 if kind == "both ways" else 4, batch_first=True,
                            bidirectional=kind == "both ways")  # fmt: skip
        self.middle, self.leave = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).relu()
        if self.kind == "attention":
            q, k, v = self.qkv(x).transpose(1, 2).chunk(3, -1)
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        elif self.kind == "last state":
            x = x + self.lstm(x.transpose(1, 2))[1][0].permute(1, 2, 0)
        elif self.kind != "none":
            x = self.lstm(x.transpose(1, 2))[0].transpose(1, 2)
        return self.leave(self.middle(x).relu())


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("attention", "scaled_dot_product_attention is causal"),
        ("one way", "lstm is causal"),
        ("both ways", ""),
        ("last state", ""),
        ("none", ""),
    ],
)
def test_sequences_of_any_layout_may_be_causal(kind: str, cause: str) -> None:
    places = Places(Sequence1d(kind), torch.randn(2, 3, 5))
    assert bool(places.refused) == bool(cause)
    assert bool(places.chosen) == (not cause)
    assert all(cause in reason for reason in places.refused.values())


# Masks --------------------------------------------------------------------------------------


def test_padding_is_not_pooled() -> None:
    places = Places(Encoder(), tokens(), torch.ones(3, 6))
    assert places.chosen == ["head"]  # one position: nothing is pooled
    ((name, reason),) = places.refused.items()
    assert name == "blocks.0.norm"
    assert "the input mask acts as a mask in scaled_dot_product_attention" in reason
    assert "write_at" in reason
    assert places.named(name).positions == 6


def test_a_write_over_padding_would_be_seen() -> None:
    model = Encoder().double().eval()
    mask = torch.ones(3, 6, dtype=torch.float64)
    mask[1, 4:] = 0
    ids = tokens()

    def error(config: AimConfig) -> float:
        gm = aim_surgery.transform(model, (ids, mask), config=config).eval()
        alone, padded = gm(ids[1:2, :4], mask[1:2, :4]), gm(ids, mask)[1:2]
        return float((alone - padded).detach().abs().max())

    common: dict[str, Any] = {"memory": 48, "budget": None, "init": "fresh"}
    assert error(AimConfig(**common)) < 1e-12
    assert error(AimConfig(**common, write_at="blocks.0.norm")) > 1e-6


class Masked(nn.Module):
    """Tokens beside a second input, joined with them as `join` does."""

    def __init__(self, join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.join = join

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        h = self.enter(x).relu()
        return self.leave(self.join(self, h, x, extra)).relu()


JOINS: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor | None, bool]] = {
    "masked_fill": (
        lambda m, h, x, e: h.masked_fill(e[..., None], 0.0), torch.ones(3, 5).bool(), True),
    "where": (
        lambda m, h, x, e: torch.where(e[..., None] > 0, h, 0.0), torch.ones(3, 5), True),
    "in place": (
        lambda m, h, x, e: h.clone().masked_fill_(e[..., None] == 0, 0.0), torch.ones(3, 5), True),
    "product": (lambda m, h, x, e: h * e[..., None], torch.ones(3, 5), True),
    "lengths": (
        lambda m, h, x, e: h * (torch.arange(5) < e[:, None])[..., None], torch.tensor([5, 3, 2]),
        True),
    "padding mask": (
        lambda m, h, x, e: m.attention(h, h, h, key_padding_mask=e)[0], torch.zeros(3, 5).bool(),
        True),
    "padding mask by position": (
        lambda m, h, x, e: m.attention(h, h, h, e)[0], torch.zeros(3, 5), True),
    "attention mask of each sample": (
        lambda m, h, x, e: m.attention(h, h, h, attn_mask=e)[0], torch.zeros(6, 5, 5), True),
    "added to scores": (
        lambda m, h, x, e: (h @ h.mT + e).softmax(-1) @ h, torch.zeros(3, 5, 5), True),
    "of the features' own input": (lambda m, h, x, e: h * (x != 0).any(-1, True), None, True),
    "adjacency": (lambda m, h, x, e: e @ h, torch.ones(3, 5, 5), True),
    "no mask": (lambda m, h, x, e: m.attention(h, h, h, key_padding_mask=e)[0], None, False),
    "raw residual": (lambda m, h, x, e: h + x.repeat(1, 1, 2), None, False),
    "normalised": (lambda m, h, x, e: h * x.std(1, keepdim=True).mean(-1, True), None, False),
    "from features": (lambda m, h, x, e: h * (h > 0), None, False),
    "ones": (lambda m, h, x, e: h * torch.ones_like(x)[..., :1], None, False),
    "second signal": (lambda m, h, x, e: h + e, torch.ones(3, 5, 8), False),
    "context": (lambda m, h, x, e: m.attention(h, e, e)[0], torch.ones(3, 7, 8), False),
    "scale": (lambda m, h, x, e: h * e[:, None, None], torch.ones(3), False),
    "places": (lambda m, h, x, e: h[:, e], torch.tensor([1, 0, 2, 4, 3]), False),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_what_acts_as_a_mask(name: str) -> None:
    join, extra, hides = JOINS[name]
    inputs = (torch.randn(3, 5, 4),) if extra is None else (torch.randn(3, 5, 4), extra)
    places = Places(Masked(join), *inputs)
    assert bool(places.refused) == hides
    assert bool(places.chosen) != hides
    assert all("acts as a mask" in reason for reason in places.refused.values())


class OneWay(nn.Module):
    """(N, T) ids -> (N, T, 11): tokens see those before them, by no plain triangle; or all."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed, self.mix = nn.Embedding(11, 16), nn.Linear(16, 48)
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 11)

    def forward(self, ids: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids)
        whole = x if prefix is None else torch.cat([prefix, x], 1)
        q, k, v = self.mix(whole).chunk(3, -1)
        tokens, before = ids.shape[1], whole.shape[1] - ids.shape[1]
        if self.way == "scan":
            x = x + v.cumsum(1)
        elif self.way in ("padding", "both sides"):
            left, right = (2, 0) if self.way == "padding" else (1, 1)
            x = x + F.pad(v, (0, 0, left, right)).unfold(1, 3, 1).sum(-1)
        elif self.way == "shift":
            x = x + q.sigmoid() * F.pad(v, (0, 0, 1, -1))
        elif self.way == "state":
            state, states = v[:, 0], []
            for step in range(tokens):
                state = 0.5 * state + v[:, step]
                states.append(state)
            x = x + torch.stack(states, 1)
        elif self.way == "apart":
            x = x + q * v
        elif self.way == "all":
            x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
        else:
            i = torch.arange(tokens)[:, None]
            j = torch.arange(tokens + before)[None] - before
            past = (i - j >= 0) & (i - j < 3) if self.way == "window" else j <= i
            scores = (q[:, before:] @ k.transpose(1, 2)).masked_fill(~past, float("-inf"))
            x = x + scores.softmax(-1) @ v
        return self.head(x + torch.relu(self.inner(x)))


@pytest.mark.parametrize(
    "way",
    ["window", "prefix", "scan", "padding", "shift", "state", "all", "both sides", "apart"],
)
def test_no_write_tells_earlier_tokens_of_later_ones(way: str) -> None:
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.randn(2, 4, 16)) if way == "prefix" else (ids,)
    gm: Any = aim_surgery.transform(OneWay(way).eval(), inputs)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    later = ids.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 11
    moved = (gm(*inputs) - gm(later, *inputs[1:]))[:, :4].abs().max()
    if way in ("all", "both sides", "apart"):  # not causal: it is written, and tokens see it
        assert gm.plan.writes
        assert moved > 0
    else:
        assert not gm.plan.writes
        assert moved == 0


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("layout", ["N T C", "N C T", "T N C"])
def test_running_a_model_shows_which_way_it_goes(layout: str, one_way: bool) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(_to_rows(x, layout)).relu()
            past = x + x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None]
            return _to_rows(self.leave(past if one_way else past.flip(1)), layout)

    x = _to_rows(torch.randn(3, 6, 4), layout)
    captured = capture(Shifted(), (x,))
    before = {name: tensor.clone() for name, tensor in captured.model.state_dict().items()}
    assert goes_one_way(captured, layout.split().index("N")) == one_way
    torch.testing.assert_close(dict(captured.model.state_dict()), before)


def _to_rows(x: torch.Tensor, layout: str) -> torch.Tensor:
    """(N, T, C) from another layout, and back."""
    return {"N T C": x, "N C T": x.transpose(1, 2), "T N C": x.transpose(0, 1)}[layout]


def test_a_model_that_fails_on_other_values_says_nothing() -> None:
    class Picky(nn.Module):
        """Looks its numbers up in a table that has the example's alone."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(1, 4), nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids).cumsum(1) / 2)

    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert not goes_one_way(capture(Picky(), (ids,)), 0)
    with torch.device("meta"):
        model = Picky()
    assert not goes_one_way(capture(model, (ids,)), 0)


NETS = """
import torch
import torch.nn.functional as F
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("table", torch.ones(6, 6).tril() / 6)

    def forward(self, x):
        return self.leave(self.inner(self.mixed(self.enter(x).relu())).relu())

class Triangle(Base):
    def mixed(self, x):
        return self.table @ x

class OneSided(Base):
    def mixed(self, x):
        return x + F.pad(x, (0, 0, 1, -1))

class BothSided(Base):
    def mixed(self, x):
        return x + F.pad(x, (0, 0, 1, -1)) + F.pad(x, (0, 0, -1, 1))
"""


@pytest.mark.parametrize("name", ["Triangle", "OneSided", "BothSided"])
def test_a_file_is_operated_as_the_model_with_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("tokens.py").write_text(NETS)
    spec, x = f"tokens.py:{name}", torch.randn(2, 6, 4)
    model = aim_surgery.build(spec)
    torch.save(model.state_dict(), "net.pt")
    plan = aim_surgery.plan(model, x)
    assert bool(plan.writes) == (name == "BothSided")
    source = open_source("net.pt")
    assert plan_checkpoint(source, spec, example=x) == plan
    assert open_original(source, spec).streamed  # where values don't tell, none are needed
    operated = operate_checkpoint(source, spec, example=x)
    assert operated.plan == plan
    assert operated.original is not None
    assert operated.original.streamed
    unseen = aim_surgery.plan(model.to("meta"), x)
    assert unseen.writes
    assert any("can't all be seen on the meta device" in note for note in unseen.notes)
