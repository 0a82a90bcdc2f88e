"""files.py: lists that other programs wrote are read, or refused by name and line."""

import codecs
import csv
import gzip
import os
from functools import partial
from pathlib import Path

import pytest

from runtime import files

LINES = ('{"text": "größer"}', '{"text": "zwei"}')
TABLE = ("path\ttext", "a.mp3\tgrößer", "b.mp3\tzwei")


def refused(action, *parts: object) -> None:
    """`action` raises ValueError, and the message holds every part."""
    with pytest.raises(ValueError) as error:
        action()
    for part in parts:
        assert str(part) in str(error.value), f"{part!s} is not in: {error.value}"


def rows_of(file: Path, columns=("path", "text"), bad=None, **dialect) -> list[dict[str, str]]:
    return [row for _, row in files.table(file, columns, bad, **(dialect or files.TSV))]


def put(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# ---------------------------------------------------------------------------------- text and lines

ENCODED = {
    "utf-8": lambda text: text.encode(),
    "with a mark": lambda text: text.encode("utf-8-sig"),
    "little-endian": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "big-endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", [*ENCODED])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_lists_are_read_in_every_encoding_with_a_mark_and_with_all_ends(
    tmp_path, kind, end, ending
):
    """Also without an end behind the last line, with blank lines, and compressed."""
    for name, lines in (("a.jsonl", LINES), ("a.tsv", TABLE)):
        for last in ("", end, end + end):
            content = ENCODED[kind](end.join(lines) + last)
            file = put(tmp_path / f"{name}{ending}", gzip.compress(content) if ending else content)
            if name == "a.jsonl":
                rows = [row["text"] for _, row in files.json_lines(file)]
            else:
                rows = [row["text"] for row in rows_of(file)]
            assert rows == ["größer", "zwei"]
            assert files.read_text(file) == "\n".join(lines) + last.replace(end, "\n")


def test_lines_that_were_put_together_of_two_files_are_read(tmp_path):
    """A mark of byte order then stands in the middle."""
    file = put(tmp_path / "a.jsonl", "".join(f"\ufeff{line}\n" for line in LINES))
    assert [where for where, _ in files.json_lines(file)] == [f"{file}:1", f"{file}:2"]


@pytest.mark.parametrize("damage", [b"\xe4", b"\0"], ids=["latin-1", "NUL"])
def test_what_is_no_text_is_refused_with_its_line(tmp_path, damage):
    lines = put(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": "' + damage + b'"}\n')
    say = f"{lines}:3: no text in UTF-8; expected a text file"
    refused(lambda: [*files.json_lines(lines)], say)
    table = put(tmp_path / "a.tsv", b"path\ttext\tmore\na\tb\tc\nd\te\t" + damage + b"\n")
    say = f"{table}:3: no text in UTF-8; expected a table with path, text"
    refused(partial(rows_of, table), say)


def test_an_encoding_without_a_mark_or_cut_in_a_letter_is_refused(tmp_path):
    wide = "\n".join(LINES).encode("utf-16-le")
    file = put(tmp_path / "a.jsonl", wide)
    refused(lambda: [*files.json_lines(file)], f"{file}:1: no text in UTF-8")
    put(file, codecs.BOM_UTF16_LE + wide[:-1])
    refused(lambda: [*files.json_lines(file)], f"{file}: no text in UTF-8")


@pytest.mark.parametrize(
    "line", ["[]", '[["a", 1]]', '""', "null", "3", pytest.param("[" * 100_000, id="deep"), "{"]
)
def test_a_line_that_is_no_object_is_refused(tmp_path, line):
    """Nor is a list of pairs, of which Python would make one."""
    file = put(tmp_path / "a.jsonl", "{}\n" + line + "\n")
    refused(lambda: [*files.json_lines(file)], f"{file}:2: no JSON object (", "one on each line")


def test_json_holds_nothing_that_cannot_be_written(tmp_path):
    """Halves of letters and NUL, in keys and values, at any depth; pairs are whole letters."""
    text = r'{"a\ud800": ["x\udc00y", {"b": "\ud83d\ude00 \u0000."}], "c": "\\ud800", "d": null}'
    expected = {"a\ufffd": ["x\ufffdy", {"b": "😀  ."}], "c": "\\ud800", "d": None}
    for file in (put(tmp_path / "a.jsonl", text), put(tmp_path / "a.json", text)):
        assert files.read_json(file) == expected
        [(_, row)] = files.json_lines(file)
        assert row == expected and str(row).encode()


def test_a_json_file_with_a_mark_is_read_and_too_deep_a_one_refused(tmp_path):
    file = tmp_path / "tasks.json"
    for write in ENCODED.values():
        assert files.read_json(put(file, write('{"a": "ü"}'))) == {"a": "ü"}
    refused(partial(files.read_json, put(file, "[" * 100_000)), f"{file}: not valid JSON (")


# ---------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ('"""Good day,"" said the dog."', '"Good day," said the dog.'),
        ('"He said ""hi"""', 'He said "hi"'),
        (' "a ""b"" " ', 'a "b"'),
        ('""', ""),
        ('""""', '"'),
        ('5" pipe', '5" pipe'),
        ('"Hello."', '"Hello."'),
        ('"Wait, he said.', '"Wait, he said.'),
        ('"Yes," and "no"', '"Yes," and "no"'),
        ('""Hello""', '""Hello""'),
        ('say ""hi""', 'say ""hi""'),
        ('"', '"'),
        ('"""', '"""'),
    ],
)
def test_of_quotes_only_those_of_csv_are_taken_off(tmp_path, field, text):
    """They show in that quotes inside are doubled; bare ones, and an inch mark, are letters."""
    file = put(tmp_path / "a.tsv", f"path\ttext\na.mp3\t{field}\nb.mp3\tnext\n")
    assert [row["text"] for row in rows_of(file)] == [text, "next"]


