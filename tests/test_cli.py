"""What each command prints, changes and ends with: as a table, as JSON, quietly, and when it fails.

Every command runs as a process of its own; each failure is one line on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from wsgateway import __version__, auth, config, store
from wsgateway.cli import build_parser, main

Run = Callable[..., subprocess.CompletedProcess[str]]
TOKEN = r"wsg_[\w-]{43}"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database of alice, who has a speaker, and bob, who has nothing, where commands find it."""
    path = tmp_path / "state" / "wsgateway" / "wsgateway.db"

    async def fill() -> None:
        async with store.open_to_write(path, create=True) as db:
            await db.bind(await db.add_user("alice"), await db.add_device("speaker"))
            await db.add_user("bob")

    asyncio.run(fill())
    return path


@pytest.fixture
def token(database: Path) -> str:
    """A token of alice, number 1."""
    text = auth.new_token()

    async def add() -> None:
        async with store.open_to_write(database) as db:
            await db.add_token(auth.hash_token(text), 1, "device")

    asyncio.run(add())
    return text


@pytest.fixture
def here(
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command in this process: for long tables, as a process takes a quarter second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", environment["XDG_STATE_HOME"])

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            code: Any = main(list(arguments))
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fails(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a command says when it fails."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("wsgateway")
    assert "Traceback" not in done.stderr
    return done.stderr


# A life of accounts, in each of the three ways to print.

LIFE: list[tuple[str, str, object, str]] = [
    ("user add carol", "user 3 added", {"id": 3, "name": "carol"}, "3"),
    ("user add 小明 --id 4711", "user 4711 added", {"id": 4711, "name": "小明"}, "4711"),
    (
        "device add kitchen --user carol",
        "device 2 added",
        {"id": 2, "name": "kitchen", "user_id": 3},
        "2",
    ),
    ("device add toy --id 17", "device 17 added", {"id": 17, "name": "toy", "user_id": None}, "17"),
    (
        "device bind toy --user carol",
        "device 17 bound to user 3",
        {"user_id": 3, "device_id": 17, "primary": False},
        "17",
    ),
    (
        "device bind toy --user 4711",
        "device 17 bound to user 4711",
        {"user_id": 4711, "device_id": 17, "primary": True},
        "17",
    ),
    (
        "device primary 17 --user carol",
        "device 17 is the primary device of user 3",
        {"user_id": 3, "device_id": 17},
        "17",
    ),
    (
        "device list",
        "id  name     users   primary_of\n1   speaker  1       1\n2   kitchen  3       -\n"
        "17  toy      3,4711  3,4711",
        [
            {"id": 1, "name": "speaker", "users": [1], "primary_of": [1]},
            {"id": 2, "name": "kitchen", "users": [3], "primary_of": []},
            {"id": 17, "name": "toy", "users": [3, 4711], "primary_of": [3, 4711]},
        ],
        "1\n2\n17",
    ),
    (
        "token create --user carol --device toy --expires 90d --label porch",
        "token 1 (shown only now):\nTOKEN",
        {"id": 1, "token": "TOKEN", "user_id": 3, "device_id": 17, "scope": "device",
         "expires_at": "TIME"},
        "TOKEN",
    ),
    (
        "token create --user bob --scope admin",
        "token 2 (shown only now):\nTOKEN",
        {"id": 2, "token": "TOKEN", "user_id": 2, "device_id": None, "scope": "admin",
         "expires_at": None},
        "TOKEN",
    ),
    (
        "device unbind toy --user carol",
        "device 17 taken from user 3, 1 tokens revoked",
        {"user_id": 3, "device_id": 17, "tokens_revoked": 1},
        "17",
    ),
    (
        "token list --user carol",
        "id  user_id  user_name  device_id  scope   label  expires_at                 state\n"
        "1   3        carol      17         device  porch  TIME  revoked",
        [{"id": 1, "user_id": 3, "user_name": "carol", "device_id": 17, "scope": "device",
          "label": "porch", "created_at": "TIME", "expires_at": "TIME", "state": "revoked"}],
        "1",
    ),
    ("token revoke 2", "token 2 revoked; its devices are cut within 5 s", {"id": 2, "user_id": 2}, "2"),
    ("user disable 小明", "user 4711 disabled", {"id": 4711, "active": False}, "4711"),
    (
        "user list",
        "id    name   active  tokens\n1     alice  yes     0\n2     bob    yes     0\n"
        "3     carol  yes     0\n4711  小明     no      0",
        [
            {"id": 1, "name": "alice", "active": True, "tokens": 0},
            {"id": 2, "name": "bob", "active": True, "tokens": 0},
            {"id": 3, "name": "carol", "active": True, "tokens": 0},
            {"id": 4711, "name": "小明", "active": False, "tokens": 0},
        ],
        "1\n2\n3\n4711",
    ),
    ("user enable 4711", "user 4711 enabled", {"id": 4711, "active": True}, "4711"),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["", "--json", "-q"])
def test_a_life_of_accounts(database: Path, cli: Run, mode: str) -> None:
    for command, text, document, quiet in LIFE:
        out = succeeds(cli(*command.split(), *mode.split()))
        if mode == "--json":
            assert len(out.splitlines()) == 1
            out = re.sub(f'"{TOKEN}"', '"TOKEN"', re.sub(f'"{TIME}"', '"TIME"', out))
            assert json.loads(out) == document, command
        else:
            said = re.sub(TOKEN, "TOKEN", re.sub(TIME, "TIME", out))
            assert said == f"{quiet if mode else text}\n", command


def test_an_empty_list_is_a_header_or_nothing(tmp_path: Path, here: Run) -> None:
    path = tmp_path / "state" / "wsgateway" / "wsgateway.db"
    assert succeeds(here("db", "init")) == f"{path}: created\n"
    assert succeeds(here("db", "init")) == f"{path}: up to date\n"
    for noun in ("user", "device", "token"):
        assert len(succeeds(here(noun, "list")).splitlines()) == 1
        assert json.loads(succeeds(here(noun, "list", "--json"))) == []
        assert succeeds(here(noun, "list", "-q")) == succeeds(here(noun, "list", "--quiet")) == ""


def test_the_database_is_where_the_configuration_says(tmp_path: Path, cli: Run) -> None:
    path = tmp_path / "here.db"
    (tmp_path / "c.toml").write_text(f'[auth]\ndatabase = "{path}"\n')
    assert succeeds(cli("db", "init", "-c", "c.toml")) == f"{path}: created\n"
    assert succeeds(cli("user", "add", "a", "--set", f"auth.database={path}", "-q")) == "1\n"
    assert succeeds(cli("user", "list", "-q", WSGATEWAY_AUTH_DATABASE=str(path))) == "1\n"
    assert succeeds(cli("user", "list", "-q", WSGATEWAY_CONFIG="c.toml")) == "1\n"


# Tokens.


def test_a_token_expires_as_said(database: Path, cli: Run) -> None:
    before = time.time()
    for text, seconds in (("90d", 90 * 86400), ("1m30s", 90), ("600", 600)):
        made = json.loads(
            succeeds(cli("token", "create", "--user", "1", "--expires", text, "--json"))
        )
        at = datetime.fromisoformat(made["expires_at"]).timestamp()
        assert before + seconds - 1 <= at <= time.time() + seconds


@pytest.mark.parametrize("given", ["argument", "stdin", "stdin without line end", "stdin, padded"])
def test_a_token_is_given_as_an_argument_or_on_stdin(token: str, here: Run, given: str) -> None:
    stdin = {"stdin": f"{token}\n", "stdin, padded": f"  {token} \r\nmore\n"}.get(given, token)
    place = token if given == "argument" else "-"
    assert succeeds(here("token", "check", place, stdin=stdin)) == "valid\n"
    assert succeeds(here("token", "check", place, "-q", stdin=stdin)) == "valid\n"
    checked = json.loads(succeeds(here("token", "check", place, "--json", stdin=stdin)))
    assert (checked["valid"], checked["reason"]) == (True, None)
    assert (checked["id"], checked["user_id"], checked["state"]) == (1, 1, "valid")
    assert succeeds(here("token", "revoke", place, "-q", stdin=stdin)) == "1\n"
    done = here("token", "check", place, "--json", stdin=stdin)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["reason"] == "revoked"


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("UPDATE tokens SET revoked_at = 1", "revoked"),
        ("UPDATE tokens SET expires_at = 1", "expired"),
        ("UPDATE tokens SET scope = 'admin'", "scope"),
        ("UPDATE users SET active = 0", "disabled"),
        ("DELETE FROM tokens", "unknown"),
    ],
)
def test_checking_a_token_says_why_it_is_not_valid(
    database: Path, token: str, here: Run, sql: str, reason: str
) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute(sql)
    done = here("token", "check", "-", stdin=token)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"not valid for devices: {reason}\n"


