"""Answers that are code: what is run, what it may do, and what pass@k makes of it."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, World, write_rows
from flocktune import api
from flocktune.config.load import load_recipe
from flocktune.config.schema import CodeConfig, Columns, EvaluationConfig
from flocktune.data.examples import Example, to_examples
from flocktune.data.questions import Program
from flocktune.errors import UserError
from flocktune.evaluation import shut_in, tasks
from flocktune.evaluation.programs import pass_at, program
from flocktune.evaluation.shut_in import Limits, run_shut_in
from flocktune.evaluation.tasks import Speaker, answer_all
from tiny_models import tiny_model, tiny_tokenizer

SHORT = Limits(timeout_s=1.0)


# --- pass@k -------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            right = [place < correct for place in range(n)]
            for k in range(1, n + 1):
                draws = [any(draw) for draw in itertools.combinations(right, k)]
                assert pass_at(k, n, correct) == pytest.approx(sum(draws) / len(draws))
    assert pass_at(100, 200, 1) == pytest.approx(0.5)


# --- from an answer to a program ----------------------------------------------------------------------

PROMPT = 'import math\n\n\ndef area(r):\n    """The area of a circle."""\n'
TESTS = Program("def check(f):\n    assert abs(f(1) - 3.14159) < 1e-4\n    assert f(0) == 0\n", "area")
RIGHT = {
    "a body": "    return math.pi * r * r\n",
    "a body without its first blanks": "r2 = r * r\n    return math.pi * r2",
    "a body and more": "    return math.pi * r * r\n\n\ndef other():\n    nonsense(\n",
    "a function": "def area(r):\n    return math.pi * r ** 2",
    "a fence": "Here it is:\n```python\ndef area(r):\n    return math.pi * r ** 2\n```\nIt multiplies.",
    "a fence that does not end": "```\n    return math.pi * r ** 2",
    "a name": "area = lambda r: math.pi * r * r",
}


@pytest.mark.parametrize("name", RIGHT)
def test_code_is_found_in_an_answer(name: str) -> None:
    space: dict[str, Any] = {}
    exec(program(PROMPT, RIGHT[name], TESTS), space)  # written here
    assert space["area"](0) == 0


def test_wrong_code_and_prompts_in_words() -> None:
    with pytest.raises(AssertionError):
        exec(program(PROMPT, "    return r", TESTS), {})
    said = program("Write a function that adds.", "def add(a, b):\n    return a + b", Program("assert add(1, 2) == 3"))
    assert "Write a function" not in said
    exec(said, {})
    with pytest.raises(AssertionError):
        exec(program("Write it.", "add = max", Program("assert add(1, 2) == 3")), {})


def test_rows_with_tests_as_data_sets_have_them() -> None:
    human = {"prompt": PROMPT, "canonical_solution": "    return 3", "test": "def check(f): ...", "entry_point": "area"}
    [example] = to_examples([("rows:1", human)], Columns())
    assert example.program == Program("def check(f): ...", "area")
    assert (example.instruction, example.response) == (PROMPT, "    return 3")
    mbpp = {"text": "Add.", "code": "def add(): ...", "test_list": ["assert add", "assert 1"]}
    [example] = to_examples([("rows:1", mbpp)], Columns(instruction="text", response="code"))
    assert example.program == Program("assert add\nassert 1")
    [example] = to_examples([("rows:1", {"prompt": "a", "completion": "b", "test": 3})], Columns())
    assert example.program is None, "any column may be called test"
    with pytest.raises(UserError, match="a function's name"):
        to_examples([("rows:1", {**human, "entry_point": "area); import os"})], Columns())
    with pytest.raises(UserError, match="column of the tests"):
        to_examples([("rows:1", {**human, "test": 3})], Columns())


# --- shut in ------------------------------------------------------------------------------------------

STOPPED = {
    "ends before its tests": ("import os; os._exit(0)", "ended early"),
    "says that it passed": ("import os; os.write(1, b'passed'); os._exit(0)", "ended early"),
    "leaves": ("raise SystemExit(0)", "raised SystemExit"),
    "is wrong": ("assert 1 == 2", "raised AssertionError"),
    "is no Python": ("def", "raised SyntaxError"),
    "eats memory": ("x = []\nwhile True: x.append(bytearray(2**20))", "raised MemoryError"),
    "eats memory at once": ("x = 'x' * 2**34", "raised MemoryError"),
    "calls itself": ("def f(): f()\nf()", "raised RecursionError"),
    "bombs": ("import os\nwhile True: os.fork()", "raised PermissionError"),
    "starts a thread": ("import _thread; _thread.start_new_thread(print, ())", "raised RuntimeError"),
    "starts a program": ("import os; os.execv('/bin/true', ['true'])", "raised PermissionError"),
    "reads a file": ("open('/etc/passwd')", "raised PermissionError"),
    "reads its maker's environment": ("import os; open(f'/proc/{os.getppid()}/environ')", "raised PermissionError"),
    "lists a folder": ("import os; os.listdir('/')", "raised PermissionError"),
    "writes in its folder": ("open('here', 'w')", "raised PermissionError"),
    "removes": ("import os; os.rmdir(FOLDER)", "raised PermissionError"),
    "sends a signal": ("import os; os.kill(os.getppid(), 9)", "raised PermissionError"),
    "asks": ("input()", "raised EOFError"),
    "reads its request": ("import os; os.lseek(0, 0, 0); assert b'nonce' in os.read(0, 9999)", "raised OSError"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "ended early"),
    "imports what is installed": ("import torch", "raised ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_a_program_may_not_is_stopped_and_counts_as_failed(name: str, tmp_path: Path) -> None:
    code, outcome = STOPPED[name]
    assert run_shut_in(code.replace("FOLDER", repr(str(tmp_path))), SHORT) == outcome
    assert tmp_path.exists()


@pytest.mark.parametrize("code", ["while True: pass", "import os\nwhile True: os.write(1, b'x' * 4096)"])
def test_a_program_that_does_not_end_is_ended(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shut_in, "START_S", 0)
    assert run_shut_in(code, SHORT) == "out of time"


def test_secrets_in_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert run_shut_in("import os; assert 'API_KEY' not in os.environ; assert len(os.environ) < 3", SHORT) == "passed"


def test_what_an_order_of_texts_decides_is_decided_alike_every_time() -> None:
    assert len({run_shut_in("raise type(f'H{hash(chr(97))}', (Exception,), {})", SHORT) for _ in "ab"}) == 1


def test_a_program_whose_maker_is_gone_is_not_run() -> None:
    request = {"program": "pass", "nonce": "it", "parent": 1 << 30, "cpu_s": 1.0, "memory_bytes": 2**29}
    command = [sys.executable, *shut_in.FLAGS, str(shut_in.CHILD)]
    ended = subprocess.run(command, input=json.dumps(request).encode(), stdout=subprocess.PIPE, check=True)
    assert ended.stdout == b"it open its maker is gone"


def test_no_packet_leaves_a_program() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = struct.pack("=H6s8x", socket.AF_INET, struct.pack("!H4B", server.getsockname()[1], 127, 0, 0, 1))
        code = (
            "import ctypes\n"
            "libc = ctypes.CDLL(None)\n"
            "handle = libc.socket(2, 1, 0)\n"
            f"assert handle >= 0 and libc.connect(handle, {address!r}, 16) == 0"
        )
        exec(code, {})  # it would connect, were it let
        server.accept()[0].close()
        assert run_shut_in(code, SHORT) == "raised AssertionError"
        with pytest.raises(TimeoutError):
            server.accept()
    assert run_shut_in("import socket", SHORT) == "raised ModuleNotFoundError"


def test_what_programs_need_is_there() -> None:
    code = (
        "from __future__ import annotations\nfrom typing import List\nfrom dataclasses import dataclass\n"
        "import math, re, random, datetime, hashlib, json, time\nprint('x' * 10**6)\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "assert Point(3).x == 3 and datetime.datetime.strptime('2024', '%Y').year == 2024\n"
        "assert hashlib.md5(b'x').hexdigest() and 0 <= random.random() < 1 and time.time() > 0\n"
        "assert __name__ != '__main__'"
    )
    assert run_shut_in(code, SHORT) == "passed"


@pytest.fixture
def tried_anew() -> Iterator[None]:
    shut_in.refuse.cache_clear()
    yield
    shut_in.refuse.cache_clear()


@pytest.mark.usefixtures("tried_anew")
def test_where_programs_can_not_be_shut_in_none_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = shut_in.CHILD.read_text()
    for name, old, new in (
        ("elsewhere", '"x86_64":', '"other":'),
        ("open", "        shut_in()\n", "        pass\n"),
    ):
        changed = tmp_path / f"{name}.py"
        assert old in child
        changed.write_text(child.replace(old, new).replace('"aarch64":', '"other arm":'))
        monkeypatch.setattr(shut_in, "CHILD", changed)
        with pytest.raises(UserError, match=r"expected a machine on which it can be shut in: Linux with seccomp"):
            run_shut_in("open('here', 'w')", SHORT)
        shut_in.refuse.cache_clear()


# --- the task -----------------------------------------------------------------------------------------


def code_rows(count: int) -> list[dict[str, Any]]:
    """Rows as HumanEval has them."""
    return [
        {
            "prompt": f"def plus_{n}(x):\n    # x plus {n}\n",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(f):\n    assert f(1) == {n + 1}\n",
            "entry_point": f"plus_{n}",
        }
        for n in range(count)
    ]


def test_every_sample_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = to_examples([(f"rows:{place}", row) for place, row in enumerate(code_rows(2))], Columns())
    written = ["    return x + 0", "    return x", "    return 7", "raise", "    return x + 1", "", "x", "print("]
    given: dict[str, Any] = {}

    def answers(*_: Any, **options: Any) -> list[str]:
        given.update(options)
        return written

    monkeypatch.setattr(tasks, "generate_answers", answers)
    speaker = Speaker(tiny_model("llama"), tiny_tokenizer(), "short", 96, 2)
    code = CodeConfig(run_generated_code=True, samples=4, temperature=0.5, timeout_s=1.0)
    first, second = answer_all(speaker, examples, EvaluationConfig(task="code", code=code))
    assert [one["outcome"] for one in first.more["samples"]] == [
        "passed", "passed", "raised AssertionError", "raised RuntimeError"
    ]  # fmt: skip
    assert (first.scores, second.scores) == ({"pass_at_1": 0.5}, {"pass_at_1": 0.25})
    assert len(set(given["seeds"])) == 8
    assert given["strip"] is False
    with pytest.raises(UserError, match="run_generated_code: expected true"):
        answer_all(speaker, examples, EvaluationConfig(task="code"))
    with pytest.raises(UserError, match=r"rows with tests \(evaluation.task code\), got 1 of 1 without"):
        answer_all(speaker, [Example("a")], EvaluationConfig(task="code", code=code))


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on code, its recipe's own evaluation being of it."""
    folder = tmp_path_factory.mktemp("code")
    rows = write_rows(folder / "code.jsonl", code_rows(16))
    changes = [
        f"data.train={rows}", "data.test_rows_per_category=2", "rounds=1", "evaluation.task=code",
        "allocation.clients=2", "evaluation.code.run_generated_code=true",
    ]  # fmt: skip
    api.run(load_recipe(world.recipe, changes), folder / "run")
    return folder / "run"


def test_a_run_and_eval_of_task_code(cli: Callable[..., Said], tuned: Path, tmp_path: Path) -> None:
    numbers = json.loads((tuned / "summary.json").read_text())["metrics"]["held_out"]
    assert numbers["overall"]["pass_at_1"] == 0
    assert numbers["intervals"]["pass_at_1"]["high"] > 0.5
    refused = cli("eval", tuned)
    assert refused.code == 2, "a recipe's word is not enough to run code here"
    assert "--run-generated-code: expected true with task code" in refused.err
    said = cli(
        "eval", tuned, "--run-generated-code", "--samples", "2", "--temperature", "0.8", "--max-new-tokens", "4",
        "--answers", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert said.code == 0, said.all
    assert "pass@1 %" in said.out
    assert "code that a model wrote" in said.err
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [len(row["samples"]) for row in rows] == [2, 2]
    greedy = cli("eval", tuned, "--run-generated-code", "--samples", "2")
    assert greedy.code == 2
    assert "--temperature: expected above 0 with several samples" in greedy.err


def test_code_is_not_run_by_default(world: World) -> None:
    with pytest.raises(UserError, match=r"evaluation.code.run_generated_code: expected true"):
        load_recipe(world.recipe, ["evaluation.task=code"])
