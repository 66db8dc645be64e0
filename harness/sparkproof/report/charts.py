"""Charts as inline SVG: pure functions from numbers to markup, with axes, units, and no script.

All are drawn for a width of 360 units, a phone's, and grow with their column, so that text stays readable on both.
Colours come from the page's style sheet (classes `s0` to `s5`), in a light and a dark set; lines differ by dashes too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from sparkproof.report.words import number, one_line, shorten

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36
HEIGHT = 200
SERIES = 6  # more lines in one chart can't be told apart
LOG_SPREAD = 30  # values further apart than this don't fit on one linear axis
LABEL_CHARS = 54
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")


@dataclass(frozen=True)
class Line:
    """One curve; NaN and infinity are gaps, marked."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Track:
    """One set of points (x, y), joined in the order of x where `joined`."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True)
class Bar:
    """One bar, with its interval and what it is compared with."""

    label: str
    full_name: str
    value: float
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    passed: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure: everything that stands around the drawing is HTML."""

    title: str
    note: str  # unit and direction
    svg: Markup
    legend: list[tuple[int, str]] = field(default_factory=list)  # index of the series, name
    footnote: str = ""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them; the first and last enclose the range."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-250):  # one value, as far as a drawing goes
        around = size / 2 if size > 1e-250 else 1.0
        low, high = low - around, high + around
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def drawable(value: float | None) -> bool:
    """Whether a number has a place on an axis; beyond these bounds the arithmetic of axes itself overflows."""
    return value is not None and math.isfinite(value) and (value == 0 or 1e-30 < abs(value) < 1e30)


def _f(x: float) -> str:
    return f"{x:.1f}".rstrip("0").rstrip(".")


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {_f(height)}" role="img" aria-label="{escape(label)}" class="chart">{body}</svg>'
    )


def _text(x: float, y: float, text: str, cls: str = "tick", anchor: str = "middle") -> str:
    return f'<text x="{_f(x)}" y="{_f(y)}" class="{cls}" text-anchor="{anchor}">{escape(text)}</text>'


def line_chart(title: str, lines: Sequence[Line], y_name: str, x_name: str, note: str) -> Chart | None:
    """Curves over their index, counted from 1; None when there is nothing to draw."""
    lines = lines[:SERIES]
    finite = [v for line in lines for v in line.values if drawable(v)]
    longest = max((len(line.values) for line in lines), default=0)
    if not finite or longest < 2:
        return None
    ys = ticks(min(finite), max(finite))
    low, high = ys[0], ys[-1]
    xs = [t for t in ticks(1, longest, 6) if 1 <= t <= longest and t == int(t)] or [1.0, float(longest)]
    if xs[0] != 1 and xs[0] - 1 >= (xs[-1] - xs[0]) / max(1, len(xs) - 1) / 2:
        xs = [1.0, *xs]
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(step: float) -> float:
        return LEFT + wide * (step - 1) / max(1, longest - 1)

    def py(value: float) -> float:
        return TOP + tall * (1 - (value - low) / (high - low))

    parts = []
    for y in ys:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_f(py(y))}" y2="{_f(py(y))}" class="grid"/>')
        parts.append(_text(LEFT - 6, py(y) + 4, number(y), anchor="end"))
    parts += [_text(px(x), HEIGHT - BOTTOM + 15, number(int(x))) for x in xs]
    parts.append(_text(LEFT + wide / 2, HEIGHT - 4, x_name, "axis"))
    said = []
    for i, line in enumerate(lines):
        dash = f' stroke-dasharray="{DASHES[i]}"' if DASHES[i] else ""
        for run in _runs(line.values):
            if len(run) == 1:
                step, value = run[0]
                parts.append(f'<circle cx="{_f(px(step))}" cy="{_f(py(value))}" r="2.5" class="dot s{i}"/>')
            else:
                points = " ".join(f"{_f(px(s))},{_f(py(v))}" for s, v in run)
                parts.append(f'<polyline points="{points}" class="line s{i}"{dash}/>')
        for step, value in enumerate(line.values, 1):
            if not drawable(value):
                parts.append(_text(px(step), TOP + 8, "×", f"gap f{i}"))
        ends = [v for v in line.values if drawable(v)]
        if ends:
            said.append(f"{line.name}: from {number(ends[0])} to {number(ends[-1])}")
    gaps = sum(not drawable(v) for line in lines for v in line.values)
    footnote = f"× marks {gaps} step{'s' if gaps > 1 else ''} that gave no finite number." if gaps else ""
    svg = _svg(HEIGHT, f"{title}, {y_name}. {'; '.join(said)}", parts)
    legend = [(i, one_line(line.name)) for i, line in enumerate(lines)]
    return Chart(title, f"{y_name}{', ' if note else ''}{note}", svg, legend, footnote)


