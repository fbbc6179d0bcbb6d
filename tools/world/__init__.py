"""The small invented world behind the embedded default model and its instructions."""
