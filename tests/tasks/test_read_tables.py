"""Whatever a program writes is read back as it was, or refused with the file and the line that the row starts on."""

import csv
import io
import itertools
import json
from contextlib import suppress

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalora.common.errors import ScaloraError
from scalora.tasks.data.rows import DataSpec, load_splits
from scalora.tasks.data.tables import read_table

# Python's csv writes a lone carriage return as it is, which ends a row: no reader gets it back.
LETTERS = st.characters(codec="utf-8", exclude_characters="\0\r")
TEXTS = st.text(LETTERS, max_size=12) | st.lists(st.sampled_from([*'",;\t\n a', "\r\n"]), max_size=8).map("".join)
TABLES = st.lists(st.tuples(TEXTS.map(lambda text: f"x{text}"), TEXTS), min_size=1, max_size=6)
MANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def delimited(rows, head=("text", "label"), **options):
    stream = io.StringIO()
    csv.writer(stream, **options).writerows([head, *rows])
    return stream.getvalue()


def plain(rows):
    return [{"text": text, "label": label} for text, label in rows]


@MANY
@given(TABLES, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]))
def test_what_csv_writes_is_read_back(tmp_path, rows, delimiter, end, mark):
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        content = delimited(rows, delimiter=delimiter, lineterminator=end, quoting=quoting)
        path = write(tmp_path / ("x.tsv" if delimiter == "\t" else "x.csv"), mark + content)
        table = read_table(path)
        assert table.rows == plain(rows)
        for number, line in enumerate(table.lines, 1):
            before = delimited(rows[: number - 1], delimiter=delimiter, lineterminator=end, quoting=quoting)
            assert line == 1 + sum(1 for _ in io.StringIO(before, newline=None))


@MANY
@given(TABLES)
def test_what_pandas_writes_is_read_back(tmp_path, rows):
    frame = pandas.DataFrame(plain(rows))
    writers = {
        "a.csv": frame.to_csv,
        "b.csv": lambda path: frame.to_csv(path, sep=";", index=False),
        "c.tsv": lambda path: frame.to_csv(path, sep="\t"),
        "d.json": lambda path: frame.to_json(path, orient="records"),
        "e.jsonl": lambda path: frame.to_json(path, orient="records", lines=True),
        "f.parquet": frame.to_parquet,
    }  # fmt: skip
    for name, writer in writers.items():
        writer(tmp_path / name)
        assert read_table(tmp_path / name).rows == plain(rows)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@MANY
@given(st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=4), st.sampled_from([None, 1]))
def test_what_json_writes_is_read_back(tmp_path, rows, indent):
    path = write(tmp_path / "x.json", json.dumps(rows, indent=indent))
    assert read_table(path).rows == rows
    path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_table(path).rows == rows


