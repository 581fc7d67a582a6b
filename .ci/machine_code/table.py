"""The committed table, and what may differ from it."""

from __future__ import annotations

import re

from facts import BUDGET_ARCHITECTURE, BYTES_PER_SECOND, ISSUE_SLOTS_PER_SECOND, Facts, RowLoop, shape_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TOLERANCE = 0.10
TOLERANCE_OTHER_RELEASE = 0.25
VECTOR_REDUCTIONS = ("sm_90", "sm_100")  # have them

# Kernels that may spill, with the reason.
BY_ELEMENTS = (
    "rows that can only be read element by element: a few registers, kept across the draw of a tile's candidates"
)
ALLOWED_SPILLS: dict[str, str] = {
    "sampled_loss_kernel<float,RowShape<8,32,1,1,true,true>,0,binary>": BY_ELEMENTS,
    "sampled_loss_kernel<float,RowShape<8,32,1,1,true,true>,8,binary>": BY_ELEMENTS,
    "sampled_loss_kernel<BFloat16,RowShape<4,32,2,1,true,true>,0,binary>": BY_ELEMENTS,
    "sampled_loss_kernel<float,RowShape<8,32,1,1,true,true>,0,whole>": BY_ELEMENTS,
    "sampled_loss_kernel<BFloat16,RowShape<4,32,2,1,true,true>,0,whole>": BY_ELEMENTS,
    "sampled_loss_kernel<BFloat16,RowShape<4,32,2,3,false,true>,0,whole>": BY_ELEMENTS,
    "sampled_loss_kernel<Half,RowShape<4,32,2,1,true,true>,0,binary>": BY_ELEMENTS,
    "sampled_loss_kernel<Half,RowShape<4,32,2,1,true,true>,0,whole>": BY_ELEMENTS,
    "sampled_loss_kernel<Half,RowShape<4,32,2,3,false,true>,0,whole>": BY_ELEMENTS,
}

# Kernels without a row loop to count in, whose wide variants must access memory by 16 bytes all the same. At the least,
# loads of a step: 3 of a row's numbers, one each of its weights, of two states, and of its gradient or of 4 hidden
# vectors; 16-bit weights that stand beside float32 hidden vectors take 8 bytes. For sm_100 the compiler reads a pair of
# doubles one by one.
WIDE_STEPS = {r"row_step_kernel<(?!double)\w+,true>": 7, r"segment_steps_kernel<\w+,\w+,16>": 9}
WIDE_SCATTERS = re.compile(r"scatter_step_kernel<(\d+),true>")

HEADER = """\
# Machine code of the CUDA kernels, compared by .ci/machine_code and written by its --update.
# nvcc {release}
#
# For each architecture:
#   regs  registers of a thread
#   spill instructions that access local memory
#   ld16  loads of 16 bytes from global memory, and
#   red16 additions of 16 bytes to it: in the row loop, or in the whole kernel if it has none
#   rows  that a warp handles in a round of the row loop. b: of the loop over batches. t: the compiler has unrolled that
#         into the loop over tiles, so that the draw of the candidates is counted as well. e: into that over examples,
#         so that what an example begins and ends with is
#   i/row warp instructions in the row loop, rarely taken paths included, by rows. Where a row is read piece by piece,
#         the loops over pieces count as one round each
# budget: a prediction, no measurement. Instructions per row, for {budget_architecture}, in percent of those that an
#   H200 can issue while its memory delivers a row at 4.3 TB/s, with the shape's longest rows: for the shortest and for
#   the longest way round the row loop, or for the longest alone where candidates are counted as well. Rows that come
#   from the second-level cache, as those of segment_sums may, come faster than that.
"""
COLUMNS = f"{'regs':>4} {'spill':>5} {'ld16':>4} {'red16':>5} {'rows':>4} {'i/row':>7}"
NONE = "-"

Table = dict[str, dict[str, Facts]]


def budget(name: str, facts: Facts | None) -> str:
    shape = shape_of(name)
    if facts is None or facts.loop is None or shape is None:
        return NONE
    slots = ISSUE_SLOTS_PER_SECOND / BYTES_PER_SECOND * shape.row_bytes
    low, high = (f"{100 * n / facts.loop.rows / slots:.0f}" for n in (facts.loop.shortest, facts.loop.longest))
    return f"{low}-{high}%" if facts.loop.kind == "batch" else f"{high}%"


def columns(facts: Facts | None) -> str:
    if facts is None:
        return f"{NONE:>{len(COLUMNS)}}"
    rows = f"{facts.loop.rows}{facts.loop.kind[0]}" if facts.loop else NONE
    per_row = f"{facts.loop.per_row:.1f}" if facts.loop else NONE
    return (
        f"{facts.registers:>4} {facts.spills:>5} {facts.wide_loads:>4} {facts.wide_reductions:>5} "
        f"{rows:>4} {per_row:>7}"
    )


def tolerance_between(release: str, table_release: str) -> float:
    return TOLERANCE if release == table_release else TOLERANCE_OTHER_RELEASE


