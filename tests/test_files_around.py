"""Checkpoints as other tools leave them: what lies beside weights, and in what shapes they come."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from typer.testing import CliRunner, Result

import aim_surgery
from aim_surgery import cli
from aim_surgery.checkpoint.inspect import inspect
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.reading.kinds import open_source, tensors_of
from aim_surgery.checkpoint.writing import exported_file
from aim_surgery.errors import CheckpointError
from tests.test_files_in import save_distributed

FACTORY = """
import torch
from torch import nn

def net(n=3):
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, n))

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.count = nn.Linear(16, 16), nn.Linear(16, 4), 3

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
"""


class Stranger:
    """What only unpickling with trust gives."""


class Named(NamedTuple):
    """A class that exporters can't name."""

    y: Any
    z: Any


class GivesNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        hidden = torch.relu(self.a(x))
        return Named(self.b(hidden), hidden)


def net(n: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, n))


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("nets.py").write_text(FACTORY)


def run(*words: str, model: str = "nets.py:net") -> Result:
    return CliRunner().invoke(cli.app, [*words, "--model", model], prog_name="aim-surgery")


def well(*words: str, model: str = "nets.py:net") -> str:
    result = run(*words, model=model)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*words: str, model: str = "nets.py:net") -> str:
    result = run(*words, model=model)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    return result.stderr


# Dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_dtypes_come_back_with_model_args(dtype: torch.dtype, end: str) -> None:
    state = net(5).to(dtype).state_dict()
    torch.save(state, "net.pt")
    args = ("--model-args", '{"n": 5}')
    well("transform", "net.pt", "-o", "aim.safetensors", *args)
    well("restore", "aim.safetensors", "-o", f"back.{end}", *args)
    back = tensors_of(open_source(f"back.{end}"))
    for name, value in state.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], value), name


def test_model_args_of_load() -> None:
    torch.save(net(5).double().state_dict(), "net.pt")
    well("transform", "net.pt", "-o", "aim.safetensors", "--model-args", '{"n": 5}')
    gm = load("aim.safetensors", "nets.py:net", model_args={"n": 5})
    assert {value.dtype for value in gm.parameters()} == {torch.float64}
    with pytest.raises(CheckpointError, match="not the one that was operated on"):
        load("aim.safetensors", "nets.py:net", model_args={"n": 4})


def test_storage_dtypes_come_back() -> None:
    float8 = torch.float8_e4m3fn
    state = {n: v.to(float8) if v.ndim > 1 else v for n, v in net().state_dict().items()}
    torch.save(state, "net.pt")
    well("transform", "net.pt", "-o", "aim.safetensors")
    well("restore", "aim.safetensors", "-o", "back.safetensors")
    back = tensors_of(open_source("back.safetensors"))
    for name, value in state.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name].float(), value.float()), name


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn", "bfloat16", "uint8"])
def test_inspect_names_dtypes(dtype: str) -> None:
    torch.save({"w": torch.zeros(4, 4).to(getattr(torch, dtype))}, "w.pt")
    assert inspect("w.pt").entries["w"].dtype == dtype


# Optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_parameter_of_one_number_does_not_blur_the_groups(outputs: int) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    model = net(outputs)
    optimizer = torch.optim.AdamW(groups(model))
    model(torch.randn(3, 16)).square().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "run.pt")
    args = ("--model-args", json.dumps({"n": outputs}))
    well("transform", "run.pt", "-o", "aim.pt", *args)
    resumed = torch.optim.AdamW(groups(load("aim.pt", model)))
    state = torch.load("aim.pt")["optimizer"]
    resumed.load_state_dict(state)  # groups of other sizes are refused
    parameters = [p for group in resumed.param_groups for p in group["params"]]
    for parameter in parameters:
        entry = resumed.state.get(parameter)
        assert not entry or entry["exp_avg"].shape == parameter.shape


def test_a_flat_optimizer_state_is_told_of() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    torch.save({"model": model.state_dict(), "optimizer": flat}, "run.pt")
    assert "left as it was: optimizer, an optimizer's state in one flat dict" in " ".join(
        well("transform", "run.pt", "-o", "aim.pt").split()
    )


# What weights are no weights ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "meta"])
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_weights_without_a_place_for_each_value(kind: str, name: str) -> None:
    state = net().state_dict()
    state[name] = state[name].to_sparse() if kind == "sparse" else state[name].to("meta")
    torch.save(state, "odd.pt")
    for words in (("transform", "odd.pt", "-o", "aim.pt"), ("plan", "odd.pt")):
        assert f"error: odd.pt: {name} is " in fails(*words)
    assert not Path("aim.pt").exists()


def test_one_of_many_that_fails_in_a_way_nobody_thought_of(monkeypatch: Any) -> None:
    Path("in").mkdir()
    for name in ("a", "b"):
        torch.save(net().state_dict(), f"in/{name}.pt")
    real = aim_surgery.checkpoint.transform.open_source  # pyright: ignore[reportAttributeAccessIssue]

    def failing(path: Any, **kwargs: Any) -> Any:
        if Path(path).name == "a.pt":
            raise ZeroDivisionError("as it happens")
        return real(path, **kwargs)

    monkeypatch.setattr("aim_surgery.checkpoint.transform.open_source", failing)
    told = fails("transform", "in", "-o", "out/")
    assert "error: in/a.pt: ZeroDivisionError: as it happens" in told
    assert [path.name for path in Path("out").iterdir()] == ["b.safetensors"]
    with pytest.raises(ZeroDivisionError):  # alone, it is reported whole
        CliRunner().invoke(
            cli.app,
            ["transform", "in/a.pt", "-o", "x.pt", "--model", "nets.py:net"],
            catch_exceptions=False,
        )


