"""What a merge kept of each task, layer by layer: numbers, and a page that shows them.

measure (one matrix) -> run (a merged checkpoint, streamed) -> result (the numbers, as JSON) -> page (HTML).
"""

from dcmerge_ext.comparison.result import Comparison
from dcmerge_ext.comparison.run import compare

__all__ = ["Comparison", "compare"]
