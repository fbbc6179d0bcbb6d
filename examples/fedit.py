"""FedIT in ten lines: ten clients of the embedded world tune one adapter. Offline, half a minute."""

import flocktune

config = flocktune.parse_recipe("""
name: fedit
rounds: 2
data: {template: short, max_tokens: 128, test_rows_per_category: 2}
allocation: {kind: dirichlet, clients: 10, alpha: 0.3, min_rows: 24}
local: {steps: 5, lr: 2.0e-3}
evaluation: {max_new_tokens: 8}
""")
summary = flocktune.run(config)
print("held-out loss:", round(summary["metrics"]["held_out"]["overall"]["loss"], 3), "nats a token")
