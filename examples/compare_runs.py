"""Methods and seeds in one study, and what came out, cell by cell. The same again goes on where it stopped."""

from pathlib import Path

from flocktune.api import study

Path("compared.yaml").write_text("""
name: compared
recipe:
  rounds: 1
  data: {template: short, max_tokens: 128, test_rows_per_category: 1}
  allocation: {kind: dirichlet, clients: 4, alpha: 0.3}
  local: {steps: 2}
  evaluation: {generate: false}
seeds: [0, 1]
methods:
  FedIT: {method: fedit}
  FedProx: {local.proximal_mu: 0.1}
claims: [{better: FedProx, than: FedIT, metric: loss}]
""")
for cell in study("compared.yaml").outcomes:
    print(cell.method, cell.seed, cell.summary["metrics"]["held_out"]["overall"]["loss"])
print(Path("runs/compared/study.md").read_text())
