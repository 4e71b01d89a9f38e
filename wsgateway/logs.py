"""Logging, set up once: one line per event, written by a thread of its own.

Only this module says how a line looks and how many there may be. It knows nothing of what is
logged. A log that is slower than the gateway (a full pipe, a stuck disk) loses lines, counted, and
never holds the loop; one bad client cannot write more than a line a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from logging.handlers import QueueHandler, QueueListener

import orjson

from wsgateway.config import Log
from wsgateway.errors import one_line
from wsgateway.metrics import Metrics
from wsgateway.wire import to_the_second

MAX_WAITING = 10_000
"""Lines that may wait for the writer; about 5 MB."""

MAX_LENGTH = 2048
"""Characters of one message; a traceback comes on top."""

MAX_JOINED = 100
"""Lines written at once."""

GATHER_SECONDS = 0.02
"""How long the first line after a silence waits for others: to wake the writer's thread for each
costs the loop more than the line does."""

LAST_LINES_SECONDS = 1.0
"""How long the last lines may take when the gateway stops."""

BURST = 20
"""Lines of one kind that are written at once; then one a second, with the number left out."""

KEYS = ("user=%s", "reason=%s")
"""First arguments that make lines of one template different kinds."""

MAX_KINDS = 1000
"""Kinds of lines that are told apart; the one not seen longest is forgotten."""

QUIET = ("websockets", "aiosqlite", "asyncio")
"""Libraries that log requests, and so tokens, or every call at their lower levels."""

_PRIORITY = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}  # of syslog, for the journal
_COLOUR = {30: "\x1b[33m", 40: "\x1b[31m", 50: "\x1b[31m"}


class RepeatFilter(logging.Filter):
    """Lets a burst of each kind of line pass, then one a second that says how many were left out.

    A kind is a template with its key, where its first argument is one: a device that comes and goes
    all the time must not hide the others, nor one reason of refusals another.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: OrderedDict[object, list[float]] = OrderedDict()  # [tokens, at, left out]

    def filter(self, record: logging.LogRecord) -> bool:
        template, args = str(record.msg), record.args
        key = args[0] if isinstance(args, tuple) and args and _has_key(template) else None
        kind = (record.name, template, key)
        now = time.monotonic()
        state = self._kinds.get(kind)
        if state is None:
            state = self._kinds[kind] = [float(BURST), now, 0.0]
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
        else:
            self._kinds.move_to_end(kind)
        state[0] = min(float(BURST), state[0] + now - state[1])
        state[1] = now
        if state[0] < 1:
            state[2] += 1
            return False
        state[0] -= 1
        if state[2]:
            record.msg = f"{record.msg} (and {int(state[2])} more like this)"
            state[2] = 0.0
        return True


@lru_cache(maxsize=MAX_KINDS)
def _has_key(template: str) -> bool:
    return any(key in template for key in KEYS)


class TextFormatter(logging.Formatter):
    """A line for people: time and level unless the journal adds them, message, traceback."""

    def __init__(self, instance: str = "", *, journal: bool = False, colour: bool = False) -> None:
        super().__init__()
        self._instance = f"{instance} " if instance else ""
        self._journal = journal
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = self._instance + _bounded(record.getMessage())
        if record.exc_info:
            text += "\n" + _traceback(self.formatException(record.exc_info))
        if self._journal:
            prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
            return "\n".join(prefix + line for line in text.splitlines())
        level = record.levelname.lower()
        if self._colour and record.levelno in _COLOUR:
            level = f"{_COLOUR[record.levelno]}{level}\x1b[0m"
        return f"{_time(record)} {level} {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, instance, logger, message, exception if any."""

    def __init__(self, instance: str = "") -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "instance": self._instance,
            "logger": record.name,
            "message": _bounded(record.getMessage()),
        }
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line["exception"] = "\n".join(map(one_line, trace.splitlines()))
        return orjson.dumps(line).decode()


