"""What a caller has around a model: autocast, a default device, wrappers, dtypes, traces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, UnsupportedLayerError, fold, lower, transform

WRITES = pytest.mark.parametrize("write", ["none", "sample", "batch"])
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    )


def operated(
    model: nn.Module, inputs: Any = IMAGES, write: Any = "none", emit: Any = "graph"
) -> Any:
    """A model whose memory matters, in evaluation."""
    config = AimConfig(budget=None, memory=64, write=write, init="fresh")
    return transform(model, inputs, config=config, emit=emit).eval()


def compiled(model: nn.Module) -> Any:
    """For the type checker, `torch.compile` gives a function."""
    return torch.compile(model)


class Head(nn.Module):
    """A body, and a head that is kept in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)).mean((2, 3)).float())


@pytest.mark.parametrize(
    ("write", "emit"),
    [("none", "graph"), ("sample", "graph"), ("batch", "graph"), ("none", "module")],
)
def test_what_is_folded_under_autocast_is_exact(write: str, emit: str) -> None:
    gm = operated(convolutions(), write=write, emit=emit)
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold(gm)
        measured = aim_surgery.restore(gm).restored
    torch.testing.assert_close(folded(IMAGES), gm(IMAGES))
    assert measured == aim_surgery.restore(gm).restored


@WRITES
@pytest.mark.parametrize("example", [IMAGES, IMAGES[0]], ids=["batched", "unbatched"])
def test_a_folded_model_takes_samples_with_and_without_batch(write: str, example: Tensor) -> None:
    gm = operated(convolutions(), example, write)
    folded = fold(gm)
    for x in (IMAGES, IMAGES[:1], IMAGES[0], IMAGES[..., :9], IMAGES[0, ..., :9]):
        expected = gm(x)
        assert folded(x).shape == expected.shape
        torch.testing.assert_close(folded(x), expected)


def test_a_head_that_is_given_another_dtype_afterwards() -> None:
    gm = operated(Head(), write="sample").bfloat16()
    gm.head.float()
    assert gm.aim.memory.bias.dtype == torch.bfloat16
    frozen = aim_surgery.freeze_base(copy.deepcopy(gm))
    forms = (lower(gm, "split"), fold(gm, IMAGES.bfloat16()), frozen, lower(frozen, "split"))
    for count in (2, 2000):  # few rows are concatenated, many are not
        x = IMAGES[:1].expand(count, -1, -1, -1).bfloat16()
        expected = gm(x)
        assert expected.dtype == torch.float32
        for form in forms:
            torch.testing.assert_close(form(x), expected, atol=0.02, rtol=0.02)


def test_layers_inside_python_calls_in_two_dtypes() -> None:
    model = Head().bfloat16()
    model.head.float()
    x = IMAGES.bfloat16()
    gm = operated(model, x, emit="module")
    torch.testing.assert_close(fold(gm)(x), gm(x), atol=0.02, rtol=0.02)


class Named(nn.Module):
    """Has a layer of a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize("name", ["meta", "contrary", "shape_env", "plan", "graph"])
def test_names_that_a_graph_module_has_are_refused(name: str) -> None:
    model, x = Named(name), torch.zeros(2, 64)
    with pytest.raises(UnsupportedLayerError, match=f"{name!r}, which in a GraphModule"):
        transform(model, x)
    assert transform(model, x, emit="module")(x).shape == (2, 64)


def test_names_of_what_is_told_of_a_result_are_refused() -> None:
    x = torch.zeros(2, 64)
    with pytest.raises(AimSurgeryError, match="'notes', the attribute"):
        fold(transform(Named("notes"), x).eval())
    with pytest.raises(AimSurgeryError, match="'restored', the attribute"):
        aim_surgery.restore(transform(Named("restored"), x))


@pytest.mark.parametrize("name", ["gm.pt", "gm.safetensors"])
def test_under_another_default_device(name: str, tmp_path: Path) -> None:
    """The meta device stands for one that is not the model's, as cuda would be."""
    model = convolutions()
    gm, other = operated(model, write="sample"), transform(model, IMAGES)
    aim_surgery.save(gm, tmp_path / "expected.pt")
    with torch.device("meta"):
        folded = fold(gm)
        assert aim_surgery.verify(model, other, IMAGES).ok
        assert not aim_surgery.restore(gm).restored.exact
        aim_surgery.save(gm, tmp_path / name)
        loaded = aim_surgery.load(tmp_path / name, model).eval()
    torch.testing.assert_close(folded(IMAGES), gm(IMAGES))
    assert torch.equal(loaded(IMAGES), gm(IMAGES))


@pytest.mark.parametrize("change", ["pruned", "weight norm"])
def test_parameters_that_a_widened_weight_is_made_of_are_memory_s(change: str) -> None:
    gm = operated(convolutions())
    before = list(aim_surgery.memory_parameters(gm))
    layer = gm.get_submodule("2")
    old = layer.weight
    if change == "pruned":
        prune.l1_unstructured(layer, "weight", 0.3)
        new = [layer.weight_orig]
    else:
        parametrizations.weight_norm(layer)
        new = [*layer.parametrizations.weight.parameters()]
    expected = {id(p) for p in (*before, *new) if p is not old}
    assert {id(p) for p in aim_surgery.memory_parameters(gm)} == expected | {id(p) for p in new}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("form", ["concat", "split"])
@pytest.mark.parametrize("emit", ["graph", "module"])
def test_memories_are_batched_by_vmap(emit: Any, form: Any, kernel: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, kernel), nn.ReLU(), nn.Flatten(2), nn.LazyLinear(8))
    model(IMAGES)
    gm = lower(operated(model, emit=emit), form)
    own = {name: value.detach() for name, value in gm.named_parameters()}

    def output(memory: Tensor) -> Tensor:
        return torch.func.functional_call(gm, {**own, "aim.memory.bias": memory}, (IMAGES,))

    memories = torch.randn(3, gm.aim.memory.bias.numel())
    expected = torch.stack([output(memory) for memory in memories])
    torch.testing.assert_close(torch.func.vmap(output)(memories), expected)


@WRITES
@pytest.mark.parametrize("form", ["concat", "split", "folded"])
@pytest.mark.filterwarnings("ignore")  # of the tracer's, at each question about sizes
def test_torch_jit_trace_and_its_check(form: Any, write: str) -> None:
    gm = operated(convolutions(), write=write)
    gm = fold(gm) if form == "folded" else lower(gm, form)
    traced: Any = torch.jit.trace(gm, (IMAGES,))
    torch.testing.assert_close(traced(IMAGES), gm(IMAGES))


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("wrap", [compiled, AveragedModel, nn.DataParallel])
def test_wrapped_models_are_saved_and_verified(wrap: Any, tmp_path: Path) -> None:
    model = convolutions()
    gm = transform(model, IMAGES)
    wrapped = wrap(gm)
    assert aim_surgery.verify(model, wrapped, IMAGES).ok
    aim_surgery.save(wrapped, tmp_path / "gm.safetensors")
    loaded = aim_surgery.load(tmp_path / "gm.safetensors", model)
    assert torch.equal(loaded.eval()(IMAGES), gm.eval()(IMAGES))
    with pytest.raises(AimSurgeryError, match="got OptimizedModule"):
        aim_surgery.verify(model, compiled(model), IMAGES)
