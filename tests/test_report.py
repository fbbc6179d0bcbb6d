"""The log, the tables, the live view and the HTML report, on made-up runs that look like real ones."""

from __future__ import annotations

import io
import json
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flocktune.errors import UserError
from flocktune.report import charts, curves, emulator, grids, svg, tables
from flocktune.report.cost import seconds_of
from flocktune.report.events import EventLog, read_events, truncate_after
from flocktune.report.glance import at_a_glance
from flocktune.report.html import write_holdings, write_report
from flocktune.report.live import LiveView
from flocktune.report.outcome import headline, verdict, what_was_run
from flocktune.report.page import unbroken
from flocktune.report.runs import load_experiment, load_run
from flocktune.report.summaries import Value, combine_seeds, datasets, metric, plug_in_gap
from flocktune.report.taking_part import client_grid, parts_of
from flocktune.report.trackers import Trackers

CATEGORIES = ["brainstorming", "classification", "closed_qa", "creative_writing", "general_qa",
              "information_extraction", "open_qa", "summarization"]  # fmt: skip
QUALITY = {"base": 0.08, "local_1": 0.34, "local_2": 0.41, "local_3": 0.37, "fedit": 0.62, "centralised": 0.69}
PLUGGED, EMULATED = 0.55, 0.38  # FedBiOT: the adapter on the full model, and on the emulator


# --- a made-up federation ---------------------------------------------------------------------------


def scores_at(quality: float, checked: bool, noise: random.Random) -> dict[str, float]:
    loss = 4.9 - 3.2 * quality + noise.uniform(-0.03, 0.03)
    found = {"loss": loss, "perplexity": 2.718281828**loss, "exact_match": quality * 0.7, "contains": quality * 0.8,
             "rouge_l": min(1.0, quality * 0.9 + 0.05), "rows": 80}  # fmt: skip
    return {**found, "checked": quality} if checked else found


def evaluation_at(done: int, quality: float, checked: bool, noise: random.Random) -> dict:
    by_category = {
        name: {**scores_at(min(0.98, max(0.0, quality + noise.gauss(0, 0.12))), checked, noise), "rows": 10}
        for name in CATEGORIES
    }
    return {"event": "evaluation", "round": done, "time": 1.795e9 + 14 * done, "dataset": "test",
            "overall": scores_at(quality, checked, noise), "categories": by_category, "seconds": 3.2}  # fmt: skip


