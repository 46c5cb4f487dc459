"""Tables and prompt files that people bring: .csv and .tsv (also .gz), .jsonl, and text with a prompt on each line.

Everything that minildm reads of this kind is read here, strictly: a comma that is not quoted, or a quote that is never
closed, is an error that names the row. Only CR and LF end a line, not U+2028, U+0085 or a form feed.
"""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter

from minildm.errors import InputError
from minildm.files import file_bytes

# Cells that say nothing (compared in lower case): what pandas, R, databases and people write for a missing value.
MISSING = frozenset(
    (
        *("", "-", "--", "---", "\N{EN DASH}", "\N{EM DASH}", "?", "??", ".", "..", "...", "[]", "{}", "()"),
        *("nan", "-nan", "none", "null", "nil", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "nat", "no data"),
        *("missing", "unknown", "undefined", "unspecified", "not specified", "unavailable", "not available"),
    )
)
HEADER = 0  # in place of a row number
TAB = "\t"
SEPARATORS = {",": "comma", TAB: "tab", ";": "semicolon"}
TABLES = (".csv", ".tsv", ".jsonl")
TEXTS = (".txt", ".text", "")  # files with a prompt on each line


def present(value):
    """A cell's text without blanks around it; None if it is one of MISSING.

    A list, of JSON or as Python and NumPy print one, becomes its items with commas: "['Edema', 'Effusion']" -> "Edema,
    Effusion". A JSON object is no text, and so None.
    """
    if isinstance(value, dict):
        return None
    if isinstance(value, list):
        return ", ".join(item for item in map(present, value) if item is not None) or None
    text = str(value).strip()
    items = list_items(text)
    return _known(text if items is None else ", ".join(items))


def _known(text):
    return None if text.lower() in MISSING else text


def list_items(text):
    """ "['consolidation', ' pneumonia', '', nan]" -> ["consolidation", "pneumonia"]; None if the text is not a list.

    Lists in lists are one list. Words without quotes are no list: "[see above]".
    """
    if text[:1] not in ("[", "(", "{") or text[-1:] not in ("]", ")", "}"):
        return None
    items, quoted, position = [], False, 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position, word = token.end(), token[1]
        if word is None:  # a bracket or a comma
            continue
        if word[0] in "'\"":
            quoted = True
            try:
                word = ast.literal_eval(word) if "\\" in word else word[1:-1]
            except (SyntaxError, ValueError):  # an unknown escape, such as "\x"
                return None
        if word.strip().lower() not in MISSING:
            items.append(" ".join(word.split()))
    return items if quoted or text[0] == "[" else None


_TOKEN = re.compile(
    r"""\s* (?: ( '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*"            # a quoted item
                | [-+]?[\d.]+(?:[eE][-+]?\d+)? | (?i:nan|none|null|na|<na>)(?!\w) )   # a number or a missing one
              | [][(){},] ) \s*""",
    re.VERBOSE | re.DOTALL,
)


# --- tables -----------------------------------------------------------------------------------------------------------
def read_table(path, columns=(), needed=(), left_out=None):
    """Yield (row number as an editor shows it, {column: text}) for each row of a .csv, .tsv or .jsonl file.

    Missing values (MISSING) are left out of the dict, and blank lines are skipped. Lists are as they are in the file,
    for `present` to spell out.

    Args:
        columns: names that the header of a .csv or .tsv must contain.
        needed: columns without which a row is of no use. The numbers of such rows go to the list ``left_out``.
    Raises: InputError naming the file and the row if it cannot be parsed.
    """
    for row_number, cells in _rows(path, columns):
        row = {name: text for name, text in cells.items() if text is not None}
        if row_number == HEADER:
            continue
        if all(name in row for name in needed):
            yield row_number, row
        elif left_out is not None:
            left_out.append(row_number)


def left_out_note(path, row_numbers, needed):
    """What to tell about the rows that `read_table` left out: a list of no or one sentence."""
    if not row_numbers:
        return []
    rows = "row" if len(row_numbers) == 1 else "rows"
    shown = ", ".join(map(str, row_numbers[:5])) + (", ..." if len(row_numbers) > 5 else "")
    return [f"{len(row_numbers):,} {rows} of {path.name} left out: without {' or '.join(needed)} ({rows} {shown})"]


