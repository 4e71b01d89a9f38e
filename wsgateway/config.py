"""The configuration: one frozen, typed value.

Only this module says which keys exist, what they default to and where a value came from. It opens
nothing but the files it is told to read, never logs and never ends the process: it returns a
`Loaded` or raises `ConfigError` with one line that names the key, the value and what is allowed.

The documentation of a key is written once, at its declaration: `config.toml`, `docs/configuration.md`
and the error messages are made from it. Longer than 400 lines because the declarations are its text.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from wsgateway.errors import ConfigError
from wsgateway.proxy import Networks

ENVIRONMENT_PREFIX = "WSGATEWAY_"
OTHERS = tuple(
    ENVIRONMENT_PREFIX + name
    for name in ("CONFIG", "URL", "API_KEY", "API_KEY_FILE", "SERVICE_HOST", "SERVICE_PORT")
)
"""Variables of our prefix that are no keys: those of the commands that call a running gateway, and
the two that Kubernetes sets for a service of our name."""

SYSTEM_FILE = Path("/etc/wsgateway/config.toml")


def doc(text: str, **extra: object) -> Meta:
    """What a key is for, as `config.toml` and the reference show it."""
    return Meta(description=text, extra=extra or None)


MOST = 2**31 - 1
"""The largest number that any key takes: what the system calls behind them hold."""

LONGEST = 10 * 365 * 86400
"""The longest duration that any key takes, in seconds: ten years."""

Seconds = Annotated[float, Meta(ge=0, le=LONGEST, extra={"unit": "seconds"})]
Bytes = Annotated[int, Meta(ge=0, le=1 << 40, extra={"unit": "bytes"})]
Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9._:-]{0,64}$", extra={"of": "letters, digits and . _ : -"})
]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of the configuration file."""


class Server(Section, frozen=True):
    """Where devices connect."""

    host: Annotated[str, doc("Address the device socket listens on.")] = "0.0.0.0"  # noqa: S104
    port: Annotated[Port, doc("Port of the device socket; 0 takes a free one.")] = 8000
    backlog: Annotated[
        Positive,
        doc("Connections the kernel may hold before they are accepted: room for a fleet's return."),
    ] = 4096
    reuse_port: Annotated[
        bool,
        doc("Share the port with other instances on this host (SO_REUSEPORT); each needs a name."),
    ] = False
    tls: Annotated[bool, doc("Serve wss:// with the certificate of [tls]; ws:// is refused.")] = (
        False
    )
    trusted_proxies: Annotated[
        tuple[str, ...],
        doc(
            "Networks of the proxies before both listeners, e.g. ['10.0.0.0/8']: from them, and "
            "nobody else, X-Forwarded-For and PROXY headers are believed."
        ),
    ] = ()
    proxy_protocol: Annotated[
        bool,
        doc(
            "Expect a PROXY header, version 1 or 2, before each connection; only trusted_proxies "
            "may then connect."
        ),
    ] = False
    instance: Annotated[
        Name,
        doc(
            "Name of this instance in logs, metrics and answers, the same after a restart; empty: "
            "the host's name with a random ending."
        ),
    ] = ""


class Tls(Section, frozen=True):
    """The certificate of the listeners that serve TLS; read again at a reload."""

    certificate: Annotated[
        str,
        doc(
            "File with the certificate and its chain, in PEM; 'credential:NAME' for one of "
            "systemd's LoadCredential=."
        ),
    ] = ""
    key: Annotated[
        str,
        doc("File with its private key, likewise; empty: it is in the certificate's file."),
    ] = ""
    minimum_version: Annotated[
        Literal["1.2", "1.3"], doc("Least version of TLS that clients may speak.")
    ] = "1.2"


class Runtime(Section, frozen=True):
    """The process itself."""

    loop: Annotated[
        Literal["uvloop", "asyncio"],
        doc(
            "Event loop. uvloop is about three times as fast; asyncio is used where it is missing."
        ),
    ] = "uvloop"
    state_dir: Annotated[
        str,
        doc("Folder for state; empty: $STATE_DIRECTORY, else $XDG_STATE_HOME/wsgateway."),
    ] = ""


class Auth(Section, frozen=True):
    """Who may connect."""

    database: Annotated[
        str,
        doc(
            "SQLite file of users, devices and tokens, on a local disk; empty: state_dir/wsgateway.db."
        ),
    ] = ""
    refuse: Annotated[
        Literal["http", "close"],
        doc(
            "How a client that offers no subprotocol is refused: 'http' answers 403 (clients that reset "
            "their retry counter on open would otherwise retry for ever), 'close' accepts and closes "
            "with 4001."
        ),
    ] = "http"
    origins: Annotated[
        tuple[str, ...],
        doc(
            "Origins a browser may connect from, '*' for all; clients without Origin stay allowed."
        ),
    ] = ("*",)
    require_origin: Annotated[bool, doc("Refuse clients that send no Origin.")] = False
    strict_path_id: Annotated[
        bool, doc("Refuse /ws/device/<user id> when the id is not the token's user.")
    ] = False
    lookup_timeout: Annotated[
        Seconds, doc("How long a client waits for the token database before it gets 503.")
    ] = 2.0
    max_lookups: Annotated[
        Positive,
        doc("Token look-ups in flight; beyond, clients get 503 instead of a longer queue."),
    ] = 2048
    cache_ttl: Annotated[
        Seconds,
        doc(
            "How long a token's owner is remembered; any change of the database forgets all. 0: never."
        ),
    ] = 5.0
    cache_size: Annotated[Positive, doc("Tokens remembered at most.")] = 10_000
    poll_interval: Annotated[
        Seconds,
        doc(
            "How often the database is asked whether it changed; revoked tokens are cut within 5 s."
        ),
    ] = 1.0