def write_run(
    folder: Path,
    method: str = "fedit",
    *,
    seed: int = 0,
    rounds: int = 20,
    done: int | None = None,
    clients: int = 10,
    checked: bool = True,
) -> dict:
    """A run folder as the engine leaves it; ``done`` below ``rounds`` is a run that was killed."""
    folder.mkdir(parents=True)
    noise = random.Random(f"{method}{seed}")
    log = EventLog(folder / "metrics.jsonl")
    federated = method in ("fedit", "fedbiot")
    rounds = 0 if method == "base" else rounds
    done = rounds if done is None else done
    names = [f"client-{number}" for number in range(1, clients + 1)]
    held = {n: {c: int(noise.paretovariate(0.9) * 9) for c in CATEGORIES if noise.random() < 0.45} for n in names}
    log.append(
        {
            "event": "run_start",
            "time": 1.795e9,
            "name": "dolly, uneven",
            "method": method.split("_")[0],
            "seed": seed,
            "rounds": rounds,
            "test": dict.fromkeys(CATEGORIES, 10),
            "trainable_parameters": 0 if method == "base" else 491520,
            "clients": {
                n: {"rows": sum(h.values()), "tokens": 97 * sum(h.values()), "categories": h} for n, h in held.items()
            },
            "heterogeneity": {"mean_js_distance": 0.412, "mean_entropy": 1.02},
            "model": "english-7m",
            "device": "cpu",
            "versions": {"python": "3.11.7", "flocktune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        }
    )
    final = QUALITY.get(method, PLUGGED) + noise.uniform(-0.02, 0.02)
    log.append(evaluation_at(0, QUALITY["base"], checked, noise))
    for number in range(done):
        share = 1 - 0.8 ** (number + 1)
        chosen = sorted(noise.sample(names, max(1, clients // 2))) if federated else names[:1]
        broken = [n for n in chosen if noise.random() < 0.06] if len(chosen) > 1 else []
        log.append(
            {
                "event": "round",
                "round": number,
                "time": 1.795e9 + 14 * number + 13,
                "selected": chosen,
                "answered": [n for n in chosen if n not in broken],
                "failures": [{"client": n, "reason": "the connection was lost after 30 s"} for n in broken],
                "train_loss": 4.8 - 3.1 * share * final + noise.uniform(-0.05, 0.05),
                "clients": {n: {"loss": 3.0, "weight": 40, "tokens": 4100, "seconds": 2.1} for n in chosen},
                "update_norm": 2.4 * 0.9**number,
                "aggregation_error": 0.21 * 0.93**number if federated else None,
                "bytes_down": 1_980_000 * len(chosen),
                "bytes_up": 1_980_000 * len(chosen),
                "tokens": 4100 * len(chosen),
                "seconds": {
                    "forward_backward": 9.5 + noise.random(),
                    "aggregate": 0.08,
                    "save": 0.05,
                    "evaluate": 3.2 if number % 4 == 3 else 0.0,
                },
            }
        )
        if number % 4 == 3:
            log.append(evaluation_at(number + 1, QUALITY["base"] + (final - QUALITY["base"]) * share, checked, noise))
    (folder / "recipe.yaml").write_text(f"name: dolly, uneven\nmethod: {method}\nrounds: {rounds}\nlora:\n  rank: 8\n")
    words = ["A bus.", "The 3 oldest towns <by age>.", "Blue", "I do not know."]
    rows = [
        {
            "category": c,
            "instruction": f"Which of these is a {c.replace('_', ' ')} thing: bus, train, swan?",
            "context": "",
            "reference": "A bus <sic>.",
            "answer": words[0] if noise.random() < final else noise.choice(words[1:]),
            "scores": {
                "exact_match": 1.0,
                "rouge_l": 0.5,
                **({"checked": 1.0} if noise.random() < final else {"checked": 0.0}),
            },
        }
        for c in CATEGORIES
        for _ in range(2)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = [event for event in read_events(folder / "metrics.jsonl") if event["event"] == "evaluation"][-1]
    logged = [event for event in read_events(folder / "metrics.jsonl") if event["event"] == "round"]
    summary = {
        "method": method.split("_")[0],
        "seed": seed,
        "rounds": done,
        "adapter_sha256": "ab" * 32,
        "metrics": {"test": {"overall": evaluated["overall"], "categories": evaluated["categories"]}},
        "bytes_up": sum(e["bytes_up"] for e in logged),
        "bytes_down": sum(e["bytes_down"] for e in logged),
        "seconds": 12.5 * done + 3,
        "peak_memory_bytes": 412_000_000,
        "trainable_parameters": 491520,
        **({"client": f"client-{method[-1]}"} if method.startswith("local") else {}),
    }
    if done == rounds:
        log.append({"event": "run_end", "time": 1.795e9 + 300, "summary": summary})
        (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def write_fedbiot(folder: Path, *, seed: int = 0, rounds: int = 8, done: int | None = None) -> dict:
    """A run of FedBiOT as the engine leaves it: as FedIT's, with an emulator, its alignments and its evaluations."""
    done = rounds if done is None else done
    summary = write_run(folder, "fedbiot", seed=seed, rounds=rounds, done=done)
    noise, log, told = random.Random(seed), folder / "metrics.jsonl", []
    for event in read_events(log):
        number = event.get("round", 0)
        if event["event"] == "run_start":
            event["emulator"] = {
                "layers": 5, "full_layers": 8, "adapter": [6, 7], "kept": [0, 2, 5], "dropped": [1, 3, 4],
                "drop": 0.5, "placement": "last", "bytes": 5_000_000, "parameters": 2_500_000,
                "full_parameters": 3_790_000, "digest": "0f" * 32,
            }  # fmt: skip
        if event["event"] == "round":
            event["seconds"]["align"] = 1.5
            before, after = (3.9 if number == 0 else 0.3 + 0.02 * number), 0.12 + 0.01 * number
            told.append({"event": "alignment", "round": number, "steps": 200 if number == 0 else 10, "loss_first": 1.0,
                         "loss_last": 0.5, "seconds": 1.5, "time": event["time"] - 13,
                         "fidelity": {"public": {"before": before, "after": after},
                                      "held_out": {"before": before + 0.1, "after": after + 0.09}}})  # fmt: skip
        told.append(event)
        if event["event"] == "evaluation":
            event["dataset"] = "held_out"
            quality = QUALITY["base"] / 2 + (EMULATED - QUALITY["base"] / 2) * number / rounds
            told.append({**evaluation_at(number, quality, True, noise), "dataset": "held_out_emulator"})
        if event["event"] == "run_end":
            told.pop()
    latest = {event["dataset"]: event for event in told if event["event"] == "evaluation"}
    metrics = {n: {"overall": e["overall"], "categories": e["categories"]} for n, e in latest.items()}
    asked = {client for event in told if event["event"] == "round" for client in event["selected"]}
    summary = {**summary, "method": "fedbiot", "metrics": metrics, "bytes_emulator": 5_000_000 * len(asked),
               "client_cost": {"flops_per_step": 1.25e9, "activation_bytes": 3_400_000}}  # fmt: skip
    log.write_text("".join(json.dumps(event) + "\n" for event in told))
    if done == rounds:
        EventLog(log).append({"event": "run_end", "summary": summary})
        (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def write_plugged(folder: Path, seeds: int = 1) -> dict:
    """A comparison of FedBiOT with base, FedIT on the full model and centralised."""
    found: dict[str, list[dict]] = {}
    for seed in range(seeds):
        home = folder if seeds == 1 else folder / f"seed-{seed}"
        found.setdefault("fedbiot", []).append(write_fedbiot(home / "fedbiot", seed=seed))
        for method in ("centralised", "base", "fedit"):
            summary = write_run(home / method, method, seed=seed, rounds=8)
            log, written = home / method / "metrics.jsonl", home / method / "summary.json"
            log.write_text(log.read_text().replace('"dataset": "test"', '"dataset": "held_out"'))
            summary["metrics"] = {"held_out": summary["metrics"]["test"]}
            summary["client_cost"] = {"flops_per_step": 2.5e9, "activation_bytes": None} if method == "fedit" else None
            written.write_text(json.dumps(summary))
            found.setdefault(method, []).append(summary)
    whole = {method: combine_seeds(summaries) for method, summaries in found.items()}
    (folder / "summary.json").write_text(json.dumps(whole))
    return whole


def write_comparison(folder: Path, seeds: int = 1, checked: bool = True) -> dict:
    """A comparison folder of every method."""
    found: dict[str, list[dict]] = {}
    for seed in range(seeds):
        home = folder if seeds == 1 else folder / f"seed-{seed}"
        for method in QUALITY:
            found.setdefault(method, []).append(write_run(home / method, method, seed=seed, checked=checked))
    whole = {method: combine_seeds(summaries) for method, summaries in found.items()}
    (folder / "summary.json").write_text(json.dumps(whole))
    (folder / "recipe.yaml").write_text("name: dolly, uneven\nrounds: 20\n")
    return whole


# --- the log ------------------------------------------------------------------------------------------


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "metrics.jsonl")
    clients = {"Zoë\u2028": {"loss": float("inf")}}
    log.append({"event": "round", "round": 0, "train_loss": float("nan"), "clients": clients})
    log.append({"event": "run_end", "summary": {}})
    assert read_events(log.path) == [
        {"event": "round", "round": 0, "train_loss": None, "clients": {"Zoë\u2028": {"loss": None}}},
        {"event": "run_end", "summary": {}},
    ]


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(min_value=0))
def test_a_log_torn_anywhere_keeps_every_whole_line_and_can_be_continued(cut: int, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    log = EventLog(path)
    for number in range(3):
        log.append({"event": "round", "round": number})
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    whole = path.read_bytes().count(b"\n")
    assert [event["round"] for event in read_events(path)] == list(range(whole))
    EventLog(path).append({"event": "resumed", "round": whole})
    assert [event["round"] for event in read_events(path)] == [*range(whole), whole]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "run_start"}\n{"event": "rou\n{"event": "round"}\n{"event": "round", "round": 1}\n')
    with pytest.raises(UserError) as caught:
        read_events(path)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:2", f"{path}:3"]


def test_truncating_forgets_later_rounds_and_what_belongs_to_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = EventLog(path)
    log.append({"event": "run_start"})
    log.append({"event": "evaluation", "round": 0})
    for number in range(4):
        log.append({"event": "round", "round": number})
        log.append({"event": "evaluation", "round": number + 1})
    log.append({"event": "resumed", "round": 2})
    log.append({"event": "resumed", "round": 3})
    log.append({"event": "run_end"})
    path.write_bytes(path.read_bytes() + b'{"event": "round", "rou')
    truncate_after(path, 1)
    kept = [(event["event"], event.get("round")) for event in read_events(path)]
    assert kept == [("run_start", None), ("evaluation", 0), ("round", 0), ("evaluation", 1), ("round", 1),
                    ("evaluation", 2), ("resumed", 2)]  # fmt: skip
    assert path.read_bytes().endswith(b"}\n")
    truncate_after(path, -1)
    assert [event["event"] for event in read_events(path)] == ["run_start", "evaluation"]


@pytest.mark.parametrize(
    ("round", "with_alignment", "left"), [(-1, False, []), (-1, True, [0]), (1, False, [0, 1]), (1, True, [0, 1, 2])]
)
def test_an_alignment_belongs_to_the_round_after_it(
    round: int, with_alignment: bool, left: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = EventLog(path)
    for number in range(4):
        log.append({"event": "alignment", "round": number})
        log.append({"event": "round", "round": number})
        log.append({"event": "evaluation", "round": number + 1, "dataset": "held_out_emulator"})
    truncate_after(path, round, with_alignment=with_alignment)
    kept = read_events(path)
    assert [event["round"] for event in kept if event["event"] == "alignment"] == left
    assert [event["round"] for event in kept if event["event"] == "round"] == list(range(round + 1))
    assert [event["round"] for event in kept if event["event"] == "evaluation"] == list(range(1, round + 2))


def test_an_alignment_without_its_round_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "alignment", "round": 0}\n{"event": "alignment", "steps": 3}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:2")):
        read_events(path)


# --- numbers and tables -------------------------------------------------------------------------------


def summary_of(seed: int, loss: float, **more: object) -> dict:
    return {"method": "fedit", "seed": seed, "bytes_up": 100 * (seed + 1), "adapter_sha256": "x",
            "peak_memory_bytes": 5 + seed, "metrics": {"test": {"overall": {"loss": loss, "checked": loss / 10},
            "categories": {"poem": {"loss": loss + 1}}}}, **more}  # fmt: skip


def test_seeds_are_combined_by_hand() -> None:
    combined = combine_seeds([summary_of(0, 1.0, client="a"), summary_of(1, 2.0, client="b"), summary_of(2, 6.0)])
    assert metric(combined, "test", "loss") == Value(3.0, 7.0**0.5)  # squares of -2, -1, 3 over 3 - 1
    assert metric(combined, "test", "loss", "poem") == Value(4.0, 7.0**0.5)
    assert combined["seeds"] == [0, 1, 2]
    assert len(combined["runs"]) == 3
    assert combined["bytes_up"] == 200
    assert combined["peak_memory_bytes"] == 7
    assert not {"seed", "adapter_sha256", "client"} & set(combined)
    assert combine_seeds([summary_of(4, 1.0)]) == summary_of(4, 1.0)


def test_a_metric_that_one_seed_lacks_is_the_mean_of_the_others() -> None:
    broken = {"seed": 1, "metrics": {"test": {"overall": {"loss": None}}}}
    combined = combine_seeds([summary_of(0, 1.0), broken, {"seed": 2}])
    assert metric(combined, "test", "loss") == Value(1.0, None)


def test_the_table_reads_well_at_80_columns(tmp_path: Path) -> None:
    for seeds, checked in ((1, True), (3, True), (3, False)):
        summaries = write_comparison(tmp_path / f"{seeds}{checked}", seeds, checked)
        console = Console(file=io.StringIO(), width=80)
        console.print(tables.comparison_table(summaries))
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        rows = [line for line in lines if any(name in line for name in ("Base", "Local", "FedIT", "Central"))]
        assert len(rows) == 6  # no row is broken over lines
        assert "…" not in "".join(rows)
        order = [re.split(r"\s{2,}|│", row.strip("│ "))[0] for row in rows]
        assert order[0] == "Base model"
        assert order[4:] == ["FedIT", "Centralised"]
        assert ("±" in rows[0]) == (seeds > 1)


def test_the_best_of_a_column_is_marked_and_lower_loss_is_better() -> None:
    low = {"metrics": {"test": {"overall": {"loss": 1.0, "rouge_l": 0.2}}}, "bytes_up": 1500, "seconds": 61}
    high = {"metrics": {"test": {"overall": {"loss": 2.0, "rouge_l": 0.4}}}, "bytes_up": 0, "seconds": 3}
    text = tables.comparison_markdown({"fedit": low, "base": high})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["Method", "ROUGE-L %", "Loss", "Down", "Up", "Time"]
    assert lines[2] == ["Base model", "**40.0**", "2.000", "–", "–", "3.00 s"]
    assert lines[3] == ["FedIT", "20.0", "**1.000**", "–", "1.5 kB", "1:01"]


def test_nothing_is_best_where_all_are_equal() -> None:
    same = {"metrics": {"test": {"overall": {"exact_match": 0.0, "loss": 1.0}}}}
    assert "**" not in tables.comparison_markdown({"fedit": same, "base": same})


def test_one_evaluation_as_a_table() -> None:
    overall = {"loss": 1.5, "perplexity": 4.4817, "checked": None, "exact_match": 0.25, "rows": 1200}
    poem = {"loss": None, "perplexity": None, "exact_match": 1.0, "rows": 3}
    console = Console(file=io.StringIO(), width=80)
    console.print(tables.evaluation_table({"overall": overall, "categories": {"poem": poem}}))
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["Category", "Rows", "Correct", "%", "Exact", "%", "Loss", "Perplexity"]
    assert lines[2:] == [["poem", "3", "–", "100.0", "–", "–"], ["all", "1,200", "–", "25.0", "1.500", "4.482"]]


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (99_960, "100 kB"),
                                             (999_600, "1 MB"), (12_345_678, "12.3 MB"), (None, "–")])  # fmt: skip
def test_bytes_are_said_with_three_digits(count: int | None, said: str) -> None:
    assert tables.format_bytes(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0.40 s"), (9.999, "10.0 s"), (59.97, "1:00"), (3599.7, "1:00:00")]
)
def test_durations(seconds: float, said: str) -> None:
    assert tables.format_seconds(seconds) == said


def plugged(checked: float, emulated: float | None, **more: object) -> dict:
    metrics = {"held_out_emulator": {"overall": {"checked": emulated, "loss": 3.0}}} if emulated is not None else {}
    return {"metrics": {**metrics, "held_out": {"overall": {"checked": checked, "loss": 2.0}}}, **more}


def test_the_table_with_an_emulator_reads_well_at_80_columns(tmp_path: Path) -> None:
    for seeds in (1, 3):
        summaries = write_plugged(tmp_path / str(seeds), seeds)
        console = Console(file=io.StringIO(), width=80)
        console.print(tables.comparison_table(summaries))
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in console.file.getvalue()
        assert "held_out: Correct %" in lines[0]
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith((" Base", " Fed", " Cent"))]
        assert [row[0] for row in rows] == ["Base model", "FedBiOT", "FedIT", "Centralised"]
        assert [row[2] for row in rows if row[0] != "FedBiOT"] == ["–"] * 3
        assert [row[3] for row in rows if row[0] != "FedBiOT"] == ["–"] * 3
        assert rows[1][3].startswith("+")
        assert ("Loss" in "".join(lines)) == (seeds == 1)  # there is no room for it beside deviations
        assert "Time" in "".join(lines)
    local = {"local_1": plugged(0.2, None, client="client-01"), **summaries}
    assert [row[0].text for row in tables.comparison_grid(local, "held_out").rows][:3] == [
        "Base model", "Local, client-01", "FedBiOT"]  # fmt: skip


def test_adapfu_adapemu_and_gap_by_hand() -> None:
    text = tables.comparison_markdown({"fedit": plugged(0.7, None), "fedbiot": plugged(0.6, 0.45)})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["Method", "AdapFu %", "AdapEmu %", "Gap", "Loss", "Down", "Up", "Time"]
    assert lines[2][:5] == ["FedBiOT", "60.0", "45.0", "+15.0", "2.000"]
    assert lines[3][:5] == ["FedIT", "**70.0**", "–", "–", "2.000"]
    alone = {"metrics": {"held_out": {"overall": {"loss": 2.0}}, "held_out_emulator": {"overall": {"loss": 2.5}}}}
    lines = [line.split() for line in tables.comparison_markdown({"fedbiot": alone}).splitlines()]
    assert lines[0][3:9] == ["AdapFu", "|", "AdapEmu", "|", "Gap", "|"]
    assert lines[2][3:8:2] == ["2.000", "2.500", "-0.500"]


def test_the_gap_over_seeds_is_paired() -> None:
    combined = combine_seeds([plugged(0.5, 0.4, seed=0), plugged(0.9, 0.6, seed=1), {"seed": 2, "metrics": {}}])
    gap = plug_in_gap(combined, "held_out", "checked")
    assert gap is not None
    assert (gap.mean, gap.std) == pytest.approx((0.2, 0.02**0.5))  # of 0.1 and 0.3
    assert plug_in_gap(plugged(0.5, None), "held_out", "checked") is None


def test_an_evaluation_on_the_emulator_is_no_data_set_of_its_own() -> None:
    assert datasets({"fedbiot": plugged(0.6, 0.45)}) == ["held_out"]
    assert datasets({"x": {"metrics": {"held_out_emulator": {}}}}) == ["held_out_emulator"]


def test_bytes_and_costs_of_an_emulator_are_means_over_seeds() -> None:
    runs = [{"bytes_emulator": size, "client_cost": {"flops_per_step": size, "activation_bytes": None}}
            for size in (10, 20)]  # fmt: skip
    combined = combine_seeds(runs)
    assert combined["bytes_emulator"] == 15
    assert combined["client_cost"] == {"flops_per_step": 15, "activation_bytes": None}
    assert not {"bytes_emulator", "client_cost"} & set(combine_seeds([summary_of(0, 1.0), summary_of(1, 2.0)]))


# --- the live view ------------------------------------------------------------------------------------


def play(view: LiveView, folder: Path) -> None:
    with view:
        for event in read_events(folder / "metrics.jsonl"):
            if event["event"] == "round":
                for place, client in enumerate(event["answered"], start=1):
                    view.on_client(place, len(event["selected"]), client)
            view.on_event(event)


def test_plain_lines_one_a_round(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=4)
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    play(LiveView(console), tmp_path / "run")
    said = console.file.getvalue()
    lines = [line for line in said.splitlines() if line.startswith("round ") and "/4" in line]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert lines[-1].endswith("0.00 s left")
    assert "\x1b" not in said
    assert "test after round 4: correct " in said


def test_the_panel_counts_clients_bytes_and_time_left(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = LiveView(console)
    assert not view.plain
    view.on_event({"event": "run_start", "name": "try [bold]", "method": "fedit", "rounds": 5, "clients": {"a": {}}})
    for number in range(2):
        view.on_event({"event": "round", "round": number, "train_loss": 1.25, "bytes_up": 1_000_000,
                       "bytes_down": 2_000_000, "tokens": 3000, "seconds": {"forward_backward": 9.0, "save": 1.0},
                       "failures": [{"client": "b[x]", "reason": "lost"}]})  # fmt: skip
    view.on_client(3, 4, "client-9")
    shown = Console(file=io.StringIO(), width=100)
    shown.print(view)
    text = shown.file.getvalue()
    parts = [
        "try [bold] · FedIT",
        "2/5",
        "3/4 client-9",
        "loss 1.250",
        "300 tok/s",
        "up 2 MB",
        "down 4 MB",
        "30.0 s left",
    ]
    for part in parts:
        assert part in text
    assert "b[x] failed: lost" in console.file.getvalue()


def test_the_terminal_view_runs_to_its_end(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=3)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    play(LiveView(console), tmp_path / "run")
    assert "\x1b" in console.file.getvalue()


@pytest.mark.parametrize(
    ("steps", "fidelity", "said"),
    [
        (10, {"public": {"before": 9, "after": 9}, "held_out": {"before": 0.41, "after": 0.123}}, "KL 0.41 -> 0.12"),
        (10, {"public": {"before": 0.41, "after": 0.0042}}, "KL 0.41 -> 0.0042"),
        (0, {"held_out": {"before": 0.3, "after": 0.3}}, "KL 0.30"),
        (3, {"held_out": {"before": None, "after": None}}, ""),
        (3, None, ""),
    ],
)
def test_an_alignment_is_one_short_line(steps: int, fidelity: object, said: str) -> None:
    console = Console(file=io.StringIO(), width=80)
    LiveView(console).on_event({"event": "alignment", "round": 2, "steps": steps, "fidelity": fidelity})
    line = "round 3: aligned" if steps else "round 3: not aligned"
    assert console.file.getvalue() == line + (f", {said}" if said else "") + "\n"


def test_the_panel_keeps_both_results_apart(tmp_path: Path) -> None:
    write_fedbiot(tmp_path / "run")
    view = LiveView(Console(file=io.StringIO(), width=80), plain=True)
    for event in read_events(tmp_path / "run" / "metrics.jsonl"):
        view.on_event(event)
    shown = Console(file=io.StringIO(), width=80)
    shown.print(view)
    text = shown.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"held out, AdapFu: correct 4.*\n.*held out, AdapEmu: correct 38.0 %", text)
    assert "round 8: aligned, KL 0.54 -> 0.28" in text


def test_trackers_get_the_numbers_of_an_alignment() -> None:
    logged: list[tuple[dict, int]] = []
    trackers = object.__new__(Trackers)
    trackers._open = [SimpleNamespace(log=lambda values, step: logged.append((values, step)))]
    trackers.on_event({"event": "alignment", "round": 4, "loss_first": 2.0, "loss_last": None,
                       "fidelity": {"public": {"before": 0.5, "after": 0.25}, "held_out": None}})  # fmt: skip
    numbers = {"alignment/loss_first": 2.0, "fidelity/public/before": 0.5, "fidelity/public/after": 0.25}
    assert logged == [(numbers, 4)]


# --- charts -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_ordered_and_inside(low: float, span: float, count: int) -> None:
    high = low + span
    found = svg.ticks(low, high, count)
    slack = span * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert found == sorted(set(found))
    assert len(found) <= count + 2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 200), min_size=1, max_size=10))
def test_labels_never_overlap_and_stay_inside(places: list[float]) -> None:
    moved = sorted(svg.spread(places, 15, 0, 200))
    assert all(right - left > 15 - 1e-6 for left, right in pairwise(moved))
    assert moved[0] >= -1e-9
    assert moved[-1] <= 200 + 1e-9


def test_markup_in_names_is_escaped() -> None:
    evil = '<script>alert("x")</script>&'
    pictures = [
        grids.holdings({evil: {evil: 3}}),
        grids.participation({evil: grids.Participation(frozenset({0}), frozenset({1}), frozenset({2}))}, 3, title=evil),
        charts.bar_panel([charts.Bar(evil, 0.5, "m-0")], title=evil, description=evil, highest=1, value_format=str),
        charts.line_chart(
            [charts.Line(evil, [(0, 1), (1, 2)], "m-0")], title=evil, description=evil, x_label=evil, y_format=str
        ),
    ]
    for picture in pictures:
        assert "<script" not in picture
        ET.fromstring(picture)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-1e3, 1e3)), min_size=1, max_size=8))
