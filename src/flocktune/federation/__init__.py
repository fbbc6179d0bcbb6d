"""The coordinator's side of a real federation: its folder, keys and processes, enrolled owners, and the runs."""
