"""`python -m compressor` is the console program."""

from __future__ import annotations

from compressor.cli.main import main

if __name__ == "__main__":
    main()
