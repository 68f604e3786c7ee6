"""Runs initialised from another model: whole, in part, frozen, or with LoRA corrections, which are merged again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_run import CONFIG, ROOT, build_trainer, read_metrics, train

from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.window_plans import write_plan
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.tokenizers import build_tokenizer
from stlm.config import load_run_config
from stlm.errors import ConfigError
from stlm.export import convert_to
from stlm.stlm import STLM

LORA = "model.lora={rank: 2, alpha: 3}"


@pytest.fixture(scope="module")
def base(config_file, data_dir, tmp_path_factory):
    """Make a finished run of twelve steps."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    train(build_trainer(config_file, data_dir, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def corrected(base, config_file, data_dir, tmp_path_factory):
    """Continue that run with twelve more steps of LoRA."""
    run_dir = tmp_path_factory.mktemp("corrected") / "run"
    train(build_trainer(config_file, data_dir, run_dir, f"training.init_from={base}", LORA))
    return run_dir


def logits(model):
    ids_BT = torch.arange(96).view(3, 32)
    with torch.no_grad():
        return model.eval()(ids_BT).logits


def changed(model, other):
    """Return the parts whose parameters differ."""
    there = dict(other.named_parameters())
    return {name.partition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, there[name])}


def test_a_run_begins_with_the_weights_of_another(base, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", f"training.init_from={base}")
    assert torch.equal(logits(trainer.model), logits(STLM.load(base)))
    nats, _, num_bytes = trainer.validate()
    last = read_metrics(base, "validation")[-1]
    assert nats / num_bytes / 0.6931471805599453 == pytest.approx(last["bits_per_byte"], abs=1e-9)
    train(trainer)
    assert changed(trainer.model, STLM.load(base)) == {"embedder", "core"}  # the head is tied to the embedder
    # A resumed run does not read the other run again.
    continued = make_trainer(tmp_path / "run", "training.init_from=nowhere", "training.max_steps=13")
    assert torch.equal(logits(continued.model), logits(trainer.model))


def test_parts_are_taken_over_and_frozen(base, make_trainer, tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        f"training.init_from={base}",
        "training.init_parts=core",
        "training.frozen_parts=core",
        "seed=7",
    )
    given = STLM.load(base)
    assert changed(trainer.model, given) == {"embedder"}
    begun = trainer.model.embedder.table.weight.clone()
    train(trainer)
    assert changed(trainer.model, given) == {"embedder"}
    assert not torch.equal(trainer.model.embedder.table.weight, begun)


@pytest.mark.parametrize("stage", [0, 3])
def test_only_corrections_learn_and_a_run_of_them_resumes(base, corrected, make_trainer, tmp_path, stage):
    model, given = STLM.load(corrected), dict(STLM.load(base).named_parameters())
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in given.items())
    added = {name: p for name, p in parameters.items() if name not in given}
    assert (
        sum(p.numel() for p in added.values())
        == 2
        * 2
        * sum(
            module.in_features + module.out_features
            for name, module in model.core.named_modules()
            if name.endswith(("query", "key", "value", "output", "gate", "up", "down"))
        )
        // 2
    )
    assert all(p.abs().sum() > 0 for p in added.values())

    stopped = tmp_path / "run"
    shutil.copytree(corrected, stopped)
    shutil.rmtree(stopped / "checkpoints/step_00000012")
    train(make_trainer(stopped, f"training.init_from={base}", LORA, stage=stage))
    found, expected = ([record["loss"] for record in read_metrics(run)] for run in (stopped, corrected))
    assert found == expected if stage == 0 else found == pytest.approx(expected, abs=1e-6)


def test_corrections_begin_at_zero_and_are_merged(base, corrected, make_trainer, tmp_path):
    begun = make_trainer(tmp_path / "run", f"training.init_from={base}", LORA)
    torch.testing.assert_close(logits(begun.model), logits(STLM.load(base)), atol=0, rtol=0)

    model = STLM.load(corrected)
    merged = model.merged()
    assert (logits(model) - logits(STLM.load(base))).abs().max() > 1e-3  # there is something to merge
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-6, rtol=0)
    assert merged.config == STLM.load(base).config
    assert merged.num_parameters() == STLM.load(base).num_parameters()
    assert all(parameter.requires_grad for parameter in merged.parameters())

    convert_to("safetensors", corrected, tmp_path / "exported")
    exported = STLM.load(tmp_path / "exported")
    assert torch.equal(logits(exported), logits(merged))
    assert json.loads((tmp_path / "exported/config.json").read_text())["model"]["lora"]["rank"] is None

    trainer = make_trainer(tmp_path / "next", f"training.init_from={corrected}")  # without corrections
    assert torch.equal(logits(trainer.model), logits(merged))


