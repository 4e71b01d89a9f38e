"""wsgateway: a standalone WebSocket gateway for fleets of devices."""

__version__ = "0.1.0"
