"""The matrix of kernels: what it covers, what it skips and says, what it counts as a failure."""

import os
import subprocess
import sys

import pytest

from benchmarks import portability
from benchmarks.portability import MATRIX, Row, read_claims, read_tests, rows, table
from verification import kernels
from verification.kernels import Kernel

VALUES = {
    "MKL_CBWR": {"COMPATIBLE", "SSE4_2", "AVX2", "AVX512"},
    "ATEN_CPU_CAPABILITY": {"default", "avx2", "avx512"},
    "ONEDNN_MAX_CPU_ISA": {"SSE41", "AVX2", "AVX512_CORE"},
    "OPENBLAS_CORETYPE": {"Prescott", "Nehalem", "Haswell", "SkylakeX"},
    "OMP_NUM_THREADS": {"2"},  # 1 where nothing is said
}
USUAL, OTHER, SAME = MATRIX[0], MATRIX[1], MATRIX[3]


def test_the_matrix_has_every_value_of_every_variable():
    for variable, values in VALUES.items():
        assert {k.variables[variable] for k in MATRIX if variable in k.variables} == values
    assert MATRIX[0].variables == {}
    assert set(VALUES) == set(kernels.CHOICES)


def test_an_environment_has_the_choice_and_no_other(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SOMETHING", "else")
    found = Kernel({"OPENBLAS_CORETYPE": "Nehalem"}).environ()
    assert "MKL_CBWR" not in found
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["OPENBLAS_CORETYPE"] == "Nehalem"
    assert found["SOMETHING"] == "else"
    with pytest.raises(ValueError, match="chosen by"):
        Kernel({"MKL_CBRW": "AVX2"})


def identify(kernel):
    """As a machine on which MKL's AVX2 is the usual, and ATen has no avx512."""
    return "bbb" if kernel.variables.get("MKL_CBWR") == "COMPATIBLE" else "aaa"


def test_equal_fingerprints_run_once_and_say_so(monkeypatch):
    monkeypatch.setattr(kernels, "instructions_here", lambda: frozenset({"sse2", "avx2"}))
    ran = []

    def run(kernel):
        ran.append(kernel.name)
        return 10, int(kernel is OTHER), ("tests/a.py::b",) if kernel is OTHER else ()

    lacking = Kernel({"ATEN_CPU_CAPABILITY": "avx512"})
    found = rows([USUAL, OTHER, SAME, lacking], run, identify)
    assert sorted(ran) == sorted(["usual", "MKL_CBWR=COMPATIBLE"])
    assert [row.kernel for row in found] == [USUAL, OTHER, SAME, lacking]
    assert found[1].failed == 1
    assert found[2].says == "same kernels as usual"
    assert found[3].says == "same kernels as usual; falls back: this processor has no avx512f"
    text = table(found)
    assert "| MKL_CBWR=COMPATIBLE | bbb | 10 | 1 | 0 |  |" in text
    assert "| MKL_CBWR=AVX2 | aaa |  |  |  | same kernels as usual |" in text


def test_threads_are_a_kernel_of_their_own_whatever_the_fingerprint():
    """Small inputs are not divided among threads; large ones are."""
    found = rows([USUAL, Kernel({"OMP_NUM_THREADS": "2"})], lambda _: (1, 0, ()), identify)
    assert [row.passed for row in found] == [1, 1]


def test_what_this_processor_lacks_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(kernels, "instructions_here", lambda: frozenset({"sse2", "avx2"}))
    lacking = Kernel({"OPENBLAS_CORETYPE": "SkylakeX"})
    found = rows(
        [lacking, Kernel({"OPENBLAS_CORETYPE": "Haswell"})], lambda _: (1, 0, ()), identify
    )
    assert found[0].says == "left out: this processor has no avx512f"
    assert found[1].passed == 1
    (row,) = rows([USUAL], lambda _: (1, 0, ()), lambda _: "")
    assert row.says == "cannot run here"


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("3 passed, 2 skipped in 1s", 0, (3, 0, ())),
        (
            "FAILED a.py::b - x\nERROR c.py\n1 failed, 3 passed, 1 error",
            1,
            (3, 2, ("a.py::b", "c.py")),
        ),
        ("", -4, (0, 1, ("pytest ended with -4",))),  # an illegal instruction
        ("no tests ran", 5, (0, 1, ("pytest ended with 5",))),
    ],
)
def test_pytests_last_words_are_read(output, code, expected):
    assert read_tests(output, code) == expected


def test_claims_that_do_not_hold_are_failures():
    text = "  fail: one: 1.0e-02, tolerance 1.0e-08\n1 of 3 claims hold, 0 of 0 wrong variants"
    assert read_claims(text, 1) == (1, 2, ("one: 1.0e-02, tolerance 1.0e-08",))
    assert read_claims("", -11) == (0, 1, ("verification ended with -11",))


def test_a_failure_is_an_exit_code_and_a_name(monkeypatch, capsys):
    row = Row(OTHER, "bbb", "", 9, 1, 2.0, ("tests/a.py::b",))
    monkeypatch.setattr(portability, "rows", lambda *_, **__: [row])
    assert portability.main(["--sample"]) == 1
    out = capsys.readouterr().out
    assert "MKL_CBWR=COMPATIBLE: tests/a.py::b" in out
    assert "1 failures" in out
    monkeypatch.setattr(portability, "rows", lambda *_, **__: [])
    assert portability.main([]) == 1  # nothing ran: nothing is shown


def test_a_fingerprint_is_the_same_twice_and_another_without_fused_products():
    """MKL's COMPATIBLE multiplies and adds apart on every x86 processor."""
    one, again, other = (
        portability.fingerprint_of(Kernel(variables))
        for variables in ({}, {}, {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"})
    )
    assert one == again
    assert len(one) == 12
    assert one != other or os.uname().machine != "x86_64"


def test_the_tests_that_are_named_are_there():
    assert all(os.path.exists(name) for name in portability.PARTS)
    assert set(portability.FEWEST) <= set(portability.PARTS)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.portability", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
