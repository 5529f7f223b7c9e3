"""The memory and the write block: arithmetic, gradients, modes, layouts, several processes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.axes import FeatureAxes
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.samples import mean_over_samples
from aim_surgery.nn.write_block import WriteBlock, block_parameters
from tests.cases import FLOAT32_TOLERANCE, assert_same

ARTICLE: dict[str, Any] = {
    "widths": (16, 16, 32),
    "kernel_size": 3,
    "norm": "batch",
    "activation": "sigmoid",
    "mode": "replace",
}


def conv_write(**changes: Any) -> WriteBlock:
    torch.manual_seed(0)
    return WriteBlock(**{
        "channels": 3, "planes": 2, "floats": 10, "layout": (3, 2, 2), "dims": 2,
        "channel_axis": 1, "sample_axis": 0, "widths": (4,), "dtype": torch.float64, **changes,
    })  # fmt: skip


def token_write(**changes: Any) -> WriteBlock:
    return conv_write(**{"dims": 0, "channel_axis": -1, **changes})


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=[-1, 2**15], ids=["apart", "joined"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From how many numbers on a linear layer takes features and view apart."""
    monkeypatch.setattr("aim_surgery.nn.widened.FEW", request.param)
    return request.param


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Memory


def test_memory_is_weight_plus_bias() -> None:
    memory = Memory(6)
    assert parameters(memory) == 12
    assert_same(memory(), (memory.weight[:, 0] + memory.bias)[None])
    assert list(memory.state_dict()) == ["weight", "bias"]
    memory = Memory(6, inputs=4, shared=3).double()
    unit = memory.weight.sum(1) + memory.bias
    assert_same(memory(), torch.stack([unit[0]] * 3 + [unit[1]] * 3)[None])


def test_the_original_memory_layer() -> None:
    memory = Memory(50_176, inputs=1024, shared=49, device="meta")
    assert parameters(memory) == 1_049_600
    assert memory().shape == (1, 50_176)
    assert memory().is_meta


def test_memory_says_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="10 floats cannot share values 3 at a time"):
        Memory(10, shared=3)
    with pytest.raises(ValueError, match="momentum"):
        Memory(10, momentum=0.0)


def test_state_takes_notes_in_training_only() -> None:
    memory = Memory(4, carry_state=True, momentum=0.25).double()
    first, second, plain = normal(3, 4), normal(5, 4, seed=2), memory().detach()
    assert memory(first) is None
    assert_same(memory.state, 0.25 * first.mean(0))
    memory(second)
    expected = 0.75 * 0.25 * first.mean(0) + 0.25 * second.mean(0)
    assert_same(memory.state, expected)
    memory.eval()(first)
    assert_same(memory.state, expected)
    assert_same(memory(), plain + expected)
    memory.enabled = False
    memory.train()(first)
    assert_same(memory.state, expected)
    assert_same(memory(), torch.zeros(1, 4, dtype=torch.float64))
    assert not memory().requires_grad
    memory.reset()
    assert not memory.state.any()


def test_notes_without_a_state_are_nothing() -> None:
    memory = Memory(4)
    assert memory(torch.ones(2, 4)) is None
    memory.reset()
    assert dict(memory.named_buffers()) == {}


def test_state_is_read_and_written_in_one_forward() -> None:
    memory = Memory(4, carry_state=True).double()
    for _ in range(2):
        value = memory()
        written = value * normal(2, 4)
        memory(written)
        written.sum().backward()  # with the state changed in between
    assert memory.bias.grad is not None
    assert_same(memory.bias.grad, 2 * normal(2, 4).sum(0))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_modules_copy_and_pickle(twin: Any) -> None:
    memory, write = Memory(10, carry_state=True), conv_write(per="batch").float()
    memory(torch.ones(2, 10))
    inputs = (normal(2, 3, 4, 4).float(), normal(2, 4, 4).float(), normal(1, 10).float())
    write(*inputs)
    for module, args in ((memory, ()), (write, inputs)):
        other = twin(module)
        assert_same(other.state_dict(), module.state_dict())
        assert_same(other.eval()(*args), module.eval()(*args))
    fresh = conv_write(per="batch").float()
    fresh.load_state_dict(write.state_dict())
    assert_same(fresh.eval()(*inputs), write(*inputs))


