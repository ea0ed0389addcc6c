"""Layers as a tree of their names, which exporters cut at `/` and `.`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["tree_lines"]

Entry = Mapping[str, Any]
_PARTS = re.compile(r"[^/.]+[/.]?|[/.]")


def tree_lines(
    layers: Sequence[Entry], describe: Callable[[Entry], str], total: Callable[[list[Entry]], str]
) -> Iterator[tuple[str, str]]:
    """Lines (indented part of a name, what is there): layers, and above several that share a part their total."""
    root: dict[str, Any] = {}
    for layer in layers:
        here = root
        for part in _PARTS.findall(layer["name"]) or [layer["name"]]:
            here = here.setdefault(part, {})
        here[""] = layer
    yield from _walk(root, 0, describe, total)


def _walk(
    node: dict[str, Any],
    depth: int,
    describe: Callable[[Entry], str],
    total: Callable[[list[Entry]], str],
) -> Iterator[tuple[str, str]]:
    for part, child in node.items():
        if part == "":
            continue
        name = part
        # A chain of parts that nothing branches off is one part.
        while len(child) == 1 and "" not in child:
            ((more, child),) = child.items()
            name += more
        if "" in child:
            yield "  " * depth + name, describe(child[""])
        if set(child) - {""}:
            if "" not in child:
                yield "  " * depth + name, total(list(_leaves(child)))
            yield from _walk(child, depth + 1, describe, total)


def _leaves(node: dict[str, Any]) -> Iterator[Entry]:
    for part, child in node.items():
        if part == "":
            yield child
        else:
            yield from _leaves(child)
