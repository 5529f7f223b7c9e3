"""Figures that a README can show: effects with intervals, learning curves, prices, the memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from benchmarks.evidence.recipes import Study
from benchmarks.evidence.statistics import Paired, paired
from benchmarks.evidence.tables import Cell, points, title_of

DPI = 120
_PANEL = 4.2  # inches
_FEW = 3  # arms, of which one figure says all
Cells = Mapping[str, Mapping[str, Cell]]  # by network, by arm


def draw(study: Study, found: Cells, folder: Path) -> list[tuple[str, Path]]:
    """Draw all figures of a study.

    Args:
        study: The study.
        found: Its cells.
        folder: Where to.

    Returns:
        Captions and files, in the order in which a page shows them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {network: cells for network, cells in found.items() if cells}
    made: list[tuple[str, Path]] = []
    if not found:
        return made
    reference = title_of(study, study.arms[0])
    drawings = {
        "differences": (
            _differences,
            f"Paired difference of test accuracy to “{reference}”, mean over seeds with its 95 % "
            "bootstrap interval",
        ),
        "curves": (
            _curves,
            f"Validation accuracy while training, mean over seeds; band: one standard deviation of "
            f"“{reference}”",
        ),
        "parameters": (
            _prices,
            "Test accuracy against trained parameters; bar: one standard deviation over seeds, "
            "which is larger than that of differences",
        ),
    }
    for name, (function, caption) in drawings.items():
        shown = found
        if name == "differences":  # another study's runs of a shared arm have no reference here
            shown = {n: c for n, c in found.items() if study.arms[0] in c and len(c) > 1}
        if not shown or (name != "differences" and len(study.arms) < _FEW):
            continue
        figure = _panels(study, shown, function)
        made.append((caption, _save(figure, folder / f"{study.name}-{name}.png")))
    memories = {
        network: row.memory
        for network, cells in found.items()
        for cell in cells.values()
        for row in cell.rows
        if row.memory is not None
    }
    if memories:
        caption = (
            "The memory of one run of per-sample writes, plane by plane: as drawn, after training, "
            "and after the last write (mean over the validation images)"
        )
        made.append((caption, _save(_memories(memories), folder / f"{study.name}-memory.png")))
    return made


def _panels(study: Study, found: Cells, function: Any) -> Figure:
    figure = Figure(figsize=(_PANEL * len(found), _PANEL * 1.15), layout="constrained")
    together = function is _differences  # the same arms in each panel, named at the first
    alike = together and study.group == "arms"  # noise is to look as large as it is
    panels = figure.subplots(1, len(found), squeeze=False, sharey=together, sharex=alike)[0]
    if alike:
        _set_range(panels[0], study, found)
    colours = _colours(study)
    for axes, (network, cells) in zip(panels, found.items(), strict=True):
        function(axes, study, cells, colours)
        axes.set_title(network)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _set_range(axes: Axes, study: Study, found: Cells) -> None:
    """As wide as the intervals of trained arms need."""
    ends = [
        100 * end
        for cells in found.values()
        for arm in study.arms[1:]
        if arm in cells
        and (value := paired(cells[arm].test, cells[study.arms[0]].test)) is not None
        for end in (value.low, value.mean, value.high)
        if end is not None
    ]
    margin = 0.05 * (max([0.0, *ends]) - min([0.0, *ends])) or 1.0
    axes.set_xlim(min([0.0, *ends]) - margin, max([0.0, *ends]) + margin)


def _interval(axes: Axes, position: int, value: Paired, colour: Any) -> None:
    axes.plot(100 * value.mean, position, "o", color=colour)
    if value.low is not None and value.high is not None:
        axes.plot([100 * value.low, 100 * value.high], [position] * 2, color=colour, lw=2)


