"""What goes out: whole or not at all, every value right, and fit to go on with."""

import collections
import copy
import importlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from typer.testing import CliRunner, Result

import aim_surgery
from aim_surgery import cli, cli_output
from aim_surgery.checkpoint import operated as operated_module
from aim_surgery.checkpoint.back import fold_file, restore_file
from aim_surgery.checkpoint.inspect import inspect
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.skeleton import build_skeleton
from aim_surgery.checkpoint.reading.kinds import open_source, read_state_dict, tensors_of
from aim_surgery.checkpoint.reading.known_models import TABLE, models_that_fit
from aim_surgery.checkpoint.reading.source import Entry
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.checkpoint.writing import shards
from aim_surgery.errors import CheckpointError
from tests.test_files_in import FACTORY, net, prefixed, save_distributed

SPEC = "nets.py:Net"
INPUT = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("nets.py").write_text(FACTORY)
    torch.manual_seed(0)
    torch.save(net().state_dict(), "net.pt")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, [*words], prog_name="aim-surgery")


def transformed(*words: str) -> str:
    result = run("transform", *words, "--model", SPEC, "--budget", "none", "--memory", "100")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def contents(folder: Path = Path()) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def assert_operates(output: str | Path, state) -> None:
    """The file holds a model that computes what the original does, with its very values."""
    gm = load(output, SPEC)
    model = build(SPEC)
    model.load_state_dict(state)
    assert torch.equal(gm.eval()(INPUT), model.eval()(INPUT)) or torch.allclose(
        gm(INPUT), model(INPUT), rtol=1e-5, atol=1e-6
    )
    for name, value in state.items():
        made = gm.state_dict()[name]
        assert torch.equal(made.narrow(1, 0, value.shape[1]) if made.ndim > 1 else made, value)
    with torch.no_grad():  # that the comparison can fail
        gm.get_parameter("3.weight").add_(1)
    assert not torch.allclose(gm(INPUT), model(INPUT), rtol=1e-5, atol=1e-6)


# Layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["o.safetensors", "o.pt", "o.pth", "o.ckpt", "o.bin"])
@pytest.mark.parametrize("file", ["net.pt", "net.safetensors"])
def test_every_layout_from_every_kind(folder, file, output):
    state = torch.load("net.pt")
    safetensors.torch.save_file(state, "net.safetensors")
    transformed(file, "-o", output)
    assert_operates(output, state)
    kind = "safetensors" if output.endswith("safetensors") else "PyTorch file"
    assert inspect(output).kind == kind
    if kind == "PyTorch file":
        plain = torch.load(output, weights_only=True)  # PyTorch reads it by itself
        assert_same(dict(plain), tensors_of(open_source(output)))


def assert_same(found, expected) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_files_get_the_versions_of_modules_that_came_without(folder):
    safetensors.torch.save_file(prefixed(torch.load("net.pt"), "module."), "net.safetensors")
    transformed("net.safetensors", "-o", "o.pt")
    versions = torch.load("o.pt", weights_only=True)._metadata
    assert versions["module.1"] == {"version": nn.BatchNorm2d._version}
    assert versions["module"] == {"version": 1}
    aim_surgery.save(load("o.pt", SPEC), "again.pt")
    assert torch.load("again.pt", weights_only=True)._metadata["1"] == versions["module.1"]
    assert len(Path("again.pt").read_bytes().split(b'"reads"')) == 2  # the plan is there once


