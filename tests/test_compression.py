"""Smaller updates: every codec's error and size, what a stranger may send, error feedback, and whole runs."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console
from torch import Tensor

from conftest import World
from fake_link import START, Act, FakeLink, Time, pull, remote
from flocktune import api
from flocktune.algorithms import fedavg
from flocktune.cli.estimated import estimate_table
from flocktune.compression.codecs import CODES, SCALES, VALUES, codec_of
from flocktune.compression.packing import BYTES, pack, packed_size, unpack
from flocktune.compression.top_k import decode_places, encode_places, kept, largest, places_size
from flocktune.compression.transform import PLACES, Coder, compression
from flocktune.config.compression import CompressionConfig
from flocktune.config.load import load_recipe, parse_recipe
from flocktune.config.schema import AggregationConfig, Buffered, RunConfig
from flocktune.engine.buffered import run_buffered
from flocktune.engine.client import on_wire, restored, transformed
from flocktune.engine.in_process import InProcess
from flocktune.engine.remote import Remote
from flocktune.engine.rounds import Hooks, RoundRecord, run_rounds
from flocktune.errors import RoundFailed, UpdateRefused, UserError
from flocktune.estimate import Estimate, estimate
from flocktune.interfaces import Engine, Memory
from flocktune.protection import transforms_of
from flocktune.report.html import write_report
from flocktune.report.page import unbroken
from flocktune.run_folder import create_run
from flocktune.runs import Stopped, execute
from flocktune.scheduling import Cohort
from flocktune.tensors import digest
from flocktune.types import AtMost, ClientTask, Failure, Tensors, Update
from flocktune.wire import decode_tensors, encode_tensors, encoded_size

FORMATS = ("float32", "bf16", "int8", "int4")
ALL = [
    CompressionConfig(format, block, top_k, zstd=zstd)
    for format, block, top_k, zstd in product(FORMATS, (1, 5, 64), (None, 0.01, 0.3, 1.0), (None, 3))
]
INT8 = CompressionConfig("int8")
CLIENTS = ("a", "b", "c", "d")
LEVELS = {"int8": 127, "int4": 7}

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = arrays(np.float32, st.integers(0, 200), elements=finite).map(torch.from_numpy)


@st.composite
def updates(draw: st.DrawFn) -> dict[str, Tensor]:
    """Of any shapes: no tensor at all, tensors without values, single numbers."""
    shapes = draw(
        st.dictionaries(st.text("ab./", min_size=1, max_size=5), st.lists(st.integers(0, 9), max_size=3), max_size=4)
    )
    return {
        name: torch.from_numpy(np.asarray(draw(arrays(np.float32, tuple(shape), elements=finite))))
        for name, shape in shapes.items()
    }


def coder(settings: CompressionConfig) -> Coder:
    return Coder(settings, codec_of(settings))


def there_and_back(settings: CompressionConfig, tensors: Tensors) -> Tensors:
    one = coder(settings)
    return one.decode(one.unpacked(one.packed(one.encode(tensors)), tensors), tensors)


def through(settings: CompressionConfig, values: Tensor) -> Tensor:
    codec = codec_of(settings)
    return codec.decode(codec.encode(values), len(values))


# --- codecs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", LEVELS)
@given(values=vectors, block=st.integers(1, 70))
@example(values=torch.tensor([1e-45, -3e-45, 2e-44]), block=3)
@example(values=torch.tensor([3.4028235e38, -1.0]), block=64)
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(format: str, values: Tensor, block: int) -> None:
    back = through(CompressionConfig(format, block), values)
    for start in range(0, len(values), block):
        part, other = (one[start : start + block].double() for one in (values, back))
        step = float(part.abs().max()) / LEVELS[format]
        # 1e-6: float32's rounding, twice; 1e-45: that of numbers that are smaller than float32's normal ones.
        assert float((part - other).abs().max()) <= step / 2 * (1 + 1e-6 * LEVELS[format]) + 1e-45
        assert float(other.abs().max()) == float(part.abs().max()), "the largest comes through as it is"


@pytest.mark.parametrize("format", LEVELS)
@given(values=vectors, block=st.integers(1, 70))
def test_what_was_decoded_is_encoded_to_itself(format: str, values: Tensor, block: int) -> None:
    once = through(CompressionConfig(format, block), values)
    assert torch.equal(through(CompressionConfig(format, block), once), once)


def test_codes_are_where_a_reader_expects_them() -> None:
    """Pinned by hand: the wire's form is part of what two versions must share."""
    values = torch.tensor([0.0, 127.0, -127.0, 1.4, 2.0, -1.0])
    sent = codec_of(CompressionConfig("int8", 4)).encode(values)
    assert sent[CODES].tolist() == [128, 255, 1, 129, 255, 64], "128 is zero; 63.5 below it rounds to the even 64"
    assert sent[SCALES].tolist() == [127.0, 2.0]
    sent = codec_of(CompressionConfig("int4", 8)).encode(torch.tensor([7.0, -7.0, 0.0, 3.2, 1.0]))
    assert sent[CODES].tolist() == [15 | 1 << 4, 8 | 11 << 4, 9 | 8 << 4]


