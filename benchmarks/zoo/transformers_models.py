"""Small random configurations of the common transformers; nothing is downloaded."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from torch import nn

from benchmarks.zoo.transformers_inputs import Keywords
from benchmarks.zoo.transformers_others import OTHERS
from benchmarks.zoo.transformers_seq2seq import PAIRS
from benchmarks.zoo.transformers_text import TEXTS
from benchmarks.zoo.transformers_vision import IMAGES

MODELS = {**TEXTS, **PAIRS, **IMAGES, **OTHERS}


def build_model(name: str) -> tuple[nn.Module, Keywords]:
    """Build one with random weights.

    Args:
        name: A key of `MODELS`.

    Returns:
        The model and its keyword arguments.
    """
    entry = MODELS[name]
    kind: Any = getattr(importlib.import_module("transformers"), entry.model)
    options = copy.deepcopy(
        entry.options
    )  # some models write into the lists of their configuration
    return kind(kind.config_class(**options)), entry.inputs()