def xy_chart(title: str, tracks: Sequence[Track], x_name: str, y_name: str, note: str) -> Chart | None:
    """Points over a linear x and a logarithmic y; None when there is nothing to draw. Points without a place are left out."""
    tracks = tracks[:SERIES]
    drawn = [[(x, y) for x, y in sorted(t.points) if drawable(x) and drawable(y) and y > 0] for t in tracks]
    every = [p for points in drawn for p in points]
    if not every:
        return None
    xs = ticks(min(x for x, _ in every), max(x for x, _ in every), 6)
    low, high = math.log10(min(y for _, y in every)), math.log10(max(y for _, y in every))
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    ys = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(x: float) -> float:
        return LEFT + wide * (x - xs[0]) / (xs[-1] - xs[0])

    def py(y: float) -> float:
        return TOP + tall * (high - math.log10(y)) / (high - low)

    parts = []
    for y in (y for y in ys if low <= math.log10(y) <= high):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_f(py(y))}" y2="{_f(py(y))}" class="grid"/>')
        parts.append(_text(LEFT - 6, py(y) + 4, number(y), anchor="end"))
    parts += [_text(px(x), HEIGHT - BOTTOM + 15, number(x)) for x in xs]
    parts.append(_text(LEFT + wide / 2, HEIGHT - 4, f"{x_name}; {y_name} upwards, logarithmic", "axis"))
    said = []
    for i, (track, points) in enumerate(zip(tracks, drawn, strict=True)):
        if track.joined and len(points) > 1:
            dash = f' stroke-dasharray="{DASHES[i]}"' if DASHES[i] else ""
            path = " ".join(f"{_f(px(x))},{_f(py(y))}" for x, y in points)
            parts.append(f'<polyline points="{path}" class="line s{i}"{dash}/>')
        parts += [f'<circle cx="{_f(px(x))}" cy="{_f(py(y))}" r="3" class="dot s{i}"/>' for x, y in points]
        said.append(f"{track.name}: " + ", ".join(f"{number(y)} at {number(x)}" for x, y in points))
    svg = _svg(HEIGHT, f"{title}, {y_name} over {x_name}. {'; '.join(said)}", parts)
    legend = [(i, one_line(track.name)) for i, track in enumerate(tracks)]
    return Chart(title, f"{y_name}{', ' if note else ''}{note}", svg, legend)


def _runs(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Stretches without a gap, as (step, value)."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in enumerate(values, 1):
        if drawable(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [r for r in runs if r]


def bar_chart(title: str, bars: Sequence[Bar], unit: str, note: str, reference_name: str = "") -> Chart | None:
    """A row a bar, from zero; where values lie too far apart for that, points on a logarithmic axis."""
    bars = [b for b in bars if drawable(b.value)]
    if not bars:
        return None
    every = [v for b in bars for v in (b.value, b.low, b.high, b.reference) if v is not None and drawable(v)]
    log = min(every) > 0 and max(b.value for b in bars) / min(b.value for b in bars) > LOG_SPREAD
    row, left, top = 36, 4, 4
    height = top + row * len(bars) + 34
    wide = WIDTH - left - 58  # room for a value behind the longest bar
    if log:
        first, last = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
        marks = [10.0**k for k in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]
    else:
        marks = ticks(min(0.0, *every), max(0.0, *every), 4)
    low, high = marks[0], marks[-1] if not log else max(marks[-1], 10.0 ** math.ceil(math.log10(max(every))))
    if log:
        high = high if high > low else low * 10

    def px(value: float) -> float:
        if log:
            return left + wide * (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return left + wide * (value - low) / (high - low)

    bottom = top + row * len(bars)
    parts = []
    for mark in marks:
        parts.append(f'<line x1="{_f(px(mark))}" x2="{_f(px(mark))}" y1="{top}" y2="{bottom}" class="grid"/>')
        parts.append(_text(px(mark), bottom + 13, number(mark), anchor="start" if mark == marks[0] else "middle"))
    axis = f"{unit}{' (logarithmic)' if log else ''}"
    parts.append(_text(left + wide / 2, bottom + 29, axis, "axis"))
    referenced = False
    for i, b in enumerate(bars):
        y = top + row * i
        zero, x = px(low if log else 0.0), px(b.value)
        colour = "s0" if b.passed else "bad"
        parts.append(f"<g><title>{escape(b.full_name)}: {escape(number(b.value))} {escape(unit)}</title>")
        parts.append(_text(left, y + 11, shorten(b.label, LABEL_CHARS), "name", "start"))
        if log:
            parts.append(f'<line x1="{left}" x2="{_f(left + wide)}" y1="{y + 23}" y2="{y + 23}" class="track"/>')
            parts.append(f'<circle cx="{_f(x)}" cy="{y + 23}" r="5" class="fill {colour}"/>')
        else:
            start, length = min(zero, x), max(1.0, abs(x - zero))
            box = f'x="{_f(start)}" y="{y + 16}" width="{_f(length)}" height="14" rx="2"'
            parts.append(f'<rect {box} class="fill {colour}"/>')
        end = max(x, zero)
        if b.low is not None and b.high is not None and drawable(b.low) and drawable(b.high) and (b.low > 0 or not log):
            a, z, mid = px(b.low), px(b.high), y + 23
            parts.append(f'<path d="M{_f(a)},{mid - 4}v8M{_f(a)},{mid}H{_f(z)}M{_f(z)},{mid - 4}v8" class="whisker"/>')
            end = max(end, z)
        if b.reference is not None and drawable(b.reference) and (b.reference > 0 or not log):
            referenced = True
            at = px(b.reference)
            parts.append(f'<line x1="{_f(at)}" x2="{_f(at)}" y1="{y + 13}" y2="{y + 33}" class="reference"/>')
            end = max(end, at) if abs(at - end) < 50 else end
        parts.append(_text(end + 7, y + 27, number(b.value), "value", "start"))
        parts.append("</g>")
    said = "; ".join(f"{b.label} {number(b.value)}" for b in bars[:12])
    foot = [f"The dashed mark is {one_line(reference_name) or 'the reference'}."] if referenced else []
    if any(b.low is not None for b in bars):
        foot.append("Whiskers span the 95% interval.")
    if not all(b.passed for b in bars):
        foot.append("Hatched: the case did not pass.")
    text = f"{unit}{', ' if unit and note else ''}{note}"
    return Chart(title, text, _svg(height, f"{title}, {unit}. {said}", parts), [], " ".join(foot))
