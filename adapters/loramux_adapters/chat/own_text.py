"""A chat template's own text, marked: what of it names a special token says so by a mark that no user can write.

The template's syntax tree is rewritten before it runs. So it does not matter what a template does to what users said
(trims it, splits it, turns it into JSON): only the template's own words can become special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.visitor import NodeTransformer

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "model", "environment")
_FROM_ELSEWHERE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_LOOKS_AT_TEXT = frozenset(
    "count endswith find index lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
    "rstrip split startswith strip".split()
)

Marking = Callable[[str], str]
N = TypeVar("N", bound=nodes.Node)


class OwnText(NodeTransformer):
    """Rewrites one template.

    Text that is only compared with, searched for or used as a key stays as it is: it meets what users wrote. A role
    between two pieces of a token's text (`'<|' + message.role + '|>'`) becomes that token, for the roles there are.
    """

    def __init__(self, marks: Mapping[str, str], marking: Marking) -> None:
        """`marks`: text of a token -> its mark. `marking` puts them into a text."""
        self._marking = marking
        self._around = {
            (text[: text.index(role)], text[text.index(role) + len(role) :])
            for text in marks
            for role in ROLES
            if role in text[1:-1]
        }

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self._marking(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            return nodes.Const(self._marking(node.value), lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self._visited(node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node.value = self._visited(node.value)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name not in ("replace", "select", "reject", "selectattr", "rejectattr", "attr", "groupby"):
            return self.generic_visit(node)
        if node.node is not None:
            node.node = self._visited(node.node)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if not (isinstance(node.node, nodes.Getattr) and node.node.attr in _LOOKS_AT_TEXT):
            return self.generic_visit(node)
        node.node = self._visited(node.node)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [self._visited(child) for child in self._with_roles(node.nodes)]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node.nodes = [self._visited(child) for child in self._with_roles(node.nodes)]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        chain: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            chain.insert(0, left.right)
            left = left.left
        chain.insert(0, left)
        first, *others = (self._visited(child) for child in self._with_roles(chain))
        for other in others:
            first = nodes.Add(first, other, lineno=node.lineno)
        return first

    def _visited(self, node: N) -> N:
        return cast(N, self.visit(node))

    def _with_roles(self, chain: Sequence[nodes.Expr]) -> list[nodes.Expr]:
        """The pieces of a text, with each role that stands inside a token's text made one piece with it."""
        found = list(chain)
        for at in range(1, len(found) - 1):
            before, role, behind = found[at - 1 : at + 2]
            start, end = _text_of(before), _text_of(behind)
            if start is None or end is None or not _is_role(role):
                continue
            for head, tail in self._around:
                if start.endswith(head) and end.startswith(tail):
                    found[at - 1] = _with_text(before, start.removesuffix(head))
                    found[at + 1] = _with_text(behind, end.removeprefix(tail))
                    found[at] = _call("role_token", [nodes.Const(head), role, nodes.Const(tail)], role.lineno)
                    break
        return found

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.EnvironmentAttribute):
            return node  # `role_token`: its pieces are no tokens alone
        return super().generic_visit(node, *args, **kwargs)


class Counted(NodeTransformer):
    """Has each turn of a loop and each call of a macro counted, and all that is made and compared looked at."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counting(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counting(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counting(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._looking(node, "made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._looking(node, "made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._looking(node, "made") if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return self._looking(node, "compared")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if isinstance(node.arg, nodes.Slice):
            return self._looking(node, "made")
        return self.generic_visit(node)

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _FROM_ELSEWHERE):
            raise TemplateSyntaxError("a chat template has no other files to take in", node.lineno)
        return super().generic_visit(node, *args, **kwargs)

    def _looking(self, node: nodes.Expr, method: str) -> nodes.Node:
        self.generic_visit(node)
        return _call(method, [node], node.lineno)

    def _counting(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno), *node.body]
        return cast(nodes.Node, node)


def _call(name: str, args: list[nodes.Expr], line: int) -> nodes.Expr:
    """A method of the environment, which no variable of the template can stand in for."""
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), args, [], None, None, lineno=line)


def _text_of(node: nodes.Expr) -> str | None:
    if isinstance(node, nodes.TemplateData):
        return node.data
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None


def _with_text(node: nodes.Expr, text: str) -> nodes.Expr:
    kind = nodes.TemplateData if isinstance(node, nodes.TemplateData) else nodes.Const
    return kind(text, lineno=node.lineno)


def _is_role(node: nodes.Expr) -> bool:
    parts: Iterable[nodes.Node] = (node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name)))
    return any(
        (isinstance(part, nodes.Getattr) and part.attr == "role")
        or (isinstance(part, nodes.Name) and part.name == "role")
        or (isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Const) and part.arg.value == "role")
        for part in parts
    )
