import importlib.util
import pickle
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from aim_surgery.checkpoint.models import build, parse_model_args, spec
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.errors import AimSurgeryError, ModelSpecError

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = nn.Linear(width, 2)

def build_net(width: int = 8):
    return Net(width)

def with_tokenizer():
    return Net(), "tokenizer"

def refuse(**settings):
    raise KeyError("no such width")

ready = Net()
width = 4
"""

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")


class ParametersOnMeta(TorchFunctionMode):
    """Costs no memory, as parameters start as `torch.empty`; torch.device("meta") breaks RegNet."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on_meta = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **(kwargs or {}) | on_meta)


@pytest.fixture
def net_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "net.py"
    file.write_text(NET)
    return file


def message_of(spec: str, **model_args: object) -> str:
    with pytest.raises(ModelSpecError) as caught:
        build(spec, **model_args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def layer_of(model: nn.Module) -> nn.Linear:
    layer = model.get_submodule("layer")
    assert isinstance(layer, nn.Linear)
    return layer


# --- torchvision --------------------------------------------------------------------------------


def test_every_torchvision_model_can_be_built_without_a_warning():
    names = import_torchvision().models.list_models()
    assert len(names) >= 121
    for name in names:
        runs_its_backbone = name.startswith("ssdlite")
        with nullcontext() if runs_its_backbone else ParametersOnMeta():
            model = build(f"torchvision:{name}")
        assert sum(parameter.numel() for parameter in model.parameters()) > 0, name


def test_a_torchvision_model_takes_arguments_and_runs():
    model = build("torchvision:resnet18", num_classes=7).eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7)


def test_no_weights_are_fetched(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with ParametersOnMeta():
        build("torchvision:fcn_resnet50")  # by itself it would fetch its backbone's weights
        with pytest.raises(ModelSpecError, match="a download"):
            build("torchvision:fcn_resnet50", weights_backbone="IMAGENET1K_V1")


def test_the_notice_about_a_future_default_is_not_shown_and_others_are():
    with warnings.catch_warnings(record=True) as shown, ParametersOnMeta():
        warnings.simplefilter("always")
        build("torchvision:googlenet")
        assert not shown
        build("torchvision:mobilenet_v2", norm_layer=_WarningNorm)
    assert {str(warning.message) for warning in shown} == {"a norm's own warning"}


class _WarningNorm(nn.BatchNorm2d):
    def __init__(self, channels: int):
        warnings.warn("a norm's own warning", stacklevel=2)
        super().__init__(channels)


def test_an_unknown_torchvision_model_has_close_names():
    message = message_of("torchvision:resnet05")
    assert message.startswith("unknown torchvision model 'resnet05'; close: ")
    assert "resnet50" in message
    assert "vgg16" in message_of("torchvision:VGG_16")
    assert "nothing close; there are alexnet, " in message_of("torchvision:0000")


def test_a_missing_torchvision_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install torchvision" in message_of("torchvision:resnet18")


# --- timm ---------------------------------------------------------------------------------------


@needs_timm
def test_a_timm_model_takes_arguments_and_runs():
    model = build("timm:resnet10t.c3_in1k", num_classes=7).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)


@needs_timm
def test_a_timm_model_is_built_without_its_weights(monkeypatch):
    import timm

    asked = {}

    def create_model(name: str, **model_args: object) -> nn.Module:
        asked.update(model_args, name=name)
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    build("timm:resnet18", num_classes=3)
    assert asked == {"name": "resnet18", "pretrained": False, "num_classes": 3}
    build("timm:resnet18", pretrained=True)
    assert asked["pretrained"] is True


@needs_timm
def test_an_unknown_timm_model_has_close_names():
    message = message_of("timm:resnet05")
    assert message.startswith("unknown timm model 'resnet05'; close: ")
    assert "resnet50" in message


@needs_timm
def test_a_model_of_the_hub_is_not_fetched():
    name = "hf-hub:timm/resnet50.a1_in1k"
    assert message_of(f"timm:{name}").startswith(f"unknown timm model {name!r}")


def test_a_missing_timm_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = message_of("timm:resnet18")
    assert "no module named 'timm'" in message
    assert "pip install" in message


# --- package.module:factory -----------------------------------------------------------------------


def test_a_factory_in_a_module_is_called_with_the_arguments():
    layer = build("torch.nn:Linear", in_features=3, out_features=5)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (5, 3)


def test_a_factory_may_have_an_argument_named_spec(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "aim_spec_net.py").write_text(
        "from torch import nn\ndef make(spec):\n    return nn.Linear(spec, 1)\n"
    )
    assert build("aim_spec_net:make", spec=6).in_features == 6


def test_a_missing_module_names_the_remedy():
    message = message_of("no_such_package.nets:build")
    assert "no module named 'no_such_package'" in message
    assert "PYTHONPATH" in message
    assert "did you mean torchvision:NAME" in message_of("torchvison:resnet18")


def test_what_a_module_lacks_is_not_taken_for_the_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "aim_needy.py").write_text("import no_such_dependency\n")
    message = message_of("aim_needy:build")
    assert message.startswith("importing module 'aim_needy' raised ModuleNotFoundError")
    assert "'no_such_dependency'" in message