class Limits(Section, frozen=True):
    """What a device, a user or an address may use. 0 switches a limit off where noted."""

    messages: Annotated[Positive, doc("Messages per connection in any window.")] = 100
    window: Annotated[Seconds, doc("Length of that sliding window.")] = 60.0
    message_characters: Annotated[
        Positive, doc("Longest message in characters; longer ones get an error, the device stays.")
    ] = 10_240
    message_bytes: Annotated[
        Bytes, doc("Hard cap of a message; longer ones end the connection with 1009.")
    ] = 65_536
    fragments: Annotated[
        Positive,
        doc("Fragments of one message, empty ones too; more end the connection with 1009."),
    ] = 1024
    control_frames: Annotated[
        Positive, doc("Pings and pongs from a device per keepalive interval; more close with 4008.")
    ] = 200
    outbound_bytes: Annotated[
        Bytes, doc("Bytes that may wait for a slow reader; more and the connection is aborted.")
    ] = 1_048_576
    outbound_stall: Annotated[
        Seconds, doc("How long a reader may take nothing while bytes wait, before it is aborted.")
    ] = 10.0
    fanout_bytes: Annotated[
        Bytes,
        doc("Group messages accepted but not yet written to members; beyond, they are dropped."),
    ] = 16_777_216
    handshake_timeout: Annotated[
        Seconds, doc("From the accepted connection to the authenticated device.")
    ] = 5.0
    handshake_bytes: Annotated[Bytes, doc("Longest handshake request; longer ones get 431.")] = (
        16_384
    )
    handshakes: Annotated[Positive, doc("Unfinished handshakes; beyond, clients get 503.")] = 2048
    handshake_lag: Annotated[
        Seconds, doc("Lag of the event loop above which handshakes wait for their turn.")
    ] = 0.1
    handshake_wait: Annotated[
        Seconds, doc("How long they wait; then they get 503. handshake_timeout goes on meanwhile.")
    ] = 3.0
    loop_lag: Annotated[Seconds, doc("Lag of the event loop above which /readyz answers 503.")] = (
        1.0
    )
    connections: Annotated[
        Count, doc("Connections in all; 0: the descriptor limit minus descriptor_reserve.")
    ] = 0
    descriptor_reserve: Annotated[
        Positive,
        doc("Descriptors kept for the database, log and the like, and to answer 503 when full."),
    ] = 128
    connections_per_user: Annotated[Count, doc("Connections of one user; 0: no limit.")] = 100
    connections_per_ip: Annotated[
        Count, doc("Connections from one address; 0: no limit, as fleets share addresses.")
    ] = 0
    duplicate: Annotated[
        Literal["allow", "newest"],
        doc("A second connection of a device: 'allow' both, or the 'newest' replaces (4010)."),
    ] = "allow"
    remembered_windows: Annotated[
        Positive,
        doc("Message windows kept for devices that left, so that a reconnect wins nothing."),
    ] = 10_000


class Keepalive(Section, frozen=True):
    """How dead peers are found."""

    interval: Annotated[Seconds, doc("Between two pings to a device; at most 10m.")] = 20.0
    timeout: Annotated[
        Seconds, doc("How long a device may be silent after a ping (rounded up to an interval).")
    ] = 20.0
    close_timeout: Annotated[
        Seconds, doc("How long a peer may take to finish the close handshake before it is aborted.")
    ] = 5.0


class Compression(Section, frozen=True):
    """Messages to and from devices that offer permessage-deflate (RFC 7692)."""

    enabled: Annotated[
        bool,
        doc("Agree to it; saves traffic where messages are long, and costs processor time."),
    ] = False
    min_bytes: Annotated[
        Bytes, doc("Messages to devices that are shorter go uncompressed: they hardly shrink.")
    ] = 256
    level: Annotated[
        int,
        Meta(ge=1, le=9),
        doc("zlib's level: 6 takes twice the time of 1 and saves a tenth more."),
    ] = 1
    window_bits: Annotated[
        int,
        Meta(ge=9, le=15),
        doc(
            "Largest window for messages to devices, as a power of two; a device may ask for a "
            "smaller one. 15 takes about 30 us more for each message."
        ),
    ] = 12


class Handlers(Section, frozen=True):
    """What answers the messages of devices."""

    modules: Annotated[
        tuple[str, ...],
        doc("Python modules with message types of your own, e.g. ['mycompany.lights']."),
    ] = ()
    timeout: Annotated[
        Seconds,
        doc(
            "How long a handler may take; then the device gets an error. Longer than chat.timeout "
            "and weather.timeout."
        ),
    ] = 65.0
    max_pending: Annotated[
        Positive,
        doc("Messages of a device that wait for its slow handlers; then reading from it pauses."),
    ] = 16


