"""What a run tells of itself (`python examples/fedit.py` makes one): one event a line, the only truth about it."""

from pathlib import Path

from flocktune.report.events import read_events

for event in read_events(Path("runs/fedit/metrics.jsonl")):
    if event["event"] == "round":
        slowest = max(event["clients"], key=lambda name: event["clients"][name]["seconds"])
        print(f"round {event['round'] + 1}: loss {event['train_loss']:.3f}, {event['bytes_up']:,} bytes up, {slowest}")
