"""Redis as an instance needs it: what it may do there, and what would end it.

Only this module knows which commands the gateway uses and which settings harm it. Connections are
`link`'s. It writes only keys of its own under the prefix, and removes them.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from wsgateway import config
from wsgateway.doctor import host
from wsgateway.doctor.devices import Sender
from wsgateway.doctor.finding import Finding, failed, passed, skipped, warned
from wsgateway.errors import one_line
from wsgateway.gateway import user_group
from wsgateway.link import ADVICE, Away, Command, Redis, Reply, State, state_of
from wsgateway.metrics import Metrics

ROLE: Final = "doctor"

OLDEST: Final = (6, 2)
"""The first version with LMOVE, which takes from the queue without losing."""

SLOW_SECONDS: Final = 0.1
"""A round trip within one site takes less than a thousandth of a second."""

TRIES: Final = 3
"""The best of so many counts: one alone may meet a busy moment of this process."""

FULL: Final = 0.9
"""Share of a limit of Redis from which on it is soon reached."""

LEAST_BUFFER: Final = 8 << 20
"""Bytes that Redis must let wait for an instance: a pause of a second at 8 MB/s."""

LEAST_TIMEOUT: Final = 10
"""Seconds without a command after which Redis may hang up: an instance beats every 3 s."""

FIXES: Final[Mapping[State, str]] = {
    State.UNREACHABLE: "start Redis, or correct redis.url",
    State.SILENT: "look at its load (redis-cli --latency) and the network; redis.timeout is the limit",
    State.NO_AUTH: "correct user and password in redis.url",
    State.NO_PERMISSION: "give its user the commands, keys and channels of the gateway (ACL SETUSER)",
    State.LOADING: "wait until it has loaded its data",
    State.READ_ONLY: "let redis.url name the master",
    State.OUT_OF_MEMORY: "raise maxmemory, or find what fills it (redis-cli --bigkeys)",
    State.MAX_CLIENTS: "raise maxclients, or find who connects (redis-cli CLIENT LIST)",
    State.GARBAGE: "correct the port in redis.url",
}


async def check(settings: config.Redis, queue: config.Queue) -> list[Finding]:
    """Look at Redis as it is configured. Raises ConfigError where the URL cannot be understood."""
    if not settings.url:
        return [skipped("redis", "redis.url is empty: this instance is alone")]
    redis = Redis(settings, ROLE, Metrics())
    try:
        took = min([await _time(redis) for _ in range(TRIES)])
        asked_at = time.time()
        about, memory, clients, replication, clock = await redis.ask(
            ROLE, *(("INFO", part) for part in ("server", "memory", "clients", "replication")),
            ("TIME",),
        )  # fmt: skip
        settled = await redis.ask(
            ROLE, ("CONFIG", "GET", "client-output-buffer-limit"), ("CONFIG", "GET", "timeout")
        )
        replies = await _try_commands(redis, settings.prefix, queue)
    except Away as error:
        return [_away(error.state)]
    info = _fields(about) | _fields(memory) | _fields(clients) | _fields(replication)
    return [
        _server(info, took),
        _commands(replies),
        _memory(info, replies),
        _clients(info),
        _buffers(settled[0]),
        _idle(settled[1]),
        host.clock("clock of redis", _seconds(clock), asked_at),
    ]


async def _time(redis: Redis) -> float:
    """Seconds that it takes to connect and to get an answer."""
    started = time.perf_counter()
    await redis.ask(ROLE, ("PING",))
    return time.perf_counter() - started


def sender(settings: config.Redis) -> Sender:
    """Sends as any other program may: a bare message on a group's channel."""
    name = "redis to device"
    redis = Redis(settings, ROLE, Metrics())

    async def send(user_id: int, message: dict[str, Any]) -> Finding | None:
        channel = f"{settings.prefix}group:{user_group(user_id)}"
        try:
            [heard] = await redis.ask(ROLE, ("PUBLISH", channel, json.dumps(message)))
        except Away as error:
            return _away(error.state)._replace(name=name)
        if isinstance(heard, Exception):
            return _away(state_of(heard))._replace(name=name)
        if not heard:
            fix = (
                "give the gateway the same redis.url and redis.prefix; see the check of redis links"
            )
            return failed(name, "no gateway listens there to messages for this device", fix)
        return None

    return Sender(name, send, "is redis.url another Redis than the gateway's? see its log")


