"""Gram matrices of the inputs of linear layers, for the methods that need activations (ESM).

:func:`collect_grams` watches a model run on a few samples, :func:`save_grams` writes what it found, and ``dcmerge calibrate``
does both for a checkpoint. The methods read one matrix at a time.
"""

from dcmerge_ext.calibration.collect import collect_grams
from dcmerge_ext.calibration.grams import Gram, Grams, find_gram, open_grams, save_grams
from dcmerge_ext.calibration.models import load_model, stored_names

__all__ = [
    "Gram",
    "Grams",
    "collect_grams",
    "find_gram",
    "load_model",
    "open_grams",
    "save_grams",
    "stored_names",
]