def _differences(axes: Axes, study: Study, cells: Mapping[str, Cell], colours: Any) -> None:
    """Zeroed memories far off the trained arms are written at the edge: they would be dots else."""
    reference = cells[study.arms[0]]
    others = [cell for cell in cells.values() if cell is not reference]
    shown = [
        (place, cell.arm, value)
        for place, cell in enumerate(others)
        if (value := paired(cell.test, reference.test)) is not None
    ]
    trained = [each for each in shown if each[1] in colours]
    for place, arm, value in trained:
        _interval(axes, place, value, colours[arm])
    low, high = axes.get_xlim()
    for place, arm, value in shown:
        if arm in colours:
            continue
        if not trained or low <= 100 * value.mean <= high:
            _interval(axes, place, value, "grey")
            continue
        below = value.mean < 0
        at, side = (low, "left") if below else (high, "right")
        text = f"< {points(value)}" if below else f"{points(value)} >"
        axes.text(at, place, text, ha=side, va="center", fontsize=8, color="dimgrey")
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(others)), [cell.title for cell in others], fontsize=8)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_xlabel("points of accuracy")


def _curves(axes: Axes, study: Study, cells: Mapping[str, Cell], colours: Any) -> None:
    for cell in cells.values():
        if not cell.rows:
            continue
        epochs = [point[0] for point in cell.rows[0].curve]
        values = 100 * np.array([[point[2] for point in row.curve] for row in cell.rows])
        mean, deviation = values.mean(0), values.std(0, ddof=min(len(values) - 1, 1))
        axes.plot(epochs, mean, color=colours[cell.arm], label=cell.title, lw=1.5)
        if cell.arm == study.arms[0]:  # of all, nothing could be seen
            band = (mean - deviation, mean + deviation)
            axes.fill_between(epochs, *band, color=colours[cell.arm], alpha=0.15, lw=0)
    starts = [100 * row.curve[len(row.curve) // 3][2] for c in cells.values() for row in c.rows]
    axes.set_ylim(bottom=min(starts))  # the first third is steep, and would flatten the rest
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("epochs")
    axes.set_ylabel("validation accuracy, %")


def _prices(axes: Axes, study: Study, cells: Mapping[str, Cell], colours: Any) -> None:
    for cell in cells.values():
        if not cell.rows:
            continue
        values = 100 * np.array(list(cell.test.values()))
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        axes.errorbar(
            cell.trained,
            values.mean(),
            deviation,
            fmt="o",
            color=colours[cell.arm],
            label=cell.title,
            capsize=3,
        )
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("test accuracy, %")
    if study.group == "methods":
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _memories(memories: Mapping[str, Any]) -> Figure:
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(_PANEL * 3, _PANEL * len(memories)), layout=layout)
    grid = figure.subplots(len(memories), 3, squeeze=False)
    for line, (network, memory) in zip(grid, memories.items(), strict=True):
        after = list(memory["after"].items())
        pictures = {
            "as drawn": next(iter(memory["before"].values())),
            "after training": after[0][1],
            f"after the write at {after[-1][0]}": after[-1][1],
        }
        largest = max(abs(value) for values in pictures.values() for value in values)
        image = ScalarMappable(Normalize(-largest, largest), "RdBu_r")
        for axes, (title, values) in zip(line, pictures.items(), strict=True):
            axes.imshow(mosaic(values, memory["layout"]), cmap=image.cmap, norm=image.norm)
            axes.set_title(f"{network}, {title}", fontsize=9)
            axes.set_axis_off()
        figure.colorbar(image, ax=list(line), shrink=0.8)
    return figure


def mosaic(values: Sequence[float], layout: Sequence[int]) -> np.ndarray:
    """Planes side by side, row by row, with gaps; a memory without planes as one near-square."""
    channels, *home = layout if len(layout) == 3 else (1, *_near_square(layout[0]))
    height, width = home
    padded = np.full(channels * height * width, np.nan)
    padded[: len(values)] = values
    planes = padded.reshape(channels, height, width)
    columns = math.ceil(math.sqrt(channels))
    lines = math.ceil(channels / columns)
    picture = np.full((lines * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for index, plane in enumerate(planes):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        picture[top : top + height, left : left + width] = plane
    return picture


def _near_square(count: int) -> tuple[int, int]:
    width = math.ceil(math.sqrt(count))
    return math.ceil(count / width), width


def _colours(study: Study) -> dict[str, Any]:
    """A colour for each arm, the same in all figures of a study."""
    palette = mpl.colormaps["tab10" if len(study.arms) <= 10 else "tab20"]
    return {arm: palette(index) for index, arm in enumerate(study.arms)}


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
