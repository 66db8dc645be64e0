"""KL against bytes of sparktune's dynamic mixes and of what they compete with: curve.json and two SVG charts, from nothing.

    make dynamic-curve                                        # SmolLM2-135M into reports/published/dynamic/smollm2
    python scripts/dynamic_curve.py --out FOLDER [--model FOLDER --name NAME]

Both sides get the same calibration text. For training, the weights are rounded as bitsandbytes stores them and the model judged
by transformers; for GGUF, files are made by llama-quantize with llama-imatrix's matrix and judged by llama-perplexity. The text
that judges is held out. llama.cpp's own mixes set the budgets, and ours get budgets half-way between them too.

The text is English prose and dialogue that every installation has: CPython's `pydoc_data.topics` and the PyPI package
chatterbot-corpus, alternating, two parts of four for calibration and two held out.

What takes long is kept in sparkproof's cache: llama.cpp's tools, which are built once (`llama_tools.py`), and the points, in a
folder that is named after the model and every setting. So a run that was cut off goes on where it was, and a run with other
settings starts anew; --anew starts the same one anew. Other --types only measure the weights and our mixes again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_tools
from curve_llama import Llama
from sparktune.quant.dynamic import Choice, Judge, Table, measure, sequences_of, total, within_budget
from sparktune.quant.dynamic.formats import GGUF_TYPES, Type

LENGTH = 128
# Unsloth's list for DeepSeek-R1-Distill-Llama-8B, as quoted in https://github.com/vllm-project/vllm/pull/12974; it was made for
# that model, and is set beside ours for what a list carried over from another Llama is worth.
PUBLISHED = ("model.layers.1.mlp",)
PRESETS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
PARTS = (0.1, 0.2, 0.4, 0.6)  # budgets of NF4's mixes, of the way from all in 4 bits to all in 16


@dataclass(frozen=True)
class Measured:
    """One point."""

    format: str
    name: str
    dynamic: bool
    bytes: int
    kl: float
    held_out: int  # tokens that judged; llama-perplexity counts the second half of each sequence
    error: float | None
    top1: float | None
    predicted: float | None


def texts() -> tuple[str, str]:
    """Calibration text and held-out text."""
    from sparkproof.data.conversations import load_conversations

    topics = pydoc_data.topics.topics
    prose = [re.sub(r"\n{3,}", "\n\n", topics[key]) for key in sorted(topics)]
    lines = [f"{a[0]['content']}\n{a[1]['content']}" for a in load_conversations("chatterbot:english")]
    talk = ["\n\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    mixed = [part for i in range(max(len(prose), len(talk))) for part in prose[i : i + 1] + talk[i : i + 1]]
    return "\n\n".join(mixed[0::4] + mixed[1::4]), "\n\n".join(mixed[2::4] + mixed[3::4])


class Curve:
    """The points so far: kept in the folder `at`, published in `out` with what they are of."""

    def __init__(self, at: Path, out: Path, about: dict[str, Any], offered: str) -> None:
        """offered: a name for the GGUF types that our mixes choose among, since a point of theirs is of these alone."""
        self.every, self.ours = at / "points.json", at / f"points_{offered}.json"
        self.file, self.about = out / "curve.json", about
        known = [json.loads(f.read_text(encoding="utf-8")) for f in (self.every, self.ours) if f.exists()]
        self.points = [Measured(**p) for points in known for p in points]

    def has(self, format: str, name: str) -> bool:
        """Whether this point was measured."""
        return any((p.format, p.name) == (format, name) for p in self.points)

    def add(self, point: Measured) -> None:
        """Keep a point."""
        self.points.append(point)
        print(f"{point.format} {point.name}: {point.bytes / 2**20:.2f} MiB, KL {point.kl:.4g}", flush=True)
        ours = point.dynamic and point.format == "gguf"
        points = [asdict(p) for p in self.points if (p.dynamic and p.format == "gguf") == ours]
        (self.ours if ours else self.every).write_text(json.dumps(points), encoding="utf-8")

    def publish(self) -> None:
        """Write curve.json."""
        points = [asdict(p) for p in sorted(self.points, key=lambda p: (p.format, p.bytes, p.name))]
        self.file.write_text(json.dumps({**self.about, "points": points}, indent=1) + "\n", encoding="utf-8")


def nf4(table: Table, model: Any, held_out: Any, curve: Curve) -> None:
    """Plain NF4 in its two forms, the published list, and mixes at their bytes and above."""
    judge: Judge | None = None
    plain = sum(Type("nf4-plain").nbytes(row.shape) for row in table.rows) + table.fixed_bytes
    all_nf4 = {row.name: "nf4" for row in table.rows}
    nested = total(table, all_nf4)[0]
    most = total(table, {row.name: "bf16" for row in table.rows})[0]
    listed = {r.name: "bf16" if r.target.startswith(PUBLISHED) else "nf4" for r in table.rows}
    mixes: list[tuple[str, bool, dict[str, str], int]] = [
        ("plain NF4, BitsAndBytesConfig's default", False, {row.name: "nf4-plain" for row in table.rows}, plain),
        ("NF4 with double quantisation", False, all_nf4, nested),
        ("NF4, MLP of layer 1 in 16 bits", False, listed, total(table, listed)[0]),
        ("dynamic at plain NF4's bytes", True, within_budget(table, plain), plain),
    ]
    for name, size in (
        ("dynamic at that list's bytes", total(table, listed)[0]),
        *((f"dynamic, {part:.0%} of the way to 16 bits", int(nested + part * (most - nested))) for part in PARTS),
    ):
        mixes.append((name, True, within_budget(table, size), size))
    for name, dynamic, mix, size in mixes:
        if curve.has("nf4", name):
            continue
        judge = judge or Judge(model, held_out)
        size, predicted = (size, None) if "nf4-plain" in mix.values() else total(table, mix)
        curve.add(Measured("nf4", name, dynamic, size, judge.kl(mix), held_out.numel(), None, None, predicted))


def gguf(table: Table, llama: Llama, presets: tuple[str, ...], held_tokens: int, curve: Curve) -> None:
    """llama.cpp's own mixes, ours in exactly their bytes, and ours half-way between them."""
    sizes = {}
    for preset in presets:
        if not curve.has("gguf", preset):
            size = weights_in(llama.quantise(preset))
            kl, error, top1 = llama.divergence()
            curve.add(Measured("gguf", preset, False, size, kl, held_tokens, error, top1, None))
        sizes[preset] = next(p.bytes for p in curve.points if (p.format, p.name) == ("gguf", preset))
    budgets = {f"dynamic at {p}'s bytes": size for p, size in sizes.items()}
    for (p, a), (q, b) in pairwise(sorted(sizes.items(), key=lambda item: item[1])):
        budgets[f"dynamic, half-way from {p} to {q}"] = (a + b) // 2
    for name, budget in budgets.items():
        if curve.has("gguf", name):
            continue
        mix = within_budget(table, budget)
        file = llama.at / "types.txt"
        file.write_text("\n".join(Choice.of(table, mix).llama_lines()), encoding="utf-8")
        got = weights_in(llama.quantise(presets[0], "--tensor-type-file", file))
        if got != total(table, mix)[0]:
            raise SystemExit(f"llama-quantize wrote {got} bytes of weights, the table says {total(table, mix)[0]}.")
        kl, error, top1 = llama.divergence()
        curve.add(Measured("gguf", name, True, got, kl, held_tokens, error, top1, total(table, mix)[1]))


