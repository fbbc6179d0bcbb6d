"""``python -m flocktune`` is the command ``flocktune``."""

from flocktune.cli import main

main()
