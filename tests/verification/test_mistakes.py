"""Tables of mistakes: what is read, and what is refused."""

import pytest

from verification import mistakes
from verification.claims import CLAIMS
from verification.planting import Edit
from verification.shared_mistakes import SHARED

TABLE = r"""
ctrl.girsanov.path_kl
    no 1/2 | 0.5 * energy => energy
    two lines [full] | first\n    second => `first `
    a backslash | a\\b
        => c
somewhere.else
    no 1/2 | 0.5 => ``
    refused [ValueError] [full] | a | b => a & b
"""


def test_a_table_is_read():
    half, lines, slash, refused = mistakes.read(TABLE)
    assert half.name == "no 1/2"
    assert half.edits == (
        Edit("ctrl.girsanov.path_kl", "0.5 * energy", "energy"),
        Edit("somewhere.else", "0.5", ""),
    )
    assert not half.full
    assert lines.full
    assert lines.edits[0].old == "first\n    second"
    assert lines.edits[0].new == "first "
    assert slash.edits == (Edit("ctrl.girsanov.path_kl", "a\\b", "c"),)
    assert refused.raises is ValueError
    assert refused.edits == (Edit("somewhere.else", "a | b", "a & b"),)


@pytest.mark.parametrize(
    "line",
    ["a name alone", "no arrow | a", "no name => b", "[full] | a => b", "no 1/2 | again => b"],
)
def test_what_is_no_line_is_refused(line):
    with pytest.raises(ValueError, match="mistake"):
        mistakes.read(TABLE.replace("    refused", f"    {line}\n    refused"))
    with pytest.raises(ValueError, match="no line"):
        mistakes.read("    before any function | a => b")


def test_a_shared_mistake_is_taken_by_its_name():
    (name,) = [m.name for m in mistakes.read("shared\n    factor 1/2 dropped\n")]
    assert name == "factor 1/2 dropped"
    with pytest.raises(ValueError, match="no shared mistake 'nonsense'"):
        mistakes.read("shared\n    nonsense")
    with pytest.raises(ValueError, match="no line"):
        mistakes.read("shared\n    factor 1/2 dropped | a => b")


def test_what_is_shared_is_shared_and_nothing_else_stands_twice():
    everywhere = [m for claim in CLAIMS.values() for m in claim.mistakes]
    shared_ones = mistakes._read(SHARED, {})
    for shared in shared_ones:
        same = [m for m in everywhere if m.edits == shared.edits]
        assert len(same) > 1, f"{shared.name} is not shared"
        assert {m.name for m in same} == {shared.name}
    alone = {m.edits for m in everywhere} - {m.edits for m in shared_ones}
    edits = [m.edits for m in everywhere if m.edits in alone]
    twice = {e for e in edits if edits.count(e) > 1}
    assert not twice, "put these into shared_mistakes.py"