def test_shards_out(folder, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    monkeypatch.setattr(shards.write_shards, "__kwdefaults__", {"shard_bytes": 2000})
    state = torch.load("net.pt")
    transformed("net.pt", "-o", "o.safetensors.index.json")
    first = sorted(Path().glob("o-*.safetensors"))
    assert first[0].name.startswith("o-00001-of-0000")
    assert len(first) > 1
    assert_operates("o.safetensors.index.json", state)
    index = json.loads(Path("o.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in first}
    transformed("net.pt", "-o", "o.safetensors.index.json")  # again: new shards, old ones gone
    second = sorted(Path().glob("o-*.safetensors"))
    assert len(second) == len(first)
    assert not set(first) & set(second)
    assert_operates("o.safetensors.index.json", state)


def test_shards_of_others_are_not_removed(folder):
    safetensors.torch.save_file(torch.load("net.pt"), "theirs.safetensors")
    index = {"weight_map": dict.fromkeys(torch.load("net.pt"), "theirs.safetensors")}
    Path("o.index.json").write_text(json.dumps(index))
    transformed("net.pt", "-o", "o.index.json")
    assert Path("theirs.safetensors").exists()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_program_on_request(folder, batch_size):
    transformed("net.pt", "-o", "o.pt2", "--input", f"{batch_size},3,12,12")
    program = torch.export.load("o.pt2")
    model = build(SPEC)
    model.load_state_dict(torch.load("net.pt"))
    batch = torch.randn(5, 3, 12, 12)  # another batch size
    torch.testing.assert_close(program.module()(batch), model.eval()(batch))
    operation = inspect("o.pt2").operation
    assert operation is not None
    assert operation["memory_floats"] == 100
    assert (
        "torch.export.load reads by itself"
        in run("verify", "net.pt", "o.pt2", "--model", SPEC).stderr
    )


ONE_AT_A_TIME = """
from torch import nn

class One(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return super().forward(x.reshape(1, 3, 64))
"""


def test_a_program_for_one_batch_size_says_so(folder):
    Path("one.py").write_text(ONE_AT_A_TIME)
    torch.save(build("one.py:One").state_dict(), "one.pt")
    words = ("--model", "one.py:One", "--write", "none", "--input", "1,3,64", "--budget", "none")
    told = run("transform", "one.pt", *words, "-o", "o.pt2").stdout
    assert "note        the program takes a first axis of 1 alone: " in told
    assert "first axis" not in transformed("net.pt", "-o", "o.pt2")
    x = torch.randn(1, 3, 64)
    gm = aim_surgery.transform(build("one.py:One"), x)
    with pytest.warns(UserWarning, match=r"first axis of 1 alone"):
        aim_surgery.save(gm, "p.pt2")
    torch.testing.assert_close(torch.export.load("p.pt2").module()(x), gm.eval()(x))


def training_checkpoint(prefix: str = "module.") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(INPUT).sum().backward()
    optimizer.step()
    content = {
        "epoch": 7,
        "model": prefixed(model.state_dict(), prefix),
        "nested": {"list": [1, "two", torch.arange(3)]},
        "model_ema": {"n_averaged": torch.tensor(4), **prefixed(net().state_dict(), "module.")},
        "other_model": {"w": torch.ones(2)},
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 7, "_last_lr": [0.1]},
    }
    torch.save(content, "train.pt")
    return model, optimizer


def test_a_training_checkpoint_keeps_its_layout(folder):
    model, _ = training_checkpoint("module._orig_mod.")
    old = torch.load("train.pt")
    told = transformed("train.pt", "-o", "o.pt", "--drop-optimizer")
    assert "note        left out: optimizer\n" in told
    assert "left as it was: other_model, not this model's weights" in told
    new = torch.load("o.pt", weights_only=True)
    assert list(new) == [name for name in old if name != "optimizer"]
    for name in ("epoch", "scheduler"):
        assert new[name] == old[name]
    assert new["nested"]["list"][:2] == old["nested"]["list"][:2]
    assert torch.equal(new["nested"]["list"][2], torch.arange(3))
    assert torch.equal(new["other_model"]["w"], torch.ones(2))
    assert list(new["model"])[: len(old["model"])] == list(old["model"])
    assert "module._orig_mod.aim.memory.weight" in new["model"]

    # the script's own way to go on: its model, operated on, takes the file's weights
    plan = load("o.pt", SPEC).plan
    gm = aim_surgery.apply(build(SPEC), plan)
    gm.load_state_dict({n.removeprefix("module._orig_mod."): v for n, v in new["model"].items()})
    torch.testing.assert_close(gm.eval()(INPUT), model.eval()(INPUT))

    averaged = torch.optim.swa_utils.AveragedModel(aim_surgery.apply(build(SPEC), plan))
    averaged.load_state_dict(new["model_ema"])
    expected = torch.optim.swa_utils.AveragedModel(net())
    expected.load_state_dict(old["model_ema"])
    torch.testing.assert_close(averaged.eval()(INPUT), expected.eval()(INPUT))


def test_several_optimizers_in_a_list(folder):
    training_checkpoint()
    content = torch.load("train.pt")
    content["optimizers"] = [content.pop("optimizer"), content["epoch"]]
    content["optimizers"].append(torch.load("train.pt")["optimizer"])
    torch.save(content, "list.pt")
    transformed("list.pt", "-o", "o.pt")
    wide = torch.load("o.pt")["optimizers"]
    shapes = [s["state"][4]["momentum_buffer"].shape for s in (wide[0], wide[2])]
    assert shapes[0] == shapes[1] == load("o.pt", SPEC).get_parameter("3.weight").shape
    told = transformed("list.pt", "-o", "less.pt", "--drop-optimizer")
    assert "left out: optimizers.0" in told
    assert "left out: optimizers.2" in told
    assert torch.load("less.pt")["optimizers"] == [7]
    restored("o.pt", "-o", "back.pt")
    assert not_equal(torch.load("back.pt"), content) == []


def test_what_stands_behind_an_optimizer_in_a_list_stays(folder):
    training_checkpoint()
    content = torch.load("train.pt")
    torch.save([content["optimizer"], content["model"], {"epoch": 7}], "list.pt")
    transformed("list.pt", "-o", "o.pt", "--drop-optimizer")
    weights, rest = torch.load("o.pt")
    assert any(name.endswith("aim.memory.weight") for name in weights)
    assert rest == {"epoch": 7}


@pytest.mark.parametrize("write", [restore_file, fold_file])
def test_a_file_is_not_written_over_itself(folder, write):
    transformed("net.pt", "-o", "o.pt2" if write is fold_file else "o.pt")
    (operated,) = folder.glob("o.*")
    link = operated.with_stem("link")
    os.link(operated, link)
    before = contents()
    for output in (operated, link):
        with pytest.raises(CheckpointError, match="is the checkpoint itself"):
            write(operated, output, SPEC)
    assert contents() == before


def test_an_optimizer_is_not_lost_silently(folder):
    training_checkpoint()
    content = torch.load("train.pt")
    content["optimizer"]["param_groups"][0]["params"].append(99)  # of another model
    torch.save(content, "train.pt")
    before = contents()
    result = run("transform", "train.pt", "--model", SPEC, "-o", "o.pt", "--budget", "none")
    assert result.exit_code == 1
    assert "--drop-optimizer" in result.stderr
    assert contents() == before
    told = transformed("train.pt", "-o", "o.safetensors")
    assert "not taken along: epoch, nested, model_ema, other_model, optimizer, scheduler" in told


def restored(*words: str) -> str:
    result = run("restore", *words, "--model", SPEC)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("group", [None, "own"])
def test_a_restored_training_checkpoint_is_what_came_in(folder, group):
    training_checkpoint("module._orig_mod.")
    transformed("train.pt", "-o", "o.pt", *(["--new-group", group] if group else []))
    lists = [torch.load(file)["scheduler"]["_last_lr"] for file in ("train.pt", "o.pt")]
    assert lists == [[0.1], [0.1, 0.1] if group else [0.1]]
    assert "restored    exact" in restored("o.pt", "-o", "back.pt")
    old, new = (torch.load(file, weights_only=True) for file in ("train.pt", "back.pt"))
    assert not_equal(old, new) == []
    assert inspect("back.pt").operation is None  # no plan in it
    transformed("back.pt", "-o", "again.pt")  # so it can be operated on


def test_weights_under_an_unusual_key_are_found_again(folder):
    torch.save({"a": {"gen": net().state_dict(), "disc": net().state_dict()}}, "gan.pt")
    transformed("gan.pt", "--key", "a.disc", "-o", "o.pt")
    content = torch.load("o.pt", weights_only=True)["a"]
    assert "aim.memory.weight" in content["disc"]
    assert "aim.memory.weight" in content["gen"]  # another set of this model's weights
    with pytest.raises(CheckpointError, match=r"weights under 'a.gen' and 'a.disc'; choose"):
        load("o.pt", SPEC)
    for name in ("gen", "disc"):
        gm = load("o.pt", SPEC, key=f"a.{name}")
        assert all(torch.equal(gm.state_dict()[n], v) for n, v in content[name].items())

    torch.save({"gen": net().state_dict(), "disc": {"w": torch.ones(2)}}, "gan.pt")
    transformed("gan.pt", "--key", "gen", "-o", "o.pt")
    load("o.pt", SPEC)  # the only one that was operated on
    restored("o.pt", "-o", "back.pt")
    assert not_equal(torch.load("gan.pt"), torch.load("back.pt")) == []


def test_averaged_weights_are_restored_and_folded_when_asked_for(folder):
    training_checkpoint()
    transformed("train.pt", "-o", "o.pt")
    restored("o.pt", "--ema", "-o", "back.safetensors")
    averaged = safetensors.torch.load_file("back.safetensors")
    expected = torch.load("train.pt")["model_ema"]
    assert all(torch.equal(averaged[n], expected[f"module.{n}"]) for n in averaged)
    base = net()
    base.load_state_dict(averaged)
    sizes = ",".join(map(str, INPUT.shape))
    told = run("fold", "o.pt", "--ema", "--model", SPEC, "--input", sizes, "-o", "slim.pt2")
    assert told.exit_code == 0, told.output
    slim = torch.export.load("slim.pt2").module()
    torch.testing.assert_close(slim(INPUT), base.eval()(INPUT))


def test_a_restored_run_goes_on_from_where_it_is(folder):
    """What was trained of the base's part, in weights, averages and moments, is kept."""
    training_checkpoint()
    transformed("train.pt", "-o", "o.pt")
    content = torch.load("o.pt")
    before = torch.load("train.pt")
    content["model"]["module.3.weight"] += 1
    content["model_ema"]["module.3.weight"] += 2
    content["optimizer"]["state"][4]["momentum_buffer"] += 3
    content["epoch"] = 9
    torch.save(content, "trained.pt")
    told = restored("trained.pt", "-o", "back.pt")
    assert "restored    not exact: 1 layers" in told
    after = torch.load("back.pt", weights_only=True)
    assert after["epoch"] == 9
    for name, by in (("model", 1), ("model_ema", 2)):
        weight = before[name]["module.3.weight"] + by
        assert torch.equal(after[name]["module.3.weight"], weight)
    moments = [c["optimizer"]["state"][4]["momentum_buffer"] for c in (before, after)]
    assert torch.equal(moments[1], moments[0] + 3)

    assert "left out: optimizer" in restored("trained.pt", "-o", "b.pt", "--drop-optimizer")
    assert list(torch.load("b.pt")) == [name for name in before if name != "optimizer"]
    assert "not taken along: epoch," in restored("trained.pt", "-o", "b.safetensors")


@pytest.mark.parametrize("output", ["o.pt", "o.dcp"])
@pytest.mark.parametrize(("own", "averaged"), [("float16", "float32"), ("float16", "bfloat16")])
def test_averages_keep_a_dtype_of_their_own(folder, output, own, averaged):
    """Half weights beside float32 averages, the usual mixed precision; or of the same size."""
    content = {
        key: {
            name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
            for name, value in net().state_dict().items()
        }
        for key, dtype in (("model", own), ("model_ema", averaged))
    }
    torch.save(content, "train.pt")
    transformed("train.pt", "-o", output)
    for ema, key in ((False, "model"), (True, "model_ema")):
        wide = tensors_of(open_source(output, ema=ema, key=None if ema else "model"))
        for name, value in content[key].items():
            slices = tuple(slice(size) for size in value.shape)
            assert wide[name].dtype == value.dtype
            assert torch.equal(wide[name][slices], value), name


@pytest.mark.parametrize("spec", [SPEC, "nets.py:Peeking"])
def test_averages_get_the_drawn_entries_of_their_weights(folder, spec):
    """With new weights drawn anew for each, the average would be one of another model."""
    weights = net().state_dict()
    torch.save({"model": weights, "model_ema": {n: v + 1 for n, v in weights.items()}}, "t.pt")
    words = ("--model", spec, "--init", "fresh", "--budget", "none", "--memory", "100")
    assert run("transform", "t.pt", "-o", "o.pt", *words).exit_code == 0
    made = torch.load("o.pt", weights_only=True)
    for name in ("0.weight", "3.weight"):
        width = weights[name].shape[1]
        new = [made[key][name][:, width:] for key in ("model", "model_ema")]
        assert new[0].abs().sum() > 0
        assert torch.equal(*new), name
        assert torch.equal(made["model_ema"][name][:, :width], weights[name] + 1)


@pytest.mark.parametrize("write", ["transform", "restore", "fold"])
def test_no_file_of_a_checkpoint_is_written_over(folder, write):
    """Its index, one of its shards: the others would be of no use."""
    source = f"{'in' if write == 'transform' else 'o'}.safetensors.index.json"
    weights = {name: value.clone() for name, value in net().state_dict().items()}
    parts = [
        {n: v for n, v in weights.items() if (n[0] == "0") == first} for first in (True, False)
    ]
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate(parts):
        safetensors.torch.save_file(part, f"in-{number}.safetensors")
        index["weight_map"].update(dict.fromkeys(part, f"in-{number}.safetensors"))
    Path("in.safetensors.index.json").write_text(json.dumps(index))
    transformed("in.safetensors.index.json", "-o", "o.safetensors.index.json")
    files = [source, *sorted(set(json.loads(Path(source).read_text())["weight_map"].values()))]
    os.link(files[-1], "link.pt2" if write == "fold" else "link.safetensors")
    before = contents()
    for output in (*files, "link.pt2" if write == "fold" else "link.safetensors"):
        result = run(write, source, "--model", SPEC, "-o", output)
        assert result.exit_code == 2, result.output
        assert "of the checkpoint" in " ".join(result.stderr.split()) or output == source
    assert contents() == before


@pytest.mark.parametrize("output", ["o.pt", "o.dcp"])
def test_verify_compares_the_weights_that_were_named(folder, output):
    weights = net().state_dict()
    other = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": weights, "model_ema": other, "teacher": other}, "t.pt")
    small = ["--input", "2,3,16,16"]
    for named in (["--key", "teacher"], ["--ema"], ["--key", "model"]):
        transformed("t.pt", "-o", output, *small, *named)
        result = run("verify", "t.pt", output, "--model", SPEC, *named)
        assert result.exit_code == 0, result.output
        transformed("t.pt", "-o", "one.safetensors", *small, *named)
        assert run("verify", "t.pt", "one.safetensors", "--model", SPEC, *named).exit_code == 0
        if output == "o.dcp":
            shutil.rmtree(output)
    transformed("t.pt", "-o", output, *small)
    wrong = run("verify", "t.pt", output, "--model", SPEC, "--ema")
    assert wrong.exit_code == 0, wrong.output


OBJECTS = """
class Settings:
    def __init__(self, width):
        self.width = width
"""


def test_what_was_trusted_is_trusted_on_the_way_back(folder, monkeypatch):
    Path("settings.py").write_text(OBJECTS)
    monkeypatch.syspath_prepend(str(folder))
    settings = importlib.import_module("settings").Settings(3)
    nested = collections.defaultdict(dict, model=net().state_dict())
    torch.save({"nested": nested, "settings": settings}, "s.pt")
    transformed("s.pt", "-o", "o.pt", "--trust")
    for words in (("verify", "s.pt", "o.pt"), ("restore", "o.pt", "-o", "r.pt"),
                  ("fold", "o.pt", "-o", "f.pt2")):  # fmt: skip
        options = ("--model", SPEC, *(() if words[0] == "restore" else ("--input", "1,3,12,12")))
        refused = run(*words, *options)
        assert refused.exit_code == 1
        assert "--trust" in refused.stderr
        told = run(*words, *options, "--trust")
        assert told.exit_code == 0, told.output
    with pytest.raises(CheckpointError, match="trust=True"):
        load("o.pt", net())
    assert torch.equal(load("o.pt", net(), trust=True).eval()(INPUT), net_of("s.pt")(INPUT))
    back = torch.load("r.pt", weights_only=False)
    assert back["settings"].width == 3
    assert type(back["nested"]) is collections.defaultdict
    assert back["nested"].default_factory is dict
    for name, value in nested["model"].items():
        assert torch.equal(back["nested"]["model"][name], value)


def net_of(path: str) -> nn.Module:
    model = net()
    model.load_state_dict(torch.load(path, weights_only=False)["nested"]["model"])
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype_takes_what_was_saved(folder, dtype):
    model = net().eval()
    gm = aim_surgery.transform(model, INPUT)
    aim_surgery.save(gm, "o.safetensors")
    moved = load("o.safetensors", net().eval().to(dtype))
    assert {p.dtype for p in moved.parameters()} == {dtype}
    assert torch.equal(moved(INPUT.to(dtype)), _wide(moved, gm)(INPUT.to(dtype)))
    aim_surgery.save(gm.to(dtype), "moved.safetensors", model_spec=SPEC)
    assert torch.equal(load("moved.safetensors", SPEC).eval()(INPUT.to(dtype)), gm(INPUT.to(dtype)))
    assert load("moved.safetensors", net().eval())(INPUT).dtype == torch.float32
    for words in (("restore", "-o", "r.safetensors"), ("fold", "-o", "f.pt2")):
        told = run(words[0], "moved.safetensors", *words[1:], "--model", SPEC)
        assert told.exit_code == 0, told.output


def _wide(moved: nn.Module, gm: nn.Module) -> nn.Module:
    """The operated model itself, moved."""
    return copy.deepcopy(gm).to(next(moved.parameters()).dtype)


def test_another_models_optimizer_stays_as_it_is(folder):
    """Of two models trained against each other, one is operated on."""
    models = {"generator": net(), "discriminator": nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))}
    content: dict[str, Any] = {name: model.state_dict() for name, model in models.items()}
    inputs = {"generator": INPUT, "discriminator": torch.ones(2, 4)}
    for name, model in models.items():
        optimizer = torch.optim.Adam(model.parameters())
        model(inputs[name]).sum().backward()
        optimizer.step()
        content[f"optimizer_{name[0]}"] = optimizer.state_dict()
    torch.save(content, "gan.pt")
    told = transformed("gan.pt", "-o", "o.pt", "--key", "generator")
    assert "left as it was: optimizer_d, an optimizer's state of another model" in told
    made = torch.load("o.pt")
    assert torch.equal(
        made["optimizer_d"]["state"][0]["exp_avg"], content["optimizer_d"]["state"][0]["exp_avg"]
    )
    wide = made["generator"]["0.weight"].shape
    assert made["optimizer_g"]["state"][0]["exp_avg"].shape == wide
    told = restored("o.pt", "-o", "back.pt", "--key", "generator")
    assert "left as it was: optimizer_d" in told
    back = torch.load("back.pt")
    for name in models:
        assert_same(back[name], content[name])
        state = f"optimizer_{name[0]}"
        assert_same(back[state]["state"][0], content[state]["state"][0])
    del content["optimizer_g"]
    torch.save(content, "one.pt")  # it may be this model's: no guess
    words = ("--model", SPEC, "-o", "o.pt", "--key", "generator")
    assert run("transform", "one.pt", *words).exit_code == 1