def test_no_list_and_no_check_shows_a_token_or_its_hash(token: str, here: Run) -> None:
    for arguments in (("token", "list"), ("token", "check", "-"), ("token", "revoke", "-")):
        for mode in ((), ("--json",), ("-q",)):
            done = here(*arguments, *mode, stdin=token)
            for secret in (token, auth.hash_token(token)):
                assert secret not in done.stdout + done.stderr


def test_a_label_cannot_forge_a_line_of_the_table(database: Path, cli: Run) -> None:
    label = "x\n2  1  alice\x1b[2J"
    succeeds(cli("token", "create", "--user", "alice", "--label", label))
    assert len(succeeds(cli("token", "list")).splitlines()) == 2
    assert "\x1b" not in succeeds(cli("token", "list"))
    assert json.loads(succeeds(cli("token", "list", "--json")))[0]["label"] == label


# What goes wrong.

ERRORS: dict[str, tuple[int, str]] = {
    # wrong words
    "": (2, "the following arguments are required: COMMAND (see wsgateway --help)"),
    "dance": (2, "invalid choice: 'dance'"),
    "user": (2, "the following arguments are required: VERB (see wsgateway user --help)"),
    "user add": (2, "required: name (see wsgateway user add --help)"),
    "user add x y": (2, "unrecognized arguments: y"),
    "user add x --js": (2, "unrecognized arguments: --js"),
    "user add 12": (2, "'12': a name has 1 to 150 printable characters and is not only digits"),
    "user add \udcff": (2, r"'\udcff': a name has"),
    "user add \x1b[31m": (2, r"'\x1b[31m': a name has"),
    f"user add {'x' * 151}": (2, "a name has 1 to 150"),
    "user add x --id one": (2, "argument --id: invalid"),
    "user add x --id 99999999999999999999": (2, "--id"),
    "user add x --id=-5": (2, "--id"),
    "user add x --id=0": (2, "--id"),
    "device add y --id 99999999999999999999": (2, "--id"),
    "device bind speaker": (2, "the following arguments are required: --user"),
    "token create": (2, "the following arguments are required: --user"),
    "token create --user alice --scope root": (2, "invalid choice: 'root'"),
    "token create --user alice --expires never": (2, '--expires never: write a duration such as "90d"'),
    "token create --user alice --expires 0": (2, "--expires 0: write a duration"),
    "token create --user alice --expires=-1d": (2, "--expires -1d: write a duration"),
    "token create --user alice --expires 99999999d": (2, "--expires 99999999d: write a duration"),
    "token check": (2, "the following arguments are required: token"),
    "token check -": (2, "no token given"),
    "user list --set limits": (2, "--set limits: write KEY=VALUE, e.g. --set limits.messages=200"),
    # what does not exist, or does
    "user add alice": (1, "user 'alice' exists already"),
    "user add x --id 1": (1, "user 'x' exists already"),
    "user disable nobody": (1, "no such user: nobody"),
    "user disable 99": (1, "no such user: 99"),
    "user enable \udcff": (1, r"no such user: \udcff"),
    "device add speaker": (1, "device 'speaker' exists already"),
    "device add x --user nobody": (1, "no such user: nobody"),
    "device bind attic --user alice": (1, "no such device: attic"),
    "device bind speaker --user alice": (1, "the binding of device 1 exists already"),
    "device unbind speaker --user bob": (1, "device 1 is not bound to user 2"),
    "device primary speaker --user bob": (1, "device 1 is not bound to user 2"),
    "token create --user bob --device speaker": (1, "device 1 is not bound to user 2"),
    "token list --user nobody": (1, "no such user: nobody"),
    "token revoke 99": (1, "no such token"),
    "token revoke 9999999999999999999999": (1, "no such token"),
    "token revoke nonsense": (1, "no such token"),
    "token revoke \udcff": (1, "no such token"),
    # configuration
    "user list -c none.toml": (78, "none.toml: no such configuration file"),
    "user list --set sever.port=1": (78, "sever.port: no such key; did you mean server.port?"),
    "config check --set server.port=x": (78, "server.port = 'x': must be a whole number"),
    "config check --set handlers.modules=none": (78, "none"),
    "config check --set handlers.modules=tests.broken_handlers": (78, "tests.broken_handlers"),
    "config show --set limits.window=0s": (78, 'limits.window = "0s": must be longer than 0'),
    "config init -o wsgateway-state": (78, "wsgateway-state exists already: --force overwrites it"),
    "config init -o no/such/folder.toml": (3, "cannot be written: No such file or directory"),
    "config init --force -o wsgateway-state": (3, "cannot be written: Is a directory"),
    # the database
    "user list --set auth.database=none.db": (
        78, "none.db: no token database: run wsgateway db init, or set auth.database",
    ),
    "user add x --set auth.database=none.db": (78, "run wsgateway db init"),
    "db init --set auth.database=/dev/null/w.db": (78, "/dev/null/w.db cannot be created"),
    "db init --set auth.database=wsgateway-state": (78, "wsgateway-state cannot be created"),
    "user list --set auth.database=/dev/null": (78, "/dev/null"),
}  # fmt: skip