def test_layers_that_share_a_matrix_share_its_correction(tmp_path):
    (tmp_path / "shared.yaml").write_text(
        CONFIG.replace("num_layers: 2,", "num_layers: 3, sharing: {modules: {feed_forward: all}},")
    )
    config = load_run_config(tmp_path / "shared.yaml", [LORA]).model

    model = STLM.from_config(config, build_tokenizer("byte"), seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b.weight"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    assert sum("feed_forward.up.lora" in name for name, _ in model.named_parameters()) == 2
    torch.testing.assert_close(logits(model.merged()), logits(model), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.core.num_layers=3"], r"init_from: the core of .* model\.core\.num_layers = 2 there, 3 here; --config"),
        (["model.width=64"], r"the embedder of .* model\.width = 32 there, 64 here"),
        (["training.init_parts=core,tail"], r"init_parts: got 'core,tail', expected some of embedder,core,head"),
        (["training.frozen_parts=core,embedder,head"], r"frozen_parts: got .* expected one or two of"),
        (["model.lora.alpha=3"], r"lora\.alpha: got 3, which has no effect without model\.lora\.rank"),
        (["model.lora.rank=2", "training.init_parts=embedder"], r"lora\.rank: got 2 with init_parts = embedder, "),
        (["training.frozen_parts=core,head"], r"nothing would learn: the head is tied to embedder\.table\.weight"),
        (["training.frozen_parts=core", "model.lora.rank=2"], r"nothing would learn: corrections .* in the core alone"),
        (["model.lora={rank: 2, targets: quary}"], r"lora\.targets: the core has no matrix in 'quary', expected some"),
        (["model.lora.targets=query"], r"lora\.targets: got 'query', which has no effect without model\.lora\.rank"),
        (["training.frozen_parts=core.stack.blocks.7"], r"the model has no 'core\.stack\.blocks\.7'; nearest: core"),
        (["model.lora.rank=33"], r"lora\.rank: got 33, expected at most model\.width = 32"),
    ],
)
def test_models_that_do_not_fit_are_refused(base, make_trainer, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "run", f"training.init_from={base}", *overrides)
    assert not (tmp_path / "run").exists()


def test_corrections_need_weights_to_correct(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.rank: got 2 with no training.init_from, so that corrections"):
        make_trainer(tmp_path / "run", LORA)
    assert not (tmp_path / "run").exists()


def test_layers_are_frozen_and_corrected_by_name(base, make_trainer, tmp_path):
    frozen = make_trainer(tmp_path / "a", f"training.init_from={base}", "training.frozen_parts=core.stack.blocks.0")
    learning = {name for name, p in frozen.model.named_parameters() if p.requires_grad}
    assert learning and not any(name.startswith("core.stack.blocks.0.") for name in learning)
    chosen = "model.lora={rank: 2, targets: 'query,stack.blocks.1.feed_forward'}"
    corrected = make_trainer(tmp_path / "b", f"training.init_from={base}", chosen)
    learning = {name.split(".lora.")[0] for name, p in corrected.model.named_parameters() if p.requires_grad}
    queries = {f"core.stack.blocks.{layer}.attention.query" for layer in (0, 1)}
    assert queries < learning and all("blocks.1.feed_forward." in name for name in learning - queries)
    assert len(learning) > 3


def test_parts_frozen_by_a_tie_are_reported(base, make_trainer, tmp_path, capsys):
    make_trainer(tmp_path / "run", f"training.init_from={base}", "training.frozen_parts=head")
    told = capsys.readouterr().out
    assert " parameters learn; training.frozen_parts=head: the head is tied to embedder.table.weight, which is" in told


@pytest.mark.slow
def test_the_other_run_provides_the_settings(base, tmp_path, data_dir):
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), "--data", str(data_dir)]
    options = ["--set", f"training.init_from={base}", "training.max_steps=3"]
    refused = subprocess.run([*command, *options], capture_output=True, text=True)
    assert refused.returncode == 2 and "--run: expected a directory" in refused.stderr
    done = subprocess.run([*command, "--run", str(tmp_path / "run"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"all weights begin as those of {base}" in done.stdout + done.stderr
    assert load_run_config(tmp_path / "run").model == load_run_config(base).model


def test_a_model_learns_answers_from_packed_conversations(base, config_file, tmp_path):
    answer = {"role": "assistant", "content": "yes"}
    lines = [{"messages": [{"role": "user", "content": f"{n}?"}, answer]} for n in range(99)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = PrepareConfig((f"{tmp_path}/c.jsonl",), output=f"{tmp_path}/data", conversations=True, workers=1,
                           validation_fraction=0.1, tokenizer_from=str(base))  # fmt: skip
    prepare(config)
    write_plan(PreparedData.open(config.directory), "best_fit", 32)
    settings = (
        f"training.init_from={base}",
        "data.packing=best_fit",
        "training.learning_rate=1e-2",
        "training.max_steps=30",
    )
    trainer = build_trainer(config_file, config.directory, tmp_path / "run", *settings)
    _, ids, num_bytes = trainer.validate()
    documents = trainer.validation_loader.windows(0, trainer.validation_loader.num_windows)
    answers = bytes(documents.ids[documents.loss_mask].astype("uint8"))
    assert answers == b"yes\x03\xff" * answers.count(b"yes") and ids == len(answers) and num_bytes == ids * 4 / 5
    losses = train(trainer)
    assert losses[-1] < losses[0] / 2