class Weather(Section, frozen=True):
    """The weather service."""

    provider: Annotated[
        Literal["sample", "qweather"],
        doc(
            "'sample' answers without a key and says so in data.sample; 'qweather' is "
            "dev.qweather.com."
        ),
    ] = "sample"
    url: Annotated[
        str, doc("Your API host at the service, e.g. https://abc.xyz.qweatherapi.com.")
    ] = ""
    api: Annotated[
        Literal["v7", "v1"], doc("Generation of the weather call: 'v7' (/v7/...) or 'v1'.")
    ] = "v7"
    key: Annotated[str, doc("API key; or set jwt_key, not both.", secret=True)] = ""
    jwt_key: Annotated[
        str,
        doc(
            "Ed25519 private key in PEM, to sign tokens with in place of the API key; needs "
            "wsgateway[crypto].",
            secret=True,
        ),
    ] = ""
    jwt_id: Annotated[Name, doc("Id of that key's credential at the service.")] = ""
    jwt_project: Annotated[Name, doc("Id of the project it belongs to.")] = ""
    lang: Annotated[Name, doc("Language of names and texts; empty: the service's choice.")] = "zh"
    timeout: Annotated[
        Seconds, doc("How long a device waits at most: a turn, and two calls one after the other.")
    ] = 10.0
    call_timeout: Annotated[Seconds, doc("How long one call may take.")] = 8.0
    connect_timeout: Annotated[Seconds, doc("How long it may take to connect.")] = 3.0
    cache_ttl: Annotated[
        float,
        Meta(ge=0, le=600, extra={"unit": "seconds"}),
        doc(
            "How long the answer for a city is given again; readings are 5 to 20 minutes old "
            "anyway. 0: never."
        ),
    ] = 600.0
    cache_size: Annotated[
        Positive, doc("Cities whose answer is kept, about 2 KiB each; the oldest goes first.")
    ] = 1000
    concurrency: Annotated[
        Positive, doc("Cities asked for at once; others wait, then are told that too many ask.")
    ] = 16
    breaker_failures: Annotated[
        Positive, doc("Failures in a row after which the service is left alone.")
    ] = 5
    breaker_pause: Annotated[
        Seconds, doc("For how long; then one request tries. Services suspend who never stops.")
    ] = 30.0


class Chat(Section, frozen=True):
    """The chat service."""

    provider: Annotated[
        Literal["echo", "openai"],
        doc(
            "'echo' repeats the message, as a test; 'openai' is any service with OpenAI's chat "
            "completions."
        ),
    ] = "echo"
    url: Annotated[str, doc("The service, up to and without /chat/completions.")] = (
        "https://api.openai.com/v1"
    )
    key: Annotated[str, doc("API key; empty: none is sent.", secret=True)] = ""
    model: Annotated[str, doc("Name of the model, as the service calls it.")] = ""
    system: Annotated[str, doc("What the model is told before every conversation.")] = ""
    history_turns: Annotated[
        Count, doc("Exchanges of a connection that the model is reminded of; 0: none.")
    ] = 10
    history_bytes: Annotated[
        Bytes, doc("Most memory of them per connection that chats; the oldest go first.")
    ] = 16_384
    max_tokens: Annotated[
        Positive, doc("Longest answer in tokens, which bounds its price and time.")
    ] = 1024
    max_tokens_field: Annotated[
        Literal["max_tokens", "max_completion_tokens"],
        doc("Its name in the request: newer OpenAI models know only 'max_completion_tokens'."),
    ] = "max_tokens"
    temperature: Annotated[
        float,
        Meta(ge=-1, le=2),
        doc("How freely the model words its answers, 0 to 2; -1: the service's choice."),
    ] = -1.0
    stream: Annotated[
        bool,
        doc(
            "Take answers in parts, and pass these on as chat_delta to devices that offered "
            "wsgateway.v1."
        ),
    ] = False
    timeout: Annotated[
        Seconds, doc("How long a device waits at most: its turn, retries and the answer.")
    ] = 60.0
    connect_timeout: Annotated[Seconds, doc("How long it may take to connect.")] = 5.0
    first_byte_timeout: Annotated[
        Seconds,
        doc(
            "How long the service may be silent, before its answer and within; without stream it "
            "says nothing until the answer is complete."
        ),
    ] = 15.0
    answer_bytes: Annotated[
        Bytes, doc("Most that is read of one answer; a streamed token takes about 250 bytes.")
    ] = 1_048_576
    concurrency: Annotated[Positive, doc("Requests at once in all; others wait their turn.")] = 64
    concurrency_per_user: Annotated[Positive, doc("Requests at once of one user.")] = 1
    identify_users: Annotated[
        bool, doc("Send a hash of the user's id as 'user', for the service's abuse reports.")
    ] = False
    prompt_price: Annotated[
        float,
        Meta(ge=0, le=1e6),
        doc("Price of a million prompt tokens, in any currency, for the metric of the cost."),
    ] = 0.0
    completion_price: Annotated[
        float, Meta(ge=0, le=1e6), doc("Price of a million completion tokens.")
    ] = 0.0
    breaker_failures: Annotated[
        Positive, doc("Failures in a row after which the service is left alone.")
    ] = 5
    breaker_pause: Annotated[Seconds, doc("For how long; then one request tries.")] = 30.0


