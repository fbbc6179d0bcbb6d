"""Your own rows: one JSON object a line, who owns it in a column. The columns may have any names."""

import json
from pathlib import Path

import flocktune

rows = [{"ask": f"What is {n} plus 1?", "say": str(n + 1), "ward": f"ward-{n % 3}"} for n in range(48)]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
config = flocktune.parse_recipe("""
name: own-data
rounds: 2
data: {train: rows.jsonl, columns: {instruction: ask, response: say, client: ward}, template: short}
allocation: {kind: natural}
local: {steps: 2}
evaluation: {max_new_tokens: 4}
""")
print(flocktune.run(config)["metrics"]["held_out"]["overall"])
