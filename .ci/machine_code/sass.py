"""Machine code as nvdisasm -c prints it: instructions, control flow, loops."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

LABEL = re.compile(r"([.$\w]+):\s*$")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\(([.$\w]+)\)")
BRANCH_TABLE = re.compile(r'BRANCH_TARGETS ([^"]*)"')
LEAVES = {"EXIT", "RET", "KILL"}
JUMPS = {"BRA", "JMP", "BRX", "BRXU", "JMX", "JMXU", "CALL"}


class Unexpected(Exception):
    """Machine code that this module would misread."""


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    conditional: bool = False
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    def has(self, *modifiers: str) -> bool:
        return set(modifiers) <= set(self.opcode.split("."))


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the header, and all blocks that reach a back edge to it without passing it."""

    header: int
    blocks: frozenset[int]


def parse_instruction(line: str) -> Instruction | None:
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    negated, predicate, opcode, operands = match.groups()
    table = BRANCH_TABLE.search(line)
    targets = TARGET.findall(operands) + (re.findall(r"[.$\w]+", table[1]) if table else [])
    conditional = predicate is not None and (predicate not in ("PT", "UPT") or bool(negated))
    return Instruction(opcode, re.sub(r"\s*\(\*.*?\*\)", "", operands), conditional, tuple(targets))


def sections(listing: str) -> Iterator[tuple[str, list[str]]]:
    """Mangled name and lines of each kernel; its private subroutines are among them."""
    for part in re.split(r"^//-+ \.text\.", listing, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(" ")
        yield name, re.split(r"^//-+ ", body, maxsplit=1, flags=re.MULTILINE)[0].splitlines()


class Kernel:
    """The control-flow graph. What is not reached from the entry, as subroutines are not, is in no loop."""

    def __init__(self, lines: Iterable[str]):
        self.instructions: list[Instruction] = []
        self.position: dict[str, int] = {}  # of a label: the instruction behind it
        for line in lines:
            if label := LABEL.match(line):
                self.position[label[1]] = len(self.instructions)
            elif instruction := parse_instruction(line):
                self.instructions.append(instruction)
        self.check_reconvergence()
        self.blocks: list[Block] = []
        self.build_blocks()

    def count(self, name: str, *modifiers: str) -> int:
        return sum(i.name == name and i.has(*modifiers) for i in self.instructions)

    def check_reconvergence(self) -> None:
        """BSYNC continues where BSSY said. That is always the next instruction, or this module is to learn more."""
        where: dict[str, set[int]] = {}
        for i in self.instructions:
            if i.name == "BSSY":
                where.setdefault(i.operands.split(",")[0], set()).update(self.position[t] for t in i.targets)
        for at, i in enumerate(self.instructions):
            if i.name == "BSYNC" and at + 1 not in where.get(i.operands, ()):
                raise Unexpected(f"BSYNC {i.operands} is not followed by the target of a BSSY")

    def jump(self, instruction: Instruction) -> tuple[list[str], bool]:
        """Labels that may come next, and whether the following instruction may."""
        if instruction.name in LEAVES:
            return [], instruction.conditional
        if instruction.name not in JUMPS:
            return [], True
        if instruction.has("DIV"):  # leads to a copy of the shuffles for a warp that is not converged
            return [], True
        if instruction.name == "CALL" and not any(t.startswith(".L") for t in instruction.targets):
            return [], True  # of a subroutine, which returns here; with an ordinary label it is a jump
        if not instruction.targets:
            raise Unexpected(f"{instruction.opcode} {instruction.operands} without a target")
        # BRA P2, `(...) has a second predicate.
        return list(instruction.targets), instruction.conditional or not instruction.operands.startswith(
            ("`", "R", "UR")
        )

    def build_blocks(self) -> None:
        starts = {0, *self.position.values()}
        starts |= {n + 1 for n, i in enumerate(self.instructions) if i.name in LEAVES | JUMPS}
        ordered = sorted(n for n in starts if n < len(self.instructions))
        number = {start: block for block, start in enumerate(ordered)}
        for block, (start, end) in enumerate(zip(ordered, [*ordered[1:], len(self.instructions)], strict=True)):
            labels, falls_through = self.jump(self.instructions[end - 1])
            successors = [number[self.position[label]] for label in labels if self.position[label] in number]
            if falls_through and end in number:
                successors.append(block + 1)
            self.blocks.append(Block(self.instructions[start:end], list(dict.fromkeys(successors))))

    def postorder(self) -> list[int]:
        order, seen, stack = [], {0}, [(0, iter(self.blocks[0].successors))]
        while stack:
            block, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].successors)))
        return order

    def dominators(self) -> dict[int, int]:
        """Immediate dominators (Cooper, Harvey and Kennedy, A simple, fast dominance algorithm)."""
        order = self.postorder()
        rank = {block: n for n, block in enumerate(order)}
        predecessors = self.predecessors(rank)
        above = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                known = [p for p in predecessors[block] if p in above]
                closest = known[0]
                for other in known[1:]:
                    while closest != other:
                        if rank[closest] < rank[other]:
                            closest = above[closest]
                        else:
                            other = above[other]
                if above.get(block) != closest:
                    above[block] = closest
                    changed = True
        return above

    def predecessors(self, reached: Iterable[int]) -> dict[int, list[int]]:
        result: dict[int, list[int]] = {block: [] for block in reached}
        for block in result:
            for successor in self.blocks[block].successors:
                result[successor].append(block)
        return result

    def loops(self) -> list[Loop]:
        if not self.blocks:
            return []
        above = self.dominators()
        predecessors = self.predecessors(above)

        def dominates(upper: int, lower: int) -> bool:
            while lower != upper and lower != 0:
                lower = above[lower]
            return lower == upper

        members: dict[int, set[int]] = {}
        for block in above:
            for header in self.blocks[block].successors:
                if not dominates(header, block):
                    continue
                inside = members.setdefault(header, {header})
                todo = [block]
                while todo:
                    member = todo.pop()
                    if member not in inside:
                        inside.add(member)
                        todo += predecessors[member]
        return [Loop(header, frozenset(inside)) for header, inside in members.items()]

    def body(self, loop: Loop) -> list[Instruction]:
        return [i for block in sorted(loop.blocks) for i in self.blocks[block].instructions]

    def ways_round(self, loop: Loop) -> tuple[int, int]:
        """Instructions of the shortest and of the longest way from the header back to it, inner loops run once."""
        rank = {block: n for n, block in enumerate(self.postorder())}
        shortest, longest, ends = {loop.header: 0}, {loop.header: 0}, []
        for block in sorted(loop.blocks, key=rank.__getitem__, reverse=True):
            size = len(self.blocks[block].instructions)
            low, high = shortest[block] + size, longest[block] + size
            for successor in self.blocks[block].successors:
                if successor == loop.header:
                    ends.append((low, high))
                elif successor in loop.blocks and rank[successor] < rank[block]:
                    shortest[successor] = min(low, shortest.get(successor, low))
                    longest[successor] = max(high, longest.get(successor, high))
        return min(low for low, _ in ends), max(high for _, high in ends)
