"""The page's figures. Each is drawn from its data alone, without pyplot, and says in words what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ErrorSplit
from dsv4_convert.parity.report.html.data import Course, Depth, Divergence, Failing, TokenMap
from dsv4_convert.parity.report.html.marks import shade, short
from dsv4_convert.parity.report.html.scale import Scale, power
from dsv4_convert.parity.report.html.svg import ROLES, new_figure, settings, to_svg
from dsv4_convert.parity.tolerances import Limits

#: Units, which a phone shows as about 0.9 pixels and a desk as 1.2; the wide ones scroll.
_WIDTH = 400
_WIDE = 960
_MARKERS = {"attention": "o", "experts": "s", "streams": "D"}
_DASHES: dict[str, str | tuple[int, tuple[float, ...]]] = {
    "attention": (0, (4, 1.5)),
    "experts": (0, (1.2, 1.2)),
    "streams": "-",
}
_NAMES = {"attention": "attention output", "experts": "expert output", "streams": "streams leaving"}


def depth(data: Depth, name: str, limits: Limits) -> Markup:
    """Error over depth: lines by layer, the limits as a band, failures as crosses, the first divergence marked."""
    with settings():
        figure = new_figure(_WIDTH, 260)
        axes = figure.subplots()
        values = [value for line in data.lines for value in line.multiples if value is not None]
        scale = Scale.over(values, least=(0.5, 2 * limits.row))
        _band(axes, scale, limits)
        for line in data.lines:
            known = [(x, scale(y)) for x, y in zip(data.layers, line.multiples, strict=True) if y is not None]
            colour = ROLES[line.name]
            axes.plot(
                *zip(*known, strict=True),
                color=colour,
                linestyle=_DASHES[line.name],
                marker=_MARKERS[line.name],
                markersize=3.5 if len(data.layers) < 20 else 2,
                label=_NAMES[line.name],
            )
            crosses = [(x, y) for x, y in known if x in line.failing]
            if crosses:
                axes.plot(*zip(*crosses, strict=True), "x", color=ROLES["fail"], markersize=7, markeredgewidth=1.8)
        if data.first is not None:
            axes.axvline(data.first, color=ROLES["fail"], linewidth=1, linestyle=(0, (2, 2)))
            right = data.first > (data.layers[0] + data.layers[-1]) / 2
            axes.annotate(
                "first divergence",
                (data.first, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if right else 4, -10),
                textcoords="offset points",
                ha="right" if right else "left",
                color=ROLES["fail"],
            )
        scale.ticks(axes, "y")
        bottom, top = scale.ends
        axes.set_ylim(bottom, top + 0.12 * (top - bottom))  # room for the words
        _whole_numbers(axes, data.layers)
        axes.set_xlabel("layer")
        axes.set_ylabel("× noise floor")
        _legend(figure, axes, columns=3)
        largest = max(values, key=lambda value: value if not math.isnan(value) else math.inf)
        failing = sorted({layer for line in data.lines for layer in line.failing})
        words = f"Multiples of the noise floor by layer, {data.mode}: largest {short(largest)}. " + (
            f"Beyond a limit in layers {', '.join(map(str, failing))}." if failing else "All within the limits."
        )
        return to_svg(figure, name, f"Error over depth, {data.mode}", words)


def course(data: Course, name: str, limits: Limits) -> Markup:
    """The error through one layer: a dot for each tap, from top to bottom as they are computed."""
    with settings():
        count = len(data.taps)
        figure = new_figure(_WIDTH, 56 + 13.5 * count)
        axes = figure.subplots()
        scale = Scale.over(data.multiples, least=(0.5, 2 * limits.row))
        axes.axvspan(scale.ends[0], math.log10(limits.row), color=ROLES["band"], alpha=0.12, linewidth=0)
        axes.axvline(0, color=ROLES["rule"], linewidth=0.8)
        places = np.arange(count)
        dots = np.array([scale(value) for value in data.multiples])
        axes.hlines(places, scale.ends[0], dots, color=ROLES["rule"], linewidth=0.6)
        groups: Sequence[tuple[str, str, float, Callable[[int], bool]]] = (
            ("o", "attention", 4, lambda i: data.verdicts[i] is Verdict.PASS),
            ("D", "tie", 5, lambda i: data.verdicts[i] is Verdict.TIE),
            ("X", "fail", 7, lambda i: data.verdicts[i] is Verdict.FAIL),
        )
        for marker, role, size, belongs in groups:
            at = [i for i in range(count) if belongs(i)]
            axes.plot(dots[at], places[at], marker, color=ROLES[role], markersize=size, markeredgewidth=0)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_yticks(places, data.taps, fontsize=9.5)
        axes.tick_params(axis="y", length=0)
        for label, tap, verdict in zip(axes.get_yticklabels(), data.taps, data.verdicts, strict=True):
            if tap in data.wrong and verdict is Verdict.FAIL:
                label.set_color(ROLES["fail"])
                label.set_fontweight("bold")
        scale.ticks(axes, "x")
        axes.xaxis.tick_top()
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.spines["top"].set_visible(True)
        fails = [tap for tap, verdict in zip(data.taps, data.verdicts, strict=True) if verdict is Verdict.FAIL]
        words = f"{count} taps in order of execution. " + (
            f"{len(fails)} fail, the first is {fails[0]}." if fails else "None fails."
        )
        return to_svg(figure, name, f"Error through {data.where}, {data.mode}", words)


def growth(data: Sequence[ErrorSplit], name: str) -> Markup:
    """The error of the streams that leave each layer, split into an inherited and an added part."""
    with settings():
        figure = new_figure(_WIDTH, 260)
        axes = figure.subplots()
        layers = [layer.layer for layer in data]
        parts = {part: [getattr(layer, part) for layer in data] for part in ("inherited", "added", "total")}
        values = [value for part in parts.values() for value in part]
        finite = [value for value in values if math.isfinite(value) and value]
        scale = Scale.over(values, least=(min(finite, default=1e-7), max(finite, default=1e-6)))
        look = {
            "inherited": ("attention", "o", (0, (4, 1.5))),
            "added": ("experts", "s", (0, (1.2, 1.2))),
            "total": ("streams", "D", "-"),
        }
        for part, (role, marker, dashes) in look.items():
            axes.plot(
                layers,
                [scale(value) for value in parts[part]],
                color=ROLES[role],
                marker=marker,
                markersize=3.5 if len(layers) < 20 else 2,
                linestyle=dashes,
                label=part,
            )
        scale.ticks(axes, "y")
        _whole_numbers(axes, layers)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative rms")
        _legend(figure, axes, columns=3)
        most = max(data, key=lambda layer: layer.added if math.isfinite(layer.added) else math.inf)
        words = f"Layer {most.layer} adds most, {most.added:.1e} of the streams' rms."
        return to_svg(figure, name, "Error of the streams that leave each layer, split in two", words)


def token_map(data: TokenMap, name: str, limits: Limits) -> Markup:
    """Layers from top to bottom, positions from left to right, and where windows and blocks end."""
    with settings():
        rows = len(data.layers)
        each = 18 if rows <= 12 else 12 if rows <= 32 else 8
        figure = new_figure(_WIDE, 76 + max(each * rows, 24))
        axes = figure.subplots()
        tokens = data.starts[-1]
        axes.imshow(
            np.array([[_rgba(value, limits) for value in row] for row in data.multiples], np.uint8),
            aspect="auto",
            interpolation="none",
            extent=(0, tokens, rows - 0.5, -0.5),
        )
        every = max(1, math.ceil(14 / each))
        axes.set_yticks(range(0, rows, every), data.layers[::every])
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel("layer")
        axes.set_xlabel("position in the prompt")
        axes.spines[:].set_visible(False)
        _borders(axes, data)
        known = [value for row in data.multiples for value in row if value is not None]
        beyond = sum(value > limits.row for value in known)
        words = (
            f"{rows} layers by {tokens} positions; largest {short(max(known))} noise floors, "
            f"{beyond} of {len(known)} cells beyond the limit of {limits.row:g}."
        )
        return to_svg(figure, name, f"Error by token and layer, {MAPS.get(data.what, data.what)}, {data.mode}", words)


#: Titles of the maps over tokens.
MAPS = {"worst": "the worst tap of each layer", "streams": "the streams that leave each layer"}


def distribution(data: Failing, name: str, limits: Limits) -> Markup:
    """How many elements of a tap are how far off."""
    with settings():
        figure = new_figure(_WIDTH, 230)
        axes = figure.subplots()
        edges = np.log10(data.edges)
        counts = np.array(data.counts)
        left, right = min(float(edges[0]), -0.5), max(float(edges[-1]), math.log10(limits.element) + 0.5)
        extra = [(left - 0.75, "0", data.exact)] * bool(data.exact) + [(right + 0.75, "∞", data.infinite)] * bool(
            data.infinite
        )
        axes.axvspan(left - 1.4, math.log10(limits.element), color=ROLES["band"], alpha=0.12, linewidth=0)
        within = edges[1:] <= math.log10(limits.element) + 1e-9
        for role, part in (("attention", within), ("fail", ~within)):
            if part.any():
                axes.bar(edges[:-1][part], counts[part], np.diff(edges)[part] * 0.9, align="edge", color=ROLES[role])
        for place, _, count in extra:
            axes.bar(place, count, 0.4, color=ROLES["fail" if place > 0 else "attention"])
        axes.set_yscale("log")
        axes.set_ylim(0.5, 3 * max([*counts, data.exact, data.infinite, 1]))
        axes.set_yticks(*_powers(axes.get_ylim()))
        axes.minorticks_off()
        step = max(1, math.ceil((right - left) / 6))
        exponents = range(math.ceil(left), math.floor(right) + 1, step)
        axes.set_xlim(left - (1.4 if data.exact else 0.2), right + (1.4 if data.infinite else 0.2))
        axes.set_xticks(
            [*map(float, exponents), *(place for place, _, _ in extra)],
            [*map(power, exponents), *(label for _, label, _ in extra)],
        )
        axes.set_xlabel("|error| in noise floors")
        axes.set_ylabel("elements")
        total = int(counts.sum()) + data.exact + data.infinite
        beyond = int(counts[~within].sum()) + data.infinite
        words = f"Of {total} elements {data.exact} are equal and {beyond} are in bins beyond the limit of elements."
        return to_svg(figure, name, f"Distribution of the error of {data.result.name}", words)


def scatter(data: Failing, name: str, limits: Limits) -> Markup:
    """Golden against found: on the line where they are equal."""
    with settings():
        figure = new_figure(_WIDTH, 300)
        axes = figure.subplots()
        golden, found = np.array(data.golden), np.array(data.found)
        drawn = np.isfinite(golden) & np.isfinite(found)
        beyond = ~(np.array(data.multiples) <= limits.element)
        if drawn.any():
            both = np.concatenate([golden[drawn], found[drawn]])
            low, high = float(both.min()), float(both.max())
            room = 0.04 * (high - low or abs(high) or 1.0)
            ends = (low - room, high + room)
            axes.plot(ends, ends, color=ROLES["rule"], linewidth=1)
            axes.set_xlim(*ends)
            axes.set_ylim(*ends)
        for role, marker, size, part in (("attention", "o", 2.6, ~beyond), ("fail", "x", 3.4, beyond)):
            part = part & drawn
            axes.plot(
                golden[part],
                found[part],
                marker,
                color=ROLES[role],
                markersize=size,
                markeredgewidth=0 if marker == "o" else 0.9,
                alpha=0.75,
                label=f"{'beyond' if role == 'fail' else 'within'} the limit ({np.count_nonzero(part)})",
            )
        axes.set_xlabel("golden")
        axes.set_ylabel("found")
        axes.locator_params(nbins=5)
        _legend(figure, axes, columns=2, markers=2)
        hidden = np.count_nonzero(~drawn)
        words = f"{len(golden)} elements, {np.count_nonzero(beyond)} of them beyond the limit" + (
            f"; {hidden} are not finite and not drawn." if hidden else "."
        )
        return to_svg(figure, name, f"Golden against found, {data.result.name}", words)


def divergence(data: Divergence, name: str) -> Markup:
    """KL divergence of the next token by position."""
    with settings():
        figure = new_figure(_WIDE, 210)
        axes = figure.subplots()
        finite = [value for value in data.kl if math.isfinite(value) and value]
        scale = Scale.over(data.kl, least=(min(finite, default=1e-9), max(finite, default=1e-8)))
        places = np.array([scale(value) for value in data.kl])
        positions, differs = np.array(data.positions), np.array(data.differs)
        axes.vlines(positions, scale.ends[0], places, color=ROLES["rule"], linewidth=0.6)
        axes.plot(
            positions[~differs],
            places[~differs],
            "o",
            color=ROLES["attention"],
            markersize=2.6,
            label="same first choice",
        )
        if differs.any():
            axes.plot(
                positions[differs],
                places[differs],
                "x",
                color=ROLES["fail"],
                markersize=4,
                label="another first choice",
            )
        scale.ticks(axes, "y")
        axes.set_xlabel("position in the prompt")
        axes.set_ylabel("KL, nats")
        _legend(figure, axes, columns=2, markers=2)
        words = f"{len(data.kl)} points; largest {max(data.kl):.1e} nats, {np.count_nonzero(differs)} choose otherwise."
        return to_svg(figure, name, f"Divergence of the next token, {data.mode}", words)


def _band(axes: Axes, scale: Scale, limits: Limits) -> None:
    axes.axhspan(scale.ends[0], math.log10(limits.row), color=ROLES["band"], alpha=0.12, linewidth=0)
    axes.axhline(0, color=ROLES["rule"], linewidth=0.8)


def _whole_numbers(axes: Axes, layers: Sequence[int]) -> None:
    step = max(1, math.ceil(len(layers) / 12))
    axes.set_xticks(list(layers)[::step])
    axes.set_xlim(layers[0] - 0.4, layers[-1] + 0.4)


def _legend(figure: Figure, axes: Axes, *, columns: int, markers: float = 1.0) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=10,
            markerscale=markers,
            handlelength=1.8,
            columnspacing=1.2,
            borderpad=0,
        )


def _rgba(value: float | None, limits: Limits) -> tuple[int, int, int, int]:
    if value is None:
        return 0, 0, 0, 0
    red, green, blue, opacity = shade(value, fails=not value <= limits.row).rgba
    return red, green, blue, round(255 * opacity)


def _borders(axes: Axes, data: TokenMap) -> None:
    """Marks above the map: where the window is full, where blocks end, from where tokens came one by one."""
    tokens = data.starts[-1]
    marks: list[tuple[int, str]] = []
    if data.window < tokens:
        marks.append((data.window, f"window {data.window}"))
    if data.decode:
        marks.append((tokens - data.decode, "one by one"))
    borders = [] if data.block is None else range(data.block, tokens + 1, data.block)
    for border in borders:
        axes.axvline(border, color=ROLES["ink"], linewidth=0.5, alpha=0.35)
    for at, _ in marks:
        axes.axvline(at, color=ROLES["ink"], linewidth=0.9, linestyle=(0, (3, 2)))
    above = axes.secondary_xaxis("top")
    named = [*marks]
    if borders and all(abs(borders[0] - at) > tokens / 8 for at, _ in marks):
        named.append((borders[0], f"block {data.block}"))
    above.set_xticks([at for at, _ in named], [label for _, label in named])
    above.tick_params(length=3)
    above.spines[:].set_visible(False)


def _powers(ends: tuple[float, float]) -> tuple[list[float], list[str]]:
    exponents = range(0, math.floor(math.log10(ends[1])) + 1)
    step = max(1, math.ceil(len(exponents) / 5))
    chosen = exponents[::step]
    return [10.0**exponent for exponent in chosen], [power(exponent) for exponent in chosen]
