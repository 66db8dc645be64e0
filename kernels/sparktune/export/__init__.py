"""The way out of a fine-tuning run: a PEFT adapter, a merged 16-bit folder, a GGUF file.

files.py        whole or absent: atomic folders and files, disk space checked first
checkpoint.py   a folder of safetensors, read one tensor at a time
lora.py         a PEFT adapter as a set of fp32 weight updates
hf.py           adapter and merged 16-bit folders
gguf.py         GGUF f16 and q8_0 for llama.cpp
vocabulary.py   a tokenizer as llama.cpp wants it
"""

from sparktune.export.files import ExportError, NoSpaceError
from sparktune.export.gguf import export_gguf
from sparktune.export.hf import export_adapter, export_merged, save_adapter

__all__ = ["ExportError", "NoSpaceError", "export_adapter", "export_gguf", "export_merged", "save_adapter"]
