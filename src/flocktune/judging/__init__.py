"""Answers judged pair by pair: a run beside its baselines, other runs, or answers made elsewhere."""
