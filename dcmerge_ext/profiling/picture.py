"""A profile as one SVG: the stages of the whole merge, and the tensors that took longest."""

from __future__ import annotations

from pathlib import Path

from dcmerge_ext.checkpoints.output import new_file
from dcmerge_ext.errors import InputError
from dcmerge_ext.profiling.result import Profile

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise InputError(
        f"the picture needs {error.name}; install it with: pip install 'dcmerge-ext[compare]' (--json and --trace need nothing)"
    ) from error

_TENSORS = 16


def save_picture(profile: Profile, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the SVG.

    Raises:
        InputError: the file exists, or its place cannot be written.   RunError: writing failed.
    """
    with new_file(path, overwrite) as partial:
        partial.write_text(vl_convert.vegalite_to_svg(_chart(profile).to_dict()), encoding="utf-8")


def _chart(profile: Profile) -> alt.VConcatChart:
    color = alt.Color(
        "stage:N",
        scale=alt.Scale(domain=[*(cost.stage for cost in profile.stages), "idle"], scheme="tableau20"),
        title=None,
        legend=None,
    )
    wall = max(profile.seconds, 1e-9)
    parts = [(c.stage, c.machine_seconds) for c in profile.stages] + [("idle", profile.idle)]
    stages = [{"stage": name, "seconds": s, "label": f"{s:.3g} s  {s / wall:.0%}"} for name, s in parts]
    order = [name for name, _ in parts]
    whole = alt.Chart(
        alt.Data(values=stages),
        title=f"{profile.method} of {profile.tasks} tasks: {profile.seconds:.3g} s on {profile.device}, {profile.threads} threads",
    ).encode(
        y=alt.Y("stage:N", sort=order, title=None),
        x=alt.X("seconds:Q", title="machine seconds", scale=alt.Scale(domainMax=1.15 * max(s for _, s in parts))),
    )
    bars = whole.mark_bar().encode(color=color)
    text = whole.mark_text(align="left", dx=4, fontSize=10).encode(text="label:N")
    longest = profile.tensors[:_TENSORS]
    rows = [
        {"tensor": tensor.name, "stage": name, "seconds": seconds, "order": order.index(name)}
        for tensor in longest
        for name, seconds in tensor.stages.items()
    ]
    tensors = (
        alt.Chart(
            alt.Data(values=rows), title=f"the {len(longest)} tensors of {len(profile.tensors)} that took longest"
        )
        .mark_bar()
        .encode(
            y=alt.Y("tensor:N", sort=[tensor.name for tensor in longest], title=None, axis=alt.Axis(labelLimit=420)),
            x=alt.X("seconds:Q", title="machine seconds"),
            color=color,
            order="order:Q",
        )
    )
    return alt.vconcat((bars + text).properties(width=460), tensors.properties(width=460))
