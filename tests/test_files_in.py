"""Checkpoints of every kind and layout come in, every key accounted for, and nothing runs."""

import argparse
import collections
import datetime
import functools
import json
import os
import pathlib
import pickle
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from aim_surgery.checkpoint.inspect import inspect
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.skeleton import build_skeleton
from aim_surgery.checkpoint.open import open_model
from aim_surgery.checkpoint.operated import operate_checkpoint
from aim_surgery.checkpoint.reading.kinds import open_source, read_state_dict
from aim_surgery.checkpoint.reading.names import common_prefix, match_names
from aim_surgery.checkpoint.reading.source import Entry, item_bytes
from aim_surgery.errors import AimSurgeryError, CheckpointError

FACTORY = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.Conv2d(width, 6, 3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.middle(self.embedding(tokens))))

class Peeking(Net):
    def __init__(self):
        super().__init__()
        assert self[0].weight.abs().sum().item() > 0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("nets.py").write_text(FACTORY)
    return tmp_path


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3)
    )


def assert_same(found, expected) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def prefixed(state, prefix: str):
    return {prefix + name: value for name, value in state.items()}


# Containers ---------------------------------------------------------------------------------


def write_shards(state, folder: Path, *, torch_files: bool = False) -> Path:
    names = list(state)
    parts = {"a": names[:3], "b": names[3:]}
    files = {}
    for part, its in parts.items():
        file = f"model-{part}" + (".bin" if torch_files else ".safetensors")
        tensors = {name: state[name] for name in its}
        if torch_files:
            torch.save(tensors, folder / file)
        else:
            safetensors.torch.save_file(tensors, folder / file)
        files.update(dict.fromkeys(its, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


@pytest.mark.parametrize("torch_files", [False, True])
def test_shards_of_either_kind(folder, torch_files):
    state = net().state_dict()
    index = write_shards(state, folder, torch_files=torch_files)
    assert_same(read_state_dict(index), state)
    assert_same(read_state_dict(folder), state)  # the folder of one index
    assert "2 shards" in inspect(index).kind


def test_shards_and_index_must_agree(folder):
    state = net().state_dict()
    index = write_shards(state, folder)
    told = json.loads(index.read_text())

    def message(weight_map) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError) as caught:
            open_source(index)
        return str(caught.value)

    less = {n: f for n, f in told["weight_map"].items() if n != "0.weight"}
    assert "does not agree with model-a.safetensors about 0.weight" in message(less)
    assert "about stranger" in message(told["weight_map"] | {"stranger": "model-a.safetensors"})
    assert "shards are missing: gone" in message(told["weight_map"] | {"0.bias": "gone"})
    assert "outside its folder: '../x'" in message({"w": "../x"})
    assert "outside its folder" in message({"w": str(folder / "model-a.safetensors")})
    assert "names no tensor" in message({})
    assert "is no index of shards" in message([])
    index.write_text("{")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        open_source(index)


def save_distributed(content) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        dcp.state_dict_saver.save(content, checkpoint_id="dcp", no_dist=True)


@pytest.mark.parametrize("nested", [False, True])
def test_distributed_checkpoints(folder, nested):
    state = net().state_dict()
    content = {"model": state, "epoch": 3} if nested else dict(state)
    save_distributed(content)
    assert_same(read_state_dict("dcp"), state)
    found = inspect("dcp")
    assert found.entries == open_source("dcp").entries
    assert found.where == ("model" if nested else "")


def test_a_distributed_checkpoint_that_would_run_code(folder):
    save_distributed(net().state_dict())
    Path("dcp/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        CheckpointError, match=r"\.metadata: holds a pickled object of posix\.system"
    ):
        read_state_dict("dcp")
    assert not Path("ran").exists()


def test_exported_programs_need_no_model(folder):
    model = net().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 12, 12),))
    torch.export.save(program, "net.pt2")
    assert_same(read_state_dict("net.pt2"), model.state_dict())
    assert inspect("net.pt2").entries == open_source("net.pt2").entries
    operated = operate_checkpoint(open_source("net.pt2"), None)
    assert len(operated.plan.reads) == 2
    assert isinstance(open_model("net.pt2", None), torch.export.ExportedProgram)


