"""The gate on machine code: its parser, its loop finder and its comparison, on listings small enough to count."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / ".ci" / "machine_code"))

import facts as facts_of_code
import sass
import table
from facts import Facts, RowLoop

# Groups of 8 lanes, 2 rows in each: a batch has 8 rows, and 1 + 2 exchanges.
NAME = "sampled_loss_kernel<float,RowShape<1,8,2,6,false,true>,16,binary>"
WHOLE = NAME.replace("binary", "whole")

# As nvdisasm -c prints it.
LISTING = """\
	.target	sm_90

//--------------------- .text._Z5firstv          --------------------------
	.section	.text._Z5firstv,"ax",@progbits
        .type           _Z5firstv,@function
.text._Z5firstv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
        /*0020*/               @P0 BRA P2, `(.L_x_0) ;
        /*0030*/                   STL.S16 [R1+0x3c], R6          (*"SpillRefill"*);
        /*0040*/                   BRX R4 -0x50            (*"BRANCH_TARGETS .L_x_0,.L_x_1"*);
.L_x_0:
        /*0050*/              @!PT EXIT ;
.L_x_1:
        /*0060*/                   LDG.E.NA.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0070*/                   EXIT ;

//--------------------- .nv.shared._Z5firstv     --------------------------
	.section	.nv.shared._Z5firstv,"aw",@nobits

//--------------------- .text._Z6secondv         --------------------------
.text._Z6secondv:
        /*0000*/                   EXIT ;
"""

# The batch loop, from top to bottom in the order of addresses: a rarely taken piece of it lies behind the exit, the
# copies of the shuffles for a warp that is not converged behind that.
BATCHES = """\
        MOV R0, RZ
top:    LDG.E.NA.128.CONSTANT R4, [R2.64]
        LDG.E.NA.128.CONSTANT R8, [R2.64]
        BSSY B0, `(joined)
  @P0   BRA `(rare)
back:   MUFU.EX2 R3, R3
        BSYNC B0
joined: BRA.DIV UR4, `(split)
        SHFL.BFLY PT, R3, R3, 0x4, 0x1f
        SHFL.BFLY PT, R3, R3, 0x2, 0x1f
        SHFL.BFLY PT, R3, R3, 0x1, 0x1f
merged: CALL.REL.NOINC `($__internal_0)
        @P1 BRA `(top)
        EXIT
rare:   FMUL R3, R3, R3
        FMUL R3, R3, R3
        BRA `(back)
split:  WARPSYNC.COLLECTIVE R5, `(again)
again:  SHFL.BFLY PT, R3, R3, 0x4, 0x1f
        BRA `(merged)
$__internal_0:
        FADD R3, R3, R3
        RET.REL.NODEC R20 `(first)
