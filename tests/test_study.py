"""A study: its grid, what it refuses, how it goes on, what its seeds say, and the files that it leaves."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from rich.console import Console

from conftest import Said, World, dolly_rows, make_world, write_rows
from flocktune import api
from flocktune.config.load import config_digest, load_recipe
from flocktune.config.schema import Named
from flocktune.config.study import Claim, Study, StudyConfig, load_study, slug
from flocktune.errors import UserError
from flocktune.files import exclusive
from flocktune.report.study_claims import checked_claims, claim_lines, paired_difference, verdict
from flocktune.report.study_page import study_page
from flocktune.report.study_rows import Outcome, StudyResult, rows
from flocktune.report.study_tables import study_csv, study_in_terminal, study_markdown
from flocktune.report.summaries import METRIC_NAMES
from flocktune.runs import Stopped
from flocktune.study import execute_study
from forked_runs import ForkedRuns

Cli = Callable[..., Said]
NOT_THE_RESULT = {"seconds", "client_seconds_per_step", "peak_memory_bytes", "training_seconds"}

GRID = """
name: tiny-table
recipe: RECIPE
seeds: [0, 1]
methods:
  Base: {method: base}
  FedIT: {}
  The same again: {method: fedit}
settings:
  rank 2: {lora.rank: 2}
  rank 3: {lora.rank: 3}
once: [Base]
claims:
  - {better: FedIT, than: Base, metric: loss}
  - {better: FedIT, than: The same again, metric: loss}
"""


def write(folder: Path, world: World, text: str = GRID) -> Path:
    """A study file on the tiny world."""
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text.replace("RECIPE", str(world.recipe)))
    return path


def timeless(value: Any) -> Any:
    """Without what a clock or a memory gauge said."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in NOT_THE_RESULT}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def tree(folder: Path) -> Any:
    return timeless(json.loads((folder / "study.json").read_text()))


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_study(path, overrides)
    return str(raised.value)


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study, StudyResult, list[str]]:
    """A study that nobody disturbed: folder, study, result, what was said."""
    folder = tmp_path_factory.mktemp("study")
    study, said = load_study(write(folder, world), ["rounds=2", "evaluation.every=0"]), []
    return folder / "out", study, execute_study(study, folder / "out", say=said.append), said


# --- the file ---------------------------------------------------------------------------------------


def test_the_grid_is_methods_by_settings_by_seeds_and_once_leaves_settings_out(world: World, tmp_path: Path) -> None:
    study = load_study(write(tmp_path, world))
    assert [cell.place for cell in study.cells] == [
        "base/all/seed-0", "base/all/seed-1",
        "fedit/rank-2/seed-0", "fedit/rank-2/seed-1", "fedit/rank-3/seed-0", "fedit/rank-3/seed-1",
        "the-same-again/rank-2/seed-0", "the-same-again/rank-2/seed-1",
        "the-same-again/rank-3/seed-0", "the-same-again/rank-3/seed-1",
    ]  # fmt: skip
    assert [cell.config.lora.rank for cell in study.cells if cell.seed == 0] == [2, 2, 3, 2, 3]
    assert [cell.label for cell in study.cells[:3:2]] == ["Base, seed 0", "FedIT, rank 2, seed 0"]
    assert len({config_digest(cell.config) for cell in study.cells}) == 6
    assert load_study(write(tmp_path, world), (), [7]).cells[0].seed == 7


def test_a_setting_goes_over_its_method_and_the_command_line_over_both(world: World, tmp_path: Path) -> None:
    text = """
name: tiny
recipe: {model: {path: M}, lora: {rank: 2, alpha: 3.0}, rounds: 9, compare: {base: true, local: 2}}
methods:
  A: {lora.rank: 4, local.lr: 1e-3, local.steps: 5, rounds: 8}
  B: {method: local, scheduling: {selection: {kind: named, clients: [client-02]}, quorum: 1.0}}
settings: {S: {local.steps: 6, lora: {rank: 5}}, T: {local.steps: 7}}
"""
    first, second, third, _ = (cell.config for cell in load_study(write(tmp_path, world, text), ["rounds=3"]).cells)
    assert (first.lora.rank, second.lora.rank) == (5, 4)
    assert (first.lora.alpha, second.lora.alpha) == (16.0, 3.0), "a mapping takes the place of the whole part"
    assert (first.local.steps, second.local.steps, first.local.lr, first.rounds) == (6, 7, 1e-3, 3)
    assert third.scheduling.selection == Named(("client-02",))
    assert (first.compare.base, first.compare.local, first.name) == (False, 0, "tiny")


