"""A model from its name: what ``--model`` on the command line and `load` in a fresh process need.

A checkpoint holds tensors; the module that they belong to is built by a factory. A *model spec*
names the factory in one string::

    torchvision:NAME          torchvision:resnet50
    timm:NAME                 timm:vit_tiny_patch16_224
    package.module:factory    mypackage.nets:build
    path/to/file.py:factory   experiments/net.py:Net

Weights are not fetched on the way: a factory that could is told not to.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.errors import ModelSpecError

Factory = Callable[..., object]

_FORMS = (
    "a model spec is torchvision:NAME (torchvision:resnet50), timm:NAME (timm:resnet50), "
    "package.module:factory (mypackage.nets:build) or path/to/file.py:factory (nets.py:build)"
)


def build(spec: str, /, **model_args: Any) -> nn.Module:
    """Build the model that a spec names, with random weights.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` or
            ``path/to/file.py:factory``. A file runs as a module of its own, again when its content
            has changed. It can import its neighbours by name, but not relatively.
        **model_args: Keyword arguments for the factory. torchvision's ``weights`` and
            ``weights_backbone`` are None and timm's ``pretrained`` is False unless given here.

    Returns:
        What the factory returned, in the mode that it left it in.

    Raises:
        ModelSpecError: The spec has none of the four forms, names nothing (the message has close
            names), or the factory failed or returned something else than a module.

    Example:
        >>> build("torchvision:resnet18", num_classes=120).fc
        Linear(in_features=512, out_features=120, bias=True)
    """
    source, colon, name = spec.partition(":")
    if source not in ("torchvision", "timm"):
        source, colon, name = spec.rpartition(":")  # a path may hold a colon itself
    if not (source and colon and name):
        raise ModelSpecError(f"{spec!r} names no model: {_FORMS}")
    no_weights = {}
    if source == "torchvision":
        factory, no_weights = _torchvision_factory(name)
    elif source == "timm":
        factory, no_weights = _timm_factory(name)
    else:
        is_file = source.endswith(".py") or "/" in source or "\\" in source
        module = _load_file(Path(source)) if is_file else _import_module(source)
        factory = _find_factory(module, source, name)
    return _call(factory, spec, no_weights | model_args)


def parse_model_args(text: str | None) -> dict[str, Any]:
    """Read ``--model-args``, the factory's keyword arguments as a JSON object.

    Args:
        text: The option's text; None or blank means no arguments.

    Returns:
        The arguments by name.

    Raises:
        ModelSpecError: The text is not JSON (the message says where), or JSON but not an object.

    Example:
        >>> parse_model_args('{"num_classes": 120}')
        {'num_classes': 120}
    """
    if text is None or not text.strip():
        return {}
    remedy = """write a JSON object such as --model-args '{"num_classes": 120}'"""
    try:
        model_args = json.loads(text)
    except json.JSONDecodeError as err:
        raise ModelSpecError(
            f"--model-args is not JSON: {err.msg} at line {err.lineno}, column {err.colno}, after "
            f"{text[max(0, err.pos - 20) : err.pos]!r}; {remedy}"
        ) from err
    if not isinstance(model_args, dict):
        raise ModelSpecError(f"--model-args is {text.strip()!r}, not an object; {remedy}")
    return model_args


def _torchvision_factory(name: str) -> tuple[Factory, dict[str, Any]]:
    models = import_torchvision().models
    known = models.list_models()
    if name not in known:
        raise ModelSpecError(
            f"unknown torchvision model {name!r}; {_close(name, known)} "
            "(all: torchvision.models.list_models())"
        )
    factory = models.get_model_builder(name)
    accepted = inspect.signature(factory).parameters
    return factory, {key: None for key in ("weights", "weights_backbone") if key in accepted}


def _timm_factory(name: str) -> tuple[Factory, dict[str, Any]]:
    timm = _import_module("timm")
    if not timm.is_model(name):
        raise ModelSpecError(
            f"unknown timm model {name!r}; {_close(name, timm.list_models())} "
            "(all: timm.list_models())"
        )
    return functools.partial(timm.create_model, name), {"pretrained": False}


def _import_module(dotted: str) -> ModuleType:
    _make_torchvision_importable()
    with _telling_of_failure(f"module {dotted!r}"):
        try:
            return importlib.import_module(dotted)
        except ModuleNotFoundError as err:
            if err.name is None or not f"{dotted}.".startswith(f"{err.name}."):
                raise  # something that the module imports
            meant = difflib.get_close_matches(dotted, ("torchvision", "timm"), n=1)
            hint = f"did you mean {meant[0]}:NAME? " if meant and meant[0] != dotted else ""
            raise ModelSpecError(
                f"no module named {err.name!r}; {hint}pip install it, put its folder on "
                "PYTHONPATH, or give its file, path/to/file.py:factory"
            ) from err


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module; its name tells path and content, so that an edited file runs anew."""
    path = path.expanduser().resolve()
    if not path.is_file():
        near = [entry.name for entry in path.parent.glob("*.py")]
        raise ModelSpecError(f"no file {str(path)!r}; {_close(path.name, near)} in its folder")
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"aim_surgery_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ModelSpecError(f"{str(path)!r} is not a Python file (.py); {_FORMS}")
    _make_torchvision_importable()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that a neighbour hides no installed package
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where pickle looks for the file's classes
    try:
        with _telling_of_failure(f"file {str(path)!r}"):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find_factory(module: ModuleType, source: str, name: str) -> Factory:
    def builds(value: object) -> bool:
        return callable(value) and not isinstance(value, nn.Module)

    factory = getattr(module, name, None)
    if factory is None:
        names = [key for key, value in vars(module).items() if builds(value) and key[0] != "_"]
        raise ModelSpecError(f"{source!r} has no {name!r}; {_close(name, names)}")
    if not builds(factory):
        raise ModelSpecError(
            f"{name!r} in {source!r} is a {type(factory).__name__}; expected a function or class "
            "that builds the model when it is called"
        )
    return factory


def _call(factory: Factory, spec: str, model_args: dict[str, Any]) -> nn.Module:
    shown = ", ".join(f"{key}={value!r}" for key, value in model_args.items())
    try:
        with warnings.catch_warnings():
            # googlenet, inception_v3: a notice about a future default, not about this model.
            warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
            model = factory(**model_args)
    except Exception as err:
        raise ModelSpecError(f"{spec}({shown}) raised {type(err).__name__}: {err}") from err
    if not isinstance(model, nn.Module):
        raise ModelSpecError(
            f"{spec}({shown}) returned a {type(model).__name__}; expected a torch.nn.Module, "
            "name a factory that returns the model alone"
        )
    return model


@contextlib.contextmanager
def _telling_of_failure(what: str) -> Iterator[None]:
    try:
        yield
    except ModelSpecError:
        raise
    except (Exception, SystemExit) as err:  # SystemExit: a script without `if __name__ == ...`
        raise ModelSpecError(f"importing {what} raised {type(err).__name__}: {err}") from err


def _make_torchvision_importable() -> None:
    """For code that imports torchvision itself; where it is missing, that code says so."""
    with contextlib.suppress(ModelSpecError):
        import_torchvision()


def _close(name: str, known: Iterable[str]) -> str:
    known = {key.casefold(): key for key in sorted(known)}
    close = difflib.get_close_matches(name.casefold(), known, n=5)
    if close:
        return f"close: {', '.join(known[key] for key in close)}"
    first = [*known.values()][:5]
    return f"nothing close; there are {', '.join(first)}" if first else "there is none"
