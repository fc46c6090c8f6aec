"""`python -m rnnkit`: the same as the command `rnnkit`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
