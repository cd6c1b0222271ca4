"""Reading a module's forward: is it nothing but a chain of its children, and which?

``torch.fx`` traces it with every child as one node, so what is known is what the forward does, not
what its class is called. Whatever else it does makes it no chain, and it is left alone.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sdgp_cusparselt.layers.activations import spelling_of_function


@dataclass(frozen=True)
class Child:
    """x -> child(x).

    Attributes:
        name: of the child, from the module on: ``c_fc`` or ``layers.0``.
    """

    name: str


@dataclass(frozen=True)
class Function:
    """x -> activation(x), by a function of torch.

    Attributes:
        spelling: one of ``activations.SPELLINGS``.
    """

    spelling: str


@dataclass(frozen=True)
class Gated:
    """x -> activation(gate(x)) * up(x).

    Attributes:
        gate: name of the child before the activation.
        activation: a child or a function.
        up: name of the other child.
    """

    gate: str
    activation: Child | Function
    up: str


Link = Child | Function | Gated


def chain_of(module: nn.Module, kind: type[nn.Module]) -> list[Link] | str:
    """Return what a module's forward applies, one after the other, or why it is no chain.

    Args:
        module: that is not touched: the forward runs on a second object over its children.
        kind: the class whose forward is read.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced by something else's"
    graphs = []
    for training in (True, False):  # a forward may look at it
        graph = _traced(module, kind, training)
        if isinstance(graph, str):
            return graph
        graphs.append(graph)
    if str(graphs[0]) != str(graphs[1]):
        return "its forward is another in training than in evaluation"
    return _links(graphs[0])


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module, kind: type[nn.Module], training: bool) -> fx.Graph | str:
    twin = object.__new__(kind)  # fully_shard's classes construct others by theirs
    twin.__dict__.update(module.__dict__)
    twin.__dict__["training"] = training
    try:
        return _Tracer().trace(twin)
    except Exception as error:  # whatever a foreign forward makes of what is no tensor
        return f"its forward cannot be read: {type(error).__name__}"


def _links(graph: fx.Graph) -> list[Link] | str:
    first, *rest = graph.nodes
    count, links = 1, list[Link]()
    value: fx.Node | None = first
    if first.op != "placeholder":
        return _NO_CHAIN
    while value is not None and value.op != "output":
        users = list(value.users)
        if len(users) == 1 and users[0].op == "output":
            whole = users[0].args == (value,)
            return links if whole and count == len(rest) else _NO_CHAIN
        found = _next(value, users)
        if found is None:
            break
        link, value, taken = found
        count += taken
        links.append(link)
    return _NO_CHAIN


_NO_CHAIN = "its forward is more than a chain of its layers"


def _next(value: fx.Node, users: list[fx.Node]) -> tuple[Link, fx.Node, int] | None:
    """Return the link that reads a value, the node that ends it, and how many nodes it is."""
    if len(users) == 1:
        link = _single(users[0], value)
        return None if link is None else (link, users[0], 1)
    if len(users) == 2:
        for gate, up in (users, users[::-1]):
            found = _gated(gate, up, value)
            if found is not None:
                return *found, 4
    return None


def _single(node: fx.Node, value: fx.Node) -> Child | Function | None:
    if node.op == "call_module" and node.args == (value,) and not node.kwargs:
        return Child(str(node.target))
    if node.op == "call_function" and node.args == (value,):
        spelling = spelling_of_function(node.target, dict(node.kwargs))
        return None if spelling is None else Function(spelling)
    return None


def _gated(gate: fx.Node, up: fx.Node, value: fx.Node) -> tuple[Gated, fx.Node] | None:
    first, second = _single(gate, value), _single(up, value)
    if not isinstance(first, Child) or not isinstance(second, Child):
        return None
    activated, product = _only_user(gate), _only_user(up)
    if activated is None or product is None or _only_user(activated) is not product:
        return None
    activation = _single(activated, gate)
    reads: Any = product.args
    multiplies = product.op == "call_function" and product.target in (operator.mul, torch.mul)
    if activation is None or not multiplies or product.kwargs or set(reads) != {activated, up}:
        return None
    return Gated(first.name, activation, second.name), product


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None