def test_every_problem_of_the_file_and_of_all_cells_is_told_at_once_and_once(world: World, tmp_path: Path) -> None:
    text = """
name: tiny
recipe: {local: {steps: 1, epochs: 1}}
seeds: [1, 1]
methods:
  Alone: {method: local}
  Wide: {local.stepz: 3, seed: 4}
  wide!: {compare.base: true}
  "???": {}
  Bad: {lora.rank: 0}
settings: {S: {lora.alpha: -1.0}, T: {lora.rank: 2}, all: {}}
once: [Nobody]
claims:
  - {better: Wide, than: Wide, metric: loss}
  - {better: Wide, than: Narrow, metric: loss}
"""
    said = problems(write(tmp_path, world, text), "name=other")
    for words in (
        "recipe.local: expected exactly one of steps and epochs",
        "methods.Alone (with T, all).scheduling.selection: expected one named client",
        "methods.Wide.local.stepz: expected a known setting",
        "methods.Wide.seed: expected a setting of a single run",
        "methods.wide!.compare.base: expected",
        'methods: expected labels that differ in a letter or digit, for they name folders, got "Wide" and "wide!"',
        'methods: expected labels of up to 60 characters, a letter or digit among them, got "???"',
        "settings: expected labels other than all",
        "methods.Bad (with S, all).lora.rank: expected at least",
        "settings.S.lora.alpha: expected",
        "once.0: expected one of the methods Alone, Wide",
        "claims.0: expected two different methods",
        'claims.1.than: expected one of the methods Alone, Wide, wide!, ???, Bad, got "Narrow"',
        "seeds: expected different numbers, got 1, 1",
        "name=other: expected a setting of a single run, got name. Use name of the study file",
    ):
        assert said.count(words) == 1, f"{words}\n\n{said}"


def test_keys_and_files_that_are_not_there_are_named(cli: Cli, world: World, tmp_path: Path) -> None:
    said = problems(
        write(tmp_path, world, "name: a b\nmethod: {}\nrecipe: {}\nmethods: {A: {}}\nclaims: [{metric: bleu}]")
    )
    for words in ("name: expected", "method: expected a known setting", "Did you mean methods?", "claims.0.better",
                  "claims.0.metric: expected 'checked'"):  # fmt: skip
        assert words in said, said
    missing = problems(write(tmp_path, world, "name: a\nrecipe: gone.yaml\nmethods: {A: {}}\nonce: [B]"))
    assert "recipe: expected a YAML file, got nothing there (" in missing
    assert "once.0" in missing
    said_by = cli("study", tmp_path / "gone.yaml")
    assert said_by.code == 2
    assert "expected a YAML file" in said_by.err
    assert cli("study", write(tmp_path, world), "--seeds", "x").code == 2


def test_a_claims_metrics_are_those_of_the_tables() -> None:
    assert get_args(get_type_hints(Claim)["metric"]) == tuple(METRIC_NAMES)


def test_labels_become_folders() -> None:
    assert [slug(label) for label in ("beta 0.2", "FedIT", "../..", "β = ½", "a/b")] == [
        "beta-0-2",
        "fedit",
        "",
        "β-½",
        "a-b",
    ]


# --- running ----------------------------------------------------------------------------------------


def test_equal_cells_run_once_and_every_run_is_an_ordinary_folder(finished) -> None:
    folder, _, result, said = finished
    runs = sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("recipe.yaml"))
    assert runs == ["base/all/seed-0", "base/all/seed-1", "fedit/rank-2/seed-0", "fedit/rank-2/seed-1",
                    "fedit/rank-3/seed-0", "fedit/rank-3/seed-1"]  # fmt: skip
    assert said[2] == "Run 3 of 6: FedIT, rank 2, seed 0 (the same as The same again, rank 2, seed 0)"
    by_cell = {(o.method, o.setting, o.seed): o for o in result.outcomes}
    assert by_cell["The same again", "rank 3", 1].folder == "fedit/rank-3/seed-1"
    assert len(by_cell) == 10
    assert all(o.state == "finished" and o.summary["metrics"]["held_out"] for o in result.outcomes)
    assert by_cell["FedIT", "rank 2", 0].summary["answered"] == 4, "2 of 4 clients, 2 rounds"
    config = load_recipe(folder / "fedit/rank-3/seed-1/recipe.yaml")
    assert (config.seed, config.lora.rank, config.rounds) == (1, 3, 2)


