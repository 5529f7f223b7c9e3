"""From rows to tables and sentences: every word about a result is made from its numbers."""

from __future__ import annotations

import statistics as std
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.evidence.adapting import METHODS
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.recipes import FINAL, TUNING, Study
from benchmarks.evidence.rows import Row
from benchmarks.evidence.statistics import Paired, paired, spread

HEADER = ("", "parameters", "trained", "rate", "test accuracy", "difference", "seeds")
CONTRASTS = {
    "arms": (
        ("per-sample", "base", "does memory help?"),
        ("budget-auto", "base", "does memory as `transform(model)` gives it help?"),
        ("per-sample", "widened", "memory or just parameters?"),
        ("per-sample", "frozen-floats", "do learned floats matter?"),
        ("per-sample", "no-writes", "do writes matter?"),
        ("per-batch", "per-sample", "a copy for each sample, or one?"),
        ("carried", "per-sample", "does a carried state matter?"),
        ("per-sample", "per-sample, zeroed", "do its weights rest on what the memory holds?"),
        ("per-sample", "per-sample, swapped", "does it use what is written of the image itself?"),
        ("bias-map", "no-writes", "what would free constant maps add?"),
        ("lunkad2021", "resolution", "the article's network against what it also changed"),
        ("memory-quarter", "per-sample", "is a smaller memory better?"),
    ),
    "methods": (
        ("memory-head", "lora", "memory or LoRA, at equal parameters?"),
        ("memory-head", "bias", "memory or biases?"),
        ("memory-head", "probe", "memory or a new head alone?"),
        ("memory-head", "no-writes-head", "do writes matter?"),
        ("state-head", "memory-head", "does a carried state matter?"),
        ("no-writes-head", "lora", "memory without writes or LoRA?"),
        ("memory-head", "memory", "what does a new head add?"),
        ("full", "memory-head", "what does training everything add?"),
    ),
}