@pytest.mark.parametrize("command", ERRORS, ids=lambda command: ascii(command)[1:60])
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    database: Path, tmp_path: Path, here: Run, command: str
) -> None:
    (tmp_path / "wsgateway-state").mkdir()
    code, sentence = ERRORS[command]
    before = database.read_bytes()
    assert sentence in fails(here(*command.split(" ") if command else ()), code)
    assert database.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"state", "wsgateway-state"}


@pytest.mark.parametrize("command", ["", "user disable nobody", "user list -c none.toml"])
def test_as_a_process_it_is_one_line_and_that_exit_code_too(
    database: Path, cli: Run, command: str
) -> None:
    code, sentence = ERRORS[command]
    assert sentence in fails(cli(*command.split()), code)


@pytest.mark.parametrize("command", ["user list", "user add x", "token check x", "db init"])
@pytest.mark.parametrize("content", [b"garbage " * 99, b""], ids=["garbage", "empty"])
def test_a_file_that_is_no_database_is_one_line(
    database: Path, here: Run, command: str, content: bytes
) -> None:
    database.write_bytes(content)
    if command == "db init" and not content:
        assert "up to date" in succeeds(here("db", "init"))
    else:
        assert str(database) in fails(here(*command.split()), 78)
        assert database.read_bytes() == content


