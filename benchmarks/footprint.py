"""What memory costs besides time: bytes at the peak of a training step, nodes of a folded graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.capture import capture
from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.steps import Case


@dataclass(frozen=True)
class Peak:
    """Bytes of a model in training.

    Attributes:
        parameters: Of all its parameters.
        growth: From before the first step to the peak of two.
        how: Where the peak was found.
    """

    parameters: int
    growth: int
    how: str


def peak_of(case: Case, config: AimConfig | None, threads: int) -> Peak:
    """Two steps of plain SGD; to be called in a fresh process.

    Args:
        case: The model.
        config: What to operate, in split form; None for the base.
        threads: For torch.

    Returns:
        The bytes.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    model: nn.Module = case.build()
    if config is not None:
        model = aim_surgery.transform(model, config=config, form="split")
    model.train()
    x, y = case.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    _, growth, how = measure.peak_growth(steps, case.device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Peak(size, growth, how)


def memory_row(case: Case, words: str, config: AimConfig, threads: int, limit: float | None) -> Row:
    """What a training step needs above the base, new parameters and their gradients set aside.

    Args:
        case: The model.
        words: Name of the configuration.
        config: What to operate.
        threads: For torch.
        limit: The most, as a share of the base's peak.

    Returns:
        The row.
    """
    base = measure.in_fresh_process(peak_of, case, None, threads)
    ours = measure.in_fresh_process(peak_of, case, config, threads)
    new = ours.parameters - base.parameters
    peaks = base.parameters + base.growth, ours.parameters + ours.growth
    share = (peaks[1] - peaks[0] - 2 * new) / peaks[0]
    mebibytes = [value / 2**20 for value in (*peaks, new)]
    note = "peak {1:.0f} MiB, base {0:.0f} MiB, new parameters {2:.0f} MiB".format(*mebibytes)
    name = (
        f"memory, {case.name}, batch {case.batch}: (split, {words} - base - new parameters and "
        f"their gradients) ÷ base"
    )
    return Row(
        name, share, limit, None, f"{note}; {base.how}", {"base": peaks[0], "ours": peaks[1]}
    )


def nodes_row(case: Case, words: str, config: AimConfig, limit: float | None) -> Row:
    """Nodes of the graph after folding ÷ of the base's graph.

    Args:
        case: The model.
        words: Name of the configuration.
        config: What to operate.
        limit: The most.

    Returns:
        The row.
    """
    torch.manual_seed(measure.SEED)
    base = case.build().eval()
    x, _ = case.data()
    plain = len(capture(base, x).traces[0].graph.nodes)  # pyright: ignore[reportAttributeAccessIssue]
    gm = aim_surgery.transform(base, x, config=config)
    counts = {"base": plain, "concat": len(gm.graph.nodes)}
    counts["split"] = len(aim_surgery.lower(gm, "split").graph.nodes)
    folded = aim_surgery.fold(gm.eval())
    counts["folded"] = len(folded.graph.nodes)
    note = ", ".join(f"{name} {count}" for name, count in counts.items())
    name = f"graph nodes, {case.name}: folded, {words} ÷ base"
    return Row(name, counts["folded"] / plain, limit, None, note, counts)