# Extra state ----------------------------------------------------------------------------------


def _counting() -> nn.Module:
    return aim_surgery.build("nets.py:Counting")


def test_extra_state_in_a_folder_and_a_file() -> None:
    state = _counting().state_dict()
    assert "_extra_state" in state
    save_distributed({"model": state})
    torch.save(state, "net.pt")
    for source, output in (("net.pt", "aim.pt"), ("dcp", "aim.dcp"), ("dcp", "b.pt")):
        well("transform", source, "-o", output, model="nets.py:Counting")
        well("verify", source, output, model="nets.py:Counting")
        operated = load(output, "nets.py:Counting")
        x = torch.randn(2, 16)
        model = _counting()
        model.load_state_dict(state)
        torch.testing.assert_close(operated(x), model(x))
        well("restore", output, "-o", "back.safetensors", model="nets.py:Counting")


# Trust ----------------------------------------------------------------------------------------


def test_trust_reaches_shards() -> None:
    torch.save({**net().state_dict(), "_extra_state": Stranger()}, "part.bin")
    names = [*net().state_dict()]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.bin")}
    Path("net.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"Stranger.*--trust"):
        open_source("net.bin.index.json")
    assert list(open_source("net.bin.index.json", trust=True).entries) == names


def test_trust_reaches_folders() -> None:
    content = {"model": net().state_dict(), "args": Stranger()}
    save_distributed(content)
    assert "--trust" in fails("transform", "dcp", "-o", "aim.pt")
    well("transform", "dcp", "-o", "aim.pt", "--trust")
    assert isinstance(torch.load("aim.pt", weights_only=False)["args"], Stranger)


def test_what_a_file_says_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fetching(spec: str, /, **args: Any) -> nn.Module:
        asked.append(args)
        return net(args["n"])

    monkeypatch.setattr(importlib.import_module(load.__module__), "build", fetching)
    gm = aim_surgery.transform(net(4), torch.randn(2, 16))
    stored = {"n": 4, "weights": "DEFAULT", "weights_backbone": "x", "pretrained": True}
    stored |= {"checkpoint_path": "x", "pretrained_cfg": "x"}
    aim_surgery.save(gm, "aim.safetensors", model_spec="timm:net", model_args=stored)
    load("aim.safetensors")
    load("aim.safetensors", "timm:net", model_args={"n": 4, "pretrained": True})
    assert asked == [{"n": 4}, {"n": 4, "pretrained": True}]


# Places ---------------------------------------------------------------------------------------


def test_folders_of_trainers_are_one_checkpoint() -> None:
    folder = Path("run")
    folder.mkdir()
    safetensors.torch.save_file(net().state_dict(), folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        torch.save({"lr": 1}, folder / name)
    well("transform", "run", "-o", "aim.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(net().state_dict(), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    well("transform", "run", "-o", "again.safetensors")
    first, second = (tensors_of(open_source(f"{n}.safetensors")) for n in ("aim", "again"))
    assert first.keys() == second.keys()


def test_a_folder_of_another_model_as_well_is_a_collection() -> None:
    Path("run").mkdir()
    for name in ("model", "my-model"):
        safetensors.torch.save_file(net().state_dict(), f"run/{name}.safetensors")
    well("transform", "run", "-o", "out/")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "model.safetensors",
        "my-model.safetensors",
    ]


def test_an_index_that_names_an_index() -> None:
    index = {"weight_map": {"w": "net.index.json"}}
    Path("net.index.json").write_text(json.dumps(index))
    assert "names an index where a shard should be" in fails("plan", "net.index.json")


def test_an_output_index_that_is_a_link() -> None:
    torch.save(net().state_dict(), "net.pt")
    Path("one").mkdir()
    Path("two").mkdir()
    Path("two/net.index.json").write_text("{}")
    Path("one/net.index.json").symlink_to("../two/net.index.json")
    well("transform", "net.pt", "-o", "one/net.index.json")
    assert len(open_source("two/net.index.json").entries) > 6
    assert [path.name for path in Path("one").iterdir()] == ["net.index.json"]


# Exported programs ----------------------------------------------------------------------------


def test_a_program_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = aim_surgery.transform(net(), torch.randn(2, 16))
    aim_surgery.save(gm, "good.pt2")
    size = Path("good.pt2").stat().st_size
    real: Any = exported_file._Patient.write
    for room in (0, 100, size // 2, size - 50):
        left = [room]

        def full(self: Any, data: Any, left: list[int] = left) -> int:
            left[0] -= len(memoryview(data).cast("B"))
            if left[0] < 0:
                self.file = _Full()
            return real(self, data)

        monkeypatch.setattr(exported_file._Patient, "write", full)
        with pytest.raises(CheckpointError, match="could not be written: No space left"):
            aim_surgery.save(gm, "aim.pt2")
    assert sorted(path.name for path in Path().glob("*.pt2*")) == ["good.pt2"]


class _Full:
    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset


def test_outputs_that_exporters_cannot_name() -> None:
    gm = aim_surgery.transform(GivesNamed(), torch.randn(2, 16))
    with pytest.raises(CheckpointError, match=r"x\.pt2: the program can't be stored: .*Named"):
        aim_surgery.save(gm, "x.pt2")
    assert not Path("x.pt2").exists()