@pytest.mark.parametrize("command", ["user list", "user add x", "token check x", "db init"])
def test_a_locked_database_is_worth_another_try(database: Path, here: Run, command: str) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        told = fails(here(*command.split()), 3)
    assert told == f"wsgateway: {database} is locked by another program: try again\n"


@pytest.mark.parametrize(
    "command",
    [
        "token check TOKEN TOKEN", "token check --TOKEN", "token TOKEN", "TOKEN",
        "token revoke TOKEN", "token revoke TOKEN --set x", "token check TOKEN -c none.toml",
        "token check TOKEN --set auth.database=none.db", "token list --user TOKEN",
        "token create --user alice --scope TOKEN", "token create --user alice --expires TOKEN",
        "user disable TOKEN", "device bind TOKEN --user alice",
    ],
)  # fmt: skip
def test_no_error_shows_a_token(database: Path, here: Run, command: str) -> None:
    stranger = auth.new_token()
    done = here(*command.replace("TOKEN", stranger).split())
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert stranger not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("raw", "code", "sentence"),
    [(b"", 2, "no token given"), (b"\n", 2, "no token given"), (b"\xff\xfe\n", 1, "no such token"),
     (b"\0\n", 1, "no such token"), (b"x" * 1_000_000, 1, "no such token")],
    ids=["nothing", "an empty line", "no UTF-8", "NUL", "a megabyte"],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_any_input_is_a_token_or_one_line(
    database: Path,
    environment: dict[str, str],
    raw: bytes,
    code: int,
    sentence: str,
    encoding: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wsgateway", "token", "revoke", "-"],
        input=raw, capture_output=True, env=environment | {"PYTHONIOENCODING": encoding}, timeout=30,
    )  # fmt: skip
    text = subprocess.CompletedProcess(done.args, done.returncode, "", done.stderr.decode())
    assert sentence in fails(text, code)


def shell(line: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = line.replace("wsgateway", f"{sys.executable} -m wsgateway")
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=environment, timeout=30
    )


