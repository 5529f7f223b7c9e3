import argparse
import copy
import json
import pickle
import re
import stat
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from torch import nn

from aim_surgery import AimConfig, __version__, apply, plan, transform
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.loading import load_into
from aim_surgery.checkpoint.open import open_model, open_plan
from aim_surgery.checkpoint.reading.kinds import read_state_dict
from aim_surgery.checkpoint.reading.safetensors_file import CRC_KEY
from aim_surgery.checkpoint.save import save
from aim_surgery.checkpoint.writing.atomic import check_target, replacing
from aim_surgery.errors import AimSurgeryError, CheckpointError, ModelSpecError
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.planning import Plan

CONFIG = AimConfig(memory=64, budget=None, init="fresh")  # fresh, so that the memory counts

FACTORY = """
from torch import nn

def small(width: int = 4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 3))
"""


def small(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 3))


class TiedLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(F.relu(self.layer(self.embedding(tokens))))


class Renamed(nn.Module):
    """Its first version called its weight `old`, as a loading hook knows."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.new = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict, prefix, local_metadata, *args
    ):
        if local_metadata["version"] == 1:
            state_dict[prefix + "new"] = state_dict.pop(prefix + "old")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def operated() -> AimGraphModule:
    return transform(small(), IMAGE, config=CONFIG)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def files_in(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


# Reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "legacy.pt", "w.safetensors"])
def test_reads_state_dicts(tmp_path, name):
    expected = state_of(small())
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(expected, path)
        expected = dict(sorted(expected.items()))
    else:
        torch.save(expected, path, _use_new_zipfile_serialization=path.stem != "legacy")
    found = read_state_dict(path)
    assert_same_state(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_tells_the_format_from_the_content_not_from_the_name(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "really_safetensors.bin")
    assert torch.equal(read_state_dict(tmp_path / "really_safetensors.bin")["w"], torch.ones(2))


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_reads_the_state_dict_in_a_training_checkpoint(tmp_path, key):
    expected = state_of(small())
    torch.save({key: expected, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    assert_same_state(read_state_dict(tmp_path / "w.pt"), expected)


def test_a_parameter_may_be_called_model(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "w.pt")
    assert list(read_state_dict(tmp_path / "w.pt")) == ["model"]


def test_reading_writes_nothing_and_maps_privately(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "w.pt")
    before = files_in(tmp_path)
    read_state_dict(tmp_path / "w.pt")["w"].zero_()
    assert files_in(tmp_path) == before


class Custom(nn.Linear):
    pass


def _truncated(path: Path, part: float, **options: bool) -> None:
    torch.save(nn.Linear(50, 50).state_dict(), path, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def _truncated_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])


BAD_FILES = {
    "missing.pt": (lambda path: None, "no such file"),
    "folder.pt": (Path.mkdir, "is a folder"),
    "empty.pt": (Path.touch, "is empty"),
    "empty.safetensors": (Path.touch, "is empty"),
    "begun.pt": (lambda path: _truncated(path, 0.01), "cut short"),
    "half.pt": (lambda path: _truncated(path, 0.5), "cut short"),
    "most.pt": (lambda path: _truncated(path, 0.99), "cut short"),
    "legacy.pt": (
        lambda path: _truncated(path, 0.7, _use_new_zipfile_serialization=False),
        "cut short",
    ),
    "cut.safetensors": (_truncated_safetensors, "cut short or damaged"),
    "header.safetensors": (lambda path: path.write_bytes(b"\x01"), "cut short or damaged"),
    "text.pt": (lambda path: path.write_text("hello, world\n" * 9), "not a checkpoint"),
    "picture.pt": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 9), "not a checkpoint"),
    "noise.safetensors": (lambda path: path.write_text("hello\n" * 9), "cut short or damaged"),
    "pickle.pt": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "not a checkpoint"),
    "torchscript.pt": (
        lambda path: torch.jit.save(_scripted(), str(path)),
        "TorchScript archive.*model.state_dict()",
    ),
    "module.pt": (
        lambda path: torch.save(Custom(2, 2), path),
        r"pickled object of [\w.]*test_checkpoint\.Custom.*model\.state_dict\(\)",
    ),
    "nested_module.pt": (
        lambda path: torch.save({"model": nn.Linear(2, 2)}, path),
        r"pickled object of torch\.nn\.modules\.linear\.Linear",
    ),
    "arguments.pt": (
        lambda path: torch.save({"args": argparse.Namespace(a=1)}, path),
        r"not only tensors \('args': Namespace\)",
    ),
    "tensor.pt": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, not a state dict"),
    "list.pt": (lambda path: torch.save([torch.ones(3)], path), "holds a list"),
    "nothing.pt": (lambda path: torch.save({}, path), "holds nothing"),
    "numbers.pt": (
        lambda path: torch.save({"weight": torch.ones(2), "epoch": 3}, path),
        r"not only tensors \('epoch': int\)",
    ),
    "numbered.pt": (lambda path: torch.save({0: torch.ones(2)}, path), "0: Tensor"),
    "two.pt": (
        lambda path: torch.save(
            {"model": {"v": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, path
        ),
        "under 'model' and 'state_dict'; choose with --key",
    ),
}


def _scripted() -> torch.jit.ScriptModule:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated; its files are still around
        return torch.jit.script(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_names_what_is_wrong_with_a_file(tmp_path, name):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1)}, path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"w\.pt: cannot be read: Permission denied"):
        read_state_dict(path)


def test_an_operated_model_is_not_a_checkpoint_to_operate(tmp_path):
    save(operated(), tmp_path / "aim.safetensors")
    with pytest.raises(CheckpointError, match="operated on already"):
        read_state_dict(tmp_path / "aim.safetensors")


# Loading into a model -----------------------------------------------------------------------


def test_loads_every_value_and_also_non_finite_ones():
    given = state_of(small())
    given["0.weight"][0, 0, 0, 0] = torch.nan
    given["0.weight"][0, 0, 0, 1] = torch.inf
    model = small()
    load_into(model, given, "w.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, given[name], rtol=0, atol=0, equal_nan=True)


def test_lists_every_kind_of_misfit_and_leaves_the_model_unchanged():
    model = small()
    before = state_of(model)
    given = state_of(small(width=6)) | {"extra.weight": torch.ones(1)}
    del given["1.running_mean"], given["2.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_into(model, given, "w.pt")
    message = str(caught.value)
    assert "w.pt: does not fit Sequential" in message
    assert "2 missing: 1.running_mean, 2.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "0.weight (expected (4, 3, 3, 3), got (6, 3, 3, 3))" in message
    assert_same_state(state_of(model), before)


def test_lists_ten_of_many():
    given = {f"extra.{i}": torch.ones(1) for i in range(25)}
    model = small()
    with pytest.raises(CheckpointError, match=r"25 unexpected: .*extra\.9 and 15 more"):
        load_into(model, state_of(model) | given, "w.pt")


def test_a_tied_tensor_may_come_under_one_name():
    given = state_of(TiedLM())
    del given["head.weight"]
    model = TiedLM()
    load_into(model, given, "w.pt")
    assert torch.equal(model.head.weight, given["embedding.weight"])
    assert model.head.weight is model.embedding.weight


def test_a_tied_tensor_cannot_take_two_values():
    given = state_of(TiedLM())
    given["head.weight"] += 1
    model = TiedLM()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=r"embedding\.weight and head\.weight are one tensor"):
        load_into(model, given, "w.pt")
    assert_same_state(state_of(model), before)


def test_tied_names_with_equal_values_and_nan_are_one():
    given = state_of(TiedLM())
    given["head.weight"][0] = torch.nan
    given["embedding.weight"][0] = torch.nan
    model = TiedLM()
    load_into(model, given, "w.pt")
    assert model.head.weight[0].isnan().all()


def test_old_layouts_load_as_the_model_itself_converts_them():
    given = OrderedDict(old=torch.ones(2))
    given._metadata = {"": {"version": 1}}  # pyright: ignore[reportAttributeAccessIssue]
    model = Renamed()
    load_into(model, given, "w.pt")
    assert torch.equal(model.new, torch.ones(2))


def test_files_without_module_versions_are_of_the_current_one(tmp_path):
    safetensors.torch.save_file({"new": torch.ones(2)}, tmp_path / "w.safetensors")
    model = Renamed()  # would raise without a version
    load_into(model, read_state_dict(tmp_path / "w.safetensors"), "w.safetensors")
    assert torch.equal(model.new, torch.ones(2))


def test_module_versions_survive_reading(tmp_path):
    torch.save(Renamed().state_dict(), tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt")._metadata[""]["version"] == 2  # pyright: ignore[reportAttributeAccessIssue]


# Round trips --------------------------------------------------------------------------------


def _channels_last() -> nn.Module:
    return small().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


TOKENS = torch.arange(10).reshape(2, 5)
ROUND_TRIPS = {
    "convolutions": (small, IMAGE),
    "tied": (TiedLM, TOKENS),
    "channels_last": (_channels_last, IMAGE),
    "bfloat16": (lambda: small().bfloat16(), IMAGE.bfloat16()),
    "float64": (lambda: small().double(), IMAGE.double()),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_save_then_load_gives_the_same_model(tmp_path, name):
    factory, inputs = ROUND_TRIPS[name]
    gm = transform(factory(), inputs, config=CONFIG)
    gm(inputs).float().sum().backward()
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter += torch.randn_like(parameter)
    written = state_of(gm)
    save(gm, tmp_path / "aim.safetensors")
    assert_same_state(state_of(gm), written)

    other = factory()
    before = state_of(other)
    loaded = load(tmp_path / "aim.safetensors", other)
    assert_same_state(state_of(loaded), written)
    assert_same_state(state_of(other), before)
    assert loaded.plan == gm.plan
    assert torch.equal(loaded.eval()(inputs), gm.eval()(inputs))
    assert [entry.name for entry in tmp_path.iterdir()] == ["aim.safetensors"]


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_the_given_model_may_be_frozen(tmp_path, emit):
    gm = transform(small(), IMAGE, config=CONFIG, emit=emit)
    save(gm, tmp_path / "aim.safetensors")
    loaded = load(tmp_path / "aim.safetensors", small().requires_grad_(False))
    assert_same_state(state_of(loaded), state_of(gm))
    assert torch.equal(loaded.eval()(IMAGE), gm.eval()(IMAGE))
    assert not loaded.get_parameter("0.weight").requires_grad


def test_the_loaded_model_shares_nothing_with_the_given_one(tmp_path):
    save(operated(), tmp_path / "aim.safetensors")
    base = small()
    loaded = load(tmp_path / "aim.safetensors", base)
    theirs = {tensor.data_ptr() for tensor in base.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in loaded.state_dict().values()}


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    gm = transform(TiedLM(), TOKENS, config=CONFIG)
    save(gm, tmp_path / "aim.safetensors")
    with safe_open(tmp_path / "aim.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert json.loads(metadata["aim_surgery.aliases"]) == {"head.weight": "embedding.weight"}
    assert names == set(gm.state_dict()) - {"head.weight"}
    loaded = load(tmp_path / "aim.safetensors", TiedLM())
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("embedding.weight")


def test_overlapping_tensors_are_stored_each_by_itself(tmp_path):
    gm = operated()
    both = torch.arange(6.0)
    gm.register_buffer("left", both[:4])
    gm.register_buffer("right", both[2:])
    gm.register_buffer("spread", torch.ones(1).expand(3))
    gm.register_buffer("none", torch.empty(0))
    gm.register_buffer("nothing", torch.empty(0))
    save(gm, tmp_path / "aim.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "aim.safetensors")
    assert_same_state(dict(sorted(stored.items())), dict(sorted(gm.state_dict().items())))


@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("file", ["aim.safetensors", "aim.pt"])
def test_the_form_that_was_saved_comes_back(tmp_path, file, emit):
    for saved in ("concat", "split"):
        gm = transform(small(), IMAGE, config=CONFIG, form=saved, emit=emit).eval()
        save(gm, tmp_path / file)
        loaded = load(tmp_path / file, small().eval())
        assert loaded.aim.form == saved
        assert torch.equal(loaded(IMAGE), gm(IMAGE))
        for wanted in ("concat", "split"):
            other = load(tmp_path / file, small().eval(), form=wanted)
            assert other.aim.form == wanted
            assert_same_state(dict(other.state_dict()), dict(gm.state_dict()))


def test_metadata_tells_what_the_file_is(tmp_path):
    gm = operated()
    save(gm, tmp_path / "aim.safetensors", model_spec="nets.py:small", model_args={"width": 4})
    with safe_open(tmp_path / "aim.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["aim_surgery.format"] == "1"
    assert metadata["aim_surgery.version"] == __version__
    assert Plan.from_json(metadata["aim_surgery.plan"]) == gm.plan
    assert json.loads(metadata["aim_surgery.model"]) == {
        "spec": "nets.py:small",
        "args": {"width": 4},
    }


def test_load_builds_the_model_from_the_spec_in_the_file(tmp_path):
    spec, args = "torchvision:squeezenet1_1", {"num_classes": 3}
    model = build(spec, **args).bfloat16()
    image = torch.randn(2, 3, 64, 64).bfloat16()
    gm = transform(model, image)
    save(gm, tmp_path / "aim.safetensors", model_spec=spec, model_args=args)
    loaded = load(tmp_path / "aim.safetensors")
    assert_same_state(state_of(loaded), state_of(gm))
    assert torch.equal(loaded.eval()(image), gm.eval()(image))


def test_load_takes_a_spec_with_the_arguments_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(FACTORY)
    spec = f"{tmp_path / 'nets.py'}:small"
    gm = transform(build(spec, width=6), IMAGE, config=CONFIG)
    save(gm, tmp_path / "aim.safetensors", model_spec=spec, model_args={"width": 6})
    assert_same_state(state_of(load(tmp_path / "aim.safetensors", spec)), state_of(gm))


def test_load_runs_no_code_that_only_the_file_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(
        operated(),
        tmp_path / "aim.safetensors",
        model_spec="os:system",
        model_args={"command": "touch ran"},
    )
    with pytest.raises(CheckpointError, match="if you trust it, name it: --model os:system"):
        load(tmp_path / "aim.safetensors")
    assert not (tmp_path / "ran").exists()


# Loading what does not fit ------------------------------------------------------------------


def message_of_load(path: Path, model: nn.Module | str | None = None) -> str:
    with pytest.raises(AimSurgeryError) as caught:
        load(path, model)
    return str(caught.value)


def test_load_refuses_other_files(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    assert "not an aim-surgery file" in message_of_load(tmp_path / "plain.safetensors", small())
    assert "not an aim-surgery file" in message_of_load(tmp_path / "plain.pt", small())
    assert "no such file" in message_of_load(tmp_path / "missing.safetensors", small())


def test_load_without_a_model_or_a_spec(tmp_path):
    save(operated(), tmp_path / "aim.safetensors")
    assert "holds no model spec" in message_of_load(tmp_path / "aim.safetensors")
    with pytest.raises(ModelSpecError):
        load(tmp_path / "aim.safetensors", "no_such_spec")


def test_load_into_another_model(tmp_path):
    save(operated(), tmp_path / "aim.safetensors")
    message = message_of_load(tmp_path / "aim.safetensors", small(width=6))
    assert "the model that Sequential gives is not the one that was operated on" in message
    assert "0.weight (expected (6, 3, 3, 3), got (4, 3, 3, 3))" in message


def test_load_accounts_for_every_tensor(tmp_path):
    path = tmp_path / "aim.safetensors"
    save(operated(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors["stranger"] = tensors.pop("aim.memory.bias")
    del metadata[CRC_KEY]
    safetensors.torch.save_file(tensors, path, metadata)
    message = message_of_load(path, small())
    assert "1 missing: aim.memory.bias" in message
    assert "1 unexpected: stranger" in message


class Training(nn.Module):
    """What a training framework saves whole: models, and a loss with weights."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_load_tells_what_it_leaves_out(tmp_path, kind):
    gm, path = operated(), tmp_path / f"lightning.{kind}"
    module = Training(model=gm, criterion=nn.Linear(2, 2, bias=False))
    state = module.state_dict()
    if kind == "ckpt":
        torch.save({"state_dict": state, "epoch": 1}, path)
    else:
        save(gm, tmp_path / "own.safetensors")
        with safe_open(tmp_path / "own.safetensors", framework="pt") as file:
            metadata = file.metadata()
        del metadata[CRC_KEY]
        safetensors.torch.save_file(state, path, metadata)
    with pytest.warns(UserWarning, match=r"left out.*under 'model\.': criterion\.weight$"):
        found = load(path, small())
    assert_same_state(found.state_dict(), gm.state_dict())


