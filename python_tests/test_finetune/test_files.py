"""Files of one's own: what is read, and what is refused with file, line and remedy."""

import gzip
import re
import warnings

import pytest

from uegr_kernels.finetune import tables
from uegr_kernels.finetune.data import UserError
from uegr_kernels.finetune.tables import Columns, Files

TWO = "label\ttext\npos\tgood\nneg\tbad\n"


def read(tmp_path, name, content, **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(each.label, each.texts, each.line) for each in tables.read(path, Columns(**columns))]


ACCEPTED = {
    "tsv": ("a.tsv", TWO, {}, [("pos", ("good",), 2), ("neg", ("bad",), 3)]),
    "gzip": (
        "a.tsv.gz",
        gzip.compress(TWO.encode()),
        {},
        [("pos", ("good",), 2), ("neg", ("bad",), 3)],
    ),
    "no line end at the end": (
        "a.tsv",
        TWO[:-1],
        {},
        [("pos", ("good",), 2), ("neg", ("bad",), 3)],
    ),
    "byte order mark": ("a.csv", "\ufefflabel,text\npos,good\n", {}, [("pos", ("good",), 2)]),
    "CRLF": ("a.tsv", "label\ttext\r\npos\tgood\r\n", {}, [("pos", ("good",), 2)]),
    "columns in any order": ("a.csv", "id,text,label\n1,good,pos\n", {}, [("pos", ("good",), 2)]),
    "quotes in TSV are letters": (
        "a.tsv",
        'label\ttext\npos\t"go"od"\n',
        {},
        [("pos", ('"go"od"',), 2)],
    ),
    "quotes in CSV": (
        "a.csv",
        'label,text\r\npos,"a, ""b""\r\nc"\r\nneg,d\r\n',
        {},
        [("pos", ('a, "b"\r\nc',), 2), ("neg", ("d",), 4)],
    ),
    "numbers in JSON": (
        "a.jsonl",
        '{"text": "good", "label": 1}\n{"label": 0.5, "text": "bad", "more": [1]}\n',
        {},
        [("1", ("good",), 1), ("0.5", ("bad",), 2)],
    ),
    "a pair of columns": (
        "a.csv",
        "x,y,label\nup,down,0\n",
        {"text": ("x", "y")},
        [("0", ("up", "down"), 2)],
    ),
    "a pair in one column": (
        "a.tsv",
        "label\ttext\n0\tup ||| down\n",
        {"separator": "|||"},
        [("0", ("up", "down"), 2)],
    ),
    "empty fields in CSV": (
        "a.csv",
        'id,text,label,more\n,go,0,\n"",up,1,""',
        {},
        [("0", ("go",), 2), ("1", ("up",), 3)],
    ),
    "numbers as people write them": (
        "a.tsv",
        "label\ttext\n-1.5e-3\ta\n+.5\tb\n2.\tc\n",
        {"regression": True},
        [("-1.5e-3", ("a",), 2), ("+.5", ("b",), 3), ("2.", ("c",), 4)],
    ),
    "no labels": ("a.tsv", "text\nup\n", {"label": None}, [("", ("up",), 2)]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_reads(tmp_path, case):
    name, content, columns, expected = ACCEPTED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, name, content, **columns) == expected


REFUSED = {
    "a comma that is not quoted": (
        "a.csv",
        "label,text\npos,good, fine\n",
        {},
        'line 2: the line has 3 columns.*; a text with a comma in it stands in quotes, "so, then"',
    ),
    "an array": ("a.jsonl", '[{"text": "a"}]', {}, "line 1: a list, no object; .*: jq -c"),
    "empty file": ("a.tsv", "", {}, "line 1: the file is empty"),
    "blank file": ("a.tsv", "\n \n", {}, "line 1: the file is empty"),
    "header alone": ("a.tsv", "label\ttext\n", {}, "line 2: the file ends without an example"),
    "empty text": ("a.tsv", "label\ttext\npos\t \n", {}, "line 2: the text is empty"),
    "empty label": ("a.tsv", "label\ttext\n\tgood\n", {}, "line 2: the label is empty"),
    "lone CR": ("a.tsv", "label\ttext\npos\tgo\rod\n", {}, "line 2: a carriage return alone"),
    "NUL": ("a.tsv", "label\ttext\npos\tgo\0od\n", {}, "line 2: a NUL character"),
    "not UTF-8": ("a.tsv", b"label\ttext\npos\t\xe9t\xe9\n", {}, "line 2: not UTF-8"),
    "missing column": (
        "a.csv",
        "lab,text\npos,x\n",
        {},
        "line 1: no column is called 'label'.*--label-column",
    ),
    "missing text column": (
        "a.csv",
        "label,t\npos,x\n",
        {},
        "no column is called 'text'.*--text-column",
    ),
    "duplicate column": (
        "a.csv",
        "label,text,text\npos,x,y\n",
        {},
        "line 1: two columns are called 'text'",
    ),
    "a row too long": (
        "a.tsv",
        "label\ttext\npos\tgood\tbad\n",
        {},
        "line 2: the line has 3 columns",
    ),
    "a row too short": ("a.csv", "label,text\npos\n", {}, "line 2: the line has 1 column,"),
    "a line between": ("a.tsv", "label\ttext\n\npos\tgood\n", {}, "line 2: the line is empty"),
    "open quote": (
        "a.csv",
        'label,text\nneg,bad\npos,"go\n',
        {},
        "line 3: a quote that is never closed; quote a field whole",
    ),
    "a quote in a field without": (
        "a.csv",
        'label,text\nneg,"d\ne"\npos,a "b" c\n',
        {},
        "line 4: a quote inside a field without quotes; quote a field whole",
    ),
    "a space before a quote": (
        "a.csv",
        'label,text\n"pos", "good"\n',
        {},
        "line 2: a space before a quote; quote a field whole",
    ),
    "text after a quote": (
        "a.csv",
        'label,text\npos,"go"od\n',
        {},
        "line 2: text after a closing quote; quote a field whole",
    ),
    "empty cells at the end of a TSV": (
        "a.tsv",
        "text\tlabel\ngood\tpos\n\t\n",
        {},
        "line 3: the text is empty",
    ),
    "an empty last cell": ("a.tsv", "text\tlabel\ngood\t", {}, "line 2: the label is empty"),
    "text without width": (
        "a.tsv",
        "label\ttext\npos\t\u200b\ufeff\n",
        {},
        "line 2: the text is em",
    ),
    "label without width": ("a.tsv", "label\ttext\n\u200b\tgood\n", {}, "line 2: the label is em"),
    "semicolons": (
        "a.csv",
        'label;text\npos;"good, fine"\n',
        {},
        "line 1: the columns are parted by semicolons, and those of .csv by commas; save",
    ),
    "commas in TSV": (
        "a.tsv",
        "label,text\npos,good\n",
        {},
        "by commas, and those of .tsv by tabs; save the file so, or let its name end in .csv",
    ),
    "tabs in CSV": ("a.csv", "label\ttext\npos\tgood\n", {}, "or let its name end in .tsv"),
    "another case": (
        "a.tsv",
        "Label\ttext\npos\tgood\n",
        {},
        r"no column is called 'label' \('Label' is another: case counts\)",
    ),
    "another case in JSON": ("a.jsonl", '{"Text": "x", "label": 1}\n', {}, "no 'text' .'Text' is"),
    "many columns": (
        "a.tsv",
        "\t".join(map(str, range(50))) + "\n",
        {},
        r"the first line names '0', .*'7', ... \(50 in all\)\. Name",
    ),
    "a text for a header": (
        "a.tsv",
        f"pos\t{'good ' * 100}\n",
        {},
        r"names 'pos', '(good ){11}go\.\.\.'\. Name the right one",
    ),
    "UTF-16": ("a.tsv", TWO.encode("utf-16"), {}, "line 1: the file is UTF-16.*iconv -f utf-16"),
    "UTF-16 without a mark": ("a.tsv", TWO.encode("utf-16-le"), {}, "NUL.*UTF-16, convert it to"),
    "gzip without its ending": (
        "a.tsv",
        gzip.compress(TWO.encode()),
        {},
        "the file is gzip, no UTF-8 text; let its name end in .gz",
    ),
    "gzip in gzip": (
        "a.tsv.gz",
        gzip.compress(gzip.compress(TWO.encode())),
        {},
        "the file is gzip once more inside",
    ),
    "a workbook": ("a.csv", b"PK\x03\x04\x14", {}, "zip archive or a workbook.*save the sheet as"),
    "Python's underscore": (
        "a.tsv",
        "label\ttext\n1_0\tgood\n",
        {"regression": True},
        "line 2: the label '1_0' is no number",
    ),
    "another script's digits": (
        "a.tsv",
        "label\ttext\n\uff11\tgood\n",
        {"regression": True},
        "line 2: the label '\uff11' is no number",
    ),
    "too large a number": (
        "a.tsv",
        "label\ttext\n1e999\tgood\n",
        {"regression": True},
        "line 2: the label '1e999' is not finite",
    ),
    "broken gzip": ("a.tsv.gz", gzip.compress(TWO.encode())[:-4], {}, "not a whole gzip file"),
    "no gzip": ("a.tsv.gz", TWO, {}, "not a whole gzip file"),
    "another ending": ("a.txt", TWO, {}, "the name ends in none of .tsv, .csv, .jsonl"),
    "a byte order mark alone": ("a.tsv", b"\xef\xbb\xbf", {}, "line 1: the file is empty"),
    "spaces alone": ("a.csv", "\u00a0\n", {}, "line 1: the file is empty"),
    "NUL in JSON": (
        "a.jsonl",
        '{"text": "a\\u0000b", "label": 1}\n',
        {},
        "line 1: a NUL character",
    ),
    "half a character": ("a.jsonl", '{"text": "\\ud83d", "label": 1}\n', {}, "line 1: half a char"),
    "half a character in a label": (
        "a.jsonl",
        '{"text": "a", "label": "\\ud83d"}\n',
        {},
        "line 1: half a char",
    ),
    "NaN for a label": (
        "a.jsonl",
        '{"text": "x", "label": NaN}\n',
        {},
        "label 'nan' is not finite",
    ),
    "null": ("a.jsonl", '{"text": "x", "label": null}\n', {}, "line 1: the label is null"),
    "nested label": (
        "a.jsonl",
        '{"text": "x", "label": {"a": 1}}\n',
        {},
        "line 1: the label is an object",
    ),
    "nested text": ("a.jsonl", '{"text": ["x"], "label": 1}\n', {}, "line 1: the text is a list"),
    "a number for a text": (
        "a.jsonl",
        '{"text": 5, "label": 1}\n',
        {},
        "line 1: the text is a number",
    ),
    "no object": ("a.jsonl", "[1]\n", {}, "line 1: a list, no object"),
    "no JSON": ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', {}, "line 2: not JSON"),
    "a name twice": (
        "a.jsonl",
        '{"text": "x", "text": "y", "label": 1}\n',
        {},
        "'text' stands twice",
    ),
    "a name missing": ("a.jsonl", '{"text": "x"}\n', {}, "line 1: no 'label'.*--label-column"),
    "no number": (
        "a.tsv",
        "label\ttext\nhigh\tgood\n",
        {"regression": True},
        "line 2: the label 'high' is no number",
    ),
    "infinite": (
        "a.tsv",
        "label\ttext\n1\tbad\ninf\tgood\n",
        {"regression": True},
        "line 3: the label 'inf' is not finite",
    ),
    "NaN in JSON": (
        "a.jsonl",
        '{"text": "x", "label": NaN}\n',
        {"regression": True},
        "line 1: the label 'nan' is not finite",
    ),
    "no separator": (
        "a.tsv",
        "label\ttext\n0\tup down\n",
        {"separator": "|||"},
        "line 2: '|||' stands 0 times",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path, case):
    name, content, columns, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, name, content, **columns)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.tsv cannot be read: No such file"):
        tables.read(tmp_path / "none.tsv", Columns())
    with pytest.raises(UserError, match=r"a.b.tsv cannot be read: embedded null"):
        tables.read("a\0b.tsv", Columns())


def test_long_texts_are_cut_with_one_warning(tmp_path):
    # 10 MB
    long = "word " * 2_000_000
    content = f"label\ttext\npos\tgood\nneg\t{long}\npos\t{long}\n"
    with pytest.warns(UserWarning, match=r"line 3: a text of more than 100,000.*1 more") as seen:
        found = read(tmp_path, "a.tsv", content)
    assert len(seen) == 1
    assert [len(texts[0]) for _, texts, _ in found] == [4, 100_000, 100_000]


@pytest.fixture
def write(tmp_path):
    def put(name, rows):
        path = tmp_path / name
        path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows))
        return str(path)

    return put


