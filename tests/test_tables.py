"""The reader of tables and prompt files: what ends a row, what is missing, what is a list, and what is refused."""

import csv
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minildm.errors import InputError
from minildm.tables import HEADER, MISSING, list_items, present, read_columns, read_prompts, read_table

ODD_SPACES = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # str.splitlines cuts at each of them; no editor does


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(
    rows=st.lists(
        st.lists(st.text("ab,;\t\"'\n\r " + ODD_SPACES, min_size=1), min_size=3, max_size=3).filter(
            lambda row: all(cell.strip() and cell.strip().lower() not in MISSING for cell in row)
        ),
        max_size=5,
    ),
    suffix=st.sampled_from([".csv", ".tsv", ".csv.gz", ".jsonl"]),
)
def test_every_cell_of_a_well_formed_table_comes_back(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("tables") / f"t{suffix}"
    columns = ["one", "two", "three"]
    if suffix == ".jsonl":
        text = "".join(json.dumps(dict(zip(columns, row)), ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(text.encode())
    else:
        opener = gzip.open if suffix.endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL).writerows(
                [columns, *rows]
            )
    assert [list(row.values()) for _, row in read_table(path)] == [[cell.strip() for cell in row] for row in rows]


def test_only_cr_and_lf_end_a_row(tmp_path):
    for end in ("\n", "\r\n", "\r", "\r\r\n", "\n\n"):  # also written twice, and with a blank line after each row
        table = written(tmp_path / "t.csv", end.join(["a,b", f"1,x{ODD_SPACES}y", "2,z", ""]))
        assert [row for _, row in read_table(table)] == [{"a": "1", "b": f"x{ODD_SPACES}y"}, {"a": "2", "b": "z"}]


def test_blank_lines_are_no_rows_and_rows_keep_their_numbers(tmp_path):
    table = written(tmp_path / "t.csv", "\n\na,b\n\n1,x\n,\n   ,  \n2,\n,y\n")
    left_out = []
    assert list(read_table(table, ("a",), ("a",), left_out)) == [(5, {"a": "1", "b": "x"}), (8, {"a": "2"})]
    assert left_out == [9]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("t.csv", "a,b\n1,x\n2,x, y\n", "row 3: 3 fields where the header has 2; quote values that hold a comma"),
        ("t.csv", "a,b\n1\n", "row 2: 1 field where the header has 2"),
        ("t.csv", 'a,b\n1,x\n2,"y\n3,z\n', "row 3: not CSV .* is a quote never closed"),
        ("t.csv", 'a,b\n1,"y\n' + "2,z\n" * 50_000, "row 2: not CSV .* is a quote never closed"),
        ("t.csv", "a;b\n1;2\n", "separated by semicolons, expected commas; save it with commas"),
        ("t.csv", "sep=;\na;b\n1;2\n", "separated by semicolons"),
        ("t.csv", "a\tb\n1\t2\n", "separated by tabs, expected commas; name it .tsv"),
        ("t.tsv", "a,b\n1,2\n", "separated by commas, expected tabs; name it .csv"),
        ("t.csv", "a,b,a\n1,2,3\n", "two columns are named a"),
        ("t.csv", b"a,b\n1,\xff\n", "row 2: not UTF-8"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16"), "row 1: not UTF-8"),
        ("t.csv.gz", b"a,b\n1,2\n", "cannot be unpacked"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 500, mtime=0)[:40], "cannot be unpacked"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 500, mtime=0)[:20] + b"damaged" * 9, "cannot be unpacked"),
        ("t.jsonl", '{"a": 1}\n[2]\n', "row 2: not a JSON object"),
        ("t.jsonl", '{"a": "\\ud800"}\n', "row 1: not a JSON object in UTF-8"),
        ("t.jsonl", '{"\\udfff": 1}\n', "row 1: not a JSON object in UTF-8"),
        ("t.jsonl", '{"a": ' + "[" * 100_000 + "\n", "row 1: not a JSON object"),
        ("t.jsonl", '{"a": ' + "[" * 950 + "1" + "]" * 950 + "}\n", "row 1: not a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(tmp_path, name, content, says):
    with pytest.raises(InputError, match=says) as caught:
        list(read_table(written(tmp_path / name, content)))
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["NaN", "nan", "NA", "N/A", "n/a", "null", "NULL", "None", "none", "<NA>", "#N/A", "?"]
)
def test_words_for_a_missing_value_are_missing_in_every_kind_of_table(tmp_path, text):
    assert list(read_table(written(tmp_path / "t.csv", f"a,b\n1,{text}\n"))) == [(2, {"a": "1"})]
    assert list(read_table(written(tmp_path / "t.jsonl", f'{{"a": 1, "b": "{text}"}}\n'))) == [(1, {"a": "1"})]
    assert present(f"['{text}']") is None


def test_json_values_become_text(tmp_path):
    digits = "9" * 5000
    row = '{"a": NaN, "b": null, "c": ["x", null, ["y"]], "d": {"x": 1}, "e": 47.0, "f": [], "g": ' + digits + "}\n"
    assert list(read_table(written(tmp_path / "t.jsonl", row))) == [(1, {"c": "x, y", "e": "47.0", "g": digits})]


@pytest.mark.parametrize(
    "text, items",
    [
        ("['a', ' b', '', nan]", ["a", "b"]),
        ('["a", "it\'s"]', ["a", "it's"]),
        ("['it\\'s\\n so']", ["it's so"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),  # a NumPy array
        ("[['a', 'b'], ['c']]", ["a", "b", "c"]),
        ("('a', 'b')", ["a", "b"]),
        ("{'a', 'b'}", ["a", "b"]),
        ("[1 2. -3e5]", ["1", "2.", "-3e5"]),
        ("[]", []),
        ("[None]", []),
        ("[see above]", None),
        ("(1, 2)", None),
        ("{'a': 1}", None),
        ("['a'", None),
        ("['a'] of ['b']", None),
        ("['\\x']", None),
        ("", None),
    ],
)
def test_lists_that_python_json_or_numpy_printed_are_lists_and_nothing_else_is(text, items):
    assert list_items(text) == items


def test_prompts_of_every_kind_of_file(tmp_path):
    prompts = ["chest x-ray, PA", "a\u2028b\x85c\x0cd"]
    assert read_prompts(written(tmp_path / "p.txt", f"\ufeff{prompts[0]}\r\n\n {prompts[1]} \r")) == prompts
    assert read_prompts(written(tmp_path / "p", "\n".join(prompts))) == prompts
    assert read_prompts(written(tmp_path / "p.CSV", f'id,text\n1,"{prompts[0]}"\n\n2,{prompts[1]}\n')) == prompts
    assert read_prompts(written(tmp_path / "p.tsv", f"text\tprompt\nx\t{prompts[0]}\ny\t{prompts[1]}\n")) == prompts
    lines = "".join(json.dumps({"words": prompt}) + "\n" for prompt in prompts)
    assert read_prompts(written(tmp_path / "p.jsonl", lines), column="words") == prompts


@pytest.mark.parametrize(
    "name, content, column, says",
    [
        ("p.csv", "prompt\nchest x-ray, age 58 male\n", None, "row 2: 2 fields"),
        ("p.csv", "prompt\nnone\nchest\n", None, "no prompt in 1 of 2 rows, the first of them row 2"),
        ("p.csv", "id,caption\n1,x\n", None, "no column 'prompt or text'; its columns are id, caption; .*--column"),
        ("p.csv", "id,prompt\n", None, "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": NaN}\n', None, "no prompt in 1 of 2 rows, the first of them row 2"),
        ("p.jsonl", "chest x-ray\n", None, "row 1: not a JSON object"),
        ("p.json", '["a"]', None, "not a kind of file that holds prompts; give a .txt, .csv, .tsv or .jsonl"),
        ("p.xlsx", b"PK\x03\x04", None, "not a kind of file that holds prompts"),
        ("p.txt", "a\n", "words", "--column is for .csv"),
        ("p.txt", b"\xff\xfea\x00", None, "not UTF-8"),
        ("p.txt", " \n", None, "holds no prompt"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused(tmp_path, name, content, column, says):
    with pytest.raises(InputError, match=says):
        read_prompts(written(tmp_path / name, content), column)


def test_columns_are_read_by_their_first_known_name(tmp_path):
    table = written(tmp_path / "t.csv", "text,file_name,prompt\nx,1.png,a\ny,NA,['b']\n")
    assert read_columns(table, ("file", "file_name"), ("prompt", "text")) == [(2, ["1.png", "a"]), (3, [None, "b"])]
    assert HEADER < 1  # no row has its number
