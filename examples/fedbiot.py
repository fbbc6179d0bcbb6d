"""FedBiOT in ten lines: clients get an emulator, never the full model. Offline, half a minute."""

import flocktune

config = flocktune.parse_recipe("""
name: fedbiot
method: fedbiot
rounds: 2
data: {columns: {client: category}, template: short, max_tokens: 128, test_rows_per_category: 2}
allocation: {kind: natural}
local: {steps: 5, lr: 4.0e-3, proximal_mu: 1.0e-3, proximal_on: products}
emulator: {adapter_layers: 2, drop: 0.5}
alignment: {first_steps: 10, steps: 2}
evaluation: {generate: false}
""")
summary = flocktune.run(config)
print("in the full model:", round(summary["metrics"]["held_out"]["overall"]["loss"], 3), "nats a token")