def test_blanks_at_the_ends_of_names_and_fields_are_not_meant(tmp_path):
    file = put(tmp_path / "a.tsv", " path \ttext  \t\n a.mp3\t two words \t\n")
    assert rows_of(file) == [{"path": "a.mp3", "text": "two words", "": ""}]


def test_rows_with_a_tab_or_a_line_break_inside_a_text_are_not_believed(tmp_path):
    """Neither half of a broken row is one, though the second has fields enough for our columns."""
    rows = ["id\tpath\ttext\tup\tdown\tage\tsex\taccent", "1\ta\tone\t2\t0\t\tmale\tus"]
    rows += ["2\tb\ta\ttab\t2\t0\t\tmale\tus", "3\tc\ta line", "break\t2\t0\t\tmale\tus"]
    rows += ["4\td\tfour\t2\t0", "5\te\tfive\t2\t0\t\tmale\tus"]
    file, bad = put(tmp_path / "a.tsv", "\n".join(rows)), []
    # the editor that took the empty fields from the end of row 4 may have taken them of all
    found = [row["text"] for row in rows_of(file, bad=bad)]
    assert found == ["one", "five"] and [where for where, _ in bad] == [
        f"{file}:{line}" for line in (3, 4, 5, 6)
    ]
    refused(partial(rows_of, file), f"{file}:3: not of 8 fields; expected a table with path, text")


def test_empty_fields_may_be_lacking_at_the_end(tmp_path):
    """Editors remove blanks there. But where our last column ends the row, something cut it."""
    file, bad = put(tmp_path / "a.tsv", "path\ttext\tup\tage\na\tone\t2\nb\ttwo\n"), []
    assert rows_of(file, bad=bad) == [{"path": "a", "text": "one", "up": "2"}]
    assert bad == [(f"{file}:3", "not of 4 fields")]


def test_a_table_of_csv_holds_breaks_and_separators_in_quotes(tmp_path):
    text = 'path,text\r\na,"one, ""two""\r\nthree"\r\nb,four\r\n'
    file = put(tmp_path / "a.csv", text)
    assert rows_of(file, delimiter=",") == [
        {"path": "a", "text": 'one, "two"\nthree'},
        {"path": "b", "text": "four"},
    ]


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path):
    file = put(tmp_path / "a.csv", 'path,text\na,"one\nb,two\nc,three\n')
    refused(
        partial(rows_of, file, delimiter=","), f"{file}:4: ", "expected a table with path, text"
    )


def test_a_field_without_an_end_is_one_bad_row(tmp_path):
    long = "x" * (csv.field_size_limit() + 1)
    file, bad = put(tmp_path / "a.tsv", f"path\ttext\na\t{long}\nb\ttwo\n"), []
    assert rows_of(file, bad=bad) == [{"path": "b", "text": "two"}]
    assert [where for where, _ in bad] == [f"{file}:2"] and "field limit" in bad[0][1]
    refused(partial(rows_of, file), f"{file}:2: field larger than field limit")
    put(file, long)
    refused(partial(rows_of, file, bad=[]), f"{file}:1: field larger than field limit")