# Layouts ------------------------------------------------------------------------------------

OTHERS = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "module"])
def test_usual_keys_are_found(folder, key):
    state = net().state_dict()
    torch.save({key: state, **OTHERS}, "c.pt")
    assert_same(read_state_dict("c.pt"), state)


def test_an_unusual_key_is_found_where_it_is_the_only_one(folder):
    state = net().state_dict()
    torch.save({"my_weights": state, **OTHERS}, "c.pt")
    assert_same(read_state_dict("c.pt"), state)


def test_key_names_a_place(folder):
    one, two = net().state_dict(), net().state_dict()
    torch.save({"a": {"gen": one, "disc": two}, "x.y": two}, "c.pt")
    with pytest.raises(CheckpointError, match=r"'a\.gen' and 'a\.disc' and 'x\.y'; choose with"):
        read_state_dict("c.pt")
    assert_same(read_state_dict("c.pt", key="a.disc"), two)
    assert_same(read_state_dict("c.pt", key="x.y"), two)
    with pytest.raises(CheckpointError, match=r"has nothing at 'b'; there are a\.gen, a\.disc"):
        read_state_dict("c.pt", key="b")
    with pytest.raises(CheckpointError, match="'a' is a dict with 'gen', 'disc', not a state dict"):
        read_state_dict("c.pt", key="a")


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "params_ema"])
def test_averaged_weights_are_taken_when_asked_for(folder, key):
    plain, averaged = net().state_dict(), net().state_dict()
    torch.save({"state_dict": plain, key: averaged}, "c.pt")
    assert_same(read_state_dict("c.pt"), plain)
    assert_same(read_state_dict("c.pt", ema=True), averaged)
    torch.save({"state_dict": plain}, "c.pt")
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        read_state_dict("c.pt", ema=True)
    torch.save({key: averaged}, "c.pt")
    with pytest.raises(CheckpointError, match=r"averaged weights alone.*--ema"):
        read_state_dict("c.pt")


def test_averaged_models_of_torch_are_read_with_their_counter(folder):
    averaged = torch.optim.swa_utils.AveragedModel(net())
    torch.save({"model_ema": averaged.state_dict()}, "c.pt")
    model = open_model("c.pt", "nets.py:Net", ema=True)
    assert_same(model.state_dict(), averaged.module.state_dict())


