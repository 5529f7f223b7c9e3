"""The page: what was asked, how, and what the rows say. No sentence about a result is written here.

Text that stays the same says what was done; text about results comes from `tables.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.evidence import dogs, figures, tables, timing
from benchmarks.evidence.adapting import METHODS
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.recipes import STUDIES, Adapting, Study
from benchmarks.evidence.rows import FOLDER, Row
from benchmarks.zoo.summary import table

FIGURES = "figures"
METHOD = (
    "All arms of a seed get the same images, the same base weights and the same order of batches; "
    "another seed, another draw of all three. Memory starts with reads of zero weight, so at the "
    "first step each arm computes what the base computes (resolution, width, fresh init and the "
    "settings of 2021 excepted). Twice the resolution costs the MLP parameters, too.",
    "Learning rates are chosen for each arm from the same grid in two steps: mean validation "
    "accuracy over tuning seeds, which are not among the seeds that count, leaves two; both are "
    "run on all seeds, and the one with the better mean validation accuracy over these counts. A "
    "star marks a rate at an end of the grid. The arm that others are compared with is run at all "
    "their rates as well, for differences at equal rates. Validation images are trained on by no "
    "seed. Where two rates are as good as one another in validation, chance decides which counts, "
    "and test accuracies of one arm at two rates differ by as much as those of two arms: read the "
    "differences at equal rates, too.",
    "At first the tuning seeds alone chose (from a grid without 0.03 in studies A and C). Arms "
    "seemed to differ that differed in their rates, which test accuracies showed; so both rates "
    "were run everywhere. That is the one way in which the test set had a part in the protocol. "
    "In a run it is looked at once, after the last step, and chooses no step, rate or epoch.",
    "“Zeroed at evaluation” is the same trained network with its memory disabled; that also takes "
    "away the constant that norms and weights were trained around. “Another image's” is the same "
    "trained network where every image reads what was written of another image of its batch: it "
    "tells whether what is written of an image serves that image.",
    "Differences are paired by seed, in percentage points, with 95 % bootstrap-t intervals (9,999 "
    "resamples of seeds). Until all studies but the full data were done they were BCa intervals; "
    "a review found by simulation that with ten seeds these hold the truth in 88 to 90 cases of "
    "100, and bootstrap-t in 93 to 95. All were computed anew. They are not widened for how many "
    "arms stand in a table: of twenty true zeros, one or two are expected to miss zero. And they "
    "tell of other seeds, not of another test set.",
    "Runs repeat bit by bit on CPUs of one kind. The first rates of study A were run on another "
    "kind than the second ones; 110 of these runs were run again: training differs by 0.33 "
    "points in the mean on VGG and ResNet, by 1.35 at most, and by none on average: as much as "
    "another order of batches makes, on the arms' and the base's side alike. The intervals hold "
    "it. (Run again were all of the VGG's first rates in study A, and per-sample writes.)",
)


def write(
    folder: Path,
    data: str,
    rows: Mapping[str, Row],
    studies: Mapping[str, Study] = STUDIES,
    *,
    fewest: int = 0,
) -> Path:
    """Write figures and `README.md`.

    Args:
        folder: Where to; its `rows` are what was given.
        data: Name of the data set.
        rows: All rows, by digest.
        studies: The studies that the page has, as they were run.
        fewest: Seeds, of all its arms on all networks, from which on a study is told of; before,
            only that it has begun.

    Returns:
        The page's path.
    """
    found = {name: _cells(study, data, rows) for name, study in studies.items()}
    whole = {name: _whole_seeds(studies[name], found[name]) for name in found}
    begun = {name for name in found if whole[name] < fewest and any(found[name].values())}
    found = {name: {} if name in begun else of_study for name, of_study in found.items()}
    parts = [
        "# Does memory help?",
        "Written by `python -m benchmarks.evidence` from the runs in `rows/`; numbers, sentences "
        "about numbers and figures all come from there. The article's claim (15.14 % -> 20.06 % on "
        "Stanford Dogs) rests on one run each, at different resolutions; here arms are compared "
        "seed by seed, and as far as can be differ in one thing.",
        "## What was found",
        "In words: the project's [README](../../README.md), “Does it help?”. Here in numbers: mean "
        "differences of test accuracy, paired by seed, with their 95 % intervals. **Bold**: the "
        "interval does not hold zero.",
        _findings(studies, found),
        _bullets(
            f"{study.title}: begun, {whole[name]} of {len(study.seeds)} seeds so far; told of from "
            f"{fewest} on"
            if name in begun
            else f"{study.title}: {whole[name]} of {len(study.seeds)} seeds so far"
            for name, study in studies.items()
            if name in begun or (any(found[name].values()) and whole[name] < len(study.seeds))
        ),
    ]
    used: dict[str, Row] = {}  # by digest: studies share runs
    for name, study in studies.items():
        if any(found[name].values()):
            parts += _study(study, data, rows, found[name], folder)
            mine = tables.used_rows(study, data, found[name].values(), rows)
            used |= {row.digest: row for row in mine}
    parts += _step_time(folder / FOLDER / timing.FILE) + dogs.report(folder / FOLDER)
    parts += ["## Method", _bullets(METHOD), "## Reach", _bullets(_reach([*used.values()]))]
    facts = [(key, str(value)) for key, value in measure.environment().items()]
    parts += ["## Environment", table(("", ""), facts), _versions([*used.values()])]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
    return path


def _cells(study: Study, data: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    return {network: tables.cells(study, data, network, rows) for network in study.networks}


def _whole_seeds(study: Study, found: Mapping[str, Any]) -> int:
    """How many seeds every arm has on every network."""
    every = [cells.get(arm) for cells in found.values() for arm in study.arms]
    return min((len(cell.test) if cell else 0 for cell in every), default=0)


def _findings(studies: Mapping[str, Study], found: Mapping[str, Any]) -> str:
    parts = []
    for name, study in studies.items():
        cells = {network: of_network for network, of_network in found[name].items() if of_network}
        rows = tables.contrast_rows(study, cells)
        if rows:
            parts += [f"**{study.title}**: {study.question}"]
            parts += [table(("question", "difference, in points", *cells), rows)]
    return "\n\n".join(parts) or "No run has finished yet."


def _study(
    study: Study, data: str, rows: Mapping[str, Row], found: Mapping[str, Any], folder: Path
) -> list[str]:
    what = ARMS if study.group == "arms" else METHODS
    parts = [f"## {study.title}", study.question, _recipe(study, data)]
    for network, cells in found.items():
        if cells:
            parts += [f"### {network}", table(tables.HEADER, tables.table_rows(study, cells))]
            parts += _at_equal_rates(study, cells)
    if study.rule:
        chosen = tables.candidates(study, found) or ["none: `AimConfig` stays as it is"]
        parts += ["### What the defaults should be", study.rule, "Arms of that kind:"]
        parts.append(_bullets(chosen))
    for caption, path in figures.draw(study, found, folder / FIGURES):
        parts.append(f"![{caption}]({FIGURES}/{path.name})\n\n*{caption}.*")
    arms = [f"**{what[arm].title}** (`{arm}`): {what[arm].what}" for arm in study.arms]
    parts += ["<details><summary>What the arms are</summary>", _bullets(arms), "</details>"]
    tuned, final = tables.tuning_seconds(study, data, rows), tables.final_seconds(found.values())
    parts.append(
        f"Took {tuned / 3600:.2f} h of one core to choose rates, {final / 3600:.2f} h after (runs "
        "that another study has as well are counted in both)."
    )
    return parts


def _at_equal_rates(study: Study, cells: Mapping[str, Any]) -> list[str]:
    header, rows = tables.rate_table(study, cells)
    if len(study.grid) == 1 or not rows:
        return []
    reference = cells[study.arms[0]].title
    return [
        f"At the rates of {reference}, where an arm was run with the same:",
        table(header, rows),
    ]


def _recipe(study: Study, data: str) -> str:
    recipe = study.recipe
    images = "all images" if recipe.per_class is None else f"{recipe.per_class} images a class"
    text = (
        f"{data}, {images}, {recipe.epochs} epochs at batch {recipe.batch_size}, Adam with a half "
        f"cosine from a rate of {', '.join(f'{rate:g}' for rate in study.grid)}; "
        f"{recipe.validation_per_class} validation images a class; seeds {study.seeds[0]} to "
        f"{study.seeds[-1]}."
    )
    if isinstance(recipe, Adapting):
        text += (
            f" The base is trained on the first half of the classes (cut anew for each seed), "
            f"{recipe.base_per_class} images each, {recipe.base_epochs} epochs at "
            f"{recipe.base_rate:g}."
        )
    return text


def _step_time(path: Path) -> list[str]:
    if not path.is_file():
        return []
    content = json.loads(path.read_text("utf-8"))
    rows = [
        (
            row["network"],
            (ARMS if row["group"] == "arms" else METHODS)[row["arm"]].title,
            f"{row['ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})",
            f"{row['milliseconds']:.1f}",
        )
        for row in content["rows"]
    ]
    return [
        "## Time of a training step",
        "Ratios of steps that took turns in one process: arms against the base, methods against "
        "full fine-tuning; median, smallest and largest. Arms with memory are in concat "
        "form; methods that freeze the base have its layers taken apart. "
        f"{content['environment']['cpu']}, {content['environment']['torch threads']} thread(s).",
        table(("network", "", "ratio", "fastest, ms"), rows),
    ]


def _reach(used: list[Row]) -> list[str]:
    """What the runs allow to say, and what more hardware would add."""
    devices = ", ".join(sorted({row.device for row in used})) or "nothing yet"
    hours = sum(row.total_seconds for row in used) / 3600
    largest = max((row.parameters for row in used), default=0)
    return [
        f"{len(used):,} runs on {devices}, {hours:.1f} h one after the other; the largest network "
        f"has {largest:,} parameters. What is found here is found for networks of that size on "
        "28x28 grey images; nothing in it says how 24 million parameters on photographs behave.",
        "That is what a GPU adds: `python -m benchmarks.evidence --study stanford-dogs --data "
        "FOLDER --device cuda` is the original's experiment, confound included, with the two "
        "controls that it lacked (the base at the memory network's resolution, the memory at the "
        "base's).",
    ]


def _versions(used: list[Row]) -> str:
    counts = Counter(
        ", ".join(f"{name} {version}" for name, version in row.versions.items()) for row in used
    )
    lines = [f"{versions} ({count:,} runs)" for versions, count in counts.most_common()]
    return "Versions that the runs noted:\n\n" + _bullets(lines) if lines else ""


def _bullets(lines: Any) -> str:
    return "\n".join(f"* {line}" for line in lines)
