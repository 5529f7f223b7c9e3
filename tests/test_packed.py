"""Packed attention and functions that are handed weights: opened, so that their products read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

import aim_surgery
from aim_surgery import AimConfig, CaptureError
from aim_surgery.capture import capture
from aim_surgery.sites import find_calls, find_sites
from tests.cases import assert_same

LITERAL = AimConfig(memory=8, budget=None)
F64 = torch.float64
X, OTHER = torch.randn(5, 3, 8, dtype=F64), torch.randn(6, 3, 8, dtype=F64)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PER_HEAD = torch.randn(6, 5, 5, dtype=F64)
BOOL_PER_HEAD = (PER_HEAD > 0.5) & ~torch.eye(5, dtype=torch.bool)  # each query sees a key


class Attention(nn.Module):
    """Attention, called as a test wants it."""

    def __init__(self, call: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.call = call

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self.attention, *inputs)


def to_itself(attention: nn.Module, x: torch.Tensor, *masks: torch.Tensor, **options: Any) -> Any:
    names = ("key_padding_mask", "attn_mask")
    named = {names[mask.ndim > 1 and mask.shape[-2] == 5]: mask for mask in masks}
    return attention(x, x, x, **named, **options)


def without_weights(attention: nn.Module, x: torch.Tensor, *masks: torch.Tensor) -> Any:
    return to_itself(attention, x, *masks, need_weights=False)[0]


def by_head(attention: nn.Module, x: torch.Tensor, *masks: torch.Tensor) -> Any:
    return to_itself(attention, x, *masks, average_attn_weights=False)


def causal(attention: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> Any:
    return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def transposed_to_itself(attention: Any, x: torch.Tensor) -> Any:
    """With weights of their own for queries, keys and values, as in WavLM."""
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        x, x, x, 8, 2, None, attention.in_proj_bias, None, None, False, 0.0,
        attention.out_proj.weight, attention.out_proj.bias,
        need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=attention.in_proj_weight[:8], k_proj_weight=attention.in_proj_weight[8:16],
        v_proj_weight=attention.in_proj_weight[16:],
    )[0]  # fmt: skip


def to_another(attention: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    return attention(x, y, y)


def operated(model: nn.Module, *inputs: Any) -> Any:
    """Operate, and hold it against the original in both modes."""
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    gm: Any = aim_surgery.transform(model, inputs, config=LITERAL)
    for mode in (True, False):
        assert_as_before(model.train(mode), gm.train(mode), *inputs)
    assert set(model.state_dict()) < set(gm.state_dict())
    return gm


def assert_as_before(model: nn.Module, gm: nn.Module, *inputs: Any) -> None:
    torch.manual_seed(0)
    expected = tree_leaves(model(*inputs))
    torch.manual_seed(0)
    actual = tree_leaves(gm(*inputs))
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if other is not None:
            assert_same(one, other)


def sites_of(model: nn.Module, *inputs: Any) -> list[tuple[str, bool, int]]:
    sites, _ = find_sites(capture(model, inputs))
    return [(site.name, site.widens, site.out_channels) for site in sites]


PACKED = [("attention.in_proj_weight", True, 24), ("attention.out_proj", True, 8)]
SLICES = [
    ("attention.in_proj_weight", False, 8),
    ("attention.in_proj_weight_2", False, 8),
    ("attention.in_proj_weight_3", False, 8),
    ("attention.out_proj", True, 8),
]


@pytest.mark.parametrize("call", [to_itself, without_weights, by_head])
@pytest.mark.parametrize(
    "masks",
    [(), (CAUSAL,), (PER_HEAD,), (BOOL_PER_HEAD,), (PADDING,), (PADDING, CAUSAL)],
    ids=["none", "causal", "float per head", "bool per head", "padding", "both"],
)
def test_every_mask(call: Any, masks: tuple[torch.Tensor, ...]) -> None:
    model = Attention(call)
    gm = operated(model, X, *masks)
    assert sites_of(model, X, *masks) == PACKED
    assert len(gm.plan.reads) == 2
    assert not gm.plan.skips


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({"bias": False}, (X,)),
        ({"add_bias_kv": True}, (X, PADDING)),
        ({"add_zero_attn": True, "add_bias_kv": True}, (X, PADDING, CAUSAL)),
        ({"batch_first": True}, (X,)),
        ({"dropout": 0.4}, (X,)),
    ],
    ids=lambda case: str(case) if isinstance(case, dict) else "",
)
@pytest.mark.parametrize("call", [to_itself, without_weights])
def test_every_option(call: Any, options: dict[str, Any], inputs: Any) -> None:
    assert len(operated(Attention(call, **options), *inputs).plan.reads) == 2


@pytest.mark.parametrize(
    ("call", "keys", "options"),
    [
        (to_itself, None, {}),
        (without_weights, None, {"bias": False}),
        (to_another, 8, {}),
        (to_another, 4, {"kdim": 4, "vdim": 4}),
        (transposed_to_itself, None, {"batch_first": False}),
    ],
)
def test_inputs_are_projected_before_tokens_come_first(call: Any, keys: Any, options: Any) -> None:
    inputs = (X,) if keys is None else (X, torch.randn(5, 6, keys, dtype=F64))
    model = Attention(call, **{"batch_first": True, **options})
    gm = operated(model, *inputs)
    assert aim_surgery.verify(model, gm, inputs).ok
    captured = capture(model, inputs)
    calls = [c for c in find_calls(captured, captured.graph) if "out_proj" not in c.site.name]
    assert {call.node.all_input_nodes[0].op for call in calls} == {"placeholder"}


def test_one_graph_serves_both_modes_unless_there_is_dropout() -> None:
    assert len(capture(Attention(to_itself).double(), (X,)).traces) == 1
    assert len(capture(Attention(to_itself, dropout=0.1).double(), (X,)).traces) == 2


def test_the_causal_hint() -> None:
    operated(Attention(causal), X, CAUSAL)


def test_without_a_batch() -> None:
    operated(Attention(to_itself), X[:, 0], PADDING[1])


def test_each_slice_of_one_weight_is_a_layer_of_its_own() -> None:
    model = Attention(to_another)
    gm = operated(model, X, OTHER)
    assert sites_of(model, X, OTHER) == SLICES
    names = [name for name, _ in gm.named_parameters() if name.startswith("aim.reads")]
    assert len(names) == 3
    assert aim_surgery.verify(model, gm, (X, OTHER)).ok


def test_other_lengths_and_batches() -> None:
    model = Attention(to_another)
    gm = operated(model, X, OTHER)
    longer = torch.randn(9, 4, 8, dtype=F64), torch.randn(2, 4, 8, dtype=F64)
    assert_as_before(model, gm, *longer)


def test_keys_and_values_of_other_widths() -> None:
    keys, values = torch.randn(6, 3, 4, dtype=F64), torch.randn(6, 3, 7, dtype=F64)
    model = Attention(lambda attention, x, k, v: attention(x, k, v), kdim=4, vdim=7)
    gm = operated(model, X, keys, values)
    assert [read.site.in_channels for read in gm.plan.reads] == [8, 4, 7, 8]


def test_hooks_and_subclasses() -> None:
    class Itself(nn.MultiheadAttention):
        def forward(self, query: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(query, query, query)

    hooked = Attention(to_itself)
    hooked.attention.register_forward_hook(lambda _m, _i, out: (out[0] * 2, out[1]))
    assert operated(hooked, X).plan.notes
    own = Attention(lambda attention, x: attention(x))
    own.attention = Itself(8, 2)
    assert len(operated(own, X).plan.reads) == 2


def test_encoders_decoders_and_their_masks() -> None:
    options = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), 1)
    gm = operated(encoder, X, CAUSAL[:3, :3])
    assert [read.site.name for read in gm.plan.reads] == [
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj",
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    both = nn.Transformer(8, 2, 1, 1, **options)
    assert len(operated(both, X, torch.randn(5, 4, 8, dtype=F64)).plan.reads) == 12


def test_padded_positions_of_the_nested_fast_path_are_noted() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    x = X.transpose(0, 1).contiguous()
    model = Padded().double()
    gm: Any = aim_surgery.transform(model, (x, PADDING), config=LITERAL)
    assert any("padded positions" in note for note in gm.plan.notes)
    real = ~PADDING
    assert_same(gm.eval()(x, PADDING)[real], model.eval()(x, PADDING)[real])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch: nested tensors are a prototype
        assert_same(gm(x, PADDING)[real], model(x, PADDING)[real])


# Functions that are handed weights ----------------------------------------------------------


def project(x: torch.Tensor, weight: torch.Tensor, training: bool) -> torch.Tensor:
    return F.linear(F.dropout(x, 0.3, training), weight)


def on_data(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight) if x.sum() > 1e9 else F.linear(x, weight) * 2


def by_type(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if issubclass(x.__class__, torch.fx.Proxy):
        raise TypeError("a tensor, please")
    return F.linear(x, weight)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.relu()


def pair(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
    return F.linear(x, weight), None


def halved(x: torch.Tensor, factors: list[int]) -> torch.Tensor:
    factors[0] = 2
    return x / factors[0]


for name in ("project", "on_data", "by_type", "plain", "pair", "halved"):
    torch.fx.wrap(name)


class Handed(nn.Module):
    """Hands its layer's weight to a wrapped function."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.which = which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.which == "project":
            x = project(x, self.fc.weight, self.training)
        if self.which == "on_data":
            x = on_data(x, self.fc.weight)
        if self.which == "pair":
            x, _ = pair(x, self.fc.weight)
        return self.head(plain(x))


@pytest.mark.parametrize("which", ["project", "pair"])
def test_a_function_that_gets_a_weight_is_opened(which: str) -> None:
    model = Handed(which)
    assert [read.site.name for read in operated(model, X).plan.reads] == ["fc", "head"]
    captured = capture(model, (X,))
    assert len(captured.traces) == 1
    called = {node.target for node in captured.graph.nodes}
    assert plain in called  # no weight: one call, as its author wished
    assert not {project, pair} & called
    assert not find_sites(captured)[1]


def test_a_function_may_change_the_lists_that_it_is_handed() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(halved(x, [1, x.shape[0]]))

    assert [read.site.name for read in operated(Inside().double(), X).plan.reads] == ["fc"]


def test_a_function_that_can_not_be_opened_stays_one_call() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return by_type(x, self.fc.weight) + self.fc(x)

    model = Inside().double()
    captured = capture(model, (X,))
    assert by_type in {node.target for node in captured.graph.nodes}
    with pytest.raises(CaptureError, match=r"test_packed.py:\d+ `x = on_data"):
        capture(Handed("on_data").double(), (X,))
