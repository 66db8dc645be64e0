"""GGUF for llama.cpp: a model in one of the types of `sparktune.export.gguf_types`, an adapter merged on the way.

llama.cpp's own converter reads the base, renames and rearranges its tensors and writes tokenizer and hyperparameters; what it
does to a tensor it does lazily, when the file is written. So one pass is enough: each tensor is read, merged in fp32, brought
into llama.cpp's form and rounded once to its type, by llama.cpp's quantisation kernels, and no intermediate file is made.

Only what is known is written: an architecture or a pre-tokenizer that llama.cpp does not know is an error, not a guess. The
file is whole or absent, and the disk is checked against the exact size.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparktune.export import ggml
from sparktune.export.checkpoint import INDEX, Checkpoint
from sparktune.export.files import ExportError, atomic_file, need_space
from sparktune.export.gguf_stream import Streamed
from sparktune.export.gguf_types import EMBEDDING, PLAIN, QTYPES, Plan, Shape, check_qtype, may_be_quantised, plan_types
from sparktune.export.hf import TOKENIZER_FILES, Exported, copy_tokenizer, exported, opened
from sparktune.export.imatrix import Importance, read_imatrix
from sparktune.export.llama_cpp import converter
from sparktune.export.llama_cpp_limits import complete
from sparktune.export.lora import Adapter
from sparktune.export.progress import Progress, silent
from sparktune.export.tensors import Stored
from sparktune.export.vocabulary import adds_ends, byte_level, name_for, pre_tokenizer

FIX = "Export merged_16bit, or a model of a family that llama.cpp's converter knows."


def export_gguf(
    base: Path,
    out: Path,
    qtype: str = "q8_0",
    adapter: Path | None = None,
    name: str = "",
    *,
    tensor_types: Mapping[str, str] | None = None,
    imatrix: Path | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write the model in `base`, with `adapter` merged if given, to the GGUF file `out`.

    base: folder of 16-bit (or fp32) safetensors. qtype: a key of QTYPES. name: the model's name in the file.
    tensor_types: GGUF tensor name or regular expression -> type ("q6_k"), over what `qtype` gives; the first that fits.
    imatrix: llama.cpp's importance matrix (its GGUF form), as llama-quantize takes it.

    The result's `types` and `fallbacks` say what each tensor became. Errors: ExportError for what is not known or does not
    fit, NoSpaceError before the first byte.
    """
    start = time.monotonic()
    check_qtype(qtype)
    checkpoint, lora = opened(base, adapter)
    if lora is not None and (packed := sorted(checkpoint.in_mxfp4 & set(lora.places))):
        raise ExportError(
            f"The adapter trains {packed[0]}, which the base stores in MXFP4.",
            "Export merged_16bit, which dequantises it, and convert that folder.",
        )
    important = read_imatrix(imatrix) if imatrix is not None else None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(model_folder(base, adapter, name or base.name))
        stack.enter_context(converting(base))
        convert, gguf = stack.enter_context(converter())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_reading(convert, checkpoint, lora))
        model, notes = _model(convert, gguf, folder, name or base.name, QTYPES[qtype][0])
        writer = model.gguf_writer
        plan = _plan(gguf, writer, qtype, tensor_types, important)
        size = _stream(gguf, writer, plan, important, progress)
        counted = f"{size / 1e9:.2f} GB of {len(plan.types)} tensors in {qtype}{' and a mix' if tensor_types else ''}"
        need_space(out, size, counted)
        with atomic_file(out) as part:
            try:
                writer.write_header_to_file(path=part)
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file(progress=False)
            finally:
                writer.close()
            if lora is not None:
                lora.check_used()
    if plan.fallbacks:
        notes.append(f"{len(plan.fallbacks)} tensors did not fit the blocks of their type and took another.")
    return exported(
        out, len(plan.types), len(lora.used) if lora else 0, checkpoint.parameters, start,
        types=plan.types, fallbacks=plan.fallbacks,
        notes=notes,
    )  # fmt: skip


