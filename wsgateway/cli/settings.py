"""The configuration as a command's arguments choose it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wsgateway import config, handlers, providers
from wsgateway.cli import SERVE_FLAGS
from wsgateway.errors import UsageError
from wsgateway.metrics import Metrics
from wsgateway.tls import Tls


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


def check(loaded: config.Loaded) -> None:
    """Try everything that a configuration names and that needs nothing running; say that it is ok.

    Raises:
        ConfigError: what cannot be used.

    """
    handlers.load(loaded.config.handlers.modules)
    providers.build(loaded.config, Metrics())
    if loaded.config.tls.certificate:
        Tls(loaded.config, Metrics())
    print(f"configuration ok ({loaded.file or 'defaults'})")