def test_stopped_in_the_middle_the_same_study_goes_on_to_the_same_table(finished, world: World, tmp_path: Path) -> None:
    whole, study, _, _ = finished
    stop, said, rounds = threading.Event(), [], []

    class StopsInTheThirdRound:
        def on_event(self, event: Any) -> None:
            if event["event"] == "round":
                rounds.append(event)
                if len(rounds) == 3:
                    stop.set()

        def on_client(self, done: int, total: int, client: str) -> None: ...

    with pytest.raises(Stopped):
        execute_study(study, tmp_path / "out", [StopsInTheThirdRound()], stop)
    half = tree(tmp_path / "out")["cells"]
    assert {cell["state"] for cell in half} == {"finished", "waiting"}
    assert "6 of 10 cells have not been finished yet" in (tmp_path / "out/study.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    execute_study(study, tmp_path / "out", say=said.append)
    assert [line.partition(" (")[0] for line in said] == [
        "Run 4 of 6: FedIT, rank 2, seed 1", "Run 5 of 6: FedIT, rank 3, seed 0", "Run 6 of 6: FedIT, rank 3, seed 1",
    ]  # fmt: skip
    log = (tmp_path / "out/fedit/rank-2/seed-1/metrics.jsonl").read_text()
    assert '"resumed"' in log, "the run goes on from its last saved round"
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is finished is not run again"
    assert tree(tmp_path / "out") == tree(whole)
    for name in ("study.csv", "study.md"):
        mine, theirs = ((folder / name).read_text() for folder in (tmp_path / "out", whole))
        if name == "study.csv":
            clock = re.compile(r"^.*(seconds).*$", re.MULTILINE)
            assert clock.sub("", mine) == clock.sub("", theirs)
        else:
            assert len(mine.splitlines()) == len(theirs.splitlines())


def test_killed_anywhere_the_same_command_goes_on_to_the_same_table(world: World, tmp_path: Path) -> None:
    text = "name: t\nrecipe: RECIPE\nmethods: {Base: {method: base}, FedIT: {}}\nseeds: [3]\n"
    arguments = ("study", write(tmp_path, world, text), "rounds=1", "evaluation.max_new_tokens=1", "--quiet", "--out")
    with ForkedRuns(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}) as forked:
        whole = forked.run(*arguments, tmp_path / "whole", count=True)
        assert whole.code == 0, whole.output
        assert whole.disk_calls is not None
        for crash_at in (1, 5, *range(9, whole.disk_calls, whole.disk_calls // 6)):
            out = tmp_path / f"killed-{crash_at}"
            assert forked.run(*arguments, out, crash_at=crash_at).code == -signal.SIGKILL
            again = forked.run(*arguments, out)
            assert again.code == 0, again.output
            assert tree(out) == tree(tmp_path / "whole"), crash_at
            assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_says_how_to_go_on_and_the_table_fits_80_columns(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_signals: None
) -> None:
    from flocktune.report.live import LiveView

    path, real = write(tmp_path, world), LiveView.on_event

    def interrupted(view: LiveView, event: Any) -> None:
        real(view, event)
        if event["event"] == "round":
            os.kill(os.getpid(), signal.SIGINT)

    arguments = ("study", path, "rounds=2", "--seeds", "0", "--out", tmp_path / "o", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(LiveView, "on_event", interrupted)
        said = cli(*arguments)
    assert said.code == 130, said.all
    assert f"Stopped. Go on with: flocktune study {path} rounds=2 --seeds 0 --out {tmp_path / 'o'} --quiet" in said.err
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = cli(*arguments)
    assert said.code == 0, said.all
    assert (
        max(map(len, [line for line in said.out.splitlines() if not line.startswith(("Page", "Run", "tiny-"))])) <= 80
    )
    for words in ("tiny-table: one seed", "The same again", "FedIT better than Base: Loss, rank 2",
                  "nothing can be said", "resumed after round 1", f"Page: {tmp_path}/o/study.html"):  # fmt: skip
        assert words in said.out, said.out


def test_a_cell_that_is_there_keeps_its_recipe_and_new_ones_may_come(cli: Cli, world: World, tmp_path: Path) -> None:
    text = "name: t\nrecipe: RECIPE\nmethods: {Base: {method: base}}\nseeds: [0]\n"
    out = tmp_path / "o"
    assert cli("study", write(tmp_path, world, text), "--out", out).code == 0
    said = cli(
        "study", write(tmp_path, world, text.replace("method: base", "method: base, local.lr: 0.5")), "--out", out
    )
    assert said.code == 2
    assert f"Base, seed 0 ({out}/base/all/seed-0): expected the recipe that it began with" in said.err
    assert "a change of local.lr: 0.01 -> 0.5" in said.err
    more = text.replace("{method: base}", "{method: base}, Other: {method: base, lora.rank: 3}").replace(
        "[0]", "[0, 1]"
    )
    assert cli("study", write(tmp_path, world, more), "--out", out).code == 0
    assert [cell["state"] for cell in tree(out)["cells"]] == ["finished"] * 4
    with exclusive(out):
        assert "another process holds" in cli("study", write(tmp_path, world, more), "--out", out).err
    busy = cli("study", write(tmp_path, world, more), "--out", out / "base/all/seed-0")
    assert busy.code == 2
    assert "expected a new folder or a study's" in busy.err


def test_data_that_changed_between_cells_and_clients_that_are_not_there_are_refused(cli: Cli, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    text = "name: t\nrecipe: RECIPE\nmethods: {Base: {method: base}}\n"
    assert cli("study", write(tmp_path, world, text), "--out", tmp_path / "o").code == 0
    selection = "scheduling.selection: {kind: named, clients: [client-77]}"
    alone = text.replace("}}", "}, Alone: {method: local, " + selection + "}}")
    said = cli("study", write(tmp_path, world, alone), "--out", tmp_path / "o")
    assert said.code == 2
    assert "client-77" in said.err
    write_rows(world.data, dolly_rows(47))
    more = text.replace("}}", "}, Other: {method: base, lora.rank: 3}}")
    said = cli("study", write(tmp_path, world, more), "--out", tmp_path / "o")
    assert said.code == 2
    assert "expected what the study began with, got a change of the training data" in said.err


def test_a_cell_that_fails_is_recorded_the_others_go_on_and_it_is_tried_again(
    cli: Cli, world: World, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({f"client-0{number}": [1, 0] for number in range(1, 5)}))
    text = f"""
name: t
recipe: RECIPE
methods:
  Away: {{scheduling.selection: {{kind: availability, trace: {trace}}}}}
  Base: {{method: base}}
claims: [{{better: Away, than: Base, metric: loss}}]
"""
    for _ in range(2):
        said = cli("study", write(tmp_path, world, text), "rounds=2", "--out", tmp_path / "o", "--quiet")
        assert said.code == 1
        assert "1 of 2 cells" in said.err
        assert "Away, seed 0 failed: round 2: expected updates of at least" in said.out
        away, base = tree(tmp_path / "o")["cells"]
        assert (away["state"], base["state"]) == ("failed", "finished")
        assert "lower scheduling.quorum" in away["reason"]
        assert "no seed has it of both: nothing can be said" in said.out
    for name in ("study.md", "study.html"):
        assert "Away, seed 0 failed: round 2" in (tmp_path / "o" / name).read_text()


def test_from_python(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "name: by-hand\nrecipe: RECIPE\nmethods: {Base: {method: base}}"
    [outcome] = api.study(write(tmp_path, world, text)).outcomes
    assert outcome.state == "finished"
    assert Path("runs/by-hand/study.html").exists()


# --- what the seeds say -----------------------------------------------------------------------------


def test_the_paired_difference_is_that_of_the_textbook() -> None:
    # Differences 2, 4, 3: mean 3, deviation 1, standard error 1/sqrt(3), t = 3 sqrt(3) with two degrees of freedom,
    # whose two-sided p is 1 - t / sqrt(2 + t^2).
    paired = paired_difference({0: 5.0, 1: 9.0, 2: 4.0, 9: 1.0}, {2: 1.0, 0: 3.0, 1: 5.0, 8: 1.0}, rising=True)
    assert paired is not None
    t = 3 * math.sqrt(3)
    assert dict(paired.differences) == {0: 2.0, 1: 4.0, 2: 3.0}, "over the common seeds"
    assert paired.mean == pytest.approx(3.0)
    assert paired.standard_error == pytest.approx(1 / math.sqrt(3))
    assert paired.t == pytest.approx(t)
    assert paired.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired.above
    assert verdict(paired) == "above two standard errors"
    falling = paired_difference({0: 5.0, 1: 9.0, 2: 4.0}, {2: 1.0, 0: 3.0, 1: 5.0}, rising=False)
    assert falling is not None
    assert (falling.mean, falling.t) == (pytest.approx(-3.0), pytest.approx(-t))
    assert not falling.above
    assert "the opposite" in verdict(falling)


def test_what_can_not_be_said_is_not_said() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}, rising=True) is None
    one = paired_difference({0: 2.0}, {0: 1.0}, rising=True)
    assert one is not None
    assert (one.mean, one.standard_error, one.t, one.p, one.above) == (1.0, None, None, None, None)
    assert "one seed: nothing can be said" in verdict(one)
    same = paired_difference({0: 0.1 + 0.2, 1: 1.3, 2: 0.8}, {0: 0.2, 1: 1.2, 2: 0.7}, rising=True)
    assert same is not None
    assert (same.mean, same.t, same.p, same.above) == (pytest.approx(0.1), None, None, None)
    assert verdict(same) == "the same difference in every seed: no deviation to test against"
    equal = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, rising=True)
    assert "no difference in any seed" in verdict(equal)
    weak = paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.5}, rising=True)
    assert weak is not None
    assert weak.above
    assert "p is not below 0.05" in verdict(weak)
    assert "within two standard errors" in verdict(paired_difference({0: 1.0, 1: -2.0}, {0: 0.0, 1: 0.5}, rising=True))


