import pickle
from string import Formatter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalora.common.errors import ScaloraError
from scalora.tasks.data.rows import PlacedRow
from scalora.tasks.template import Template

PLACED = PlacedRow({"q": "why", "a": ""}, "x.csv, line 7, row 3")


@pytest.mark.parametrize(
    ("text", "field", "character"),
    [
        ("Reply as {a: yes} to {q}:", "{a: yes}", 10),
        ('{{}} is {{"a": 1}}, {"a": 1} is not', '{"a": 1}', 21),
        ("Q {q:d} A:", "{q:d}", 3),
        ("Q {q:} A:", "{q:}", 3),
        ("{q}{q!x}:", "{q!x}", 4),
        ("{q!r}", "{q!r}", 1),
        ("Q {q:{w}}:", "{q:{w}}", 3),
        ("{a.b}", "{a.b}", 1),
        ("{{{a[0]}", "{a[0]}", 3),
        ("{}", "{}", 1),
        ("{0}", "{0}", 1),
    ],
)
def test_fields_that_are_no_columns(text, field, character):
    with pytest.raises(ScaloraError) as error:
        Template("task.prompt", text)
    assert str(error.value) == (
        f"task.prompt: {field} is no column (character {character}); "
        "write {column} with a column's plain name, and a literal brace twice"
    )


@pytest.mark.parametrize(
    ("text", "place"), [("a } b", 1), ("{q", 1), ("{q} and {", 4), ("{{ok}} {q} } no", 11), ("{q!}", 1), ("{q!rr}", 1)]
)
def test_braces_that_do_not_match(text, place):
    with pytest.raises(ScaloraError, match=rf"task\.prompt: .* is no template \(character {place}: .*brace twice"):
        Template("task.prompt", text)


@given(st.text("{}q: a!.[0]", max_size=12))
def test_texts_are_format_strings_or_refused(text):
    try:
        template = Template("task.prompt", text)
    except ScaloraError:
        return
    wanted = {column: f"<{column}>" for column in template.columns}
    assert template(wanted) == text.format_map(wanted)
    assert set(template.columns) == {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def test_a_column_may_have_any_name():
    assert Template("task.text", "a.b: [0]!", is_column=True)({"a.b: [0]!": 3}) == "3"


def test_a_template_of_half_a_character():
    with pytest.raises(ScaloraError, match=r"task\.prompt: the template holds half of a surrogate pair"):
        Template("task.prompt", "\ud83d {q}")


def test_what_a_row_lacks():
    Template("task.prompt", "{q}{a}").check(PLACED, keep_missing=False)
    Template("task.prompt", "no field").check(PLACED, keep_missing=False)
    Template("task.prompt", "{a}").check(PLACED, keep_missing=True)
    with pytest.raises(ScaloraError, match=r"task\.prompt: column 'a' is empty in x\.csv, line 7, row 3; fill or drop"):
        Template("task.prompt", "Q {a}:").check(PLACED, keep_missing=False)


def test_rows_keep_their_place_when_pickled():
    again = pickle.loads(pickle.dumps(PLACED))
    assert again == PLACED
    assert again.place == PLACED.place
