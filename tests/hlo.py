"""Reads the collectives of a compiled program from its HLO text."""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{\s*$")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_CALLED = re.compile(
    r"\b(body|calls|to_apply|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|(%?[\w.-]+))"
)
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices send each other.

    Attributes:
      kind: of `KINDS`. An all-reduce whose result is scattered in the same fusion (TPU) is a "reduce-scatter".
      dtype, shape: of the result on one device; of such a fused one, what is reduced (padded to whole tiles).
      computation: that it stands in.
      in_loop: whether that is the body of a loop, or called by one.
      devices: that take part; 0 where the text does not tell.
      source: the name of the operation that it was made for.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    computation: str
    in_loop: bool
    devices: int
    source: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        where = "in a loop" if self.in_loop else "outside"
        return f"{self.kind} {self.dtype}{list(self.shape)} over {self.devices} {where} ({self.source})"


def collectives(text: str) -> list[Collective]:
    """Read them all; copies of one that a backend spread over several fusions count once."""
    lines, calls, bodies = _read(text)
    in_loops = _reached(bodies, calls)
    found, channels = [], set()
    for computation, line in lines:
        match = _OPERATION.match(line)
        if not match:
            continue
        result, kind, start, rest = match.groups()
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel:
            if (kind, channel[1]) in channels:
                continue
            channels.add((kind, channel[1]))
        source = re.search(r'op_name="([^"]*)"', rest)
        scattered = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
        for dtype, shape in _results(result, kind, bool(start)):
            found.append(
                Collective(
                    "reduce-scatter" if scattered else kind,
                    dtype,
                    shape,
                    computation,
                    computation in in_loops,
                    _group(rest),
                    source[1] if source else "",
                )
            )
    return found


def _read(text: str) -> tuple[list[tuple[str, str]], dict[str, set[str]], set[str]]:
    """(computation, line) of each line, {computation: those it calls}, bodies of loops."""
    lines, calls, bodies, computation = [], {}, set(), ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            match = _COMPUTATION.match(line)
            computation = match[1] if match else computation
            continue
        lines.append((computation, line))
        for kind, several, one in _CALLED.findall(line):
            called = {name.strip(" %") for name in (several or one).split(",") if name.strip(" %")}
            calls.setdefault(computation, set()).update(called)
            if kind == "body":
                bodies |= called
    return lines, calls, bodies


def _reached(begin: set[str], calls: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), list(begin)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += calls.get(name, ())
    return seen


def _results(text: str, kind: str, start: bool) -> list[tuple[str, tuple[int, ...]]]:
    arrays = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(text)]
    if start and kind == "collective-permute":  # (operand, result, two counters)
        return arrays[1:2]
    if start and kind == "all-gather":  # (operands, results)
        return arrays[len(arrays) // 2 :]
    return arrays


def _group(text: str) -> int:
    """The size of a replica group in any of the three notations."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in named)
    return 0
