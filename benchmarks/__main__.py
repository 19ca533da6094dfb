"""``python -m benchmarks``: the CPU benchmark; ``python -m benchmarks --device cuda``: the one of the CUDA kernels."""

import sys
from pathlib import Path

sys.path.pop(0)  # the repository, whose source tree holds no compiled core
sys.path.insert(0, str(Path(__file__).parent))

from run import main

sys.exit(main())