@dataclass
class Cell:
    """All final runs of one arm on one network.

    Attributes:
        arm: Its name (of a derived row: `Arm.zeroed`, `Arm.swapped`).
        title: In tables.
        parameters: Of the model.
        trained: Those that are trained.
        rate: Learning rate.
        at_rates: Accuracy by rate and seed.
        rows: The runs at its rate; none for a derived row.
        others: Those at other rates.
    """

    arm: str
    title: str
    parameters: int
    trained: int
    rate: float
    at_rates: dict[float, dict[int, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    others: list[Row] = field(default_factory=list)

    @property
    def test(self) -> dict[int, float]:
        """Accuracy by seed, at its rate."""
        return self.at_rates[self.rate]

    @property
    def mean(self) -> float:
        """Of the test accuracies."""
        return std.mean(self.test.values())


def title_of(study: Study, arm: str) -> str:
    """An arm's title."""
    return (ARMS if study.group == "arms" else METHODS)[arm].title


def finalists(
    study: Study, data: str, rows: Mapping[str, Row]
) -> dict[tuple[str, str], tuple[float, ...]]:
    """The learning rates that each network and arm is run with on all seeds.

    Args:
        study: The study.
        data: Name of the data set.
        rows: Rows by digest.

    Returns:
        Rates by network and arm, where all tuning runs are done: those of the best mean validation
        accuracy, best first; the smaller of two equal ones.
    """
    if len(study.grid) == 1:
        return {(n, a): study.grid for n in study.networks for a in study.arms}
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for config in study.tuning(data):
        by_rate = found.setdefault((config.network, config.arm), {})
        values = by_rate.setdefault(config.rate, [])
        if config.digest in rows:
            values.append(rows[config.digest].validation)
    count = len(study.tuning_seeds)
    return {
        key: tuple(sorted(by_rate, key=lambda rate: (-std.mean(by_rate[rate]), rate)))[
            : study.finalists
        ]
        for key, by_rate in found.items()
        if all(len(values) == count for values in by_rate.values())
    }


def rates_to_run(
    study: Study, chosen: Mapping[tuple[str, str], Sequence[float]]
) -> dict[tuple[str, str], tuple[float, ...]]:
    """Finalists; and for the first arm those of all others, so that each meets it at its rates.

    What the first arm has besides its own finalists chooses nothing.
    """
    found = {key: tuple(rates) for key, rates in chosen.items()}
    for network, arm in chosen:
        if arm == study.arms[0]:
            every = {rate for (name, _), rates in chosen.items() if name == network
                     for rate in rates}  # fmt: skip
            found[network, arm] += tuple(sorted(every.difference(chosen[network, arm])))
    return found


def cells(study: Study, data: str, network: str, rows: Mapping[str, Row]) -> dict[str, Cell]:
    """The arms of one network that have final runs, by name, zeroed ones after their arms.

    Seeds count that an arm has run with all its finalists. Its rate is the one of them with the
    best mean validation accuracy over these seeds, the smaller of two equal ones.
    """
    runs: dict[str, dict[float, dict[int, Row]]] = {}
    chosen = finalists(study, data, rows)
    for config in study.final(data, rates_to_run(study, chosen)):
        if config.network == network:
            by_seed = runs.setdefault(config.arm, {}).setdefault(config.rate, {})
            row = rows.get(config.digest)
            if row is not None and row.test is not None:
                by_seed[config.seed] = row
    found: dict[str, Cell] = {}
    for arm in study.arms:
        by_rate = runs.get(arm, {})
        final = [by_rate[rate] for rate in chosen.get((network, arm), ()) if rate in by_rate]
        seeds = set.intersection(*({*by_seed} for by_seed in final)) if final else set[int]()
        if seeds:
            whole = {
                rate: [by_seed[seed] for seed in sorted(seeds & by_seed.keys())]
                for rate, by_seed in by_rate.items()
            }
            found |= _cells_of(study, arm, whole, sorted(chosen[network, arm]))
    return found


def _cells_of(
    study: Study, arm: str, by_rate: Mapping[float, Sequence[Row]], rates: Sequence[float]
) -> dict[str, Cell]:
    """Of one arm, at the best of some rates, and of what else its networks were evaluated with."""
    rate = max(rates, key=lambda rate: std.mean(row.validation for row in by_rate[rate]))
    rows = list(by_rate[rate])
    others = [row for other in by_rate if other != rate for row in by_rate[other]]
    sizes = (rows[0].parameters, rows[0].trained_parameters, rate)
    title = title_of(study, arm)
    found = {arm: Cell(arm, title, *sizes, _by_rate(by_rate, lambda row: row.test), rows, others)}
    if study.group == "arms":
        for name, what, accuracy in (
            (ARMS[arm].zeroed, "zeroed at evaluation", lambda row: row.test_zeroed),
            (ARMS[arm].swapped, "another image's at evaluation", lambda row: row.test_swapped),
        ):
            tests = _by_rate(by_rate, accuracy)
            if name and tests[rate]:
                found[name] = Cell(name, f"{title}, {what}", *sizes, tests)
    return found


def _by_rate(
    by_rate: Mapping[float, Sequence[Row]], accuracy: Callable[[Row], float | None]
) -> dict[float, dict[int, float]]:
    """An accuracy of rows, by rate and seed; rows without it are left out."""
    return {
        rate: {row.seed: value for row in rows if (value := accuracy(row)) is not None}
        for rate, rows in by_rate.items()
    }


def table_rows(study: Study, found: Mapping[str, Cell]) -> list[tuple[str, ...]]:
    """A network's table, with `HEADER`; differences are to the study's first arm, in points."""
    reference = found.get(study.arms[0])
    rows = []
    for cell in found.values():
        deviation = spread(list(cell.test.values()))
        accuracy = f"{100 * cell.mean:.2f} %"
        if deviation is not None:
            accuracy += f" ± {100 * deviation:.2f}"
        against = None if reference is None else paired(cell.test, reference.test)
        rows.append(
            (
                cell.title,
                f"{cell.parameters:,}",
                f"{cell.trained:,}",
                _rate(study, cell.rate),
                accuracy,
                "-" if cell is reference or against is None else points(against),
                str(len(cell.test)),
            )
        )
    return rows


def _effect(value: Paired | None) -> str:
    if value is None:
        return "-"
    return f"**{points(value)}**" if value.side else points(value)


def points(value: Paired) -> str:
    """A difference in percentage points with its interval: "+0.42 [-0.10, +0.93]"."""
    text = f"{100 * value.mean:+.2f}"
    if value.low is None or value.high is None:
        return text
    if value.low == value.high == 0:
        return "the same"
    return f"{text} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]"


def sorted_by_side(study: Study, found: Mapping[str, Cell]) -> list[str]:
    """Sentences: which arms are above, below, or not told apart from the first."""
    reference = found.get(study.arms[0])
    if reference is None:
        return []
    sides: dict[int | None, list[str]] = {1: [], -1: [], 0: [], None: []}
    for cell in found.values():
        against = paired(cell.test, reference.test)
        if cell is not reference and against is not None:
            side = None if against.low is None else against.side
            sides[side].append(f"{cell.title} {points(against)}")
    texts = {
        1: f"above {reference.title}",
        -1: f"below {reference.title}",
        0: f"not told apart from {reference.title} (the interval holds zero)",
        None: f"compared with {reference.title} (too few seeds for an interval)",
    }
    return [f"{texts[side]}: {'; '.join(arms)}" for side, arms in sides.items() if arms]


def candidates(study: Study, by_network: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """Sentences: rivals that are above the default on some network, and below it on none."""
    default, found = study.default or study.arms[0], []
    for arm in study.rivals or study.arms[1:]:
        against = {
            network: paired(cells_[arm].test, cells_[default].test)
            for network, cells_ in by_network.items()
            if {arm, default} <= cells_.keys()
        }
        known = {network: pair for network, pair in against.items() if pair is not None}
        sides = {pair.side for pair in known.values()}
        if 1 in sides and -1 not in sides:
            each = ", ".join(f"{network} {points(pair)}" for network, pair in known.items())
            found.append(f"{title_of(study, arm)}: {each}")
    return found


def rate_table(
    study: Study, found: Mapping[str, Cell]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Differences to the first arm where both have the same rate.

    Returns:
        Header and rows: a column for each rate of the first arm; none where it has no runs.
    """
    reference = found.get(study.arms[0])
    if reference is None:
        return (), []
    rates = sorted(reference.at_rates)
    rows = []
    for arm in study.arms[1:]:
        if arm in found:
            at = found[arm].at_rates
            pairs = (paired(at.get(rate, {}), reference.at_rates[rate]) for rate in rates)
            rows.append((found[arm].title, *("-" if p is None else points(p) for p in pairs)))
    return ("", *(f"{rate:g}" for rate in rates)), rows


def contrast_rows(
    study: Study, by_network: Mapping[str, Mapping[str, Cell]]
) -> list[tuple[str, ...]]:
    """Further pairs of arms: question, pair, and a difference for each network."""
    rows = []
    for first, second, question in CONTRASTS[study.group]:
        pairs = [
            paired(found[first].test, found[second].test)
            if first in found and second in found
            else None
            for found in by_network.values()
        ]
        if any(pairs) and {first, second.partition(",")[0]} <= set(study.arms):
            sides = f"{_plain(study, first)} - {_plain(study, second)}"
            rows.append((question, sides, *map(_effect, pairs)))
    return rows


def tuning_seconds(study: Study, data: str, rows: Mapping[str, Row]) -> float:
    """Of all runs that chose learning rates."""
    return _seconds(rows[c.digest] for c in study.tuning(data) if c.digest in rows)


def final_seconds(found: Iterable[Mapping[str, Cell]]) -> float:
    """Of all runs that count."""
    return _seconds(_final_rows(found))


def used_rows(
    study: Study, data: str, found: Iterable[Mapping[str, Cell]], rows: Mapping[str, Row]
) -> list[Row]:
    """All rows behind a study's tables."""
    final = _final_rows(found)
    assert all(row.config["phase"] == FINAL for row in final)
    tuned = [rows[c.digest] for c in study.tuning(data) if c.digest in rows]
    assert all(row.config["phase"] == TUNING for row in tuned)
    return final + tuned


def _final_rows(found: Iterable[Mapping[str, Cell]]) -> list[Row]:
    every = (cell for cells_ in found for cell in cells_.values())
    return [row for cell in every for row in (*cell.rows, *cell.others)]


def _seconds(rows: Iterable[Row]) -> float:
    return sum(row.total_seconds for row in rows)


def _plain(study: Study, arm: str) -> str:
    name, comma, how = arm.partition(",")
    return title_of(study, name) + comma + how


def _rate(study: Study, rate: float) -> str:
    """A rate, marked where it is at an end of the grid and a better one may lie beyond."""
    grid: Sequence[float] = study.grid
    return f"{rate:g}" + ("*" if len(grid) > 1 and rate in (min(grid), max(grid)) else "")