def test_dead_code_elimination_keeps_the_note() -> None:
    root = nn.Module()
    root.memory = Memory(3, carry_state=True)
    graph = fx.Graph()
    read = graph.call_module("memory")
    graph.call_module("memory", (read,))
    graph.output(read)
    gm = fx.GraphModule(root, graph)
    graph.eliminate_dead_code()
    gm.recompile()
    gm()
    assert root.memory.state.any()


# Write block: arithmetic


def test_conv_write_by_hand() -> None:
    write: Any = conv_write()
    features, view, memory = normal(5, 3, 4, 4), normal(5, 2, 2, 2, seed=2), normal(1, 10, seed=3)
    conv, norm, _ = write.block
    wide = view.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 2x2 planes at 4x4
    x = torch.einsum("nchw,oc->nohw", torch.cat([features, wide], 1), conv.weight[:, :, 0, 0])
    x = x + conv.bias[:, None, None]
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    x = ((x - mean) / (variance + norm.eps).sqrt()).relu()
    x = torch.einsum("nchw,oc->nohw", x, write.out.weight) + write.out.bias[:, None, None]
    pooled = x.reshape(5, 3, 2, 2, 2, 2).mean((3, 5))  # after `out`: the order does not matter
    assert_same(write(features, view, memory), memory + pooled.flatten(1)[:, :10])
    replaced = conv_write(mode="replace")(features, view, memory)
    assert_same(replaced, pooled.flatten(1)[:, :10])


@pytest.mark.parametrize("layout", [(10,), (3, 2, 2)])
def test_token_write_by_hand(layout: tuple[int, ...]) -> None:
    write: Any = token_write(layout=layout, activation="tanh", widths=(4, 5), norm="none")
    features, view, memory = normal(5, 7, 3), normal(2), normal(5, 10, seed=3)
    x = torch.cat([features, view.expand(5, 7, 2)], 2)
    for layer in (write.block[0], write.block[2]):
        x = (x @ layer.weight.T + layer.bias).tanh()
    x = x.mean(1) @ write.out.weight.T + write.out.bias
    x = x.repeat_interleave(4, 1)[:, :10] if len(layout) == 3 else x
    assert_same(write(features, view, memory), memory + x)


