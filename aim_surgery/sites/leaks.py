"""Which places a write must not choose by itself, as it would tell tokens what they must not know.

A write pools over all positions of a sample. Along tokens that may be too much: a causal model
hides later ones from earlier ones, and a mask among the inputs hides padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils._pytree import tree_leaves

from aim_surgery.capture import Capture
from aim_surgery.capture.copies import has_values
from aim_surgery.sites.boundary import Boundary, analysed_trace
from aim_surgery.sites.causal import find_causal, has_unseen_tables
from aim_surgery.sites.features import features_of
from aim_surgery.sites.masks import find_input_mask
from aim_surgery.sites.one_way import goes_one_way, may_hold_tokens


def why_not_pooled(capture: Capture, points: Sequence[Boundary]) -> dict[Boundary, str]:
    """Find the places where a write would leak.

    Args:
        capture: The captured model.
        points: Where one may be.

    Returns:
        Those of them that carry sequences (N, T, C) or (N, C, T) whose positions must not all see
        each other, with the reason.
    """
    sequences = _sequences(points)
    reason = _reason(capture) if sequences else ""
    return dict.fromkeys(sequences, reason) if reason else {}


def may_leak_unseen(capture: Capture, points: Sequence[Boundary]) -> bool:
    """Whether a write at some places may leak, as only the values of a model could tell.

    Args:
        capture: The captured model.
        points: Where is written.

    Returns:
        False where the model has values, and where no sequence is written over.
    """
    if not _sequences(points) or has_values(capture.model):
        return False
    arguments = tree_leaves((capture.inputs.args, dict(capture.inputs.kwargs)))
    graph = analysed_trace(capture).graph
    return any(map(may_hold_tokens, arguments)) or has_unseen_tables(capture, graph)


def _sequences(points: Sequence[Boundary]) -> list[Boundary]:
    return [point for point in points if len(point.spatial) <= 1 and point.positions > 1]


def _reason(capture: Capture) -> str:
    features = features_of(capture)
    causal = find_causal(capture, features)
    mask = "" if causal else find_input_mask(features)
    if mask:
        return (
            f"{mask}: a write pools over all tokens, also those that a mask input hides, so what a "
            f"sample gives would depend on how far it is padded. Name points by hand "
            f"(write_at=...) if inputs are never padded, or if write='batch' is used and only "
            f"training may see padding; or use write='none'"
        )
    if causal:
        sign = f"{causal} is causal"
    elif goes_one_way(capture, features.samples.leading):
        sign = "no output is another when tokens behind it are: the model is causal"
    else:
        return ""
    return (
        f"later tokens are hidden from earlier ones ({sign}): a write pooled over all tokens would "
        f"show earlier tokens what comes later. Name points by hand (write_at=...) if that is "
        f"meant, or use write='none'"
    )
