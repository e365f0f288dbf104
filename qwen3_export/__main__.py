"""`python -m qwen3_export` is the command line."""

from qwen3_export.cli import main

if __name__ == "__main__":
    main()