def test_widths_of_one_keep_what_they_see() -> None:
    for write, shape in (
        (token_write(widths=(1,)), (5, 7, 3)),
        (conv_write(widths=(1,)), (1, 3, 1, 1)),
    ):
        features = normal(*shape).requires_grad_()
        write(features, normal(1, 2, *shape[2:][: write.dims]), normal(1, 10)).sum().backward()
        assert features.grad is not None
        assert features.grad.any()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pools_to_home_in_all_dimensions(dims: int) -> None:
    size, home = (6, 5, 4)[:dims], (3, 2, 2)[:dims]
    write: Any = conv_write(dims=dims, layout=(5, *home), floats=5 * 3, kernel_size=3, norm="none")
    features, view = normal(2, 3, *size), normal(1, 2, *size)
    x = torch.cat([features, view.expand(2, *view.shape[1:])], 1)
    conv = write.block[0]
    x = getattr(F, f"conv{dims}d")(x, conv.weight, conv.bias, padding=1).relu()
    pooled = getattr(F, f"adaptive_avg_pool{dims}d")(x, home)
    expected = torch.einsum("nc...,oc->no...", pooled, write.out.weight).flatten(2)
    expected = (expected + write.out.bias[:, None]).flatten(1)[:, :15]
    assert_same(write(features, view, torch.zeros(1, 15).double()), expected)
    other = conv_write(dims=dims, layout=(3, *home, 1), floats=3, norm="none")  # another home
    assert other(features, view, normal(1, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("channels", "planes", "count"), [(256, 4, 78_464), (512, 16, 117_056), (1024, 64, 197_696)]
)
def test_the_articles_blocks(channels: int, planes: int, count: int) -> None:
    sizes: dict[str, Any] = {"floats": 50_176, "layout": (1024, 7, 7), "device": "meta"}
    write = conv_write(channels=channels, planes=planes, **sizes, **ARTICLE)
    statistics = sum(buffer.numel() for buffer in write.buffers() if buffer.ndim)
    assert parameters(write) + statistics == count
    size = (56, 28, 14)[(256, 512, 1024).index(channels)]
    features = torch.empty(2, channels, size, size, device="meta", dtype=torch.float64)
    view = torch.empty(planes, 7, 7, device="meta")
    memory = torch.empty(1, 50_176, device="meta", dtype=torch.float64)
    assert write(features, view, memory).shape == (2, 50_176)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 9),
    planes=st.integers(0, 5),
    outputs=st.integers(1, 9),
    dims=st.integers(0, 3),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    kernel_size=st.sampled_from([1, 3, 5]),
    norm=st.sampled_from(["layer", "batch", "none"]),
)
def test_counted_as_built(channels: int, planes: int, outputs: int, dims: int, **rest: Any) -> None:
    write = WriteBlock(
        channels, planes, floats=outputs, layout=(outputs,), dims=dims, channel_axis=1,
        sample_axis=0, device="meta", **rest,
    )  # fmt: skip
    if dims == 0:
        rest["kernel_size"] = 7  # linear layers have none
    counted = block_parameters(channels, planes, outputs=outputs, dims=dims, **rest)
    assert counted == parameters(write)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_size": 2}, {"widths": ()}, {"momentum": 2.0}, {"norm": "group"}, {"dims": 4},
        {"activation": "swish"}, {"mode": "append"}, {"per": "token"}, {"floats": 13},
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_build(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be one of|odd kernel_size|no room"):
        conv_write(**wrong)


# Write block: gradients


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("dims", [0, 2])
def test_gradients(per: str, norm: str, dims: int) -> None:
    write = (conv_write if dims else token_write)(per=per, norm=norm, activation="tanh")
    features = normal(3, 3, 2, 2) if dims else normal(3, 4, 3)
    inputs = (features, normal(1, 2, 2, 2) if dims else normal(1, 2), normal(1, 10))
    names = [name for name, _ in write.named_parameters()]

    def function(features: Tensor, view: Tensor, memory: Tensor, *weights: Tensor) -> Tensor:
        arguments = (features, view, memory)
        return torch.func.functional_call(write, dict(zip(names, weights, strict=True)), arguments)

    weights = [parameter.detach().clone() for parameter in write.parameters()]
    every = tuple(x.clone().requires_grad_() for x in (*inputs, *weights))
    assert torch.autograd.gradcheck(function, every)
    grads = torch.autograd.grad(function(*every).square().sum(), every)
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("planes", [0, 2])
@pytest.mark.parametrize("dims", [0, 2])
def test_features_may_change_in_place(per: str, planes: int, dims: int, few: int) -> None:
    write = (conv_write if dims else token_write)(per=per, planes=planes)
    leaf = normal(3, 3, 2, 2) if dims else normal(3, 4, 3)
    view = normal(1, planes, *((2, 2) if dims else ())) if planes else None
    gradients = []
    for change in (False, True):
        features = leaf.clone().requires_grad_()
        x = features * 1
        result = write(x, view, normal(1, 10))
        if change:
            x.relu_()
        result.square().sum().backward()
        gradients.append(features.grad)
        write.zero_grad()
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("dims", [0, 2])
def test_features_and_view_are_as_if_side_by_side(
    dims: int, kernel_size: int, samples: int, few: int
) -> None:
    write: Any = (conv_write if dims else token_write)(kernel_size=kernel_size)
    seen: list[Tensor] = []
    joined = copy.deepcopy(write)
    joined.block[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = normal(3, 3, 6, 6) if dims else normal(3, 9, 3)
    for many in (samples, 1):
        view = normal(many, 2, 2, 2) if dims else normal(many, 2)
        given = features[:samples]
        results = []
        for block in (write, joined):
            inputs = [x.clone().requires_grad_() for x in (given, view, normal(1, 10))]
            weights = [*inputs, *block.parameters()]
            result = block(*inputs)
            results.append((result, *torch.autograd.grad(result.square().sum(), weights)))
        assert_same(results[0], results[1])
    assert len(seen) == 2
    assert all(x.shape[1] == 5 for x in seen)


def test_a_block_that_was_changed_is_called_as_it_is() -> None:
    write, features, view = conv_write(norm="none"), normal(4, 3, 6, 6), normal(4, 2, 6, 6)
    torch.manual_seed(0)
    write.block[0] = first = nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular").double()
    x = first(torch.cat([features, view], 1)).relu()
    pooled = write.out(F.adaptive_avg_pool2d(x, (2, 2)).flatten(2).mT).mT.flatten(1)[:, :10]
    assert_same(write(features, view, torch.zeros(1, 10).double()), pooled)


def test_features_are_copied_for_gradients_alone() -> None:
    write, features, view = conv_write(), normal(4, 3, 6, 6), normal(4, 2, 6, 6)

    def copies() -> list[str]:
        with torch.profiler.profile(record_shapes=True) as profiler:
            write(features, view, normal(1, 10))
        events = profiler.key_averages(group_by_input_shape=True)
        whole = [[*features.shape], []]  # a `cat` does not say of what
        clones = [e.key for e in events if e.key == "aten::clone" and e.input_shapes == whole]
        return clones + [e.key for e in events if e.key == "aten::cat"]

    assert copies() == ["aten::clone"]
    with torch.no_grad():
        assert copies() == []
    write.block[0].register_forward_hook(lambda *_: None)
    assert copies() == ["aten::cat"]


# Write block: per batch


def test_running_average_is_exact_then_exponential() -> None:
    write = conv_write(per="batch", mode="replace", momentum=0.25)
    memory, view = normal(1, 10), normal(2, 2, 2)
    updates: list[Tensor] = []
    expected, features = memory, normal(1, 3, 4, 4)
    for step in range(7):
        features = normal(step + 2, 3, 4, 4, seed=step)
        updates.append(write(features, view, memory)[0].detach())
        one = conv_write(mode="replace")(features.mean(0, keepdim=True), view, memory)
        assert_same(updates[-1], one[0])
        if step < 4:
            expected = torch.stack(updates).mean(0)
        else:
            expected = 0.75 * expected + 0.25 * updates[-1]
        assert_same(write.running, expected)
    assert write.batches == 7
    assert_same(write.eval()(features, view, memory), write.running[None])
    write.reset()
    assert not write.running.any()
    assert write.batches == 0


def test_evaluation_ignores_the_features() -> None:
    write = conv_write(per="batch")
    memory, view = normal(1, 10), normal(2, 2, 2)
    for step in range(2):
        write(normal(4, 3, 4, 4, seed=step), view, memory)
    write.eval()
    before = write.running.clone()
    result = write(normal(4, 3, 4, 4), view, memory)
    assert_same(result, memory + before)
    assert_same(write(normal(1, 3, 9, 9) * torch.nan, view, memory), result)
    replacing = conv_write(per="batch", mode="replace")
    replacing(normal(4, 3, 4, 4), view, memory)
    before = replacing.running.clone()
    replacing.eval()(normal(1, 3, 4, 4), view, memory).zero_()  # the buffer is not given away
    assert_same(replacing.running, before)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("dims", [0, 2])
def test_samples_are_independent_in_evaluation(norm: str, dims: int) -> None:
    write = (conv_write if dims else token_write)(norm=norm)
    features = normal(6, 3, 4, 4) if dims else normal(6, 4, 3)
    view, memory = normal(6, 2, *((4, 4) if dims else ())), normal(6, 10)
    write(features, view, memory)
    write.eval()
    whole = write(features, view, memory)
    for rows in ([3, 1, 5, 0, 2, 4], [2], [1, 1, 4]):
        assert_same(write(features[rows], view[rows], memory[rows]), whole[rows])


def test_batch_norm_of_one_value_is_refused() -> None:
    pixel, view, memory = normal(1, 3, 1, 1), normal(2, 1, 1), normal(1, 10)
    with pytest.raises(AimSurgeryError, match=r"batch of one of one position.*larger batch"):
        conv_write(norm="batch")(pixel, view, memory)
    with pytest.raises(AimSurgeryError, match=r'batch-averaged features.*choose norm="layer"'):
        token_write(norm="batch", per="batch")(normal(5, 3), normal(2), memory)
    conv_write(norm="batch").eval()(pixel, view, memory)
    conv_write(norm="batch")(pixel.expand(2, 3, 1, 1), view, memory)
    conv_write(norm="layer")(pixel, view, memory)


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_disabled_gives_zeros_and_averages_nothing(per: str) -> None:
    write = conv_write(per=per)
    write.enabled = False
    result = write(normal(3, 3, 4, 4), normal(2, 2, 2), normal(1, 10))
    assert_same(result, torch.zeros(3 if per == "sample" else 1, 10, dtype=torch.float64))
    assert not result.requires_grad
    assert all(not buffer.any() for buffer in write.buffers())


# Write block: layouts and types


def test_maps_of_any_layout() -> None:
    features, view, memory = normal(2, 3, 4, 6), normal(2, 4, 6), normal(1, 10)
    expected = conv_write()(features, view, memory)
    last = features.movedim(1, -1).contiguous()
    for axis in (3, -1):
        write = conv_write(channel_axis=axis)
        assert_same(write(last, view, memory), expected)
        assert_same(write(last[0], view, memory), expected[:1])
    assert_same(conv_write(channel_axis=-3)(features, view, memory), expected)
    assert_same(conv_write()(features[1], view, memory), expected[1:])
    for axis in (0, -3):
        unbatched = conv_write(channel_axis=axis, sample_axis=None)
        assert_same(unbatched(features[0], view, memory), expected[:1])
        assert_same(unbatched(features, view, memory), expected)
    with pytest.raises(AimSurgeryError, match=r"3 channels on axis 1 and 2 spatial axes.*\(2, 4"):
        conv_write()(last, view, memory)
    with pytest.raises(AimSurgeryError, match="spatial axes"):
        conv_write()(features[0, 0], view, memory)


def test_tokens_of_any_layout() -> None:
    features, view, memory = normal(2, 5, 3), normal(1, 2), normal(1, 10)
    expected = token_write()(features, view, memory)
    assert_same(token_write(channel_axis=2)(features, view, memory), expected)
    more = features.reshape(2, 5, 1, 3).expand(2, 5, 4, 3)
    assert_same(token_write(channel_axis=2)(more, view, memory), expected)
    assert_same(token_write(sample_axis=1)(features.mT.movedim(2, 0), view, memory), expected)
    assert_same(token_write(channel_axis=-2)(features.mT, view, memory), expected)
    alone = token_write(sample_axis=None)  # made for one vector by itself
    assert_same(alone(features[0], view, memory)[1:2], alone(features[0, 1], view, memory))
    assert_same(alone(features, view, memory), expected)
    assert_same(token_write(sample_axis=1)(features[0], view, memory), expected[:1])
    vectors = token_write()(features[:, 0], view, memory)
    assert_same(token_write()(features[:, :1], view, memory), vectors)
    assert_same(token_write()(features[1, 0], view, memory), vectors[1:])
    with pytest.raises(AimSurgeryError, match="no spatial axes"):
        token_write()(normal(2, 5, 4), view, memory)


def test_axes_are_views_where_they_can_be() -> None:
    x = normal(2, 4, 4, 3)
    assert FeatureAxes(3, 2, -1, 0).samples_first(x).data_ptr() == x.data_ptr()
    assert FeatureAxes(3, 0, -1, 0).samples_first(x).data_ptr() == x.data_ptr()


def test_views_of_each_sample_and_of_all() -> None:
    features, memory, view = normal(3, 3, 4, 4), normal(3, 10), normal(3, 2, 5, 7)
    each = [conv_write()(features[i], view[i], memory[i : i + 1]) for i in range(3)]
    assert_same(conv_write()(features, view, memory), torch.cat(each))
    features, view = normal(3, 4, 3), normal(3, 2)
    each = [token_write()(features[i : i + 1], view[i], memory[i : i + 1]) for i in range(3)]
    assert_same(token_write()(features, view, memory), torch.cat(each))


def test_channels_last_stays() -> None:
    write = conv_write()
    features = normal(2, 3, 4, 4).to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    hooked = conv_write()
    for module in (hooked.block, write.block[1]):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for planes in (normal(2, 4, 4), normal(2, 2, 4, 4)):
        for block, channels in ((hooked, 5), (write, 4)):
            block(features, planes, normal(1, 10))
            assert seen[-1].shape[1] == channels
            assert seen.pop().is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(per: str, dtype: torch.dtype) -> None:
    exact = conv_write(per=per)
    inputs = (normal(2, 3, 4, 4), normal(2, 4, 4), normal(1, 10))
    expected = exact(*inputs)
    write = conv_write(per=per).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-2
    assert_same(write(*(x.to(dtype) for x in inputs)).double(), expected, tolerance)
    mixed = conv_write(per=per).float()(inputs[0].to(dtype), inputs[1].float(), inputs[2])
    assert mixed.dtype == torch.float64  # the memory's
    memory = Memory(10, carry_state=True).to(dtype)
    memory(expected)
    assert memory().dtype == memory.state.dtype == dtype


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("dims", [0, 2])
def test_autocast(per: str, norm: str, dims: int) -> None:
    write = (conv_write if dims else token_write)(per=per, norm=norm).float()
    memory = Memory(10, carry_state=True)
    features = (normal(2, 3, 4, 4) if dims else normal(2, 4, 3)).float()
    view = normal(1, 2, *((4, 4) if dims else ())).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = memory()
        assert value.dtype == torch.bfloat16
        for x in (features, features.bfloat16()):
            written = write(x, view, value)
            assert written.dtype == torch.bfloat16
            assert write(x, view.bfloat16(), value.float()).dtype == torch.float32
        memory(written)
    written.float().sum().backward()
    assert memory.state.dtype == torch.float32
    memory.enabled = False
    with torch.autocast("cpu", torch.bfloat16):
        assert memory().dtype == torch.bfloat16


# Compilers


class Net(nn.Module):
    def __init__(self, per: str, dims: int) -> None:
        super().__init__()
        self.memory = Memory(10, carry_state=True)
        self.write = (conv_write if dims else token_write)(per=per).float()

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory()
        written = self.write(x, memory[:, : 2 * 4 ** (self.write.dims // 2)].unflatten(
            1, (2, 2, 2) if self.write.dims else (2,)), memory)  # fmt: skip
        self.memory(written)
        return written


@pytest.mark.parametrize(
    ("per", "dims"), [("sample", 2), ("batch", 2), ("sample", 0), ("batch", 0)]
)
def test_compile_and_export(per: str, dims: int) -> None:
    net = Net(per, dims)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = (normal(3, 3, 4, 4) if dims else normal(3, 4, 3)).float()
    for step in range(2):
        expected, actual = net(x + step), compiled(x + step)
        assert_same(actual, expected, FLOAT32_TOLERANCE)
        expected.square().sum().backward()
        actual.square().sum().backward()
    assert_same(twin.state_dict(), net.state_dict(), FLOAT32_TOLERANCE)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same(theirs.grad, ours.grad, 1e-4)
    batch = torch.export.Dim.AUTO
    exported = torch.export.export(net.eval(), (x,), dynamic_shapes={"x": {0: batch}}).module()
    for samples in (x, x[:2]):
        assert_same(exported(samples), net(samples), FLOAT32_TOLERANCE)


# Several processes


def test_mean_over_samples_of_one_process() -> None:
    x = normal(3, 4, 2)
    assert_same(mean_over_samples(x), x.mean(0, keepdim=True))
    assert_same(mean_over_samples(x, 1), x.mean(1, keepdim=True))


def test_two_ranks_are_one() -> None:
    """See `distributed_script.py`, which also shows that its comparison can fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*command, "-m", "tests.distributed_script"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
