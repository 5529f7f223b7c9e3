import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner, Result

import aim_surgery
from aim_surgery import Plan, cli, cli_demo
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.reading.safetensors_file import CRC_KEY

FACTORY = """
import torch
from torch import nn

def small(width: int = 16, num_classes: int = 10):
    net = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )
    net.dummy_inputs = {"input": torch.zeros(2, 3, 12, 12)}
    return net

def words():
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 50))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with nets.py and the weights of its models."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    torch.manual_seed(0)
    torch.save(build("nets.py:small").state_dict(), "small.pt")
    torch.save(build("nets.py:words").state_dict(), "words.pt")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, words, prog_name="aim-surgery")


def run_well(*words: str) -> str:
    result = run(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def error_of(*words: str) -> str:
    """The one line on stderr of a command that fails, without having written anything."""
    before = snapshot()
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert snapshot() == before
    return result.stderr


def usage_error_of(*words: str) -> str:
    before = snapshot()
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert snapshot() == before
    return " ".join(result.stderr.split())


def snapshot() -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in Path().iterdir() if entry.is_file()}


SMALL = ("small.pt", "--model", "nets.py:small")


def test_version():
    assert run_well("--version") == f"aim-surgery {aim_surgery.__version__}\n"


@pytest.mark.parametrize(
    "command", ["plan", "transform", "verify", "inspect", "restore", "fold", "demo"]
)
def test_help(command):
    assert "aim-surgery" in run_well("--help")
    assert "--" in run_well(command, "--help")


# plan ---------------------------------------------------------------------------------------


def test_plan_prints_the_plan_as_it_is(folder):
    text = run_well("plan", *SMALL)
    model = build("nets.py:small")
    assert text == f"{aim_surgery.plan(model)}\n"


def test_plan_prints_json_alone(folder):
    options = ("--memory", "100", "--budget", "none", "--init", "fresh", "--input", "2,3,20,20")
    plan = Plan.from_json(run_well("plan", *SMALL, *options, "--json"))
    assert plan.memory.floats == 100
    assert plan.init == "fresh"
    assert plan.inputs.args == (("tensor", (2, 3, 20, 20), "float32"),)


def test_plan_filters_sites(folder):
    options = ("--include", "0", "--include", "3", "--include", "6", "--exclude", "3")
    plan = Plan.from_json(run_well("plan", *SMALL, *options, "--budget", "none", "--json"))
    assert [read.site.name for read in plan.reads] == ["0", "6"]
    assert "--write" in run_well("plan", "--help")
    assert run_well("plan", *SMALL, "--write", "none")


def test_plan_takes_a_budget_in_percent_or_as_a_ratio(folder):
    sized = (*SMALL, "--input", "2,3,8,8", "--json")
    percent = run_well("plan", *sized, "--budget", "30%")
    assert percent == run_well("plan", *sized, "--budget", "0.3")
    plan = Plan.from_json(percent)
    assert plan.new_parameters <= 0.3 * plan.base_parameters


def test_plan_takes_write_options(folder):
    options = ("--write", "batch", "--write-at", "0", "--carry", "state")
    plan = Plan.from_json(run_well("plan", *SMALL, *options, "--json"))
    assert [(write.point.name, write.per) for write in plan.writes] == [("0", "batch")]
    assert plan.memory.carry == "state"
    assert "write point 'nowhere' does not exist" in error_of(
        "plan", *SMALL, "--write-at", "nowhere"
    )


def test_plan_takes_model_arguments(folder):
    torch.save(build("nets.py:small", width=8).state_dict(), "narrow.pt")
    options = ("--model", "nets.py:small", "--model-args", '{"width": 8}')
    text = run_well("plan", "narrow.pt", *options)
    parameters = sum(p.numel() for p in build("nets.py:small", width=8).parameters())
    assert f"parameters  {parameters:,} -> " in text


# transform and verify -----------------------------------------------------------------------


def test_transform_writes_a_model_that_verify_accepts(folder):
    text = run_well("transform", *SMALL, "-o", "aim.safetensors")
    assert text.startswith("wrote       aim.safetensors\nnot written: 6: no later site")
    assert "\nmemory  " in text
    assert "\nparameters  " in text
    assert sorted(snapshot()) == ["aim.safetensors", "nets.py", "small.pt", "words.pt"]

    original = build("nets.py:small")
    original.load_state_dict(torch.load("small.pt"))
    gm = load("aim.safetensors", "nets.py:small")
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(gm.eval()(image), original.eval()(image))

    verified = run_well("verify", "small.pt", "aim.safetensors", "--model", "nets.py:small")
    assert verified.strip()
    sized = ("--input", "3,3,40,40")
    run_well("verify", "small.pt", "aim.safetensors", "--model", "nets.py:small", *sized)


def test_transform_of_a_model_on_tokens(folder):
    options = ("--model", "nets.py:words")
    run_well("transform", "words.pt", *options, "-o", "aim.safetensors")
    run_well("verify", "words.pt", "aim.safetensors", *options)


def test_transform_does_what_a_plan_says(folder):
    Path("plan.json").write_text(run_well("plan", *SMALL, "--memory", "30", "--json"))
    run_well("transform", *SMALL, "-o", "aim.safetensors", "--plan", "plan.json")
    assert load("aim.safetensors", "nets.py:small").plan == Plan.from_json(
        Path("plan.json").read_text()
    )


def test_transform_keeps_spec_and_arguments(folder):
    torch.save(build("nets.py:small", width=8).state_dict(), "narrow.pt")
    options = ("--model", "nets.py:small", "--model-args", '{"width": 8}')
    run_well("transform", "narrow.pt", *options, "-o", "aim.safetensors")
    assert load("aim.safetensors", "nets.py:small").plan.reads[0].site.out_channels == 8


def test_verify_says_no_with_exit_code_1(folder):
    run_well("transform", *SMALL, "-o", "aim.safetensors")
    with safetensors.safe_open("aim.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file("aim.safetensors")
    tensors["6.bias"] += 1
    del metadata[CRC_KEY]
    safetensors.torch.save_file(tensors, "aim.safetensors", metadata)
    result = run("verify", "small.pt", "aim.safetensors", "--model", "nets.py:small")
    assert result.exit_code == 1
    assert result.stdout.strip()
    assert result.stderr == "error: aim.safetensors failed verification against small.pt\n"


# Failures -----------------------------------------------------------------------------------


def test_failures_are_one_line_on_stderr(folder):
    Path("text.pt").write_text("hello, world\n" * 9)
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    safetensors.torch.save_file({"w": torch.ones(1)}, "plain.safetensors")
    small = ("--model", "nets.py:small")
    assert "gone.pt: no such file" in error_of("plan", "gone.pt", *small)
    assert ".: is a folder with no index of shards" in error_of("plan", ".", *small)
    assert "text.pt: not a checkpoint" in error_of("plan", "text.pt", *small)
    assert "torch.nn.modules.linear.Linear" in error_of("plan", "module.pt", *small)
    assert "words.pt: does not fit Sequential" in error_of("plan", "words.pt", *small)
    assert "no 'smal'; close: small" in error_of("plan", "small.pt", "--model", "nets.py:smal")
    assert "'0.5' matches no site" in error_of("plan", *SMALL, "--include", "0.5")
    assert "budget 1e-06 is too small" in error_of("plan", *SMALL, "--budget", "0.000001")
    assert "plain.safetensors: not an aim-surgery file" in error_of(
        "verify", "small.pt", "plain.safetensors", *small
    )
    run_well("transform", *SMALL, "-o", "aim.safetensors")
    assert "operated on already" in error_of("plan", "aim.safetensors", *small)


def test_transform_fails_without_writing(folder):
    Path("list.json").write_text("[]")
    old = ("-o", "old.safetensors")
    Path("old.safetensors").write_text("old")
    assert "no folder" in error_of("transform", *SMALL, "-o", "gone/aim.safetensors")
    assert "small.pt: is a folder" not in error_of("transform", *SMALL, "-o", "small.pt/aim")
    assert "gone.json: cannot be read" in error_of("transform", *SMALL, *old, "--plan", "gone.json")
    assert "list.json: this text is not a plan" in error_of(
        "transform", *SMALL, *old, "--plan", "list.json"
    )
    Path("words.json").write_text(
        run_well("plan", "words.pt", "--model", "nets.py:words", "--json")
    )
    error_of("transform", *SMALL, *old, "--plan", "words.json")


def test_errors_of_many_lines_become_one(capsys):
    @cli._failing_in_one_line
    def fail() -> None:
        raise aim_surgery.PlanError("first\n\n  second")

    with pytest.raises(typer.Exit) as caught:
        fail()
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "error: first second\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "abc"), "'abc' is no budget: write 1.5%, 0.015, auto or none"),
        (("--budget", "%"), "'%' is no budget"),
        (("--budget", "0"), "budget must be a positive ratio"),
        (("--budget", "nan"), "budget must be a positive ratio"),
        (("--budget", "-1%"), "budget must be a positive ratio"),
        (("--input", "x"), "'x' is no size of an input: write 1,3,224,224"),
        (("--input", ""), "is no size of an input"),
        (("--input", "1,3,-2,4"), "is no size of an input"),
        (("--input", "0,3,8,8"), "is no size of an input"),
        (("--input", "1,3,8,8:long_ago"), "is no size of an input"),
        (("--input", "1,99999999999999999999"), "is no size of an input"),
        (("--input", "999999999,999999999"), "is no size of an input"),
        (("--memory", "0"), "--memory"),
        (("--memory", "many"), "--memory"),
        (("--init", "zero"), "--init"),
        (("--write", "everything"), "--write"),
        (("--write", "none", "--carry", "state"), "write='none' writes nothing"),
        (("--model-args", "{"), "--model-args is not JSON"),
        (("--model-args", "[1]"), "not an object"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_wrong_usage(folder, options, message):
    assert message in usage_error_of("plan", *SMALL, *options)
    assert message in usage_error_of("transform", *SMALL, "-o", "aim.safetensors", *options)


def test_wrong_usage_of_files(folder):
    assert "name it with --model" in error_of("plan", "small.pt")
    assert "CHECKPOINT" in usage_error_of("plan", "--model", "nets.py:small")
    for words in (
        ("plan", "small.pt"),
        ("inspect", "small.pt"),
        ("restore", "small.pt", "-o", "x"),
    ):
        assert "name it with --model" in usage_error_of(*words, "--model-args", '{"width": 4}')
    assert "is the checkpoint itself" in usage_error_of("transform", *SMALL, "-o", "./small.pt")
    Path("link.pt").hardlink_to("small.pt")  # another name of the same file
    assert "is the checkpoint itself" in usage_error_of("transform", *SMALL, "-o", "link.pt")
    out = ("-o", "aim.safetensors", "--plan", "plan.json")
    for option in ("--memory=9", "--budget=none", "--init=fresh", "--include=0", "--write=none",
        "--write-at=0", "--carry=state"):  # fmt: skip
        message = usage_error_of("transform", *SMALL, *out, option)
        assert f"leave out {option.partition('=')[0]}" in message


# demo ---------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(folder, monkeypatch):
    """The demo on a smaller network, so that tests stay quick."""
    monkeypatch.setattr(cli_demo, "SPEC", "nets.py:small")


def test_demo_runs_the_commands_that_it_shows(small_demo):
    text = run_well("demo", "--folder", "here")
    commands = [line for line in text.splitlines() if line.startswith("$ ")]
    assert [command.split()[:3] for command in commands] == [
        ["$", "aim-surgery", name] for name in ("plan", "transform", "verify")
    ]
    assert """--model-args '{"num_classes": 120}'""" in commands[0]
    assert "largest difference of outputs" in text
    written = {file.name for file in Path("here").iterdir()}
    assert written == {"resnet50.pt", "resnet50-aim.safetensors"}

    before = Path("here/resnet50.pt").stat().st_mtime_ns
    assert run_well("demo", "--folder", "here")
    assert Path("here/resnet50.pt").stat().st_mtime_ns == before


def test_demo_fails_like_its_commands(small_demo):
    Path("file").write_text("a file")
    assert "no folder can be made here" in error_of("demo", "--folder", "file")
    Path("broken").mkdir()
    Path("broken/resnet50.pt").write_text("broken")
    result = run("demo", "--folder", "broken")
    assert result.exit_code == 1
    assert result.stderr == "error: broken/resnet50.pt: not a checkpoint; expected a state dict " \
        "written by torch.save or safetensors\n"  # fmt: skip


# The real thing -----------------------------------------------------------------------------


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aim_surgery.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_as_a_process(folder):
    result = run_python("plan", *SMALL, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["model"] == "Sequential"


def test_failing_as_a_process(folder):
    result = run_python("plan", "gone.pt", "--model", "nets.py:small")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "error: gone.pt: no such file\n"