@given(values=vectors)
def test_bf16_is_torchs_own_and_never_infinite(values: Tensor) -> None:
    back = through(CompressionConfig("bf16"), values)
    assert bool(torch.isfinite(back).all())
    ordinary = values.abs() < 3.38e38
    assert torch.equal(back[ordinary], values[ordinary].bfloat16().float())
    assert torch.equal(through(CompressionConfig("bf16"), back), back)


@given(values=vectors)
def test_float32_is_exact(values: Tensor) -> None:
    assert torch.equal(through(CompressionConfig("float32"), values), values)


@pytest.mark.parametrize("format", LEVELS)
def test_zeros_stay_zeros(format: str) -> None:
    assert torch.equal(through(CompressionConfig(format), torch.zeros(100)), torch.zeros(100))


# --- the largest -----------------------------------------------------------------------------------


@given(values=vectors.filter(len), fraction=st.floats(1e-3, 1.0))
@example(values=torch.ones(10), fraction=0.35)
def test_the_largest_are_kept_and_of_equal_ones_the_first(values: Tensor, fraction: float) -> None:
    wanted = kept(len(values), fraction)
    assert 1 <= wanted <= len(values)
    assert wanted - 1 < fraction * len(values) <= wanted + 1e-6
    by_hand = sorted(sorted(range(len(values)), key=lambda place: (-abs(float(values[place])), place))[:wanted])
    assert largest(values, wanted).tolist() == by_hand


def test_a_tenth_of_ten_is_one_and_seven_tenths_seven() -> None:
    assert [kept(10, fraction) for fraction in (0.1, 0.7, 0.71)] == [1, 7, 8]
    assert kept(100, 0.07) == 7, "though 0.07 * 100 is a little more in floating point"
    assert (kept(0, 0.5), kept(1, 0.01)) == (0, 1)


@given(count=st.sampled_from([1, 7, 8, 9, 255, 256, 257, 65_536, 65_537, 100_000]), data=st.data())
@settings(max_examples=60)
def test_places_come_back_from_as_few_bytes_as_was_said(count: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(0, min(count, 300)) | st.just(count))
    drawn = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(count)[:wanted]
    places = torch.from_numpy(np.sort(drawn))
    sent = encode_places(places, count)
    item = 1 if count <= 256 else 2 if count <= 65_536 else 4
    assert len(sent) == places_size(count, wanted) == min(wanted * item, math.ceil(count / 8))
    assert torch.equal(decode_places(sent, count, wanted), places)


@pytest.mark.parametrize(
    ("count", "wanted", "sent"),
    [
        (1000, 2, [5, 0, 5, 0]),
        (1000, 2, [6, 0, 5, 0]),
        (1000, 2, [5, 0, 0xE8, 3]),
        (10, 2, [0b111, 0]),
        (10, 2, [0b1, 0]),
        (10, 2, [0b1, 0b100]),
    ],
    ids=["twice", "order", "range", "too many bits", "too few bits", "a bit beyond the last"],
)
def test_places_that_can_not_be_are_refused(count: int, wanted: int, sent: list[int]) -> None:
    with pytest.raises(UpdateRefused, match=f"expected {wanted} different places below {count}"):
        decode_places(torch.tensor(sent, dtype=torch.uint8), count, wanted)


