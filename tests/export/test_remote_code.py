"""Models of other architectures take their code with them: a fresh process that knows nothing of this project loads
them, and finds the same logits and the same text; it trains them, and saves them again."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.config import load_run_config
from stlm.export import convert_from, convert_to
from stlm.export.comparison import sample_text
from stlm.export.huggingface.families import obstacles
from stlm.export.remote.files import remote_files
from stlm.stlm import STLM
from stlm.training.run.run_directory import begin_run

pytest.importorskip("transformers", reason="needs transformers: the extra `export`")

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
SHARED = STUDIES / "tying-lora-all-deep-small.yaml"
PROMPTS = ["The file is", "A"]
SMALL = ["model.width=32", "model.context_length=128", "model.core.attention.num_heads=4"]
FRESH = """
import builtins, json, os, sys
builtins.input = None  # nobody is there to be asked
sys.modules["stlm"] = sys.modules["data_pipeline"] = sys.modules["sentencepiece"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
again, prompts, *folders = sys.argv[1:]
prompts, found = json.loads(prompts), []
options = {"max_new_tokens": 64, "do_sample": False}
for folder in folders:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    new = model.generate(ids, **options)[0, ids.size(1):].tolist()
    plain = model.generate(ids, use_cache=False, **options)[0, ids.size(1):].tolist()
    many = model.generate(**batch, **options)[:, batch["input_ids"].size(1):].tolist()
    found.append({
        "new": new, "plain": plain, "many": many, "ids": ids[0].tolist(), "logits": model(ids).logits[0].tolist(),
        "class": type(model).__module__.split(".")[0],
    })
    if again == "none":
        continue
    beams = model.generate(ids, num_beams=3, **options).tolist()
    found[-1]["beams"] = beams == model.generate(ids, num_beams=3, use_cache=False, **options).tolist()
    piped = transformers.pipeline("text-generation", folder, trust_remote_code=True, device="cpu")
    (told,) = piped(prompts[0], max_new_tokens=8, do_sample=False, return_full_text=False)
    found[-1]["piped"] = told["generated_text"]
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * 4
    arguments = transformers.TrainingArguments(
        again + "/training", max_steps=6, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )
    before = model(input_ids=ids, labels=ids).loss.item()
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    after = model(input_ids=ids, labels=ids).loss.item()
    model.save_pretrained(again + "/model"); tokenizer.save_pretrained(again + "/model")
    second = transformers.AutoModelForCausalLM.from_pretrained(again + "/model", trust_remote_code=True)
    found[-1] |= {"before": before, "after": after, "again": torch.equal(second(ids).logits, model(ids).logits)}
print("found " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def tokenizers():
    learned = {kind: train_sentencepiece([sample_text()], 500, kind) for kind in ("sentencepiece", "sentencepiece-bpe")}
    return {"byte": build_tokenizer("byte"), **learned}


def make(tokenizers, config, *overrides):
    """Make a small model of a config's kind, with weights that make its texts varied."""
    config = load_run_config(config, [*SMALL, *overrides])
    model = STLM.from_config(config.model, tokenizers[config.data.tokenizer.partition(":")[0]], seed=3)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model.eval()


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    """Fail where transformers asks whether to run code that it was not told to trust."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail(f"asked: {prompt}"))


def export(models, folder):
    """Convert the models, and return their folders."""
    for name, model in models.items():
        model.save(folder / name / "model")
        converted = convert_to("huggingface", folder / name / "model", folder / name / "out")
        assert converted.difference <= 1e-5, name
    return [str(folder / name / "out") for name in models]


def in_a_fresh_process(folder, folders, again="none"):
    command = [sys.executable, "-c", FRESH, again, json.dumps(PROMPTS), *folders]
    environment = {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    (found,) = (line for line in finished.stdout.splitlines() if line.startswith("found "))
    return json.loads(found.removeprefix("found "))


def check(model, found):
    """Check the logits, and greedy ids with and without a cache, alone and together with a longer text."""
    tokenizer = model.tokenizer
    read = [tokenizer.end_of_text_id, *tokenizer.encode(PROMPTS[0]).tolist()]
    assert found["ids"] == [tokenizer.start_id, *read]
    expected = model(torch.tensor([read])).logits[0]
    torch.testing.assert_close(torch.tensor(found["logits"])[:-1], expected, atol=1e-4, rtol=0)
    assert found["new"] == found["plain"]
    texts = [tokenizer.decode([id for id in ids if id != tokenizer.pad_id]) for ids in (found["new"], *found["many"])]
    told = [model.generate(prompt, max_new_ids=64, temperature=0.0) for prompt in PROMPTS]
    assert texts == [told[0], *told]


def test_patches_and_shared_layers_go_with_their_code(tokenizers, tmp_path):
    models = {
        "patches": make(tokenizers, "10m-byte-patch", "model.core.num_layers=2", "model.embedder.width=16"),
        "shared": make(tokenizers, SHARED, "model.core.num_layers=3"),
    }
    assert all(obstacles(model.config) for model in models.values())
    folders = export(models, tmp_path)
    for model, found in zip(
        models.values(), in_a_fresh_process(tmp_path, folders, str(tmp_path / "again")), strict=True
    ):
        check(model, found)
        assert found["class"] == "transformers_modules"
        assert found["beams"] and found["again"]
        assert found["after"] < found["before"] - 0.1
        assert found["piped"] == model.generate(PROMPTS[0], max_new_ids=8, temperature=0.0)
    card = (tmp_path / "patches" / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "StlmForCausalLM" in card


def test_converting_back_gives_the_same_model(tokenizers, tmp_path):
    """Weights are exactly equal; tied and shared tensors are one tensor again."""
    model = make(tokenizers, SHARED, "model.core.num_layers=3")
    (folder,) = export({"shared": model}, tmp_path)
    convert_from("huggingface", folder, tmp_path / "run", begin_run)
    back = STLM.load(tmp_path / "run")
    assert (back.config, back.tokenizer.fingerprint) == (model.config, model.tokenizer.fingerprint)
    expected, got = dict(model.named_parameters()), dict(back.named_parameters())
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_exported_files_are_self_contained():
    """One folder holds all files; they import only each other and transformers' dependencies."""
    files = remote_files()
    assert {"modeling_stlm.py", "stlm_model_network.py", "stlm_config.py", "data_pipeline_config.py"} <= files.keys()
    known = {"torch", "transformers", "yaml", *sys.stdlib_module_names}
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= known, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in known, name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and f"{node.module}.py" in files, name


PATCHING = "model.embedder.patching"
OTHERS = {
    "space": ("10m-byte-patch", f"{PATCHING}={{kind: space}}"),
    "entropy": ("10m-byte-patch", f"{PATCHING}={{kind: entropy}}"),
    "learned": ("10m-byte-patch", f"{PATCHING}={{kind: learned}}"),
    "paper": ("10m-token", "model.embedder={kind: paper, width: 16, slots: 40}", "model.head={kind: paper}"),
    "experts": ("10m-token", "model.core.feed_forward={kind: moe, num_experts: 4}"),
    "loops": ("10m-byte", "model.core.loops={count: 2, first: 1, last: 2, embeddings: true}"),
    "exits": ("10m-byte", "model.core.exits.every=2", "model.core.attention.window=16"),
    "grams": ("10m-byte", "model.embedder.ngrams={table_size: 64}"),
    "gpt2": ("10m-token", "model.core.positions={kind: learned}", "model.core.norm={kind: layer_norm}"),
    "wide": ("10m-byte", "model.base_width=16"),
}


@pytest.mark.slow
def test_every_family_is_the_same_in_a_fresh_process(tokenizers, tmp_path):
    chosen = {name: (name,) for name in ("10m-token", "10m-byte", "10m-byte-patch", "paper-50m", "quickstart")}
    chosen |= {path.stem: (path,) for path in STUDIES.glob("tying-*-small.yaml")}
    models = {}
    for name, (config, *overrides) in (chosen | OTHERS).items():
        layers = "model.core.num_layers=6"
        models[name] = make(tokenizers, config, layers, *overrides)
    folders = export(models, tmp_path)
    for name, found in zip(models, in_a_fresh_process(tmp_path, folders), strict=True):
        print(name, found["class"])
        check(models[name], found)
