"""dcmtk's tools are dcmtk's: pynetdicom brings its own of the same names, which come first where an environment is active."""

import os
import sys
from pathlib import Path

own = Path(sys.executable).parent
os.environ["PATH"] = os.pathsep.join(place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != own)
