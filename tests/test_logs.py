"""How a log line looks, how many there may be, and that no log is worth more than an answer."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from tests.conftest import Process
from wsgateway import auth, logs, store
from wsgateway.logs import JsonFormatter, RepeatFilter, TextFormatter

LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"


def record(message: str, *args: object, level: str = "info", name: str = "x") -> logging.LogRecord:
    number = logging.getLevelNamesMapping()[level.upper()]
    return logging.LogRecord(name, number, "file.py", 1, message, args, None)


def failed(text: str) -> logging.LogRecord:
    """A record with the traceback of an exception that says a text."""
    made = record("it failed", level="error")
    try:
        raise ValueError(text)
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    return made


# One line.


@pytest.mark.parametrize("level", LEVELS)
def test_a_line_for_people_has_time_level_and_message(level: str) -> None:
    line = TextFormatter().format(record("device in user=%s", 7, level=level))
    assert re.fullmatch(rf"{TIME} {level} device in user=7", line)


@pytest.mark.parametrize("level", LEVELS)
def test_a_line_for_the_journal_begins_with_its_priority_and_leaves_out_what_the_journal_adds(
    level: str,
) -> None:
    line = TextFormatter(journal=True).format(record("device in user=%s", 7, level=level))
    assert line == f"<{LEVELS[level]}>device in user=7"


def test_each_line_of_a_traceback_in_the_journal_begins_with_the_priority() -> None:
    lines = TextFormatter(journal=True).format(failed("boo")).split("\n")
    assert lines[0] == "<3>it failed"
    assert re.fullmatch("<3> *Traceback .most recent call last.:", lines[1])
    assert re.fullmatch("<3> *ValueError: boo", lines[-1])
    assert all(line.startswith("<3>") for line in lines)


def test_only_what_is_wrong_is_coloured_on_a_terminal() -> None:
    colour = TextFormatter(colour=True)
    assert "\x1b" not in colour.format(record("x"))
    assert " \x1b[33mwarning\x1b[0m x" in colour.format(record("x", level="warning"))
    assert " \x1b[31merror\x1b[0m x" in colour.format(record("x", level="error"))


def test_a_json_line_has_time_level_instance_logger_and_message() -> None:
    line = json.loads(JsonFormatter("n1").format(record("设备 user=%s", 7, name="wsgateway.x")))
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {
        "level": "info",
        "instance": "n1",
        "logger": "wsgateway.x",
        "message": "设备 user=7",
    }
    line = json.loads(JsonFormatter().format(failed("boo")))
    told = [part.strip() for part in line["exception"].split("\n")]
    assert told[0] == "Traceback (most recent call last):"
    assert told[-1] == "ValueError: boo"


nasty = st.one_of(
    st.text(), st.text(st.characters()), st.text("\n\r\x1b\u2028\x85\udcff\0a%{", max_size=9)
)


@given(nasty)
@example("\n2026-11-23T01:00:00.000+00:00 info device in user=1")
@example("\x1b[2J\x1b]0;owned\x07")
@example("\udcff")
@example("%s %d %")
@settings(deadline=None)
def test_no_text_forges_a_line_or_commands_a_terminal(text: str) -> None:
    for message in (record(text), record("text %s", text)):
        for formatter in (TextFormatter(), TextFormatter(journal=True), JsonFormatter()):
            line = formatter.format(message)
            assert line.isprintable()
    assert isinstance(json.loads(JsonFormatter().format(record(text)))["message"], str)


@given(nasty)
@example("\x1b[2J")
@example("\udcff")
@settings(deadline=None)
def test_no_text_of_an_exception_commands_a_terminal_or_breaks_a_line_of_json(text: str) -> None:
    line = JsonFormatter().format(failed(text))
    assert "\n" not in line
    assert "\x1b" not in line
    assert "ValueError" in json.loads(line)["exception"]
    for formatter in (TextFormatter(), TextFormatter(journal=True)):
        assert all(part.isprintable() for part in formatter.format(failed(text)).split("\n"))
        formatter.format(failed(text)).encode()


def test_a_message_is_bounded() -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        assert len(formatter.format(record("x" * 10_000_000))) < logs.MAX_LENGTH + 200


# Not too many.


def passed(filter_: RepeatFilter, *records: logging.LogRecord) -> list[str]:
    return [each.getMessage() for each in records if filter_.filter(each)]


def test_a_burst_passes_and_then_one_a_second_that_says_how_many_were_left_out() -> None:
    ours = RepeatFilter()
    assert passed(ours, *(record("slow %s", n) for n in range(100)))[: logs.BURST] == [
        f"slow {n}" for n in range(logs.BURST)
    ]
    held, began = 0, time.monotonic()
    while not (told := passed(ours, record("slow %s", "again"))):
        held += 1
        assert time.monotonic() < began + 10
    left_out = re.fullmatch(r"slow again \(and (\d+) more like this\)", told[0])
    assert left_out is not None
    assert int(left_out[1]) == held + 100 - logs.BURST
    assert passed(ours, record("slow %s", "again")) == []


@pytest.mark.parametrize(
    "other",
    [
        record("device out user=%s", 2),
        record("device gone user=%s", 1),
        record("device out user=%s", 1, name="y"),
    ],
    ids=["of another user", "of another kind", "of another logger"],
)
def test_one_kind_of_line_does_not_hide_another(other: logging.LogRecord) -> None:
    ours = RepeatFilter()
    passed(ours, *(record("device out user=%s", 1) for _ in range(100)))
    assert passed(ours, record("device out user=%s", 1)) == []
    assert len(passed(ours, other)) == 1


def test_the_kinds_that_are_remembered_are_bounded() -> None:
    ours = RepeatFilter()
    for number in range(logs.MAX_KINDS * 3):
        assert passed(ours, record(f"kind {number}"))
    assert len(ours._kinds) == logs.MAX_KINDS


# As a process writes it.

PROGRAM = """
import logging, os, sys
from wsgateway import config, logs
from wsgateway.metrics import Metrics
metrics, log = Metrics(), logging.getLogger("program")
with logs.writing(config.Log(format=sys.argv[1], level=sys.argv[2]), metrics):
    exec(sys.argv[3])