# --- the files --------------------------------------------------------------------------------------


def emulated() -> StudyResult:
    """A study with an emulator, made up: two methods, two settings, three seeds."""
    config = StudyConfig(
        "fed|biot", "r.yaml", {"Base": {}, "FedBiOT <b>": {}}, (0, 1, 2), {"beta 0.2": {}, "beta 0.5": {}}, ("Base",),
        (Claim("FedBiOT <b>", "Base", "checked"), Claim("FedBiOT <b>", "Base", "loss", "held_out_emulator")),
    )  # fmt: skip

    def scores(checked: float, loss: float) -> dict[str, Any]:
        overall = {"checked": checked, "exact_match": 0.0, "rouge_l": 0.5, "loss": loss}
        return {"overall": overall, "categories": {"open_qa": {"checked": checked}}}

    outcomes = []
    for seed in range(3):
        metrics = {"held_out": scores(0.01 * seed, 3.0)}
        summary = {"method": "base", "seed": seed, "rounds": 0, "metrics": metrics}
        outcomes.append(Outcome("Base", "all", seed, f"base/all/seed-{seed}", "finished", "", summary))
    for place, setting in enumerate(config.settings):
        for seed in range(3):
            full, emulator = 0.6 + 0.02 * seed - 0.1 * place, 0.5 + 0.01 * seed - 0.1 * place
            metrics = {"held_out": scores(full, 1.0), "held_out_emulator": scores(emulator, 1.25)}
            costs = {"bytes_up": 8e6, "bytes_down": 4e6, "asked": 4, "answered": 2, "training_seconds": 90.0,
                     "trainable_parameters": 1_250_000, "bytes_emulator": 7e6,
                     "client_cost": {"flops_per_step": 2.5e9, "activation_bytes": 3e6}}  # fmt: skip
            summary = {"method": "fedbiot", "seed": seed, "rounds": 2, "metrics": metrics, **costs}
            outcomes.append(Outcome("FedBiOT <b>", setting, seed, "f", "finished", "", summary))
    return StudyResult(config, tuple(outcomes))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_an_emulators_study_shows_the_gap_paired_by_seed_and_what_it_costs() -> None:
    text = study_markdown(emulated())
    heading, _, *lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    first = dict(zip(heading, lines[1], strict=True))
    gap = statistics.stdev([10.0, 11.0, 12.0])
    assert first == {
        "Method": "FedBiOT <b>", "Setting": "beta 0.2",
        "Correct % AdapFu": "62.0 ± 2.0", "Correct % AdapEmu": "51.0 ± 1.0", "Correct % Gap": f"+11.0 ± {gap:.1f}",
        "ROUGE-L %": "50.0 ± 0.0",
        "Loss AdapFu": "1.00 ± 0.00", "Loss AdapEmu": "1.25 ± 0.00", "Loss Gap": "-0.25 ± 0.00",
        "Up per client and round": "4 MB", "Down per client and round": "1 MB", "Traffic in all": "12 MB",
        "Emulator": "7 MB", "Training": "1:30", "Trained parameters": "1.25 M",
        "FLOPs a step": "2.5 G", "Activations": "3 MB",
    }  # fmt: skip
    base = dict(zip(heading, lines[0], strict=True))
    assert (base["Setting"], base["Correct % AdapFu"], base["Correct % Gap"], base["Emulator"]) == (
        "all", "1.0 ± 1.0", "–", "–",
    )  # fmt: skip
    assert "+61.0" in text
    assert "p-values are weak evidence" in text
    assert "over 3 seeds" in text


