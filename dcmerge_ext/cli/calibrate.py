"""``dcmerge calibrate``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.progress import track

from dcmerge_ext.calibration.grams import save_grams
from dcmerge_ext.calibration.models import calibrate, check_model, image_batches, text_batches
from dcmerge_ext.checkpoints.locate import locate
from dcmerge_ext.checkpoints.output import check_file
from dcmerge_ext.checkpoints.run import compute_device
from dcmerge_ext.cli.display import make_console
from dcmerge_ext.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the fine-tuned model of one task: a Hugging Face directory")
    samples = parser.add_mutually_exclusive_group(required=True)
    samples.add_argument("--texts", metavar="FILE", help="a text file with one sample per line")
    samples.add_argument("--images", metavar="DIR", help="a directory of pictures")
    parser.add_argument("--out", required=True, metavar="FILE", help="such as grams.safetensors")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="use the first N, default 32")
    parser.add_argument("--match", metavar="REGEX", help="only weights whose whole name matches")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run the model")


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if args.samples < 1:
        raise OptionError(f"--samples {args.samples}: needs at least 1")
    out = Path(args.out).expanduser()
    check_file(out, args.overwrite)
    device = compute_device(args.device)
    model = locate(args.model)
    check_model(model)
    if args.texts is not None:
        batches = text_batches(model, Path(args.texts).expanduser(), args.samples)
    else:
        batches = image_batches(model, Path(args.images).expanduser(), args.samples)
    console = make_console(stderr=True)
    steps = track(batches, "calibrating", console=console, disable=args.quiet, transient=True)
    grams = calibrate(model, steps, match=args.match, device=device)
    save_grams(grams, out, overwrite=args.overwrite)
    make_console(quiet=args.quiet).print(
        f"{out}: Gram matrices of {len(grams)} layers from {len(batches)} samples in {time.perf_counter() - started:.1f} s"
    )
    return 0
