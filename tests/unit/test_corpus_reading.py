"""Files to clean text: formats, normalisation, boilerplate, and what a broken file or row becomes."""

import io
import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.core.errors import DataError
from ray_jobs.corpus.clean import join_pages, normalise
from ray_jobs.corpus.documents import read_document
from ray_jobs.corpus.files import InputFile, find_file, find_files
from ray_jobs.corpus.language import detect_language
from ray_jobs.corpus.pairs import parse_pair, read_questions, read_rows

PAGE = """<html><head><title>T</title><style>p {}</style></head><body><header>Faculty of Everything</header>
<nav><ul><li><a href="/">Home</a></li></ul></nav><main><h1>Deadlocks</h1><div role="navigation">Next page</div>
<p>Four <b>conditions</b>
must hold.</p><ul><li>Mutual exclusion</li><li>Hold &amp; wait</li></ul><h2>Code</h2><pre>if x:
    # no heading
    stop()</pre></main><footer>Imprint</footer><script>track()</script></body></html>"""


@pytest.fixture
def write(tmp_path):
    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return InputFile(str(path), name)

    return make


def make_pdf(pages):
    """A minimal PDF: one line of Helvetica for each string of each page."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", "", "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"]
    kids = []
    for lines in pages:
        text = "BT /F1 12 Tf 14 TL 50 750 Td " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
        objects.append(f"<</Length {len(text)}>>\nstream\n{text}\nendstream")
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {len(objects)} 0 R/Resources<</Font<</F1 3 0 R>>>>>>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(kids)}]>>"
    out, offsets = io.BytesIO(b""), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1"))
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{offset:010d} 00000 n \n" for offset in offsets).encode())
    out.write(f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF".encode())
    return out.getvalue()


def test_text_becomes_nfc_with_plain_spaces():
    messy = "Ca\u0308che\u00a0 miss \r\n\r\n\r\n\r\nso\u00adft\u200b\ufeff end\t \x00"
    assert normalise(messy) == "Cäche miss\n\nsoft end"
    assert unicodedata.is_normalized("NFC", normalise(messy))
    assert normalise("- a\n  - b   c\n    code  x") == "- a\n  - b c\n    code x"


def test_normalising_twice_changes_nothing():
    once = normalise(" a\r\rb\f\n\n\nc  d\n")
    assert normalise(once) == once


def test_page_furniture_goes_and_words_are_joined():
    parts = ["kernel", "memory", "disk", "network"]
    pages = [
        f"Operating Systems   Chapter {n}\nThe {p} sched-\nuler of this unit picks a pro-\ncess of the {p}.\nPage {n} of 4"
        for n, p in enumerate(parts)
    ]
    text, dropped = join_pages(pages)
    assert dropped == 8
    assert "Chapter" not in text and "Page" not in text
    assert "The disk scheduler of this unit picks a process of the disk." in text


def test_a_line_inside_a_page_stays_even_if_repeated():
    pages = [f"Head\nIntro {n} text\nThe same sentence.\nOutro {n} text\nFoot" for n in "abcd"]
    text, dropped = join_pages(pages)
    assert dropped == 8 and text.count("The same sentence.") == 4


def test_html_keeps_the_main_part_only(write):
    document = read_document(write("page.html", PAGE))
    assert document.text.startswith("# Deadlocks\n\nFour conditions must hold.\n\n- Mutual exclusion\n\n- Hold & wait\n\n## Code")
    assert "    # no heading" in document.text
    for word in ("Faculty", "Home", "Next page", "Imprint", "track"):
        assert word not in document.text


def test_html_loses_no_text(write):
    html = """<body><div>Bare text with <i>an inline</i> word.<p>A paragraph.</p>and a tail</div>
    <ul><li>Outer<ul><li>inner</li></ul></li></ul><table><tr><th>RAID</th><th>Disks</th></tr><tr><td>5</td><td>3</td></tr></table>
    <p>one<br>two</p><!-- a comment --></body>"""
    expected = ["Bare text with an inline word.", "A paragraph.", "and a tail", "- Outer", "- inner", "RAID | Disks", "5 | 3", "one two"]
    assert read_document(write("page.html", html)).text.split("\n\n") == expected


def test_front_matter_and_comments_go(write):
    document = read_document(write("a.md", "---\ntitle: T\nlayout: page\n---\n# T\n\nBody. <!-- todo:\nmore --> End.\n"))
    assert document.text == "# T\n\nBody. End." and document.num_boilerplate == 2


def test_pdf_text_without_its_headers(write):
    pages = [["Course notes", f"The {part} is kept in a ta-", f"ble of the {part} driver.", str(n)] for n, part in enumerate("abcde")]
    document = read_document(write("notes.pdf", make_pdf(pages)))
    assert "The b is kept in a table of the b driver." in document.text
    assert "Course notes" not in document.text and document.num_boilerplate == 10


def test_underlined_headings_become_markdown(write):
    assert (
        read_document(write("a.txt", "Title\n=====\n\nBody text.\n\nPart\n----\n\nMore.")).text
        == "# Title\n\nBody text.\n\n## Part\n\nMore."
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pdf", b"%PDF-1.4 broken", "not a readable PDF"),
        ("a.pdf", make_pdf([[""]]), "scan"),
        ("a.md", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"  \n\t", "no text"),
        ("a.html", b"<html></html>", "no text"),
    ],
)
def test_a_broken_document_says_why(write, name, content, words):
    with pytest.raises(DataError, match=words):
        read_document(write(name, content))


def test_files_of_folders_and_globs_in_order(write, tmp_path):
    for name in ("b.md", "a.md", "deep/er/c.txt", "picture.png", ".hidden/x.md"):
        write(name, "text")

    def names(*patterns):
        return [file.name.removeprefix(f"{tmp_path}/") for file in find_files(list(patterns), suffixes={".md", ".txt"}, what="d")[0]]

    assert names(str(tmp_path)) == ["a.md", "b.md", "deep/er/c.txt"]
    assert names(f"{tmp_path}/*.md") == ["a.md", "b.md"]
    assert names(f"{tmp_path}/**/*.txt", f"{tmp_path}/b.md") == ["deep/er/c.txt", "b.md"]
    assert names(f"{tmp_path}/a.md", str(tmp_path)) == ["a.md", "b.md", "deep/er/c.txt"]
    assert names(f"file://{tmp_path}/?.md") == [f"file://{tmp_path}/a.md", f"file://{tmp_path}/b.md"]
    assert find_files([str(tmp_path)], suffixes={".md"}, what="d")[1] == [f"{tmp_path}/deep/er/c.txt", f"{tmp_path}/picture.png"]


def test_patterns_that_name_nothing_are_refused(write, tmp_path):
    write("a.png", b"")
    for pattern in (f"{tmp_path}/none.md", f"{tmp_path}/*.md", f"{tmp_path}/none/**"):
        with pytest.raises(DataError, match="no such file"):
            find_files([pattern], suffixes={".md"}, what="[data] documents")
    with pytest.raises(DataError, match=r"suffix '.png' cannot be read; allowed are .md"):
        find_files([f"{tmp_path}/a.png"], suffixes={".md"}, what="[data] documents")
    with pytest.raises(DataError, match="give one file"):
        find_file(str(tmp_path), suffixes={".png"}, what="[data] questions")


def test_the_hash_is_that_of_the_content(write):
    assert write("a.md", "abc").sha256() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_rows_of_all_formats_are_the_same(write):
    rows = [{"question": f"Was ist {n}, und „warum“?", "answer": f'Zeile eins\nund "zwei" {n}'} for n in range(3)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    as_csv = "question,answer\r\n" + "".join('"{question}","{}"\r\n'.format(r["answer"].replace('"', '""'), **r) for r in rows)
    as_jsonl = "\n\n".join(json.dumps(row) for row in rows)
    files = [write("p.parquet", buffer.getvalue()), write("p.csv", "\ufeff" + as_csv), write("p.jsonl", "\ufeff" + as_jsonl)]
    read = [[parse_pair(row).model_dump(exclude={"source"}) for row in read_rows(file)] for file in files]
    assert read[0] == read[1] == read[2]
    assert read[0][1]["question"] == "Was ist 1, und „warum“?" and read[0][1]["language"] == "de"


def test_broken_rows_are_told_apart_from_good_ones(write):
    lines = [
        '{"question": "Q?", "answer": "A."}',
        "{torn",
        "[1]",
        '{"question": "Q?"}',
        '{"question": "Q?", "answer": ""}',
        '{"question": 5}',
    ]
    file = write("p.jsonl", ("\n".join(lines)).encode() + b'\n{"question": "\xff"}')
    outcome = []
    for row in read_rows(file):
        try:
            outcome.append(parse_pair(row).answer)
        except DataError as error:
            outcome.append(str(error))
    assert outcome[0] == "A." and len(outcome) == 7
    for number, words in enumerate(
        ["not JSON", "a JSON list", "`answer` is missing", "`answer` is ''", "`question` is 5", "not JSON"], start=2
    ):
        assert f"p.jsonl line {number}: " in outcome[number - 1] and words in outcome[number - 1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "Q \\ud83d?", "answer": "A."}', "not Unicode text"),
        ('{"question": "Q?", "answer": "A.", "note": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
    ids=["half a character", "nested"],
)
def test_a_row_that_json_allows_and_text_does_not_is_one_broken_row(write, line, words):
    rows = list(read_rows(write("p.jsonl", line + '\n{"question": "Q?", "answer": "\\ud83d\\ude00"}')))
    assert words in rows[0].error and rows[0].values is None
    assert parse_pair(rows[1]).answer == "\U0001f600"
    with pytest.raises(DataError, match=f"line 1: .*{words}"):
        read_questions(write("q.jsonl", line))


def test_csv_goes_on_after_a_broken_line(write):
    rows = list(read_rows(write("p.csv", 'question,answer\nQ1?,"A"x\nQ2?,A.\n')))
    assert [bool(row.error) for row in rows] == [True, False] and rows[1].values == {"question": "Q2?", "answer": "A."}


def test_csv_with_too_many_fields_and_a_broken_parquet(write):
    bad = [row.error for row in read_rows(write("p.csv", "question,answer\nQ?,A.,extra\nQ?,A.\n"))]
    assert bad == ["1 fields more than the header has", ""]
    with pytest.raises(DataError, match="not a readable Parquet"):
        list(read_rows(write("p.parquet", b"PAR1 nonsense")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "Q?", "reference": "R."}\n{"question": " Q? ", "reference": "S."}', "stands twice"),
        (
            '{"question_id": "1", "question": "Q?", "reference": "R."}\n{"question_id": 1, "question": "P?", "reference": "S."}',
            "'1' stands twice",
        ),
        ('{"question": "Q?"}', "line 1: `reference` is missing"),
        ('{"question": "Q?", "reference": "  "}', "`reference` is '  '"),
        ("{torn", "line 1: not JSON"),
        ("", "no row in it"),
    ],
)
def test_questions_must_be_whole(write, text, words):
    with pytest.raises(DataError, match=words):
        read_questions(write("q.jsonl", text))


def test_ids_are_given_or_made_from_the_question(write):
    given, made = read_questions(
        write("q.jsonl", '{"question_id": "x7", "question": "Q?", "reference": "R."}\n{"question": "P?", "reference": "S.", "note": 1}')
    )
    assert given.question_id == "x7" and len(made.question_id) == 16


def test_languages_by_stop_words():
    assert detect_language("Der Kernel ist ein Programm und läuft auf der CPU.") == "de"
    assert detect_language("The kernel is a program that runs on the CPU.") == "en"
    assert detect_language("x = 5") == "en"