MANY = [("pos" if i % 3 else "neg", f"text {i // 2}") for i in range(60)]


def test_holds_out_texts_of_every_label(write):
    data = tables.load(Files(write("a.tsv", MANY)), Columns())
    parts = [{each.texts for each in part} for part in (data.train, data.validation, data.test)]
    assert sum(map(len, (data.train, data.validation, data.test))) == 60
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert all({each.label for each in part} == {"neg", "pos"} for part in data[:3])
    again = tables.load(Files(write("b.tsv", MANY[::-1])), Columns())
    assert {each.texts for each in again.test} == parts[2], "who is held out is the texts' own"


def test_reads_every_file_of_a_task(write):
    a, b, c = write("a.tsv", MANY), write("b.tsv", MANY[:4]), write("c.tsv", MANY[4:8])
    strange = write("d.tsv", [("other", "thing")])
    data = tables.load(Files(a, b, c, {"d": b}, {"o": strange}), Columns())
    assert [len(each) for each in data[:3]] == [60, 4, 4]
    assert (len(data.shifted["d"]), len(data.ood["o"]), data.labels) == (4, 1, ["neg", "pos"])
    assert [len(each) for each in tables.load(Files(a, b, c), Columns(), 10)[:3]] == [10, 4, 4]


def test_numeric_labels_stand_in_their_order(write):
    data = tables.load(
        Files(write("a.tsv", [(str(i % 11), f"t {i}") for i in range(99)])), Columns()
    )
    assert data.labels == [str(i) for i in range(11)]


