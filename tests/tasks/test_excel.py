"""Excel's first line, which says what separates the cells, is obeyed or refused by name."""

import pytest

from scalora.common.errors import ScaloraError
from scalora.tasks.data.tables import read_table


@pytest.mark.parametrize("line", ["sep={}", '"sep={}"', "SEP={}"])
@pytest.mark.parametrize("separator", [";", ",", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_excels_first_line_is_obeyed(tmp_path, line, separator, end):
    path = tmp_path / "x.csv"
    lines = [line.format(separator), separator.join(("text", "label")), separator.join(('"a,b;c"', "1")), "z"]
    path.write_bytes(end.join(lines[:3]).encode())
    table = read_table(path)
    assert (table.rows, table.lines) == ([{"text": "a,b;c", "label": "1"}], [3])
    path.write_bytes(end.join(lines).encode())
    with pytest.raises(ScaloraError, match=r"x\.csv, line 4: 1 fields"):
        read_table(path)


def test_excels_first_line_in_a_tsv(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("sep=\t\ntext\tlabel\na\t1\n")
    assert read_table(path).rows == [{"text": "a", "label": "1"}]
    path.write_text("sep=;\ntext;label\na;1\n")
    with pytest.raises(ScaloraError, match=r"x\.tsv, line 1: it says that cells are separated by ';': name the file"):
        read_table(path)
