"""The way out of a fine-tuning run: for transformers, PEFT, llama.cpp, Ollama and vLLM.

Every export streams tensor by tensor, checks the disk before its first byte, is whole or absent, and merges in the 16-bit base,
once. `python -m sparktune.export --help` is its command line.

files.py        whole or absent: atomic folders and files, disk space checked first
tensors.py      safetensors files, read and written one tensor at a time
checkpoint.py   a folder of them
lora.py         a PEFT adapter as a set of fp32 weight updates
places.py       which tensors of the base those are for, experts included
hf.py           adapter and merged 16-bit folders
gguf.py         GGUF files, and which type each tensor takes (gguf_types.py)
llama_cpp.py    llama.cpp's converter; ggml.py its quantisation kernels; imatrix.py its importance matrix
four_bit.py     merged, then quantised again
lora_gguf.py    the adapter as GGUF
ollama.py       a Modelfile, its template derived from the chat template (chat_form.py)
vllm.py         what vLLM serves; card.py a model card; bases.py finds the 16-bit base
vocabulary.py   a tokenizer that llama.cpp's converter does not recognise
progress.py     how far an export is
"""

from sparktune.export.bases import find_base
from sparktune.export.card import write_card
from sparktune.export.files import ExportError, NoSpaceError
from sparktune.export.four_bit import export_merged_4bit
from sparktune.export.gguf import export_gguf
from sparktune.export.gguf_types import QTYPES, TENSOR_TYPES, Plan, Shape, plan_types
from sparktune.export.hf import Exported, export_adapter, export_merged, save_adapter
from sparktune.export.lora_gguf import OUTTYPES, export_lora_gguf
from sparktune.export.ollama import export_ollama, modelfile
from sparktune.export.progress import Progress, terminal_bar
from sparktune.export.vllm import export_vllm, export_vllm_adapter

__all__ = [
    "OUTTYPES", "QTYPES", "TENSOR_TYPES", "ExportError", "Exported", "NoSpaceError", "Plan", "Progress", "Shape",
    "export_adapter", "export_gguf", "export_lora_gguf", "export_merged", "export_merged_4bit", "export_ollama",
    "export_vllm", "export_vllm_adapter", "find_base", "modelfile", "plan_types", "save_adapter", "terminal_bar",
    "write_card",
]  # fmt: skip