@pytest.mark.parametrize("option", ["validation", "test", "shifted"])
def test_a_label_unseen_in_training(write, option):
    other = write("b.tsv", [("pos", "good"), ("new", "odd")])
    files = Files(write("a.tsv", MANY))
    files = files._replace(**{option: {"b": other} if option == "shifted" else other})
    message = re.escape(f"{other}, line 3: the label 'new' does not occur in")
    with pytest.raises(UserError, match=message):
        tables.load(files, Columns())


def test_one_class(write):
    with pytest.raises(UserError, match=r"line 4: every label up to this last line is 'pos'"):
        tables.load(Files(write("a.tsv", [("pos", f"t {i}") for i in range(3)])), Columns())


@pytest.mark.parametrize("part", ["train", "validation", "test", "shifted"])
def test_a_regression_on_one_number(write, part):
    files = Files(write("a.tsv", [(str(i % 7), f"t {i}") for i in range(60)]))
    same = write("b.tsv", [(("1", "1.0")[i % 2], f"t {i}") for i in range(8)])
    files = files._replace(**{part: {"b": same} if part == "shifted" else same})
    with pytest.raises(UserError, match=r"b.tsv, line 9: every label .* is 1; a regression needs"):
        tables.load(files, Columns(regression=True))


def test_a_regression_left_with_one_number(write):
    rows = [("1", f"t {i}") for i in range(30)] + [("2", "the only one")]
    with pytest.raises(UserError, match=r"the examples left to train on, line \d+: every label"):
        tables.load(Files(write("a.tsv", rows)), Columns(regression=True))