# --- whole updates ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(tensors=updates(), choice=st.sampled_from(ALL))
def test_what_travels_has_the_size_that_was_said(tensors: Tensors, choice: CompressionConfig) -> None:
    transform = compression(choice)
    sent, _ = transform.on_client(Update(tensors, 1.0), task_of({}), {})
    expected = on_wire([transform], {name: torch.empty_like(value, device="meta") for name, value in tensors.items()})
    most, real = encoded_size(expected), encoded_size(sent.delta)
    assert real == len(encode_tensors(sent.delta))
    assert real <= most if choice.zstd else real == most
    came = decode_tensors(encode_tensors(sent.delta), expected)
    back = restored(replace(sent, delta=came), [transform], tensors).delta
    assert list(back) == list(tensors)
    assert digest(back) == digest(there_and_back(replace(choice, zstd=None), tensors)), "zstd loses nothing"
    if choice.top_k is None:
        for name, value in tensors.items():
            assert torch.equal(back[name].reshape(-1), through(choice, value.reshape(-1))), "each tensor by itself"


@given(tensors=updates())
def test_the_order_of_names_does_not_matter(tensors: Tensors) -> None:
    choice = CompressionConfig("int4", 3, 0.4)
    backwards = dict(reversed(tensors.items()))
    assert digest(coder(choice).encode(tensors)) == digest(coder(choice).encode(backwards))
    one = coder(choice)
    assert list(one.decode(one.encode(tensors), backwards)) == list(backwards)


def test_top_k_sends_values_of_the_largest_and_zeros() -> None:
    values = {"w": torch.tensor([[0.5, -9.0, 0.1], [2.0, 0.0, -1.0]])}
    back = there_and_back(CompressionConfig("float32", top_k=0.5), values)
    assert back["w"].tolist() == [[0.0, -9.0, 0.0], [2.0, 0.0, -1.0]]


def test_the_bytes_of_a_hundred_thousand_values() -> None:
    """Exact ratios to float32, without the header's 100 to 200 bytes: int8 in blocks of 64 is 17/64 of it."""
    plain = {"w": torch.empty(320, 320, device="meta")}

    def share(*choice: object) -> float:
        sent = coder(CompressionConfig(*choice)).on_wire(plain)  # type: ignore[arg-type]
        return sum(value.numel() * value.element_size() for value in sent.values()) / (4 * 320 * 320)  # type: ignore[union-attr]

    assert share("bf16") == 0.5
    assert share("int8") == 17 / 64
    assert share("int8") / share("bf16") == 0.53125, "half of bf16's bytes, and a scale for each 64 values"
    assert share("int4") == 9 / 64
    assert share("float32", 64, 0.1) == pytest.approx(0.1 + 1 / 32)
    assert share("int8", 64, 0.01) == pytest.approx(0.01 * (17 / 64 + 1), rel=1e-3), "places below 2**32 in 4 bytes"