end:    BRA `(end)
"""
GOOD = Facts(64, 0, 0, 2, 0, RowLoop("batch", 8, 400))
IN_LOOP = 12 + 3  # from top to the branch back to it, and the rare piece


def lines(text: str) -> list[str]:
    """Instructions with or without a label before them, in the form of a listing."""
    result = []
    for line in text.splitlines():
        match = re.match(r"(?:([$\w]+):)?\s*(.*)", line)
        if match[1]:
            result.append(("" if match[1].startswith("$") else ".L_") + f"{match[1]}:")
        if match[2]:
            body = re.sub(r"`\((\w+)\)", r"`(.L_\1)", re.sub(r"\s+", " ", match[2]))
            result.append(f"        /*{16 * len(result):04x}*/                   {body} ;")
    return result


def measured(text: str, name: str = NAME, local_bytes: int = 0) -> Facts:
    return facts_of_code.facts_of(name, lines(text), 40, local_bytes)


def in_every_architecture(facts: Facts, name: str = NAME) -> table.Table:
    return {name: dict.fromkeys(table.ARCHITECTURES, facts)}


def test_a_listing_is_cut_into_kernels_and_instructions():
    parts = dict(sass.sections(LISTING))
    assert list(parts) == ["_Z5firstv", "_Z6secondv"]
    kernel = sass.Kernel(parts["_Z5firstv"])
    assert [i.opcode for i in kernel.instructions] == [
        "LDC", "BRA", "BRA", "STL.S16", "BRX", "EXIT", "LDG.E.NA.128.CONSTANT", "EXIT",
    ]  # fmt: skip
    assert kernel.count("STL") == kernel.count("LDG", "128") == 1
    assert kernel.instructions[4].targets == (".L_x_0", ".L_x_1")
    assert len(sass.Kernel(parts["_Z6secondv"]).instructions) == 1


def test_successors_of_branches_and_exits():
    blocks = sass.Kernel(dict(sass.sections(LISTING))["_Z5firstv"]).blocks
    assert [block.successors for block in blocks] == [[4, 1], [3, 2], [3, 4], [4], []]


def test_the_loop_holds_what_lies_out_of_line_but_no_subroutine_and_no_copy_for_split_warps():
    loop = measured(BATCHES).loop
    assert loop is not None
    assert (loop.kind, loop.rows, loop.instructions) == ("batch", 8, IN_LOOP)
    assert loop.per_row == IN_LOOP / 8
    assert (loop.shortest, loop.longest) == (12, 15)


def test_code_between_the_ends_of_a_loop_is_not_in_it():
    """By addresses, the piece before `exit` would be: it leaves the loop, so that no dominator makes it part of it."""
    text = """\
top:    IADD3 R0, R0, 0x1, RZ
  @P0   BRA `(next)
        FADD R1, R1, R1
        FADD R1, R1, R1
        EXIT
next:   IADD3 R0, R0, 0x1, RZ
  @P1   BRA `(top)
        EXIT
"""
    kernel = sass.Kernel(lines(text))
    (loop,) = kernel.loops()
    assert len(kernel.body(loop)) == 4


def test_nested_loops_and_a_jump_backwards_that_is_none():
    text = """\
        BRA `(middle)
outer:  FADD R1, R1, R1
inner:  FMUL R1, R1, R1
  @P0   BRA `(inner)
  @P1   BRA `(outer)
        EXIT
middle: MOV R0, R0
        BRA `(outer)
"""
    kernel = sass.Kernel(lines(text))
    assert sorted(len(kernel.body(loop)) for loop in kernel.loops()) == [2, 4]


def test_the_outer_loop_does_not_count_as_the_row_loop():
    around = "outer: ISETP P2, R7, R8\n" + BATCHES.replace("EXIT", "VOTE.ANY R9, PT, P3\n @P2 BRA `(outer)\n EXIT")
    loop = measured(around).loop
    assert loop is not None
    assert (loop.kind, loop.instructions) == ("batch", IN_LOOP)


def test_batches_unrolled_into_the_tile_loop():
    one = re.search(r"top:(.*?)        BSSY", BATCHES, flags=re.DOTALL)[1] + 3 * "SHFL.BFLY PT, R3, R3, 0x1, 0x1f\n"
    loop = measured("top: VOTE.ANY R9, PT, P3\n" + 4 * one + "@P1 BRA `(top)\nEXIT\n").loop
    assert loop is not None
    assert (loop.kind, loop.rows, loop.instructions) == ("tile", 32, 2 + 4 * 5)


def test_batches_of_an_objective_over_the_whole_example():
    """They vote too, on whether a score is larger than all before, and then exchange 3 more; they keep no ballot."""
    more = 3 * "SHFL.BFLY PT, R3, R3, 0x10, 0x1f\n"
    loop = measured(BATCHES.replace("rare:   ", "rare: VOTE.ANY P2, P3\n" + more), WHOLE).loop
    assert loop is not None
    assert (loop.kind, loop.rows, loop.instructions) == ("batch", 8, IN_LOOP + 4)


