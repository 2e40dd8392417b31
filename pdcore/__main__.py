"""``python -m pdcore`` is the same as ``pdcore``."""

from .cli import main

if __name__ == "__main__":
    main()
