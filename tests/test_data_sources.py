"""Rows from every kind of source, and errors that say where."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from flocktune.config.schema import EMBEDDED, EMBEDDED_PUBLIC, Columns
from flocktune.data.examples import Example, Message, examples_digest, rows_digest, to_examples
from flocktune.data.sources import locate, read_examples, source_digest
from flocktune.errors import UserError

DOLLY = {"instruction": "Name a fruit.", "context": "A bowl.", "response": "Plum", "category": "qa"}
WANTED = Example("Name a fruit.", "A bowl.", "Plum", category="qa")


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def one(row: dict, columns: Columns = Columns()) -> Example:
    (example,) = to_examples([("here:1", row)], columns)
    return example


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (DOLLY, WANTED),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, Example("Add.", "1 2", "3")),
        ({"prompt": "Hi", "completion": "Ho"}, Example("Hi", "", "Ho")),
        ({"question": "1+1?", "answer": "#### 2"}, Example("1+1?", "", "#### 2")),
        ({"instruction": "Hi", "context": None, "response": None}, Example("Hi")),
        ({**DOLLY, "client_id": 7}, Example("Name a fruit.", "A bowl.", "Plum", category="qa", client="7")),
        ({**DOLLY, "check": {"one_of": ["plum"], "fields": None}},
         Example("Name a fruit.", "A bowl.", "Plum", category="qa", check={"one_of": ["plum"]})),
    ],
)  # fmt: skip
def test_usual_shapes_of_rows(row: dict, wanted: Example) -> None:
    assert one(row) == wanted


def test_chat_rows_become_history_instruction_and_response() -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    wanted = Example("c", response="d", history=tuple(Message(role, text) for role, text in turns[:3]))  # type: ignore[arg-type]
    assert one({"messages": [{"role": role, "content": text} for role, text in turns]}) == wanted
    other = {"system": "system", "user": "human", "assistant": "gpt"}
    assert one({"conversations": [{"from": other[role], "value": text} for role, text in turns]}) == wanted
    assert one({"messages": [{"role": "user", "content": "c"}]}) == Example("c")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "a list of messages"),
        ("hello", "a list of messages"),
        ([{"role": "user"}], "message 1"),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "message 2"),
        ([{"role": "assistant", "content": "a"}], "user first"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "in turn"),
        ([{"role": "system", "content": "a"}], "in turn"),
    ],
)
def test_malformed_chat_rows_are_refused(messages: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        one({"messages": messages})


def test_half_a_surrogate_is_no_text() -> None:
    with pytest.raises(UserError, match=r"'response': expected text, got str '\\ud800'"):
        one(json.loads('{"instruction": "a", "response": "\\ud800"}'))
    with pytest.raises(UserError, match="message 1"):
        one({"messages": [{"role": "user", "content": "\ud800"}]})
    with pytest.raises(UserError, match="expected text, got bool"):
        one({**DOLLY, "category": True})


def test_columns_can_be_told() -> None:
    row = {"text": "Q", "instruction": "unused", "label": "A", "owner": "bank", "topic": "t"}
    columns = Columns(instruction="text", response="label", client="owner", category="topic")
    assert one(row, columns) == Example("Q", "", "A", category="t", client="bank")
    assert one({"input": "Q", "output": "A"}, Columns(instruction="input")) == Example("Q", "", "A")
    both = {"messages": [{"role": "user", "content": "a"}], **DOLLY}
    assert one(both).instruction == "a"
    assert one(both, Columns(instruction="instruction")) == WANTED


def test_a_wrong_column_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError) as error:
        one(DOLLY, Columns(response="replies", category="kind"))
    text = str(error.value)
    assert "'replies'" in text
    assert "'kind'" in text
    assert "instruction, context, response, category" in text
    with pytest.raises(UserError, match=r"data\.columns\.response"):
        one({"instruction": "a", "text": "b"})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".list.json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [DOLLY, {**DOLLY, "response": 'two\nlines, "quoted" ü\u2028'}]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(DOLLY))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".list.json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    examples = read_examples(str(path), Columns())
    assert examples == [WANTED, Example("Name a fruit.", "A bowl.", rows[1]["response"], category="qa")]
    assert read_examples(str(path), Columns(), max_rows=1) == [WANTED]


def test_malformed_lines_are_named_and_counted(tmp_path: Path) -> None:
    bad = ["{not json}\n", "[1, 2]\n", {**DOLLY, "response": 5}, {"instruction": "a"}]
    path = write_lines(tmp_path / "rows.jsonl", DOLLY, "\n", *bad, *bad)
    with pytest.raises(UserError) as error:
        read_examples(str(path), Columns())
    text = str(error.value)
    for line, reason in ((3, "JSON object"), (4, "JSON object"), (5, "'response'"), (6, "response"), (7, "JSON")):
        assert f"{path}:{line}" in text
        assert reason in text
    assert f"{path}:8" not in text
    assert "8 problems in 9 rows" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "empty"),
        ("blank.jsonl", b"\n\n", "empty"),
        ("empty.json", b"", "empty"),
        ("empty.csv", b"", "empty"),
        ("header.csv", b"instruction,response\n", "empty"),
        ("binary.jsonl", b'{"instruction": "a", "response": "b"}\n\xff\xfe\x00', r"binary\.jsonl:2: expected UTF-8"),
        ("cut.json", b'[{"instruction":\n "a"', r"cut\.json:2"),
        ("short.csv", b"instruction,response\na,b\nc\n", r"short\.csv:3: expected 2 fields"),
        ("quote.csv", b'instruction,response\na,"b"c\n', r"quote\.csv:2"),
        ("rows.parquet", b"not parquet", r"a Parquet file"),
        ("rows.txt", b"hello", r"ends in \.json"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_examples(str(tmp_path / name), Columns())


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "data/rows.jsonl", "./a/b", "nothing", "/a/b"])
def test_missing_files_are_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(UserError, match="nothing there"):
        locate(source)


def test_the_embedded_data_and_the_public_data_have_names_and_share_no_prompt() -> None:
    private, public = (read_examples(name, Columns()) for name in (EMBEDDED, EMBEDDED_PUBLIC))
    assert 500 < len(public) < len(private)
    assert {row.category for row in public} == {row.category for row in private}
    assert not {(row.instruction, row.context) for row in public} & {(row.instruction, row.context) for row in private}
    assert source_digest(EMBEDDED_PUBLIC) != source_digest(EMBEDDED)
    with pytest.raises(UserError, match=r"'embedded-preferences', or 'embedded-public'"):
        locate("embedded-publik")


def test_hub_ids_are_told_from_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == (None, None)
    assert locate("owner/name:train[:100]") == (None, None)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == (Path("owner/name"), None)
    assert locate("owner/name:test") == (Path("owner/name"), "test")


def test_hub_rows_and_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        return [DOLLY, DOLLY]

    versions = iter(["v1", "v1", "v2"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: SimpleNamespace(hash=next(versions)))
    assert read_examples("owner/name:test", Columns(), max_rows=1) == [WANTED]
    assert asked == [("owner/name", "test")]
    first, again, changed = (source_digest("owner/name") for _ in range(3))
    assert first == again != changed


def test_an_unknown_hub_id_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def missing(name: str, split: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such data set\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match=r"owner/name:.*no such data set$"):
        read_examples("owner/name", Columns())


def test_a_folder_of_one_file_per_client(tmp_path: Path) -> None:
    write_lines(tmp_path / "clinic.jsonl", DOLLY, DOLLY)
    write_lines(tmp_path / "bank.json", DOLLY)
    (tmp_path / "README.md").write_text("not data")
    assert [example.client for example in read_examples(str(tmp_path), Columns())] == ["bank", "clinic", "clinic"]
    assert len(read_examples(str(tmp_path), Columns(), max_rows=2)) == 2


def test_a_folder_of_splits_is_no_folder_of_clients(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train-00000-of-00002.jsonl", DOLLY)
    write_lines(tmp_path / "data" / "train-00001-of-00002.jsonl", DOLLY)
    write_lines(tmp_path / "data" / "test.jsonl", {**DOLLY, "category": "held out"})
    train = read_examples(str(tmp_path), Columns())
    assert train == [WANTED, WANTED]
    assert [example.category for example in read_examples(f"{tmp_path}:test", Columns())] == ["held out"]
    with pytest.raises(UserError, match="'dev', got splits test, train"):
        read_examples(f"{tmp_path}:dev", Columns())
    write_lines(tmp_path / "data" / "clinic.jsonl", DOLLY)
    with pytest.raises(UserError, match=r"a mix \(clinic\.jsonl\)"):
        read_examples(str(tmp_path), Columns())


def test_a_saved_dataset_folder(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([DOLLY, DOLLY])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert read_examples(str(tmp_path / "one"), Columns()) == [WANTED, WANTED]
    assert read_examples(str(tmp_path / "two"), Columns()) == [WANTED, WANTED]
    assert read_examples(f"{tmp_path / 'two'}:test", Columns()) == [WANTED]
    with pytest.raises(UserError, match="splits train, test"):
        read_examples(f"{tmp_path / 'two'}:dev", Columns())
    with pytest.raises(UserError, match="data without splits"):
        read_examples(f"{tmp_path / 'one'}:dev", Columns())


def test_a_local_digest_is_of_the_contents(tmp_path: Path) -> None:
    left, right = write_lines(tmp_path / "a.jsonl", DOLLY), write_lines(tmp_path / "b.jsonl", DOLLY)
    assert source_digest(str(left)) == source_digest(str(right))
    write_lines(right, DOLLY, DOLLY)
    assert source_digest(str(left)) != source_digest(str(right))
    assert len({source_digest(f"{tmp_path}{split}") for split in ("", ":test", ":train")}) == 3


def test_rows_digest_follows_what_decides_who_holds_and_who_is_right() -> None:
    row = Example("a", "b", "c", category="x", client="k", check={"one_of": ["c"]})
    others = [
        replace(row, category="y"),
        replace(row, client=None),
        replace(row, check=None),
        replace(row, response="d"),
    ]
    assert len({rows_digest([each]) for each in (row, *others)}) == 5
    assert rows_digest([row]) == rows_digest([replace(row)])


def test_examples_digest_follows_the_text_and_its_order() -> None:
    base = [WANTED, Example("a", response="b")]
    turned = Example("a", response="b", history=(Message("user", "x"), Message("assistant", "y")))
    digests = {
        examples_digest(rows) for rows in (base, base[::-1], base[:1], [WANTED, Example("a", "b", "b")], [turned])
    }
    assert len(digests) == 5
    assert examples_digest([Example("a", "b", "b")]) != examples_digest([Example("a", "", "b")])
    assert examples_digest([WANTED]) == examples_digest([Example("Name a fruit.", "A bowl.", "Plum", client="other")])


def test_one_column_can_be_category_and_owner(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"instruction": "a", "response": "b", "category": "kind"})
    [example] = read_examples(str(path), Columns(client="category"))
    assert (example.category, example.client) == ("kind", "kind")