def test_a_batch_that_is_a_whole_tile_is_counted_with_what_ends_an_example():
    name = "sampled_loss_kernel<float,RowShape<1,8,8,6,false,true>,16,binary>"
    load, shuffle = "LDG.E.NA.128.CONSTANT R4, [R2.64]\n", "SHFL.BFLY PT, R3, R3, 0x1, 0x1f\n"
    loop = measured("top: MOV R1, R1\n" + 8 * load + (7 + 5 + 8) * shuffle + "@P1 BRA `(top)\nEXIT\n", name).loop
    assert loop == RowLoop("example", 32, 30, 30, 30)
    assert table.read_facts(table.columns(measured("EXIT\n", name)))
    assert table.read_facts("64 0 8 0 32e 10.0").loop == RowLoop("example", 32, 320)


def test_no_row_loop():
    facts = measured("LDG.E.NA.128.CONSTANT R4, [R2.64]\nEXIT\n")
    assert facts.loop is None
    assert table.required(NAME, "sm_90", facts) == ["row loop: not found"]


def test_reconvergence_elsewhere_is_refused():
    with pytest.raises(sass.Unexpected, match="BSYNC B0"):
        measured(BATCHES.replace("joined: BRA.DIV", "FADD R1, R1, R1\njoined: BRA.DIV"))


@pytest.mark.parametrize("access", ["STL [R1+0x8], R4", "LDL.LU R4, [R1+0x8]"])
def test_a_spill_fails_even_where_the_table_has_it(access):
    facts = measured(BATCHES.replace("MOV R0, RZ", access), local_bytes=8)
    assert facts.spills == 1
    failures, _ = table.compare(in_every_architecture(facts), in_every_architecture(facts), 0.1)
    assert any(f"{NAME} sm_90: spill: 1 accesses to local memory, 8 bytes" in failure for failure in failures)


def test_the_table_may_not_hold_a_spill_without_a_reason():
    known = in_every_architecture(dataclasses.replace(GOOD, spills=1))
    failures, _ = table.compare(known, in_every_architecture(GOOD), 0.1)
    assert f"{NAME} sm_80: spill: the table says 1, but ALLOWED_SPILLS has no reason" in failures


def test_a_stack_frame_without_accesses_fails():
    assert "8 bytes" in table.required(NAME, "sm_80", measured(BATCHES, local_bytes=8))[0]


def test_a_spill_may_be_allowed_with_a_reason(monkeypatch):
    facts = measured(BATCHES.replace("MOV R0, RZ", "STL [R1], R4"), local_bytes=8)
    monkeypatch.setitem(table.ALLOWED_SPILLS, NAME, "outside of the loop")
    assert table.compare(in_every_architecture(facts), in_every_architecture(facts), 0.1) == ([], [])
    more = dataclasses.replace(facts, spills=2)
    failures, _ = table.compare(in_every_architecture(facts), in_every_architecture(more), 0.1)
    assert f"{NAME} sm_80: spill: table 1, measured 2, more than 10% above" in failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 72}, "regs: table 64, measured 72, more than 10% above"),
        ({"loop": RowLoop("batch", 8, 448)}, "i/row: table 50.0, measured 56.0, more than 10% above"),
        ({"loop": RowLoop("tile", 8, 400)}, "rows: table 8 in a batch, measured 8 in a tile"),
        ({"wide_loads": 1}, "ld16: 1 in the row loop, which loads 2 vectors"),
        ({"loop": None}, "row loop: not found"),
    ],
)
def test_what_got_worse_fails_by_name(change, message):
    worse = in_every_architecture(GOOD)
    worse[NAME]["sm_100"] = dataclasses.replace(GOOD, **change)
    failures, hints = table.compare(in_every_architecture(GOOD), worse, 0.1)
    assert f"{NAME} sm_100: {message}" in failures
    assert not any("sm_80" in failure or "sm_90" in failure for failure in failures)
    assert not hints


