"""Optional experiment trackers (TensorBoard, W&B, MLflow) through accelerate, fed from the same events as the log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flocktune.config.schema import RunConfig
from flocktune.errors import Problem, UserError


def refuse_missing(config: RunConfig) -> None:
    """Raise UserError that names every tracker of the recipe that is not installed."""
    if not config.trackers:
        return  # accelerate takes a second to import
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    UserError.raise_all(
        Problem("trackers", "installed trackers", repr(name), f"Install it: pip install {name}")
        for name in config.trackers
        if name not in available
    )


class Trackers:
    """A listener that passes numbers on. ``metrics.jsonl`` stays the one truth; nothing is read back."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Raises UserError for a tracker that is not installed. Nothing is opened before a run starts."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        refuse_missing(config)
        self.folder = folder
        self._kinds = [LOGGER_TYPE_TO_CLASS[name] for name in config.trackers]
        self._open: list[Any] = []

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Pass the numbers of a round, an alignment or an evaluation on; a new run opens trackers of its own."""
        match event["event"]:
            case "run_start" | "resumed":
                name = f"{event.get('name', self.folder.name)}-{event.get('method', 'resumed')}"
                # Only trackers that write files ask for a folder.
                self._open = [
                    kind(
                        name,
                        **({"logging_dir": str(self.folder / "trackers")} if kind.requires_logging_directory else {}),
                    )
                    for kind in self._kinds
                ]
                for tracker in self._open:
                    getattr(tracker, "start", lambda: None)()
            case "round":
                self._log(
                    {key: event[key] for key in ("train_loss", "update_norm", "aggregation_error")}, event["round"] + 1
                )
            case "alignment":
                losses = {f"alignment/{key}": event.get(key) for key in ("loss_first", "loss_last")}
                fidelity = {
                    f"fidelity/{rows}/{when}": value
                    for rows, measured in (event.get("fidelity") or {}).items()
                    for when, value in (measured or {}).items()
                }
                self._log({**losses, **fidelity}, event["round"])
            case "evaluation":
                self._log(
                    {f"{event['dataset']}/{key}": value for key, value in event["overall"].items()}, event["round"]
                )
            case "run_end":
                for tracker in self._open:
                    tracker.finish()

    def on_client(self, done: int, total: int, client: str) -> None:
        """Nothing to tell."""

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for tracker in self._open:
            tracker.log(numbers, step=step)
