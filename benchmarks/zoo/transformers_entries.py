"""One small configuration of transformers: its class, its options, what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.zoo import transformers_inputs as inputs
from benchmarks.zoo.transformers_inputs import Keywords
from benchmarks.zoo.transformers_options import GROUPED, SEQ2SEQ, TEXT, WAVE


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        kind: "text", "encoder-decoder", "vision", "audio", "multimodal" or "other".
        model: Name of its class.
        inputs: Makes its keyword arguments.
        options: Of its configuration.
    """

    kind: str
    model: str
    inputs: Callable[[], Keywords]
    options: Mapping[str, Any] = field(default_factory=dict)


def text(model: str, /, **options: Any) -> Entry:
    """A model of sentences."""
    return Entry("text", model, inputs.text, {**TEXT, **options})


def decoder(model: str, /, **options: Any) -> Entry:
    """A causal model with fewer heads for keys than for queries."""
    return Entry("text", model, inputs.text, {**GROUPED, **options})


def seq2seq(model: str, /, **options: Any) -> Entry:
    """A model from sentences to sentences."""
    return Entry("encoder-decoder", model, inputs.pair, {**SEQ2SEQ, **options})


def vision(model: str, /, **options: Any) -> Entry:
    """A model of images."""
    return Entry("vision", model, inputs.image, options)


def audio(model: str, /, **options: Any) -> Entry:
    """A model of waveforms."""
    return Entry("audio", model, inputs.sound, {**WAVE, **options})
