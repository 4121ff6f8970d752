"""Files to items: every kind, every encoding, and bad records that stay their own problem."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from killed import session

from dspark_cli.backends.errors import BadInput
from dspark_cli.batch import inputs as inputs_module
from dspark_cli.batch.earlier import scan
from dspark_cli.batch.inputs import ReadOptions, find_files, read_items
from dspark_cli.batch.items import Item, PromptOptions, request_of
from dspark_cli.batch.template import PromptTemplate
from dspark_cli.engine.rounds import Request, SamplingOptions


def read(path: Path, **options: Any) -> list[Item]:
    return list(read_items([path], ReadOptions(**options)))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def errors(items: list[Item]) -> dict[int, str]:
    return {item.line: item.error for item in items if item.error is not None}


def test_txt_is_a_prompt_a_line(tmp_path: Path) -> None:
    items = read(write(tmp_path / "a.txt", "one\r\n\n  two \n\nthree"))
    assert [(i.line, i.fields["prompt"]) for i in items] == [(1, "one"), (3, "  two "), (5, "three")]
    assert [i.number for i in items] == [0, 1, 2]


def test_whole_files(tmp_path: Path) -> None:
    items = read(write(tmp_path / "a.md", "# one\ntwo\n"), whole_files=True)
    assert [i.fields["prompt"] for i in items] == ["# one\ntwo\n"]


def test_jsonl_records_and_what_is_wrong_with_some(tmp_path: Path) -> None:
    lines = ['{"prompt": "a", "id": 7}', "{oops", "[1]", '"text"', '{"messages": []}', "[" * 200_000]
    items = read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert items[0].id == 7
    found = errors(items)
    assert found[2].startswith("not JSON: ")
    assert found[3] == "not a JSON object but list"
    assert found[4] == "not a JSON object but str"
    assert found[6].startswith("not JSON")
    assert 5 not in found


@pytest.mark.parametrize(
    ("encoding", "bom"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_byte_order_marks_are_honoured(tmp_path: Path, encoding: str, bom: bytes, kind: str) -> None:
    text = {"txt": "Grüße 日本\nzwei\n", "jsonl": '{"prompt": "Grüße 日本"}\n{"prompt": "zwei"}\n'}
    text["csv"] = "prompt,n\nGrüße 日本,1\nzwei,2\n"
    items = read(write(tmp_path / f"a.{kind}", bom + text[kind].encode(encoding)))
    assert [i.fields.get("prompt") for i in items] == ["Grüße 日本", "zwei"]


def test_mixed_encodings_fail_line_by_line(tmp_path: Path) -> None:
    data = b"gut\n" + "schön\n".encode("latin-1") + "größer\n".encode()
    path = write(tmp_path / "a.txt", data)
    items = read(path)
    assert errors(items) == {2: "not UTF-8: byte 0xf6 at position 3 (--encoding says otherwise)"}
    assert [i.fields["prompt"] for i in read(path, encoding="latin-1")][:2] == ["gut", "schön"]
    rows = write(tmp_path / "a.csv", b"prompt\n" + data)
    assert errors(read(rows)) == {3: "not UTF-8 (--encoding says otherwise)"}
    with pytest.raises(BadInput, match="unknown encoding 'klingon'"):
        read(path, encoding="klingon")


def test_a_line_of_50_megabytes_is_read_and_one_of_70_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "MAX_RECORD", 5 << 20)  # the same at a tenth of the size
    path = write(tmp_path / "a.txt", b"x" * (5 << 20) + b"\n" + b"y" * (7 << 20) + b"\nlast\n")
    items = read(path)
    assert len(items[0].fields["prompt"]) == 5 << 20
    assert errors(items) == {2: "7 MB are more than a record may have (5 MB)"}
    assert items[2].fields["prompt"] == "last"


def test_csv_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,question,prompt\n1,"a, b\nc",p1\n2,"say ""hi""",p2\n')
    assert [i.fields["prompt"] for i in read(path)] == ["p1", "p2"]
    items = read(path, column="question")
    assert [i.fields["prompt"] for i in items] == ["a, b\nc", 'say "hi"']
    assert [(i.line, i.id) for i in items] == [(2, "1"), (4, "2")]
    with pytest.raises(BadInput, match="no column 'answer', but id, question, prompt"):
        read(path, column="answer")


def test_csv_kinds_and_broken_rows(tmp_path: Path) -> None:
    semicolons = write(tmp_path / "a.csv", "prompt;n\na, b;1\nc;2;3\nd\n")
    items = read(semicolons)
    assert items[0].fields == {"prompt": "a, b", "n": "1"}
    assert errors(items) == {3: "3 fields, the header has 2", 4: "1 fields, the header has 2"}
    tabs = write(tmp_path / "b.tsv", "prompt\tn\nx\t1\n")
    assert read(tabs)[0].fields == {"prompt": "x", "n": "1"}
    only = write(tmp_path / "c.csv", "text\nhello\n")
    assert read(only)[0].fields["prompt"] == "hello"
    unclear = write(tmp_path / "d.csv", "a,b\n1,2\n")
    with pytest.raises(BadInput, match="columns a, b: which one is the prompt"):
        read(unclear)
    assert read(unclear, any_column=True)[0].fields == {"a": "1", "b": "2"}
    with pytest.raises(BadInput, match="is empty"):
        read(write(tmp_path / "e.csv", ""))


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.csv", "sub/skip.pdf", "out.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    options = ReadOptions()

    def names(*given: str, never: Path | None = None) -> list[str]:
        found = find_files([str(tmp_path / g) for g in given], options, never=[never] if never else [])
        return [p.relative_to(tmp_path).as_posix() for p in found]

    assert names("", never=tmp_path / "out.jsonl") == ["a.jsonl", "b.txt", "sub/c.csv"]
    assert names("*.txt", "b.txt", "sub") == ["b.txt", "sub/c.csv"]
    assert names("**/*.csv") == ["sub/c.csv"]
    for given, says in (
        ("no.txt", "no.txt does not exist"),
        ("*.md", "nothing matches"),
        ("sub/skip.pdf", "is not one"),
    ):
        with pytest.raises(BadInput, match=says):
            names(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"holds no \.jsonl"):
        names("empty")