@MANY
@given(st.text('[]{}",:;\t\n\r a1\\', max_size=40), st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet"]))
def test_any_text_is_a_table_or_one_message(tmp_path, text, ending):
    path = write(tmp_path / f"x{ending}", text)
    with suppress(ScaloraError):
        table = read_table(path)
        assert len(table.lines) == len(table.rows)


@pytest.mark.parametrize(
    "content",
    [
        'text\tlabel\nHe said " no .\t1\n"All."\t0\n"Both", he said\t1\n',  # GLUE's release
        '"a\tlabel\n"b\t1\n',
    ],
)
def test_quotes_that_enclose_nothing_are_characters(tmp_path, content):
    lines = [line.split("\t") for line in content.splitlines()]
    assert [list(row.values()) for row in read_table(write(tmp_path / "x.tsv", content)).rows] == lines[1:]


def test_a_quote_inside_of_a_cell_is_a_character(tmp_path):
    for ending, separator in ((".csv", ","), (".tsv", "\t")):
        path = write(tmp_path / f"x{ending}", f'text{separator}label\na 5" pipe{separator}pos\n')
        assert read_table(path).rows == [{"text": 'a 5" pipe', "label": "pos"}]


@MANY
@given(TABLES, st.sampled_from([",", ";", "\t"]), st.lists(st.sampled_from(["", " ", "  ", "\xa0"]), min_size=1))
def test_white_space_around_a_cell_in_quotes_is_no_part_of_it(tmp_path, rows, delimiter, spaces):
    turn = itertools.cycle(spaces)
    cells = [["text", "label"], *rows]
    quoted = [[f'{next(turn)}"{cell.replace(chr(34), chr(34) * 2)}"{next(turn)}' for cell in row] for row in cells]
    path = write(tmp_path / ("x.tsv" if delimiter == "\t" else "x.csv"), "\n".join(map(delimiter.join, quoted)))
    assert read_table(path).rows == plain(rows)


def test_white_space_around_other_cells_is_kept(tmp_path):
    path = write(tmp_path / "x.csv", 'text,label\n a , "b, c" \n"d, ""e""" ,5" pipe\n"x, "" y, z",\t"1"\n')
    rows = [(" a ", "b, c"), ('d, "e"', '5" pipe'), ('x, " y, z', "1")]
    assert read_table(path).rows == plain(rows)


@pytest.mark.parametrize(
    ("name", "content", "columns", "hint"),
    [
        ("x.csv", "text\tlabel\na, b\t1\n", {}, "by tabs: name it .tsv"),
        ("x.csv", "text\tlabel\na\t1\n", {}, "by tabs: name it .tsv"),
        ("x.csv", "text|label\na|1\n", {}, "by |: separate its cells by commas"),
        ("x.tsv", "text,label\na,1\n", {}, "by commas or semicolons: name it .csv"),
        ("x.tsv", "text;label\na;1\n", {}, "by commas or semicolons: name it .csv"),
        ("x.tsv", "a,1\nb,2\n", {"text": "0", "label": "1"}, "by commas or semicolons: name it .csv"),
    ],
)
def test_another_separator_than_the_name_says(tmp_path, name, content, columns, hint):
    path = write(tmp_path / name, content)
    with pytest.raises(ScaloraError) as error:
        load_splits(DataSpec(train=str(path), test=str(path), columns=columns), ("text", "label"))
    assert f"the file seems to be separated {hint}" in str(error.value)


def test_a_first_line_that_is_a_row_may_be_there_again(tmp_path):
    path = write(tmp_path / "x.csv", "a,1\na,1\n")
    assert read_table(path, ["0", "1"]).rows == [{"0": "a", "1": "1"}] * 2


def test_a_single_column_may_hold_any_character(tmp_path):
    path = write(tmp_path / "x.tsv", "text\na, b; c|d\n")
    assert read_table(path).rows == [{"text": "a, b; c|d"}]


@pytest.mark.parametrize("name", ["X.CSV", "X.TSV", "X.JSONL", "X.JSON", "X.PARQUET"])
def test_endings_in_upper_case(tmp_path, name):
    frame = pandas.DataFrame({"text": ["a", "b"], "label": ["1", "0"]})
    writers = {
        "X.CSV": frame.to_csv, "X.TSV": lambda path: frame.to_csv(path, sep="\t"), "X.PARQUET": frame.to_parquet,
        "X.JSON": lambda path: frame.to_json(path, orient="records"),
        "X.JSONL": lambda path: frame.to_json(path, orient="records", lines=True),
    }  # fmt: skip
    writers[name](tmp_path / name)
    splits = load_splits(DataSpec(train=name, test=name, folder=str(tmp_path)), ("text", "label"))
    assert splits.test == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]


def test_cells_of_any_size_and_the_limit_of_others(tmp_path):
    limit = csv.field_size_limit()
    for ending, separator in ((".csv", ","), (".tsv", "\t")):
        path = write(tmp_path / f"x{ending}", delimited([("a" * 300_000, "1")], delimiter=separator))
        assert len(read_table(path).rows[0]["text"]) == 300_000
    assert csv.field_size_limit() == limit


def test_columns_without_a_name_are_not_there(tmp_path):
    path = write(tmp_path / "x.csv", ",text,label,\n0,a,b,\n")
    assert read_table(path).rows == [{"text": "a", "label": "b"}]