class _BoundedQueueHandler(QueueHandler):
    """Hands lines to the writer's thread, and counts those it has no room for."""

    def __init__(self, lines: queue.SimpleQueue[logging.LogRecord], metrics: Metrics) -> None:
        super().__init__(lines)
        self._lines = lines
        self._metrics = metrics

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # formatted by the writer's thread: arguments are plain values

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() < MAX_WAITING:
            self._lines.put(record)
        else:
            self._metrics.log_lines_dropped += 1


class _Writer(QueueListener):
    """Writes lines in its thread, joined while more are waiting: a write costs more than a line."""

    def __init__(
        self, lines: queue.SimpleQueue[logging.LogRecord], settings: Log, instance: str
    ) -> None:
        super().__init__(lines)
        self._lines = lines
        self._instance = instance
        self.configure(settings)
        self._joined: list[str] = []
        # Where standard error is closed, its number may belong to a socket by now.
        self._descriptor = sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY)

    def configure(self, settings: Log) -> None:
        """Write lines of another level, or so formatted, from the next one on."""
        logging.getLogger().setLevel(settings.level.upper())
        self._formatter = _formatter(settings, self._instance)

    def dequeue(self, block: bool) -> logging.LogRecord:
        if not self._lines.empty():
            return self._lines.get(block)
        record = self._lines.get(block)
        time.sleep(GATHER_SECONDS)
        return record

    def handle(self, record: logging.LogRecord) -> None:
        try:
            self._joined.append(self._formatter.format(record))
        except Exception as error:  # noqa: BLE001 - a user's handler may log anything
            kind = type(error).__name__
            self._joined.append(f"unreadable log line from {record.name}: {kind}")
        if self._lines.empty() or len(self._joined) >= MAX_JOINED:
            self._write()

    def _write(self) -> None:
        lines, self._joined = self._joined, []
        if lines:
            text = memoryview(("\n".join(lines) + "\n").encode(errors="replace"))
            with contextlib.suppress(OSError):  # nobody reads the log any more
                while text:
                    # Not through sys.stderr: its lock, held for a full pipe, would block the exit.
                    text = text[os.write(self._descriptor, text) :]

    def stop(self) -> None:
        """Write what waits, but not for longer than a second: the reader may be gone."""
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(LAST_LINES_SECONDS)
            if not self._thread.is_alive():
                self._write()
            self._thread = None


@contextlib.contextmanager
def writing(settings: Log, metrics: Metrics, instance: str = "") -> Iterator[Callable[[Log], None]]:
    """Write the log to standard error until leaving; then write what still waits.

    Every line has the name of the ``instance``. What is yielded takes other settings.
    """
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    entrance = _BoundedQueueHandler(lines, metrics)
    entrance.addFilter(RepeatFilter())
    # What no line of ours shows need not be found out for each (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    root = logging.getLogger()
    root.handlers = [entrance]
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    writer = _Writer(lines, settings, instance)
    writer.start()
    try:
        yield writer.configure
    finally:
        root.handlers = []
        writer.stop()


def _formatter(settings: Log, instance: str) -> logging.Formatter:
    if settings.format == "json":
        return JsonFormatter(instance)
    journal = settings.format == "auto" and _is_journal()
    colour = settings.format == "auto" and _is_terminal() and not os.environ.get("NO_COLOR")
    return TextFormatter(instance, journal=journal, colour=colour)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _is_journal() -> bool:
    """Whether standard error goes to the journal, as systemd says ($JOURNAL_STREAM)."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _time(record: logging.LogRecord) -> str:
    return f"{to_the_second(int(record.created))}.{int(record.msecs):03d}+00:00"


def _traceback(text: str) -> str:
    """A traceback whose lines cannot pass for log lines, whatever an exception says."""
    return "\n".join("    " + one_line(line) for line in text.splitlines())


def _bounded(text: str) -> str:
    return one_line(text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + "...")