class ApiKey(Section, frozen=True):
    """A key of the HTTP API that is no token of the database."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    scope: Literal["api", "admin"] = "api"


class Api(Section, frozen=True):
    """Where backends send, look and cut: the HTTP API."""

    enabled: Annotated[bool, doc("Serve it.")] = True
    host: Annotated[
        str, doc("Address it listens on; other than loopback, put TLS and a firewall before it.")
    ] = "127.0.0.1"
    port: Annotated[Port, doc("Its port; 0 takes a free one.")] = 8001
    tls: Annotated[
        bool, doc("Serve https:// with the certificate of [tls]; http:// is refused.")
    ] = False
    proxy_protocol: Annotated[bool, doc("As server.proxy_protocol.")] = False
    keys: Annotated[
        tuple[ApiKey, ...],
        doc(
            "Keys besides the database's tokens of scope api and admin: [[api.keys]] with name, "
            "sha256 (of the key, in hex) and scope.",
            of="tables with name, sha256 (64 hex digits) and scope ('api' or 'admin')",
        ),
    ] = ()
    body_bytes: Annotated[Bytes, doc("Longest request body; longer ones get 413.")] = 1_048_576
    body_timeout: Annotated[Seconds, doc("How long a request body may take to arrive.")] = 10.0
    requests: Annotated[
        Positive, doc("Requests under way; beyond, callers get 503 instead of a longer queue.")
    ] = 1000
    connections: Annotated[
        Positive, doc("Open connections of callers; beyond, new ones are closed at once.")
    ] = 2000
    receipt_timeout: Annotated[
        Seconds, doc("How long a send waits for what other instances answer, unless it says so.")
    ] = 0.5
    idempotency_keys: Annotated[
        Positive, doc("Idempotency keys remembered for 5 minutes; the oldest is forgotten first.")
    ] = 100_000


class Redis(Section, frozen=True):
    """What makes several instances one: group traffic and presence through Redis."""

    url: Annotated[
        str,
        doc(
            "redis://[user:password@]host:6379/0, rediss:// for TLS, unix:///path; empty: this "
            "instance is alone. Whoever may PUBLISH there can reach every device.",
            secret=True,
        ),
    ] = ""
    required: Annotated[
        bool,
        doc(
            "Whether /readyz answers 503 while the mirror is deaf; else it says 'degraded', as devices "
            "and local messages are served all the same."
        ),
    ] = False
    prefix: Annotated[
        Name, doc("Begins every key and channel, so that two deployments may share a Redis.")
    ] = "wsgateway:"
    timeout: Annotated[
        Seconds, doc("How long Redis may take to connect or to answer before it counts as away.")
    ] = 2.0
    subscribe_timeout: Annotated[
        Seconds,
        doc("How long a device waits until its groups are subscribed; then it comes in, counted."),
    ] = 1.0
    publish_bytes: Annotated[
        Bytes, doc("Messages that may wait for Redis; beyond, they are not mirrored, counted.")
    ] = 16_777_216


class Queue(Section, frozen=True):
    """The Redis list that backends push messages to."""

    enabled: Annotated[bool, doc("Take messages from it, where Redis is configured.")] = True
    name: Annotated[str, doc("The list; without the prefix, as producers know it.")] = (
        "device_messages"
    )
    rejected: Annotated[
        Positive, doc("Bad items kept in the reject list; the oldest is dropped first.")
    ] = 1000


class Drain(Section, frozen=True):
    """How the gateway stops."""

    delay: Annotated[
        Seconds,
        doc(
            "How long /readyz answers 503 before newcomers are refused: longer than a load balancer "
            "takes to notice."
        ),
    ] = 0.0
    return_rate: Annotated[
        Positive,
        doc(
            "Devices a second that an instance can take: retry_ms in the close reason spreads their "
            "return over as long as that takes."
        ),
    ] = 2000
    window: Annotated[
        Seconds,
        doc("Time to send 1012 to every device and to wait for them; the rest is aborted."),
    ] = 10.0
    grace: Annotated[
        Seconds,
        doc(
            "How long a device that waits for an answer is sent away later, at most half of window."
        ),
    ] = 5.0


class Log(Section, frozen=True):
    """What is written to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], doc("Least level written.")] = (
        "info"
    )
    format: Annotated[
        Literal["auto", "text", "json"],
        doc("'auto': text, with journal levels under systemd; 'json': one object a line."),
    ] = "auto"


