"""What is tested and timed is the installed package, never the source folder.

`python -m pytest` puts the current folder first on sys.path; child processes inherit the path from here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