def read_columns(path, *choices, advice=""):
    """[(row number, [text or None for each of ``choices``])] of a table.

    Args: choices: tuples of names, of which the first that the table has is read. advice: if it has none of them.
    """
    rows = list(_rows(path))
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    columns = []
    for choice in choices:
        if not set(choice) & set(names):
            wanted, there = " or ".join(choice), ", ".join(names) or "none"
            raise InputError(f"{path} has no column {wanted!r}; its columns are {there}{advice}")
        columns.append(next(name for name in choice if name in names))
    texts = [(number, [cells.get(name) for name in columns]) for number, cells in rows if number != HEADER]
    return [(number, [None if text is None else present(text) for text in row]) for number, row in texts]


def kind(path):
    """The lower-case suffix that tells how a file is read: ".csv" for table.CSV.gz."""
    name = path.name.lower().removesuffix(".gz")
    return name[name.rindex(".") :] if "." in name[1:] else ""


def _rows(path, columns=()):
    """Yield (row number, {column: text, or None if missing}); of a .csv or .tsv first (HEADER, {column: None})."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: not a regular file, expected a table")
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            yield from (_json_rows(path, file) if kind(path) == ".jsonl" else _csv_rows(path, file, columns))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged, cannot be unpacked ({error})") from None


def _csv_rows(path, file, columns):
    separator = TAB if kind(path) == ".tsv" else ","
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=separator, strict=True)
    header, row_number = None, 1
    try:
        for cells in reader:
            "".join(cells).encode()  # fails on bytes that were not UTF-8, here where the row number is known
            if header is None and any(cell.strip() for cell in cells):
                header = [name.strip() for name in cells]
                _check_header(path, header, columns, separator)
                yield HEADER, {name: None for name in header if name}
            elif any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    fields = f"{len(cells)} field{'s' * (len(cells) != 1)}"
                    advice = f"; quote values that hold a {SEPARATORS[separator]}" * (len(cells) > len(header))
                    raise InputError(f"{path}, row {row_number}: {fields} where the header has {len(header)}{advice}")
                yield row_number, {name: _known(cell.strip()) for name, cell in zip(header, cells) if name}
            row_number = reader.line_num + 1
    except UnicodeEncodeError:
        raise InputError(f"{path}, row {row_number}: not UTF-8 text; save the table as CSV in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, row {row_number}: not CSV ({error}); is a quote never closed?") from None
    if header is None:
        _check_header(path, [], columns, separator)


def _check_header(path, header, columns, separator):
    for other, name in SEPARATORS.items():
        if len(header) == 1 and other != separator and other in header[0]:
            advice = "save it with commas" if other == ";" else f"name it {'.tsv' if other == TAB else '.csv'}"
            raise InputError(f"{path} is separated by {name}s, expected {SEPARATORS[separator]}s; {advice}")
    if missing := [name for name in columns if name not in header]:
        raise InputError(f"{path}: no column {', '.join(missing)}; its columns: {', '.join(header) or 'none'}")
    if double := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
        raise InputError(f"{path}: two columns are named {double[0]}; rename or delete one of them")


def _json_rows(path, file):
    for row_number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip(), parse_int=str, parse_float=str)  # numbers as they are written
            if not isinstance(row, dict):
                raise ValueError(f"it holds {type(row).__name__}")
            row = {name.strip(): present(value) for name, value in row.items()}
            "".join([*row, *filter(None, row.values())]).encode()
        except (ValueError, RecursionError) as error:  # ValueError: also bytes and letters that are not UTF-8
            raise InputError(f"{path}, row {row_number}: not a JSON object in UTF-8 ({error})") from None
        yield row_number, row


# --- prompts ----------------------------------------------------------------------------------------------------------
def read_prompts(path, column=None):
    """The prompts of a file: a text file's lines, or a table's column ``column`` (default: prompt, or text).

    Raises: InputError naming the file, for one without prompts and for rows without a prompt.
    """
    if kind(path) in TABLES:
        choice = ("prompt", "text") if column is None else (column,)
        rows = read_columns(path, choice, advice="; name one with --column")
        if blank := [number for number, (prompt,) in rows if prompt is None]:
            raise InputError(
                f"{path} has no prompt in {len(blank)} of {len(rows)} rows, the first of them row {blank[0]}; fill "
                "them in or delete them"
            )
        prompts = [prompt for _, (prompt,) in rows]
    elif kind(path) not in TEXTS:
        raise InputError(f"{path} is not a kind of file that holds prompts; give a .txt, .csv, .tsv or .jsonl file")
    elif column is not None:
        raise InputError(f"{path} is a text file; --column is for .csv, .tsv and .jsonl")
    else:
        prompts = read_lines(path)
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return prompts


def read_lines(path):
    """The lines of a text file that are not blank, without blanks around them."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path)) if line.strip()]


def read_text(path):
    """The text of a file in UTF-8, with or without a byte-order mark. Raises: InputError."""
    try:
        return file_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None
