"""``dcmerge demo``: what merging is for, shown on real handwritten digits in a minute or two.

Needs the packages of the extra ``demo``; they are imported only when the demo runs.
"""

from dcmerge_ext.demo.results import DemoResult, FamilyResult, Row
from dcmerge_ext.demo.run import run_demo

__all__ = ["DemoResult", "FamilyResult", "Row", "run_demo"]