@contextlib.contextmanager
def model_folder(base: Path, adapter: Path | None, name: str, weights: bool = True) -> Iterator[Path]:
    """A folder as the converter wants it: the base, with the tokenizer that the model has seen. Weights are links."""
    with tempfile.TemporaryDirectory(prefix="sparktune-gguf-") as temporary:
        folder = Path(temporary, name.replace("/", "-") or "model")
        folder.mkdir()
        for file in base.iterdir():
            is_weight = file.suffix == ".safetensors" or file.name == INDEX
            if file.is_file() and file.name not in TOKENIZER_FILES and (weights or not is_weight):
                (folder / file.name).symlink_to(file.absolute())
        copy_tokenizer(base, adapter, folder)
        yield folder


@contextlib.contextmanager
def converting(base: Path) -> Iterator[None]:
    """What the converter raises, as an ExportError that says of what."""
    try:
        yield
    except ExportError:
        raise
    except (
        NotImplementedError,
        ValueError,
        KeyError,
        TypeError,
        AssertionError,
        FileNotFoundError,
        SystemExit,
    ) as error:
        said = " ".join(str(error).split())[:300] or "it gives no reason"
        lacks = "tokenizer.model" in said and any(
            word in said for word in ("Missing", "not found")
        )  # SentencePiece families
        fix = "Put the tokenizer.model of the base's repository beside it: newer transformers no longer save it."
        raise ExportError(
            f"llama.cpp can't convert {base} ({type(error).__name__}: {said}).", fix if lacks else FIX
        ) from error


@contextlib.contextmanager
def _reading(convert: Any, checkpoint: Checkpoint, lora: Adapter | None) -> Iterator[None]:
    """Within, the converter reads through `checkpoint`, and sees tensors that took their update."""
    by_place = {(s.file.name, s.offset): n for n, s in checkpoint.stored.items() if isinstance(s, Stored)}
    lazy: Any = sys.modules[convert.ModelBase.__module__].LazyTorchTensor  # type: ignore[attr-defined]
    original = lazy.from_local_tensor

    def load(stored: Stored, name: str) -> torch.Tensor:
        weight = stored.read()
        return lora.apply(name, weight).to(type_of(name)) if lora is not None else weight

    def type_of(name: str) -> torch.dtype:
        return torch.float32 if lora is not None and name in lora.places else checkpoint.stored[name].dtype

    def from_local_tensor(local: Any) -> Any:
        name = by_place.get((Path(local.data_range.filename).name, local.data_range.offset))
        if name is None:  # a part of a pair in MXFP4, which the converter repacks
            return original(local)
        stored = checkpoint.stored[name]
        return lazy(meta=lazy.meta_with_dtype_and_shape(type_of(name), stored.shape), args=(stored, name), func=load)

    lazy.from_local_tensor = from_local_tensor
    try:
        yield
    finally:
        lazy.from_local_tensor = original


def _model(convert: Any, gguf: Any, folder: Path, name: str, file_type: str) -> tuple[Any, list[str]]:
    """(llama.cpp's model, whose writer holds every tensor, lazily and in fp32, and all metadata; what the user should know)."""
    hparams, notes = complete(convert.ModelBase.load_hparams(folder, False))
    architecture = convert.get_model_architecture(hparams, convert.ModelType.TEXT)
    try:
        kind = convert.get_model_class(architecture)
    except NotImplementedError as error:
        raise ExportError(f"llama.cpp's converter does not know the architecture {architecture}.", FIX) from error
    model = kind(folder, gguf.LlamaFileType.ALL_F32, folder / "unused.gguf", model_name=name, hparams=hparams)
    by_hash = model.get_vocab_base_pre

    def by_definition(tokenizer: Any) -> str:
        """llama.cpp knows tokenizers by a hash of what they make of a text; one that was changed, by its rules."""
        try:
            return str(by_hash(tokenizer))
        except NotImplementedError:
            return pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))

    own_vocabulary = model.set_vocab

    def vocabulary() -> None:
        """Of a family with SentencePiece's file, byte-level BPE in its place is written as that.

        Phi-4 is one; the converter knows it by the class that its tokenizer_config.json had before transformers 5 saved it.
        """
        try:
            own_vocabulary()
        except (FileNotFoundError, ValueError) as error:
            if "tokenizer.model" not in str(error) or not byte_level(folder):
                raise
            model._set_vocab_gpt2()

    model.get_vocab_base_pre = by_definition
    model.set_vocab = vocabulary
    model.prepare_tensors()
    model.ftype = gguf.LlamaFileType[file_type]
    model.prepare_metadata(vocab_only=False)
    named = model.gguf_writer.kv_data[0]["general.name"]
    fitting = name_for(named.value, folder)
    if fitting != named.value:
        notes.append(f"llama.cpp takes Phi-3's tokenizer by the model's name, so the file calls it '{fitting}'.")
        named.value = fitting
    for key, value in adds_ends(folder).items():
        model.gguf_writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.BOOL)
    _check_rows(model.gguf_writer)
    return model, notes