PREFIXES = ["module.", "_orig_mod.", "_orig_mod.module.", "module.module._forward_module.", "net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_stack_of_prefixes(folder, prefix):
    state = net().state_dict()
    torch.save(prefixed(state, prefix), "c.pt")
    names = match_names(net().state_dict(keep_vars=True), open_source("c.pt").entries)
    assert (names.prefix, names.problems) == (prefix, ())
    assert_same(open_model("c.pt", "nets.py:Net").state_dict(), state)


def test_wrappers_in_between(folder):
    wrapped = {
        n.replace("1.", "1._orig_mod.").replace("3.", "_fsdp_wrapped_module.3."): v
        for n, v in net().state_dict().items()
    }
    torch.save(wrapped, "c.pt")
    assert_same(
        open_model("c.pt", "nets.py:Net").state_dict(),
        net().state_dict() | dict(zip(net().state_dict(), wrapped.values(), strict=True)),
    )


def test_a_prefix_that_not_all_have_is_told(folder):
    state = prefixed(net().state_dict(), "model.") | {"loss.weight": torch.ones(2)}
    torch.save(state, "c.pt")
    with pytest.raises(CheckpointError, match=r"1 unexpected: loss\.weight"):
        open_model("c.pt", "nets.py:Net")


def test_common_prefix():
    assert common_prefix(["module._orig_mod.a.b", "module._orig_mod.c"]) == "module._orig_mod."
    assert common_prefix(["module.a", "b"]) == ""
    assert common_prefix([]) == ""


@pytest.mark.parametrize("file", ["c.pt", "c.safetensors"])
def test_shared_tensors(folder, file):
    state = build("nets.py:Tied").state_dict()
    if file == "c.pt":
        torch.save(state, file)
    else:  # as transformers stores them: once
        safetensors.torch.save_file({n: v for n, v in state.items() if n != "head.weight"}, file)
    model = open_model(file, "nets.py:Tied")
    assert model.head.weight is model.embedding.weight
    operated = operate_checkpoint(open_source(file), "nets.py:Tied")
    assert operated.aliases == {"head.weight": "embedding.weight"}
    assert torch.equal(operated.tensor("embedding.weight"), state["embedding.weight"])
    torch.save(state | {"head.weight": state["head.weight"] + 1}, "c.pt")
    with pytest.raises(CheckpointError, match="are one tensor in the model"):
        operate_checkpoint(open_source("c.pt"), "nets.py:Tied")


def test_a_factory_that_looks_at_its_weights(folder):
    state = net().state_dict()
    torch.save(state, "c.pt")
    with pytest.raises(AimSurgeryError):
        build_skeleton("nets.py:Peeking", {})
    operated = operate_checkpoint(open_source("c.pt"), "nets.py:Peeking")
    assert torch.equal(operated.tensor("0.bias"), state["0.bias"])
    assert torch.equal(operated.tensor("0.weight")[:, :3], state["0.weight"])


def test_a_skeleton_keeps_ties_and_leaves_torch_as_it_was(folder):
    before = nn.Module.register_parameter
    model = build_skeleton("nets.py:Tied", {})
    assert model.get_parameter("head.weight") is model.get_parameter("embedding.weight")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert nn.Module.register_parameter is before
    assert nn.Linear(2, 2).weight.device.type == "cpu"


# dtypes and odd values ----------------------------------------------------------------------

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, *FLOAT8])
@pytest.mark.parametrize("file", ["c.pt", "c.safetensors"])
def test_dtypes_are_kept(folder, dtype, file):
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in net().state_dict().items()}
    (torch.save if file == "c.pt" else safetensors.torch.save_file)(state, file)
    operated = operate_checkpoint(open_source(file), "nets.py:Net")
    for name, value in state.items():
        made = operated.tensor(name)
        assert made.dtype == value.dtype
        if made.shape != value.shape:
            made, new = made.split([value.shape[1], made.shape[1] - value.shape[1]], 1)
            assert not new.float().any()
        assert torch.equal(made.float(), value.float()), name
    memory = operated.tensor("aim.memory.weight")
    assert memory.dtype == (torch.float32 if dtype in FLOAT8 else dtype)


def test_quantized_weights_are_refused(folder):
    state = net().state_dict() | {"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.int8)}
    torch.save(state, "c.pt")
    with pytest.raises(
        CheckpointError, match=r"quantized\?: 0\.weight \(expected float32, got int8"
    ):
        operate_checkpoint(open_source("c.pt"), "nets.py:Net")


def test_item_bytes():
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2,
        torch.complex64, torch.uint8, torch.float8_e4m3fnuz, torch.complex128):  # fmt: skip
        assert item_bytes(str(dtype).removeprefix("torch.")) == dtype.itemsize
    assert Entry((2, 3), "bfloat16").nbytes == 12


ODD_KEYS = ["ключ.вес", "a/b\\c", "with space.w", "new\nline", "'\"", "a..b", "__proto__", "键"]


@pytest.mark.parametrize("file", ["c.pt", "c.safetensors"])
def test_keys_of_odd_characters(folder, file):
    state = {name: torch.randn(2) for name in ODD_KEYS}
    (torch.save if file == "c.pt" else safetensors.torch.save_file)(state, file)
    assert_same(read_state_dict(file), state)
    assert set(inspect(file).entries) == set(ODD_KEYS)


