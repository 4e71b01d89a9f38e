"""The HTTP API: how backends and sysadmins reach devices.

Only this package speaks HTTP with them, through aiohttp. It knows neither SQL nor Redis commands
nor device sockets. Each call is declared once, in `routes`, from which the checks, the answers and
`docs/openapi.yaml` are made.
"""
