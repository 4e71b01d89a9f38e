"""Where a value of the configuration comes from, and what is said about one that cannot be used."""

from __future__ import annotations

import datetime as dt
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wsgateway import config
from wsgateway.config import Config, parse_duration, parse_size
from wsgateway.errors import ConfigError

ROOT = Path(__file__).parent.parent
KEYS = config.keys()


@pytest.fixture(autouse=True, scope="module")
def _folder_without_configuration(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


def load(
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> config.Loaded:
    """Load a configuration whose file, named `c.toml`, holds a text."""
    if text is not None:
        Path("c.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    file = None if text is None else "c.toml"
    return config.load(file, environ=environ or {}, flags=flags or {})


def value(loaded: config.Loaded, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(loaded.config, section), name)


# Layers and origins.


@pytest.mark.parametrize(
    ("text", "variable", "flag", "expected", "origin"),
    [
        (None, None, None, 8000, "default"),
        ("[server]\nport = 1\n", None, None, 1, "c.toml:2"),
        (None, "2", None, 2, "$WSGATEWAY_SERVER_PORT"),
        (None, None, "3", 3, "command line"),
        ("[server]\nport = 1\n", "2", None, 2, "$WSGATEWAY_SERVER_PORT"),
        ("[server]\nport = 1\n", None, "3", 3, "command line"),
        (None, "2", "3", 3, "command line"),
        ("[server]\nport = 1\n", "2", "3", 3, "command line"),
        ("[server]\nport = 1\n", "2", 3, 3, "command line"),
    ],
)
def test_each_layer_is_over_those_before(
    text: str | None, variable: str | None, flag: object, expected: int, origin: str
) -> None:
    loaded = load(
        text,
        {"WSGATEWAY_SERVER_PORT": variable} if variable else {},
        {"server.port": flag} if flag else {},
    )
    assert loaded.config.server.port == expected
    assert loaded.origins["server.port"] == origin
    assert loaded.origins["server.host"] == "default"
    assert set(loaded.origins) == set(KEYS)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("[limits]\nmessages = 5", 2, id="plain"),
        pytest.param("# limits\n\n  [ limits ]  # here\n\n  messages=5", 5, id="spaced"),
        pytest.param('[limits]\n"messages" = 5', 2, id="quoted"),
        pytest.param("[limits]\n# messages = 4\nmessages = 5", 3, id="after a comment"),
        pytest.param("[limits]\nmessages = 5\n[server]\nport = 1\n", 2, id="first section"),
        pytest.param("[server]\nport = 1\n[limits]\nmessages = 5", 4, id="second section"),
        pytest.param("# top\n\nlimits.messages = 5", 3, id="dotted"),
        pytest.param("# top\n\nlimits = { messages = 5 }", 3, id="inline"),
        pytest.param('[limits]\r\nwindow = "1s"\r\nmessages = 5\r\n', 3, id="CRLF"),
    ],
)
def test_the_origin_of_a_value_in_the_file_names_its_line(text: str, line: int) -> None:
    loaded = load(text)
    assert loaded.config.limits.messages == 5
    assert loaded.origins["limits.messages"] == f"c.toml:{line}"


def test_the_named_file_is_over_the_variables_which_is_over_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("named.toml", "variable.toml", "config.toml"), 1):
        Path(name).write_text(f"[server]\nport = {number}\n")
    variable = {"WSGATEWAY_CONFIG": "variable.toml"}
    found = [
        config.load("named.toml", environ=variable),
        config.load(environ=variable),
        config.load(environ={}),
    ]
    assert [(each.config.server.port, str(each.file)) for each in found] == [
        (1, "named.toml"),
        (2, "variable.toml"),
        (3, "config.toml"),
    ]
    Path("config.toml").unlink()
    if not config.SYSTEM_FILE.exists():
        assert config.load(environ={}).file is None


@pytest.mark.faults
def test_a_folder_that_may_not_be_searched_holds_no_configuration(tmp_path: Path) -> None:
    """As when root types `sudo -u wsgateway wsgateway ...` in his own folder."""
    program = """
import os, sys
from wsgateway import config
os.chdir(sys.argv[1])
os.setuid(65533)
print(config.load(environ={}).origins["server.port"])
"""
    tmp_path.chmod(0o700)
    (tmp_path / "config.toml").write_text("[server]\nport = 1\n")
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("default\n", "")