def test_load_keeps_module_versions_of_the_model_alone(tmp_path):
    seen = []

    class Versioned(nn.BatchNorm2d):
        def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, state_dict, prefix, local_metadata, *args
        ):
            seen.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    base = nn.Sequential(nn.Conv2d(3, 4, 3), Versioned(4), nn.Conv2d(4, 2, 3))
    gm = transform(base, IMAGE, config=CONFIG)
    state = Training(model=gm, **{"1": nn.Linear(1, 1)}).state_dict()
    torch.save(state, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"1\.weight, 1\.bias"):
        load(tmp_path / "w.pt", base)
    assert seen == [2]


def test_load_refuses_two_operated_models(tmp_path):
    state = Training(student=operated(), teacher=operated()).state_dict()
    torch.save(state, tmp_path / "w.pt")
    message = message_of_load(tmp_path / "w.pt", small())
    assert "several operated models, under 'student.', 'teacher.'" in message


def test_load_knows_the_counter_of_averaged_models(tmp_path):
    gm = operated()
    torch.save(torch.optim.swa_utils.AveragedModel(gm).state_dict(), tmp_path / "w.pt")
    assert_same_state(load(tmp_path / "w.pt", small()).state_dict(), gm.state_dict())


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("aim_surgery.format", "2", "written in format 2, this version reads 1"),
        ("aim_surgery.plan", "{", "not a plan"),
        ("aim_surgery.aliases", '{"a": "gone"}', "list of tied tensors is damaged"),
        ("aim_surgery.aliases", "[]", "metadata is damaged"),
        ("aim_surgery.aliases", "{", "metadata is damaged"),
        ("aim_surgery.model", '{"args": {}}', "holds no model spec"),
        ("aim_surgery.form", "round", "in a form 'round'"),
    ],
)
def test_load_names_damaged_metadata(tmp_path, key, text, message):
    path = tmp_path / "aim.safetensors"
    save(operated(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata[CRC_KEY]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata | {key: text})
    assert message in message_of_load(path, None if "model" in key else small())


# Writing ------------------------------------------------------------------------------------


def _fail(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("old", [b"the old file", None])
@pytest.mark.parametrize(
    ("where", "failure", "raised"),
    [
        ("os.posix_fallocate", _fail, CheckpointError),
        ("aim_surgery.checkpoint.writing.safetensors_file.bytes_of", _fail, CheckpointError),
        ("aim_surgery.checkpoint.writing.safetensors_file.bytes_of", _interrupt, KeyboardInterrupt),
        ("os.fsync", _fail, CheckpointError),
        ("os.replace", _fail, CheckpointError),
        ("os.replace", _interrupt, KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_the_old_file_or_none(
    tmp_path, monkeypatch, old, where, failure, raised
):
    path = tmp_path / "aim.safetensors"
    if old is not None:
        path.write_bytes(old)
    before = files_in(tmp_path)
    gm = operated()
    monkeypatch.setattr(where, failure)
    with pytest.raises(raised) as caught:
        save(gm, path)
    assert files_in(tmp_path) == before
    if raised is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert "aim.safetensors: could not be written" in str(caught.value)


def test_replaces_the_old_file(tmp_path):
    path = tmp_path / "aim.safetensors"
    path.write_text("old")
    path.chmod(0o640)
    save(operated(), path)
    load(path, small())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    save(operated(), tmp_path / "aim.safetensors")
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert len(modes) == 1


def test_writes_through_a_link(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    save(operated(), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    load(tmp_path / "real.safetensors", small())


@pytest.mark.parametrize("write_to", [lambda path: save(operated(), path), check_target])
def test_names_a_place_that_cannot_be_written(tmp_path, monkeypatch, write_to):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    before = files_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*/missing; make it"):
        write_to(tmp_path / "missing" / "aim.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        write_to(tmp_path / "file" / "aim.safetensors")
    with pytest.raises(CheckpointError, match="folder: is a folder"):
        write_to(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="null: is no regular file"):
        write_to(Path("/dev/null"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        write_to(tmp_path / "aim.safetensors")
    assert files_in(tmp_path) == before
    assert not list((tmp_path / "folder").iterdir())


def test_check_target_leaves_everything_as_it_is(tmp_path):
    (tmp_path / "old").write_text("old")
    check_target(tmp_path / "old")
    check_target(tmp_path / "new")
    assert files_in(tmp_path) == {"old": b"old"}


def test_replacing_removes_what_is_half_written(tmp_path):
    def write_half() -> None:
        with replacing(tmp_path / "new") as temporary:
            temporary.write_text("half")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        write_half()
    assert files_in(tmp_path) == {}


def test_names_what_cannot_be_saved(tmp_path):
    path = tmp_path / "aim.safetensors"

    def message_of(gm: nn.Module, **options: object) -> str:
        with pytest.raises(CheckpointError) as caught:
            save(gm, path, **options)  # pyright: ignore[reportArgumentType]
        assert files_in(tmp_path) == {}
        return str(caught.value)

    def with_buffer(buffer: torch.Tensor) -> nn.Module:
        gm = operated()
        gm.register_buffer("odd", buffer)
        return gm

    assert "expected an operated model" in message_of(small())
    assert "odd is a sparse" in message_of(with_buffer(torch.eye(2).to_sparse()))
    assert "odd is on the meta device" in message_of(with_buffer(torch.empty(2, device="meta")))
    assert "could not be written" in message_of(with_buffer(torch.ones(2, dtype=torch.complex128)))
    unfit = {"layer": small()}
    assert "can't be stored as JSON" in message_of(
        operated(), model_spec="a.py:b", model_args=unfit
    )


# Models and plans from files ----------------------------------------------------------------


def test_open_model_builds_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(FACTORY)
    expected = state_of(small(width=6))
    torch.save(expected, tmp_path / "w.pt")
    spec = f"{tmp_path / 'nets.py'}:small"
    model = open_model(tmp_path / "w.pt", spec, {"width": 6})
    assert_same_state(state_of(model), expected)
    with pytest.raises(CheckpointError, match=r"w\.pt: does not fit Sequential"):
        open_model(tmp_path / "w.pt", spec)
    with pytest.raises(CheckpointError, match="no such file"):
        open_model(tmp_path / "gone.pt", "no spec at all")


def test_open_plan(tmp_path):
    model = small()
    found = plan(model, IMAGE, config=CONFIG)
    (tmp_path / "plan.json").write_text(found.to_json(indent=2))
    read = open_plan(tmp_path / "plan.json")
    assert read == found
    gm, again = apply(model, found), apply(copy.deepcopy(model), read)
    assert list(gm.state_dict()) == list(again.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\xff\xfe", "cannot be read as a plan"), (b"[]", "is not a plan")],
)
def test_open_plan_names_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AimSurgeryError, match=message) as caught:
        open_plan(path)
    assert re.search(r"plan\.json: ", str(caught.value))


@dataclass
class Packed:
    x: torch.Tensor


class TakesPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, packed: Packed) -> torch.Tensor:
        return self.out(self.enter(packed.x).relu())


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_example_inputs_that_no_plan_holds_are_given_again(tmp_path, emit):
    model, packed = TakesPacked(), Packed(torch.randn(3, 4))
    gm = transform(model, (packed,), emit=emit)
    path = tmp_path / "net.safetensors"
    save(gm, path)
    with pytest.raises(AimSurgeryError, match="pass example_inputs"):
        load(path, TakesPacked())
    again = load(path, TakesPacked(), (packed,))
    assert torch.equal(again(packed), gm(packed))
