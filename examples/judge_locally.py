"""Answers of two files scored by a judge on this machine: any server that speaks OpenAI's chat completions.

transformers serve --port 8000        (or vLLM, or Ollama; other addresses: JUDGE_URL)
"""

import json
import os
from pathlib import Path

from flocktune.evaluation.judge.asking import Judge, Spent, ask_all
from flocktune.evaluation.judge.client import Endpoint
from flocktune.judging.contest import contest, result
from flocktune.judging.contestants import line_up

for name, answer in (("ours", "Paris is the capital of France."), ("theirs", "Lyon")):
    Path(f"{name}.jsonl").write_text(json.dumps({"instruction": "Capital of France?", "answer": answer}) + "\n")
judge = Judge(Endpoint(os.environ.get("JUDGE_URL", "http://127.0.0.1:8000/v1"), "judge"))
found = contest(line_up(Path("ours.jsonl"), ["theirs.jsonl"], Path("judged")), draws=1)
spent = Spent()
outcomes = ask_all(judge, found.duels, Path("judged"), spent)
print(json.dumps(result(found, outcomes, judge, 1, spent)["pairs"], indent=1))