def test_a_closed_input_is_no_token(database: Path, environment: dict[str, str]) -> None:
    assert "no token given" in fails(shell("wsgateway token check - <&-", environment), 2)


@pytest.mark.parametrize("buffering", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_left_is_no_failure(
    database: Path, environment: dict[str, str], buffering: str
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "wsgateway", "config", "show"], stdin=subprocess.DEVNULL,
        stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=30,
        env=environment | {"PYTHONUNBUFFERED": buffering},
    )  # fmt: skip
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("buffering", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["config show", "config docs", "user list"])
def test_an_output_that_takes_nothing_is_one_line(
    database: Path, environment: dict[str, str], command: str, buffering: str
) -> None:
    done = shell(f"wsgateway {command} > /dev/full", environment | {"PYTHONUNBUFFERED": buffering})
    assert "No space left on device" in fails(done, 1)


# Configuration.


def test_the_configuration_is_checked(tmp_path: Path, cli: Run) -> None:
    assert succeeds(cli("config", "check")) == "configuration ok (defaults)\n"
    (tmp_path / "config.toml").write_text("[server]\nport = 1\n")
    assert succeeds(cli("config", "check")) == "configuration ok (config.toml)\n"
    assert succeeds(cli("serve", "--check")) == "configuration ok (config.toml)\n"


def test_the_configuration_is_shown_with_where_it_came_from(tmp_path: Path, cli: Run) -> None:
    (tmp_path / "config.toml").write_text('[limits]\nwindow = "90s"\nmessages = 7\n')
    arguments = ("config", "show", "--set", "log.level=debug")
    rows = json.loads(succeeds(cli(*arguments, "--json", WSGATEWAY_LIMITS_MESSAGES="9")))
    assert list(rows) == list(config.keys())
    expected: dict[str, tuple[str, str]] = {
        "limits.window": ('"90s"', "config.toml:2"),
        "limits.messages": ("9", "$WSGATEWAY_LIMITS_MESSAGES"),
        "log.level": ('"debug"', "command line"),
        "server.port": ("8000", "default"),
    }
    assert {key: (rows[key]["value"], rows[key]["origin"]) for key in expected} == expected
    table = succeeds(cli(*arguments, WSGATEWAY_LIMITS_MESSAGES="9")).splitlines()
    assert len(table) == len(rows)
    for key, (shown, origin) in expected.items():
        assert [line.split("#") for line in table if line.startswith(f"{key} = {shown} ")] == [
            [f"{key} = {shown}".ljust(len(table[0].split("#")[0])), f" {origin}"]
        ]


def test_a_configuration_file_is_written_once_and_privately(tmp_path: Path, cli: Run) -> None:
    path = tmp_path / "config.toml"
    assert succeeds(cli("config", "init")) == "wrote config.toml\n"
    assert path.read_text() == config.render_toml()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("# mine\n")
    assert "config.toml exists already" in fails(cli("config", "init"), 78)
    assert path.read_text() == "# mine\n"
    assert succeeds(cli("config", "init", "--force")) == "wrote config.toml\n"
    assert path.read_text() == config.render_toml()
    assert succeeds(cli("config", "init", "-o", "other.toml")) == "wrote other.toml\n"


def test_the_reference_is_printed(cli: Run) -> None:
    assert succeeds(cli("config", "docs")) == config.render_reference()


# Help.


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[Any, ...]]:
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands(child, (*words, name))


@pytest.mark.parametrize("words", list(commands(build_parser())), ids=" ".join)
def test_each_command_explains_itself(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as ended:
            main([*words, flag])
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"usage: {' '.join(('wsgateway', *words))} ")
        assert err == ""


def test_help_loads_no_library_that_it_does_not_need(environment: dict[str, str]) -> None:
    program = """
import sys
from wsgateway.cli import main
try:
    main(["--help"])
except SystemExit as ended:
    heavy = "aiohttp redis websockets msgspec uvloop orjson aiosqlite sqlite3 asyncio".split()
    print(ended.code, [name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30
    )
    assert "usage: wsgateway" in done.stdout
    assert done.stderr == "0 []\n"


def test_the_version_is_told_by_the_command_and_by_the_module(cli: Run) -> None:
    assert succeeds(cli("--version")) == f"wsgateway {__version__}\n"
    script = Path(sys.executable).with_name("wsgateway")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=30)
    assert succeeds(done) == f"wsgateway {__version__}\n"