def test_the_same_bytes_in_another_process() -> None:
    code = (
        "import torch, sys\n"
        "from flocktune.compression.transform import Coder, codec_of\n"
        "from flocktune.config.compression import CompressionConfig\n"
        "from flocktune.tensors import digest\n"
        "noise = torch.Generator().manual_seed(3)\n"
        "tensors = {name: torch.randn(37, 5, generator=noise) for name in 'ba'}\n"
        f"for choice in {ALL!r}:\n"
        "    coder = Coder(choice, codec_of(choice))\n"
        "    print(digest(coder.packed(coder.encode(tensors))))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    noise = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(37, 5, generator=noise) for name in "ba"}
    here = [digest(coder(choice).packed(coder(choice).encode(tensors))) for choice in ALL]
    assert there.stdout.split() == here
    assert len(set(here)) > len(ALL) / 2


# --- what a stranger may send ----------------------------------------------------------------------


def refusal(choice: CompressionConfig, delta: Tensors, expected: Tensors = START) -> str:
    with pytest.raises(UpdateRefused) as caught:
        restored(Update(delta, 1.0), [compression(choice)], expected)
    return str(caught.value)


def sent_of(choice: CompressionConfig) -> dict[str, Tensor]:
    update, _ = pull(task_of(START), {})
    return dict(compression(choice).on_client(update, task_of(START), {})[0].delta)


@pytest.mark.parametrize("zstd", [None, 3])
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_scales_that_are_none(scale: float, zstd: int | None) -> None:
    sent = sent_of(INT8)
    sent[SCALES][1] = scale
    words = "NaN or infinite" if not math.isfinite(scale) and zstd is None else "finite scales of at least 0"
    assert words in refusal(replace(INT8, zstd=zstd), {BYTES: pack(sent, 3)} if zstd else sent)


@pytest.mark.parametrize("format", LEVELS)
def test_a_code_that_is_none(format: str) -> None:
    choice = CompressionConfig(format)
    sent = sent_of(choice)
    sent[CODES][0] = 0
    assert "codes above 0" in refusal(choice, sent)


@pytest.mark.parametrize("choice", [CompressionConfig(format, top_k=0.5) for format in FORMATS])
def test_places_and_sizes_are_checked(choice: CompressionConfig) -> None:
    sent = sent_of(choice)
    assert "different places" in refusal(choice, {**sent, PLACES: torch.zeros_like(sent[PLACES])})
    for kind, value in sent.items():
        assert f"{kind}: expected shape" in refusal(choice, {**sent, kind: value[:-1]})
        assert f"{kind}: missing" in refusal(choice, {other: sent[other] for other in sent if other != kind})
    assert "more: not expected" in refusal(choice, {**sent, "more": torch.zeros(1)})


def test_values_that_are_not_finite_are_refused_behind_zstd() -> None:
    choice = CompressionConfig("bf16", zstd=3)
    values = torch.full((8,), math.nan, dtype=torch.bfloat16)
    assert "NaN" in refusal(choice, {BYTES: pack({VALUES: values}, 3)})


BIG = {"w": torch.zeros(4000)}
"""16,000 bytes."""


def bytes_tensor(sent: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(sent, np.uint8).copy())


def frame(size: int, **more: bool) -> bytes:
    """``size`` zeros."""
    return zstandard.ZstdCompressor(**more).compress(bytes(size))


def lying(size: int, claimed: int) -> bytes:
    """A frame of more bytes than its header says."""
    whole = frame(size)
    found = whole[:6] + claimed.to_bytes(4, "little") + whole[10:]  # magic, descriptor, window, size
    assert zstandard.frame_content_size(whole) == size
    assert zstandard.frame_content_size(found) == claimed
    return found


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"rubbish",
        frame(50_000_000, write_content_size=False),
        frame(16_000, write_content_size=False),
        frame(50_000_000),
        lying(50_000_000, 16_000),
        frame(15_999),
        frame(16_000) + b"more",
        frame(16_000) * 2,
        frame(16_000)[:-1],
    ],
    ids=[
        "nothing", "rubbish", "large, no size", "no size", "large", "a lie", "too few", "trailing", "two", "cut off"
    ],
)  # fmt: skip
def test_no_bytes_make_more_memory_than_was_expected(sent: bytes) -> None:
    tracemalloc.start()
    words = refusal(CompressionConfig("float32", zstd=3), {BYTES: bytes_tensor(sent)}, BIG)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "compression: expected a zstd frame" in words
    assert peak < 1_000_000


def test_more_bytes_than_the_tensors_have_are_not_looked_at() -> None:
    assert "at most 16000 bytes" in refusal(
        CompressionConfig("float32", zstd=3), {BYTES: torch.zeros(16_001, dtype=torch.uint8)}, BIG
    )
    with pytest.raises(UpdateRefused, match="at most"):
        decode_tensors(encode_tensors({BYTES: torch.zeros(16_001, dtype=torch.uint8)}), {BYTES: AtMost(16_000)})
    for other in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(UpdateRefused, match="at most"):
            decode_tensors(encode_tensors({BYTES: other}), {BYTES: AtMost(16_000)})
        assert "at most" in refusal(CompressionConfig("float32", zstd=3), {BYTES: other}, BIG)


@given(blob=st.binary(max_size=40))
def test_any_bytes_are_refused_or_have_the_expected_shapes(blob: bytes) -> None:
    expected = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.uint8)}
    try:
        found = unpack(bytes_tensor(blob), expected)
    except UpdateRefused:
        return
    assert len(blob) == 16
    assert {name: value.shape for name, value in found.items()} == {"a": (3,), "b": (2, 2)}


