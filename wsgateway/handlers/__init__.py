"""What answers each message type: the registry that a user's own types join.

Only this package says which types exist and what their messages hold. It knows no transport: a
handler takes a typed message and, if it wants, the device it came from, and returns the answer.

    @handler("light")
    async def light(message: Light, device: Device) -> dict[str, Any] | None: ...

The answer gets ``type`` (``light_response`` unless it has one) and ``timestamp``; None answers
nothing. Raise `ServiceError` to tell the device a reason, `InvalidMessage` to blame a field; any
other exception is logged and the device hears ``Internal server error``.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from wsgateway.errors import ConfigError, InvalidMessage
from wsgateway.providers import History, Services
from wsgateway.wire import ABSENT

BUILT_IN = ("wsgateway.handlers.basic", "wsgateway.handlers.services")
"""Modules with the types of the protocol; a module of the user's may replace any of them."""

_TYPE = "__wsgateway_type__"
_FAILURE = "__wsgateway_failure__"
F = TypeVar("F", bound=Callable[..., Any])


class Reach(Protocol):
    """How a handler reaches other devices of this gateway.

    Each returns what became of the message: ``matched`` connections, and after an ``await`` also
    ``written`` and ``dropped``. Awaiting is never needed, and never waits for a device.
    """

    def to_user(self, user_id: int, message: Mapping[str, Any]) -> Any: ...
    def to_device(self, device_id: int, message: Mapping[str, Any]) -> Any: ...
    def to_all(self, message: Mapping[str, Any]) -> Any: ...


class Device(Protocol):
    """The device that a message came from."""

    history: History | None
    """What was said to the chat on this connection; None until something is."""

    @property
    def user_id(self) -> int: ...
    @property
    def device_id(self) -> int | None: ...
    @property
    def versioned(self) -> bool:
        """Whether it offered `wsgateway.v1`, and so may be sent more than plain clients expect."""
        ...

    @property
    def services(self) -> Services:
        """The configured weather and chat."""
        ...

    @property
    def gateway(self) -> Reach:
        """The way to other devices."""
        ...

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send one more message to this device; False if it is gone. Never waits."""
        ...


@dataclass(frozen=True, slots=True)
class Handler:
    """How one message type is read and answered."""

    type: str
    call: Callable[..., Any]
    waits: bool
    """Whether the call is a coroutine, which gets a task."""
    takes_message: bool
    takes_device: bool
    schema: Any
    default: Callable[[], Any] | None
    """Makes the message where the device sent none; None if one must be sent."""
    failure: str
    """How a ServiceError, or a lack of time, is worded; {} is the reason."""

    def decode(self, raw: Any) -> Any:
        """The message as the handler declares it. Raises InvalidMessage."""
        if raw is ABSENT:
            if self.default is None:
                raise InvalidMessage({"message": ["Missing data for required field."]})
            return self.default()
        if self.schema is Any:
            return raw
        try:
            return msgspec.convert(raw, self.schema, strict=True)
        except msgspec.ValidationError as error:
            raise _blame(error) from None


def handler(message_type: str, *, failure: str = "{}") -> Callable[[F], F]:
    """Mark a function as what answers a message type.

    Its first parameter is the message, typed with anything msgspec can convert to (a Struct, str,
    Any, ...); a default value, or a Struct whose fields all have one, makes the message optional.
    Its second parameter, if any, is the `Device`. A plain function answers at once and must not
    wait or compute for long: everything else stands still meanwhile. A coroutine function gets a
    task; the tasks of one device run one at a time, in order, and are cancelled when it goes.

    ``failure`` words what the device hears of a ServiceError or of a handler that took too long.
    """

    def mark(function: F) -> F:
        setattr(function, _TYPE, message_type)
        setattr(function, _FAILURE, failure)
        return function

    return mark


def load(modules: Iterable[str]) -> dict[str, Handler]:
    """The handlers of the protocol and of the user's modules, by type.

    Raises:
        ConfigError: a module cannot be imported, holds no handler, or two of the user's modules
            answer the same type.

    """
    registry: dict[str, Handler] = {}
    for name in BUILT_IN:
        registry |= _handlers_in(name)
    own: dict[str, str] = {}
    for name in modules:
        for message_type, found in _handlers_in(name).items():
            if message_type in own:
                raise ConfigError(
                    f"handlers.modules: {name} and {own[message_type]} both answer {message_type!r}"
                )
            own[message_type] = name
            registry[message_type] = found
    return registry


def _handlers_in(name: str) -> dict[str, Handler]:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # SystemExit: of a module that is a script
        raise ConfigError(
            f"handlers.modules: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    marked = [
        value for value in vars(module).values() if isinstance(getattr(value, _TYPE, None), str)
    ]
    if not marked:
        raise ConfigError(f"handlers.modules: {name!r} has no function marked with @handler(...)")
    return {getattr(function, _TYPE): _describe(function, name) for function in marked}


def _describe(function: Callable[..., Any], module: str) -> Handler:
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) > 2:
        raise ConfigError(
            f"handlers.modules: {module}.{function.__name__} takes {len(parameters)} parameters; "
            "a handler takes a message and a device"
        )
    hints = typing.get_type_hints(function)
    schema = hints.get(parameters[0].name, Any) if parameters else Any
    return Handler(
        type=getattr(function, _TYPE),
        call=function,
        waits=inspect.iscoroutinefunction(function),
        takes_message=bool(parameters),
        takes_device=len(parameters) == 2,
        schema=schema,
        failure=getattr(function, _FAILURE),
        default=_default(parameters[0], schema) if parameters else type(None),
    )


def _default(parameter: inspect.Parameter, schema: Any) -> Callable[[], Any] | None:
    if parameter.default is not inspect.Parameter.empty:
        return lambda: parameter.default
    if isinstance(schema, type) and issubclass(schema, msgspec.Struct):
        required = [field for field in msgspec.structs.fields(schema) if field.required]
        return None if required else schema
    return None


def _blame(error: msgspec.ValidationError) -> InvalidMessage:
    """Turn msgspec's "reason - at `$.city`" into ``{"message.city": ["reason"]}``."""
    reason, _, place = str(error).partition(" - at `$")
    field = re.sub(r"[^\w.\[\]]", "", place)[:64]
    return InvalidMessage({f"message{field}": [reason]})