def test_a_line_chart_draws_any_points_inside_its_picture(points: list[tuple[int, float]]) -> None:
    line = charts.Line("x", sorted(points), "m-0")
    picture = charts.line_chart([line], title="t", description="d", x_label="x", y_format=lambda value: f"{value:.1f}")
    root = ET.fromstring(picture)
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    for circle in root.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height


def test_the_grid_of_rounds_shows_answers_failures_and_the_unneeded() -> None:
    nobody: frozenset[int] = frozenset()
    who = {
        "a": grids.Participation(frozenset({0, 2}), frozenset({1})),
        "b": grids.Participation(nobody, nobody, frozenset({0})),
    }
    root = ET.fromstring(grids.participation(who, 3, title="t"))
    assert [sum(e.get("class") == kind for e in root.iter()) for kind in ("answered", "failed", "unused")] == [2, 1, 1]


@pytest.mark.parametrize("rounds", [3, 190, 450])
def test_marks_that_are_drawn_together_are_the_same_marks(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(rounds)
    kinds: list[set[int]] = [set(), set(), set()]
    for number in range(rounds):
        kinds[draw.randrange(3)].add(number)
    who = {"a": grids.Participation(*map(frozenset, kinds)), "b": grids.Participation(frozenset({1}), frozenset())}

    def marks() -> list[tuple[str, int]]:
        elements = list(ET.fromstring(grids.participation(who, rounds, title="t")).iter())
        found = {kind: [e for e in elements if e.get("class") == kind] for kind in ("answered", "failed", "unused")}
        return [(kind, sum(e.get("d", "M").count("M") for e in some)) for kind, some in found.items()]

    alone = marks()
    monkeypatch.setattr(grids, "_NOTED", 0)
    assert marks() == alone
    assert len(grids.participation(who, rounds, title="t")) < 200 * min(rounds, 200) + 4000


def test_large_federations_stay_small_files() -> None:
    who = {f"client-{n}": grids.Participation(frozenset(range(0, 1000, 2)), frozenset()) for n in range(500)}
    picture = grids.participation(who, 1000, title="t")
    assert len(picture) < 3_000_000
    assert "and 400 more clients" in picture
    held = grids.holdings({f"client-{n}": {"x": n} for n in range(500)})
    assert "and 400 smaller clients" in held
    assert "client-499" in held
    assert "client-3<" not in held


# --- the report ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What matters of a page: headings, ids, links to elsewhere, whether each element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.outside: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "link", "img", "br"):
            self.stack.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "aria-labelledby":
                self.labels += (value or "").split()
            if name in ("src", "href"):
                self.outside.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def check_page(path: Path) -> tuple[str, Page]:
    text = path.read_text()
    page = Page(text)
    assert page.outside == ["#main"]
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    for picture in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        root = ET.fromstring(picture)
        assert root[0].tag == "title"
        assert root[1].text
    assert page.counts.get("table") == page.counts.get("caption")
    return text, page


def test_a_single_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    text, page = check_page(write_report(tmp_path / "run"))
    assert "Worth knowing" not in text
    # 4 curves, the first 3 of them in 8 categories, update norm, aggregation error, categories, 2 grids, time
    assert page.counts["svg"] == 4 + len(CATEGORIES) + 2 + 1 + 2 + 1
    assert "20 of 20 rounds done" in text
    assert "A bus &lt;sic&gt;." in text
    assert "2.13.0" in text


def test_a_comparison_tells_the_order_of_methods(tmp_path: Path) -> None:
    summaries = write_comparison(tmp_path)
    text, page = check_page(write_report(tmp_path))
    assert "The order base &lt; local &lt; FedIT &lt; centralised holds in this one seed." in text
    assert page.counts["svg"] == 1 + 6 + 2 * len(CATEGORIES) + 3  # the methods, curves, categories, 2 grids, time
    for summary in summaries.values():
        assert f"{summary['metrics']['test']['overall']['checked'] * 100:.1f}" in text
    summaries["fedit"]["metrics"]["test"]["overall"]["checked"] = 0.99
    (tmp_path / "summary.json").write_text(json.dumps(summaries))
    assert "centralised does not hold" in verdict(load_experiment(tmp_path))


def test_fedbiot_says_what_the_owner_and_a_client_gain(tmp_path: Path) -> None:
    summaries = write_plugged(tmp_path)
    text, page = check_page(write_report(tmp_path))
    said = f"{what_was_run(load_experiment(tmp_path))} {verdict(load_experiment(tmp_path))}"
    full, emulated = (summaries["fedbiot"]["metrics"][name]["overall"]["checked"] for name in
                      ("held_out", "held_out_emulator"))  # fmt: skip
    assert said.startswith(
        "10 simulated clients tuned english-7m together by FedBiOT: 8 rounds"
    )  # not FedIT, its upper bound
    for part in (
        f"(AdapFu) answers {full * 100:.1f} % of the held-out questions correctly",
        f"(AdapEmu), it gets to {emulated * 100:.1f} %.",
        f"The plug-in gap of {(full - emulated) * 100:.1f} points is the model owner's protection",
        f"FedIT on the full model {summaries['fedit']['metrics']['held_out']['overall']['checked'] * 100:.1f} %",
        "The order base < FedBiOT < FedIT < centralised holds in this one seed.",
        "The full model never left the server: clients held an emulator of 5 of its 8 layers (66 % of its parameters, "
        "5 MB, sent once to each); they tune layers 6, 7 (counted from 0) and never saw layers 1, 3, 4.",
        "not a guarantee",
    ):
        assert part in said
    assert page.counts["svg"] == 1 + 6 + 2 * len(CATEGORIES) + 3 + 2  # as ever, the split and the fidelity
    assert "0f0f" in text
    assert "Fidelity of the emulator" in text
    assert "Before the first alignment it was off this scale: public rows 3.9, held-out rows 4." in text
    step = "One local step costs a client: FedBiOT 1.25 GFLOP, 3.4 MB of activations; FedIT 2.5 GFLOP."
    assert unbroken(step) in text
    assert re.search(r'<td data-value="5e\+07">50 MB</td>', text)  # the emulator, once to a client
    assert re.search(r'<th scope="row">align</th><td>–</td><td data-value="12">12.0 s</td>', text)
    assert text.index(">align<") < text.index(">forward and backward<")  # in the order of the work
    assert re.search(r"<desc[^>]*>[^<]*AdapFu: [^;]+; AdapEmu: ", text)


def test_the_picture_of_the_split_shows_every_layer_twice(tmp_path: Path) -> None:
    write_fedbiot(tmp_path / "run")
    found = emulator.read_emulator([load_run(tmp_path / "run")])
    assert found is not None
    root = ET.fromstring(emulator.split_picture(found))
    notes = [element.text for element in root.iter("title")]
    for layer in range(8):
        role = "adapter" if layer in (6, 7) else "kept" if layer in (0, 2, 5) else "dropped"
        assert notes.count(f"layer {layer}: {role}") == 2
    described = next(root.iter("desc")).text
    assert described is not None
    assert "Kept in the emulator: layers 0, 2, 5. Dropped, only with the server: layers 1, 3, 4." in described
    assert emulator.spans([7, 0, 1, 2, 5, 4]) == "layers 0–2, 4, 5, 7"


def test_the_fidelity_is_a_saw_tooth_of_means(tmp_path: Path) -> None:
    def run(*values: tuple[float | None, float]) -> SimpleNamespace:
        return SimpleNamespace(alignments=[{"round": number, "fidelity": {"public": {"before": b, "after": a}}}
                                           for number, (b, a) in enumerate(values)])  # fmt: skip

    drawn = emulator.fidelity([run((1.0, 0.5), (0.8, 0.4)), run((2.0, 0.7), (None, 0.6))])
    assert drawn is not None
    notes = [element.text for element in ET.fromstring(drawn.picture).iter("title")][1:]
    assert notes == [f"Public rows, {text}" for text in ("0: 1.5", "0: 0.6", "1: 0.8", "1: 0.5")]
    assert drawn.note == ""
    assert drawn.numbers is not None
    assert [[cell.text for cell in row] for row in drawn.numbers.rows] == [["0", "1.5 → 0.6"], ["1", "0.8 → 0.5"]]
    assert emulator.fidelity([SimpleNamespace(alignments=[])]) is None


@pytest.mark.parametrize(
    ("full", "emulated", "said"),
    [
        (0.5, 0.5, "There is no plug-in gap"),
        (0.4, 0.5, "The gap is the wrong way round by 10.0 points"),
        (0.5, 0.4, "The plug-in gap of 10.0 points is the model owner's protection"),
    ],
)
def test_a_gap_is_not_called_protection_when_it_is_none(full: float, emulated: float, said: str) -> None:
    assert said in emulator.two_results(plugged(full, emulated), "held_out", "checked", "works")
    noisy = combine_seeds([plugged(0.5, 0.3, seed=0), plugged(0.5, 0.6, seed=1)])
    assert "within its spread over the seeds" in emulator.two_results(noisy, "held_out", "checked", "works")
    lower = {"metrics": {"held_out": {"overall": {"loss": 2.0}}, "held_out_emulator": {"overall": {"loss": 2.5}}}}
    assert "gap of 0.500 is the model owner's" in emulator.two_results(lower, "held_out", "loss", "works")


def test_with_no_layer_dropped_the_report_claims_no_secret(tmp_path: Path) -> None:
    write_fedbiot(tmp_path / "run")
    run = load_run(tmp_path / "run")
    run.start["emulator"].update(full_layers=5, adapter=[3, 4], kept=[0, 1, 2], dropped=[])
    found = emulator.read_emulator([run])
    assert found is not None
    assert "Clients held all 5 layers" in emulator.what_clients_hold(found)
    assert "never left" not in emulator.what_clients_hold(found)


def test_a_killed_run_of_fedbiot_counts_its_emulators(tmp_path: Path) -> None:
    write_fedbiot(tmp_path / "run", done=3)
    run = load_run(tmp_path / "run")
    asked = {client for event in run.rounds for client in event["selected"]}
    assert run.summary["bytes_emulator"] == 5_000_000 * len(asked)
    assert set(run.summary["metrics"]) == {"held_out", "held_out_emulator"}
    assert [event["round"] for event in run.alignments] == [0, 1, 2]
    assert "3 of 8 rounds so far" in check_page(write_report(tmp_path / "run"))[0]


DAMAGE = [None, 5, "x", [], {}, [None, "y"], {"public": 3, "held_out": {"before": "z"}}, -1.5, True]


@settings(deadline=None, max_examples=30)
@given(**{name: st.sampled_from(DAMAGE) for name in ("whole", "part", "fidelity", "cost")})
def test_damaged_values_of_an_emulator_still_make_a_report(
    whole: object, part: object, fidelity: object, cost: object, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    summary = write_fedbiot(folder, rounds=2)
    events = read_events(folder / "metrics.jsonl")
    events[0]["emulator"] = {**events[0]["emulator"], **dict.fromkeys(("kept", "full_layers", "bytes"), part)}
    if whole != 5:
        events[0]["emulator"] = whole
    for event in events:
        if event["event"] == "alignment":
            event.update(fidelity=fidelity, steps=part)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "summary.json").write_text(json.dumps({**summary, "client_cost": cost, "bytes_emulator": part}))
    text, _ = check_page(write_report(folder))
    assert "could not be shown" not in text
    play(LiveView(Console(file=io.StringIO(), width=80)), folder)


def test_older_runs_show_nothing_of_emulators(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    text, _ = check_page(write_report(tmp_path))
    for word in ("mulator", "AdapFu", "Gap", "align"):
        assert word not in re.sub(r"<style>.*?</style>|vertical-align", "", text, flags=re.S)


def test_several_seeds(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=3, checked=False)
    text, _ = check_page(write_report(tmp_path))
    assert "centralised holds in the means of 3 seeds." in text
    assert 'class="m-0 band"' in text
    assert "whisker" in text
    with_summary = load_experiment(tmp_path).summaries
    (tmp_path / "summary.json").unlink()
    assert load_experiment(tmp_path).summaries == with_summary  # an unfinished comparison says the same


def test_curves_join_only_evaluations_on_equally_many_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=12)
    log = tmp_path / "run" / "metrics.jsonl"
    events = read_events(log)
    last = [event for event in events if event["event"] == "evaluation"][-1]
    last["overall"].update(rows=800, loss=777.0)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    text, _ = check_page(write_report(tmp_path / "run"))
    assert "Held-out loss, nats a token (on 80 rows)" in text
    assert "777" not in text


def test_baselines_send_nothing_whatever_their_log_counts(tmp_path: Path) -> None:
    summaries = write_comparison(tmp_path)
    assert summaries["centralised"]["bytes_up"] > 0
    cells = {row[0].text: [cell.text for cell in row[-3:-1]] for row in tables.comparison_grid(summaries, "test").rows}
    assert cells["Centralised"] == cells["Base model"] == cells["Local, client-1"] == ["–", "–"]
    assert cells["FedIT"][0].endswith(" MB")


def test_a_killed_run_says_so_and_counts_what_is_there(tmp_path: Path) -> None:
    write_run(tmp_path / "run", done=7)
    text, _ = check_page(write_report(tmp_path / "run"))
    assert "Not finished: 7 of 20 rounds done so far." in text
    assert "7 of 20 rounds so far" in text
    run = load_run(tmp_path / "run")
    assert run.summary["bytes_up"] == sum(event["bytes_up"] for event in run.rounds) > 0
    assert run.summary["metrics"]["test"]["overall"] == run.evaluations[-1]["overall"]


def test_damage_of_any_kind_still_makes_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder)
    (folder / "summary.json").write_text("{")
    (folder / "recipe.yaml").unlink()
    (folder / "answers.jsonl").write_text('{"category": 1, "answer": null}\n[1]\nnot json')
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = "garbage\n"
    lines[4] = '{"event": "round", "round": 2, "selected": 5, "seconds": [1], "clients": null}\n'
    (folder / "metrics.jsonl").write_text("".join(lines))
    text, _ = check_page(write_report(folder))
    for note in ("summary.json can not be read.", "1 damaged lines", "recipe.yaml is missing.", "could not be shown"):
        assert note in text
    assert "Training loss" in text


