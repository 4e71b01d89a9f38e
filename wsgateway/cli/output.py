"""What commands print: sentences and tables for people, JSON and bare words for scripts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from wsgateway.errors import one_line


def tell(arguments: argparse.Namespace, row: Mapping[str, Any], quiet: object, text: str) -> None:
    """Print one result: a sentence, JSON, or only the word that scripts want."""
    if arguments.json:
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(quiet if arguments.quiet else text)


def rows(
    arguments: argparse.Namespace, columns: Sequence[str], found: Sequence[Mapping[str, Any]]
) -> None:
    """Print rows: a table, JSON, or only what names each."""
    if arguments.json:
        print(json.dumps(list(found), ensure_ascii=False))
    elif arguments.quiet:
        for row in found:
            print(row["id"])
    else:
        table = [columns, *([_cell(row[column]) for column in columns] for row in found)]
        widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
        for line in table:
            print(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(line, widths, strict=True)
                ).rstrip()
            )


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else one_line(str(value))
