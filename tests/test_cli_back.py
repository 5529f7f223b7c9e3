"""The commands that take operated files out of this package: restore and fold."""

import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from aim_surgery import transform
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.save import save
from tests.test_cli import FACTORY, error_of, run_well, snapshot, usage_error_of

SPEC = ("--model", "nets.py:small")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an operated file and the one that it was made of."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    torch.manual_seed(0)
    torch.save(build("nets.py:small").state_dict(), "small.pt")
    run_well("transform", "small.pt", *SPEC, "-o", "aim.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["base.pt", "base.safetensors"])
def test_restore_writes_the_state_dict_that_came_in(folder: Path, name: str) -> None:
    text = run_well("restore", "aim.safetensors", *SPEC, "-o", name)
    assert f"wrote       {name}" in text
    assert "exact: no layer had anything from the memory" in text
    read = torch.load if name.endswith(".pt") else safetensors.torch.load_file
    found, expected = read(name), torch.load("small.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_restore_says_by_how_much_outputs_change(folder: Path) -> None:
    gm = load("aim.safetensors", "nets.py:small")
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(0.1)
    save(gm, "trained.safetensors")
    text = run_well("restore", "trained.safetensors", *SPEC, "-o", "base.pt")
    assert "not exact: 3 layers" in text
    assert "outputs change by" in text


def test_fold_writes_a_program_that_needs_nothing_of_ours(folder: Path) -> None:
    gm, image = load("aim.safetensors", "nets.py:small").eval(), torch.randn(5, 3, 12, 12)
    nodes = []
    for options in ((), ("--norms",)):
        text = run_well("fold", "aim.safetensors", *SPEC, *options, "-o", "slim.pt2")
        assert text.startswith("wrote       slim.pt2")
        program = torch.export.load("slim.pt2").module()
        torch.testing.assert_close(program(input=image), gm(image))
        nodes.append(len(program.graph.nodes))
    assert nodes[1] < nodes[0]


OWN_TRAIN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def train(self, mode=True):
        super().train(mode)
    def forward(self, x):
        return self.fc(x)

def net():
    return Net()
"""


def test_a_train_that_returns_nothing_folds(folder: Path) -> None:
    Path("own.py").write_text(OWN_TRAIN)
    model = build("own.py:net")
    save(transform(model, torch.randn(2, 8), emit="module"), "own.safetensors")
    run_well("fold", "own.safetensors", "--model", "own.py:net", "-o", "own.pt2")
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.export.load("own.pt2").module()(x), model(x))


def test_what_they_refuse(folder: Path) -> None:
    assert "no plan" in error_of("restore", "small.pt", *SPEC, "-o", "x.pt")
    assert ".pt2" in error_of("fold", "aim.safetensors", *SPEC, "-o", "x.pt")
    assert ".safetensors or a .pt" in error_of("restore", "aim.safetensors", *SPEC, "-o", "x.pt2")
    shutil.copy("aim.safetensors", "other.safetensors")
    for command in ("restore", "fold"):
        words = (command, "other.safetensors", *SPEC, "-o", "other.safetensors")
        assert "itself" in usage_error_of(*words)
    assert "x.pt" not in snapshot()