@settings(deadline=None, max_examples=15)
@given(keep=st.floats(0, 1), name=st.sampled_from(["metrics.jsonl", "summary.json", "answers.jsonl", "recipe.yaml"]))
def test_a_file_cut_anywhere_still_makes_a_report(keep: float, name: str, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("cut") / "run"
    write_run(folder, rounds=3, clients=3)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])
    check_page(write_report(folder))


def test_an_almost_empty_run_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("rounds: 3\n")
    text, _ = check_page(write_report(tmp_path))
    assert "metrics.jsonl is missing or empty." in text
    assert "No round was logged." in text
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="a run folder"):
            write_report(folder)


def test_hostile_text_is_shown_and_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, rounds=2)
    evil = "<script>alert(1)</script>"
    (folder / "answers.jsonl").write_text(
        json.dumps({"category": evil, "instruction": evil, "reference": evil, "answer": evil})
    )
    (folder / "recipe.yaml").write_text(f"name: {evil}")
    text, page = check_page(write_report(folder))
    assert page.counts["script"] == 1  # the page's own
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5


def test_who_holds_what_alone(tmp_path: Path) -> None:
    held = {"ada": {"poem": 3, "riddle": 0}, "bob": {"riddle": 7}}
    path = write_holdings(tmp_path / "split.html", held, heterogeneity={"distance": 0.5, "clients": 2})
    text, _ = check_page(path)
    assert "2 clients, 10 rows" in text
    assert "ada, poem: 3 rows" in text
    assert "(0 same, 1 disjoint) 0.50." in text


