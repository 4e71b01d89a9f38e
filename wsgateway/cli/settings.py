"""The configuration as a command's arguments choose it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wsgateway import config
from wsgateway.cli import SERVE_FLAGS
from wsgateway.errors import UsageError


def load(arguments: argparse.Namespace) -> config.Loaded:
    """Read the configuration; its warnings go to standard error."""
    loaded = read(arguments, arguments.config)
    for warning in loaded.warnings:
        print(f"wsgateway: {warning}", file=sys.stderr)
    return loaded


def read(arguments: argparse.Namespace, file: str | Path | None) -> config.Loaded:
    """Read the configuration from a file, or from where one is found; the flags are as they were."""
    flags: dict[str, object] = {}
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write KEY=VALUE, e.g. --set limits.messages=200")
        flags[key.strip()] = value.strip()
    for key in SERVE_FLAGS.values():
        if getattr(arguments, key, None) is not None:
            flags[key] = getattr(arguments, key)
    return config.load(file, flags=flags)
