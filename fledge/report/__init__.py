"""One page for a folder of runs: what came out, where it came from, how it went. `python -m fledge.report OUT`.

The page is a single HTML file: its style, drawings and pictures are inside and it asks the network for nothing. Its one
script shows values under the pointer and lights up ancestors; without it the page says the same. Everything that came
from outside (names, samples, captions, configs) is escaped, and the page's policy lets no other script run.
"""

from fledge.report.page import main, write
from fledge.report.view import View, runs_of

__all__ = ["View", "main", "runs_of", "write"]