def test_evaluation_time_is_counted_once(tmp_path: Path) -> None:
    rounds = [{"seconds": {"forward_backward": 2.0}}, {"seconds": {"forward_backward": 3.0, "save": 1.0}}]
    run = SimpleNamespace(rounds=rounds, evaluations=[{"seconds": 4.0}, {"seconds": 5.0}])
    assert seconds_of(run) == {"forward and backward": 5.0, "save": 1.0, "evaluate": 9.0}
    run.rounds[0]["seconds"]["evaluate"] = 4.0
    assert seconds_of(run)["evaluate"] == 4.0


# --- what the page says first -----------------------------------------------------------------------------


def rewritten(folder: Path, change) -> Path:
    """The run, with every event as ``change`` leaves it."""
    log = folder / "metrics.jsonl"
    events = read_events(log)
    for event in events:
        change(event)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_what_left_each_client_is_measured_and_where_it_is_not_it_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=3, clients=4)
    [run] = load_experiment(tmp_path / "run").runs
    parts = parts_of(run)
    assert not any(part.exact for part in parts if part.answered)
    assert sum(part.sent for part in parts) == pytest.approx(run.summary["bytes_up"])
    grid, more = client_grid(load_experiment(tmp_path / "run"))
    assert more == 0
    assert all(row[5].text.startswith("≈ ") == bool(row[3].value) for row in grid.rows)

    def tell(event: dict) -> None:
        for name, client in (event.get("clients") or {}).items() if event["event"] == "round" else ():
            client.update(bytes_up=1000 * int(name[-1]), epsilon=0.5 * event["round"] + 1)

    rewritten(tmp_path / "run", tell)
    grid, _ = client_grid(load_experiment(tmp_path / "run"))
    assert grid.headings[:7] == ("Client", "Rows held", "Asked", "Counted", "Failed", "Sent", "Epsilon")
    rounds = load_experiment(tmp_path / "run").runs[0].rounds
    for row in grid.rows:
        name = row[0].text
        times = [event["round"] for event in rounds if name in event["answered"]]
        assert row[3].value == len(times)
        assert row[5].value == 1000 * int(name[-1]) * len(times)
        assert row[6].value == (0.5 * max(times) + 1 if times else None)


