"""The README's code runs, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import aim_surgery
from aim_surgery.cli import app

README = Path(__file__).parents[1] / "README.md"
FIGURE = re.compile(r"\d\.\de[+-]\d\d")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def console_examples() -> list[tuple[str, str]]:
    """(command line, its output) for each `$` line."""
    parts = re.split(r"^\$ ", "\n".join(blocks("console")), flags=re.MULTILINE)[1:]
    return [(part.split("\n", 1)[0], part.split("\n", 1)[1].strip()) for part in parts]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples_print_what_they_say() -> None:
    examples, outputs = blocks("python"), blocks("text")
    namespace: dict[str, Any] = {}
    for code, expected in zip(examples, outputs, strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)  # the test of this file
        assert printed.getvalue() == expected


def test_the_console_example_prints_what_it_says(in_folder: Path) -> None:
    torch.manual_seed(0)
    model = aim_surgery.build("torchvision:resnet50", num_classes=120)
    torch.save(model.state_dict(), in_folder / "resnet50.pt")
    examples = console_examples()
    assert len(examples) == 3
    for command, expected in examples:
        program, *arguments = shlex.split(command)
        assert program == "aim-surgery"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        # differences at rounding level vary from machine to machine
        assert FIGURE.sub("#", result.output.strip()) == FIGURE.sub("#", expected)
    assert (in_folder / "aim.safetensors").exists()


def test_the_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
