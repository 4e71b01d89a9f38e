"""`wsgateway config ...`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from wsgateway import config
from wsgateway.cli import settings
from wsgateway.errors import ConfigError, StartError


def check(arguments: argparse.Namespace) -> None:
    """Say whether the configuration can be used."""
    settings.check(settings.load(arguments))


def show(arguments: argparse.Namespace) -> None:
    """Show each effective value and where it came from, secrets masked."""
    loaded = settings.load(arguments)
    rows = {}
    for path, key in config.keys().items():
        value = key.value(loaded.config)
        shown = '"***"' if key.secret and value else config.render(key, value)
        rows[path] = {"value": shown, "origin": loaded.origins[path], "environment": key.variable}
    if arguments.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    width = max(len(f"{path} = {row['value']}") for path, row in rows.items())
    for path, row in rows.items():
        print(f"{path} = {row['value']}".ljust(min(width, 60)) + f"  # {row['origin']}")


def init(arguments: argparse.Namespace) -> None:
    """Write a commented configuration file that only its owner can read."""
    path = Path(arguments.output)
    mode = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if arguments.force else os.O_EXCL)
    try:
        with open(os.open(path, mode, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123 - with a mode
            file.write(config.render_toml())
    except FileExistsError:
        raise ConfigError(f"{path} exists already: --force overwrites it") from None
    except OSError as error:
        raise StartError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"wrote {path}")


def docs(_: argparse.Namespace) -> None:
    """Print the reference of every key."""
    print(config.render_reference(), end="")
