"""What is tested and timed is the installed package, never the source folder; and workers share the cores."""

import os
import sys
from pathlib import Path

# `python -m pytest` puts the current folder first. Processes of multiprocessing get the path from here.
ROOT = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# One thread for each worker of pytest-xdist and its children; to be said before torch and numpy are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