def test_a_module_that_imports_torchvision_can_be_imported(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(spec, "import_torchvision", lambda: asked.append("torchvision"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "aim_plain.py").write_text(NET)
    build("aim_plain:Net")
    (tmp_path / "other.py").write_text(NET)
    build(f"{tmp_path / 'other.py'}:Net")
    assert asked == ["torchvision", "torchvision"]


def test_a_module_can_be_imported_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert isinstance(build("torch.nn:Identity"), nn.Identity)


# --- path/to/file.py:factory ----------------------------------------------------------------------


def test_a_factory_in_a_file(net_file, monkeypatch):
    assert layer_of(build(f"{net_file}:build_net")).in_features == 8
    assert layer_of(build(f"{net_file}:Net", width=5)).in_features == 5
    monkeypatch.chdir(net_file.parent)
    assert layer_of(build("net.py:Net")).in_features == 4
    assert "net" not in sys.modules


def test_a_model_from_a_file_can_be_pickled(net_file):
    model = build(f"{net_file}:Net")
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)
    assert torch.equal(layer_of(copy).weight, layer_of(model).weight)


def test_a_file_runs_once_for_each_content(net_file):
    first = build(f"{net_file}:Net")
    assert type(build(f"{net_file}:Net")) is type(first)
    net_file.write_text(NET.replace("width: int = 4", "width: int = 6"))
    assert layer_of(build(f"{net_file}:Net")).in_features == 6
    assert type(pickle.loads(pickle.dumps(first))) is type(first)


def test_files_of_one_name_do_not_meet(net_file, tmp_path):
    other = tmp_path / "other" / "net.py"
    other.parent.mkdir()
    other.write_text(NET)
    assert type(build(f"{net_file}:Net")) is not type(build(f"{other}:Net"))


def test_a_file_can_import_its_neighbours(net_file):
    (net_file.parent / "aim_neighbour.py").write_text("from torch.nn import Identity\n")
    net_file.write_text("from aim_neighbour import Identity\n")
    assert isinstance(build(f"{net_file}:Identity"), nn.Identity)


def test_a_missing_file_has_close_names(net_file):
    message = message_of(f"{net_file.parent / 'nets.py'}:Net")
    assert f"no file '{net_file.parent / 'nets.py'}'" in message
    assert "close: net.py" in message
    assert "there is none" in message_of(f"{net_file.parent / 'no_folder' / 'net.py'}:Net")


def test_a_file_that_is_not_python_is_refused(net_file):
    notes = net_file.with_suffix(".txt")
    notes.write_text(NET)
    assert "is not a Python file (.py)" in message_of(f"{notes}:Net")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("from . import sibling", "ImportError: attempted relative import"),
    ],
)
def test_a_file_that_fails_is_reported_and_forgotten(net_file, text, reason):
    net_file.write_text(text)
    before = set(sys.modules)
    message = message_of(f"{net_file}:Net")
    assert f"importing file '{net_file}' raised {reason}" in message
    assert not {name for name in set(sys.modules) - before if "net" in name}


# --- the factory ----------------------------------------------------------------------------------


def test_a_missing_factory_has_close_names(net_file):
    message = message_of(f"{net_file}:built_net")
    assert f"{str(net_file)!r} has no 'built_net'; close: build_net" in message
    assert "there are Net, build_net, refuse, with_tokenizer" in message_of(f"{net_file}:zzz")


@pytest.mark.parametrize(("name", "kind"), [("ready", "Net"), ("width", "int")])
def test_a_name_that_builds_nothing_is_refused(net_file, name, kind):
    message = message_of(f"{net_file}:{name}")
    assert f"{name!r} in {str(net_file)!r} is a {kind}; expected a function or class" in message


def test_a_factory_that_raises_is_shown_with_its_arguments(net_file):
    with pytest.raises(ModelSpecError) as caught:
        build(f"{net_file}:refuse", width=3, name="x")
    assert f"{net_file}:refuse(width=3, name='x') raised KeyError: 'no such width'" in str(
        caught.value
    )
    assert isinstance(caught.value.__cause__, KeyError)
    assert "TypeError" in message_of("torchvision:resnet18", num_clases=3)


def test_a_factory_that_returns_something_else_is_refused(net_file):
    message = message_of(f"{net_file}:with_tokenizer")
    assert "returned a tuple; expected a torch.nn.Module" in message


@pytest.mark.parametrize("spec", ["resnet50", "", ":", "torchvision:", ":build", "timm:"])
def test_a_spec_of_no_form_is_told_the_four(spec):
    message = message_of(spec)
    assert message.startswith(f"{spec!r} names no model: ")
    for form in ("torchvision:NAME", "timm:NAME", "package.module:factory", "file.py:factory"):
        assert form in message


# --- --model-args ---------------------------------------------------------------------------------


def test_model_args_are_a_json_object():
    text = '{"num_classes": 120, "pretrained": false, "dims": [1, 2]}'
    assert parse_model_args(text) == {"num_classes": 120, "pretrained": False, "dims": [1, 2]}


@pytest.mark.parametrize("text", [None, "", " \n", "{}"])
def test_no_model_args(text):
    assert parse_model_args(text) == {}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{num_classes: 120}", "line 1, column 2, after '{'"),
        ('{"num_classes":\n 12O}', "line 2, column 4"),
        ("num_classes=120", "line 1, column 1, after ''"),
    ],
)
def test_model_args_that_are_not_json_say_where(text, where):
    with pytest.raises(AimSurgeryError, match="--model-args is not JSON") as caught:
        parse_model_args(text)
    assert where in str(caught.value)
    assert """--model-args '{"num_classes": 120}'""" in str(caught.value)


@pytest.mark.parametrize("text", ["120", "[1, 2]", '"resnet"', "null"])
def test_model_args_that_are_not_an_object_are_refused(text):
    with pytest.raises(ModelSpecError, match="not an object; write a JSON object") as caught:
        parse_model_args(text)
    assert repr(text) in str(caught.value)