print(metrics.log_lines_dropped)
"""
FOUR = "log.debug('d'); log.info('i'); log.warning('w'); log.error('e')"


def program(
    log: Any, action: str, form: str = "auto", level: str = "info", **environ: str
) -> subprocess.Popen[str]:
    """A process that logs to a file or descriptor, and prints how many lines it dropped."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, form, level, action], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ) | environ,
    )  # fmt: skip


def written(tmp_path: Path, action: str, *options: str, **environ: str) -> list[str]:
    path = tmp_path / "log"
    with path.open("w") as log:
        process = program(log, action, *options, **environ)
        assert process.communicate(timeout=30)[0] == "0\n"
    return path.read_text().splitlines()


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")],
)
def test_lines_below_the_level_are_not_written(tmp_path: Path, level: str, expected: str) -> None:
    lines = written(tmp_path, FOUR, "text", level)
    assert "".join(line[-1] for line in lines) == expected


def test_the_journal_is_recognised_as_systemd_says(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    status = (tmp_path / "log").stat()
    ours = f"{status.st_dev}:{status.st_ino}"
    assert written(tmp_path, FOUR, JOURNAL_STREAM=ours) == ["<6>i", "<4>w", "<3>e"]
    for stream in (f"{status.st_dev}:{status.st_ino + 1}", "", "nonsense"):
        assert re.fullmatch(rf"{TIME} info i", written(tmp_path, FOUR, JOURNAL_STREAM=stream)[0])
    assert written(tmp_path, FOUR, "text", JOURNAL_STREAM=ours)[0].endswith(" info i")


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_they_are_not_wanted(no_colour: str, coloured: bool) -> None:
    ours, theirs = os.openpty()
    process = program(theirs, FOUR, NO_COLOR=no_colour)
    process.communicate(timeout=30)
    os.close(theirs)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert ("\x1b[33mwarning\x1b[0m w" in said) == coloured
    assert said.count("\x1b") == (4 if coloured else 0)


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_line_is_written_before_the_end(tmp_path: Path, form: str) -> None:
    for count in (1, 2, 100, 5000):
        lines = written(tmp_path, f"[log.info('line ' + str(n)) for n in range({count})]", form)
        assert len(lines) == count
        assert f"line {count - 1}" in lines[-1]


def test_a_line_that_cannot_be_formatted_is_told_and_the_next_ones_are_written(
    tmp_path: Path,
) -> None:
    class_ = "type('Odd', (), {'__str__': lambda self: 1 / 0})"
    lines = written(tmp_path, f"log.info('%d', 'x'); log.info('%s', {class_}()); log.info('next')")
    assert lines[-1].endswith(" info next")
    assert len(lines) == 3


# A log that takes nothing.


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads and that takes nothing more; its reading and writing end."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    try:
        fill(theirs)
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def fill(pipe: int) -> None:
    """Fill a pipe, without changing how those who share it see it."""
    with open(f"/proc/self/fd/{pipe}", "wb", buffering=0, opener=_nonblocking) as own:
        while own.write(b"x"):
            pass


def _nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_NONBLOCK)