def test_a_dry_run_fails_where_the_run_would(folder):
    model = net()
    model(INPUT).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["preconditioner"] = torch.ones(3, 3)
    torch.save({"model": model.state_dict(), "optimizer": state}, "t.pt")
    failed = [run("transform", "t.pt", "--model", SPEC, "-o", "o.pt", *dry)
              for dry in ([], ["--dry-run"])]  # fmt: skip
    assert [result.exit_code for result in failed] == [1, 1]
    assert failed[0].stderr == failed[1].stderr
    assert "preconditioner" in failed[1].stderr
    weights = net().state_dict()
    weights["3.weight"][0] = float("nan")
    torch.save({"model": weights, "epoch": 3}, "nan.pt")
    for output in ("o.safetensors", "o.pt"):
        told = transformed("nan.pt", "-o", output, "--dry-run")
        assert "NaN or Inf, kept: 3.weight" in told
        assert ("not taken along: epoch" in told) == (output == "o.safetensors")
        assert not Path(output).exists()


def test_copies_of_weights_without_names_are_told_of(folder):
    weights = net().state_dict()
    copies = [value.clone() for value in net().parameters()]
    half = {"optimizer_state_dict": {"state": {}, "param_groups": []}, "fp32_from_fp16": [copies]}
    content = {
        "model": weights,
        "ema": {"decay": 0.9, "shadow_params": copies},
        "half": half,
        "rng": [torch.zeros(3, dtype=torch.uint8)],
    }
    torch.save(content, "t.pt")
    told = transformed("t.pt", "-o", "o.pt")
    assert "left as it was: ema.shadow_params, 6 tensors without names" in told
    assert "left as it was: half.fp32_from_fp16.0, 6 tensors without names" in told
    assert "rng" not in told
    shapes = [tuple(value.shape) for value in torch.load("o.pt")["ema"]["shadow_params"]]
    assert shapes == [tuple(value.shape) for value in copies]