def _check_rows(writer: Any) -> None:
    """llama.cpp loads no file whose embedding has more or fewer rows than there are tokens."""
    tokens = len(writer.kv_data[0]["tokenizer.ggml.tokens"].value)
    rows = next((info.shape[0] for shard in writer.tensors for n, info in shard.items() if n == EMBEDDING), tokens)
    if rows != tokens:
        raise ExportError(
            f"The embedding has {rows} rows and the vocabulary {tokens} tokens.",
            "Give the base whose config.json belongs to its weights.",
        )


def _plan(gguf: Any, writer: Any, qtype: str, chosen: Mapping[str, str] | None, important: Importance | None) -> Plan:
    """The type of every tensor; experts that come in MXFP4 keep it."""
    found = {name: info for shard in writer.tensors for name, info in shard.items()}
    stored = {name for name, info in found.items() if info.dtype.name not in PLAIN}
    values = writer.kv_data[0]

    def value(key: str) -> Any:
        entry = values.get(f"{writer.arch}.{key}")
        return entry.value if entry is not None else 0

    heads, kv_heads, layers = value("attention.head_count"), value("attention.head_count_kv"), int(value("block_count"))
    shape = Shape(layers, int(value("expert_count")), writer.arch == "llama" and layers == 80 and heads != kv_heads)
    blocks = {kind.name: gguf.GGML_QUANT_SIZES[kind][0] for kind in gguf.GGMLQuantizationType}
    dims = {name: tuple(info.shape) for name, info in found.items() if name not in stored}
    plan = plan_types(dims, qtype, shape, blocks, chosen, important is not None)
    types = {name: plan.types.get(name, info.dtype.name) for name, info in found.items()}
    for name, kind in types.items():
        lacks = name not in stored and (important is None or name not in important.values)
        if lacks and ggml.requires_imatrix(gguf.GGMLQuantizationType[kind]):
            raise ExportError(f"{kind.lower()} for {name} needs an importance matrix.", "Give imatrix=FILE.")
    return Plan(types, plan.fallbacks)


def _stream(gguf: Any, writer: Any, plan: Plan, important: Importance | None, progress: Progress) -> int:
    """Put a `Streamed` in the place of each tensor of the writer; return the file's bytes, without its header."""
    total = 0
    streams = []
    for shard in writer.tensors:
        for name, info in shard.items():
            kind = gguf.GGMLQuantizationType[plan.types[name]]
            weights = (
                important.values.get(name) if important is not None and may_be_quantised(name, info.shape) else None
            )
            stream = Streamed(gguf, name, info, kind, weights, progress)
            info.tensor, info.dtype, info.nbytes = stream, kind, stream.nbytes
            streams.append(stream)
            total += gguf.GGUFWriter.ggml_pad(stream.nbytes, writer.data_alignment)
    done = 0
    for stream in streams:
        stream.before, stream.total = done, total
        done += stream.nbytes
    if important is not None:
        writer.add_string("quantize.imatrix.file", important.file)
        writer.add_int32("quantize.imatrix.entries_count", len(important.values))
        writer.add_int32("quantize.imatrix.chunks_count", important.chunks)
    return total
