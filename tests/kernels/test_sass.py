"""Instructions of a kernel's loops are counted in handwritten machine code, and in what the compiler makes of ours."""

import re
from functools import lru_cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels.ahead_of_time import compile as ahead  # noqa: E402
from dma_diffusers.kernels.ahead_of_time import sass as instructions  # noqa: E402


def loops_in(program):
    """The loops of a program in nvdisasm's notation, without addresses."""
    lines = [line.strip() for line in program.strip().splitlines()]
    return instructions.loops_in(
        "\n".join(
            line if line.endswith(":") else f"        /*{16 * place:04x}*/                   {line} ;"
            for place, line in enumerate(lines)
        )
    )


def test_a_persistent_loop_around_the_loops_over_tiles():
    first, second = loops_in("""
        MOV R1, R2
        .L_x_0:
        LDG.E R4, desc[UR4][R2.64]
        .L_x_1:
        HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR16], R24, gsb0
        MUFU.EX2 R5, R5
        FADD.FTZ R5, R5, R6
        @P1 BRA `(.L_x_1)
        FMUL R5, R5, R6
        .L_x_2:
        QGMMA.64x128x32.F32.E4M3.E4M3 R88, R152, gdesc[UR8], R88, gsb0
        @P2 BRA `(.L_x_2)
        STG.E desc[UR4][R2.64], R4
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_3:
        BRA `(.L_x_3)
    """)
    assert first["every"] == {"mma": 1, "mufu": 1, "fma": 1, "control": 1}
    assert first["some"] == {}
    assert first["matrix"] == {"HGMMA": 1}
    assert second["every"] == {"mma": 1, "control": 1}
    assert second["matrix"] == {"QGMMA": 1}


def test_waiting_for_a_barrier_out_of_line():
    (loop,) = loops_in("""
        .L_x_0:
        UTCQMMA gdesc[UR8], gdesc[UR10], tmem[UR6], tmem[UR12], idesc[UR13], UPT
        SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR5], R6
        @!P2 BRA `(.L_x_1)
        .L_x_2:
        MUFU.EX2 R5, R5
        @P1 BRA `(.L_x_0)
        EXIT
        .L_x_1:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR5], R6
        @!P2 BRA `(.L_x_1)
        BRA `(.L_x_2)
    """)
    assert loop["every"] == {"mma": 1, "control": 3, "mufu": 1}
    assert loop["some"] == {"control": 3}