def test_many_labels_are_cut_in_a_message(write):
    many = write("a.tsv", [(f"c{i % 40}", f"t {i}") for i in range(200)])
    with pytest.raises(UserError, match=r"labels are 'c0', .*, \.\.\. \(40 in all\); mend it"):
        tables.load(Files(many, test=write("b.tsv", [("x", "up")])), Columns())


def test_too_few_to_hold_out(write):
    with pytest.raises(UserError, match=r"too few to hold out some for --test; give more"):
        tables.load(Files(write("a.tsv", MANY[:2])), Columns())
    equal = [(label, "up") for label, _ in MANY[:20]]
    with pytest.raises(UserError, match=r"20 examples \(different texts: 1, labels: 2\) are too"):
        tables.load(Files(write("b.tsv", equal)), Columns())


def test_numbers_without_regression(write):
    scores = [(f"{i / 7:.2f}", text) for i, (_, text) in enumerate(MANY[:20])]
    with pytest.raises(UserError, match="labels: 20.*where labels are numbers, add --regression"):
        tables.load(Files(write("a.tsv", scores)), Columns())


@pytest.mark.parametrize(
    ("labels", "hinted"),
    [
        (("3.2", "4.75"), True),
        (("1200", "98500"), True),
        (("0", "1"), False),
        (("-1", "1.0"), False),
        (("1", "999"), False),
        (("3.2", "good"), False),
    ],
)
def test_numbers_that_are_no_classes_numbers(write, recwarn, labels, hinted):
    rows = [(labels[i % 2], text) for i, (_, text) in enumerate(MANY)]
    path = write("a.tsv", rows)
    tables.load(Files(path), Columns())
    said = f"{path}: the labels are numbers ('{labels[0]}', '{labels[1]}'), and each is learned as"
    assert [said in str(each.message) for each in recwarn] == [True] * hinted
    recwarn.clear()
    if hinted:
        tables.load(Files(path), Columns(regression=True))
        assert not recwarn


def test_texts_taken_for_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{i % 2},text {i}\n" for i in range(20)))
    said = "different texts: 2, labels: 20.*no label occurs twice: is --label-column the right one"
    with pytest.raises(UserError, match=said):
        tables.load(Files(str(path)), Columns())


def test_labels_that_differ_by_case_alone(write):
    rows = [(label.upper() if i < 10 else label, text) for i, (label, text) in enumerate(MANY)]
    with pytest.warns(UserWarning, match="labels '.*' and '.*' differ by case alone"):
        tables.load(Files(write("a.tsv", rows)), Columns())
