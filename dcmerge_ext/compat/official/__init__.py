"""The functions of the DC-Merge authors' repository (Tobeginwith/DC-Merge), one module per directory of theirs.

    vision_fft     vision_fft_merge/src/utils/DC_utils.py (and TSV-M of TSVM_utils.py)
    vision_lora    vision_lora_merge/merging_functions.py
    vlm            vlm_merge/llava/model/builder.py

Names, arguments, defaults and results are theirs; docs/official.md gives the import lines, tolerances and differences.
"""

from dcmerge_ext.compat.official import vision_fft, vision_lora, vlm

__all__ = ["vision_fft", "vision_lora", "vlm"]
