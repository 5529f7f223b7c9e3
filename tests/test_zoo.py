"""The zoo's command on tiny models, the limits of its processes, and what its summary says."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import aim_surgery
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.verification.samples import samples_for
from benchmarks.zoo import checks, libraries, summary
from benchmarks.zoo.__main__ import choose, main, parser, run_one
from benchmarks.zoo.on_disk import saved_on_disk
from benchmarks.zoo.processes import Ended, run_limited, start_server
from benchmarks.zoo.rows import DONE, Row, append, compact, read_rows, rows_file
from benchmarks.zoo.trial import describe_operated

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")


@needs_timm
def test_two_models_give_two_rows_and_a_summary(tmp_path: Path) -> None:
    arguments = ["--library", "timm", "--only", "test_resnet", "--output", str(tmp_path)]
    main([*arguments, "--jobs", "1"])
    main(["--library", "timm", "--only", "test_efficientnet_ln", "--output", str(tmp_path)])
    rows = read_rows(tmp_path, "timm")
    assert sorted(rows) == ["test_efficientnet_ln", "test_resnet"]
    for row in rows.values():
        assert (row.stage, row.errors, row.captured, row.checks) == (DONE, [], "traced", "full")
        assert row.ok
        assert row.reached == row.accounted == row.audited != [0, 0]
        assert row.backward == "training"
        assert row.checked_on == "float32[2, 3, 96, 96]"
        assert row.ratio is not None
    written = json.loads((tmp_path / "timm.json").read_text())
    assert written["failures"] == {}
    assert "2 of 2 (100.00%)" in (tmp_path / "timm.md").read_text()

    source = rows["test_resnet"].source
    again = parser().parse_args([*arguments, "--resume"])
    assert choose(["test_resnet", "other"], again, source) == []
    assert choose(["test_resnet", "other"], again, "another source") == ["test_resnet"]


def test_shards_deal_out_all_models_and_failures_can_run_again(tmp_path: Path) -> None:
    names = [f"model_{index}" for index in range(10)]
    common = ["--library", "timm", "--output", str(tmp_path)]
    hands = [
        choose(names, parser().parse_args([*common, "--shard", f"{i}/3"]), "") for i in (1, 2, 3)
    ]
    assert sorted(name for hand in hands for name in hand) == sorted(names)
    path = rows_file(tmp_path, "timm", (2, 3))
    append(path, Row("timm", "model_1", finished=1, errors=["building: no"]))
    append(path, Row("timm", "model_4", finished=1, verified=True))
    assert choose(names, parser().parse_args([*common, "--failed"]), "") == ["model_1"]


def test_the_smallest_models_can_run_first(tmp_path: Path) -> None:
    for name, count in (("large", 9), ("small", 1), ("medium", 5)):
        append(rows_file(tmp_path / "meta", "timm", None), Row("timm", name, parameters=count))
    asked = ["--library", "timm", "--output", str(tmp_path), "--smallest-first"]
    found = choose(["large", "medium", "small"], parser().parse_args(asked), "")
    assert found == ["small", "medium", "large"]


def test_the_newest_row_of_a_model_counts(tmp_path: Path) -> None:
    path = rows_file(tmp_path, "timm", None)
    for finished, model in ((1, "b"), (2, "a"), (3, "b")):
        append(path, Row("timm", model, finished=finished))
    with path.open("a") as file:
        file.write('{"library": "ti')  # cut short
    compact(path)
    assert [json.loads(line)["finished"] for line in path.read_text().splitlines()] == [2, 3]
    append(rows_file(tmp_path, "timm", (1, 2)), Row("timm", "a", finished=9))
    assert {row.model: row.finished for row in read_rows(tmp_path, "timm").values()} == {
        "a": 9,
        "b": 3,
    }


def _sends_and_sleeps(send: Callable[[Any], None]) -> None:
    send("begun")
    time.sleep(60)


def _sends_and_computes(send: Callable[[Any], None]) -> None:
    send("begun")
    while True:
        pass


def _takes_memory(send: Callable[[Any], None]) -> None:
    send("begun")
    held = []
    while True:
        held.append(torch.ones(2**24))
        time.sleep(0.02)


def _raises(send: Callable[[Any], None]) -> None:
    raise RuntimeError


@pytest.mark.parametrize(
    ("function", "seconds", "memory", "reason"),
    [
        (_sends_and_computes, 0.5, 8, "the time limit of 0.5 s"),
        (_sends_and_sleeps, 0.5, 8, "the time limit of 0.5 s"),
        (_takes_memory, 60, 1, "the memory limit of 1 GiB"),
        (_raises, 60, 8, "ended with exit code 1"),
    ],
)
def test_a_process_that_is_ended_says_why(
    function: Callable[..., object], seconds: float, memory: float, reason: str
) -> None:
    start_server()
    ended = run_limited(function, seconds=seconds, memory=memory)
    assert ended.reason == reason
    assert ended.last == (None if function is _raises else "begun")


def test_what_backward_needs_can_lie_on_disk() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.GELU(), nn.Conv2d(64, 8, 3), nn.Tanh()
    )
    image = torch.rand(2, 3, 64, 64)
    model(image).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with saved_on_disk(model) as folder:
        loss = model(image).sum()
        written = [path.stat().st_size for path in folder.iterdir()]
        loss.backward()
    assert len(written) == 3  # of norm, GELU and the second convolution
    assert min(written) >= 2**20
    assert not folder.exists()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


@needs_timm
@pytest.mark.parametrize("smaller", [False, True])
def test_a_step_that_meets_the_limit_of_memory_is_tried_on_disk(
    smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the limit ends the first process while it times, and the second does what it is told."""
    on_disk = []

    def ends_once(function: Callable[..., object], *args: Any, **limits: float) -> Ended:
        sent: list[Any] = []
        function(sent.append, *args)
        on_disk.append(args[-1])
        if len(on_disk) > 1:
            return Ended(sent[-1], "")
        timing = [row for row in sent if row["stage"] == "timing"][-1]
        return Ended(timing, "the memory limit of 20 GiB")

    monkeypatch.setattr("benchmarks.zoo.__main__.run_limited", ends_once)
    if not smaller:
        monkeypatch.setattr(checks, "smaller_inputs", lambda *_: None)
    threads = torch.get_num_threads()
    row = run_one(Row("timm", "test_resnet"), 900, 20, threads, alone=True)
    assert on_disk == [False, True]
    assert row.ok
    assert row.step_seconds is None
    assert "a training step takes more than the 20.0 GiB" in row.notes
    assert row.checks == ("full" if smaller else "light")
    assert ("what the backward needs was kept on disk" in row.notes) is not smaller


