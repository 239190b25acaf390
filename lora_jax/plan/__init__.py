"""What a run takes on a machine that is not here: its train step compiled, not run."""

from ._plan import OWNERS as OWNERS
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._search import search as search
from ._search import sweep as sweep
from ._show import draw as draw
from ._show import show as show
from ._show import show_found as show_found
from ._show import show_grid as show_grid
from ._targets import parse_target as parse_target