# What would run -----------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Custom(nn.Linear):
    pass


def _evil_exported(path: str) -> None:
    program = torch.export.export(net().eval(), (torch.randn(2, 3, 12, 12),))
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    inputs = next(name for name in records if "sample_inputs" in name)
    torch.save(Evil(), "evil.bin")
    records[inputs] = Path("evil.bin").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)


EVIL = {
    "evil.pt": lambda path: torch.save({"w": torch.ones(2), "x": Evil()}, path),
    "legacy.pt": lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False),
    "plain.pt": lambda path: Path(path).write_bytes(pickle.dumps({"w": Evil()})),
    "evil.pt2": _evil_exported,
}


@pytest.mark.parametrize("name", EVIL)
def test_nothing_runs_without_trust(folder, name):
    EVIL[name](name)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(name)
    assert name in str(caught.value)
    if name not in ("plain.pt", "legacy.pt"):
        assert "posix.system" in str(caught.value)
    try:
        inspect(name)
    except CheckpointError:
        assert name == "plain.pt"  # no file of torch.save
    assert not Path("ran").exists()


def test_the_evil_files_are_evil(folder):
    torch.save({"w": torch.ones(2), "x": Evil()}, "evil.pt")
    torch.load("evil.pt", weights_only=False)
    assert Path("ran").exists()


def test_a_refusal_names_the_class_and_the_ways(folder):
    torch.save(Custom(2, 2), "module.pt")
    with pytest.raises(CheckpointError, match=r"test_files_in\.Custom.*state_dict\(\).*--trust"):
        read_state_dict("module.pt")
    assert "test_files_in.Custom" in inspect("module.pt").to_text()


def test_trust_reads_modules(folder):
    model = net()
    torch.save(model, "module.pt")
    assert_same(read_state_dict("module.pt", trust=True), model.state_dict())
    assert len(operate_checkpoint(open_source("module.pt", trust=True), None).plan.reads) == 2
    assert "holds a test_files_in.Custom" in _problem_of(Custom(2, 2))
    assert "'model': test_files_in.Custom" in _problem_of({"model": Custom(2, 2)})


def _problem_of(content):
    torch.save(content, "content.pt")
    return inspect("content.pt").to_text().replace("tests.", "")


BESIDE = {
    "args": argparse.Namespace(lr=0.1, output=Path("runs")),
    "best": np.float64(76.1),
    "rng": {"numpy": np.arange(5, dtype=np.uint32), "names": np.array(["a", "bc"])},
    "counts": collections.Counter("aab"),
    "started": datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC),
    "more": types.SimpleNamespace(a=1),
}


def test_plain_data_beside_the_weights_needs_no_trust(folder):
    model = net()
    torch.save({"model": model.state_dict(), **BESIDE}, "run.pt")
    assert_same(read_state_dict("run.pt"), model.state_dict())
    found = inspect("run.pt")
    assert found.foreign == ()
    assert "--trust" not in found.to_text()
    source: Any = open_source("run.pt")
    content = source.content
    assert content["args"] == BESIDE["args"]
    for name, expected in BESIDE["rng"].items():
        np.testing.assert_array_equal(content["rng"][name], expected)
    assert {name: content[name] for name in BESIDE if name != "rng"} == {
        name: value for name, value in BESIDE.items() if name != "rng"
    }


def renamed_paths(monkeypatch):
    """Files are written as Python 3.13 writes them, or all others, whichever runs here."""
    here = Path().__class__.__module__
    other = {"pathlib": "pathlib._local", "pathlib._local": "pathlib"}[here]
    monkeypatch.setattr(type(Path()), "__module__", other)
    monkeypatch.setitem(sys.modules, other, pathlib)
    return other