def test_what_zstd_does_not_make_smaller_goes_as_it_is() -> None:
    noise = {"w": torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(0)).byte()}
    assert len(pack(noise, 3)) == packed_size(noise).count == 1000
    assert digest(unpack(pack(noise, 3), noise)) == digest(noise)
    assert len(pack(BIG, 3)) < 100


def test_a_frame_as_long_as_what_it_stands_for_is_not_taken_for_it() -> None:
    even = 0
    for zeros in range(40):
        raw = torch.cat([torch.arange(30, dtype=torch.uint8), torch.zeros(zeros, dtype=torch.uint8)])
        even += len(zstandard.ZstdCompressor(level=3).compress(raw.numpy().tobytes())) == len(raw)
        assert digest(unpack(pack({"w": raw}, 3), {"w": raw})) == digest({"w": raw})
    assert even


# --- error feedback --------------------------------------------------------------------------------


def task_of(tensors: Tensors, round: int = 0, client: str = "a") -> ClientTask:
    return ClientTask(round, client, "toy", tensors, round, "")


LOSSY = [choice for choice in ALL if choice.lossy and choice.block != 5 and choice.zstd is None]


@pytest.mark.parametrize("choice", LOSSY, ids=str)
def test_all_that_was_sent_is_all_updates_but_the_last_residual(choice: CompressionConfig) -> None:
    noise = torch.Generator().manual_seed(1)
    transform, memory = compression(choice), dict[str, Tensor]()
    true = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in (("b", (9, 7)), ("a", ()))}
    came = {name: value.clone() for name, value in true.items()}
    largest_update = 0.0
    for round in range(12):
        update = {name: torch.randn(value.shape, generator=noise) for name, value in true.items()}
        sent, memory = transform.on_client(Update(update, 1.0), task_of({}, round), memory)
        back = transform.on_server(sent, true).delta
        for name in true:
            true[name] += update[name].double()
            came[name] += back[name].double()
        largest_update = max(largest_update, *(float(value.abs().max()) for value in update.values()))
    for name in true:
        torch.testing.assert_close(came[name] + memory[name].double(), true[name], rtol=0, atol=2e-5)
    assert {value.dtype for value in memory.values()} == {torch.float32}
    if choice.top_k is None:
        assert all(float(value.abs().max()) < largest_update for value in memory.values()), "it does not grow"


def test_without_error_feedback_a_value_below_half_a_step_never_arrives() -> None:
    update = Update({"w": torch.tensor([127.0, 0.4])}, 1.0)
    for feedback, wanted in ((False, 0.0), (True, 40.0)):
        transform, memory = compression(replace(INT8, error_feedback=feedback)), dict[str, Tensor]()
        total = 0.0
        for _ in range(100):
            sent, memory = transform.on_client(update, task_of({}), memory)
            total += float(transform.on_server(sent, update.delta).delta["w"][1])
        assert total == pytest.approx(wanted, abs=0.6)
        assert bool(memory) == feedback


def test_the_first_round_of_a_client_is_plain() -> None:
    update, _ = pull(task_of(START), {})
    with_memory, _ = compression(INT8).on_client(update, task_of(START), {})
    without, _ = compression(replace(INT8, error_feedback=False)).on_client(update, task_of(START), {})
    assert digest(with_memory.delta) == digest(without.delta)


def test_a_residual_stays_with_names_that_a_round_leaves_out() -> None:
    """As when A and B are trained in turn."""
    transform = compression(CompressionConfig("int4"))
    first, second = ({name: torch.tensor([1.0, 0.3])} for name in "AB")
    _, memory = transform.on_client(Update(first, 1.0), task_of({}), {})
    _, after = transform.on_client(Update(second, 1.0), task_of({}), memory)
    assert torch.equal(after["A"], memory["A"])
    assert after.keys() == {"A", "B"}
    assert float(after["A"][1]) != 0


def test_a_residual_of_another_shape_is_dropped() -> None:
    transform = compression(CompressionConfig("int4"))
    sent, memory = transform.on_client(Update({"w": torch.ones(2)}, 1.0), task_of({}), {"w": torch.full((3,), 9.0)})
    assert torch.equal(transform.on_server(sent, {"w": torch.ones(2)}).delta["w"], torch.ones(2))
    assert memory["w"].shape == (2,)