def sort_key(name: str) -> list[object]:
    """Numbers by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]


def write(release: str, measured: Table) -> str:
    width = max(map(len, measured))
    lines = [f"# {'':{width - 2}} | " + " | ".join(f"{a:<{len(COLUMNS)}}" for a in ARCHITECTURES) + " |"]
    lines += [f"# {'kernel':{width - 2}} | " + " | ".join([COLUMNS] * len(ARCHITECTURES)) + " | budget"]
    for name in sorted(measured, key=sort_key):
        parts = [columns(measured[name].get(a)) for a in ARCHITECTURES]
        lines.append(" | ".join([f"{name:{width}}", *parts, budget(name, measured[name].get(BUDGET_ARCHITECTURE))]))
    return HEADER.format(release=release, budget_architecture=BUDGET_ARCHITECTURE) + "\n".join(lines) + "\n"


def read(text: str) -> tuple[str, Table]:
    release = re.search(r"^# nvcc (.*)$", text, flags=re.MULTILINE)
    table: Table = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, *parts = (part.strip() for part in line.split("|"))
        if name in table:
            raise ValueError(f"the table has {name} twice")
        table[name] = {}
        for architecture, part in zip(ARCHITECTURES, parts[: len(ARCHITECTURES)], strict=True):
            if part != NONE:
                table[name][architecture] = read_facts(part)
    return release[1] if release else "unknown", table


def read_facts(part: str) -> Facts:
    registers, spills, loads, reductions, rows, per_row = part.split()
    loop = None
    if rows != NONE:
        kind = {kind[0]: kind for kind in ("batch", "example", "tile")}[rows[-1]]
        n = int(rows[:-1])
        loop = RowLoop(kind, n, round(float(per_row) * n))
    return Facts(int(registers), int(spills), 0, int(loads), int(reductions), loop)


def required(name: str, architecture: str, facts: Facts) -> list[str]:
    """What is wrong with a kernel whatever the table says."""
    wrong = []
    if (facts.spills or facts.local_bytes) and not ALLOWED_SPILLS.get(name):
        wrong.append(f"spill: {facts.spills} accesses to local memory, {facts.local_bytes} bytes of it; allowed: 0")
    for pattern, loads in WIDE_STEPS.items():
        if re.fullmatch(pattern, name) and facts.wide_loads < loads:
            wrong.append(f"ld16: {facts.wide_loads}, in a kernel that loads {loads} vectors")
    scatter = WIDE_SCATTERS.fullmatch(name)
    if scatter and architecture in VECTOR_REDUCTIONS and facts.wide_reductions < int(scatter[1]):
        wrong.append(f"red16: {facts.wide_reductions}, in a kernel that adds to {scatter[1]} vectors")
    shape = shape_of(name)
    if shape is None:
        return wrong
    if facts.loop is None:
        return [*wrong, "row loop: not found"]
    vectors = shape.vectors * facts.loop.rows // shape.rows
    if shape.access == 16 and facts.wide_loads < vectors:
        wrong.append(f"ld16: {facts.wide_loads} in the row loop, which loads {vectors} vectors")
    return wrong


def changes(known: Facts, facts: Facts, tolerance: float) -> tuple[list[str], list[str]]:
    """What got worse than the table says, and what got better."""
    worse, better = [], []
    pairs: list[tuple[str, float, float]] = [
        ("regs", known.registers, facts.registers),
        ("spill", known.spills, facts.spills),
    ]
    if known.loop and facts.loop:
        pairs.append(("i/row", known.loop.per_row, facts.loop.per_row))
        if (known.loop.kind, known.loop.rows) != (facts.loop.kind, facts.loop.rows):
            worse.append(
                f"rows: table {known.loop.rows} in a {known.loop.kind}, "
                f"measured {facts.loop.rows} in a {facts.loop.kind}"
            )
    for metric, expected, value in pairs:
        text = f"{metric}: table {round(expected, 1)}, measured {round(value, 1)}"
        if value > expected * (1 + tolerance):
            worse.append(f"{text}, more than {tolerance:.0%} above")
        elif value < expected * (1 - tolerance):
            better.append(text)
    for metric, expected, value in (
        ("ld16", known.wide_loads, facts.wide_loads),
        ("red16", known.wide_reductions, facts.wide_reductions),
    ):
        if value < expected:
            worse.append(f"{metric}: table {expected}, measured {value}, fewer")
    return worse, better


def compare(table: Table, measured: Table, tolerance: float) -> tuple[list[str], list[str]]:
    """Failures, and hints that the table is behind."""
    failures, hints = [], []
    for name in sorted({*table, *measured}, key=sort_key):
        for architecture in ARCHITECTURES:
            known, facts = table.get(name, {}).get(architecture), measured.get(name, {}).get(architecture)
            where = f"{name} {architecture}"
            if facts is None:
                if known or name in measured:
                    failures.append(f"{where}: not in the binary")
                continue
            failures += [f"{where}: {text}" for text in required(name, architecture, facts)]
            if known is None:
                failures.append(f"{where}: not in the table")
                continue
            if known.spills and not facts.spills and not ALLOWED_SPILLS.get(name):
                failures.append(f"{where}: spill: the table says {known.spills}, but ALLOWED_SPILLS has no reason")
            worse, better = changes(known, facts, tolerance)
            failures += [f"{where}: {text}" for text in worse]
            hints += [f"{where}: {text}" for text in better]
    return failures, hints
