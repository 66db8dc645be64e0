"""Scenarios of real models: pinned, licensed, with the memory they need; local folders stand in; too little memory is said."""

import json
import re
from pathlib import Path

import hub_shapes
import pytest
import tiny_llama
from sparkproof import catalog, run
from sparkproof.engines.need import need_memory, needed_gib
from sparkproof.engines.pretrained import is_hub_id, resolve
from sparkproof.errors import UserError
from sparkproof.scenario import Profile, TrainScenario
from sparkproof.session import Settings, rerun_command

ROOT = Path(__file__).parents[2]
CASES = catalog.load(ROOT / "scenarios").cases
HUB = {c.scenario.model: c for c in CASES.values() if c.kind == "train" and is_hub_id(c.scenario.model)}


def test_the_models_a_spark_owner_would_use_are_there():
    assert set(HUB) == set(hub_shapes.SHAPES)


@pytest.mark.parametrize("model", sorted(hub_shapes.SHAPES))
def test_a_hub_scenario_is_pinned_licensed_and_asks_for_the_memory_that_is_predicted(model):
    s = HUB[model].scenario
    assert re.fullmatch(r"[0-9a-f]{40}", s.revision) and s.licence and s.profile is Profile.FULL
    assert s.gated == model.startswith(("meta-llama/", "google/"))
    assert s.requires.gpu and not s.requires.network  # a folder or the hub's cache may stand in
    needed = needed_gib(hub_shapes.config(model), s)
    assert needed <= s.requires.gpu_memory_gib < needed + 1


def test_experts_are_counted_in_16_bits():
    s = HUB["openai/gpt-oss-20b"].scenario
    assert needed_gib(hub_shapes.config("openai/gpt-oss-20b"), s, 0) == pytest.approx(2 * 20.91e9 / 2**30, rel=1e-3)


def test_a_hub_model_without_a_revision_is_refused():
    fields = HUB["Qwen/Qwen3-4B"].scenario.model_dump() | {"revision": ""}
    with pytest.raises(ValueError, match="needs `revision`"):
        TrainScenario.model_validate(fields)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_llama.save(root / "Qwen" / "Qwen3-4B")
    tiny_llama.save(root / "Llama-3.2-1B-Instruct")
    return root


@pytest.mark.parametrize(
    ("model", "under", "found"),
    [
        ("Qwen/Qwen3-4B", "", "Qwen/Qwen3-4B"),
        ("meta-llama/Llama-3.2-1B-Instruct", "", "Llama-3.2-1B-Instruct"),
        ("openai/gpt-oss-20b", "Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"),
    ],
)
def test_a_local_folder_stands_in_for_the_hub(models, tmp_path, model, under, found):
    got = resolve(model, "0" * 40, tmp_path, str(models / under))
    assert (got.path, got.source) == (models / found, "folder")


def test_what_is_not_in_the_folder_comes_from_the_hub(models, tmp_path, monkeypatch):
    monkeypatch.setattr("sparkproof.engines.hub.from_hub", lambda model, revision: (model, revision))
    assert resolve("Qwen/Qwen3-8B", "abc", tmp_path, str(models)) == ("Qwen/Qwen3-8B", "abc")
    with pytest.raises(UserError, match="does not exist"):
        resolve("Qwen/Qwen3-8B", "abc", tmp_path, str(tmp_path / "nowhere"))


def test_the_command_line_hands_the_folder_to_every_training_case(models):
    request = run.Request(names=["train/qwen3/4b*"], model_dir=models)
    _, cases = run.select(request, ROOT / "scenarios", Profile.FULL)
    assert cases and {c.scenario.model_dir for c in cases} == {str(models)}
    settings = Settings.model_construct(overrides=request.overrides())
    assert f"--model-dir {models}" in rerun_command(cases[0].name, settings)


def test_one_model_stands_in_for_one(models):
    request = run.Request(names=["train/qwen3/*"], model_dir=models / "Llama-3.2-1B-Instruct")
    with pytest.raises(UserError, match=r"is one model, and the cases selected train 2: Qwen/Qwen3-4B, Qwen/Qwen3-8B"):
        run.select(request, ROOT / "scenarios", Profile.FULL)
    request.names = ["train/qwen3/8b*"]
    assert run.select(request, ROOT / "scenarios", Profile.FULL)[1]
    with pytest.raises(UserError, match="does not exist"):
        run.select(run.Request(model_dir=models / "nowhere"), ROOT / "scenarios", Profile.SMOKE)


def test_too_little_memory_skips_the_case_with_both_numbers(models):
    s = HUB["Qwen/Qwen3-4B"].scenario
    folder = models / "Qwen" / "Qwen3-4B"
    assert 0 < need_memory(folder, s) < 3
    with pytest.raises(
        UserError, match=r"Qwen/Qwen3-4B needs \d+\.\d GiB of memory by prediction, and 0\.0 GiB are"
    ) as caught:
        need_memory(folder, s, available=0.0)
    assert caught.value.skip_class == "memory"


def test_a_checkpoint_stored_quantised_is_counted_as_it_is_trained(models, tmp_path):
    folder = tiny_llama.save(tmp_path / "stored")
    s = HUB["Qwen/Qwen3-4B"].scenario
    plain = need_memory(folder, s)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    assert need_memory(folder, s) == plain