def test_the_configuration_cannot_be_changed() -> None:
    loaded = load()
    with pytest.raises(AttributeError):
        loaded.config.server.port = 1  # type: ignore[misc]


# Values as text.


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("server.host", "::1", "::1"),
        ("server.port", "0", 0),
        ("auth.require_origin", "false", False),
        ("auth.require_origin", "No", False),
        ("auth.require_origin", "0", False),
        ("auth.strict_path_id", "true", True),
        ("auth.strict_path_id", "YES", True),
        ("auth.strict_path_id", "1", True),
        ("auth.origins", "https://a.example", ("https://a.example",)),
        (
            "auth.origins",
            " https://a.example , https://b.example,",
            ("https://a.example", "https://b.example"),
        ),
        ("handlers.modules", ",", ()),
        ("limits.window", "1m30s", 90.0),
        ("limits.window", "0.5", 0.5),
        ("keepalive.interval", "250ms", 0.25),
        ("limits.message_bytes", "64KiB", 65536),
        ("limits.outbound_bytes", "2MiB", 2 << 20),
        ("limits.outbound_bytes", "70000", 70000),
        ("log.level", "debug", "debug"),
        ("server.port", "", 8000),
    ],
)
@pytest.mark.parametrize("layer", ["variable", "flag"])
def test_text_of_the_environment_and_the_command_line_is_understood(
    path: str, text: str, expected: object, layer: str
) -> None:
    if layer == "variable":
        loaded = load(environ={KEYS[path].variable: text})
    elif text:  # an empty variable counts as unset, an empty argument was given
        loaded = load(flags={path: text})
    else:
        return
    assert value(loaded, path) == expected
    assert type(value(loaded, path)) is type(expected)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0), ("1.5", 1.5), ("20s", 20), ("0s", 0), ("500ms", 0.5), ("1m", 60), ("1m30s", 90),
        ("2h", 7200), ("90d", 90 * 86400), ("1d1h1m1s1ms", 90061.001), ("1.5h", 5400),
    ],
)  # fmt: skip
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "20 s", " 20s", "20s ", "20s\n", "-1s", "+1s", "1e3", "1e3s", "inf", "nan", "1S",
     "20sec", "1,5s", ".5s", "5.s", "1KiB", "0x10", "1_000", "9" * 400, "9" * 400 + "s"],
)  # fmt: skip
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("65536", 65536), ("64KiB", 65536), ("1MiB", 1 << 20), ("2GiB", 2 << 30),
     ("512B", 512), ("1MiB512KiB", 3 << 19), ("0.5KiB", 512)],
)  # fmt: skip
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "KiB", "64KB", "64kib", "64 KiB", "-1", "1e3", "inf", "nan", "1s", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_size(text)


near_units = st.text("0123456789.smhdKMGiB -+e_\n٣²", max_size=20)