def _away(state: State) -> Finding:
    text = ADVICE.get(state, "it is of no use")
    return failed("redis", f"{state}: {text}", FIXES.get(state, "see its log"))


def _server(info: Mapping[str, str], took: float) -> Finding:
    name, version = "redis", info.get("redis_version", "of unknown version")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    what = f"Redis {version} connects and answers in {took * 1000:.1f} ms"
    if info.get("role") == "slave":
        return _away(State.READ_ONLY)
    if numbers and numbers < OLDEST:
        return failed(name, f"Redis {version} has no LMOVE", "upgrade Redis to 6.2 or later")
    if took > SLOW_SECONDS:
        return warned(name, what, "bring Redis and the gateway closer: every group message waits")
    return passed(name, what)


async def _try_commands(
    redis: Redis, prefix: str, queue: config.Queue
) -> dict[tuple[str, ...], Reply]:
    """Do once, on keys of our own, what a gateway does all the time; the replies by command."""
    mark = secrets.token_hex(8)
    key, names, fields, ranks, items, taken = (f"{prefix}doctor:{mark}:{n}" for n in range(6))
    script = "if redis.call('get', KEYS[1]) then return redis.call('pexpire', KEYS[1], 1000) end"
    commands: list[Command] = [
        ("SET", key, 1, "NX", "PX", 10_000),
        ("EXPIRE", key, 10),
        ("EVAL", script, 1, key),
        ("HSET", fields, "a", 1),
        ("HDEL", fields, "a"),
        ("ZADD", ranks, 1, "a"),
        ("ZRANGE", ranks, 0, -1),
        ("ZREMRANGEBYSCORE", ranks, 0, 0),
        ("ZREM", ranks, "a"),
        ("SADD", names, "a"),
        ("SMEMBERS", names),
        ("SMISMEMBER", names, "a"),
        ("SREM", names, "a"),
        ("PUBLISH", f"{prefix}group:doctor_{mark}", "{}"),
    ]
    if queue.enabled:
        commands += [
            ("LPUSH", items, mark),
            ("LTRIM", items, 0, 0),
            ("LMOVE", items, taken, "RIGHT", "LEFT"),
            ("BLMOVE", taken, items, "RIGHT", "LEFT", 0.01),
            ("LREM", items, 1, mark),
            ("LLEN", queue.name),
            ("LREM", queue.name, 0, mark),
        ]
    commands.append(("DEL", key, names, fields, ranks, items, taken))
    # Last, as nothing else may be said on a connection that listens.
    commands.append(("SUBSCRIBE", f"{prefix}group:doctor_{mark}"))
    replies = await redis.ask(ROLE, *commands)
    told = [tuple(map(str, command)) for command in commands]
    return dict(zip(told, replies, strict=True))


def _commands(replies: Mapping[tuple[str, ...], Reply]) -> Finding:
    name = "redis commands"
    refused = {
        command[0] + (f" {command[1]}" if "doctor" not in " ".join(command[1:]) else ""): reply
        for command, reply in replies.items()
        if isinstance(reply, Exception) and state_of(reply) is not State.OUT_OF_MEMORY
    }
    if not refused:
        return passed(name, f"all {len(replies)} that a gateway uses are allowed")
    state = state_of(next(iter(refused.values())))
    listed = ", ".join(sorted(refused))
    if state is State.REFUSED:
        word = one_line(str(next(iter(refused.values()))).partition(" ")[0][:40])
        fix = "see Redis' log for what that means; queue.name must name a list"
        return failed(name, f"refused ({word}): {listed}", fix)
    return failed(name, f"refused ({ADVICE.get(state, state)}): {listed}", FIXES[state])