def test_only_rows_of_owners_never_left_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=4, clients=2)
    log = tmp_path / "run" / "metrics.jsonl"
    assert what_was_run(load_experiment(log.parent)).startswith("2 simulated clients tuned english-7m together")
    first, rest = log.read_text().split("\n", 1)
    log.write_text(json.dumps({**json.loads(first), "clients": {}, "owners": ["a", "b"]}) + "\n" + rest)
    said = "2 clients tuned english-7m together by FedIT: 4 rounds, on rows that never left them."
    assert what_was_run(load_experiment(log.parent)) == said


def test_the_run_at_a_glance(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=4)
    glances = {glance.heading: glance for glance in at_a_glance(load_experiment(tmp_path / "run"))}
    assert list(glances) == ["Who took part", "What left each client", "What it cost"]
    assert glances["Who took part"].figure == "10 clients"
    assert "No differential privacy and no secure aggregation" in glances["What left each client"].remarks[-1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    told = {"privacy": {"said": "epsilon 3.1 at delta 1e-05"}, "client_cost": {"flops_per_token_first": 2e6}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, **told}))
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "secure_aggregation: {min_clients: 2}\n")
    _, left, cost = at_a_glance(load_experiment(tmp_path / "run"))
    recipe.write_text(recipe.read_text().replace("secure_aggregation", "gate"))
    assert at_a_glance(load_experiment(tmp_path / "run"))[1].remarks[-2:] == (
        "Differential privacy: epsilon 3.1 at delta 1e-05.",
        "No secure aggregation: the server saw every update.",
    )
    assert left.remarks[-2:] == (
        "Differential privacy: epsilon 3.1 at delta 1e-05.",
        "Secure aggregation: the server saw sums, no single update.",
    )
    assert f"{4 * 5 * 4100 * 2e6 / 1e9:.3g} GFLOP of training, all clients together." in cost.remarks
    write_run(tmp_path / "base", "base")
    assert [glance.heading for glance in at_a_glance(load_experiment(tmp_path / "base"))] == ["What it cost"]