def test_a_scheduler_that_is_not_carried_is_told_of(folder):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = {"param_group_field": "lr", "base_values": [0.1], "metric": None}
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "timm": scheduler},
        "t.pt",
    )
    assert "left as it was" not in transformed("t.pt", "-o", "o.pt")
    told = transformed("t.pt", "-o", "o.pt", "--new-group", "own")
    assert "left as it was: timm, a scheduler of another number of groups" in told
    refused = run("transform", "t.pt", "--model", SPEC, "-o", "o.safetensors", "--new-group", "own")
    assert refused.exit_code == 2
    assert "is for a .pt file or a .dcp folder" in " ".join(refused.stderr.split())


def test_a_folder_with_one_checkpoint_is_that_one(folder):
    Path("hf").mkdir()
    Path("hf/config.json").write_text("{}")
    weights = net().state_dict()
    safetensors.torch.save_file(weights, "hf/model.safetensors")
    assert json.loads(run("inspect", "hf", "--json").stdout)["prefix"] == ""
    assert run("plan", "hf", "--model", SPEC).exit_code == 0
    transformed("hf", "-o", "o.safetensors")
    assert_operates("o.safetensors", weights)
    torch.save({"state": {}, "param_groups": []}, "hf/optimizer.pt")  # as a trainer leaves it
    assert set(read_state_dict("hf")) == set(weights)
    transformed("hf/model.safetensors", "-o", "hf/o.safetensors")


