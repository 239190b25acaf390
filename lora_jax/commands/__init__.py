"""What each command takes and does, by theme."""

from ._all import COMMANDS as COMMANDS
from ._all import parsers as parsers
from ._command import SECTIONS as SECTIONS
from ._command import Parser as Parser
