"""Text of exported programs that could run as Python is not read without trust."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from aim_surgery.checkpoint.reading.kinds import open_source
from aim_surgery.checkpoint.reading.program_text import _is_condition, _is_expression, code_in
from aim_surgery.errors import CheckpointError

FREE = torch.export.Dim.AUTO
RUN = "open('ran', 'w').close()"


class Sized(nn.Module):
    """Its sizes, words and containers are what a program's text is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Any, y: Any, *, mode: str = "bilinear", more: Any = None) -> Any:
        z = torch.einsum("bij,bkj->bik", x, x) + more["a key"]
        size = (y.shape[2] // 2, y.shape[3] * 2)
        scaled = F.interpolate(self.conv(y), size=size, mode=mode)
        return {"tokens": self.token(x), "z": z, "c out": [scaled, y.shape[0] * 2]}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    args = torch.randn(4, 5, 8), torch.randn(6, 3, 8, 10)
    kwargs = {"mode": "bilinear", "more": {"a key": torch.ones(1)}}
    free = {"x": {0: FREE, 1: FREE}, "y": {0: FREE, 2: FREE, 3: FREE}}
    shapes = {**free, "mode": None, "more": {"a key": None}}
    torch.export.save(
        torch.export.export(Sized().eval(), args, kwargs, dynamic_shapes=shapes), "net.pt2"
    )
    return Path("net.pt2")


def _edited(path: Path, edit: Callable[[str], str]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("models/model.json"))
    text = records[name].decode()
    assert edit(text) != text
    records[name] = edit(text).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)


def _with(key: str, make: Callable[[Any], Any]) -> Callable[[str], str]:
    """Change the first value of a key, wherever it is."""

    def changed(value: Any) -> bool:
        if isinstance(value, dict) and value.get(key):
            value[key] = make(value[key])
            return True
        parts = value.values() if isinstance(value, dict) else value
        return isinstance(value, dict | list) and any(changed(part) for part in parts)

    def edit(text: str) -> str:
        graph = json.loads(text)
        assert changed(graph)
        return json.dumps(graph)

    return edit


def _factory(spec: str) -> str:
    version, tree = json.loads(spec)
    made = {"default_factory_module": "antigravity", "default_factory_name": "webbrowser"}
    context = json.dumps({**made, "dict_context": json.loads(tree["context"])})
    return json.dumps([version, {**tree, "type": "collections.defaultdict", "context": context}])


def _enum(spec: str) -> str:
    version, tree = json.loads(spec)
    context = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "x"})
    return json.dumps([version, {**tree, "context": context}])


CODE = {
    "expression": _with("expr_str", lambda _: RUN),
    "argument": _with("expr_str", lambda _: f"Max(1, {RUN})"),
    "text of text": _with("expr_str", lambda _: f"Max(1, \"{RUN}\")"),
    "condition": _with("guards_code", lambda _: [f"{RUN} is None"]),
    "second condition": _with("guards_code", lambda known: [*known, f"{RUN} is None"]),
    "factory": _with("out_spec", _factory),
    "enum": _with("out_spec", _enum),
    "keyword": lambda text: text.replace('[\\\\\\"mode', f'[\\\\\\"mode={RUN}'),
    "placeholder": lambda text: text.replace('"name": "x"', f'"name": "x={RUN}"'),
    "attribute": lambda text: text.replace('"p_token_weight"', f'"p_\'+{RUN}+\'"'),
    "string": lambda text: text.replace('"bilinear"', f'"\' or {RUN} or \'"'),
}  # fmt: skip


def test_what_torch_writes_is_read(program: Path) -> None:
    assert code_in(program) is None
    assert len(open_source(program).entries) == 4


@pytest.mark.parametrize("name", CODE)
def test_code_is_refused(program: Path, name: str) -> None:
    _edited(program, CODE[name])
    with pytest.raises(CheckpointError, match=r"net\.pt2: .*could\s+run it.*--trust"):
        open_source(program)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["expression", "condition"])
def test_the_code_is_code(program: Path, name: str) -> None:
    _edited(program, CODE[name])
    try:
        opened: Any = open_source(program, trust=True)
        opened.program.module()(
            torch.randn(4, 5, 8),
            torch.randn(6, 3, 8, 10),
            mode="bilinear",
            more={"a key": torch.ones(1)},
        )
    except (CheckpointError, AssertionError, ValueError, RuntimeError):
        pass  # it is no size
    assert Path("ran").exists()


@pytest.mark.parametrize(("place", "refused"), [("models/extra/", True), ("extra/", False)])
def test_only_text_that_torch_leaves_alone_may_say_anything(
    program: Path, place: str, refused: bool
) -> None:
    with zipfile.ZipFile(program, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        model = json.loads(archive.read(f"{root}/models/model.json"))
        archive.writestr(f"{root}/{place}other.json", json.dumps({**model, "guards_code": [RUN]}))
    assert bool(code_in(program)) is refused


def test_a_record_that_is_no_json(program: Path) -> None:
    _edited(program, lambda text: text[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        open_source(program)


@pytest.mark.parametrize(
    ("text", "expression", "condition"),
    [
        ("s0 + 1", True, False),
        ("Max(1, s0//2)", True, False),
        ("Mul(Integer(32), Symbol('s27', positive=True, integer=True))", True, False),
        ("Symbol('open(1)')", False, False),
        ("Symbol('a').func", False, False),
        ("(lambda: 1)()", False, False),
        ("[open for s0 in s1]", False, False),
        ("f'{s0}'", False, False),
        ("Max(*open)", False, False),
        ("s0; s1", False, False),
        ("(" * 999 + ")" * 999, False, False),
        ("L['x'].size()[0] >= 2", False, True),
        ("L['args'][0].size()[1] % 8 == 0 and max(L['y'].size()[0], 1) == 4", False, True),
        ("math.floor(L['x'].size()[0] / 2) == 1 or L['x'] == math.inf", False, True),
        ("torch._sym_sqrt(L['x'].size()[0]) > 1", False, True),
        ("torch.load(L['x'])", False, False),
        ("math.__loader__.load_module('antigravity')", False, False),
        ("L['x'].__class__", False, False),
        ("L['x'](1)", False, False),
        ("L[open('x')]", False, False),
        ("L['x'] == '\\' or open'", False, False),
        ("L.size(open)", False, False),
        ("L['''a'b'''].size()[0] == 1", False, False),
        ("L['a'][0]['''a'b''']", False, False),
        ("L['a' 'b'][0] == 1", False, True),
        ("L['more']['a key'].size()[0] == 1", False, True),
        ("Symbol('a key')", False, False),
        ("L['a'][b'b']", False, False),
        ("L['x'] == b'b'", False, False),
    ],
)  # fmt: skip
def test_grammars(text: str, expression: bool, condition: bool) -> None:
    assert _is_expression(text) is expression
    assert _is_condition(text) is condition
