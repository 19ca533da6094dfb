"""A row for every merging method but DC-Merge, on full fine-tunes and on adapters, against its plain torch form."""

from method_rows.adapters import core_space, knots, robust_merge
from method_rows.elementwise import elementwise
from method_rows.esm import esm
from method_rows.iterative import doge, wudi
from method_rows.spectral import iso_c, iso_cts, score, tsv_m

__all__ = [
    "core_space",
    "doge",
    "elementwise",
    "esm",
    "iso_c",
    "iso_cts",
    "knots",
    "robust_merge",
    "score",
    "tsv_m",
    "wudi",
]
