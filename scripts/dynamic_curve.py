"""KL against bytes of sparktune's dynamic mixes and of what they compete with: curve.json and two SVG charts.

    python scripts/dynamic_curve.py MODEL_FOLDER --llama-bin DIR --out reports/published/dynamic/NAME

Both sides get the same calibration text. For training, the weights are rounded as bitsandbytes stores them and the model judged
by transformers; for GGUF, files are made by llama-quantize with llama-imatrix's matrix and judged by llama-perplexity
(--llama-bin holds these tools and convert_hf_to_gguf.py's result is --gguf, an f16 file). The text that judges is held out.

The text is English prose and dialogue that every installation has: CPython's `pydoc_data.topics` and the PyPI package
chatterbot-corpus, alternating, two parts of four for calibration and two held out.

A run that was cut off goes on where it was: what curve.json has is not measured again. Remove it to start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparktune.quant.dynamic import Choice, Judge, Table, measure, sequences_of, total, within_budget

LENGTH = 128
# Unsloth's list for DeepSeek-R1-Distill-Llama-8B, as quoted in https://github.com/vllm-project/vllm/pull/12974; it was made for
# that model, and is set beside ours for what a list carried over from another Llama is worth.
PUBLISHED = ("model.layers.1.mlp",)
PRESETS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")


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
    """The points so far, kept on the disk."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.file = folder / "curve.json"
        data = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {"points": []}
        self.about = {**data, **about}
        self.points = [Measured(**p) for p in data["points"]]

    def has(self, format: str, name: str) -> bool:
        """Whether this point was measured."""
        return any((p.format, p.name) == (format, name) for p in self.points)

    def add(self, point: Measured) -> None:
        """Keep a point."""
        self.points.append(point)
        print(f"{point.format} {point.name}: {point.bytes / 2**20:.2f} MiB, KL {point.kl:.4g}", flush=True)
        points = [asdict(p) for p in sorted(self.points, key=lambda p: (p.format, p.bytes))]
        self.file.write_text(json.dumps({**self.about, "points": points}, indent=1) + "\n", encoding="utf-8")


def nf4(table: Table, model: Any, held_out: Any, curve: Curve) -> None:
    """Plain NF4 in its two forms, the published list, and mixes at their bytes and above."""
    from sparktune.quant.dynamic.formats import Type

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
        *(
            (f"dynamic, {part:.0%} of the way to 16 bits", int(nested + part * (most - nested)))
            for part in (0.1, 0.2, 0.4)
        ),
    ):
        mixes.append((name, True, within_budget(table, size), size))
    for name, dynamic, mix, size in mixes:
        if curve.has("nf4", name):
            continue
        judge = judge or Judge(model, held_out)
        size, predicted = (size, None) if "nf4-plain" in mix.values() else total(table, mix)
        curve.add(Measured("nf4", name, dynamic, size, judge.kl(mix), held_out.numel(), None, None, predicted))