def _memory(info: Mapping[str, str], replies: Mapping[tuple[str, ...], Reply]) -> Finding:
    name, policy = "redis memory", info.get("maxmemory_policy", "")
    used, most = _number(info, "used_memory"), _number(info, "maxmemory")
    what = f"{used / 1e6:.0f} of {most / 1e6:.0f} MB used, {policy}" if most else "no limit"
    full = [
        reply
        for reply in replies.values()
        if isinstance(reply, Exception) and state_of(reply) is State.OUT_OF_MEMORY
    ]
    if full:
        return failed(name, f"used up: {what}", FIXES[State.OUT_OF_MEMORY])
    if not policy:
        return skipped(name, "Redis does not tell (INFO memory)")
    if most and policy.startswith("allkeys-"):
        what = f"{what}: the queue may be thrown away to make room"
        return warned(name, what, "CONFIG SET maxmemory-policy noeviction")
    if most and used > FULL * most:
        return warned(name, what, FIXES[State.OUT_OF_MEMORY])
    return passed(name, what)


def _clients(info: Mapping[str, str]) -> Finding:
    name = "redis clients"
    used, most = _number(info, "connected_clients"), _number(info, "maxclients")
    if not most:
        return skipped(name, "Redis does not tell (INFO clients)")
    if used > FULL * most:
        return warned(name, f"{used} of {most} are connected", FIXES[State.MAX_CLIENTS])
    return passed(name, f"{used} of {most} are connected")


def _buffers(reply: Reply) -> Finding:
    """What Redis lets wait for a subscriber: ``pubsub <hard> <soft> <seconds>``, 0 for no limit."""
    name = "redis buffers"
    words = _setting(reply).split()
    if "pubsub" not in words:
        return skipped(name, "Redis does not tell its client-output-buffer-limit")
    hard, soft = (int(word) for word in words[words.index("pubsub") + 1 :][:2])
    least = min(limit or LEAST_BUFFER for limit in (hard, soft))
    what = f"{hard / 1e6:.0f} MB, or {soft / 1e6:.0f} MB for a while, may wait for an instance"
    if least < LEAST_BUFFER:
        fix = "CONFIG SET client-output-buffer-limit 'pubsub 33554432 8388608 60' (its default)"
        return warned(name, f"only {what}: a burst cuts it off, and messages are lost", fix)
    return passed(name, what if hard and soft else "no limit for what waits for an instance")


def _idle(reply: Reply) -> Finding:
    name, text = "redis timeout", _setting(reply)
    if not text.isdecimal():
        return skipped(name, "Redis does not tell its timeout")
    if 0 < int(text) < LEAST_TIMEOUT:
        fix = "CONFIG SET timeout 0"
        return warned(name, f"Redis hangs up after {text} s without a command", fix)
    return passed(name, f"{text} s" if int(text) else "Redis never hangs up")


def _setting(reply: Reply) -> str:
    """A value as CONFIG GET answers it; empty where that was refused."""
    is_pair = isinstance(reply, Sequence) and len(reply) == 2
    return reply[1].decode(errors="replace") if is_pair else ""


def _fields(reply: Reply) -> dict[str, str]:
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode(errors="replace").splitlines()
    return {key: value for key, colon, value in (line.partition(":") for line in lines) if colon}


def _number(info: Mapping[str, str], field: str) -> int:
    text = info.get(field, "")
    return int(text) if text.isdecimal() else 0


def _seconds(reply: Any) -> float | None:
    """What TIME answers: seconds and microseconds."""
    if not isinstance(reply, list):
        return None
    return int(reply[0]) + int(reply[1]) / 1e6
