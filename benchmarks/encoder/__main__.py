"""``python -m benchmarks.encoder``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # the repository, whose source tree holds no compiled core
    sys.path.insert(0, str(Path(__file__).parents[1]))

    from encoder.run import main

    sys.exit(main())