def test_ids_used_twice_are_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": "x", "prompt": "a"}\n{"prompt": "b"}\n{"id": "x", "prompt": "c"}\n')
    with pytest.raises(BadInput, match=r'the id "x" is used twice: .*a.jsonl:1 and .*a.jsonl:3'):
        scan(read(path))


# -- items to requests -------------------------------------------------------------------------------------------------

PLAIN = PromptOptions(SamplingOptions(), 12, raw=True)


def request(fields: dict[str, Any], options: PromptOptions = PLAIN) -> Request:
    return request_of(Item(3, Path("x"), 1, "key", fields), session(n_ctx=64), options)


def test_options_of_a_line_win() -> None:
    mine = request({"prompt": "abc", "max_tokens": 5, "temperature": 0.5, "seed": 9, "stop": "zz", "top_k": 3})
    assert (mine.id, mine.max_tokens, mine.stop) == (3, 5, ("zz",))
    assert (mine.sampling.temperature, mine.sampling.seed, mine.sampling.top_k) == (0.5, 9, 3)
    assert request({"prompt": "abc"}).max_tokens == 12


def test_messages_and_system_prompts() -> None:
    chat = PromptOptions(SamplingOptions(), 12, system="sys")  # the fake template joins the contents
    assert list(request({"prompt": "abc"}, chat).prompt) == [ord(c) - 97 for c in "sysabc"]
    assert list(request({"prompt": "abc", "system": "own"}, chat).prompt) == [ord(c) - 97 for c in "ownabc"]
    both = [{"role": "system", "content": "q"}, {"role": "user", "content": "abc"}]
    assert list(request({"messages": both}, chat).prompt) == [ord(c) - 97 for c in "qabc"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "neither `prompt` nor `messages`"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "`prompt` is 5, not text"),
        ({"messages": []}, r"`messages` is \[\], not a list of messages"),
        ({"messages": [{"role": "user"}]}, "needs `role` and `content`"),
        ({"messages": "hi"}, '`messages` is "hi", not a list'),
        ({"prompt": "a", "temperature": "hot"}, '`temperature` is "hot", not a number from 0 to'),
        ({"prompt": "a", "temperature": -1}, "`temperature` is -1"),
        ({"prompt": "a", "max_tokens": 0}, "`max_tokens` is 0, not a number from 1"),
        ({"prompt": "a", "max_tokens": True}, "`max_tokens` is true"),
        ({"prompt": "a", "top_p": 1.5}, "not a number from 0 to 1"),
        ({"prompt": "a", "stop": [1]}, r"`stop` is \[1\], not text or a list of texts"),
        ({"prompt": "a", "system": "s"}, "--raw asks for none"),
        ({"prompt": "a" * 50_000}, "has 50000 characters, at least 1562 tokens; the context holds 64"),
    ],
)
def test_what_is_wrong_with_an_item_is_said(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        request(fields)


def test_templates() -> None:
    options = PromptOptions(SamplingOptions(), 12, raw=True, template=PromptTemplate("{{ a }}x{{ b | lower }}"))
    assert list(request({"a": "q", "b": "R", "seed": "apples"}, options).prompt) == [ord(c) - 97 for c in "qxr"]
    with pytest.raises(BadInput, match="the template fails: 'b' is undefined"):
        request({"a": "q"}, options)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ a", "the template has an error in line 1"),
        ("@nowhere.j2", "the template nowhere.j2 cannot be read: No such file"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(source: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        PromptTemplate.read(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ a.b.c }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    ],
)
def test_templates_are_in_a_sandbox(source: str) -> None:
    with pytest.raises(BadInput, match="the template"):
        PromptTemplate.read(source).render({"a": 1})


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.j2", codecs.BOM_UTF8 + "Größe: {{ n }}".encode())
    assert PromptTemplate.read(f"@{path}").render({"n": 3}) == "Größe: 3"


def test_settings_tell_answers_apart(tmp_path: Path) -> None:
    from dspark_cli.batch.runner import settings_of

    model = write(tmp_path / "m.gguf", b"x")
    base = settings_of(model, ReadOptions(), PLAIN)
    assert base == settings_of(model, ReadOptions(), PromptOptions(SamplingOptions(), 12, raw=True))
    others = [
        settings_of(model, ReadOptions(column="x"), PLAIN),
        settings_of(model, ReadOptions(), PromptOptions(SamplingOptions(seed=1), 12, raw=True)),
        settings_of(model, ReadOptions(), PromptOptions(SamplingOptions(), 13, raw=True)),
        settings_of(model, ReadOptions(), PromptOptions(SamplingOptions(), 12, system="x")),
        settings_of(model, ReadOptions(), PromptOptions(SamplingOptions(), 12, raw=True, template=PromptTemplate("a"))),
        settings_of(write(tmp_path / "n.gguf", b"x"), ReadOptions(), PLAIN),
    ]
    assert len({base, *others}) == 7
    assert json.dumps(base)
