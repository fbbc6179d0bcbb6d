"""Every benchmark runs in its quick form and compares equal work. No test looks at a time."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flocktune.config.schema import Columns, LoraConfig
from flocktune.data.batching import collate
from flocktune.data.encoding import encode
from flocktune.data.sources import read_examples
from flocktune.models.lora import attach
from flocktune.training import next_token_loss
from flocktune.types import ClientTask
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "grey", "black", "white")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("FLOCKTUNE_CACHE", str(tmp_path / "cache"))
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and 60 rows, which byte tokens bring to some 60 tokens each."""
    folder = tmp_path_factory.mktemp("world")
    rows = [
        {
            "instruction": f"Name colour {number}" + "!" * (number % 7),
            "context": "On a flag." if number % 3 else "",
            "response": COLOURS[number % len(COLOURS)],
            "category": ("flag", "sky")[number % 2],
        }
        for number in range(60)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return save_tiny(folder / "model"), data


@pytest.fixture
def measured(world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*names: str, fails: str = "") -> tuple[dict[str, Any], str]:
        model, data = world
        place = tmp_path / "results.json"
        main = importlib.import_module("benchmarks.__main__").main
        code = main([*names, "--quick", "--model", str(model), "--data", str(data), "--json", str(place)])
        found = json.loads(place.read_text(encoding="utf-8"))
        assert code == (1 if fails else 0)
        assert fails in found["failed"].get(names[0], "")
        return found["results"].get(names[0], found["results"]), capsys.readouterr().out

    return run


def test_overhead_compares_the_same_work(measured: Any) -> None:
    result, page = measured("overhead")
    assert result["values"]["difference"] <= 1e-5
    assert [row[0] for row in result["rows"]] == ["bare loop", "flocktune"]
    assert len(result["values"]["seconds"]["flocktune"]) == 2
    assert "QUICK" in page
    assert "not judged" in page


def test_generation_answers_alike_in_every_way(measured: Any) -> None:
    result, _ = measured("generation")
    assert min(result["values"]["same"].values()) == 1.0
    assert [row[0] for row in result["rows"]][-1] == "without a cache"


def test_generation_refuses_other_answers(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = importlib.import_module("benchmarks.generation")
    monkeypatch.setattr(generation, "_without_cache", lambda model, tokenizer, prompts, new: [[] for _ in prompts])
    measured("generation", fails="do not answer alike")


def test_overhead_refuses_other_work(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = importlib.import_module("benchmarks.overhead")
    monkeypatch.setattr(overhead, "bare_loop", lambda fed, plan: fed.start)
    measured("overhead", fails="same work")


def test_every_variant_trains_alike(measured: Any) -> None:
    result, page = measured("alternative")
    losses = result["values"]["losses"]
    values = list(losses.values())
    shuffled, grouped, packed = values[1:6], values[6:9], values[9:11]
    for alike in (shuffled, grouped, packed):
        assert alike == pytest.approx([alike[0]] * len(alike), abs=1e-4)
    assert losses["start"] - max(shuffled + grouped + packed) > 1e-2  # so that equal does not mean untrained
    assert page.count("\n| ") == len(result["rows"]) + 2 + 3  # and the summary
    assert len(result["rows"]) == 12


def test_aggregation_is_that_of_a_round_and_its_peaks_those_of_processes_of_their_own(measured: Any) -> None:
    result, _ = measured("aggregate")
    peaks = result["values"]["peak_bytes"]
    assert list(peaks) == [f"{clients} clients, diagnostics over {kept}" for kept in (0, 10) for clients in (10, 20)]
    adapter_bytes = 4 * 2 * 8 * 4096 * 4
    assert all(3 * adapter_bytes < peak for peak in peaks.values())  # an update, the mean, what they lead to
    assert [row[0] for row in result["rows"][:3]] == ["adding up", "reading into one buffer", "aggregating"]


def test_what_is_aggregated_is_what_the_files_hold(tmp_path: Path) -> None:
    aggregate = importlib.import_module("benchmarks.aggregate")
    case = aggregate.Case(3, modules=1, width=16, files=3)
    files = aggregate.write_updates(tmp_path, case)
    engine = aggregate.Mapped(aggregate.start(case), files)
    task = ClientTask(0, "", "", {}, 0, "")
    for number, update in enumerate(engine.run([task] * 3, 3)):
        want = aggregate.start(case, seed=1 + number)
        assert all(torch.equal(update.delta[name], value) for name, value in want.items())


def test_a_start_is_measured_to_the_end_of_the_first_step(measured: Any) -> None:
    result, page = measured("start")
    assert [len(spent) for spent in result["values"]["seconds"].values()] == [1] * 5
    processor = list(result["values"]["processor"].values())
    assert 0 < processor[0] < processor[1] < min(processor[2:]), "who imports torch takes ten times as long"
    assert set(result["values"]["times_floor"]) == {
        "flocktune --help", "first step, tokens kept", "first step, nothing kept"
    }  # fmt: skip
    assert "not judged" in page


def test_a_run_that_never_takes_a_step_is_said(tmp_path: Path) -> None:
    start = importlib.import_module("benchmarks.start")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RuntimeError, match="ended before its first round"):
        start.first_step(tmp_path / "recipe.json", tmp_path / "recipe.json", tmp_path)


def test_a_clients_cost_is_that_of_the_products_own_clients(measured: Any) -> None:
    result, page = measured("client_cost")
    found = result["values"]["6"]
    assert found["difference"] <= 1e-3
    passes = {
        name: (each["expected_forward"], round(each["forward"], 9)) for name, each in found["passes"].items()
    }  # backward passes of so small a model are mostly attention's, which the rule does not know
    assert passes == {"FedIT": (6, 6), "FedBiOT, first epoch": (4, 4), "FedBiOT, later epochs": (2, 2)}
    assert {name: len(each) for name, each in found["seconds"].items()} == dict.fromkeys([*passes, "bare loop"], 1)
    (down, up), (fedit_down, fedit_up) = found["sent"]["FedBiOT, first epoch"], found["sent"]["FedIT"]
    assert up < down < fedit_down == fedit_up
    assert set(found["peaks"]) == {"FedIT", "FedBiOT, first epoch"}
    assert "6 layers: bare loop" in page
    assert "not judged" in page


def test_a_clients_cost_is_not_compared_with_other_work(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = importlib.import_module("benchmarks.client_cost")
    real = cost.bare_loop
    monkeypatch.setattr(cost, "bare_loop", lambda *call: {name: 1.1 * value for name, value in real(*call).items()})
    measured("client_cost", fails="same work")


def test_secure_aggregation_gives_the_same_mean_as_what_it_is_compared_with(measured: Any) -> None:
    result, page = measured("secure_aggregation")
    assert result["values"]["difference"] <= 1e-6
    cases = result["values"]["cases"]
    assert list(cases) == [f"4 x 0.01 MB, {way}" for way in ("plain", "secure", "secure, 10 % lost")]
    plain, masked, _ = cases.values()
    assert masked["up_mb"] > plain["up_mb"] > 0.009
    assert "QUICK" in page


def test_a_step_of_lora_is_peft_s_own(measured: Any) -> None:
    result, page = measured("lora_step")
    cases = result["values"]
    assert list(cases) == ["model, 1 x T", "model, 4 x T", "random, 2 x 32, 2 x 16"]
    for each in cases.values():
        assert each["difference"] <= 1e-5
        assert each["flops"]["ours"] > each["flops"]["floor"]
        assert each["profiles"]["ours"]["operations"] > each["profiles"]["floor"]["operations"] > 0
        assert list(each["seconds"]) == ["PEFT", "ours", "floor", "full training"]
    assert "Floor: " in page


def test_a_step_of_lora_is_not_compared_with_other_numbers(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = importlib.import_module("flocktune.models.lora_module")
    monkeypatch.setattr(lora, "scale", lambda settings: 1.01 * settings.alpha / settings.rank)
    measured("lora_step", fails="not the same numbers")


def test_packed_rows_are_the_padded_ones(measured: Any) -> None:
    result, _ = measured("packing")
    cases = result["values"]
    assert list(cases) == [
        f"model, {dtype}, {mix}" for dtype in ("float32", "bfloat16") for mix in ("shuffled", "length-grouped")
    ]
    for each in cases.values():
        assert list(each["seconds"]) == list(each["losses"]) == ["padded", "packed, one mask", "packed, row by row"]
    assert cases["model, float32, shuffled"]["share"] > cases["model, float32, length-grouped"]["share"] > 1


def test_packed_rows_that_see_each_other_are_not_measured(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packing = importlib.import_module("benchmarks.packing")
    real = packing.collate

    def blind(*args: Any, **known: Any) -> Any:
        batch = real(*args, **known)
        return replace(batch, position_ids=None)

    monkeypatch.setattr(packing, "collate", blind)
    measured("packing", fails="did not train alike")


def test_a_benchmark_that_fails_ends_no_other(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = importlib.import_module("benchmarks.alternative")
    monkeypatch.setattr(broken, "run", lambda options: 1 / 0)
    results, page = measured("alternative", "secure_aggregation", fails="ZeroDivisionError")
    assert list(results) == ["secure_aggregation"]
    summary = page.partition("### Goals")[2].splitlines()
    assert summary[4].startswith("| secure_aggregation | the same mean within ")
    assert summary[4].endswith("| not judged |")
    assert summary[5] == "| alternative |  |  | FAILED: ZeroDivisionError: division by zero |"


def test_what_needs_a_gpu_runs_on_a_tiny_model(measured: Any) -> None:
    results, _ = measured("gpu")
    assert list(results) == ["gpu: utilisation", "gpu: stacked", "gpu: FedBiOT"]
    used, stacked, biot = (result["values"] for result in results.values())
    assert list(used["seconds"]) == ["PEFT", "ours", "the frozen base alone"]
    assert (
        0
        < used["used"]["ours"]
        == pytest.approx(used["flops"] / used["seconds"]["ours"][0] / max(used["peaks"].values()))
    )
    assert stacked["difference"] <= 1e-3
    assert biot["passes"] == {"FedIT": 8, "FedBiOT, first epoch": 5, "FedBiOT, later epochs": 4}
    assert biot["memory"]["FedBiOT, first epoch"] < biot["memory"]["FedIT"]
    assert all(len(each) == 1 for each in biot["seconds"].values())


def test_without_a_gpu_nothing_of_it_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module("benchmarks.__main__").main(["gpu"]) == 0
    assert capsys.readouterr().out.count("not run: no GPU is here") == 6


def test_the_least_operations_of_a_step_are_those_that_are_counted() -> None:
    models, networks = (importlib.import_module(f"benchmarks.{name}") for name in ("gpu.models", "networks"))
    place = models.Place(models.TINY, torch.device("cpu"), torch.float32, True)
    shape, rows = place.shape, 20
    usual = networks.peft_network(place.model(), LoraConfig(rank=shape.rank), place.attached(place.model()).tensors())
    batch = collate(place.rows([rows]), [0], batching="padded", pad_id=0)
    with FlopCounterMode(display=False) as counter:
        next_token_loss(usual.model, batch).backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 12 * rows * (rows + 1) // 2 * shape.width * shape.layers
    assert shape.step_flops([rows], len(batch.targets)) == products + attention


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    with pytest.raises(SystemExit, match="2"):
        main(["speed"])
    said = capsys.readouterr().err
    assert "expected start, overhead, lora_step" in said
    assert "got speed" in said


def test_turns_alternate_and_the_first_is_left_out() -> None:
    paired = importlib.import_module("benchmarks.paired")
    calls: list[str] = []

    def measure(name: str, seconds: float) -> Any:
        return lambda turn: calls.append(name) or seconds * (turn + 1)

    seconds = paired.interleaved({"a": measure("a", 1.0), "b": measure("b", 2.0)}, 2)
    assert "".join(calls) == "abbaab"
    assert seconds == {"a": [2.0, 3.0], "b": [4.0, 6.0]}
    assert paired.ratio([1.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == paired.Spread(1.0, 2.0, 3.0)


def test_a_missed_goal_is_said() -> None:
    paired = importlib.import_module("benchmarks.paired")
    result = paired.Result("Title", "fast", False, ("", "s"), [("a", "1")], ("Note.",))
    table = ["|  | s |", "| --- | ---: |", "| a | 1 |"]
    assert result.markdown().splitlines()[2:] == [*table, "", "Note.", "Goal, fast: MISSED."]


def test_both_ways_of_tokenising_agree(world: tuple[Path, Path]) -> None:
    ladder = importlib.import_module("benchmarks.ladder")
    tokenizer = tiny_tokenizer()
    examples = read_examples(str(world[1]), Columns())
    encoded, _ = encode(examples, tokenizer, template="short", max_tokens=512, train_on="responses")
    for row, example in enumerate(examples):
        usual = ladder.usual_tokens(tokenizer, **ladder.prompt_and_answer(example))
        assert usual == ladder.cached_row(encoded, row)
    batch = collate(encoded, np.arange(5), batching="padded", pad_id=2)
    for row, labels in enumerate(ladder.labels_of(batch).tolist()):
        wanted = ladder.cached_row(encoded, row)["labels"]
        assert labels == wanted + [ladder.IGNORED] * (len(labels) - len(wanted))


def test_names_go_to_peft_and_back() -> None:
    networks = importlib.import_module("benchmarks.networks")
    lora = LoraConfig(rank=2)
    start = attach(tiny_model("llama"), lora, seed=3).tensors()
    network = networks.peft_network(tiny_model("llama"), lora, start)
    network.write(networks.peft_names(start))
    back = networks.own_names(network.read())
    assert back.keys() == start.keys()
    assert all(torch.equal(back[name], value) for name, value in start.items())
    assert len(network.trained) == len(start)
