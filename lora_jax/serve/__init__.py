"""Many requests at once over one base, each through its own adapter."""

from ._engine import Engine as Engine
from ._request import Event as Event
from ._request import Request as Request
from ._request import Ticket as Ticket
from ._scheduler import QueueFullError as QueueFullError
from ._server import asgi_app as asgi_app
from ._server import room_for as room_for
from ._server import serve as serve
from ._settings import ServerSettings as ServerSettings
from ._settings import read_api_keys as read_api_keys
from ._stats import Stats as Stats
