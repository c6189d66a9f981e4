"""Tables: none wider than its terminal, nothing lost of them, a line a row where there is room."""

import re

from hypothesis import given
from hypothesis import strategies as st

from dump_activations.commands.tables import Table
from dump_activations.text import width_of

WORDS = st.text(st.sampled_from("abc/._0"), min_size=1, max_size=40)
NUMBERS = st.integers(0, 10**12).map(lambda n: f"{n:,}")


@st.composite
def tables(draw):
    columns = draw(st.integers(2, 6))
    numbers = [i for i in range(1, columns) if draw(st.booleans())]
    cells = [NUMBERS if i in numbers else WORDS for i in range(columns)]
    rows = draw(st.lists(st.tuples(*cells) | WORDS, max_size=6))
    headings = [f"h{i}" for i in range(columns)]
    return Table(headings, rows, [headings[i] for i in numbers])


def cells_of(table):
    return [row for row in table.rows if not isinstance(row, str)]


@given(tables(), st.integers(45, 130))
def test_no_line_is_wider_than_the_terminal(table, width):
    """But for a first cell, which is never cut: names are for copying."""
    allowed = {*table.rows, *(row[0] for row in cells_of(table))}
    lines = [*table.lines(width, styled=False)]
    assert [line for line in lines if len(line) > width and line not in allowed] == []
    shown = re.sub(r"\s", "", "".join(lines))
    for row in cells_of(table):
        for cell in row:
            assert cell in shown


@given(tables())
def test_a_pipe_gets_a_line_for_each_row_and_no_blanks_at_their_ends(table):
    lines = [*table.lines(None, styled=False)]
    assert [line.split() for line in lines if line] == [
        [*table.headings],
        *([row] if isinstance(row, str) else [*row] for row in table.rows),
    ]
    assert all(line == line.rstrip() for line in lines)


def test_columns_stand_below_one_another():
    table = Table(("name", "size", "text"), [("a", "1", "x"), ("long", "1,000", "y")], ["size"])
    assert [*table.lines(None, styled=False)] == [
        "name   size  text",
        "a         1  x",
        "long  1,000  y",
    ]


def test_a_long_name_has_a_line_of_its_own():
    table = Table(("name", "size"), [("n" * 30, "12,345"), ("short", "1")], ["size"])
    assert [*table.lines(20, styled=False)] == [
        f"{'name':12}    size",
        "n" * 30,
        f"{'':12}  12,345",
        f"{'short':12}       1",
    ]


def test_a_long_text_goes_on_below_itself():
    table = Table(("key", "value"), [("k", "some words of which there are more than fit")])
    assert [*table.lines(30, styled=False)] == [
        "key  value",
        "k    some words of which there",
        "     are more than fit",
    ]


def test_no_terminal_is_too_narrow():
    table = Table(("name", "size", "text"), [("long", "1,000", "some words")], ["size"])
    assert [*table.lines(9, styled=False)] == [
        "long",
        "  size",
        "  1,000",
        "  text",
        "  some",
        "  words",
    ]


def test_wide_characters_take_two_columns():
    table = Table(("n", "size"), [("盤面", "1"), ("abcd", "2")], ["size"])
    assert {width_of(line) for line in table.lines(None, styled=False)} == {10}


def test_what_a_terminal_would_obey_is_escaped():
    (_, line) = Table(("a", "b"), [("\x1b[2J", "\n")]).lines(None, styled=False)
    assert line == "\\x1b[2J  \\n"
