"""`report.html`: what it says, that it runs nothing and asks nothing, and that a real browser sees it so."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_sample import EVIL, case, evil_result, good_results, laptop, metric, mixed_results, record_of, train
from sparkproof.report import html
from sparkproof.report.charts import Bar, Line, Track, bar_chart, drawable, line_chart, ticks, xy_chart
from sparkproof.report.html import exhibit
from sparkproof.report.sections import floats, sections
from sparkproof.results import ReasonClass, Verdict

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None
)
OWN_REQUESTS = re.compile(
    r"https?://[^/]*\.?(google|googleapis|gvt1|gstatic)\.com/"
)  # the browser's, whatever it shows
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> after {self.open[-3:]}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page(tmp_path: Path, *arguments: object, **more: object) -> Page:
    return Page(html.render(record_of(tmp_path, *arguments, **more)))  # type: ignore[arg-type]


def words(p: Page) -> str:
    return " ".join(" ".join(p.text).split())


# --- what it says ---


def test_the_answer_comes_first_then_findings_then_the_rest(tmp_path: Path) -> None:
    text = words(page(tmp_path, mixed_results(), planned_only=("export/later",)))
    parts = [
        "Can this machine fine-tune?",
        "Not shown",
        "NOT VALIDATED: 1 case failed (environment/memory)",
        "What went wrong, and what to do",
        "sudo swapoff -a",
        "sparkproof validate 'environment/memory'",
        "1 case without a result",
        "sparkproof validate --resume 2026-11-24_06-30-00-abcd",
        "What was checked",
        "Not run, and why",
        "What was measured",
        "Every case",
        "The machine and the run",
    ]
    places = [text.index(p, text.index("Can this machine fine-tune?", 60)) for p in parts]
    assert places == sorted(places), list(zip(parts, places, strict=True))


def test_each_reason_of_a_skip_is_said_once_above_the_cases(tmp_path: Path) -> None:
    why = {
        "environment/a": "no model is here",
        "environment/b": "one machine by itself",
        "environment/c": "no model is here",
    }
    results = [
        case(n, "environment", Verdict.SKIPPED, reason=r, reason_class=ReasonClass.PLATFORM) for n, r in why.items()
    ]
    text = words(page(tmp_path, results))
    table = text[text.index("Not run, and why") : text.index("What was measured")]
    assert table.count("no model is here") == table.count("one machine by itself") == 1


def test_a_good_run_has_nothing_to_do(tmp_path: Path) -> None:
    text = words(page(tmp_path, good_results()))
    assert "VALIDATED: NVIDIA GB10" in text and "NOT VALIDATED" not in text and "What went wrong" not in text


def test_every_case_is_there_with_assertions_measurements_and_output(tmp_path: Path) -> None:
    results = mixed_results()
    text = words(page(tmp_path, results))
    for r in results:
        assert r.name in text, r.name
    for part in (
        "loss falls",
        "2.41 nats",
        ">= 0.8",
        "91.6 to 94.5",
        "least allowed 85 %",
        "line 39 of the log",
        "KeyError",
    ):
        assert part in text, part


def test_empty_sections_say_why_and_draw_nothing(tmp_path: Path) -> None:
    skipped = train(
        "hf", verdict=Verdict.SKIPPED, reason_class=ReasonClass.DISK, reason="2 GiB free.", evidence={}, measurements=[]
    )
    p = page(tmp_path, [skipped], laptop())
    text = words(p)
    assert "no training case could run here. 2 GiB free." in text and "this run had no export cases" in text
    assert not [a for t, a in p.tags if t == "svg"]
    nothing = words(page(tmp_path, [], laptop()))
    assert nothing.count("Not measured:") == 4 and "this run had no cases" in nothing


def test_charts_group_like_with_like(tmp_path: Path) -> None:
    found = {s.title: [c.title for c in s.charts] for s in sections(record_of(tmp_path, mixed_results()))}
    assert found == {
        "Learning": ["Loss", "Gradient norm"],
        "Speed": ["Kernels: share of copy bandwidth", "Kernels: bandwidth", "Training: speed", "Training: step p50"],
        "Memory": ["Training: peak RSS", "Training: peak GPU allocated"],
        "Export": ["Export: KL, mean"],
    }


# --- charts ---


def shapes(svg: str, tag: str, cls: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if cls in (e.get("class") or "").split()]


def test_a_line_chart_draws_its_numbers_and_marks_gaps() -> None:
    chart = line_chart(
        "Loss", [Line("a", [4, 3, math.nan, 2, 1]), Line("b", [2, 2, 2, 2, 2])], "nats", "step", "lower is better"
    )
    assert chart is not None and chart.note == "nats, lower is better" and chart.legend == [(0, "a"), (1, "b")]
    lines = shapes(chart.svg, "polyline", "line")
    assert [len(e.get("points", "").split()) for e in lines] == [2, 2, 5], "a gap splits the first"
    ys = [float(p.split(",")[1]) for e in lines[:2] for p in e.get("points", "").split()]
    assert ys == sorted(ys), "a falling loss falls on the page, where y grows downwards"
    assert len(shapes(chart.svg, "text", "gap")) == 1 and "× marks 1 step" in chart.footnote
    ticks_seen = [e.text for e in shapes(chart.svg, "text", "tick")]
    assert "4" in ticks_seen and "1" in ticks_seen and [e.text for e in shapes(chart.svg, "text", "axis")] == ["step"]
    assert "a: from 4 to 1" in (ET.fromstring(chart.svg).get("aria-label") or "")


def test_bars_are_as_long_as_their_numbers() -> None:
    bars = [Bar("a", "x/a", 10.0, 9.0, 11.0, 20.0), Bar("b", "x/b", 20.0, passed=False)]
    chart = bar_chart("Speed", bars, "tokens/s", "higher is better", "the floor")
    assert chart is not None
    rects = [float(e.get("width", "")) for e in ET.fromstring(chart.svg).iter("rect")]
    assert rects[1] == pytest.approx(2 * rects[0], abs=0.2)
    (reference,) = shapes(chart.svg, "line", "reference")
    assert float(reference.get("x1", "")) == pytest.approx(4 + rects[1], abs=0.2)
    assert len(shapes(chart.svg, "path", "whisker")) == 1 and len(shapes(chart.svg, "rect", "bad")) == 1
    assert (
        chart.footnote
        == "The dashed mark is the floor. Whiskers span the 95% interval. Hatched: the case did not pass."
    )


def test_numbers_far_apart_get_a_logarithmic_axis_of_points() -> None:
    chart = bar_chart("KL", [Bar(str(v), str(v), v) for v in (1e-8, 1e-6, 1e-4, 1e-2)], "nats", "")
    assert chart is not None and "nats (logarithmic)" in chart.svg and "<rect" not in chart.svg
    xs = [float(e.get("cx", "")) for e in shapes(chart.svg, "circle", "fill")]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps[0] > 20 and steps == pytest.approx([steps[0]] * 3, abs=0.2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8))
def test_any_numbers_give_a_drawing_in_its_frame_or_none(values: list[float]) -> None:
    made = [
        line_chart("t", [Line("a", values)], "y", "x", ""),
        bar_chart("t", [Bar(str(i), str(i), v) for i, v in enumerate(values)], "u", ""),
    ]
    assert (made[0] is None) == (len(values) < 2 or not any(map(drawable, values)))
    assert (made[1] is None) == (not any(map(drawable, values)))
    for chart in made:
        if chart is not None:
            assert "nan" not in chart.svg and "inf" not in chart.svg.replace("infinite", "")
            for e in ET.fromstring(chart.svg).iter():
                for key in ("x", "x1", "x2", "cx"):
                    assert -1 <= float(e.get(key, 0)) <= 361, ET.tostring(e)


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_ticks_enclose_their_range_with_few_round_numbers(low: float, size: float) -> None:
    marks = ticks(low, low + size)
    slack = 1e-6 * max(abs(low), size)
    assert marks[0] <= low + slack and marks[-1] >= low + size - slack and 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))


def test_evidence_takes_the_shape_that_suits_it() -> None:
    curve = exhibit("loss", [3, 2, 1])
    assert curve is not None and curve.chart is not None
    rows = exhibit("checks", {"swap": {"state": "ok", "seen": "none"}, "nvml": {"state": "bad", "seen": "x"}})
    assert rows is not None and rows.columns == ["", "state", "seen"] and rows.rows[1] == ["nvml", "bad", "x"]
    pairs = exhibit("versions", {"torch": "2.14", "n": 3})
    assert pairs is not None and pairs.rows == [["torch", "2.14"], ["n", "3"]]
    table = exhibit("t", [{"a": 1, "b": "x"}] * 100)
    assert table is not None and len(table.rows) == 60 and table.left_out == 40
    deep = exhibit("d", {"a": {"b": {"c": 1}}})
    assert deep is not None and '"c": 1' in deep.text
    assert exhibit("e", {}) is None and floats(["NaN", 1, None])[1] == 1.0 and floats([True]) == [] == floats(["x"])


# --- it runs nothing and asks nothing ---


def test_nothing_hostile_becomes_markup(tmp_path: Path) -> None:
    p = page(tmp_path, [*mixed_results(), evil_result()])
    names = {t for t, _ in p.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base", "foreignobject"}
    for tag, attributes in p.tags:
        assert not [k for k in attributes if k.startswith("on")], (tag, attributes)
        for key in ("href", "src", "srcset", "xlink:href", "action"):
            target = attributes.get(key) or ""
            assert not target or target.startswith("#") or target == "data:," or "cases/" in target, (tag, key, target)
    text = html.render(record_of(tmp_path, [evil_result()]))
    assert "&lt;script&gt;" in text and "49" not in re.findall(r"&amp; \| `x`.{0,80}", text)[0], "no template in data"
    assert "javascript:" not in text.replace("javascript:document.title=&#39;pwned&#39;", "")
    assert "url(" not in text and "@import" not in text and "http" not in re.sub(r'http-equiv="', "", text)


@dataclass
class Seen:
    """What a browser made of a page."""

    dom: str
    console: list[str]
    requests: set[str]


def browse(path: Path, profile: Path) -> Seen:
    """Load a page in headless Chromium; its own start-up requests are left out."""
    assert CHROMIUM is not None
    log = profile / "net.json"
    profile.mkdir()
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=3000", f"--log-net-log={log}",
        f"--user-data-dir={profile / 'user'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log.read_text(errors="replace")))
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(done.stdout, console, {u for u in urls if not OWN_REQUESTS.match(u)})


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="not-installed: no chromium or chrome on the PATH")


@needs_chromium
def test_a_browser_shows_it_without_errors_or_requests(tmp_path: Path) -> None:
    record = record_of(tmp_path, [*mixed_results(), evil_result()])
    path = tmp_path / "report.html"
    text = html.render(record)
    # without the policy, so that escaping alone has to hold
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")
    seen = browse(path, tmp_path / "a")
    assert seen.console == [] and seen.requests == set()
    assert "<title>Not shown: can this machine fine-tune?" in seen.dom and "NOT VALIDATED: 2 cases failed" in seen.dom
    assert seen.dom.count("<svg") > 10 and "<title>pwned" not in seen.dom
    path.write_text(text, encoding="utf-8")
    seen = browse(path, tmp_path / "b")
    assert seen.console == [] and seen.requests == set(), "the page keeps its own policy"


@needs_chromium
def test_that_browser_would_have_seen_it(tmp_path: Path) -> None:
    """The check above can fail: the same text unescaped runs, asks and complains; the policy alone stops it."""
    text = html.render(record_of(tmp_path, [case("k/a")]))
    planted = "<script>document.title='pwned'; console.error('planted')</script><img src='http://127.0.0.1:9/x.png'>"
    path = tmp_path / "report.html"
    guarded = text.replace("</main>", planted + "</main>")
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", guarded), encoding="utf-8")
    seen = browse(path, tmp_path / "a")
    assert "<title>pwned" in seen.dom and "planted" in seen.console[0] and seen.requests == {"http://127.0.0.1:9/x.png"}
    path.write_text(guarded, encoding="utf-8")
    seen = browse(path, tmp_path / "b")
    assert "<title>pwned" not in seen.dom and seen.requests == set()


def test_evil_is_in_the_sample() -> None:
    assert "<script>" in EVIL and metric(EVIL, 1.0, "s").name == EVIL


def test_an_xy_chart_puts_points_where_their_numbers_are_and_leaves_out_what_has_no_place() -> None:
    chart = xy_chart(
        "t", [Track("a", [(2, 0.1), (1, 1.0), (3, 0.0)]), Track("b & c", [(1, 0.01)], joined=False)], "MiB", "KL", ""
    )
    assert chart is not None and chart.legend == [(0, "a"), (1, "b & c")]
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3" class="dot s(\d)"', chart.svg)
    a = sorted((float(x), float(y)) for x, y, s in dots if s == "0")
    b = [(float(x), float(y)) for x, y, s in dots if s == "1"]
    assert len(a) == 2 and a[0][1] < a[1][1]  # more MiB, less KL: further down
    assert b[0][0] == a[0][0] and abs((b[0][1] - a[1][1]) - (a[1][1] - a[0][1])) < 0.2  # equal steps of a power of ten
    assert chart.svg.count("<polyline") == 1 and "b &amp; c" in chart.svg
    assert xy_chart("t", [Track("a", [(1, 0.0)])], "x", "y", "") is None