@given(st.one_of(st.text(), near_units, near_units.map(lambda text: text * 50)))
@settings(deadline=None)
def test_durations_and_sizes_are_numbers_or_a_value_error(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            number = parse(text)
        except ValueError:
            continue
        assert number >= 0
        assert math.isfinite(number)


# What is said about a value that cannot be used.

PORT = "a whole number, at least 0, at most 65535"
DURATION = 'a duration such as "20s" or "1m30s"'
SIZE = 'a size such as 65536 or "64KiB"'
LEVEL = "one of 'debug', 'info', 'warning', 'error'"


@pytest.mark.parametrize(
    ("section", "line", "shown", "allowed"),
    [
        ("server", "port = 'x'", "port = 'x'", PORT),
        ("server", "port = 65536", "port = 65536", PORT),
        ("server", "port = -1", "port = -1", PORT),
        ("server", "port = true", "port = True", PORT),
        ("server", "port = 1.0", "port = 1.0", PORT),
        ("server", "port = '80'", "port = '80'", PORT),
        ("server", "port = { a = 1 }", "port = {'a': 1}", PORT),
        ("server", "backlog = 0", "backlog = 0", "a whole number, at least 1"),
        ("server", "host = 5", "host = 5", "text"),
        ("limits", "window = 'soon'", "window = 'soon'", DURATION),
        ("limits", "window = -1", "window = -1", DURATION),
        ("limits", "window = nan", "window = nan", DURATION),
        ("limits", "window = inf", "window = inf", DURATION),
        ("limits", "window = true", "window = True", DURATION),
        ("limits", "message_bytes = '64KB'", "message_bytes = '64KB'", SIZE),
        ("limits", "message_bytes = 1.5", "message_bytes = 1.5", SIZE),
        ("log", "level = 'loud'", "level = 'loud'", LEVEL),
        ("auth", "require_origin = 1", "require_origin = 1", "true or false"),
        ("auth", "origins = '*'", "origins = '*'", "a list of texts"),
        ("auth", "origins = [1]", "origins = [1]", "a list of texts"),
    ],
)
def test_a_value_of_the_file_that_cannot_be_used_is_told_with_its_line_and_what_is_allowed(
    section: str, line: str, shown: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"[{section}]\n{line}\n")
    assert str(caught.value).startswith(f"c.toml:2: {section}.{shown}: must be {allowed}")
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("path", "text", "shown", "allowed"),
    [
        ("server.port", "x", "'x'", PORT),
        ("server.port", "9" * 5000, repr("9" * 5000), PORT),
        ("auth.require_origin", "maybe", "'maybe'", "true or false"),
        ("limits.window", "inf", "'inf'", DURATION),
        ("log.level", "loud", "'loud'", LEVEL),
        ("log.level", "a\nb\x1b[0m\udcff", r"'a\nb\x1b[0m\udcff'", LEVEL),
    ],
    ids=["word", "long number", "no bool", "infinite", "no choice", "unprintable"],
)
def test_text_that_cannot_be_used_is_told_with_the_variable_and_what_is_allowed(
    path: str, text: str, shown: str, allowed: str
) -> None:
    sentence = f"{path} = {shown}: must be {allowed}"
    with pytest.raises(ConfigError) as caught:
        load(environ={KEYS[path].variable: text})
    assert str(caught.value).startswith(f"${KEYS[path].variable}: {sentence}")
    with pytest.raises(ConfigError) as caught:
        load(flags={path: text})
    assert str(caught.value).startswith(f"command line: {sentence}")


