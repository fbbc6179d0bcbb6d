"""Several runs on one page: what differs in their settings, which did best, and when scores can not be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flocktune.report.compare import compare, in_words
from flocktune.report.compare import write_comparison as write_compared
from flocktune.report.settings import differing
from test_report import check_page, write_comparison, write_run


def changed(folder: Path, *, digest: str = "", recipe: str = "", **summary: object) -> Path:
    """A run, with another recipe, other test rows, another summary."""
    if digest:
        log = folder / "metrics.jsonl"
        first, rest = log.read_text().split("\n", 1)
        log.write_text(json.dumps({**json.loads(first), "test_digest": digest}) + "\n" + rest)
    if recipe:
        (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + recipe)
    written = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**written, **summary}))
    return folder


def run(folder: Path, **more: object) -> Path:
    write_run(folder, rounds=4)
    return changed(folder, **more)


def test_settings_that_differ_and_no_others() -> None:
    recipes = [
        "name: a\nlora: {rank: 8, alpha: 16}\nprivacy: null\nseed: 0\nlocal: {lr: 1.0e-3}",
        "name: b\nlora: {rank: 4, alpha: 16}\nprivacy: {kind: user, epsilon: null, delta: 1.0e-5}\nlocal: {lr: 0.001}",
    ]
    assert differing(recipes) == {"lora.rank": ("8", "4"), "privacy": ("–", "kind: user, delta: 1e-05")}
    assert differing(["rounds: 3", "a: [no recipe", "[1]"]) == {"rounds": ("3", "–", "–")}


def test_the_best_is_named_with_what_differs(tmp_path: Path) -> None:
    low = run(tmp_path / "low", digest="aa", recipe="local: {lr: 0.1}\n")
    high = run(tmp_path / "high", digest="aa", recipe="local: {lr: 0.2}\n")
    for folder, share in ((low, 0.25), (high, 0.5)):
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"]["test"]["overall"]["checked"] = share
        changed(folder, **summary)
    compared = compare([low, high])
    assert not compared.obstacles
    assert in_words(compared) == (
        "They differ in local.lr. high does best: Correct 50.0 %, 25.0 points from the next, low; without several "
        "seeds of both, chance is not told apart."
    )
    write_compared([low, high], tmp_path / "new" / "page.html")
    text, page = check_page(tmp_path / "new" / "page.html")
    assert 'class="best"' in text
    assert re.search(r'<th scope="row">local.lr</th><td>0.1</td><td>0.2</td>', text)
    assert page.counts["svg"] == 1 + 4 + 8  # side by side, four curves, eight categories


def test_over_seeds_a_difference_is_set_beside_its_spread(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_comparison(tmp_path / name, seeds=3)
    said = in_words(compare([tmp_path / "one", tmp_path / "two"]))
    assert said.startswith("Their settings are the same. The best two are level: Correct ")
    whole = json.loads((tmp_path / "one" / "summary.json").read_text())
    for better, words in ((0.001, "within"), (0.2, "beyond")):
        whole["fedit"]["metrics"]["test"]["overall"]["checked"] = 0.61 + better
        (tmp_path / "one" / "summary.json").write_text(json.dumps(whole))
        assert f"{words} the spread of their seeds." in in_words(compare([tmp_path / "one", tmp_path / "two"]))


def test_other_test_rows_or_metrics_are_said_and_nothing_is_called_best(tmp_path: Path, cli) -> None:
    one, other = run(tmp_path / "one", digest="aa" * 32), run(tmp_path / "other", digest="bb" * 32)
    said = cli("report", one, other, "--to", tmp_path / "page.html")
    assert said.code == 0
    assert "Not the same test rows (one: digest aaaaaaaa; other: digest bbbbbbbb)." in " ".join(said.err.split())
    assert "Their scores can not be compared." in said.out
    text, _ = check_page(tmp_path / "page.html")
    assert 'class="best"' not in text
    assert "These scores can not be compared" in text
    loss = changed(run(tmp_path / "loss", digest="aa" * 32), metrics={"test": {"overall": {"loss": 2.0}}})
    [obstacle] = compare([one, loss]).obstacles
    assert obstacle.startswith("Not the same metric (one: Correct; loss: Loss)")


def test_without_digests_counts_and_seeds_tell_test_rows_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run", rounds=3)
    write_run(tmp_path / "b" / "run", rounds=3)
    write_run(tmp_path / "seed", rounds=3, seed=1)
    same = compare([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert not same.obstacles
    assert same.labels == ["a/run", "b/run"]
    assert (
        "80 rows of 8 categories, unknown data, seed 1"
        in compare([tmp_path / "a" / "run", tmp_path / "seed"]).obstacles[0]
    )
    assert compare([tmp_path / "seed", tmp_path / "seed"]).labels == ["seed", "seed (2)"]


def test_a_baseline_among_runs_sends_nothing_and_one_run_s_page_can_go_elsewhere(tmp_path: Path, cli) -> None:
    write_run(tmp_path / "base-like", rounds=3)
    write_run(tmp_path / "all", "centralised", rounds=3)
    compared = compare([tmp_path / "base-like", tmp_path / "all"])
    sent = [summary["bytes_up"] for summary in compared.experiment.summaries.values()]
    assert sent[0] > 0
    assert sent[1] is None
    assert cli("report", tmp_path / "all", "--to", tmp_path / "there" / "x.html").code == 0
    check_page(tmp_path / "there" / "x.html")
    assert not (tmp_path / "all" / "report.html").exists()
    said = cli("report", tmp_path / "all", tmp_path / "nowhere")
    assert said.code == 2
    assert "a run's folder" in said.err
