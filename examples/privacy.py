"""Differential privacy of clients: what one client's rows can change is bounded. Needs the extra `privacy`."""

import flocktune

config = flocktune.parse_recipe("""
name: private
rounds: 2
data: {template: short, max_tokens: 128, test_rows_per_category: 2}
allocation: {kind: iid, clients: 20}
scheduling: {selection: {kind: poisson, fraction: 0.5}}
local: {steps: 2, lr: 2.0e-3}
aggregation: {weights: equal}
privacy: {kind: user, clip_norm: 0.5, epsilon: 8, delta: 1.0e-2}
evaluation: {generate: false}
""")
summary = flocktune.run(config)
print("epsilon spent:", round(summary["privacy"]["epsilon"], 2), "at delta", config.privacy.delta)