@pytest.mark.parametrize(
    ("section", "line", "sentence"),
    [
        *[
            (path.split(".")[0], f"{path.split('.')[1]} = 0", f'{path} = "0s": must be longer than 0')
            for path in (
                "auth.lookup_timeout", "auth.poll_interval", "handlers.timeout",
                "keepalive.close_timeout", "keepalive.interval", "keepalive.timeout",
                "limits.handshake_timeout", "limits.outbound_stall", "limits.window",
                "weather.timeout", "weather.call_timeout", "weather.connect_timeout",
                "chat.timeout", "chat.connect_timeout", "chat.first_byte_timeout",
            )
        ],
        (
            "auth", "poll_interval = 6",
            'auth.poll_interval = "6s": at most 5s, since a revoked token must be cut within 5 s',
        ),
        (
            "auth", "require_origin = true",
            "auth.require_origin = true: needs a list of auth.origins without '*'",
        ),
        (
            "limits", "message_bytes = 10239",
            "limits.message_bytes = 10239: must be at least limits.message_characters (10240)",
        ),
        (
            "limits", "outbound_bytes = 65535",
            "limits.outbound_bytes = 65535: must be at least limits.message_bytes (65536)",
        ),
    ],
    ids=lambda text: text.partition(" ")[0],
)  # fmt: skip
def test_values_that_cannot_hold_together_are_told(section: str, line: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"[{section}]\n{line}\n")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "environ", "flags", "sentence"),
    [
        ("[server]\nprot = 1", {}, {}, "c.toml:2: server.prot: no such key; did you mean server.port?"),
        ("[sever]\nport = 1", {}, {}, "c.toml:2: sever.port: no such key; did you mean server.port?"),
        ("[limits]\nzzzzzzzzzzzz = 1", {}, {}, "c.toml:2: limits.zzzzzzzzzzzz: no such key"),
        ("[zzz]", {}, {}, "c.toml: zzz: no such key"),
        (
            "port = 1", {}, {},
            "c.toml: port stands outside a section; put it under one, e.g. [server]",
        ),
        (
            "[[server]]\nport = 1", {}, {},
            "c.toml: server stands outside a section; put it under one, e.g. [server]",
        ),
        (
            None, {"WSGATEWAY_SERVER_PROT": "1"}, {},
            "$WSGATEWAY_SERVER_PROT: no such key; did you mean WSGATEWAY_SERVER_PORT?",
        ),
        (None, {"WSGATEWAY_LOG_" + "Z" * 22: "1"}, {}, f"$WSGATEWAY_LOG_{'Z' * 22}: no such key"),
        (
            None, {}, {"limits.mesages": "1"},
            "command line: limits.mesages: no such key; did you mean limits.messages?",
        ),
        (None, {}, {"zzz": "1"}, "command line: zzz: no such key"),
        (
            None, {"WSGATEWAY_CONFIG": "none.toml"}, {},
            "none.toml: no such configuration file (wsgateway config init makes one)",
        ),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_the_nearest_known_one(
    text: str | None, environ: dict[str, str], flags: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, environ, flags)
    assert str(caught.value) == sentence


def test_a_variable_that_nearly_names_a_section_is_a_warning_as_it_may_be_another_programs() -> (
    None
):
    loaded = load(environ={"WSGATEWAY_SEVER_PORT": "1", "WSGATEWAY_PORT_8000_TCP_ADDR": "10.0.0.1"})
    assert loaded.config == Config()
    assert loaded.warnings == (
        "$WSGATEWAY_SEVER_PORT is not used; did you mean $WSGATEWAY_SERVER_PORT?",
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[server", id="unclosed header"),
        pytest.param("[server]\nport = 1\nport = 2", id="key twice"),
        pytest.param("[server]\nport = 007", id="leading zeros"),
        pytest.param("\udcff\udcfe", id="no UTF-8"),
        pytest.param("\ufeff[server]\nport = 1", id="byte order mark"),
        pytest.param("a = " + "[" * 5000, id="deeply nested"),
        pytest.param("[server]\nport = " + "9" * 5000, id="number of 5000 digits"),
    ],
)
def test_a_file_that_is_no_toml_is_told_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).startswith("c.toml: not valid TOML: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    ['[server]\n"a\\nb" = 1', '["a\\nb"]\nc = 1', '"a\\nb" = 1', '["a\\u001b[2J"]'],
)
def test_a_name_cannot_write_a_second_line_or_command_a_terminal(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).isprintable()


def toml(raw: Any) -> str:
    """A value as TOML; where JSON and TOML differ, perhaps garbage, which is as welcome."""
    if isinstance(raw, float | dt.date | dt.time):
        return str(raw)
    if isinstance(raw, dict):
        return "{" + ", ".join(f"{toml(name)} = {toml(raw[name])}" for name in raw) + "}"
    if isinstance(raw, list):
        return "[" + ", ".join(map(toml, raw)) + "]"
    return json.dumps(raw, ensure_ascii=False)


def attempt(*layers: Any, **named_layers: Any) -> config.Loaded | None:
    """What is loaded; None where one line said why it cannot be used."""
    try:
        return load(*layers, **named_layers)
    except ConfigError as error:
        told, code = str(error), error.exit_code
    assert len(told.splitlines()) == 1
    assert code == 78
    return None


scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.text(),
    st.sampled_from(["20s", "64KiB", "9" * 5000, "999999999999999d", "\n", "\0", "*", "true"]),
    st.dates(),
    st.times(),
    st.datetimes(),
)
garbage = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


@given(st.sampled_from(sorted(KEYS)), garbage, st.sampled_from(["file", "variable", "flag"]))
@example("drain.window", math.inf, "file")
@example("keepalive.interval", math.inf, "flag")
@settings(deadline=None, max_examples=500)
def test_any_value_of_any_key_is_usable_or_told_in_one_line(
    path: str, raw: Any, layer: str
) -> None:
    section, name = path.split(".")
    if layer == "file":
        loaded = attempt(f"[{section}]\n{name} = {toml(raw)}\n")
    elif layer == "variable":
        loaded = attempt(environ={KEYS[path].variable: str(raw)})
    else:
        loaded = attempt(flags={path: raw})
    if loaded is not None:
        found = value(loaded, path)
        assert msgspec.convert(found, KEYS[path].annotation) == found
        assert not isinstance(found, float) or math.isfinite(found)


@given(st.text(), st.sampled_from(sorted(KEYS)))
@settings(deadline=None)
def test_any_file_is_usable_or_told_in_one_line(text: str, path: str) -> None:
    for content in (text, f"[{path.split('.')[0]}]\n{text}", f"[server]\n{toml(text)} = 1\n"):
        attempt(content)


# What is written.