def test_positions_are_names_where_the_file_names_them(tmp_path):
    frame = pandas.DataFrame([["a", "1"], ["b", "0"]])
    frame.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    write(tmp_path / "y.tsv", "a\t1\nb\t0\n")
    for name in ("x.tsv", "y.tsv"):
        spec = DataSpec(train=name, test=name, folder=str(tmp_path), columns={"text": "0", "label": "1"})
        assert load_splits(spec, ("text", "label")).test == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", 'text,label\n"a\r\nb",1\n"never,0\nc,1\n', "line 4: a quote is never closed"),
        ("x.tsv", 'text\tlabel\n"a\r\nb"\t1\n"never\t0\nc\t1\n', "line 4: a quote is never closed"),
        ("x.csv", 'text,label\na,1\n"b" c,0\n', "line 3: ',' expected after '\"'"),
        ("x.csv", 'text,label\n"a\nb",1\n\n"c\nd",1,2\n', "line 5: 3 fields, but the first line has 2"),
        ("x.csv", "text,label\na\n", "line 2: 1 fields, but the first line has 2"),
        ("x.tsv", "text\tlabel\na\t1\t2\n", "line 2: 3 fields, but the first line has 2"),
        ("x.csv", "text,label,text\na,b,c\n", "line 1: columns need distinct names, but 'text' is there twice"),
        ("x.csv", b"text,label\na,1\n\xff,1\n", "line 3: not UTF-8 text"),
        ("x.csv", "text,label\na,1\n".encode("utf-16"), "UTF-16, as Windows programs write it; save it as UTF-8"),
        ("x.tsv", "\ufefftext\na\n".encode("utf-16-be"), "not UTF-8 text but UTF-16, as"),
        ("x.jsonl", '{"text": "é"}\n'.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 x.jsonl > new.jsonl"),
        ("x.json", '[{"text": "a"}]'.encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("x.csv", "text\na\n".encode("utf-32"), "not UTF-8 text but UTF-32"),
        ("x.csv", "text\né\n".encode("latin-1"), "line 2: not UTF-8 text"),
        ("x.csv", b"PK\3\4\xff\xfe", "not text but a zip or xlsx file"),
        ("x.csv", 'text,label\na, "never\nb,1\n', "line 2: a quote is never closed"),
        ("x.tsv", 'text\tlabel\na\t "never\nb\t1\n"c"\t2\n', "line 2: '\\t' expected after '\"'"),
        ("x.csv", 'text,label\na,1\n "b" c,0\n', "line 3: ',' expected after '\"'"),
        ("x.csv", 'text\tlabel\n"a, b"\t1\n', "the file seems to be separated by tabs: name it .tsv"),
        ("x.csv", "text|label\na, b|1\n", "separated by |: separate its cells by commas"),
        ("x.tsv", "text;label\na\t;1\n", "separated by commas or semicolons: name it .csv"),
        ("x.csv", "text,label\na,1\ntext,label\nb,0\n", "line 3: the first line with the names is there again"),
        ("x.tsv", "text\tlabel\na\t1\ntext\tlabel\n", "line 3: the first line with the names is there again"),
        ("x.csv", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, and no data"),
        ("x.jsonl", "<!DOCTYPE html>\n", "a web page, and no data"),
        ("x.jsonl", '[{"a": 1},\n{"a": 2}]', "line 1: not valid JSON"),
        ("x.jsonl", '[{"a": 1}]', "line 1: expected an object with named columns, got list; rename it to .json"),
        ("x.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: columns need distinct names, but 'a' is there twice"),
        ("x.json", '[{"a": 1},\n{"a": 1, "a": 2}]', "line 2, row 2: columns need distinct names, but 'a'"),
        ("x.jsonl", f'{{"a": 1}}\n{{"a": {DEEP}\n', "line 2: lists or objects lie too deep"),
        ("x.json", f'[{{"a": 1}},\n{{"a": {DEEP}', "line 2, row 2: lists or objects lie too deep"),
        ("x.jsonl", f'{{"a": {"9" * 5000}}}\n', "line 1: a number has too many digits"),
        ("x.json", f'[{{"a": {"9" * 5000}}}]', "line 1, row 1: a number has too many digits"),
        ("x.jsonl", '{"a": 1} {"a": 2}\n', "line 1: not valid JSON"),
        ("x.json", '[{"a": 1} {"a": 2}]', "line 1: not valid JSON"),
        ("x.json", '[{"a": 1},]', "line 1: not valid JSON"),
        ("x.json", '[{"a": 1}] 2', "line 1: not valid JSON"),
        ("x.json", "", "line 1: not valid JSON"),
        ("x.parquet", b"PAR1", "not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ScaloraError) as error:
        read_table(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", ["", "text,label\n", "\ufeff"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_no_rows(tmp_path, content, ending):
    path = write(tmp_path / f"x{ending}", content)
    with pytest.raises(ScaloraError, match="holds no rows"):
        load_splits(DataSpec(train=str(path), test_size=1), ("text",))


def test_parquet_that_hides_columns_or_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    starts = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    text = pyarrow.StringArray.from_buffers(2, starts, pyarrow.py_buffer(b"a\xff"))
    pyarrow.parquet.write_table(pyarrow.table([text], names=["text"]), tmp_path / "x.parquet")
    with pytest.raises(ScaloraError, match=r"x\.parquet, row 2: a value cannot be read"):
        read_table(tmp_path / "x.parquet")
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "y.parquet")
    with pytest.raises(ScaloraError, match=r"y\.parquet: columns need distinct names"):
        read_table(tmp_path / "y.parquet")
    (tmp_path / "lang=en").mkdir()
    pandas.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "lang=en" / "z.parquet")
    assert read_table(tmp_path / "lang=en" / "z.parquet").rows == [{"text": "a"}]


@pytest.mark.parametrize("name", ["x.csv.gz", "x.jsonl.zst", "x.zip"])
def test_packed_files(tmp_path, name):
    for here in (False, True):
        if here:
            write(tmp_path / name, b"")
        with pytest.raises(ScaloraError, match=r"is no data file; give one that ends in .*; unpack it"):
            load_splits(DataSpec(train=name, test_size=1, folder=str(tmp_path)), ("text",))


def test_a_folder_with_the_ending_of_a_table(tmp_path):
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(ScaloraError, match="there is no file"):
        load_splits(DataSpec(train="x.csv", test_size=1, folder=str(tmp_path)), ("text",))