def test_rows_of_processes_that_say_nothing_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = Row("timm", "none")
    ended = Ended(None, "ended with exit code 1")
    monkeypatch.setattr("benchmarks.zoo.__main__.run_limited", lambda *_, **__: ended)
    for _ in range(2):
        row = run_one(blank, 1, 1, 1, alone=True)
        assert row.errors == ["building: ended with exit code 1"]
    assert blank.errors == []


def _operated() -> tuple[nn.Module, AimGraphModule]:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    return model, aim_surgery.transform(model, torch.zeros(2, 64, 8, 8))


class _Nothing(nn.Module):
    """Gives no values at all."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(64, 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)[:, :0]


def test_light_checks_without_anything_to_judge_fail() -> None:
    model = _Nothing().eval()
    gm = aim_surgery.transform(model, torch.zeros(2, 64, 8, 8))
    row = Row("timm", "nothing")
    checks.check_light(model, gm, samples_for(model, gm.plan, None), model, row)
    assert "light: in neither mode, the original gives what could be judged" in row.errors
    assert not row.verified


@pytest.mark.parametrize("brief", [False, True])
def test_light_checks_pass_and_are_seen_to_fail(brief: bool) -> None:
    model, gm = _operated()
    row = Row("timm", "two convolutions")
    checks.check_light(model, gm, samples_for(model, gm.plan, None), model, row, brief=brief)
    assert (row.errors, row.verified, row.backward) == ([], True, "evaluation")
    assert (row.checks, row.difference64 is None) == ("brief" if brief else "light", brief)
    assert row.reached[0] == 2

    model, gm = _operated()
    with torch.no_grad():
        gm.get_parameter("0.bias").add_(1)
    row = Row("timm", "broken")
    checks.check_light(model, gm, samples_for(model, gm.plan, None), model, row, brief=brief)
    assert not row.verified
    modes = [error.partition("), ")[2].partition(",")[0] for error in row.errors]
    assert modes == ["evaluation", "training"]
    assert row.errors[0].startswith("light: outputs differ by")


def test_the_audit_sees_reads_in_python_calls_on_meta() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 64)).eval()
    gm = aim_surgery.transform(model, torch.randn(5, 2, 64))
    row = Row("timm", "recurrent")
    checks.audit(copy.deepcopy(model).to("meta"), gm, row)
    assert (row.errors, row.reached[0], row.audited[0]) == ([], 3, 3)


class _BranchesOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_opaque_submodules_are_named_with_their_reason() -> None:
    model = nn.Sequential(nn.Linear(64, 64), _BranchesOnData(), nn.Linear(64, 64)).eval()
    row = Row("timm", "opaque")
    describe_operated(model, aim_surgery.transform(model), None, row)
    assert row.captured == "partly opaque"
    ((reason, path, count),) = row.opaque
    assert count == 1
    assert path == "1"
    assert reason


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (
            "transforming: CaptureError: ViT failed in 'a.b' with the example inputs (x: [2, 3]) "
            "at /home/x/site-packages/timm/vit.py:12 `x.item()`: RuntimeError: no",
            "transforming: RuntimeError: no at timm/vit.py:12 `x.item()`",
        ),
        (
            "equivalence: outputs differ by 1.0e-03 (limit 1e-12), training, batch 2, float64: a",
            "equivalence: outputs differ, training",
        ),
        (
            "coverage: blocks.0.qkv.weight is used by bmm, and the plan does not mention it",
            "coverage: ….weight is used by bmm, and the plan does not mention it",
        ),
        (
            "transforming: CaptureError: T5 failed in 'stack' with the example inputs (ids: [2, 8])"
            ": NotImplementedError: argument of type: <class 'a.b.Cache'>",
            "transforming: CaptureError: NotImplementedError: argument of type: <class '….Cache'>",
        ),
        ("verifying: the time limit of 900 s", "verifying: the time limit of N s"),
    ],
)
def test_errors_that_come_down_to_the_same_are_one_group(error: str, key: str) -> None:
    assert summary.group_key(error) == key


def test_totals_hold_shares_against_the_limits() -> None:
    good = Row("timm", "good", captured="traced", checks="full", verified=True)
    good.audited = good.reached = good.accounted = [10, 100]
    good.transform_seconds, good.step_seconds = 3.0, 1.0
    bad = Row("timm", "bad", errors=["building: no"])
    found = {
        total.name: total
        for total in summary.totals([good, bad], libraries.LIBRARIES["timm"], ["good", "bad"])
    }
    assert found["models tried"].ok
    assert found["transformed and verified"].ok is False
    assert found["audited weights reached"].ok
    assert found["time of transform ÷ forward and backward, median"].ok is False
    assert list(summary.failures([good, bad])) == ["building: no"]


def test_models_of_other_libraries_are_made_as_they_are_described() -> None:
    from benchmarks.zoo import others
    from benchmarks.zoo.others_models import ENTRIES

    entry = others.Entry("torch.nn:Linear", others.floats((2, 4)), {"bias": False}, (4, 3))
    model, inputs = entry.build()
    assert model(*inputs).shape == (2, 3)
    packages = {name.partition(":")[0] for name in ENTRIES}
    assert len(ENTRIES) > 130
    assert len(packages) > 15
    for entry in ENTRIES.values():
        inputs = entry.inputs()
        values = inputs.values() if isinstance(inputs, dict) else inputs
        assert any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(list(values)))


def test_missing_leaves_out_what_has_a_row_of_any_source(tmp_path: Path) -> None:
    names = [f"model_{i}" for i in range(3)]
    append(rows_file(tmp_path, "timm", None), Row("timm", "model_1", source="another"))
    options = parser().parse_args(["--library", "timm", "--output", str(tmp_path), "--missing"])
    assert choose(names, options, "this") == ["model_0", "model_2"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_the_table_of_transformers_covers_all_kinds() -> None:
    models = pytest.importorskip("benchmarks.zoo.transformers_models")
    assert len(models.MODELS) >= 25
    model, inputs = libraries.build("transformers", "vit")
    assert isinstance(inputs, dict)
    assert model(**inputs).logits.shape[0] == inputs["pixel_values"].shape[0]
    kinds = {entry.kind for entry in models.MODELS.values()}
    assert {"text", "vision", "audio", "multimodal", "encoder-decoder"} <= kinds