def test_paths_by_the_names_of_another_python(folder, monkeypatch):
    state = net().state_dict()
    with monkeypatch.context() as patch:
        other = renamed_paths(patch)
        torch.save({"model": state, "args": argparse.Namespace(output=Path("runs"))}, "run.pt")
        save_distributed({"model": state})
        metadata = pickle.loads(Path("dcp/.metadata").read_bytes())
        metadata.storage_meta.checkpoint_id = Path("dcp")
        Path("dcp/.metadata").write_bytes(pickle.dumps(metadata))
    for file in ("run.pt", "dcp"):
        raw = Path("dcp/.metadata" if file == "dcp" else file).read_bytes()
        assert other.encode() + (b"\n" if file == "run.pt" else b"") in raw
        assert_same(read_state_dict(file), state)
        assert inspect(file).foreign == ()


def test_foreign_classes_of_a_distributed_checkpoint_are_told(folder):
    save_distributed({"model": net().state_dict()})
    metadata = pickle.loads(Path("dcp/.metadata").read_bytes())
    metadata.storage_meta = Evil()
    Path("dcp/.metadata").write_bytes(pickle.dumps(metadata))
    found = inspect("dcp")
    assert found.foreign == ("posix.system",)
    assert "posix.system" in found.to_text()
    assert "--trust" not in found.to_text()  # which doesn't read them either
    assert not Path("ran").exists()


def _with_cleared_flags() -> Any:
    """An array of objects whose dtype says that it holds none: its values would be pointers."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self):
            how, args, (version, shape, _, order, values) = np.array([1], object).__reduce__()
            return how, args, (version, shape, Dtype(), order, values)

    return Array()


STRANGERS = {
    "numpy.dtypes.ObjectDType": lambda: np.array([Evil()], dtype=object),
    "numpy.dtypes.ObjectDType ": _with_cleared_flags,
    "numpy.dtypes.VoidDType": lambda: np.zeros(2, dtype=[("a", "i4")]),
    "posix.system": lambda: {"a": Evil()},
    "posix.system ": lambda: argparse.Namespace(a=Evil()),
    "functools.partial": lambda: functools.partial(print, "ran"),
    "collections.defaultdict": lambda: collections.defaultdict(list, {"loss": [1.0]}),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_plain_data_does_not_let_others_in(folder, name):
    torch.save({"weights": {"w": torch.ones(2)}, "x": STRANGERS[name]()}, "others.pt")
    with pytest.raises(CheckpointError, match=re.escape(name.strip())):
        read_state_dict("others.pt")
    assert name.strip() in inspect("others.pt").foreign
    assert not Path("ran").exists()


def test_a_zip_bomb_is_refused(folder):
    torch.save({"w": torch.zeros(1000)}, "c.pt")
    with zipfile.ZipFile("c.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in records.items():
            archive.writestr(name, b"\0" * 50_000_000 if name.endswith("data/0") else raw)
    assert Path("bomb.pt").stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"is compressed .* in a file of"):
        read_state_dict("bomb.pt")


def test_weights_and_no_model(folder):
    torch.save(net().state_dict(), "c.pt")
    with pytest.raises(CheckpointError, match="name it with --model"):
        operate_checkpoint(open_source("c.pt"), None)


def test_a_checkpoint_of_another_architecture(folder):
    torch.save(net(width=4).state_dict(), "c.pt")
    with pytest.raises(CheckpointError, match=r"0\.weight \(expected \(8, 3, 3, 3\), got \(4,"):
        operate_checkpoint(open_source("c.pt"), "nets.py:Net")


@pytest.mark.parametrize("file", ["c.pt", "c.safetensors"])
def test_an_empty_state_dict(folder, file):
    if file == "c.pt":
        torch.save({}, file)
        with pytest.raises(CheckpointError, match="holds nothing"):
            read_state_dict(file)
        return
    safetensors.torch.save_file({}, file)
    with pytest.raises(CheckpointError, match=r"missing: 0\.weight"):
        operate_checkpoint(open_source(file), "nets.py:Net")
