"""Make the table of known models that `aim-surgery inspect` gives hints by.

    python -m benchmarks.known_models [--quick]

Each model is built twice without weights; what differs with another number of classes is its
classifier. All of timm takes ten minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.skeleton import build_skeleton
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.checkpoint.reading.known_models import TABLE, names_digest, shapes_digest
from aim_surgery.errors import AimSurgeryError

_DRAWING = {torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_}
CLASSES = 7  # not the usual number of any model


def main() -> None:
    """Build all models, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.known_models")
    parser.add_argument("--quick", action="store_true", help="torchvision alone")

    known = import_torchvision().models.list_models()
    # one made ready for quantization is the plain model until then
    specs = [f"torchvision:{name}" for name in known if not name.startswith("quantized_")]
    if not parser.parse_args().quick:
        import timm  # after torchvision, which it imports

        specs += [f"timm:{name}" for name in timm.list_models()]
    models: dict[str, list[Any]] = {}
    for spec in specs:
        try:
            names, row = row_of(spec)
        except (AimSurgeryError, RuntimeError, ValueError, TypeError) as err:
            print(f"{spec}: left out: {str(err)[:100]}", flush=True)
            continue
        models.setdefault(names, []).append(row)
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "timm")}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(models.items()))
    TABLE.write_text(
        f'{{"versions": {json.dumps(versions)}, "models": {{\n{lines}\n}}}}\n', "utf-8"
    )
    print(f"{sum(map(len, models.values()))} models written to {TABLE}")


def row_of(spec: str) -> tuple[str, list[Any]]:
    """A model's digest of names, and its row.

    Args:
        spec: The model spec.

    Returns:
        The digest; spec, digest of shapes, names of the classifier, usual number of classes.
    """
    plain = shapes_of(spec, {})
    head: list[str] = []
    try:
        other = shapes_of(spec, {"num_classes": CLASSES})
        head = [n for n, s in plain.items() if other.get(n, s) != s and other[n][0] == CLASSES]
    except AimSurgeryError:
        pass  # it has no classes
    return names_digest(plain), [
        spec,
        shapes_digest(plain, head),
        head,
        plain[head[0]][0] if head else None,
    ]


def shapes_of(spec: str, args: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state dict."""
    try:
        state = build_skeleton(spec, args).state_dict()
    except AimSurgeryError:  # it computes while it is built
        state = _small(spec, args).state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}


def _small(spec: str, args: dict[str, Any]) -> torch.nn.Module:
    """The model with values, in half the bytes; nothing is drawn for them."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with _Undrawn():
            return build(spec, **args)
    finally:
        torch.set_default_dtype(torch.float32)


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DRAWING:
            return args[0]
        return func(*args, **kwargs or {})


if __name__ == "__main__":
    main()
