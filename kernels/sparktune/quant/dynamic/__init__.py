"""Dynamic quantisation: each weight gets the type that its own error deserves, under a budget of bytes or to a KL.

    python -m sparktune.quant.dynamic MODEL --text notes.txt --format gguf --budget-gib 4.5 --out mix.json --llama-types mix.txt
    llama-quantize --imatrix imatrix.gguf --tensor-type-file mix.txt model-f16.gguf mix.gguf Q4_K_M

    python -m sparktune.quant.dynamic MODEL --text notes.txt --format nf4 --target-kl 0.02 --out layers.json
    FastLanguageModel.from_pretrained(MODEL, dynamic="layers.json")

The parts, in the order in which they are used:

calibrate.py    what passes through each weight on the text, and from it the predicted KL of any change of it
formats.py      types, their bytes and what comes back from them, by llama.cpp's own quantisers
table.py        weight x type -> bytes, KL, errors
choose.py       the knapsack
check.py        what a mix as a whole costs, measured; the mix that meets a target
choice.py       the result, as transformers and llama-quantize take it
"""

from sparktune.quant.dynamic.check import Judge, importance_of, stored_as, to_target
from sparktune.quant.dynamic.choice import Choice
from sparktune.quant.dynamic.choose import Point, frontier, total, within_budget, within_kl
from sparktune.quant.dynamic.table import Option, Row, Table, measure, sequences_of

__all__ = [
    "Choice",
    "Judge",
    "Option",
    "Point",
    "Row",
    "Table",
    "frontier",
    "importance_of",
    "measure",
    "sequences_of",
    "stored_as",
    "to_target",
    "total",
    "within_budget",
    "within_kl",
]
