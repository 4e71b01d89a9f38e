"""Lets `python -m wsgateway` do what the console script does."""

from wsgateway.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
