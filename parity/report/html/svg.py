"""From a matplotlib figure to SVG that lives in a page: its colours follow the page's theme, its text stays text.

Figures are drawn in stand-in colours, one for each role; in the SVG these become CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

#: Role -> what stands in for it while matplotlib draws. The page's style gives ``--role`` a value for each theme.
ROLES = {
    role: "#" + f"0{digit}" * 3  # black itself would be left out of the SVG
    for digit, role in enumerate(
        ("ink", "soft", "rule", "attention", "experts", "streams", "fail", "band", "tie"), start=1
    )
}
_BY_COLOUR = {colour: role for role, colour in ROLES.items()}
#: Points, which are the SVG's own unit.
_INCH = 72
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": ROLES["rule"],
    "axes.labelcolor": ROLES["soft"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": ROLES["ink"],
    "xtick.color": ROLES["rule"],
    "ytick.color": ROLES["rule"],
    "xtick.labelcolor": ROLES["soft"],
    "ytick.labelcolor": ROLES["soft"],
    "lines.linewidth": 1.6,
    "axes.linewidth": 0.8,
    "text.parse_math": False,
}


@contextmanager
def settings() -> Iterator[None]:
    """Figures are made and drawn in this context, so that the user's matplotlibrc has no say."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many units, which the page shows as pixels or smaller."""
    return Figure(figsize=(width / _INCH, height / _INCH), layout="constrained")


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an element of a page, the same bytes every time. ``name`` is unique in the page: ids start so."""
    matplotlib.rcParams["svg.hashsalt"] = name
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
        stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>|<title>.*?</title>", "", text, flags=re.S
    )
    text = _unique_ids(text, name)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"#0(\d)(?:0\1){2}\b", lambda match: f"var(--{_BY_COLOUR[match[0]]})", text)
    # The page chooses the family; sizes and weights stay.
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"(font: [^;\"']*?\d(?:\.\d+)?px) [^;\"]*", r"\1 var(--sans)", text)
    text = re.sub(r"(\d\.\d{2})\d+", r"\1", text)
    text = _shared_styles(text)
    text = re.sub(r"\n\s*", "\n", re.sub(r"<defs>\s*</defs>", "", text))
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    head = (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return Markup(head + text[text.index(">") + 1 :].strip())


def _shared_styles(text: str) -> str:
    """The style of a row of markers once, around them all."""
    marker = r'<use ([^>]*?) style="([^"]*)"/>'
    run = re.compile(rf"{marker}(?:\s*<use [^>]*? style=\"\2\"/>)+")

    def grouped(match: re.Match[str]) -> str:
        uses = re.sub(marker, r"<use \1/>", match[0])
        return f'<g style="{match[2]}">{uses}</g>'

    return run.sub(grouped, text)


def _unique_ids(text: str, name: str) -> str:
    """Only ids that are referred to, each with the figure's name before it."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))

    def renamed(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r' id="([^"]*)"', renamed, text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