def test_waiting_for_a_barrier_in_line():
    (loop,) = loops_in("""
        .L_x_0:
        UTCQMMA gdesc[UR8], gdesc[UR10], tmem[UR6], tmem[UR12], idesc[UR13], UPT
        .L_x_1:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR5], R6
        @!P2 BRA `(.L_x_1)
        MUFU.EX2 R5, R5
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    assert loop["every"] == {"mma": 1, "control": 3, "mufu": 1}
    assert loop["some"] == {}


def test_what_a_branch_skips_is_counted_apart():
    (loop,) = loops_in("""
        .L_x_0:
        @P3 FMUL R5, R5, R6
        @!P4 BRA `(.L_x_1)
        FMUL2 R8, R8.F32x2.HI_LO, R6.F32
        .L_x_1:
        BRA.U !UP0, `(.L_x_2)
        @P0 UTCHMMA tmem[UR44], gdesc[UR12], tmem[UR5], tmem[UR10], idesc[UR11], UPT
        UTCBAR [UR4], URZ
        .L_x_2:
        MUFU.EX2 R5, R5
        BRA.U UP1, `(.L_x_0)
        EXIT
    """)
    assert loop["every"] == {"fma": 1, "control": 3, "mufu": 1}
    assert loop["some"] == {"packed": 1, "mma": 1, "control": 1}
    assert loop["matrix"] == {"UTCHMMA": 1}


def test_iterations_that_skip_a_tile_do_not_count():
    (loop,) = loops_in("""
        .L_x_0:
        LDG.E R4, [R2.64]
        @!P0 BRA `(.L_x_2)
        IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], RZ, !UPT
        MUFU.EX2 R5, R5
        @P3 BRA `(.L_x_1)
        FADD R6, R6, R5
        .L_x_1:
        FMUL R5, R5, R6
        .L_x_2:
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    assert loop["every"] == {"memory": 1, "mma": 1, "mufu": 1, "fma": 1, "control": 3}
    assert loop["some"] == {"fma": 1}


def test_warps_that_a_table_sends_to_their_code():
    loops = loops_in("""
        BRX R2 -0x3b0 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)
        .L_x_0:
        MUFU.EX2 R5, R5
        @P1 BRA `(.L_x_0)
        EXIT
        .L_x_1:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24
        @P1 BRA `(.L_x_1)
        EXIT
    """)
    assert [loop["every"] for loop in loops] == [{"mufu": 1, "control": 1}, {"mma": 1, "control": 1}]


def test_specialised_warps_have_a_loop_each():
    products, exponentials = loops_in("""
        @P0 BRA `(.L_x_1)
        .L_x_0:
        UTCOMMA gdesc[UR8], gdesc[UR10], tmem[UR6], tmem[UR12], idesc[UR13], tmem[UR26], UPT
        @P1 BRA `(.L_x_0)
        EXIT
        .L_x_1:
        UTMALDG.2D [UR8], [UR4]
        @P1 BRA `(.L_x_1)
        .L_x_2:
        MUFU.EX2 R5, R5
        @P1 BRA `(.L_x_2)
        EXIT
    """)
    assert products["every"] == {"mma": 1, "control": 1}
    assert exponentials["every"] == {"mufu": 1, "control": 1}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mma", "HGMMA QGMMA IGMMA HMMA IMMA QMMA OMMA UTCHMMA UTCQMMA UTCOMMA"),
        ("convert", "F2F F2I I2F"),
        ("pack", "F2FP I2FP"),
        ("fma", "FFMA FMUL FADD FFMA32I"),
        ("packed", "FFMA2 FMUL2 FADD2 HFMA2 HMUL2 HADD2"),
        ("alu", "FMNMX FMNMX3 VIMNMX IMNMX FSEL SEL FSETP ISETP LOP3 PLOP3 IADD IADD3 VIADD LEA SHF PRMT MOV P2R"),
        ("memory", "LDS STS LDSM STSM LDG STG LDGSTS LDTM STTM LDC SHFL UTMALDG UTCCP"),
        ("control", "BAR BRA SYNCS WARPSYNC WARPGROUP ELECT UTCBAR LDGDEPBAR DEPBAR FENCE"),
        ("uniform", "R2UR UIADD3 UMOV ULEA LDCU ULDC VOTEU S2UR"),
        ("other", "CS2R REDUX"),
    ],
)  # fmt: skip
def test_kinds(kind, names):
    assert {name: instructions.kind(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


@pytest.mark.parametrize(
    ("architecture", "matrix", "clocks"),
    [
        ("sm_90", {"HGMMA": 16}, 2 * 1024),
        ("sm_90", {"HGMMA": 8, "QGMMA": 4}, 1024 + 512),
        ("sm_100", {"UTCQMMA": 4, "UTCHMMA": 8}, 256 + 512),
        ("sm_100", {"UTCOMMA": 2, "UTCQMMA": 4}, 128 + 256),
        ("sm_103", {"UTCOMMA": 2, "UTCHMMA": 8}, 2**22 / 49152 + 512),
        ("sm_120", {"OMMA": 32, "HMMA": 128}, 1024 + 4096),
        ("sm_100", {}, 0),
    ],
)
def test_clocks_of_the_matrix_products(architecture, matrix, clocks):
    loop = {"every": {}, "some": {}, "matrix": matrix}
    assert instructions.bound(loop, architecture, 128, 256, 128, 128)["matrix"] == pytest.approx(clocks)
    assert instructions.bound(loop, architecture, 64, 256, 128, 128)["matrix"] == pytest.approx(clocks / 2)


def test_clocks_of_each_pipe():
    every = {"mufu": 64, "fma": 64, "packed": 32, "alu": 32, "pack": 32, "memory": 32}
    loop = {"every": every, "some": {"mufu": 1000}, "matrix": {"UTCQMMA": 8}}
    assert instructions.per_score_element(loop, 256, 128, 128) == {
        "mufu": 1, "fma": 1, "packed": 0.5, "alu": 0.5, "pack": 0.5, "memory": 0.5}  # fmt: skip
    expected = {"matrix": 512, "xu": 1024, "fma": 128 + 128, "alu": 256, "issue": 512}
    assert instructions.bound(loop, "sm_100", 128, 256, 128, 128) == expected
    assert instructions.bound(loop, "sm_103", 128, 256, 128, 128) == expected | {"xu": 512}
    half = {"every": every | {"mufu": 32}, "some": {}, "matrix": {}}
    assert instructions.bound(half, "sm_100", 128, 128, 64, 128)["xu"] == 512
    with pytest.raises(KeyError, match="sm_42"):
        instructions.bound(loop, "sm_42", 128, 256, 128, 128)


def test_table():
    row = {
        "architecture": "sm_100", "head_dim": 128, "loop": "HIGH", "matrix": {"UTCQMMA": 4, "UTCHMMA": 8},
        "per_score_element": {"mufu": 1.016, "other": 2.0}, "longest": "issue",
        "clocks": {"matrix": 768.0, "xu": 1040.0, "fma": 566.0, "alu": 556.0, "issue": 1178.0},
    }  # fmt: skip
    header, rule, line = instructions.markdown([row]).splitlines()
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (header, rule, line)]
    assert len(cells[0]) == len(cells[1]) == len(cells[2])
    table = dict(zip(cells[0], cells[2], strict=True))
    assert (table["loop"], table["matrix"], table["longest"]) == ("HIGH", "UTCQMMA + UTCHMMA", "issue")
    assert (table["mufu"], table["fma"], table["other"]) == ("1.02", "0.00", "2.00")
    assert (table["xu clocks"], table["issue clocks"]) == ("1,040", "1,178")


MATRIX = {
    "mxfp8": {"UTCQMMA", "UTCHMMA"}, "mxfp4": {"UTCOMMA", "UTCQMMA"}, "bf16": {"HGMMA"}, "int8": {"IGMMA", "QGMMA"}
}  # fmt: skip


@lru_cache
def described(target, high, low):
    kernel, arguments, options = list(ahead.launches(target, high, low, 128))[-1]
    compiled = ahead.compile_launch(kernel, arguments, options, target)
    threads, rows = 32 * options["num_warps"], options.get("ROWS", 64)
    return instructions.describe(compiled.asm["cubin"], target, 128, threads, rows, 128)


@pytest.mark.parametrize(
    ("target", "high", "low"),
    [("sm_100", "mxfp8", "mxfp4"), ("sm_100", "mxfp8", None), ("sm_100", None, "mxfp4"), ("sm_90", "bf16", "int8")],
)  # fmt: skip
def test_each_class_has_its_loop(target, high, low):
    """HIGH, LOW and MASKED, in this order, each with one exponential a score and a few for the rescale."""
    loops = described(target, high, low)
    classes = [high, low, high] if high and low else [high or low] * 2
    warpgroups = 3 if target == "sm_90" else 1  # each with loops of its own
    assert [set(loop["matrix"]) for loop in loops] == [MATRIX[name] for name in classes] * warpgroups
    on_mufu = 27 / 32 if target == "sm_100" else 1  # tuning.py's exp_share
    for loop in loops:
        assert on_mufu <= loop["per_score_element"]["mufu"] < on_mufu + 0.05
        assert "other" not in loop["per_score_element"]
        assert loop["clocks"]["xu"] >= on_mufu * 1024
        assert loop["longest"] == max(loop["clocks"], key=loop["clocks"].get)
        assert loop["per_score_element"]["memory"] < 0.6  # nothing much is spilled in it


def test_the_page_has_these_counts():
    page = Path(instructions.__file__).with_name("instructions.md").read_text()
    counted_with = re.search(r"Triton (\d+\.\d+)", page)[1]
    if not triton.__version__.startswith(f"{counted_with}."):
        pytest.skip(f"the page was counted with Triton {counted_with}, not {triton.__version__}")
    table = page.split("<!-- counts -->\n")[1].split("<!-- /counts -->")[0]
    assert table == ahead.loops_of_mixed_kernels()