def test_a_claim_is_tested_in_every_setting_against_what_settings_do_not_bear_on() -> None:
    checked, other, *emulator = checked_claims(emulated())
    assert (checked.setting, other.setting) == ("beta 0.2", "beta 0.5")
    assert checked.paired is not None
    assert checked.paired.mean == pytest.approx(0.61)
    assert [item.paired for item in emulator] == [None, None], "the base model has no emulator"
    assert any("nothing can be said" in line for line in claim_lines(emulated()))


def test_tables_fit_80_columns_and_keep_every_column() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(study_in_terminal(emulated()))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in ("AdapFu %", "AdapEmu %", "Gap", "Loss AdapEmu", "Traffic", "Emulator", "FLOPs/step", "Activations"):
        assert words in text
    assert text.count("beta 0.5 ") >= 3, "every part names its rows"


def test_the_csv_has_one_value_a_line(finished) -> None:
    folder, _, result, _ = finished
    lines = list(csv.DictReader(io.StringIO((folder / "study.csv").read_text())))
    assert list(lines[0]) == ["method", "setting", "seed", "dataset", "category", "metric", "value"]
    [outcome] = [o for o in result.outcomes if (o.method, o.setting, o.seed) == ("FedIT", "rank 3", 1)]
    mine = [line for line in lines if (line["method"], line["setting"], line["seed"]) == ("FedIT", "rank 3", "1")]
    found = {(line["dataset"], line["category"], line["metric"]): float(line["value"]) for line in mine}
    assert len(found) == len(mine), "one line each"
    held_out = outcome.summary["metrics"]["held_out"]
    assert found["held_out", "overall", "loss"] == held_out["overall"]["loss"]
    for category in ("colour", "size", "sum"):
        assert found["held_out", category, "rouge_l"] == held_out["categories"][category]["rouge_l"]
    assert found["", "", "bytes_up"] == outcome.summary["bytes_up"]
    assert "open_qa,checked,0.6" in study_csv(emulated())