def gguf(table: Table, options: argparse.Namespace, curve: Curve, calibration: Path, held_out: Path) -> None:
    """llama.cpp's own mixes, and ours in exactly their bytes."""
    from gguf import GGUFReader

    if all(curve.has("gguf", n) for p in options.presets for n in (p, f"dynamic at {p}'s bytes")):
        return
    at = options.scratch
    at.mkdir(parents=True, exist_ok=True)
    llama = Llama(options.llama_bin, at, options.gguf)
    tokens = ("-c", LENGTH, "-b", 512, "-t", options.threads, "--chunks")
    if not (at / "imatrix.gguf").exists():
        matrix = ("-f", calibration, "-o", at / "imatrix.gguf", "--no-ppl")
        llama.run("llama-imatrix", "-m", options.gguf, *matrix, *tokens, options.tokens // LENGTH)
    ask = ("-f", held_out, "--kl-divergence-base", at / "base.kld", *tokens, options.held_tokens // LENGTH)
    if not (at / "base.kld").exists():
        llama.run("llama-perplexity", "-m", options.gguf, *ask)
    for preset in options.presets:
        name = f"dynamic at {preset}'s bytes"
        if curve.has("gguf", preset) and curve.has("gguf", name):
            continue
        llama.quantise(preset)
        size = sum(int(t.n_bytes) for t in GGUFReader(at / "out.gguf").tensors)
        if not curve.has("gguf", preset):
            kl, error, top1 = llama.divergence(ask)
            curve.add(Measured("gguf", preset, False, size, kl, options.held_tokens, error, top1, None))
        mix = within_budget(table, size)
        (at / "types.txt").write_text("\n".join(Choice.of(table, mix).llama_lines()), encoding="utf-8")
        llama.quantise(preset, "--tensor-type-file", at / "types.txt")
        got = sum(int(t.n_bytes) for t in GGUFReader(at / "out.gguf").tensors)
        if got != total(table, mix)[0]:
            raise SystemExit(f"llama-quantize wrote {got} bytes of weights, the table says {total(table, mix)[0]}.")
        kl, error, top1 = llama.divergence(ask)
        curve.add(Measured("gguf", name, True, got, kl, options.held_tokens, error, top1, total(table, mix)[1]))


class Llama:
    """llama.cpp's tools in one folder."""

    def __init__(self, tools: Path, at: Path, source: Path) -> None:
        self.tools, self.at, self.source = tools, at, source

    def run(self, tool: str, *arguments: Any) -> str:
        """What the tool printed; its failure ends the script."""
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.tools)}
        done = subprocess.run(
            [str(self.tools / tool), *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{tool} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def quantise(self, preset: str, *more: Any) -> None:
        """Write out.gguf."""
        (self.at / "out.gguf").unlink(missing_ok=True)
        self.run(
            "llama-quantize", "--imatrix", self.at / "imatrix.gguf", *more, self.source, self.at / "out.gguf", preset, 2
        )

    def divergence(self, ask: tuple[Any, ...]) -> tuple[float, float, float]:
        """Mean KL, its standard error, share of equal first choices."""
        said = self.run("llama-perplexity", "-m", self.at / "out.gguf", *ask, "--kl-divergence")
        mean = re.search(r"Mean\s+KLD:\s+([\d.]+) ±\s+([\d.]+)", said)
        top = re.search(r"Same top p:\s+([\d.]+)", said)
        if not mean or not top:
            raise SystemExit("llama-perplexity printed no divergence.")
        return float(mean[1]), float(mean[2]), float(top[1]) / 100


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


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True, help="the model's name in the chart")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llama-bin", type=Path, help="folder of llama-quantize, llama-imatrix and llama-perplexity")
    parser.add_argument("--gguf", type=Path, help="the model in f16, from convert_hf_to_gguf.py")
    parser.add_argument("--types", default="", help="GGUF types to choose among")
    parser.add_argument("--presets", type=lambda s: tuple(s.split(",")), default=PRESETS)
    parser.add_argument("--only", choices=("nf4", "gguf"), help="one of the two charts")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration text")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a sequence, in measuring")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--held-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("scratch"),
        help="where GGUF files are made; importance matrix and reference are kept",
    )
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options.out.mkdir(parents=True, exist_ok=True)
    calibration, held_out = texts()
    curve = Curve(
        options.out, {"model": options.name, "command": " ".join(["python", *sys.argv]), "tokens": options.tokens}
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    sequences = sequences_of(tokenizer, calibration, options.tokens, options.length)
    wanted = [options.only] if options.only else ["nf4", "gguf"]
    if "gguf" in wanted and not (options.llama_bin and options.gguf):
        parser.error("The chart of GGUF types needs --llama-bin and --gguf; --only nf4 draws the other.")
    for format in wanted:
        file = options.out / f"table_{format}.json"
        if not file.exists():
            types = options.types.split(",") if options.types and format == "gguf" else ()
            measure(model, sequences, format, types, options.draws, name=options.name).write(file)
        table = Table.read(file)
        if format == "nf4":
            nf4(table, model, sequences_of(tokenizer, held_out, options.held_tokens, LENGTH), curve)
        else:
            (options.out / "calibration.txt").write_text(calibration, encoding="utf-8")
            (options.out / "held_out.txt").write_text(held_out, encoding="utf-8")
            gguf(table, options, curve, options.out / "calibration.txt", options.out / "held_out.txt")
        draw(curve, options.out)


if __name__ == "__main__":
    main()