def test_sizes_of_tokens_are_of_whole_numbers(folder):
    model = build("nets.py:Tied")
    torch.save(model.state_dict(), "tied.pt")
    words = ("--model", "nets.py:Tied", "--input", "2,7:int64")
    assert run("transform", "tied.pt", "-o", "o.safetensors", *words).exit_code == 0
    gm = load("o.safetensors", "nets.py:Tied")
    assert gm.plan.inputs.args == (("tensor", (2, 7), "int64"),)
    assert run("verify", "tied.pt", "o.safetensors", *words).exit_code == 0


def test_what_a_factory_prints_does_not_mix_with_json(folder):
    Path("loud.py").write_text(FACTORY + "\nprint('loaded')\n\ndef loud():\n    print('built')\n"
                               "    return Net()\n")  # fmt: skip
    for words in (("plan", "net.pt", "--json"), ("transform", "net.pt", "-o", "o.pt", "--json")):
        result = run(*words, "--model", "loud.py:loud")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)
        assert "built" in result.stderr


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("carried", [True, False])
def test_a_run_loses_nothing_through_files(folder, carried):
    """Trained, operated with a memory frozen at zero, trained on, restored, trained on."""
    model = net().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses_of(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "a.pt")
    expected = losses_of(model, optimizer, range(3, 9))

    transformed("a.pt", "-o", "b.pt")
    content, gm = torch.load("b.pt"), load("b.pt", SPEC)
    for name, parameter in gm.aim.named_parameters():
        parameter.requires_grad_(False)
        if name.startswith("memory") or ".out." in name:
            parameter.data.zero_()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    if carried:
        optimizer.load_state_dict(content["optimizer"])
    found = losses_of(gm, optimizer, range(3, 6))
    torch.save({"model": gm.state_dict(), "optimizer": optimizer.state_dict()}, "c.pt")

    assert "restored    exact" in restored("c.pt", "-o", "d.pt")
    content, model = torch.load("d.pt"), net().double()
    model.load_state_dict(content["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(content["optimizer"])
    found += losses_of(model, optimizer, range(6, 9))
    furthest = max(abs(f - e) / e for f, e in zip(found, expected, strict=True))
    assert (furthest < 1e-12) == carried, furthest  # without its state, it is another run


@pytest.mark.parametrize("form", ["concat", "split"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_scripts_own_state_dict_takes_the_plan_along(folder, form, wrapped):
    gm = aim_surgery.lower(aim_surgery.transform(net()), form)
    told = gm.state_dict()
    script = nn.DataParallel(gm) if wrapped else gm
    torch.save(script.state_dict(), "own.pt")
    assert told.keys() == gm.state_dict().keys()  # no key of its own
    found = load("own.pt", SPEC)
    assert (found.plan, found.aim.form) == (gm.plan, form)
    assert not not_equal(dict(found.state_dict()), dict(told))
    assert f"form: {form}" in inspect("own.pt").to_text()
    nn.Module.load_state_dict(gm, torch.load("own.pt") if not wrapped else told)
    with pytest.raises(CheckpointError, match="operated on already"):
        read_state_dict("own.pt")
    torch.save(aim_surgery.fold(gm.eval()).state_dict(), "folded.pt")
    assert inspect("folded.pt").operation is None


def not_equal(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [at]
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [p for k in one for p in not_equal(one[k], other[k], f"{at}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [p for i in range(len(one)) for p in not_equal(one[i], other[i], f"{at}.{i}")]
    return [] if one == other else [at]


def test_the_comparison_of_checkpoints_can_fail():
    one = {"a": [torch.ones(2), 1], "b": "x"}
    assert not_equal(one, {"a": [torch.ones(2), 1], "b": "x"}) == []
    assert not_equal(one, {"a": [torch.zeros(2), 2], "b": "x"}) == [".a.0", ".a.1"]
    assert not_equal(one, {"a": [torch.ones(2), 1]}) == [""]


def test_a_training_run_goes_on(folder):
    """The script's own way to resume, on the operated model, with its optimizer's state."""
    training_checkpoint()
    transformed("train.pt", "-o", "o.pt")
    new = torch.load("o.pt")
    gm = load("o.pt", SPEC)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(new["optimizer"])
    moment = optimizer.state[gm.get_parameter("3.weight")]["momentum_buffer"]
    old = torch.load("train.pt")["optimizer"]["state"][4]["momentum_buffer"]
    assert moment.shape == gm.get_parameter("3.weight").shape
    assert torch.equal(moment[:, : old.shape[1]], old)
    assert old.any()
    assert not moment[:, old.shape[1] :].any()


@pytest.mark.parametrize("output", ["o.onnx", "o.h5"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_names_of_other_formats_are_refused(folder, output, options):
    result = run("transform", "net.pt", "--model", SPEC, "-o", output, *options)
    assert result.exit_code == 1
    assert "is no format that is written: use .safetensors" in result.stderr
    with pytest.raises(CheckpointError, match="no format"):
        aim_surgery.save(aim_surgery.transform(net(), INPUT), output)
    assert not Path(output).exists()


@pytest.mark.parametrize(("group", "groups"), [("0", 1), ("own", 2)])
def test_new_parameters_join_the_group_that_is_named(folder, group, groups):
    training_checkpoint()
    transformed("train.pt", "-o", "o.pt", "--new-group", group)
    before = torch.load("train.pt")["optimizer"]["param_groups"]
    found = torch.load("o.pt")["optimizer"]["param_groups"]
    new = sum(name.startswith("aim.") for name, _ in load("o.pt", SPEC).named_parameters())
    assert new > 0
    assert len(found) == groups
    assert len(found[-1]["params"]) == new + (groups == 1) * len(before[0]["params"])


@pytest.mark.parametrize(("group", "code"), [("first", 2), ("3", 1)])
def test_groups_that_are_none(folder, group, code):
    training_checkpoint()
    words = ("transform", "train.pt", "--model", SPEC, "-o", "o.pt", "--new-group", group)
    assert run(*words).exit_code == code
    assert not Path("o.pt").exists()


def distributed_run() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A run whose script saves with `torch.distributed.checkpoint`, by names."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(INPUT).sum().backward()
    optimizer.step()
    states = get_state_dict(model, optimizer)
    extra = {"epoch": 3, "list": [torch.arange(3), {"deep": torch.ones(2)}], "none": None}
    save_distributed(dict(zip(("model", "optimizer"), states, strict=True)) | extra)
    return model, optimizer


def held_by(path: str) -> Any:
    source: Any = open_source(path)
    return source.content


@pytest.mark.parametrize("output", ["o.dcp", "o.pt"])
def test_a_distributed_checkpoint_keeps_its_layout(folder, output):
    distributed_run()
    transformed("dcp", "-o", output)
    assert_operates(output, read_state_dict("dcp"))
    operation = inspect(output).operation
    assert operation is not None
    assert operation["memory_floats"] == 100
    old, new = held_by("dcp"), held_by(output)
    assert sorted(new) == sorted(old)
    for name in ("epoch", "list", "none"):
        assert not_equal(new[name], old[name]) == []
    moments = [c["optimizer"]["state"]["3.weight"]["exp_avg"] for c in (old, new)]
    assert torch.equal(moments[1][:, : moments[0].shape[1]], moments[0])
    assert "operated on already" in run("transform", output, "--model", SPEC, "-o", "x.pt").stderr

    told = restored(output, "-o", "back.dcp")
    assert "restored    exact" in told
    assert not_equal(held_by("back.dcp"), old) == []
    assert inspect("back.dcp").operation is None
    kept = transformed("dcp", "-o", "o.safetensors")
    assert "not taken along: optimizer, epoch, list, none (a .pt file keeps them)" in kept


@pytest.mark.parametrize("file", ["train.pt", "net.pt", "net.safetensors"])
def test_any_checkpoint_as_a_distributed_one(folder, file):
    training_checkpoint()
    safetensors.torch.save_file(torch.load("net.pt"), "net.safetensors")
    transformed(file, "-o", "o.dcp")
    prefix = "module." if file == "train.pt" else ""
    state = torch.load("train.pt")["model"] if prefix else torch.load("net.pt")
    assert_operates("o.dcp", {n.removeprefix(prefix): v for n, v in state.items()})
    if prefix:
        restored("o.dcp", "-o", "back.pt")
        old, new = torch.load("train.pt"), torch.load("back.pt")
        assert sorted(new) == sorted(old)
        for name in old:
            assert not_equal(by_name(new[name]), by_name(old[name])) == []


def by_name(value: Any) -> Any:
    """With dicts in the order of their keys: a distributed checkpoint has its own."""
    if isinstance(value, dict):
        return {k: by_name(value[k]) for k in sorted(value, key=str)}
    return [by_name(v) for v in value] if isinstance(value, list) else value


def test_a_distributed_run_goes_on(folder):
    """The script's own way to resume: `torch.distributed.checkpoint` into the operated model."""
    _, optimizer = distributed_run()
    transformed("dcp", "-o", "o.dcp")
    gm = aim_surgery.apply(net(), load("o.dcp", SPEC).plan)
    resumed = torch.optim.AdamW(gm.parameters(), lr=0.1)
    weights, moments = get_state_dict(gm, resumed)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        load_distributed(state, checkpoint_id="o.dcp", no_dist=True)
    set_state_dict(
        gm,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    found = resumed.state[gm.get_parameter("3.weight")]
    old = optimizer.state[optimizer.param_groups[0]["params"][4]]
    assert torch.equal(found["exp_avg"][:, : old["exp_avg"].shape[1]], old["exp_avg"])
    assert old["exp_avg"].any()
    assert found["step"] == old["step"] == 1
    assert resumed.state[gm.get_parameter("aim.memory.weight")]["step"] == 0

    # from zeros, a step is the one from nothing
    fresh = torch.optim.AdamW(gm.parameters(), lr=0.1)
    content = held_by("o.dcp")["optimizer"]
    numbers = {name: i for i, (name, _) in enumerate(gm.named_parameters())}
    carried = {numbers[n]: e for n, e in content["state"].items() if not n.startswith("aim.")}
    fresh.load_state_dict(fresh.state_dict() | {"state": carried})
    gm(INPUT).sum().backward()
    before = [p.detach().clone() for p in gm.parameters()]
    after = []
    for one in (resumed, fresh):
        one.step()
        after.append([p.detach().clone() for p in gm.parameters()])
        with torch.no_grad():
            for p, value in zip(gm.parameters(), before, strict=True):
                p.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after[0], before, strict=True))


def test_a_distributed_checkpoint_is_not_replaced(folder):
    transformed("net.pt", "-o", "o.dcp")
    before = contents()
    again = run("transform", "net.pt", "--model", SPEC, "-o", "o.dcp", "--budget", "none")
    assert again.exit_code == 1
    assert "o.dcp: is a folder already, and not replaced: name another" in again.stderr
    assert contents() == before


def test_shared_tensors_stay_shared_in_a_pytorch_file(folder):
    torch.save(build("nets.py:Tied").state_dict(), "tied.pt")
    run("transform", "tied.pt", "--model", "nets.py:Tied", "-o", "o.pt")
    found = torch.load("o.pt")
    assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
    assert load("o.pt", "nets.py:Tied").get_parameter("head.weight").shape == (50, 32)


def test_a_written_pytorch_file_can_be_mapped(folder):
    transformed("net.pt", "-o", "o.pt")
    for value in torch.load("o.pt", mmap=True).values():
        assert value.data_ptr() % 64 == 0


# load ---------------------------------------------------------------------------------------


def test_load_tells_what_became_of_the_factory(folder):
    transformed("net.pt", "-o", "o.safetensors")
    Path("nets.py").write_text(FACTORY.replace("width=8", "width=4").replace("nn.ReLU(),", ""))
    with pytest.raises(CheckpointError) as caught:
        load("o.safetensors", SPEC)
    message = str(caught.value)
    assert "the model that nets.py:Net gives is not the one that was operated on" in message
    assert "2 missing: 2.weight, 2.bias" in message
    assert "0.weight (expected (4, 3, 3, 3), got (8, 3, 3, 3))" in message
    assert "Check the factory" in message


def test_load_in_a_fresh_process(folder):
    torch.manual_seed(0)
    model = build("torchvision:squeezenet1_1", num_classes=3)
    torch.save(model.state_dict(), "s.pt")
    args = ("--model", "torchvision:squeezenet1_1", "--model-args", '{"num_classes": 3}')
    for output in ("o.safetensors", "o.pt"):
        assert run("transform", "s.pt", *args, "-o", output).exit_code == 0
    code = (
        "import torch, aim_surgery\n"
        "one, two = (aim_surgery.load(f).eval() for f in ('o.safetensors', 'o.pt'))\n"
        "x = torch.ones(2, 3, 64, 64)\n"
        "torch.save((one(x), two(x)), 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    expected = model.eval()(torch.ones(2, 3, 64, 64))
    for found in torch.load("out.pt"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "timm:test_vit"])
def test_nothing_asks_the_network(folder, monkeypatch, spec):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"asked the network: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="asked the network"):  # that it can fail
        urllib.request.urlopen("http://localhost:1/weights.pt")
    torch.save(build(spec).state_dict(), "m.pt")
    assert run("transform", "m.pt", "--model", spec, "-o", "o.safetensors").exit_code == 0
    assert run("restore", "o.safetensors", "-o", "back.pt").exit_code == 0
    assert run("inspect", "m.pt").exit_code == 0


# Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["o.safetensors", "o.pt"])
def test_odd_values_are_kept_and_told(folder, output):
    state = net().state_dict()
    state["0.weight"][0, 0, 0, 0] = torch.nan
    state["1.bias"][1] = -torch.inf
    torch.save(state, "odd.pt")
    told = transformed("odd.pt", "-o", output)
    assert "NaN or Inf, kept: " in told
    for name in ("0.weight", "1.bias"):
        assert name in told.partition("kept: ")[2].splitlines()[0]
    found = load(output, SPEC).state_dict()
    assert found["0.weight"][0, 0, 0, 0].isnan()
    assert found["0.weight"].isnan().sum() == 1
    assert found["1.bias"][1] == -torch.inf


# Many files ---------------------------------------------------------------------------------


def test_many_files_one_fails_the_others_go_on(folder):
    Path("in").mkdir()
    for name in ("a.pt", "b.pt", "c.pth"):
        torch.save(net().state_dict(), f"in/{name}")
    Path("in/b.pt").write_bytes(b"PK broken")
    Path("in/readme.txt").write_text("not a checkpoint")
    for words in (("in",), ("in/a.pt", "in/b.pt", "in/c.pth")):
        result = run("transform", *words, "--model", SPEC, "-o", "out", "--budget", "none")
        assert result.exit_code == 1
        assert result.stderr.count("error: in/b.pt: cut short or damaged") == 1
        assert result.stderr.count("\n") == 1
        assert sorted(f.name for f in Path("out").iterdir()) == ["a.safetensors", "c.safetensors"]
        assert result.stdout.count("wrote") == 2
    for name in ("a.pt", "c.pth"):
        assert_operates(f"out/{name[0]}.safetensors", torch.load(f"in/{name}"))
    Path("in/b.pt").unlink()
    assert run("transform", "in", "--model", SPEC, "-o", "new", "--format", "pt").exit_code == 0
    assert sorted(f.name for f in Path("new").iterdir()) == ["a.pt", "c.pt"]


def test_names_in_a_folder(folder):
    Path("in").mkdir()
    for name in ("epoch.1", "epoch.2"):
        safetensors.torch.save_file(net().state_dict(), f"in/{name}.safetensors")
    torch.save(net().state_dict(), "in/LAST.PT")
    save_distributed(dict(net().state_dict()))
    Path("dcp").rename("in/step.3")
    result = run("transform", "in", "--model", SPEC, "-o", "out", "--budget", "none")
    assert result.exit_code == 0, result.output
    assert sorted(f.name for f in Path("out").iterdir()) == [
        f"{name}.safetensors" for name in ("LAST", "epoch.1", "epoch.2", "step.3")
    ]


@pytest.mark.parametrize("output", ["new/", "deep/er/", "there", "there/", "./there", "v1.0/"])
def test_one_checkpoint_goes_into_a_folder(folder, output):
    Path("there").mkdir()
    assert f"wrote       {Path(output) / 'net.safetensors'}" in transformed("net.pt", "-o", output)
    assert_operates(Path(output) / "net.safetensors", torch.load("net.pt"))
    transformed("net.pt", "-o", output, "--format", "pt")
    file = Path(output) / "net.pt"
    assert_operates(file, torch.load("net.pt"))
    Path("net.pt").unlink()
    restored(str(file), "-o", "./")
    assert inspect("net.pt").operation is None
    assert run("fold", str(file), "--model", SPEC, "-o", output).exit_code == 0
    assert file.with_suffix(".pt2").is_file()
    itself = run("restore", str(file), "--model", SPEC, "-o", output)
    assert (itself.exit_code, "itself" in itself.stderr) == (2, True)


def test_a_dry_run_makes_no_folder(folder):
    before = contents()
    for output in ("new/", "deep/er/"):
        assert f"would write {output}net.s" in transformed("net.pt", "-o", output, "--dry-run")
    assert contents() == before
    assert not Path("new").exists()
    assert not Path("deep").exists()


def test_capital_letters_say_the_same(folder):
    transformed("net.pt", "-o", "O.PT")
    assert_operates("O.PT", torch.load("net.pt"))
    assert "aim.memory.weight" in torch.load("O.PT")


def test_json_and_dry_run(folder):
    before = contents()
    result = run("transform", "net.pt", "--model", SPEC, "-o", "o.safetensors", "--dry-run")
    assert result.stdout.startswith("would write o.safetensors\n")
    assert contents() == before
    many = ("net.pt", "gone.pt", "--model", SPEC, "-o", "out", "--json", "--budget", "none")
    result = run("transform", *many)
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert [one["ok"] for one in told] == [True, False]
    assert told[0]["output"] == "out/net.safetensors"
    assert told[0]["reads"] == 2
    assert told[1]["error"] == "gone.pt: no such file"


@pytest.mark.parametrize("words", [["--include", "typo"], ["--budget", "1e-9"]])
def test_what_no_weights_change_is_refused_without_reading_them(folder, monkeypatch, words):
    asked = []
    original = operated_module.open_original

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("values", False))
        return original(*args, **kwargs)

    monkeypatch.setattr(operated_module, "open_original", watched)
    for command in (["transform"], ["transform", "--dry-run"]):
        result = run(*command, "net.pt", "-o", "o.pt", "--model", SPEC, *words)
        assert result.exit_code == 1
        assert words[0].strip("-") in result.stderr
    assert asked
    assert not any(asked)


def test_misuse_of_many_files(folder):
    Path("empty").mkdir()
    Path("more").mkdir()
    torch.save(net().state_dict(), "more/net.pth")
    two = ("net.pt", "more/net.pth", "--model", SPEC)
    result = run("transform", *two, "-o", "o.safetensors")
    assert result.exit_code == 2
    assert "name a folder for 2 checkpoints" in " ".join(result.stderr.split())
    assert (
        "would both be written to out/net.safetensors" in run("transform", *two, "-o", "out").stderr
    )
    one = run("transform", "net.pt", "--model", SPEC, "-o", "o.pt", "--format", "shards")
    assert one.exit_code == 2
    assert "the name after -o says what to write" in " ".join(one.stderr.split())
    assert "without checkpoints" in run("transform", "empty", "--model", SPEC, "-o", "x").stderr
    assert run("transform", "net.pt", "--model", SPEC, "-o", "./net.pt").exit_code == 2
    os.link("net.pt", "link.pt")
    assert (
        "is the checkpoint itself"
        in run("transform", "net.pt", "--model", SPEC, "-o", "link.pt").stderr
    )


# inspect ------------------------------------------------------------------------------------


def test_inspect(folder):
    training_checkpoint()
    told = run("inspect", "train.pt").stdout
    assert "under 'model': 9 tensors" in told
    assert "prefix 'module.'" in told
    assert "also        weights under 'model_ema': 10 tensors" in told
    assert "epoch: 7" in told
    assert "optimizer: optimizer state of 6 parameters" in told
    assert "operated    no" in told
    transformed("train.pt", "-o", "o.pt", "--drop-optimizer")
    told = run("inspect", "o.pt", "--keys").stdout
    assert f"operated    yes, by aim-surgery {aim_surgery.__version__}:" in told
    torch.save(load("o.pt", SPEC).state_dict(), "own.pt")  # by a script
    assert f"by aim-surgery {aim_surgery.__version__}:" in run("inspect", "own.pt").stdout
    assert "memory of 100 floats, 2 reads" in told
    assert f"model       {SPEC}" in told
    assert "module.aim.memory.weight" in told
    found = json.loads(run("inspect", "o.pt", "--json").stdout)
    assert found["operated"]["memory_floats"] == 100
    assert "every name and shape" in run("inspect", "train.pt", "--model", SPEC).stdout
    assert "0.weight (expected" in run("inspect", "train.pt", "--model", SPEC, "--model-args",
        '{"width": 4}').stdout  # fmt: skip
    assert "ambiguous.pt: no such file" in run("inspect", "ambiguous.pt").stderr
    torch.save({"a": net().state_dict(), "b": net().state_dict()}, "two.pt")
    assert "choose with --key" in run("inspect", "two.pt").stdout
    assert "under 'b'" in run("inspect", "two.pt", "--key", "b").stdout


@pytest.mark.parametrize("words", [["--help"], ["transform", "--help"], ["--version"],
    ["inspect", "net.pt"], ["inspect", "net.safetensors"]])  # fmt: skip
def test_answers_without_torch(folder, words):
    safetensors.torch.save_file(torch.load("net.pt"), "net.safetensors")
    code = (
        "import sys\nfrom aim_surgery import cli\n"
        "try:\n    cli.app(sys.argv[1:])\nexcept SystemExit as err:\n    assert not err.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


@pytest.mark.parametrize(("spec", "args"), [
    ("torchvision:resnet18", {}), ("torchvision:resnet18", {"num_classes": 12}),
])  # fmt: skip
def test_inspect_gives_a_hint_at_known_models(folder, spec, args):
    state = prefixed(build_skeleton(spec, args).state_dict(), "module.")
    entries = {name: entry_of(value) for name, value in state.items()}
    told = [spec + (f""" --model-args '{json.dumps(args)}'""" if args else "")]
    assert [m for m in models_that_fit(entries, "module.") if "torchvision" in m] == told
    entries["module.layer1.0.conv1.weight"] = Entry((64, 64, 5, 5), "float32")
    assert models_that_fit(entries, "module.") == []


@pytest.mark.parametrize(("spec", "args"), [
    ("timm:vit_tiny_patch16_224", {"num_classes": 12}),
    ("timm:convnextv2_atto", {}),
    ("timm:swinv2_tiny_window8_256", {"num_classes": 3}),
])  # fmt: skip
def test_inspect_knows_timms_models(folder, spec, args):
    torch.save({"state_dict": build(spec, **args).state_dict()}, "m.pt")
    told = spec + (f""" --model-args '{json.dumps(args)}'""" if args else "")
    assert told in inspect("m.pt").candidates
    line = next(s for s in run("inspect", "m.pt").stdout.splitlines() if "may be" in s)
    assert told in line
    assert TABLE.stat().st_size < 300_000  # it is read at every look


def test_a_bar_is_drawn_for_a_terminal_alone(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli_output.progress_bar("o.safetensors", shown=True) as begin:
            advance = begin(1000)
            advance(600)
        assert ("o.safetensors" in stream.getvalue()) == shown
