"""A radix tree over token ids: which cached sequence shares the longest prefix with a context.

- ``RadixTree``: longest prefix, insertion, removal, everything below a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

_NOTHING: Tokens = np.empty(0, dtype=np.int32)


class _Node:
    """The tokens of the edge to it, and the sequences that end with them."""

    __slots__ = ("children", "edge", "ends", "parent")

    def __init__(self, edge: Tokens, parent: _Node | None) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.ends: list[int] = []


class RadixTree:
    """Token sequences with a number each; several may be equal. A look-up costs a few edges, however many there are."""

    def __init__(self) -> None:
        self._root = _Node(_NOTHING, None)
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __contains__(self, number: int) -> bool:
        return number in self._nodes

    def _walk(self, tokens: Tokens, node: _Node, depth: int) -> tuple[_Node, int, int]:
        """From a node at ``depth`` return the deepest one, how many tokens match, how many of them on its edge."""
        while depth < len(tokens):
            child = node.children.get(int(tokens[depth]))
            if child is None:
                break
            along = _common(child.edge, tokens[depth:])
            depth += along
            node = child
            if along < len(child.edge):
                return node, depth, along
        return node, depth, len(node.edge)

    def match(self, tokens: Tokens) -> tuple[list[int], int]:
        """Return the sequences to continue and the length of the longest shared prefix.

        Those that end exactly where the prefix ends come, in the order of their insertion; if there are none, one
        sequence that goes on beyond it. Without any shared token: ([], 0).
        """
        node, depth, along = self._walk(tokens, self._root, 0)
        if not depth:
            return [], 0
        if along == len(node.edge) and node.ends:
            return list(node.ends), depth
        return [next(self._below(node))], depth

    def insert(self, number: int, tokens: Tokens) -> None:
        """Add a sequence; ``number`` must be new and ``tokens`` are kept, not copied."""
        self._insert(number, tokens, self._root, 0)

    def extend(self, number: int, tokens: Tokens) -> None:
        """Exchange a sequence for ``tokens``; one of the two is a prefix of the other."""
        node = self._nodes[number]
        depth = self.length(number)
        if len(tokens) == depth:
            return
        if len(tokens) < depth:
            self.remove(number)
            self.insert(number, tokens)
            return
        if len(node.ends) == 1 and not node.children and node.parent is not None:
            node.edge = tokens[depth - len(node.edge) :]
            return
        node.ends.remove(number)
        self._insert(number, tokens, node, depth)
        self._prune(node)

    def _insert(self, number: int, tokens: Tokens, node: _Node, depth: int) -> None:
        node, depth, along = self._walk(tokens, node, depth)
        if along < len(node.edge):
            node = self._split(node, along)
        if depth < len(tokens):
            leaf = _Node(tokens[depth:], node)
            node.children[int(tokens[depth])] = leaf
            node = leaf
        node.ends.append(number)
        self._nodes[number] = node

    def remove(self, number: int) -> None:
        """Take a sequence out."""
        node = self._nodes.pop(number)
        node.ends.remove(number)
        self._prune(node)

    @staticmethod
    def _prune(node: _Node) -> None:
        """Remove or merge nodes where no sequence ends and the tree does not branch, from ``node`` upwards."""
        while node.parent is not None and not node.ends:
            parent = node.parent
            if not node.children:
                del parent.children[int(node.edge[0])]
            elif len(node.children) == 1:
                (child,) = node.children.values()
                child.edge = np.concatenate((node.edge, child.edge))
                child.parent = parent
                parent.children[int(node.edge[0])] = child
                return
            else:
                return
            node = parent

    def below(self, prefix: Tokens) -> list[int]:
        """Return the sequences that begin with ``prefix``."""
        node, depth, _ = self._walk(prefix, self._root, 0)
        return list(self._below(node)) if depth == len(prefix) else []

    def length(self, number: int) -> int:
        """Return how many tokens a sequence has."""
        node: _Node | None = self._nodes[number]
        length = 0
        while node is not None:
            length += len(node.edge)
            node = node.parent
        return length

    def tokens(self, number: int) -> Tokens:
        """Return a sequence's tokens."""
        node: _Node | None = self._nodes[number]
        edges = []
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return np.concatenate(edges[::-1])

    def _split(self, node: _Node, along: int) -> _Node:
        """Cut a node's edge; return the new node in its middle."""
        parent = node.parent
        assert parent is not None
        upper = _Node(node.edge[:along], parent)
        parent.children[int(node.edge[0])] = upper
        node.edge = node.edge[along:]
        node.parent = upper
        upper.children[int(node.edge[0])] = node
        return upper

    @staticmethod
    def _below(node: _Node) -> Iterator[int]:
        stack = [node]
        while stack:
            node = stack.pop()
            yield from node.ends
            stack.extend(node.children.values())


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix."""
    width = min(len(a), len(b))
    differs = a[:width] != b[:width]
    first = int(differs.argmax()) if width else 0
    return first if width and differs[first] else width
