"""What a compiled program moves, read from its text: memory traffic and collectives."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = r"%?([\w.\-]+)"
_HEADER = re.compile(rf"^(ENTRY )?{_NAME} \(.*\{{$")
_INSTRUCTION = re.compile(rf"^  (ROOT )?{_NAME} = ")
# What gives another name to a value, or to a part of it, and touches no memory.
_NAMES = {"bitcast", "get-tuple-element", "tuple", "optimization-barrier", "reshape"}
_FREE = _NAMES | {"parameter", "constant", "iota", "after-all", "partition-id", "replica-id"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_BODIES = (
    "to_apply", "calls", "called_computations", "branch_computations", "true_computation",
    "false_computation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program: its bytes, the memory it is in (0 is the device's main one).

    Its dtype is spelled as XLA has it: `bf16`, `u8`.
    """

    bytes: int
    space: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shapes opcode(operands), attributes`; a tuple has several shapes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *roles: str) -> list[str]:
        """Computations that it names in these roles, such as `body`."""
        found = re.findall(rf"\b(?:{'|'.join(roles)})=(\{{[^}}]*\}}|{_NAME})", self.attributes)
        return [name for group, _ in found for name in re.findall(_NAME, group.strip("{}"))]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices in a step, as each device sees it.

    Args:
        kind: As XLA calls it, `all-reduce` say.
        dtype: Of the largest array, as XLA spells it.
        count: How often it happens; inside a loop once for each turn.
        bytes: Bytes of its results, all together.
        received: Bytes that must come from other devices at least.
        largest: Bytes of the largest array that results.
    """

    kind: str
    dtype: str
    count: int
    bytes: int
    received: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module: its computations by name, and the one where it begins."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def traffic(self, cache: float = 0) -> int:
        """Bytes that one run moves to and from main memory at least.

        Of a value that is cut only the part counts that is touched, and none of what the compiler
        has put into another memory.  As much of every value as `cache` bytes hold may still be on
        the chip from when it was made, and does not count either.
        """
        return round(self._traffic(self.entry, cache))

    def _traffic(self, name: str, cache: float) -> float:
        """Bytes that a computation moves; of branches the one that moves least."""
        total = 0.0
        for x in self.computations[name].values():
            if x.opcode == "while":
                body = x.called("body")[0]
                total += self._turns(x) * self._traffic(body, cache)
            elif x.opcode == "conditional":
                total += min(self._traffic(branch, cache) for branch in x.called(*_BODIES))
            elif x.opcode in ("call", "async-start"):
                total += sum(self._traffic(body, cache) for body in x.called(*_BODIES))
            else:
                total += self._moved(name, x, cache)
        return total

    def collectives(self) -> list[Collective]:
        """The exchanges between devices, by kind and dtype."""
        found: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0, 0])
        for name, times in self._executed(self.entry, 1):
            for x in self.computations[name].values():
                kind = x.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    shapes = _exchanged(kind, x)
                    size = sum(shape.bytes for shape in shapes)
                    received = round(size * _share(kind, _group(x.attributes)))
                    largest = max(shapes, key=lambda shape: shape.bytes)
                    sums = found[kind, largest.dtype]
                    for i, amount in enumerate((1, size, received)):
                        sums[i] += times * amount
                    sums[3] = max(sums[3], largest.bytes)
        return [Collective(*key, *sums) for key, sums in sorted(found.items())]

    def _executed(self, name: str, times: int) -> Iterator[tuple[str, int]]:
        """Every computation below one, with how often it runs; of branches all."""
        yield name, times
        for x in self.computations[name].values():
            if x.opcode == "while":
                for body in x.called("body"):
                    yield from self._executed(body, times * self._turns(x))
            else:
                for body in x.called(*_BODIES):
                    yield from self._executed(body, times)

    def _turns(self, loop: Instruction) -> int:
        """How often a loop turns, where its text tells; otherwise once."""
        if told := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(told[1])
        condition = self.computations[loop.called("condition")[0]].values()
        limits = [x for x in condition if x.opcode == "constant" and x.operands]
        counted = any("direction=LT" in x.attributes for x in condition)
        return int(limits[0].operands[0]) if counted and len(limits) == 1 else 1

    def _moved(self, computation: str, x: Instruction, cache: float) -> float:
        if x.opcode in _FREE or x.opcode.endswith("-done"):
            return 0

        def visible(shape: Shape, touched: int) -> float:
            if shape.space or shape.bytes <= cache:
                return 0
            return touched * (1 - cache / shape.bytes)

        body = next(iter(x.called("calls")), "") if x.opcode.startswith("fusion") else ""
        total = 0.0
        for i, operand in enumerate(x.operands):
            source = self.computations[computation].get(operand)
            if source is not None and len(source.shapes) == 1:
                total += visible(source.shapes[0], self._read(x, i, source.bytes, body))
        for shape, part in self._results(computation, x, body):
            total += visible(shape, shape.bytes if part is None else part)
        return total

    def _results(
        self, computation: str, x: Instruction, body: str
    ) -> list[tuple[Shape, int | None]]:
        """The shapes of results, with the bytes of an update in place, or None for all of it."""
        if body:
            written = self._written(body)
            # What is started tells of its operands and its context besides.
            shapes = x.shapes if x.opcode == "fusion" else [shape for shape, _ in written]
            return [(shape, part) for shape, (_, part) in zip(shapes, written, strict=True)]
        if x.opcode.endswith("-start"):
            return [(max(x.shapes, key=lambda shape: shape.bytes), None)]
        return [(shape, self._update(computation, x)) for shape in x.shapes]

    def _read(self, x: Instruction, i: int, size: int, body: str) -> int:
        """Bytes that an instruction reads of its operand number i."""
        if body:
            return min(size, self._touched(body, i))
        if i == 0 and x.opcode in _SLICES:
            return min(size, x.bytes)
        if i == 0 and x.opcode in ("dynamic-update-slice", "scatter"):
            return 0
        return size

    def _touched(self, body: str, i: int) -> int:
        """Bytes that a fusion reads of its parameter number i."""
        return self._touches.get(body, {}).get(i, 0)

    @functools.cached_property
    def _touches(self) -> dict[str, dict[int, int]]:
        """For every computation, bytes that it reads of each parameter."""
        return _Touches(self.computations).all()

    def _update(self, computation: str, x: Instruction) -> int | None:
        """Bytes that an update in place writes; None for anything else."""
        at = {"dynamic-update-slice": 1, "scatter": 2}.get(x.opcode)
        if at is None or len(x.shapes) != 1:
            return None
        update = self.computations[computation].get(x.operands[at])
        return None if update is None else min(update.bytes, x.bytes)

    def _written(self, body: str) -> list[tuple[Shape, int | None]]:
        """The results of a fusion, each with the bytes of an update in place or None."""
        instructions = self.computations[body]
        root = next(x for x in instructions.values() if x.root)
        roots = [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = []
        for result in roots:
            x = result
            while x.opcode in _NAMES and len(x.operands) == 1 and x.operands[0] in instructions:
                x = instructions[x.operands[0]]
            written += [(shape, self._update(body, x)) for shape in result.shapes]
        return written


class _Touches:
    """Reads of parameters, each computation looked at once."""

    def __init__(self, computations: Mapping[str, Mapping[str, Instruction]]) -> None:
        self.computations = computations
        self.done: dict[str, dict[int, int]] = {}

    def all(self) -> dict[str, dict[int, int]]:
        for name in self.computations:
            self.of(name)
        return self.done

    def of(self, name: str) -> dict[int, int]:
        if name not in self.done:
            self.done[name] = {}
            instructions = self.computations[name]
            users: dict[str, list[tuple[Instruction, int]]] = collections.defaultdict(list)
            for x in instructions.values():
                for i, operand in enumerate(x.operands):
                    users[operand].append((x, i))
            for x in instructions.values():
                if x.opcode == "parameter":
                    touched = self.used(x, users)
                    self.done[name][int(x.operands[0])] = min(touched, x.bytes)
        return self.done[name]

    def used(self, x: Instruction, users: Mapping[str, list[tuple[Instruction, int]]]) -> int:
        total = 0
        for user, i in users.get(x.name, []):
            if user.opcode in _NAMES:
                total += self.used(user, users)
            elif user.opcode == "fusion":
                total += self.of(user.called("calls")[0]).get(i, 0)
            elif i == 0 and user.opcode in _SLICES:
                total += user.bytes
            elif not (i == 0 and user.opcode in ("dynamic-update-slice", "scatter")):
                total += x.bytes
        return total


def parse(text: str) -> Program:
    """A program from the text of its optimized HLO, as `compiled.as_text()` gives it."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif begin := _INSTRUCTION.match(line):
            x = _instruction(begin[2], line[begin.end() :], begin[1] is not None)
            current[x.name] = x
    return Program(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    begin = rest.index("(", end)
    close = _closing(rest, begin)
    opcode, arguments = rest[end:begin].strip(), rest[begin + 1 : close - 1]
    if opcode in ("parameter", "constant"):
        operands = tuple(re.findall(r"^\d+$", arguments))
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, _shapes(rest[:end]), opcode, operands, rest[close:], root)


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at `begin` has closed."""
    depth = 0
    for match in re.finditer(r"[()]", text[begin:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return begin + match.end()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*match) for match in _SHAPE.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    size = 1
    for dim in filter(None, dims.split(",")):
        size *= int(dim)
    bits = _BITS.get(dtype)
    if bits is None:
        # s4, u8, f32, bf16, f8e4m3fn: the width is the first number.
        bits = int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    space = re.search(r"S\((\d+)\)", layout)
    return Shape((size * bits + 7) // 8, int(space[1]) if space else 0, dtype)


def _group(attributes: str) -> int | None:
    """How many devices take part in one exchange; None where the text does not tell.

    XLA writes groups of devices as lists `{{0,1},{2,3}}`, as `[groups,size]<=[devices]`, or as
    axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`, an axis perhaps in part: `'b':(1)2`.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return None


def _exchanged(kind: str, x: Instruction) -> tuple[Shape, ...]:
    """The arrays that result: what is only started tells of its operands, and of contexts, too."""
    if x.opcode == kind or kind == "all-reduce":
        return x.shapes
    return x.shapes[len(x.operands) :][: len(x.operands)]


def _share(kind: str, group: int | None) -> float:
    """Bytes that must come from others, for each byte of the result.

    Of a sum the part that a device adds up itself need not come; a switch may add up the rest.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    n = group or 2
    return (n - 1) / n
