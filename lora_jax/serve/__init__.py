"""Many requests at once over one base, each through its own adapter."""

from ._engine import Engine as Engine
from ._engine import Stats as Stats
from ._request import Event as Event
from ._request import Request as Request
from ._request import Ticket as Ticket
from ._scheduler import QueueFullError as QueueFullError
