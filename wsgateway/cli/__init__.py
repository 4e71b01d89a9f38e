"""The command line: words in, one exit code out.

Only this package prints. Commands are imported when they are called, so that `--help` stays fast.

Exit codes: 0 done, 1 failed or crashed, 2 wrong usage, 3 cannot start now (port busy, database
locked), 78 the configuration or the database has to be mended first, 130 interrupted by Ctrl+C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from wsgateway import __version__
from wsgateway.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    GatewayError,
    one_line,
    without_tokens,
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{self.prog}: {message} (see {self.prog} --help)")
        raise SystemExit(EXIT_USAGE)


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = build_parser().parse_args(argv)
    module, function = arguments.command
    try:
        command = getattr(importlib.import_module(f"wsgateway.cli.{module}"), function)
        code = int(command(arguments) or EXIT_OK)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except GatewayError as error:
        _complain(f"wsgateway: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        _drop_output()
        return EXIT_OK
    except OSError as error:
        _drop_output()
        if module == "serve" and error.filename is None:
            raise  # a crash, whose traceback is wanted
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"wsgateway: {where}{error.strerror or 'input or output failed'}")
        return EXIT_CRASH
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _complain(text: str) -> None:
    """Say what is wrong, in one line that shows no token, wherever one was typed by mistake."""
    print(masked(text), file=sys.stderr)


def masked(text: str) -> str:
    """One line in which nothing is left that looks like a token."""
    return without_tokens(one_line(text))


def _drop_output() -> None:
    """Nothing more can be written: what is buffered must not be tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(
        prog="wsgateway",
        description="A standalone WebSocket gateway for fleets of devices.",
        epilog="exit codes: 0 done, 1 failed, 2 usage, 3 cannot start now (port busy, database "
        "locked), 78 configuration",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wsgateway {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_config(commands)
    _add_database(commands)
    _add_user(commands)
    _add_device(commands)
    _add_token(commands)
    _add_send(commands)
    _add_looks(commands)
    _add_disconnect(commands)
    _add_queue(commands)
    _add_doctor(commands)
    _add_service(commands)
    _add_reload(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    serve = commands.add_parser("serve", help="run the gateway", allow_abbrev=False)
    serve.set_defaults(command=("serve", "serve"))
    _add_settings(serve)
    serve.add_argument("--demo", action="store_true", help="loopback, with a demo user and token")
    serve.add_argument("--check", action="store_true", help="check the configuration and stop")
    for flag, key in SERVE_FLAGS.items():
        serve.add_argument(flag, metavar="VALUE", dest=key, help=f"same as --set {key}=VALUE")


SERVE_FLAGS = {
    "--host": "server.host",
    "--port": "server.port",
    "--database": "auth.database",
    "--loop": "runtime.loop",
    "--log-level": "log.level",
    "--log-format": "log.format",
}


def _add_config(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "config", "check, show or create the configuration")
    check = _verb(verbs, "config", "check", "check the configuration; 0 if it can be used")
    show = _verb(verbs, "config", "show", "show each value and where it came from")
    show.add_argument("--json", action="store_true", help="as JSON")
    init = _verb(verbs, "config", "init", "write a commented configuration file")
    init.add_argument("-o", "--output", default="config.toml", metavar="FILE")
    init.add_argument("--force", action="store_true", help="overwrite the file")
    _verb(verbs, "config", "docs", "print the reference of every key as Markdown")
    for parser in (check, show):
        _add_settings(parser)


def _add_database(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "db", "create the token database, or bring it up to date")
    _add_settings(
        _verb(verbs, "accounts", "init", "create it, or bring its schema up to date", "db_")
    )


def _add_user(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "user", "add, list, enable and disable users")
    add = _account_verb(verbs, "user", "add", "add a user")
    add.add_argument("name")
    add.add_argument("--id", type=_identifier, help="number it so, e.g. as in your backend")
    _account_verb(verbs, "user", "list", "list the users")
    for verb in ("enable", "disable"):
        help_text = f"{verb} a user" + ("; his devices are cut" if verb == "disable" else "")
        _account_verb(verbs, "user", verb, help_text).add_argument("user", help="name or id")


def _add_device(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "device", "add, list, bind and unbind devices")
    add = _account_verb(verbs, "device", "add", "add a device")
    add.add_argument("name")
    add.add_argument("--id", type=_identifier, help="number it so, e.g. as in your backend")
    add.add_argument("--user", help="bind it to this user (name or id)")
    _account_verb(verbs, "device", "list", "list the devices")
    texts = {
        "bind": "bind a device to a user; his first one becomes the primary",
        "unbind": "take a device from a user and revoke his tokens for it",
        "primary": "make a bound device the user's primary one",
    }
    for verb, text in texts.items():
        parser = _account_verb(verbs, "device", verb, text)
        parser.add_argument("device", help="name or id")
        parser.add_argument("--user", required=True, help="name or id")


def _add_token(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "token", "create, list, revoke and check tokens")
    create = _account_verb(verbs, "token", "create", "create a token; it is shown only now")
    create.add_argument("--user", required=True, help="name or id")
    create.add_argument("--device", help="only for this device (name or id)")
    create.add_argument("--scope", choices=("device", "api", "admin"), default="device")
    create.add_argument("--expires", metavar="DURATION", help='e.g. "90d"; default: never')
    create.add_argument("--label", default="", help="for people")
    listing = _account_verb(verbs, "token", "list", "list the tokens, never their text")
    listing.add_argument("--user", help="only of this user (name or id)")
    revoke = _account_verb(verbs, "token", "revoke", "revoke a token; its devices are cut")
    revoke.add_argument("token", help="its id, its text, or - to read the text from stdin")
    check = _account_verb(verbs, "token", "check", "say whether a token opens the device socket")
    check.add_argument("token", help="its text, or - to read it from stdin (argv shows in ps)")


def _add_send(commands: argparse._SubParsersAction[Parser]) -> None:
    send = _remote(commands, "send", "send", "send a message through a running gateway")
    target = send.add_mutually_exclusive_group(required=True)
    target.add_argument("--user", type=_identifier, help="to a user (id)")
    target.add_argument("--device", type=_identifier, help="to a device (id)")
    target.add_argument("--all", action="store_true", help="to everybody")
    _add_message(send)
    send.add_argument("--timeout", type=float, metavar="SECONDS", help="wait so long for receipts")
    send.add_argument("--no-wait", action="store_true", help="do not wait for other instances")
    send.add_argument("--require-online", action="store_true", help="fail if nobody is connected")
    send.add_argument("--key", metavar="KEY", help="idempotency key: makes a repetition safe")


def _add_message(parser: Parser) -> None:
    parser.add_argument("message", nargs="?", help="JSON or text; - or nothing: from stdin")
    parser.add_argument("-f", "--file", help="read the message from a file")
    parser.add_argument("--type", default="system", help="the message's type (default: system)")


def _add_looks(commands: argparse._SubParsersAction[Parser]) -> None:
    _remote(commands, "status", "status", "show a running gateway at one look")
    online = _remote(commands, "online", "online", "list the connected users")
    connections = _remote(commands, "connections", "connections", "list the connections")
    connections.add_argument("--user", type=_identifier, help="of a user (id)")
    connections.add_argument("--device", type=_identifier, help="of a device (id)")
    for parser in (online, connections):
        parser.add_argument("--limit", type=int, default=10_000, help="entries at most")


def _add_disconnect(commands: argparse._SubParsersAction[Parser]) -> None:
    disconnect = _remote(commands, "disconnect", "disconnect", "cut connections (4003)")
    target = disconnect.add_mutually_exclusive_group(required=True)
    target.add_argument("--user", type=_identifier, help="of a user (id)")
    target.add_argument("--device", type=_identifier, help="of a device (id)")
    target.add_argument("--connection", metavar="ID", help="one connection")
    disconnect.add_argument("--reason", default="disconnected", help="told to the devices")


def _add_queue(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "queue", "look at, fill and clear the queue of messages")
    _remote(verbs, "queue_size", "size", "show how many messages wait")
    add = _remote(verbs, "queue_add", "add", "put a message for a user into the queue")
    add.add_argument("--user", type=_identifier, required=True, help="id")
    _add_message(add)
    _remote(verbs, "queue_clear", "clear", "throw away what waits")


def _add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "say what is wrong with a gateway and its surroundings, and what to do"
    doctor = commands.add_parser("doctor", help=text, description=text, allow_abbrev=False)
    doctor.set_defaults(command=("doctor", "doctor"))
    _add_settings(doctor)
    doctor.add_argument(
        "--device-url", metavar="URL", help="ws:// or wss:// address of devices, e.g. a proxy's"
    )
    doctor.add_argument(
        "--url", help="of the HTTP API; default: $WSGATEWAY_URL, else as configured"
    )
    doctor.add_argument("--key-file", metavar="FILE", help="file that holds a key of the HTTP API")
    visitor = doctor.add_mutually_exclusive_group()
    visitor.add_argument(
        "--token-file", metavar="FILE", help="be the device whose token this holds; - for stdin"
    )
    visitor.add_argument(
        "--create", action="store_true", help="be a user who is made for it and removed after"
    )
    doctor.add_argument(
        "--idle", type=_seconds, metavar="SECONDS", help="be silent so long: who cuts the device?"
    )
    doctor.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="for each step (default: 5)",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _add_service(commands: argparse._SubParsersAction[Parser]) -> None:
    verbs = _noun(commands, "service", "install and remove the units of systemd")
    texts = {
        "install": "write the units, and a configuration where there is none",
        "uninstall": "remove the units; configuration and database stay",
    }
    for verb, text in texts.items():
        parser = _verb(verbs, "service", verb, text)
        parser.add_argument("--root", default="/", metavar="DIR", help="below this folder")
        parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
        parser.add_argument("--force", action="store_true", help="also files that were changed")


def _add_reload(commands: argparse._SubParsersAction[Parser]) -> None:
    _remote(commands, "reload", "reload", "have a running gateway read its configuration again")


def _remote(
    verbs: argparse._SubParsersAction[Parser], function: str, name: str, text: str
) -> Parser:
    """A command that calls a running gateway."""
    parser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=("remote", function))
    parser.add_argument(
        "--url", help="of its HTTP API; default: $WSGATEWAY_URL, else port 8001 here"
    )
    parser.add_argument("--key-file", metavar="FILE", help="file that holds the key")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only a number or ids")
    return parser


def _identifier(text: str) -> int:
    number = int(text)
    if not 0 < number < 1 << 63:
        raise ValueError(text)
    return number


_identifier.__name__ = "id"  # as argparse words its error


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 3600:
        raise ValueError(text)
    return number


_seconds.__name__ = "number of seconds"


def _noun(
    commands: argparse._SubParsersAction[Parser], name: str, text: str
) -> argparse._SubParsersAction[Parser]:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    return parser.add_subparsers(metavar="VERB", required=True)


def _verb(
    verbs: argparse._SubParsersAction[Parser], module: str, name: str, text: str, prefix: str = ""
) -> Parser:
    parser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(command=(module, prefix + name))
    return parser


def _account_verb(
    verbs: argparse._SubParsersAction[Parser], noun: str, name: str, text: str
) -> Parser:
    parser = _verb(verbs, "accounts", name, text, f"{noun}_")
    _add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the id or token")
    return parser


def _add_settings(parser: Parser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one value over the file and the environment, e.g. limits.messages=200",
    )
