"""Measured claims, each beside what it is compared to: ``python -m benchmarks [NAME ...] [--quick]``."""
