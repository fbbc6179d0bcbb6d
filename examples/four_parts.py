"""FedIT by hand: its four parts, each used alone. Runs offline on the embedded world in about a minute."""

from __future__ import annotations

import torch

import flocktune as ft
from flocktune.config.schema import Columns, Dirichlet, LocalConfig, LoraConfig, ModelConfig, SchedulingConfig, Uniform
from flocktune.tensors import add_scaled, subtract

ROUNDS, SEED = 2, 0
local = LocalConfig(steps=5, lr=2e-3)

# 1. Client data allocation: who holds what.
examples = ft.read_examples("embedded", Columns())
categories = [example.category for example in examples]
train, test = ft.hold_out(categories, per_category=5, seed=SEED)
parts = ft.allocate(
    Dirichlet(clients=5, alpha=0.3, min_rows=24),
    categories=[categories[row] for row in train],
    clients=[None] * len(train),
    texts=list,
    seed=SEED,
).clients
rows = {client: [train[row] for row in part] for client, part in parts.items()}
print("Jensen-Shannon distance:", round(ft.heterogeneity(rows, categories).distance, 2))

# The base model, its tokens, an adapter.
model, tokenizer = ft.load_model(ModelConfig(), torch.device("cpu")), ft.load_tokenizer(ModelConfig())
encoded, _ = ft.encode(examples, tokenizer, template="short", max_tokens=128, train_on="responses")
adapter = ft.attach(model, LoraConfig(rank=8), seed=SEED)
state = adapter.tensors()

for number in range(ROUNDS):
    updates = []
    # 2. Scheduling: who takes part.
    cohort = ft.select(
        SchedulingConfig(Uniform(fraction=0.6)),
        {client: len(own) for client, own in rows.items()},
        round=number,
        seed=SEED,
    )
    for client in cohort.asked:
        # 3. Local training.
        adapter.load(state)
        batches = ft.training_batches(
            encoded, rows[client], batch_size=8, batching="padded", pad_id=tokenizer.pad_token_id, seed=number,
            steps=local.steps, epochs=None,
        )  # fmt: skip
        metrics = ft.fit(model, adapter.parameters, batches, local, total_steps=local.steps, seed=number)
        updates.append(ft.Update(subtract(adapter.tensors(), state), weight=len(rows[client]), metrics=metrics))
    # 4. Aggregation.
    merged = ft.weighted_mean(updates)
    state = add_scaled(state, merged.delta)
    print(f"round {number + 1}: {', '.join(cohort.asked)}; loss {merged.metrics['loss'].value:.3f}")