def test_the_shipped_file_is_what_the_declarations_say_and_holds_the_defaults() -> None:
    assert (ROOT / "config.toml").read_bytes() == config.render_toml().encode()
    loaded = config.load(ROOT / "config.toml", environ={})
    assert loaded.config == Config()
    assert set(tomllib.loads(config.render_toml())) == {key.section for key in KEYS.values()}


def test_the_reference_is_what_the_declarations_say() -> None:
    assert (ROOT / "docs" / "configuration.md").read_bytes() == config.render_reference().encode()


@pytest.mark.parametrize("path", sorted(KEYS))
def test_each_key_says_what_it_is_for_and_has_a_default_that_it_takes(path: str) -> None:
    key = KEYS[path]
    assert key.description.endswith(".")
    assert key.allowed()
    assert msgspec.convert(key.default, key.annotation) == key.default
    assert key.variable == f"WSGATEWAY_{path.replace('.', '_').upper()}"


durations = st.integers(1, 10**10).map(lambda milliseconds: milliseconds / 1000)


@given(durations, st.integers(65536, 2**30), st.text().filter(lambda text: "\x7f" not in text))
@example(7_776_000.0, 1 << 20, "")
@settings(deadline=None)
def test_a_configuration_that_was_written_loads_to_itself(
    seconds: float, size: int, text: str
) -> None:
    written = Config(
        server=config.Server(host=text, port=0),
        auth=config.Auth(origins=(text, "https://a.example")),
        limits=config.Limits(window=seconds, outbound_bytes=size),
        log=config.Log(level="debug"),
    )
    assert load(config.render_toml(written)).config == written


# Where the state lies.


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ({}, {"STATE_DIRECTORY": "/var/lib/wsgateway"}, "/var/lib/wsgateway"),
        ({}, {"STATE_DIRECTORY": "/a:/b", "XDG_STATE_HOME": "/x"}, "/a"),
        ({}, {"XDG_STATE_HOME": "/x"}, "/x/wsgateway"),
        ({}, {"XDG_STATE_HOME": ""}, "~/.local/state/wsgateway"),
        ({}, {}, "~/.local/state/wsgateway"),
        ({"runtime.state_dir": "/s"}, {"STATE_DIRECTORY": "/a", "XDG_STATE_HOME": "/x"}, "/s"),
        ({"runtime.state_dir": "~/s"}, {}, "~/s"),
    ],
)
def test_state_lies_where_it_is_configured_else_where_systemd_or_the_user_keeps_it(
    flags: dict[str, str], environ: dict[str, str], expected: str
) -> None:
    loaded = load(flags=flags).config
    folder = Path(expected).expanduser()
    assert loaded.state_dir(environ) == folder
    assert loaded.database(environ) == folder / "wsgateway.db"
    named = load(flags=flags | {"auth.database": "~/d.db"}).config
    assert named.database(environ) == Path("~/d.db").expanduser()


# Secrets, which may come from files.

SECRET = config.Key("server", "key", Annotated[str, config.doc("A key.", secret=True)], "")


def resolve(name: str, raw: str, environ: Mapping[str, str]) -> tuple[Any, list[str]]:
    warnings: list[str] = []
    key, found = config._resolve({SECRET.path: SECRET}, name, raw, "$X", environ, warnings)
    assert key is SECRET
    return found, warnings


def test_a_secret_comes_from_a_file_or_from_systemd(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sesame\n")
    file.chmod(0o600)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert resolve("server.key", "plain", {}) == ("plain", [])
    assert resolve("server.key_file", str(file), {}) == ("sesame", [])
    assert resolve("server.key_file", "credential:key", environ) == ("sesame", [])
    file.chmod(0o644)
    found, warnings = resolve("server.key_file", str(file), {})
    assert found == "sesame"
    assert warnings == [f"{file} holds a secret and others may read it: chmod 600 {file}"]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("/none/such", "$X: server.key_file: /none/such cannot be read as text"),
        ("credential:k", "$X: server.key_file = 'credential:k' needs systemd's LoadCredential="),
    ],
)
def test_a_secret_that_cannot_be_had_is_told(place: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("server.key_file", place, {})
    assert str(caught.value).startswith(sentence)


def test_a_secret_that_cannot_be_used_is_not_shown() -> None:
    number = config.Key("server", "key", Annotated[int, config.doc("A key.", secret=True)], 0)
    with pytest.raises(ConfigError) as caught:
        config._convert(number, "sesame", "$X")
    assert str(caught.value) == "$X: server.key = ***: must be a whole number"