def test_the_page_stands_alone_and_escapes_what_a_label_says(finished) -> None:
    page = study_page(emulated())
    assert "<b>" not in page.partition("<main ")[2].replace("<b></b>", "")
    assert "FedBiOT &lt;b&gt;" in page
    assert page.count("<svg") == 4, "two settings, headline and loss"
    assert page.count('class="whisker"') == 12, "every bar of three seeds has its deviation, as zero has"
    assert "color-scheme: light dark" in page
    for text in (page, (finished[0] / "study.html").read_text()):
        found = re.findall(r"""(?:src|href)="[^"]*|url\(|@import|<script|https?://""", text)
        assert found == ['href="#main', "<script"], "to skip to the content, and the page's own lines"


def test_the_means_are_those_of_the_runs(finished) -> None:
    folder, _, result, _ = finished
    [row] = [row for row in rows(result) if (row.label, row.setting) == ("FedIT", "rank 3")]
    losses = [
        json.loads((folder / f"fedit/rank-3/seed-{seed}/summary.json").read_text())["metrics"]["held_out"]["overall"][
            "loss"
        ]
        for seed in (0, 1)
    ]
    assert row.summary["metrics"]["held_out"]["overall"]["loss"] == pytest.approx(statistics.fmean(losses))
    shown = f"{statistics.fmean(losses):.2f} ± {statistics.stdev(losses):.2f}"
    assert shown in (folder / "study.md").read_text()
    twin = next(item for item in checked_claims(result) if item.claim.than == "The same again")
    assert twin.paired is not None
    assert verdict(twin.paired).startswith("no difference in any seed")