def test_a_change_of_less_than_the_tolerance_passes_and_a_better_one_hints():
    near = dataclasses.replace(GOOD, registers=70, loop=RowLoop("batch", 8, 436))
    assert table.compare(in_every_architecture(GOOD), in_every_architecture(near), 0.1) == ([], [])
    better = dataclasses.replace(GOOD, registers=56)
    failures, hints = table.compare(in_every_architecture(GOOD), in_every_architecture(better), 0.1)
    assert not failures
    assert f"{NAME} sm_80: regs: table 64, measured 56" in hints


def test_another_release_of_nvcc_widens_the_tolerance():
    assert table.tolerance_between("13.0.88", "13.0.88") == 0.10
    assert table.tolerance_between("13.1.9", "13.0.88") == 0.25


@pytest.mark.parametrize(
    ("name", "loads"), [("row_step_kernel<Half,true>", 7), ("segment_steps_kernel<float,BFloat16,16>", 9)]
)
def test_wide_steps_need_wide_loads(name, loads):
    wide, fewer = Facts(64, 0, 0, loads, 0, None), Facts(64, 0, 0, loads - 1, 0, None)
    assert not table.required(name, "sm_80", wide)
    assert table.required(name, "sm_80", fewer) == [f"ld16: {loads - 1}, in a kernel that loads {loads} vectors"]
    assert not table.required(name.replace("true", "false").replace("16>", "0>"), "sm_80", fewer)


def test_wide_scatters_need_vector_reductions():
    name, three = "scatter_step_kernel<4,true>", Facts(64, 0, 0, 3, 3, None)
    assert not table.required(name, "sm_80", three)
    assert not table.required(name, "sm_90", dataclasses.replace(three, wide_reductions=4))
    assert table.required(name, "sm_90", three) == ["red16: 3, in a kernel that adds to 4 vectors"]


def test_kernels_missing_on_either_side():
    known, present = in_every_architecture(GOOD, "join_kernel<float>"), in_every_architecture(GOOD, "joined_kernel")
    failures, _ = table.compare(known, present, 0.1)
    assert "join_kernel<float> sm_80: not in the binary" in failures
    assert "joined_kernel sm_100: not in the table" in failures
    del present["joined_kernel"]["sm_90"]
    assert "joined_kernel sm_90: not in the binary" in table.compare(present, present, 0.1)[0]


def test_the_table_is_read_back_as_written():
    kernels = in_every_architecture(GOOD) | {"sample_kernel": {"sm_90": Facts(26, 0, 0, 1, 0, None)}}
    text = table.write("13.0.88", kernels)
    assert table.read(text) == ("13.0.88", kernels)
    assert [line.split()[0] for line in text.splitlines() if not line.startswith("#")] == ["sample_kernel", NAME]


def test_names():
    short = facts_of_code.short_name
    shape = "nce::cuda::RowShape<2, 32, 4, 5, false, true>"
    arguments = f"<nce::cuda::BFloat16, {shape}, (nce::cuda::Access)16, (nce::cuda::Purpose)1>"
    name = short(f"void nce::cuda::sampled_loss_kernel{arguments}(nce::SampledLoss)")
    assert name == "sampled_loss_kernel<BFloat16,RowShape<2,32,4,5,false,true>,16,whole>"
    assert facts_of_code.shape_of(name) == facts_of_code.Shape(16, 4, 8, 1024, 8, "whole")
    assert short("nce::cuda::(anonymous namespace)::sample_kernel(nce::cuda::Sample)") == "sample_kernel"
    assert short("void cub::detail::EmptyKernel<void>()") is None
    steps = short("void nce::cuda::segment_steps_kernel<float, nce::cuda::Half, (nce::cuda::Access)16>(nce::RowStep)")
    assert steps == "segment_steps_kernel<float,Half,16>"
    assert facts_of_code.shape_of(steps) is None
    segments = facts_of_code.shape_of("segment_sums_kernel<double,double,8>")
    assert segments == facts_of_code.Shape(8, 4, 4, 512, 0, "")
