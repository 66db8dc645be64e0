"""README's script, run word for word: a tiny model lies where its hub id points."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import export_tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

README = Path(__file__).parents[2] / "README.md"


def test_the_fine_tuning_script_trains_saves_and_reloads(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    name = re.search(r'from_pretrained\(\s*"([\w.-]+/[\w.-]+)"', script)[1]
    base = export_tiny.save_base(tmp_path / name)
    (tmp_path / "finetune.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "finetune.py"], cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(t.any() for n, t in adapter.items() if "lora_B" in n)
    assert len(adapter) == 28
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert sorted(f.name for f in (tmp_path / "gguf").iterdir()) == ["Modelfile", "README.md", "gguf.Q8_0.gguf"]
    assert done.stdout.split("reply: ")[1].rstrip("\n") == stock_reply(base, tmp_path / "adapter")


def stock_reply(base, adapter):
    """What transformers and PEFT alone answer with the adapter over the base in 4 bits."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    question = [{"role": "user", "content": "What is the code word?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**ids, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(reply[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).rstrip("\n")