def test_a_format_that_loses_nothing_keeps_nothing() -> None:
    _, memory = compression(CompressionConfig("float32", zstd=3)).on_client(
        Update({"w": torch.randn(5)}, 1.0), task_of({}), {}
    )
    assert memory == {}


@pytest.mark.parametrize("choice", [INT8, CompressionConfig("bf16"), CompressionConfig("float32", top_k=0.5)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_client_says_what_is_wrong_and_its_memory_stays(bad: float, choice: CompressionConfig) -> None:
    half = transformed(
        lambda task, memory: (Update({"w": torch.tensor([bad, 1.0])}, 1.0), memory), [compression(choice)]
    )
    engine = InProcess(half, {"a": {"compression/w": torch.tensor([0.25, 0.5])}})
    (reply,) = engine.run([task_of({})], 1)
    assert isinstance(reply, Failure)
    assert "expected finite values" in reply.reason
    assert engine.memories["a"]["compression/w"].tolist() == [0.25, 0.5]


# --- rounds ----------------------------------------------------------------------------------------


def looped(
    choice: CompressionConfig | None, engine: Engine | None = None, rounds: int = 4
) -> tuple[Tensors, list[RoundRecord]]:
    transforms = [compression(choice)] if choice else []
    server, records = fedavg.server_half(AggregationConfig()), list[RoundRecord]()
    state = run_rounds(
        server,
        engine or InProcess(transformed(pull, transforms)),
        lambda number: Cohort(CLIENTS, 4, 4),
        server.init(START),
        rounds=rounds,
        kind="toy",
        seed=7,
        transforms=transforms,
        hooks=Hooks(on_round=lambda record, state: records.append(record)),
    )
    return server.result(state), records


def linked(choice: CompressionConfig) -> Remote:
    """The engine over a link in memory; its clients keep what they remember."""
    transforms = [compression(choice)]
    memories: dict[str, Memory] = {}
    half = transformed(pull, transforms)

    def remembering(task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        update, memories[task.client] = half(task, memories.get(task.client, {}))
        return update, {}

    link = FakeLink(CLIENTS, Time(), lambda parcel, nth: Act(takes_s=1.0 + nth % 3), half=remembering)
    return remote(link, returned=lambda task: on_wire(transforms, task.tensors))


@pytest.mark.parametrize("choice", [replace(one, zstd=zstd) for one in LOSSY[::5] for zstd in (None, 3)], ids=str)
def test_over_the_wire_as_in_one_process(choice: CompressionConfig) -> None:
    here, records = looped(choice)
    there, received = looped(choice, linked(choice))
    assert digest(here) == digest(there)
    assert [record.bytes_up for record in records] == [record.bytes_up for record in received]
    _, without = looped(None)
    assert {record.bytes_plain for record in records} == {record.bytes_up for record in without}
    assert all(record.bytes_plain == 0 for record in without)


def test_a_client_that_does_not_compress_is_left_out_of_a_run_that_does() -> None:
    link = FakeLink(CLIENTS, Time())
    with pytest.raises(RoundFailed, match=r"codes: missing|message refused"):
        looped(INT8, remote(link, returned=lambda task: on_wire([compression(INT8)], task.tensors)), rounds=1)


def test_an_update_may_be_larger_than_its_task() -> None:
    """What is taken into memory for a reply follows from what is expected of it."""
    many = {"w": torch.zeros(500_000)}
    half = lambda task, memory: (Update(many, 1.0), memory)  # noqa: E731
    engine = remote(FakeLink(("a",), Time(), half=half), returned=lambda task: many)
    (reply,) = engine.run([task_of(START)], 1)
    assert isinstance(reply, Update)


def test_buffered_rounds_are_compressed_and_go_on_where_they_were_cut() -> None:
    transforms = [compression(CompressionConfig("int4"))]
    server, records = fedavg.server_half(AggregationConfig()), list[RoundRecord]()

    def run(engine: InProcess, state: Tensors, first: int, last: int) -> Tensors:
        return run_buffered(
            server, engine, CLIENTS, Buffered(2, 3), state, first_round=first, rounds=last, kind="toy", seed=3,
            transforms=transforms, hooks=Hooks(on_round=lambda record, state: records.append(record)),
        )  # fmt: skip

    engine = InProcess(transformed(pull, transforms))
    whole = run(engine, server.init(START), 0, 6)
    first = InProcess(transformed(pull, transforms))
    half_way = run(first, server.init(START), 0, 3)
    second = InProcess(transformed(pull, transforms), dict(first.memories))
    assert digest(run(second, half_way, 3, 6)) == digest(whole)
    assert all(record.bytes_up > 0 and record.bytes_plain for record in records)
    assert set(engine.memories) <= set(CLIENTS)
    assert all(key.startswith("compression/") for memory in engine.memories.values() for key in memory)


def test_quantised_rounds_end_near_the_plain_ones() -> None:
    plain, _ = looped(None, rounds=12)

    def distance(choice: CompressionConfig) -> float:
        ended, _ = looped(choice, rounds=12)
        return max(float((ended[name] - plain[name]).abs().max()) for name in plain)

    assert distance(INT8) < 0.01
    assert distance(CompressionConfig("int4")) < 0.1


# --- recipes, and whole runs -----------------------------------------------------------------------


@pytest.fixture
def config(world: World) -> RunConfig:
    return load_recipe(world.recipe)


@pytest.mark.parametrize(
    "choice", [INT8, CompressionConfig("int4", 32, 0.1), CompressionConfig("bf16", zstd=3)], ids=str
)
def test_the_estimate_counts_what_a_run_sends(config: RunConfig, tmp_path: Path, choice: CompressionConfig) -> None:
    config = replace(config, compression=choice)
    costs, summary = estimate(config), api.run(config, tmp_path / "run")
    if choice.zstd is None:
        assert summary["bytes_up"] == 3 * costs.round_bytes_up
    else:
        assert 0.5 * 3 * costs.round_bytes_up < summary["bytes_up"] < 3 * costs.round_bytes_up
    assert costs.up_at_most == (choice.zstd is not None)
    assert ("at most" in shown(costs)) == costs.up_at_most
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    assert {event["bytes_plain"] for event in rounds} == {event["bytes_down"] for event in rounds}
    share = f"({100 * summary['bytes_up'] / summary['bytes_down']:.1f} % of their size in float32)"
    assert unbroken(share) in write_report(tmp_path / "run").read_text()


def shown(costs: Estimate) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(estimate_table(costs))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    """What clients hold back is in the checkpoint: without it the next round would send something else."""
    config = replace(config, compression=CompressionConfig("int4", top_k=0.2))
    whole, stop = api.run(config, tmp_path / "whole"), threading.Event()

    class Watcher:
        def on_event(self, event: Mapping[str, object]) -> None:
            if event["event"] == "round" and event["round"] == 0:
                stop.set()

        def on_client(self, done: int, total: int, client: str) -> None: ...

    create_run(config, tmp_path / "cut")
    with pytest.raises(Stopped):
        execute(tmp_path / "cut", listeners=[Watcher()], stop=stop)
    assert execute(tmp_path / "cut")["adapter_sha256"] == whole["adapter_sha256"]
    plain = api.run(replace(config, compression=replace(config.compression, error_feedback=False)), tmp_path / "plain")
    assert plain["adapter_sha256"] != whole["adapter_sha256"]


def test_baselines_send_nothing_and_compress_nothing(config: RunConfig) -> None:
    compressed = replace(config, compression=INT8)
    assert [one.name for one in transforms_of(compressed)] == ["compression"]
    assert transforms_of(replace(compressed, method="local")) == ()
    assert transforms_of(config) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("compression: {format: int3}", "compression.format: expected 'float32', 'bf16', 'int8' or 'int4'"),
        ("compression: {block: 0}", "compression.block: expected at least 1"),
        ("compression: {top_k: 0}", "compression.top_k: expected more than 0"),
        ("compression: {zstd: 23}", "compression.zstd: expected at most 22"),
        ("compression: {blocks: 3}", "Did you mean"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    assert words in str(caught.value)


def test_a_missing_library_is_named_before_anything_runs(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"compression\.zstd: .*pip install 'flocktune\[compression\]'"):
        estimate(replace(config, compression=CompressionConfig(zstd=3)))
    estimate(replace(config, compression=INT8))