def test_lines_that_the_log_does_not_take_are_dropped_and_counted() -> None:
    with full_pipe() as (ours, theirs):
        count = logs.MAX_WAITING + 500
        action = (
            f"[log.info('line ' + str(n)) for n in range({count})];"
            "print(metrics.log_lines_dropped, flush=True)"
        )
        process = program(theirs, action)
        assert process.stdout is not None
        dropped = int(process.stdout.readline())
        # Some are on the writer's hands; those it has taken from the queue made room for others.
        assert 500 - logs.MAX_JOINED - 2 <= dropped <= 500
        read = 0
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.05)[0]:
                read += os.read(ours, 65536).count(b"\n")
        assert read == count - dropped
        assert process.stdout.read() == f"{dropped}\n"
        process.stdout.close()


def test_a_process_whose_log_takes_nothing_ends_all_the_same() -> None:
    with full_pipe() as (_, theirs):
        process = program(theirs, "[log.info('line ' + str(n)) for n in range(20000)]")
        assert int(process.communicate(timeout=10)[0]) > 0
        assert process.returncode == 0


@pytest.fixture
def token(tmp_path: Path) -> str:
    """A token in a database where `serve` finds it."""
    text = auth.new_token()

    async def make() -> None:
        path = tmp_path / "state" / "wsgateway" / "wsgateway.db"
        async with store.open_to_write(path, create=True) as db:
            await db.bind(await db.add_user("alice"), await db.add_device("speaker"))
            await db.add_token(auth.hash_token(text), 1, "device")

    asyncio.run(make())
    return text


@contextlib.contextmanager
def gateway_logging_to(
    log: int | None, tmp_path: Path, environment: dict[str, str], loop: str
) -> Iterator[Process]:
    """A gateway with a descriptor as its standard error; None closes it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    popen = subprocess.Popen(
        ["sh", "-c", 'exec "$@"' + (" 2>&-" if log is None else ""), "sh", sys.executable, "-m",
         "wsgateway", "serve", "--host", "127.0.0.1", "--port", str(port), "--loop", loop,
         "--set", "drain.window=1s", "--set", "limits.messages=100000"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, text=True,
        cwd=tmp_path, env=environment,
    )  # fmt: skip
    try:
        while True:
            assert popen.poll() is None, "it ended"
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
        yield Process(popen, port, 0, tmp_path / "none")
    finally:
        popen.kill()
        popen.wait()


def be_many_devices(gateway: Process, token: str) -> None:
    """Connect, ask, be answered and leave, more often than a pipe has room for lines."""
    for number in range(150):
        url = f"ws://127.0.0.1:{gateway.port}/ws/device/?token={token}"
        with connect(url, compression=None) as device:
            assert json.loads(device.recv(timeout=10))["type"] == "connection_status"
            device.send('{"type": "ping"}')
            assert json.loads(device.recv(timeout=10))["type"] == "pong", number


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("log", ["full", "without a reader", "closed"])
def test_a_gateway_answers_and_ends_in_time_whatever_its_log_takes(
    tmp_path: Path, environment: dict[str, str], token: str, log: str, loop: str
) -> None:
    with contextlib.ExitStack() as stack:
        stderr = None
        if log == "full":
            _, stderr = stack.enter_context(full_pipe())
        elif log == "without a reader":
            ours, stderr = os.pipe()
            os.close(ours)
            stack.callback(os.close, stderr)
        gateway = stack.enter_context(gateway_logging_to(stderr, tmp_path, environment, loop))
        be_many_devices(gateway, token)
        began = time.monotonic()
        assert gateway.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 1 + 2 + 1.5  # the window, what it may be late, slack
