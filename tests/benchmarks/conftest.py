import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:  # the benchmarks are no part of the installed package
    sys.path.insert(0, ROOT)
