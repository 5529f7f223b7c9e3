"""All that decides a run, as frozen data: fixed here before the runs whose results count.

A run is a `Config`; its digest is its name. `EDITION` is raised when code changes what a
configuration means, so that no row of an older meaning is taken for one of the new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.evidence.networks import NETWORKS

EDITION = 1
SEEDS = tuple(range(10))
TUNING_SEEDS = (1000, 1001)  # never among `SEEDS`
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING, FINAL = "tuning", "final"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam, its rate falling to zero along a half cosine.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step; the last, smaller batch of a pass is left out.
        per_class: Training images of each class, None for all that are not for validation.
        validation_per_class: Validation images of each class.
        evaluations: Points of the curve, evenly spaced.
    """

    epochs: int
    batch_size: int = 50
    per_class: int | None = 100
    validation_per_class: int = 100
    evaluations: int = 10


@dataclass(frozen=True)
class Adapting(Recipe):
    """How a base is trained on half of the classes and adapted to the others.

    Attributes:
        base_per_class: Images of each of its classes that the base is trained on.
        base_epochs: Passes over them.
        base_rate: Its learning rate, at the beginning.
    """

    base_per_class: int = 1000
    base_epochs: int = 6
    base_rate: float = 3e-3


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        data: Name of the data set.
        network: Name of the network.
        group: "arms" (`arms.py`) or "methods" (`adapting.py`).
        arm: Name of the arm or method.
        rate: Learning rate at the beginning.
        seed: Of the images drawn, of the initial weights and of the order of batches.
        phase: "tuning" (the test set is not looked at) or "final".
        recipe: How it is trained.
        edition: `EDITION`.
    """

    data: str
    network: str
    group: str
    arm: str
    rate: float
    seed: int
    phase: str
    recipe: Recipe
    edition: int = EDITION

    @property
    def digest(self) -> str:
        """Its name, 16 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        name: On the command line.
        title: In headings.
        question: In one sentence.
        group: Of its arms.
        arms: Their names; the first is what all others are compared with.
        recipe: How they are trained.
        networks: On which networks.
        seeds: Of the runs that count.
        tuning_seeds: Of the runs that choose finalists among learning rates.
        grid: Learning rates to choose from, the same for all arms.
        finalists: How many of them are run on all seeds; the best of these counts. Two seeds can't
            tell rates apart whose test accuracies differ by as much as the arms' do.
        rule: How defaults follow from it; "" where none do.
        default: The arm that stands for them; "" for the first.
        rivals: The arms that could take its place; none named: all but the first.
    """

    name: str
    title: str
    question: str
    group: str
    arms: tuple[str, ...]
    recipe: Recipe
    networks: tuple[str, ...] = NETWORKS
    seeds: tuple[int, ...] = SEEDS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    grid: tuple[float, ...] = GRID
    finalists: int = 2
    rule: str = ""
    default: str = ""
    rivals: tuple[str, ...] = ()

    def tuning(self, data: str) -> list[Config]:
        """The runs that choose finalists among learning rates; none where there is only one."""
        if len(self.grid) == 1:
            return []
        return [
            self._config(data, network, arm, rate, seed, TUNING)
            for network in self.networks
            for seed in self.tuning_seeds
            for arm in self.arms
            for rate in self.grid
        ]

    def final(self, data: str, rates: Mapping[tuple[str, str], Sequence[float]]) -> list[Config]:
        """The runs that count, seed by seed, so that a stopped study is balanced.

        Args:
            data: Name of the data set.
            rates: Learning rates by network and arm; pairs that are not there are left out.
        """
        return [
            self._config(data, network, arm, rate, seed, FINAL)
            for seed in self.seeds
            for network in self.networks
            for arm in self.arms
            for rate in sorted(rates.get((network, arm), ()))
        ]

    def _config(
        self, data: str, network: str, arm: str, rate: float, seed: int, phase: str
    ) -> Config:
        return Config(data, network, self.group, arm, rate, seed, phase, self.recipe)

    def on(self, data: str) -> Study:
        """The same on another data set: the digits have 138 images a class for both parts."""
        few = {"digits": replace(self.recipe, validation_per_class=30)}
        return replace(self, recipe=few.get(data, self.recipe))

    def quick(self) -> Study:
        """The same at a size that only shows that it runs."""
        recipe = replace(self.recipe, epochs=2, evaluations=2)
        if isinstance(recipe, Adapting):
            recipe = replace(recipe, base_per_class=100, base_epochs=2)
        elif recipe.per_class is None:
            recipe = replace(recipe, per_class=90, batch_size=45)
        return replace(
            self, recipe=recipe, seeds=self.seeds[:3], tuning_seeds=(TUNING_SEEDS[0],), grid=(3e-3,)
        )


FROM_SCRATCH = (
    "base",
    "widened",
    "resolution",
    "no-writes",
    "per-sample",
    "per-batch",
    "carried",
    "lunkad2021",
    "frozen-floats",
    "bias-map",
)
STUDIES = {
    study.name: study
    for study in (
        Study(
            "low-data",
            "A. From scratch, 100 images a class",
            "Does memory help a network that is trained from scratch on as few images a class as "
            "Stanford Dogs has?",
            "arms",
            (*FROM_SCRATCH, "budget-auto"),
            Recipe(epochs=20),
        ),
        Study(
            "full-data",
            "A. From scratch, all images",
            "Does memory help where data is not scarce?",
            "arms",
            FROM_SCRATCH,
            Recipe(epochs=2, batch_size=100, per_class=None),
            tuning_seeds=TUNING_SEEDS[:1],
        ),
        Study(
            "adapting",
            "B. Adapting a trained network",
            "A network has learned half of the classes; what adapts it to the other half, at which "
            "price?",
            "methods",
            (
                "probe",
                "bias",
                "lora",
                "memory",
                "memory-head",
                "no-writes-head",
                "state-head",
                "full",
            ),
            Adapting(epochs=20),
            rule="Study C's rule, asked about memory with and without writes, and carried.",
            default="memory-head",
            rivals=("no-writes-head", "state-head"),
        ),
        Study(
            "ablations",
            "C. What the defaults should be",
            "Which budget, size of memory, read rule, init and write is best?",
            "arms",
            (
                "per-sample",
                "budget-auto",
                "budget-20",
                "budget-40",
                "memory-quarter",
                "memory-fourfold",
                "first-planes",
                "init-fresh",
                "no-writes",
                "per-batch",
                "mode-replace",
                "carried",
            ),
            Recipe(epochs=20),
            rule="The default gives way to an arm that is above it on one network and below it on "
            "none (95 % intervals). Of several that exclude each other, the one with the fewest "
            "parameters, unless another is above that one, by the same rule. Study B is asked "
            "likewise about the arms that it has. (Written when the write modes, which study A "
            "has, were known, and before any other of these runs that count had been looked at. "
            "Since then all were run at a second rate, see Method.)",
        ),
        Study(
            "confirmation",
            "C, again: a smaller memory, on ten other seeds",
            "One of study C's arms was above the default on one network. Is it again, on seeds "
            "that had no part in that?",
            "arms",
            ("per-sample", "memory-quarter"),
            Recipe(epochs=20),
            seeds=tuple(range(10, 20)),
            rule="Study C compares eleven arms on three networks; of thirty-three true zeros, one "
            "or two are expected to miss zero. So an arm that its rule finds must be above the "
            "default on one network and below it on none here as well, and then the default gives "
            "way. (Written after study C was known, and before any of these runs.)",
        ),
        Study(
            "adapting-confirmation",
            "B, again: a carried state, on ten other seeds",
            "With bootstrap-t intervals, one of study B's arms is above the default on one "
            "network, by a hair. Is it again, on seeds that had no part in that?",
            "methods",
            ("memory-head", "state-head"),
            Adapting(epochs=20),
            seeds=tuple(range(10, 20)),
            rule="As in study C, again: above the default on one network and below it on none here "
            "as well, and then the default gives way. (Written after study B was known, and before "
            "any of these runs.)",
        ),
    )
}