@pytest.mark.parametrize(
    ("header", "say"),
    [
        ("", "no column path or text; found nothing"),
        ("\n\n", "no column path or text; found nothing"),
        ("path,text\na,b", "no column path or text; found path,text"),
        ("path\tsentence", "no column text; found path, sentence"),
        ("path\ttext\tpath\na\tb\tc", "two columns path"),
    ],
)
def test_a_header_without_the_columns_is_refused(tmp_path, header, say):
    """Also where single rows may be bad."""
    file = put(tmp_path / "a.tsv", header)
    refused(partial(rows_of, file, bad=[]), f"{file}:1: {say}; expected a table with path, text")


def test_a_header_alone_is_a_table_without_rows(tmp_path):
    assert rows_of(put(tmp_path / "a.tsv", "path\ttext")) == []
    assert rows_of(put(tmp_path / "a.tsv", "path\tage\tage\ttext\n\n")) == []


def test_what_is_left_out_is_counted_and_the_first_three_are_named(tmp_path, caplog):
    bad = [(f"a.tsv:{n}", "without a text" if n % 2 else "of macOS") for n in range(2, 9)]
    files.warn_left_out(tmp_path, bad, ["kept"])
    [record] = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: left out 7 of 8: 4 of macOS, 3 without a text; first a.tsv:2 (of macOS), "
        "a.tsv:3 (without a text), a.tsv:4 (of macOS)"
    )
    caplog.clear()
    files.warn_left_out(tmp_path, [], ["kept"])
    assert not caplog.records


# ------------------------------------------------------------------------------- what lists name


def test_what_macos_leaves_beside_files_is_not_listed(tmp_path):
    for name in ("b/1.txt", "a/2.txt", "a/._2.txt", "__MACOSX/a/2.txt", "__MACOSX/a/._2.txt"):
        put(tmp_path / name, "x")
    assert files.listed(tmp_path, "**/*.txt") == [tmp_path / "a/2.txt", tmp_path / "b/1.txt"]


@pytest.mark.parametrize("ending", ["", ".mp3", ".wav", ".flac", ".ogg", ".opus"])
def test_a_recording_is_found_without_its_ending(tmp_path, ending):
    """As Common Voice 1 lists it; one that is called so keeps its name."""
    put(tmp_path / f"abc.0{ending}", b"x")
    assert files.resolve_audio_path(tmp_path, "abc.0") == str(tmp_path / f"abc.0{ending}")
    assert files.resolve_audio_path(tmp_path, "abc") == str(tmp_path / "abc"), "there is none"
    put(tmp_path / "plain", b"x")
    put(tmp_path / f"plain{ending}", b"x")
    assert files.resolve_audio_path(tmp_path, "plain") == str(tmp_path / "plain"), (
        "that is the file"
    )
    assert files.resolve_audio_path(tmp_path, "abc.0.mp3") == str(tmp_path / "abc.0.mp3"), (
        "it has one"
    )


def test_the_separators_of_windows_are_understood(tmp_path):
    """Where the file is so; elsewhere a backslash is a letter of a name."""
    put(tmp_path / "clips/a.wav", b"x")
    put(tmp_path / "one\\two.wav", b"x")
    assert files.resolve_audio_path(tmp_path / "lists", r"..\clips\a.wav") == str(
        tmp_path / "clips/a.wav"
    )
    assert files.resolve_audio_path(tmp_path, r"one\two.wav") == str(tmp_path / r"one\two.wav")


def test_a_path_behind_a_link_is_what_the_operating_system_takes_it_for(tmp_path):
    put(tmp_path / "real/clips/a.wav", b"right")
    put(tmp_path / "here/clips/a.wav", b"wrong")
    (tmp_path / "real/lists").mkdir()
    (tmp_path / "here/lists").symlink_to(tmp_path / "real/lists")
    found = files.resolve_audio_path(tmp_path / "here/lists", "../clips/a.wav")
    assert found == str(tmp_path / "real/clips/a.wav")
    assert Path(found).read_bytes() == Path(tmp_path / "here/lists/../clips/a.wav").read_bytes()
    assert files.resolve_audio_path(tmp_path / "real/lists", "../clips/a.wav") == found
    # what is no detour stays as it is called
    (tmp_path / "linked.wav").symlink_to(found)
    assert files.resolve_audio_path(tmp_path / "here/lists", "b.wav") == str(
        tmp_path / "here/lists/b.wav"
    )
    assert files.resolve_audio_path(tmp_path, "linked.wav") == str(tmp_path / "linked.wav")


def test_a_path_that_is_relative_stays_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "c/a.wav", b"x")
    assert files.resolve_audio_path(Path(), "./c//a.wav") == os.path.join("c", "a.wav")
    assert files.resolve_audio_path("lists", "../c/a.wav") == os.path.join("c", "a.wav")
    assert files.resolve_audio_path("lists", "/c/a.wav") == "/c/a.wav"
