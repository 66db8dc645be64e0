"""FastLanguageModel: what a user of Unsloth imports instead.

language.py       the class: signatures and what each argument means
arguments.py      what is refused, with the fix
choices.py        device, dtype and length
loading.py        a checkpoint, or an adapter over one, onto one device
lora.py           PEFT's LoRA around a loaded model
patching.py       sparktune's ops into the model, or a notice that there are none for it
checkpointing.py  which activations are recomputed, and whose word on it counts
saving.py         adapter, merged 16-bit and GGUF, to a folder or to the hub
trl_on_cpu.py     TRL's Triton head for models on a CPU
origin.py         what a model remembers of how it was loaded
"""

from sparktune.interface.choices import is_bfloat16_supported
from sparktune.interface.language import FastLanguageModel

__all__ = ["FastLanguageModel", "is_bfloat16_supported"]