def test_the_headline_says_how_sure_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    experiment = load_experiment(tmp_path / "run")
    assert headline(experiment).sure == "One seed, 80 rows."
    experiment.runs[0].summary["metrics"]["test"]["intervals"] = {"checked": {"low": 0.5, "high": 0.715}}
    said = headline(load_experiment(tmp_path / "run"))
    assert said.sure == "One seed, 80 rows."  # the file has none
    assert headline(experiment).sure == "95 % interval 50.0 to 71.5 %, of 80 rows; one seed."
    write_comparison(tmp_path / "seeds", seeds=3)
    found = headline(load_experiment(tmp_path / "seeds"))
    assert found.sure == "Mean ± standard deviation of 3 seeds."
    assert re.fullmatch(r"± \d\.\d %", found.unit)


def test_the_round_that_was_kept_is_marked_in_every_curve(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=8)
    assert not any("mark" in figure.picture for figure in curves.learning(load_experiment(tmp_path / "run")))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "choice": {"round": 4, "said": "so"}}))
    found = curves.learning(load_experiment(tmp_path / "run"))
    assert len(found) == 4
    assert all('class="mark"' in figure.picture and "Round 4 was kept" in figure.picture for figure in found)


def test_curves_of_validation_rows_that_the_result_was_not_tested_on(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=8)

    def rename(event: dict) -> None:
        if event["event"] == "evaluation" and event["round"] < 8:
            event["dataset"] = "validation"

    titles = [figure.title for figure in curves.learning(load_experiment(rewritten(tmp_path / "run", rename)))]
    assert titles == ["Validation loss, nats a token", "Training loss, nats a token"]
    categories = curves.category_curves(load_experiment(tmp_path / "run"))
    assert [figure.title for figure in categories] == [name.replace("_", " ") for name in CATEGORIES]
    assert categories[0].note == "Validation loss, nats a token"


def test_a_number_stays_with_its_unit() -> None:
    said = unbroken("19.8 MB of 3 seeds, 67.3 % (17 ×), 16.0 s so")
    assert said.replace("\N{NO-BREAK SPACE}", "~") == "19.8~MB of 3 seeds, 67.3~% (17~×), 16.0~s so"
