"""Is what an exported program says of itself free of code? Checked before PyTorch reads it.

`torch.export.load` was not made for files from strangers. A program's JSON holds expressions of
sizes and conditions on inputs, which PyTorch evaluates as Python; names that it writes into Python
code; and descriptions of containers for which it imports what they name. So here is what such text
may be, and all else needs trust:

    expressions     sums, products, comparisons, and the functions of sizes that PyTorch writes
    conditions      comparisons of inputs' sizes and values
    containers      without classes of others; a defaultdict's factory is a builtin type
    other text      names and paths: no quotes, brackets, spaces or line ends; a string argument
                    may have spaces, commas and the like
    remarks         anything: stack traces, and where in the model a node comes from
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_REMARKS = frozenset({"metadata"})
_NAME = re.compile(r"[\w./-]*")
_STRING = re.compile(r"""[^'"`\\()\[\]{};\x00-\x1f\x7f\u0085\u2028\u2029]*""")
_WORD = re.compile(r"[\w.+-]*")
_OWN = "extra/"  # text of whoever wrote the file, and only they read it

_SIZES = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Half", "One", "Zero", "NegativeOne", "Add", "Mul",
    "Pow", "Abs", "Mod", "Max", "Min", "Equality", "Unequality", "Eq", "Ne", "StrictLessThan",
    "StrictGreaterThan", "LessThan", "GreaterThan", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
    "Piecewise", "ExprCondPair", "Tuple", "CeilDiv", "CeilToInt", "CleanDiv", "FloatPow",
    "FloatTrueDiv", "FloorDiv", "FloorToInt", "Identity", "IntTrueDiv",
    "IsNonOverlappingAndDenseIndicator", "LShift", "ModularIndexing", "PowByNatural", "PythonMod",
    "RShift", "RoundDecimal", "RoundToInt", "ToFloat", "TruncToFloat", "TruncToInt", "Where",
    "floor", "ceiling", "sqrt",
    *(f"OpaqueUnaryFn_{name}" for name in (
        "acos", "asin", "asinh", "atan", "cos", "cosh", "exp", "log", "log2", "sin", "sinh",
        "sqrt", "tan", "tanh")),
    *(f"BitwiseFn_bitwise_{name}" for name in ("and", "or", "xor")),
})  # fmt: skip
_PYTHON = frozenset({"max", "min", "abs", "round", "int", "float"})
_OF_A_TENSOR = frozenset({"size", "stride", "storage_offset", "dim", "item"})
_SYMBOL = re.compile(r"[A-Za-z]+_?\d+|true|false|oo|nan|zoo|int_oo|inf|pi")
_FACTORIES = frozenset({"list", "dict", "set", "tuple", "int", "float", "str", "bool"})
_GRAMMAR = (
    ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Load,
    ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def code_in(path: Path) -> str | None:
    """Look for code in an exported program.

    Args:
        path: The file; its records are read as `torch.export.load` reads them.

    Returns:
        The first text that could run, with the name of what holds it; None if there is none.

    Raises:
        Exception: Of any kind, where a record is no JSON.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    for record in reader.get_all_records():
        if record.endswith(".json") and not record.startswith(_OWN):
            for key, text in _texts(json.loads(reader.get_record(record)), "name"):
                if not _ALLOWED.get(key, _NAME.fullmatch)(text):
                    return f"{key} {text[:60]!r}"
    return None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of a record, with the name of its place."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield "name", name
            if name not in _REMARKS:
                yield from _texts(entry, name)


# Python ---------------------------------------------------------------------------------------


def _is_expression(text: str) -> bool:
    """Of sizes: what `sympy.sympify` is given."""
    return _holds(text, _is_size, _WORD)


def _is_condition(text: str) -> bool:
    """On inputs: `L['x'].size()[1] % 8 == 0`."""
    return _holds(text, _is_of_inputs, _STRING)


def _holds(text: str, of_kind: Callable[[ast.AST], bool], quoted: re.Pattern[str]) -> bool:
    """Whether all of a text is known: its names and calls, and what stands in quotes."""

    def known(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            return of_kind(node) and all(map(known, given))
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return quoted.fullmatch(node.value) is not None
            return not isinstance(node.value, bytes)
        if isinstance(node, _GRAMMAR):
            return all(map(known, ast.iter_child_nodes(node)))
        return of_kind(node)

    try:
        return not set(text) & {"\n", '"', "\\"} and known(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_size(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SIZES
    return isinstance(node, ast.Name) and _SYMBOL.fullmatch(node.id) is not None


def _is_of_inputs(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        called = node.func
        if isinstance(called, ast.Name):
            return called.id in _PYTHON or called.id == "IsNonOverlappingAndDenseIndicator"
        if not isinstance(called, ast.Attribute):
            return False
        of = called.value
        if isinstance(of, ast.Name) and of.id == "torch":
            return called.attr.lstrip("_").startswith("sym_")
        if isinstance(of, ast.Name) and of.id == "math":
            return not called.attr.startswith("_")
        return called.attr in _OF_A_TENSOR and _is_of_inputs(of)
    if isinstance(node, ast.Subscript):
        return _is_index(node.slice) and _is_of_inputs(node.value)
    if isinstance(node, ast.Attribute):  # math.inf; never called
        of = node.value
        return isinstance(of, ast.Name) and of.id == "math" and not node.attr.startswith("_")
    return isinstance(node, ast.Name) and node.id in ("L", "inf")


def _is_index(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant):
        return False
    key = node.value
    return isinstance(key, int) or (isinstance(key, str) and _STRING.fullmatch(key) is not None)


# Containers -----------------------------------------------------------------------------------


def _is_input_tree(text: str) -> bool:
    """How inputs are packed: (arguments, {keyword: argument}), and keywords stand in code."""
    return _is_tree(text, keywords_at=1)


def _is_output_tree(text: str) -> bool:
    return _is_tree(text)


def _is_tree(text: str, keywords_at: int | None = None) -> bool:
    try:
        return all(_is_container(entry, keywords_at) for entry in json.loads(text)[1:])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_container(tree: Any, keywords_at: int | None) -> bool:
    kind, context = tree["type"], tree["context"]
    if kind is not None and _NAME.fullmatch(kind) is None:
        return False
    if isinstance(context, str) and _is_json(context):
        context = json.loads(context)
    inner = None if not keywords_at else keywords_at - 1
    return _is_plain(context, _NAME if keywords_at == 0 else _STRING) and all(
        _is_container(entry, inner) for entry in tree["children_spec"]
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_plain(context: Any, allowed: re.Pattern[str]) -> bool:
    """Whether what a container keeps besides its values names nothing to import."""
    if isinstance(context, str):
        return allowed.fullmatch(context) is not None
    if isinstance(context, list):
        return all(_is_plain(entry, allowed) for entry in context)
    if not isinstance(context, dict):
        return True
    if "__enum__" in context:
        return False
    if "default_factory_module" in context:
        made = context["default_factory_module"], context.get("default_factory_name")
        if made[0] != "builtins" or made[1] not in _FACTORIES:
            return False
    return all(_is_plain(entry, allowed) for pair in context.items() for entry in pair)


_ALLOWED: dict[str, Callable[[str], Any]] = {
    "expr_str": _is_expression,
    "guards_code": _is_condition,
    "in_spec": _is_input_tree,
    "out_spec": _is_output_tree,
    **dict.fromkeys(("as_string", "as_strings", "torch_version", "path_name"), _STRING.fullmatch),
}
