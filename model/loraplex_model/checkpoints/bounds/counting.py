"""Puts the counts of the budget into a template's program."""

from __future__ import annotations

from typing import Any, Final

from jinja2 import nodes
from jinja2.meta import find_undeclared_variables
from jinja2.visitor import NodeTransformer

from loraplex_model.checkpoints.bounds.budget import CHARACTERS

_NODES_IN_A_PASS: Final = 32
"""Nodes of a body that count as much as one pass."""


def variables_read(tree: nodes.Template) -> tuple[frozenset[str], frozenset[str]]:
    """The variables that a template reads from outside, and those of them that it does not set
    before it reads them.

    jinja2 counts a variable among those from outside if only some branches set it.
    """
    read, first = find_undeclared_variables(tree), dict[str, bool]()
    _note(tree, first)
    return frozenset(read), frozenset(name for name in read if not first.get(name, False))


def _note(node: nodes.Node, first: dict[str, bool]) -> None:
    """Notes of each name whether it is set (True) where it occurs first."""
    if isinstance(node, nodes.Assign | nodes.AssignBlock):
        for child in node.iter_child_nodes(exclude=("target",)):
            _note(child, first)
        for name in (node.target, *node.target.find_all(nodes.Name)):
            if isinstance(name, nodes.Name):
                first.setdefault(name.name, True)
        return
    if isinstance(node, nodes.Name) and node.ctx == "load":
        first.setdefault(node.name, False)
    for child in node.iter_child_nodes():
        _note(child, first)


class Counting(NodeTransformer):
    """Counts passes, calls, joined texts, slices, comparisons and keys.

    The passes of a body count by its length, since a template may have one loop and ten thousand
    expressions in it.
    """

    def __init__(self, bounds: Any) -> None:
        """`bounds`: the jinja2 extension whose methods are called."""
        self._bounds = bounds

    def visit_For(self, node: nodes.For) -> nodes.Node:
        counted = self._counted(node)
        if node.test is not None:
            node.test = nodes.Or(self._call("spend", node), node.test, lineno=node.lineno)
        return counted

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", node, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if isinstance(node.arg, nodes.Slice):
            return self._made(node)
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self._call("sought", node, node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        seeks = all(operand.op in ("in", "notin") for operand in node.ops)
        node.expr = self._call("sought" if seeks else "compared", node, node.expr)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                name = "sought" if operand.op in ("in", "notin") else "compared"
                operand.expr = self._call(name, node, operand.expr)
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and not node.items:
            return node
        return self._call("made", node, node)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        size = sum(_size(inner) for inner in node.find_all(nodes.Node))
        self.generic_visit(node)
        spent = nodes.Const(1 + size // _NODES_IN_A_PASS, lineno=node.lineno)
        count = self._call("spend", node, spent)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node

    def _call(self, method: str, node: nodes.Node, *arguments: nodes.Expr) -> nodes.Expr:
        call: nodes.Expr = self._bounds.call_method(method, list(arguments), lineno=node.lineno)
        return call


def _size(node: nodes.Node) -> int:
    """How many nodes a node counts as: a long text as many as it costs to write."""
    text = ""
    if isinstance(node, nodes.TemplateData):
        text = node.data
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        text = node.value
    return 1 + len(text) * _NODES_IN_A_PASS // CHARACTERS