def weights_in(file: Path) -> int:
    """Bytes of a GGUF's tensors."""
    from gguf import GGUFReader

    return sum(int(t.n_bytes) for t in GGUFReader(file).tensors)


def draw(curve: Curve, folder: Path) -> None:
    """One SVG a format, the style sheet of the reports inside."""
    import sparkproof.report.charts as charts

    css = (Path(charts.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    keep = re.findall(
        r":root \{.*?\n\}\n|@media \(prefers.*?\n\}\n|^\.(?:chart|grid|line|dot)[^\n]*\n", css, re.S | re.M
    )
    for format, theirs in (("nf4", "without"), ("gguf", "llama.cpp's own mixes")):
        points = [p for p in curve.points if p.format == format]
        tracks = [
            charts.Track("dynamic", [(p.bytes / 2**20, p.kl) for p in points if p.dynamic]),
            charts.Track(theirs, [(p.bytes / 2**20, p.kl) for p in points if not p.dynamic], joined=format == "gguf"),
        ]
        chart = charts.xy_chart(f"{curve.about['model']}, {format}", tracks, "MiB of weights", "KL, nats a token", "")
        if chart is not None:
            style = "<style>" + "".join(keep) + "svg{font-family:sans-serif;background:var(--card)}</style>"
            key = "".join(
                f'<text x="{charts.WIDTH - 16}" y="{22 + 14 * i}" text-anchor="end" class="f{i}">{name}</text>'
                for i, name in chart.legend
            )
            svg = (
                str(chart.svg)
                .replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
                .replace(">", ">" + style, 1)
            )
            (folder / f"{format}.svg").write_text(svg.replace("</svg>", key + "</svg>") + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder; by default the embedded SmolLM2")
    parser.add_argument("--name", default="SmolLM2-135M", help="the model's name in the chart")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--types", type=lambda s: tuple(s.split(",")), default=GGUF_TYPES, help="GGUF types to choose among"
    )
    parser.add_argument("--presets", type=lambda s: tuple(s.split(",")), default=PRESETS, help="llama.cpp's own mixes")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration text")
    parser.add_argument("--length", type=int, default=48, help="tokens a sequence, in measuring")
    parser.add_argument("--draws", type=int, default=2, help="of labels from the model, in measuring")
    parser.add_argument("--held-tokens", type=int, default=2048, help="of the text that judges")
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    parser.add_argument("--threads", type=int, default=half, help="of llama.cpp's tools; half of the cores")
    parser.add_argument("--anew", action="store_true", help="measure again what these settings have measured before")
    return parser.parse_args()


def main() -> None:
    """See the module's docstring."""
    from sparkproof.engines.pretrained import resolve
    from sparkproof.session import default_cache_dir
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    base = resolve(options.model, "", default_cache_dir()).path
    known = ("name", "types", "presets", "tokens", "length", "draws", "held_tokens")
    settings = {key: getattr(options, key) for key in known}
    shared = {key: value for key, value in settings.items() if key != "types"}
    mark, offered = digest([shared, str(base.resolve()), llama_tools.pin()]), digest(options.types)
    at = default_cache_dir() / "dynamic-curve" / mark
    if options.anew:
        shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True, exist_ok=True)
    calibration, held_out = texts()
    command = shlex.join(["python", *sys.argv])
    curve = Curve(at, options.out, {"model": options.name, "command": command, "settings": settings}, offered)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    sequences = sequences_of(tokenizer, calibration, options.tokens, options.length)
    for format in ("gguf", "nf4"):
        file = at / (f"table_gguf_{offered}.json" if format == "gguf" else "table_nf4.json")
        if not file.exists():
            print(f"measuring every weight in the types of {format}", flush=True)
            types = options.types if format == "gguf" else ()
            measure(model, sequences, format, types, options.draws, name=options.name).write(file)
        table = Table.read(file)
        if format == "nf4":
            nf4(table, model, sequences_of(tokenizer, held_out, options.held_tokens, LENGTH), curve)
        else:
            llama = tools(at, base, options)
            (at / "calibration.txt").write_text(calibration, encoding="utf-8")
            (at / "held_out.txt").write_text(held_out, encoding="utf-8")
            llama.prepare(at / "calibration.txt", options.tokens, at / "held_out.txt", options.held_tokens)
            gguf(table, llama, options.presets, options.held_tokens, curve)
        curve.publish()
        draw(curve, options.out)


def digest(settings: Any) -> str:
    """A short name for settings that JSON can say."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def tools(at: Path, base: Path, options: argparse.Namespace) -> Llama:
    """llama.cpp's tools, built where they are not yet, and the model in f16."""
    from sparkproof.session import default_cache_dir
    from sparktune.export import export_gguf

    folder, source = default_cache_dir() / "llama-tools", at / "f16.gguf"
    if not llama_tools.built(folder):
        print("building llama.cpp's tools", flush=True)
        llama_tools.build(folder)
    if not source.exists():
        export_gguf(base, source, "f16", name=options.name)
    return Llama(folder, at, source, LENGTH, options.threads)


if __name__ == "__main__":
    main()
