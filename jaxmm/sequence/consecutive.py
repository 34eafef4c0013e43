"""Intervals of a given attention mask.

A boolean mask is an interval mask if the queries can be put in an order in which, for every key, the queries that see
it stand next to each other: the consecutive-ones property. A PQ-tree (Booth and Lueker, 1976, "Testing for the
consecutive ones property, interval graphs, and graph planarity using PQ-tree algorithms") holds every order that is
still allowed and takes in one key after the other, so that "there is none" is a proof and not a failed search.

Sets of queries are the bits of Python integers. A reduction follows chains of nodes in loops, never by recursion, for
the tree of a causal mask is as deep as the mask is long.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

Intervals = tuple[Int32[np.ndarray, "Lq"], Int32[np.ndarray, "Lk"], Int32[np.ndarray, "Lk"]]

_EMPTY, _PARTIAL, _FULL = range(3)


def find_intervals(mask: Bool[np.ndarray, "Lq Lk"]) -> Intervals | None:
    """Return (places, start, end) such that mask[i, j] <=> start[j] <= places[i] < end[j], or None if there are none.

    Reading order (places 0, 1, 2, ...) is taken if it will do. In any other order identical rows share a place. A query
    that sees nothing has place -1 and stands in no other's way; a key that nobody sees has start = end = 0.

    Raises:
      ValueError: if the mask is not a boolean matrix.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
        given = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"an attention mask is a boolean array [Lq, Lk], not {given}")
    seeing = mask.any(axis=1)
    found = _spans(mask, np.where(seeing, np.arange(len(mask)), -1))
    if found is not None:
        return found
    first, group = _distinct(mask[seeing])
    order = _order(len(first), _column_sets(mask[seeing][first]))
    if order is None:
        return None
    places = np.full(len(mask), -1)
    places[seeing] = np.argsort(order)[group]
    return _spans(mask, places)


def _spans(mask: Bool[np.ndarray, "Lq Lk"], places: np.ndarray) -> Intervals | None:
    """Return the places with the narrowest intervals that cover each column, unless they do not give the mask back."""
    places = places.astype(np.int32)
    rows = places[:, None]
    start = np.min(np.where(mask, rows, np.int32(len(mask))), axis=0, initial=len(mask))
    end = np.max(np.where(mask, rows + 1, np.int32(0)), axis=0, initial=0)
    start = np.where(end > 0, start, 0).astype(np.int32)
    return (places, start, end) if np.array_equal((start <= rows) & (rows < end), mask) else None


def _distinct(rows: Bool[np.ndarray, "N L"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first index of each distinct row, ascending, and for every row which of them it equals."""
    packed = np.packbits(rows, axis=1)
    _, first, group = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return np.sort(first), np.argsort(np.argsort(first))[group.ravel()]


def _column_sets(rows: Bool[np.ndarray, "N L"]) -> list[int]:
    """Return each distinct column as a set of rows, less those that any order satisfies (one row, or all of them)."""
    columns = rows.T[_distinct(rows.T)[0]]
    size = columns.sum(axis=1)
    packed = np.packbits(columns[(size > 1) & (size < len(rows))], axis=1, bitorder="little")
    return [int.from_bytes(column.tobytes(), "little") for column in packed]


@dataclasses.dataclass(slots=True)
class _Node:
    """A node of a PQ-tree: without children a leaf; otherwise a P node (children in any order) or, `ordered`, a Q node
    (in this order or its reverse). `leaves` is the set of the leaves below it."""

    leaves: int
    children: list["_Node"]
    ordered: bool = False


def _order(count: int, sets: list[int]) -> list[int] | None:
    """Return an order of 0 .. count - 1 in which the members of every set are next to each other, or None."""
    root = _join([_Node(1 << i, []) for i in range(count)])
    if not all(_reduce(root, wanted) for wanted in sets):
        return None
    order, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        waiting.extend(reversed(node.children))
        if not node.children:
            order.append(node.leaves.bit_length() - 1)
    return order


def _join(nodes: list[_Node], ordered: bool = False) -> _Node:
    """Return the only node, or a new node above several."""
    leaves = 0
    for node in nodes:
        leaves |= node.leaves
    return nodes[0] if len(nodes) == 1 else _Node(leaves, nodes, ordered)


def _reduce(root: _Node, wanted: int) -> bool:
    """Leave only the orders in which the wanted leaves are next to each other; False if there are none."""
    node, below = None, root
    while below is not None:
        node = below
        below = next((child for child in node.children if child.leaves & wanted == wanted), None)
    return _reduce_ordered(node, wanted) if node.ordered else _reduce_free(node, wanted)


def _reduce_free(node: _Node, wanted: int) -> bool:
    """Reduce at the P node that holds all wanted leaves: they become a run, with mixed children at its ends."""
    empty, partial, full = _split(node.children, wanted)
    lines = [_line(child, wanted) for child in partial]
    if len(lines) > 2 or None in lines:
        return False
    middle = [_join(full)] if full else []
    run = [*(lines[0] if lines else []), *middle, *(reversed(lines[1]) if len(lines) > 1 else [])]
    if empty:
        node.children = [*empty, _join(run, ordered=True)]
    elif partial:
        node.children, node.ordered = run, True
    return True


def _reduce_ordered(node: _Node, wanted: int) -> bool:
    """Reduce at the lowest node that holds all wanted leaves, a Q node: one run, only its ends may be partial."""
    states = [_state(child, wanted) for child in node.children]
    touched = [i for i, state in enumerate(states) if state != _EMPTY]
    a, b = touched[0], touched[-1]
    head, tail = _line(node.children[a], wanted), _line(node.children[b], wanted)
    if head is None or tail is None or any(state != _FULL for state in states[a + 1 : b]):
        return False
    node.children[a : b + 1] = [*head, *node.children[a + 1 : b], *reversed(tail)]
    return True


def _line(node: _Node | None, wanted: int) -> list[_Node] | None:
    """Return the nodes below one node in a row, unwanted leaves first and wanted ones last, or None.

    At most one child of each node may be mixed, so the mixed nodes are a chain: both ends of the row grow inwards.
    """
    left, right = [], []
    while node is not None:
        if _state(node, wanted) == _FULL:
            right.append(node)
            break
        children = node.children
        if node.ordered:
            states = [_state(child, wanted) for child in children]
            children = children[::-1] if states[0] > states[-1] else children
            if states not in (sorted(states), sorted(states, reverse=True)):
                return None
        empty, partial, full = _split(children, wanted)
        if len(partial) > 1:
            return None
        left += empty if node.ordered or not empty else [_join(empty)]
        right += full[::-1] if node.ordered or not full else [_join(full)]
        node = partial[0] if partial else None
    return left + right[::-1]


def _split(nodes: list[_Node], wanted: int) -> tuple[list[_Node], list[_Node], list[_Node]]:
    """Sort nodes into those with no wanted leaf, with some, and with only wanted leaves."""
    parts = ([], [], [])
    for node in nodes:
        parts[_state(node, wanted)].append(node)
    return parts


def _state(node: _Node, wanted: int) -> int:
    common = node.leaves & wanted
    if not common:
        return _EMPTY
    return _FULL if common == node.leaves else _PARTIAL
