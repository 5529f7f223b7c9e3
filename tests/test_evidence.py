"""The study: that arms are what they say, splits don't overlap, and statistics are right."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aim_surgery
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.nn.write_block import WriteBlock
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import data, dogs, page, tables
from benchmarks.evidence.adapting import METHODS, closest_sum, trained_parameters
from benchmarks.evidence.arms import ARMS, base, default_plan
from benchmarks.evidence.figures import mosaic
from benchmarks.evidence.first_planes import read_first_planes
from benchmarks.evidence.networks import NETWORKS, Network, parameter_count, widened
from benchmarks.evidence.recipes import (
    FINAL,
    STUDIES,
    TUNING,
    TUNING_SEEDS,
    Config,
    Recipe,
    Study,
)
from benchmarks.evidence.rows import Row, append, missing, read_rows
from benchmarks.evidence.run import halves, swapped_writes
from benchmarks.evidence.statistics import paired, spread
from benchmarks.evidence.training import train

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

SHAPE = (1, 28, 28)
IMAGES, LABELS = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(8)


def network(name: str = "resnet") -> Network:
    return Network(name, SHAPE, 10)


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    recipe = Recipe(epochs=steps, batch_size=8, evaluations=1)
    train(model, (IMAGES, LABELS), (IMAGES, LABELS), recipe, rate=0.01, seed=0)
    return model.eval()


# Arms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_arms_start_as_the_base_unless_they_are_about_that(name: str) -> None:
    expected = base(network(name), 0).eval()(IMAGES)
    others = {"widened", "resolution", "lunkad2021", "init-fresh"}
    for arm in ARMS:
        found = ARMS[arm].make(network(name), 0).eval()(IMAGES)
        same = torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert same == (arm not in others), arm


@pytest.mark.parametrize("name", NETWORKS)
def test_widened_has_the_parameters_of_memory_within_one_percent(name: str) -> None:
    with_memory = parameter_count(ARMS["per-sample"].make(network(name), 0))
    wide = parameter_count(ARMS["widened"].make(network(name), 0))
    assert abs(wide / with_memory - 1) <= 0.01
    assert parameter_count(base(network(name), 0)) < 0.95 * with_memory  # the base has not


def test_frozen_floats_stay_and_others_move() -> None:
    for arm, stays in (("frozen-floats", True), ("per-sample", False)):
        model = ARMS[arm].make(network(), 0)
        before = model.get_parameter("aim.memory.weight").clone()
        trained(model)
        assert torch.equal(model.get_parameter("aim.memory.weight"), before) == stays


def test_zeroed_memory_is_zero_at_evaluation() -> None:
    model = trained(ARMS["per-sample"].make(network(), 0))
    with aim_surgery.disable(model):
        notes = aim_surgery.read_memory(model, IMAGES)
        zeroed = model(IMAGES)
    assert all(not note.any() for note in notes.values())
    assert not torch.allclose(zeroed, model(IMAGES))
    assert all(note.any() for note in aim_surgery.read_memory(model, IMAGES).values())


def test_swapped_writes_are_those_of_another_image() -> None:
    model = trained(ARMS["per-sample"].make(network(), 0))
    with torch.no_grad():
        normal = model(IMAGES)
        same = model(IMAGES[:1].expand(4, *IMAGES.shape[1:]))
        with swapped_writes(model):
            assert not torch.allclose(model(IMAGES), normal)
            alike = model(IMAGES[:1].expand(4, *IMAGES.shape[1:]))
        assert torch.equal(alike, same)  # of the same image, it is no other
        assert torch.equal(model(IMAGES), normal)
    no_writes = ARMS["no-writes"].make(network(), 0).eval()
    with torch.no_grad(), swapped_writes(no_writes):
        swapped = no_writes(IMAGES)
    assert torch.equal(swapped, no_writes(IMAGES))


def test_memory_arms_differ_from_the_default_in_one_thing() -> None:
    plan = default_plan(network())
    assert len(plan.writes) == 3
    no_writes = plan_of(ARMS["no-writes"].make(network(), 0))
    assert (no_writes.memory, no_writes.writes) == (plan.memory, ())
    assert [r.planes for r in no_writes.reads] == [r.planes for r in plan.reads]
    assert {w.per for w in plan_of(ARMS["per-batch"].make(network(), 0)).writes} == {"batch"}
    assert plan_of(ARMS["carried"].make(network(), 0)).memory.carry == "state"
    four = plan_of(ARMS["memory-fourfold"].make(network(), 0))
    assert four.memory.floats == 4 * plan.memory.floats
    assert [r.planes for r in four.reads] == [r.planes for r in plan.reads]


@pytest.mark.parametrize("name", NETWORKS)
def test_bias_maps_have_no_memory_and_express_what_memory_without_writes_does(name: str) -> None:
    mapped = ARMS["bias-map"].make(network(name), 0)
    assert not hasattr(mapped, "aim")
    with_memory = ARMS["no-writes"].make(network(name), 0)
    for parameter in with_memory.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    with_memory.eval()
    # Its maps are what its layers give beside: the same as folding, on the study's own module.
    copied = {n: p for n, p in with_memory.state_dict().items() if not n.startswith("aim.")}
    maps = _maps(with_memory)
    own = mapped.state_dict()
    for key in own:
        layer = key.replace(".layer", "")
        if key.endswith(".map"):
            own[key] = maps[key.removesuffix(".map")]
        else:
            own[key] = (
                copied[layer][:, : own[key].shape[1]] if ".layer.weight" in key else copied[layer]
            )
    mapped.load_state_dict(own)
    difference = (mapped.eval()(IMAGES) - with_memory(IMAGES)).abs().max()
    assert difference < 1e-4
    for parameter in mapped.parameters():
        if parameter.ndim == 3:
            parameter.data.zero_()
    if name != "mlp":  # whose maps are vectors
        assert (mapped(IMAGES) - with_memory(IMAGES)).abs().max() > 1e-4


def _maps(gm: nn.Module) -> dict[str, torch.Tensor]:
    """conv(m, W_m) of each widened layer, from what reaches it and its own weight."""
    inputs: dict[str, torch.Tensor] = {}
    reads = {read.site.layer: read for read in plan_of(gm).reads}
    handles = [
        gm.get_submodule(layer).register_forward_hook(
            lambda _m, args, _o, layer=layer: inputs.update({layer: args[0]})
        )
        for layer in reads
    ]
    gm(IMAGES)
    for handle in handles:
        handle.remove()
    found = {}
    for layer, read in reads.items():
        module, joined = gm.get_submodule(layer), inputs[layer][:1].clone()
        own = joined.shape[1] - read.planes
        joined[:, :own] = 0
        bias = getattr(module, "bias", None)
        found[layer] = (module(joined)[0] - (0 if bias is None else _shaped(bias, module))).detach()
    return found


def _shaped(bias: torch.Tensor, module: nn.Module) -> torch.Tensor:
    return bias if isinstance(module, nn.Linear) else bias[:, None, None]


def test_first_planes_are_the_first_not_the_mean() -> None:
    first = ARMS["first-planes"].make(network(), 0)
    usual = ARMS["per-sample"].make(network(), 0)
    for model in (first, usual):
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data.fill_(0.01)
        model.get_parameter("conv.weight").data[:, 1:] = 0  # all floats fit into its one plane
    moved = [_moved_by(model, slice(-16, None)) for model in (first, usual)]  # the last plane
    assert moved == [False, True]
    assert _moved_by(first, slice(0, 1))
    assert isinstance(first, AimGraphModule)
    with pytest.raises(ValueError, match="were found"):
        read_first_planes(first)  # nothing is averaged any more


def _moved_by(model: nn.Module, floats: slice) -> bool:
    """Whether floats reach the output, writes left out."""
    for module in model.modules():
        if isinstance(module, WriteBlock):
            module.out.weight.data.zero_()
    before = model.eval()(IMAGES)
    model.get_parameter("aim.memory.bias").data[floats] += 10
    after = model(IMAGES)
    model.get_parameter("aim.memory.bias").data[floats] -= 10
    return not torch.allclose(before, after, atol=1e-5)


def test_the_settings_of_2021_have_two_memories_with_one_value_a_channel() -> None:
    plan = plan_of(ARMS["lunkad2021"].make(network(), 0))
    assert [memory.shared for memory in plan.memories] == [16, 16]
    assert {w.mode for w in plan.writes} == {"replace"}
    assert {r.version for r in plan.reads if r.memory == "identity"} == {0}
    assert all(r.site.layer.endswith("conv1") and r.planes == r.available for r in plan.reads)


def test_twice_the_resolution() -> None:
    sizes: dict[str, int] = {}

    def note(arm: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        return lambda _module, _args, output: sizes.update({arm: output.shape[-1]})

    for arm in ("base", "resolution"):
        model = ARMS[arm].make(network(), 0)
        model.get_submodule("stages").register_forward_hook(note(arm))
        model(IMAGES)
    assert sizes == {"base": 4, "resolution": 7}


# Methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_lora_is_as_large_as_memory_and_the_base_stays_frozen(name: str) -> None:
    half = dataclasses.replace(network(name), classes=5)
    made = {arm: METHODS[arm].make(base(half, 0), half, 0) for arm in METHODS}
    counts = {arm: trained_parameters(model) for arm, model in made.items()}
    head = counts["probe"]
    memory, lora = counts["memory-head"] - head, counts["lora"] - head
    assert abs(lora / memory - 1) <= 0.01
    assert head < counts["bias"] < counts["memory-head"] < counts["full"]
    plans = {arm: plan_of(made[f"{arm}-head"]) for arm in ("memory", "no-writes", "state")}
    assert len({tuple(read.planes for read in plan.reads) for plan in plans.values()}) == 1
    assert [bool(plan.writes) for plan in plans.values()] == [True, False, True]
    assert [bool(plan.memory.carry == "state") for plan in plans.values()] == [False, False, True]
    assert counts["state-head"] == counts["memory-head"] > counts["no-writes-head"] > head
    frozen = {
        arm: {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        for arm, model in made.items()
    }
    for arm, model in made.items():
        buffers = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
        recipe = Recipe(epochs=2, batch_size=8, evaluations=1)
        some = (IMAGES, LABELS % 5)
        train(model, some, some, recipe, rate=0.01, seed=0, training=METHODS[arm].training)
        for n, parameter in model.named_parameters():
            if n in frozen[arm]:
                assert torch.equal(parameter, frozen[arm][n]), (arm, n)
        moved = [n for n, b in model.named_buffers() if n in buffers and not b.equal(buffers[n])]
        assert bool(moved) == (arm == "full" and name != "mlp"), arm
        states = [b for n, b in model.named_buffers() if n.endswith("memory.state")]
        assert [bool(state.any()) for state in states] == [True] * (arm == "state-head"), arm
    assert not frozen["full"]


def test_closest_sum() -> None:
    assert closest_sum((5, 3), 11, 3) == (1, 2)
    assert closest_sum((10,), 4, 3) == (0,)


# Data ---------------------------------------------------------------------------------------


def test_splits_do_not_overlap_and_validation_is_one_for_all_seeds() -> None:
    labels = torch.arange(10).repeat(40)
    splits = [data.split(labels, 20, 10, seed) for seed in (0, 1, 1000)]
    validation = {tuple(sorted(split.validation.tolist())) for split in splits}
    assert len(validation) == 1
    for split in splits:
        assert not set(split.train.tolist()) & set(*validation)
        assert labels[split.train].bincount().tolist() == [20] * 10
        assert labels[split.validation].bincount().tolist() == [10] * 10
    assert splits[0].train.tolist() != splits[1].train.tolist()
    everything = data.split(labels, None, 10, 0)
    assert len(everything.train) + len(everything.validation) == len(labels)
    with pytest.raises(ValueError, match="too few"):
        data.split(labels, 31, 10, 0)


def test_digits_have_a_test_part_of_their_own() -> None:
    found = data.load("digits")
    assert (len(found.train), len(found.test), found.shape) == (1397, 400, (1, 8, 8))
    assert found.test.labels.bincount().tolist() == [40] * 10
    inputs, _ = found.inputs(found.train, torch.device("cpu"))
    assert abs(inputs.mean()) < 1e-4
    old, new = halves(10, seed=3)
    assert sorted([*old.tolist(), *new.tolist()]) == list(range(10))
    mine = data.only_classes(found.test, new)
    assert len(mine) == 200
    expected = found.test.labels[torch.isin(found.test.labels, new)]
    assert torch.equal(new[mine.labels], expected)


def test_fashion_mnist_is_read_from_idx_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, head, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, pixels[:3])):
            with gzip.open(tmp_path / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(b"\0" * head + content.tobytes())
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path)
    images, _ = data._fashion_mnist()
    assert images.pixels.flatten().tolist() == pixels.tolist()
    assert images.labels.tolist() == [0, 1, 2]
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        data._fashion_mnist()


def make_dogs(folder: Path, per_class: int = 4) -> Path:
    """A folder as the two archives unpack: two breeds, official lists."""
    from PIL import Image
    from scipy.io import savemat

    names = [f"n0{c}-Dog{c}/n0{c}_{i}.jpg" for c in (1, 2) for i in range(2 * per_class)]
    for index, name in enumerate(names):
        path = folder / "Images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + index, 30), (10 * index, 0, 99)).save(path)
    for part, which in (("train", 0), ("test", 1)):
        chosen = names[which::2]
        cells = np.empty((len(chosen), 1), object)
        cells[:, 0] = chosen
        labels = np.array([[int(name[2])] for name in chosen])
        savemat(folder / f"{part}_list.mat", {"file_list": cells, "labels": labels})
    return folder


def test_stanford_dogs_are_read_by_the_official_lists(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    train_files, test_files = dogs.read_lists(make_dogs(tmp_path))
    assert train_files.labels == test_files.labels == (0, 0, 0, 0, 1, 1, 1, 1)
    assert not set(train_files.paths) & set(test_files.paths)
    left, held = dogs.hold_out(train_files, 1, seed=0)
    assert (left.labels, held.labels) == ((0, 0, 0, 1, 1, 1), (0, 1))
    assert set(left.paths) | set(held.paths) == set(train_files.paths)
    plain = dogs.Photographs(train_files, 32, augmented=False)
    image, label = plain[4]
    assert (tuple(image.shape), label) == ((3, 32, 32), 1)
    assert image[2].sub(99).abs().max() < 5  # bytes, not 0 ... 1
    turned = dogs.Photographs(train_files, 32, augmented=True)
    assert turned[4][0].shape == image.shape
    assert turned[4][0].min() >= 0
    assert not torch.equal(turned[4][0], turned[4][0])
    train_files.paths[0].unlink()
    with pytest.raises(SystemExit, match="1 of 8 images"):
        dogs.read_lists(tmp_path)
    with pytest.raises(SystemExit, match=r"train_list\.mat is neither"):
        dogs.read_lists(tmp_path / "Images")


def test_the_originals_experiment_is_one_command(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    folder = make_dogs(tmp_path / "dogs", per_class=3)
    arguments = ["--study", "stanford-dogs-held-out", "--data", str(folder), "--quick"]
    output = tmp_path / "out"
    command.main([*arguments, "--arms", "control", "--output", str(output)])
    command.main([*arguments, "--arms", "control", "--output", str(output), "--resume"])
    lines = (output / "rows" / dogs.FILE).read_text().splitlines()
    assert len(lines) == 1
    row = json.loads(lines[0])
    assert row["parameters"] > 23_000_000
    assert 0 <= row["test"] <= 1
    assert "## Stanford Dogs" in (output / "README.md").read_text()
    assert dogs.AUTHOR.held_out_per_class == 0
    assert (dogs.AUTHOR.rate, dogs.AUTHOR.batch_size, dogs.AUTHOR.epochs) == (1e-3, 16, 50)


# Rows and numbers ---------------------------------------------------------------------------


def test_known_numbers() -> None:
    assert spread([1.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)
    ten = {seed: 0.5 + 0.01 * seed for seed in range(10)}
    shifted = {seed: value + 0.02 for seed, value in ten.items()}
    constant = paired(shifted, ten)
    assert constant is not None
    assert (constant.count, constant.side) == (10, 1)
    assert constant.mean == pytest.approx(0.02)
    assert constant.low == pytest.approx(0.02)
    noisy = paired({s: v + 0.01 * (-1) ** s for s, v in ten.items()}, ten)
    assert noisy is not None
    assert noisy.mean == pytest.approx(0, abs=1e-12)
    assert noisy.side == 0
    # of ±0.01, ten times: the mean's standard error is 0.01 / sqrt(9), and Student's t is 2.26
    assert noisy.high == pytest.approx(2.26 * 0.01 / 9**0.5, rel=0.15)
    swapped = paired(ten, shifted)
    assert swapped is not None
    assert swapped.side == -1
    assert paired({1: 0.5}, {2: 0.5}) is None
    one = paired({1: 0.5}, {1: 0.25})
    assert one is not None
    assert (one.mean, one.low, one.side) == (0.25, None, 0)
    assert tables.points(constant) == "+2.00 [+2.00, +2.00]"
    few = paired({s: 0.1 * s for s in range(4)}, dict.fromkeys(range(4), 0.0))
    assert few is not None
    assert (few.low, few.side, tables.points(few)) == (None, 0, "+15.00")
    alike = paired(ten, ten)
    assert alike is not None
    assert (alike.side, tables.points(alike)) == (0, "the same")


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of ten seeds; a BCa interval would in 90 % of the cases."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = paired(dict(enumerate(generator.normal(size=10))), dict.fromkeys(range(10), 0.0))
        assert found is not None
        held += (found.low or 0) <= 0 <= (found.high or 0)
    assert 0.925 <= held / 400 <= 0.975


def test_what_resumes_is_what_has_no_row(tmp_path: Path) -> None:
    study = STUDIES["low-data"]
    configs = study.tuning("digits")
    assert len({config.digest for config in configs}) == len(configs) == 3 * 11 * 2 * 4
    assert not {c.seed for c in configs} & set(study.seeds)
    assert {c.seed for c in configs} == set(TUNING_SEEDS)
    path = tmp_path / "rows" / "low-data.jsonl"
    append(path, Row(configs[0].digest, dataclasses.asdict(configs[0]), validation=0.5))
    append(path, Row(configs[0].digest, dataclasses.asdict(configs[0]), 1.0, validation=0.7))
    with path.open("a") as file:
        file.write('{"digest": "cut sho')
    rows = read_rows(tmp_path)
    assert missing(configs, rows) == configs[1:]
    for config in configs[1:3]:  # the line that was cut takes no other with it
        append(path, Row(config.digest, dataclasses.asdict(config)))
    assert missing(configs, read_rows(tmp_path)) == configs[3:]
    assert rows[configs[0].digest].validation == 0.7
    other = dataclasses.replace(configs[0], recipe=dataclasses.replace(study.recipe, epochs=21))
    assert missing([other], rows) == [other]


def test_rates_are_chosen_on_validation_and_only_when_all_are_there() -> None:
    study = dataclasses.replace(STUDIES["low-data"], networks=("mlp",), arms=("base",))
    configs = study.tuning("digits")
    rows = {c.digest: Row(c.digest, {}, validation=0.8 if c.rate == 3e-3 else 0.7) for c in configs}
    assert tables.finalists(study, "digits", rows) == {("mlp", "base"): (3e-3, 1e-3)}
    rows.pop(configs[0].digest)
    assert tables.finalists(study, "digits", rows) == {}


def test_of_two_rates_the_seeds_that_count_choose_by_validation() -> None:
    study = dataclasses.replace(STUDIES["low-data"], networks=("mlp",), arms=("base", "widened"))
    rows = {c.digest: Row(c.digest, {}, validation=-c.rate) for c in study.tuning("digits")}
    rates = tables.finalists(study, "digits", rows)
    assert rates["mlp", "base"] == (1e-3, 3e-3)
    for config in study.final("digits", rates):
        better = config.rate == (3e-3 if config.arm == "base" else 1e-3)
        row = Row(config.digest, dataclasses.asdict(config), parameters=7)
        row.validation, row.test = 0.5 + 0.1 * better, 0.9 - 0.2 * better - 0.01 * config.seed
        rows[config.digest] = row
    found = tables.cells(study, "digits", "mlp", rows)
    assert {name: cell.rate for name, cell in found.items()} == {"base": 3e-3, "widened": 1e-3}
    assert found["base"].test == pytest.approx({seed: 0.7 - 0.01 * seed for seed in range(10)})
    header, ((title, *differences), *_) = tables.rate_table(study, found)
    assert header == ("", "0.001", "0.003")
    assert (title, [text.split()[0] for text in differences]) == (
        found["widened"].title, ["-20.00", "+20.00"]
    )  # fmt: skip
    gone = next(c for c in study.final("digits", rates) if (c.seed, c.rate) == (4, 3e-3))
    rows.pop(gone.digest)
    assert sorted(tables.cells(study, "digits", "mlp", rows)["base"].test) == [
        0, 1, 2, 3, 5, 6, 7, 8, 9
    ]  # fmt: skip


def made_rows(study: Study, gains: dict[str, float]) -> dict[str, Row]:
    """Final rows with known accuracies."""
    rates = dict.fromkeys(((n, a) for n in study.networks for a in study.arms), study.grid[:1])
    rows = {}
    for config in study.final("digits", rates):
        accuracy = 0.8 + 0.001 * config.seed + gains[config.arm] * (1 + 0.1 * (config.seed % 2))
        row = Row(config.digest, dataclasses.asdict(config), test=accuracy, parameters=100)
        row.curve = [[1.0, 2.0, accuracy - 0.1], [2.0, 1.0, accuracy]]
        row.trained_parameters = 100
        rows[config.digest] = row
    return rows


def test_the_page_says_what_the_numbers_say(tmp_path: Path) -> None:
    study = dataclasses.replace(
        STUDIES["low-data"],
        arms=("base", "widened", "no-writes", "per-sample"),
        networks=("mlp",),
        grid=(1e-3,),
    )
    for sign in (1, -1):
        gains = {"base": 0.0, "widened": sign * 0.02, "no-writes": 0.0, "per-sample": 0.0}
        rows = made_rows(study, gains)
        text = page.write(tmp_path, "digits", rows, {study.name: study}).read_text()
        assert f"- base, widened | **{-sign * 2.1:+.2f} [" in text
        assert "| memory, per-sample writes - memory, no writes | the same |" in text
        assert "does a carried state" not in text
    assert (tmp_path / "figures" / "low-data-differences.png").stat().st_size > 1000
    shared = STUDIES["ablations"]  # has an arm of the other's, whose row has no base beside it
    alone = {d: r for d, r in rows.items() if r.config["arm"] == "no-writes"}
    both = {s.name: s for s in (study, dataclasses.replace(shared, networks=("mlp",)))}
    text = page.write(tmp_path / "alone", "digits", alone, both).read_text()
    assert "memory, no writes" in text
    assert "does memory help?" not in text
    ahead = ("base", "resnet")  # an arm that has been run on more seeds than others
    two = {
        digest: row
        for digest, row in rows.items()
        if row.config["seed"] < 2 or (row.config["arm"], row.config["network"]) == ahead
    }
    text = page.write(tmp_path / "two", "digits", two, {study.name: study}, fewest=5).read_text()
    assert "100 images a class: begun, 2 of 10 seeds so far; told of from 5 on" in text
    assert "| base |" not in text
    empty = page.write(tmp_path / "empty", "digits", {}, {study.name: study}).read_text()
    assert "No run has finished yet." in empty


def test_defaults_give_way_to_what_is_above_them_somewhere_and_below_nowhere(
    tmp_path: Path,
) -> None:
    arms = ("per-sample", "no-writes", "carried", "first-planes")
    study = dataclasses.replace(STUDIES["ablations"], arms=arms, grid=(1e-3,))
    gains = {"per-sample": 0.0, "no-writes": 0.02, "carried": 0.02, "first-planes": 0.0}
    rows = made_rows(study, gains)
    for row in rows.values():
        if (row.config["arm"], row.config["network"]) == ("carried", "vgg"):
            row.test = (row.test or 0.0) - 0.05
        if (row.config["arm"], row.config["network"]) == ("no-writes", "mlp"):
            row.test = (row.test or 0.0) - 0.02 * (1 + 0.1 * (row.config["seed"] % 2))
    text = page.write(tmp_path, "digits", rows, {study.name: study}).read_text()
    chosen = text.split("Arms of that kind:")[1].split("![")[0].strip().splitlines()
    assert len(chosen) == 1  # carried memory is below on one network, first planes nowhere above
    assert chosen[0].startswith("* memory, no writes: resnet +2.10 [")
    found = {name: tables.cells(study, "digits", name, rows) for name in study.networks}
    for rivals, expected in ((("carried", "per-sample"), 0), (("no-writes", "carried"), 1)):
        asked = dataclasses.replace(study, default="first-planes", rivals=rivals)
        assert len(tables.candidates(asked, found)) == expected, rivals
    against = dataclasses.replace(study, default="carried", rivals=("per-sample",))
    assert not tables.candidates(against, found)  # above on one network, below on two
    none = page.write(tmp_path, "digits", made_rows(study, dict.fromkeys(arms, 0.0)),
                      {study.name: study}).read_text()  # fmt: skip
    assert "Arms of that kind:\n\n* none" in none


def test_a_mosaic_has_every_float_once() -> None:
    picture = mosaic(list(range(3 * 4)), (3, 2, 2))
    assert picture.shape == (5, 5)
    assert sorted(picture[~np.isnan(picture)]) == list(range(12))
    assert mosaic([1.0, 2.0, 3.0], (3,)).shape == (2, 2)


def test_a_quick_study_writes_rows_tables_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    arguments = ["--data", "digits", "--quick", "--networks", "mlp", "--output", str(tmp_path)]
    some = ["--arms", "base", "per-sample"]
    command.main(["--study", "low-data", "--seeds", "2", *some, *arguments])
    rows = read_rows(tmp_path)
    assert len(rows) == 4
    assert all(row.config["phase"] == FINAL and row.test is not None for row in rows.values())
    zeroed = [row.test_zeroed is not None for row in rows.values()]
    assert sum(zeroed) == 2
    assert sum(row.memory is not None for row in rows.values()) == 1
    ran: list[Config] = []
    monkeypatch.setattr(command, "run", lambda config, device: ran.append(config))
    command.main(["--study", "low-data", "--seeds", "2", *some, *arguments, "--resume"])
    assert not ran
    monkeypatch.undo()
    command.main(["--study", "adapting", "--seeds", "1", *arguments])
    text = (tmp_path / "README.md").read_text()
    for part in ("memory, per-sample writes, zeroed at evaluation", "LoRA", "at equal parameters?"):
        assert part in text
    assert "A. From scratch, 100 images a class: mlp" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no arm nothing"):
        command.main(["--study", "low-data", *arguments, "--arms", "nothing"])


def test_tuning_does_not_look_at_the_test_set() -> None:
    config = Config(
        "digits", "mlp", "arms", "base", 1e-3, 1000, TUNING, Recipe(1, 50, 60, 30, evaluations=1)
    )
    row = command.run(config)
    assert row.test is None
    assert 0 < row.validation < 1
    again = command.run(config)
    assert again.curve == row.curve


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        return None if name == "scipy" else sys

    monkeypatch.setattr("importlib.util.find_spec", absent)
    with pytest.raises(SystemExit, match="scipy"):
        command.main(["--study", "page"])


def test_widened_is_as_close_as_channels_allow() -> None:
    assert widened(network("mlp"), 43018).widths == (128, 128)
