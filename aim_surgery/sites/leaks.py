"""Which places a write must not choose by itself, as it would tell tokens what they must not know.

A write pools over all positions of a sample. Along tokens that may be too much: a causal model
hides later ones from earlier ones, and a mask among the inputs hides padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from aim_surgery.capture import Capture
from aim_surgery.sites.boundary import Boundary
from aim_surgery.sites.causal import find_causal
from aim_surgery.sites.features import features_of
from aim_surgery.sites.masks import find_input_mask
from aim_surgery.sites.one_way import goes_one_way


def why_not_pooled(capture: Capture, points: Sequence[Boundary]) -> dict[Boundary, str]:
    """Find the places where a write would leak.

    Args:
        capture: The captured model.
        points: Where one may be.

    Returns:
        Those of them that carry sequences (N, T, C) or (N, C, T) whose positions must not all see
        each other, with the reason.
    """
    sequences = [p for p in points if len(p.spatial) <= 1 and p.positions > 1]
    reason = _reason(capture) if sequences else ""
    return dict.fromkeys(sequences, reason) if reason else {}


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