class Config(Section, frozen=True):
    """Everything an operator can decide. Durations are seconds, sizes are bytes."""

    server: Server = Server()
    tls: Tls = Tls()
    runtime: Runtime = Runtime()
    auth: Auth = Auth()
    limits: Limits = Limits()
    keepalive: Keepalive = Keepalive()
    compression: Compression = Compression()
    handlers: Handlers = Handlers()
    weather: Weather = Weather()
    chat: Chat = Chat()
    api: Api = Api()
    redis: Redis = Redis()
    queue: Queue = Queue()
    drain: Drain = Drain()
    log: Log = Log()

    def state_dir(self, environ: Mapping[str, str] = os.environ) -> Path:
        """The folder for state: configured, else systemd's, else the user's XDG folder."""
        if self.runtime.state_dir:
            return Path(self.runtime.state_dir).expanduser()
        if environ.get("STATE_DIRECTORY"):
            return Path(environ["STATE_DIRECTORY"].split(":")[0])
        home = environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
        return Path(home) / "wsgateway"

    def tls_files(self, environ: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
        """The files with the certificate and its key. Raises ConfigError."""
        certificate = _file("tls.certificate", self.tls.certificate, environ)
        return certificate, _file("tls.key", self.tls.key, environ) if self.tls.key else certificate

    def database(self, environ: Mapping[str, str] = os.environ) -> Path:
        """The path of the token database."""
        if self.auth.database:
            return Path(self.auth.database).expanduser()
        return self.state_dir(environ) / "wsgateway.db"


@dataclass(frozen=True)
class Key:
    """One key of the configuration: its place, its type, its text."""

    section: str
    name: str
    annotation: Any
    default: Any

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{ENVIRONMENT_PREFIX}{self.section}_{self.name}".upper()

    @property
    def type(self) -> Any:
        return get_args(self.annotation)[0]

    @property
    def description(self) -> str:
        texts = [meta.description for meta in self._metas if meta.description]
        return texts[-1] if texts else ""

    @property
    def unit(self) -> str:
        """'seconds', 'bytes' or ''."""
        return str(self._extra.get("unit", ""))

    @property
    def secret(self) -> bool:
        """Whether its value is masked when shown and may come from `<name>_file`."""
        return bool(self._extra.get("secret"))

    @property
    def live(self) -> bool:
        """Whether a reload applies it; else it takes a restart."""
        return self.name in LIVE.get(self.section, "").split()

    def value(self, config: Config) -> Any:
        """What a configuration says for it."""
        return getattr(getattr(config, self.section), self.name)

    @property
    def _metas(self) -> list[Meta]:
        return [item for item in get_args(self.annotation)[1:] if isinstance(item, Meta)]

    @property
    def _extra(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for meta in self._metas:
            merged |= meta.extra or {}
        return merged

    def allowed(self) -> str:
        """What values it takes, in words for an error message."""
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(repr(choice) for choice in get_args(self.type))
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        text = self._extra.get("of") or words.get(self.type, "a list of texts")
        if self.unit == "seconds":
            text = 'a duration such as "20s" or "1m30s"'
        elif self.unit == "bytes":
            text = 'a size such as 65536 or "64KiB"'
        least = [meta.ge for meta in self._metas if meta.ge is not None]
        most = [meta.le for meta in self._metas if meta.le is not None]
        if least and (self.type is int or max(least) > 0):
            text += f", at least {max(least)}"
        if most and min(most) not in (MOST, LONGEST, 1 << 40):
            text += f", at most {min(most)}"
        return text


LIVE = {
    "auth": "refuse origins require_origin strict_path_id lookup_timeout max_lookups cache_ttl "
    "cache_size poll_interval",
    "limits": "messages window message_characters message_bytes fragments control_frames "
    "outbound_bytes outbound_stall fanout_bytes handshake_timeout handshake_bytes handshakes "
    "handshake_lag handshake_wait loop_lag "
    "connections descriptor_reserve connections_per_user connections_per_ip duplicate "
    "remembered_windows",
    "tls": "certificate key minimum_version",
    "keepalive": "interval timeout close_timeout",
    "handlers": "timeout max_pending",
    "weather": "provider url api key jwt_key jwt_id jwt_project lang timeout call_timeout "
    "connect_timeout cache_ttl cache_size concurrency breaker_failures breaker_pause",
    "chat": "provider url key model system history_turns history_bytes max_tokens max_tokens_field "
    "temperature stream timeout connect_timeout first_byte_timeout answer_bytes concurrency "
    "concurrency_per_user identify_users prompt_price completion_price breaker_failures "
    "breaker_pause",
    "api": "keys body_bytes body_timeout requests connections receipt_timeout idempotency_keys",
    "redis": "required subscribe_timeout",
    "queue": "rejected",
    "drain": "delay return_rate window grace",
    "log": "level format",
}
"""The keys that a reload applies, by section. A key that is not named here takes a restart: whoever
adds one here makes its parts take it in `configure`."""


def changed(one: Config, other: Config) -> list[Key]:
    """The keys that two configurations do not agree on, in the order of the file."""
    return [key for key in keys().values() if key.value(one) != key.value(other)]


def taking(config: Config, other: Config, names: Iterable[Key]) -> Config:
    """A configuration with the values of another for some keys.

    Raises:
        ConfigError: the two cannot hold together so.

    """
    for key in names:
        section = getattr(config, key.section)
        section = msgspec.structs.replace(section, **{key.name: key.value(other)})
        config = msgspec.structs.replace(config, **{key.section: section})
    _check_combinations(config)
    return config


def keys() -> dict[str, Key]:
    """Every key of the configuration by its path, in the order of the file."""
    found = {}
    for section, kind in typing.get_type_hints(Config).items():
        defaults = kind()
        for name, annotation in typing.get_type_hints(kind, include_extras=True).items():
            key = Key(section, name, annotation, getattr(defaults, name))
            found[key.path] = key
    return found


@dataclass(frozen=True)
class Loaded:
    """A configuration and where each value came from.

    ``origins`` maps a key's path to 'default', '<file>:<line>', '$VARIABLE' or the flag;
    ``warnings`` are lines an operator should see.
    """

    config: Config
    origins: Mapping[str, str]
    file: Path | None
    warnings: tuple[str, ...]


def load(
    path: str | Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, object] = types.MappingProxyType({}),
) -> Loaded:
    """Read the configuration: defaults, file, environment, flags, each over those before.

    ``path`` must exist if given; else $WSGATEWAY_CONFIG must, else ./config.toml or
    /etc/wsgateway/config.toml are read where they exist. ``flags`` maps key paths to values.

    Raises:
        ConfigError: one line with the key, the value, what is allowed and the nearest known key.

    """
    known = keys()
    file = _find_file(path, environ)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    warnings: list[str] = []
    layers = (
        _from_file(file) if file else (),
        _from_environment(known, environ, warnings),
        [(name, value, "command line") for name, value in flags.items()],
    )
    for layer in layers:
        seen: set[str] = set()
        for name, raw, origin in layer:
            key, value = _resolve(known, name, raw, origin, environ, warnings)
            if key.path in seen:
                raise ConfigError(
                    f"{origin}: {key.path} is set twice, by value and by file; keep one"
                )
            seen.add(key.path)
            values[key.path] = _convert(key, value, origin)
            origins[key.path] = origin
    config = _build(values)
    _check_combinations(config)
    return Loaded(config, origins, file, (*warnings, *_cleartext_keys(config)))


def render_toml(config: Config | None = None) -> str:
    """The configuration as a commented TOML file; without an argument, the defaults."""
    config = config or Config()
    lines = ["# wsgateway configuration. Every key is optional; shown are the defaults.",
             '# Durations: "20s", "1m30s", "500ms" or seconds. Sizes: bytes or "64KiB", "1MiB".',
             "# Each key is also an environment variable: WSGATEWAY_<SECTION>_<KEY>."]  # fmt: skip
    section = None
    for key in keys().values():
        if key.section != section:
            section = key.section
            kind = type(getattr(config, section))
            lines += ["", f"[{section}] # {(kind.__doc__ or '').splitlines()[0]}"]
        lines += _wrap(key.description, "# ")
        value = render(key, key.value(config))
        prefix = "# " if key.secret and not key.value(config) else ""
        lines.append(f"{prefix}{key.name} = {value}")
    return "\n".join(lines) + "\n"


def render(key: Key, value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if key.unit == "seconds":
        return f'"{value:.9f}'.rstrip("0").rstrip(".") + 's"'
    if key.unit == "bytes" and value and value % 1024 == 0:
        return f'"{value >> 20}MiB"' if value % (1 << 20) == 0 else f'"{value >> 10}KiB"'
    return msgspec.json.encode(value).decode()


def render_reference() -> str:
    """The reference of every key as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Made by `wsgateway config docs`. A value comes from the default, the file, the environment",
        "and the command line, each over those before. The file is `--config`, else",
        "`$WSGATEWAY_CONFIG`, else `./config.toml`, else `/etc/wsgateway/config.toml`.",
        "`wsgateway config show` prints the effective values and where they came from.",
        "",
        'Durations are written `"20s"`, `"1m30s"`, `"500ms"` or as seconds; sizes as bytes, `"64KiB"`',
        'or `"1MiB"`. A key marked *secret* can also be read from a file, with the key',
        '`<key>_file = "/path"` or, under systemd, `<key>_file = "credential:NAME"`.',
        "",
        "Where the column *reload* says yes, SIGHUP or `wsgateway reload` applies a change; the others",
        "take a restart, as a reload says.",
    ]
    section = None
    for key in keys().values():
        if key.section != section:
            section = key.section
            kind = type(getattr(Config(), section))
            lines += ["", f"## [{section}]", "", (kind.__doc__ or "").splitlines()[0], "",
                      "| key | default | what it is for | reload | environment |",
                      "|---|---|---|---|---|"]  # fmt: skip
        text = key.description + (" *Secret.*" if key.secret else "")
        if get_origin(key.type) is Literal and len(get_args(key.type)) > 1:
            text += f" Allowed: {key.allowed().removeprefix('one of ')}."
        reload = "yes" if key.live else "restart"
        default = render(key, key.default)
        lines.append(f"| `{key.name}` | `{default}` | {text} | {reload} | `{key.variable}` |")
    return "\n".join(lines) + "\n"


def parse_duration(text: str) -> float:
    """Seconds of "20s", "1m30s", "500ms", "2h", "90d" or "1.5". Raises ValueError."""
    return _parse_units(text, {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400})


def parse_size(text: str) -> int:
    """Bytes of "65536", "64KiB" or "1MiB". Raises ValueError."""
    return int(_parse_units(text, {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "B": 1}))


def _parse_units(text: str, units: Mapping[str, float]) -> float:
    if re.fullmatch(r"\d{1,15}(\.\d{1,9})?", text):
        return float(text)
    part = rf"(\d{{1,15}}(?:\.\d{{1,9}})?)({'|'.join(units)})"
    if not re.fullmatch(rf"(?:{part})+", text):
        raise ValueError(text)
    return sum(float(number) * units[unit] for number, unit in re.findall(part, text))


def _find_file(path: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    named = path or environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigError(
                f"{named}: no such configuration file (wsgateway config init makes one)"
            )
        return Path(named)
    return next((file for file in (Path("config.toml"), SYSTEM_FILE) if _is_there(file)), None)


def _is_there(file: Path) -> bool:
    """Whether a file is there, as far as can be seen: `sudo -u` keeps a folder he may not search."""
    try:
        return file.is_file()
    except PermissionError:
        return file.is_absolute()  # one that was put there for us: reading it will say more


def _from_file(file: Path) -> Iterator[tuple[str, Any, str]]:
    try:
        text = file.read_text("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{file}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # of TOML, of UTF-8, or of a number with thousands of digits
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    for section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{file}: {section} stands outside a section; put it under one, e.g. [server]"
            )
        if not table and section not in typing.get_type_hints(Config):
            yield section, None, str(file)
        for name, raw in table.items():
            yield f"{section}.{name}", raw, f"{file}:{_line_of(text, section, name)}"


def _line_of(text: str, section: str, name: str) -> int:
    starts = {
        section: rf"\s*\"?{re.escape(name)}\"?\s*=",
        "": rf"\s*{re.escape(section)}\s*(\.\s*{re.escape(name)}\s*=|=\s*\{{)",
    }
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
            current = header[1]
        elif current in starts and re.match(starts[current], line):
            return number
    return 1


def _from_environment(
    known: Mapping[str, Key], environ: Mapping[str, str], warnings: list[str]
) -> Iterator[tuple[str, Any, str]]:
    variables = {key.variable: key.path for key in known.values()}
    variables |= {
        f"{key.variable}_FILE": f"{key.path}_file" for key in known.values() if key.secret
    }
    sections = tuple(f"{ENVIRONMENT_PREFIX}{s.upper()}_" for s in typing.get_type_hints(Config))
    for variable, raw in environ.items():
        if variable in variables and raw != "":  # empty means unset, as for most programs
            yield variables[variable], raw, f"${variable}"
        elif variable.startswith(sections) and variable not in (*variables, *OTHERS):
            close = difflib.get_close_matches(variable, variables, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"${variable}: no such key{hint}")
        elif variable.startswith(ENVIRONMENT_PREFIX) and variable not in (*variables, *OTHERS):
            near = difflib.get_close_matches(variable, variables, 1, cutoff=0.8)
            warnings += [f"${variable} is not used; did you mean ${name}?" for name in near]


def _resolve(
    known: Mapping[str, Key],
    name: str,
    raw: Any,
    origin: str,
    environ: Mapping[str, str],
    warnings: list[str],
) -> tuple[Key, Any]:
    """The key a name stands for and its value, read from a file where the name says so."""
    if name in known:
        return known[name], raw
    key = known.get(name.removesuffix("_file"))
    if key is None or not key.secret:
        close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{origin}: {name}: no such key{hint}")
    return key, _read_secret(key, str(raw), origin, environ, warnings)


def _read_secret(
    key: Key, place: str, origin: str, environ: Mapping[str, str], warnings: list[str]
) -> str:
    path = _file(f"{origin}: {key.path}_file", place, environ)
    try:
        secret = path.read_text("utf-8").strip()
        if path.stat().st_mode & 0o077 and not place.startswith("credential:"):
            warnings.append(f"{path} holds a secret and others may read it: chmod 600 {path}")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{origin}: {key.path}_file: {path} cannot be read as text") from None
    return secret


def _file(name: str, place: str, environ: Mapping[str, str]) -> Path:
    """The path that a key holds, also of one of systemd's credentials. Raises ConfigError."""
    if not place.startswith("credential:"):
        return Path(place).expanduser()
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(
            f"{name} = {place!r} needs systemd's LoadCredential= "
            "($CREDENTIALS_DIRECTORY is not set)"
        )
    return Path(folder) / place.removeprefix("credential:")


def _convert(key: Key, raw: Any, origin: str) -> Any:
    try:
        value = msgspec.convert(_parse_text(key, raw, origin), key.annotation, strict=True)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(raw)
        return value
    except (msgspec.ValidationError, ValueError, OverflowError):
        shown = "***" if key.secret else repr(raw)
        raise ConfigError(f"{origin}: {key.path} = {shown}: must be {key.allowed()}") from None


def _parse_text(key: Key, raw: Any, origin: str) -> Any:
    """Turn text into what the key's type wants; outside the file everything is text."""
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        return raw
    if key.unit == "seconds":
        return parse_duration(raw) if isinstance(raw, str) else float(raw)
    if key.unit == "bytes" and isinstance(raw, str):
        return parse_size(raw)
    from_file = not origin.startswith(("$", "command line"))
    if from_file or not isinstance(raw, str):
        return raw
    if key.type is int:
        return int(raw)
    if key.type is float:
        return float(raw)
    if key.type is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            raw.lower(), raw
        )
    if get_origin(key.type) is tuple:
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    return raw


def _build(values: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, name = path.split(".")
        sections.setdefault(section, {})[name] = value
    kinds = typing.get_type_hints(Config)
    return Config(**{name: kinds[name](**fields) for name, fields in sections.items()})


NOT_ZERO = (
    "limits.window",
    "limits.handshake_timeout",
    "limits.handshake_lag",
    "limits.loop_lag",
    "limits.outbound_stall",
    "keepalive.interval",
    "keepalive.timeout",
    "keepalive.close_timeout",
    "handlers.timeout",
    "auth.lookup_timeout",
    "auth.poll_interval",
    "api.body_timeout",
    "redis.timeout",
    "weather.timeout",
    "weather.call_timeout",
    "weather.connect_timeout",
    "chat.timeout",
    "chat.connect_timeout",
    "chat.first_byte_timeout",
)
"""Durations that cannot be switched off."""


def _check_combinations(config: Config) -> None:
    """Refuse values that are each allowed and cannot hold together."""
    for path in NOT_ZERO:
        section, name = path.split(".")
        if getattr(getattr(config, section), name) <= 0:
            raise ConfigError(f'{path} = "0s": must be longer than 0')
    for broken, sentence in (
        *_limit_rules(config),
        *_network_rules(config),
        *_other_rules(config),
        *_weather_rules(config),
        *_chat_rules(config),
    ):
        if broken:
            raise ConfigError(sentence)


def _limit_rules(config: Config) -> list[tuple[bool, str]]:
    limits = config.limits
    return [
        (
            limits.message_bytes < limits.message_characters,
            f"limits.message_bytes = {limits.message_bytes}: must be at least "
            f"limits.message_characters ({limits.message_characters})",
        ),
        (
            limits.outbound_bytes < limits.message_bytes,
            f"limits.outbound_bytes = {limits.outbound_bytes}: must be at least "
            f"limits.message_bytes ({limits.message_bytes})",
        ),
        (
            limits.fanout_bytes < limits.message_bytes,
            f"limits.fanout_bytes = {limits.fanout_bytes}: must be at least "
            f"limits.message_bytes ({limits.message_bytes})",
        ),
        (
            limits.handshake_bytes < 1024,
            f"limits.handshake_bytes = {limits.handshake_bytes}: no request fits into less than 1024",
        ),
    ]


def _other_rules(config: Config) -> list[tuple[bool, str]]:
    keepalive = config.keepalive
    return [
        (
            keepalive.interval > 600,
            f'keepalive.interval = "{keepalive.interval:g}s": at most 10m, or a dead peer is not found',
        ),
        (
            config.auth.poll_interval > 5,
            f'auth.poll_interval = "{config.auth.poll_interval:g}s": at most 5s, since a revoked '
            "token must be cut within 5 s",
        ),
        (
            config.auth.require_origin and "*" in config.auth.origins,
            "auth.require_origin = true: needs a list of auth.origins without '*'",
        ),
        (
            not re.match("redis://|rediss://|unix://|$", config.redis.url),
            "redis.url: must begin with redis://, rediss:// or unix://",
        ),
        (
            len({key.name for key in config.api.keys}) < len(config.api.keys),
            "api.keys: two keys have the same name",
        ),
    ]


def _network_rules(config: Config) -> list[tuple[bool, str]]:
    server, api = config.server, config.api
    rules = [
        (
            not _is_network(network),
            f"server.trusted_proxies: {network!r} is neither an address nor a network such as "
            "10.0.0.0/8",
        )
        for network in server.trusted_proxies
    ]
    for name, tls, proxied in (
        ("server", server.tls, server.proxy_protocol),
        ("api", api.tls, api.proxy_protocol),
    ):
        rules += [
            (tls and not config.tls.certificate, f"{name}.tls = true: needs tls.certificate"),
            (
                proxied and not server.trusted_proxies,
                f"{name}.proxy_protocol = true: needs server.trusted_proxies",
            ),
        ]
    return rules


def _weather_rules(config: Config) -> list[tuple[bool, str]]:
    weather = config.weather
    if weather.provider == "sample":
        return []
    return [
        (not _is_url(weather.url), "weather.url: must be https://<your API host>"),
        (
            bool(weather.key) == bool(weather.jwt_key),
            "weather.provider = 'qweather': needs weather.key or weather.jwt_key, and not both",
        ),
        (not _is_key(weather.key), "weather.key: holds characters that no key has"),
        (
            bool(weather.jwt_key) and not (weather.jwt_id and weather.jwt_project),
            "weather.jwt_key: needs weather.jwt_id and weather.jwt_project",
        ),
        (
            weather.call_timeout >= weather.timeout,
            f'weather.call_timeout = "{weather.call_timeout:g}s": must be shorter than '
            f'weather.timeout ("{weather.timeout:g}s")',
        ),
        _within_handlers(config, "weather.timeout", weather.timeout),
    ]


def _chat_rules(config: Config) -> list[tuple[bool, str]]:
    chat = config.chat
    if chat.provider == "echo":
        return []
    return [
        (not _is_url(chat.url), "chat.url: must be https://..., e.g. https://api.openai.com/v1"),
        (not chat.model, "chat.provider = 'openai': needs chat.model"),
        (not _is_key(chat.key), "chat.key: holds characters that no key has"),
        _within_handlers(config, "chat.timeout", chat.timeout),
    ]


def _within_handlers(config: Config, path: str, seconds: float) -> tuple[bool, str]:
    """A provider gives up before its handler is: only it can say why."""
    longest = config.handlers.timeout
    return (
        seconds >= longest,
        f'{path} = "{seconds:g}s": must be shorter than handlers.timeout ("{longest:g}s")',
    )


def _is_network(text: str) -> bool:
    try:
        Networks([text])
    except ValueError:
        return False
    return True


def _is_url(text: str) -> bool:
    """Whether requests can be made below it. A query or a user would end up in the log."""
    host = r"([\w.\-]+|\[[0-9A-Fa-f:.]+\])"
    return bool(re.fullmatch(rf"https?://{host}(:\d{{1,5}})?(/[\w.\-~%/]*)?", text, re.ASCII))


def _is_key(text: str) -> bool:
    """Whether a header can hold it."""
    return text.isascii() and text.isprintable()


def _cleartext_keys(config: Config) -> list[str]:
    """Warnings for keys that everybody on the way can read."""
    return [
        f"{name}.url is http://: {name}.key travels in clear"
        for name, section in (("weather", config.weather), ("chat", config.chat))
        if section.key
        and section.url.startswith("http://")
        and not re.match(r"http://(localhost|127\.|\[::1\])", section.url)
    ]


def _wrap(text: str, prefix: str, width: int = 96) -> list[str]:
    lines, line = [], prefix
    for word in text.split():
        if len(line) + len(word) > width:
            lines.append(line.rstrip())
            line = prefix
        line += word + " "
    return [*lines, line.rstrip()]
