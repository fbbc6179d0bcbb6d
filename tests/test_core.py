"""Types, seeds, files, named tensors and the wire."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from flocktune.errors import Problem, UpdateRefused, UserError
from flocktune.files import exclusive, map_file, read_json, sha256_path, write_atomic
from flocktune.seeds import derive_seed
from flocktune.tensors import add_scaled, digest, group, mismatches, norm, prefixed, subtract
from flocktune.types import ClientTask, Mean, Update, merge_metrics
from flocktune.wire import (
    LONGEST_METRIC_NAME,
    MOST_METRICS,
    build_task,
    build_update,
    decode_tensors,
    encode_tensors,
    encoded_size,
    task_fields,
    update_fields,
)

TENSORS = {"layer.0.lora_A": torch.randn(3, 5), "layer.0.lora_B": torch.randn(4, 3), "scalar": torch.tensor(2.0)}
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
          torch.float64, torch.int64]  # fmt: skip


def test_merged_means_give_the_mean_of_all() -> None:
    assert (Mean(2.0, 1) + Mean(4.0, 5)).value == 1.0
    assert math.isnan(Mean().value)
    assert merge_metrics({"a": Mean(1, 1)}, {"a": Mean(3, 1), "b": Mean(5, 1)}) == {"a": Mean(4, 2), "b": Mean(5, 1)}


def test_seeds_are_stable_and_independent() -> None:
    assert derive_seed(0, 1, "client-01", "batches") == 8582909731762657509
    seeds = {derive_seed(root, round, client) for root in range(5) for round in range(5) for client in ("a", "b", "1")}
    assert len(seeds) == 75
    assert derive_seed(0, 1) != derive_seed(0, "1"), "a number and its text are different purposes"
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


@given(st.integers(0, 2**64), st.lists(st.one_of(st.integers(), st.text()), max_size=4))
def test_seeds_fit_every_generator(root: int, path: list[int | str]) -> None:
    assert 0 <= derive_seed(root, *path) < 2**63


def test_problems_say_what_where_and_what_to_do() -> None:
    problem = Problem("local.lr", "greater than 0", "-1", "Try 1e-3.")
    assert str(problem) == "local.lr: expected greater than 0, got -1. Try 1e-3."
    with pytest.raises(UserError, match=r"local\.lr"):
        UserError.raise_all([problem])
    UserError.raise_all([])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "state"
    write_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path) -> None:
    script = (
        "import sys, pathlib\nfrom flocktune.files import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])): print('held')"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with exclusive(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "another process holds" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "held\n"


def test_folder_digests_follow_names_and_contents(tmp_path) -> None:
    (tmp_path / "a").write_text("1")
    before = sha256_path(tmp_path)
    (tmp_path / ".lock").write_text("hidden files do not count")
    assert sha256_path(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_path(tmp_path) != before


def test_json_files_that_are_not_json_are_named(tmp_path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: expected a JSON file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="nothing there"):
        read_json(tmp_path / "y.json")


def test_named_tensor_maths() -> None:
    base, change = {"w": torch.tensor([1.0, 2.0]), "kept": torch.tensor(7.0)}, {"w": torch.tensor([10.0, 20.0])}
    assert add_scaled(base, change, 0.5)["w"].tolist() == [6.0, 12.0]
    assert add_scaled(base, change)["kept"].item() == 7.0
    assert subtract(change, base)["w"].tolist() == [9.0, 18.0]
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}) == 5.0
    assert group(prefixed("g", base), "g") == base
    assert group({"gg/x": base["w"]}, "g") == {}


def test_digest_sees_names_shapes_dtypes_and_values_but_not_order() -> None:
    first = {"a": torch.arange(4.0), "b": torch.ones(2)}
    assert digest(first) == digest(dict(reversed(first.items())))
    assert digest(first) == digest(
        {"a": torch.arange(4.0).reshape(2, 2).t().contiguous().t().reshape(4), "b": first["b"]}
    )
    for other in (
        {"a": torch.arange(4.0), "c": torch.ones(2)},
        {"a": torch.arange(4.0).reshape(2, 2), "b": torch.ones(2)},
        {"a": torch.arange(4.0).double(), "b": torch.ones(2)},
        {"a": torch.arange(4.0), "b": torch.tensor([1.0, 1.0000001])},
    ):
        assert digest(first) != digest(other)


def test_mismatches_name_every_problem() -> None:
    got = {
        "layer.0.lora_A": torch.full((3, 5), math.nan),
        "layer.0.lora_B": torch.randn(4, 2),
        "more": torch.ones(1),
    }
    found = "\n".join(mismatches(TENSORS, got))
    for words in ("lora_A: NaN", "lora_B: expected shape (4, 3), got (4, 2)", "more: not expected", "scalar: missing"):
        assert words in found
    assert mismatches({"x": torch.ones(1)}, {"x": torch.ones(1).half()}) == [
        "x: expected torch.float32, got torch.float16"
    ]
    assert mismatches(TENSORS, TENSORS) == []


def test_what_is_not_finite_is_named_and_large_sums_are_no_fault() -> None:
    fine = {"large": torch.full((4,), 3e38), "half": torch.full((9,), 6e4).half(), "whole": torch.arange(3)}
    assert mismatches(fine, fine) == []
    both = {**fine, "x": torch.tensor([math.inf, 1.0, -math.inf]), "y": torch.tensor([1.0, math.nan]).bfloat16()}
    assert mismatches(both, both) == ["x: NaN or infinite values", "y: NaN or infinite values"]


def test_tasks_and_updates_survive_the_wire_bit_for_bit() -> None:
    task = ClientTask(3, "hospital-ä", "fedavg", TENSORS, 2**62 + 1, "abc")
    back = build_task(json.loads(json.dumps(task_fields(task))), decode_tensors(encode_tensors(TENSORS)))
    assert (back.round, back.client, back.kind, back.seed, back.config_digest) == (
        3,
        "hospital-ä",
        "fedavg",
        2**62 + 1,
        "abc",
    )
    assert digest(back.tensors) == digest(TENSORS)
    update = Update({**TENSORS, "half": torch.randn(3).bfloat16()}, 17.0, 2, {"loss": Mean(0.1, 3)})
    said = json.loads(json.dumps(update_fields(update)))
    got = build_update(said, decode_tensors(encode_tensors(update.delta)))
    assert (got.weight, got.clients, got.metrics) == (17.0, 2, update.metrics)
    assert digest(got.delta) == digest(update.delta)


@settings(max_examples=50)
@given(st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\x00\\\""), min_size=1, max_size=12),
                       st.lists(st.integers(0, 30), max_size=3), max_size=12))  # fmt: skip
def test_the_size_of_a_message_is_known_without_building_it(shapes: dict[str, list[int]]) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if name.isprintable()}
    assert encoded_size(tensors) == len(encode_tensors(tensors))


@settings(max_examples=50)
@given(st.dictionaries(st.text("abä", min_size=1, max_size=4), st.tuples(st.sampled_from(DTYPES),
                       st.lists(st.integers(0, 4), max_size=3)), max_size=8))  # fmt: skip
def test_a_message_is_the_file_that_safetensors_itself_writes(said: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in said.items()}
    whole = save(tensors, metadata={"format": "flocktune/1"})
    assert encode_tensors(tensors) == whole
    assert digest(decode_tensors(whole)) == digest(tensors)


def test_tensors_that_do_not_lie_in_one_piece_are_encoded_as_they_read() -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(decode_tensors(encode_tensors({"x": wide.T, "y": wide[:, 1]}))["x"], wide.T)


def test_what_is_decoded_is_the_messages_own_memory(tmp_path: Path) -> None:
    whole = bytearray(encode_tensors({"x": torch.ones(4)}))
    view = decode_tensors(memoryview(whole))["x"]
    whole[-4:] = bytes(4)
    assert view.tolist() == [1.0, 1.0, 1.0, 0.0]
    (tmp_path / "update").write_bytes(whole)
    mapped = map_file(tmp_path / "update")
    (tmp_path / "update").unlink()
    assert decode_tensors(mapped)["x"].tolist() == view.tolist()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        save({"x": torch.ones(2)}),
        save({"x": torch.ones(2)}, metadata={"format": "flocktune/0"}),
        encode_tensors(TENSORS)[:-3],
    ],
)  # fmt: skip
def test_bytes_that_are_no_tensors_are_refused(blob: bytes) -> None:
    with pytest.raises(UpdateRefused):
        decode_tensors(blob)


WHOLE = {"weight": 1.0, "clients": 1, "metrics": {"loss": [1.0, 2.0]}}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {**WHOLE, "metrics": 3},
        {**WHOLE, "evil": 1},
        *({**WHOLE, "metrics": {"loss": [total, 1.0]}} for total in (math.nan, math.inf, -math.inf, 10**400, None)),
        *({**WHOLE, "metrics": {"loss": [1.0, count]}} for count in (math.nan, math.inf, -1.0)),
        {**WHOLE, "metrics": {"x" * (LONGEST_METRIC_NAME + 1): [1.0, 1.0]}},
        {**WHOLE, "metrics": {f"m{number}": [1.0, 1.0] for number in range(MOST_METRICS + 1)}},
    ],
)
def test_fields_that_are_no_updates_are_refused(said: dict[str, object]) -> None:
    with pytest.raises(UpdateRefused):
        build_update(said, TENSORS)


def test_metrics_up_to_the_bounds_are_taken() -> None:
    metrics = {f"{number:0{LONGEST_METRIC_NAME}}": [-1.0, 0] for number in range(MOST_METRICS)}
    assert build_update({**WHOLE, "metrics": metrics}, TENSORS).metrics == dict.fromkeys(metrics, Mean(-1.0, 0.0))


@settings(max_examples=60)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_messages_never_raise_anything_else(noise: bytes, place: int) -> None:
    blob = bytearray(encode_tensors({"x": torch.ones(4)}))
    blob[place : place + len(noise)] = noise
    try:
        tensors = decode_tensors(bytes(blob))
    except UpdateRefused:
        return
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())


def test_importing_the_package_is_cheap() -> None:
    script = (
        "import sys, flocktune; print(json.dumps([m for m in ('torch', 'transformers', 'yaml') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", "import json\n" + script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_every_public_name_can_be_imported() -> None:
    import flocktune

    for name in flocktune.__all__:
        assert getattr(flocktune, name) is not None
    with pytest.raises(AttributeError):
        _ = flocktune.nothing_of_that_name
