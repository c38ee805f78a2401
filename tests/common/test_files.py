"""How files are written."""

import json

from scalora.common.files import write_json


def test_compact_json_has_a_line_for_what_lies_deep_or_holds_numbers_only(tmp_path):
    content = {"flat": {"a": 1, "ö": None}, "list": [{"x": [1.5, {"deep": []}]}, {"x": []}], "none": []}
    write_json(tmp_path / "out.json", content, depth=2)
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text) == content
    assert text.splitlines() == [
        "{",
        ' "flat": {"a":1,"ö":null},',
        ' "list": [',
        '  {"x":[1.5,{"deep":[]}]},',
        '  {"x":[]}',
        " ],",
        ' "none": []',
        "}",
    ]
