"""Training and evaluation of ANNNet, in small parts; ``examples/train.py`` puts them together."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout works without installation
