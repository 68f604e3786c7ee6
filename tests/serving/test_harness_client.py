"""lm-evaluation-harness as a client of the server: `local-completions` gives the numbers of the project's own tasks."""

import json

import pytest
import torch
from test_edges import serving

from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.config import ModelConfig, from_dict
from stlm.evals import LoadedTask
from stlm.export import convert_to
from stlm.stlm import STLM

pytestmark = pytest.mark.slow  # importing the harness takes seconds

TASK = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
"""
ITEMS = [{"id": str(n), "context": "The zebra that you saw" * (1 + n % 2), "choices": [f"ran {n}", "é", "jumped far"],
          "answer": n % 3} for n in range(6)]  # fmt: skip


@pytest.mark.parametrize(("tokenizer", "batch_size"), [("byte", 1), ("sentencepiece", 4)])
def test_local_completions_scores_a_served_model_as_evaluate_does(tmp_path, monkeypatch, tokenizer, batch_size):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    import lm_eval.models  # the harness finds its own models by name only once they are imported
    from lm_eval.tasks import TaskManager

    text = " ".join(f"The zebra {n} that you saw ran far, jumped é {n * 7}." for n in range(200))
    trained = build_tokenizer("byte") if tokenizer == "byte" else train_sentencepiece([text], 295)
    config = {"context_length": 64, "width": 32, "core": {"num_layers": 2, "attention": {"num_heads": 2}},
              "embedder": {"kind": "token"}}  # fmt: skip
    model = STLM.from_config(from_dict(ModelConfig, config), trained, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= (
                3 if parameter.ndim > 1 else 1
            )  # an untrained model would find all choices about equally likely
    model.save(tmp_path / "model")
    exported = convert_to("huggingface", tmp_path / "model", tmp_path / "exported").output
    (tmp_path / "choose.yaml").write_text(TASK.format(file=tmp_path / "hellaswag.jsonl"))
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    with serving(model) as (url, _):
        found = lm_eval.simple_evaluate(
            model="local-completions", tasks=["choose"], bootstrap_iters=0, batch_size=batch_size,
            model_args=f"base_url={url}/v1/completions,model=tiny,tokenizer={exported},max_length=64",
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
    scored, values = LoadedTask.read("hellaswag", tmp_path, 0).score(model)
    samples = {sample["doc"]["id"]: sample["filtered_resps"] for sample in found["samples"]["choose"]}
    for one in scored:
        theirs = [answer[0] for answer in samples[one.item.id]]
        assert theirs == pytest.approx(one.log_probabilities, abs=1e-4)
    assert found["results"]["choose"]["acc,none"] == values["accuracy"]["value"]
