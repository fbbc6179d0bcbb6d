"""A finished run (`python examples/fedit.py` makes it): evaluated, asked, and written as a PEFT adapter."""

from pathlib import Path

from flocktune.exporting import export_result
from flocktune.results import answer_stream, evaluate_on, open_result

run = Path("runs/fedit")
tuned = open_result(run)
print(evaluate_on(tuned, max_rows=4).as_dict()["overall"])
print("".join(answer_stream(tuned, "Name three fruits.", max_new_tokens=16)))
print("PEFT adapter:", export_result(run, None, Path("fedit-adapter")))
