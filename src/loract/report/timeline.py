"""Bytes alive over a training step as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loract.memory import MIB
from loract.report.plot import _figure, _save
from loract.timeline import Profile


def timeline(profiles: Mapping[str, Profile], path: Path) -> Path:
    """Write a PNG: a panel for each step by its name, bytes alive over time, phases shaded, the peak marked.

    Panels share the axis of bytes alone: watching takes time, so seconds compare phases of one step.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = _figure(5.5 * len(profiles), 3.6)
    panels = figure.subplots(1, len(profiles), squeeze=False, sharey=True)[0]
    for axes, (name, profile) in zip(panels, profiles.items(), strict=True):
        seconds = [moment.seconds for moment in profile.timeline]
        sizes = [moment.bytes / MIB for moment in profile.timeline]
        axes.plot(seconds, sizes, drawstyle="steps-post", linewidth=1.2, color="C0")
        top = sizes.index(max(sizes))
        axes.plot([seconds[top]], [sizes[top]], marker="o", color="C3")
        axes.set_title(f"{name}: {sizes[top]:.1f} MiB, in {profile.peak_phase}", loc="left", fontsize=10)
        for index, phase in enumerate(profile.phases):
            inside = [moment.seconds for moment in profile.timeline if moment.phase == phase.name]
            axes.axvspan(inside[0], inside[-1], color=f"C{index + 4}", alpha=0.2, linewidth=0, label=phase.name)
        axes.set_xlabel("seconds")
        axes.set_ylim(0, None)
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("MiB alive")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return _save(figure, path)
