"""Where the emulator and the jobs of other suites are found."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "contract"), str(HERE.parent / "faults"), str(HERE)]
