"""The harness with a tiny model and local files gives the project's own numbers, item by item."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_likelihood import tiny_model

from stlm.errors import StlmError
from stlm.evals import LoadedTask

pytestmark = pytest.mark.slow  # importing the harness takes seconds

ROOT = Path(__file__).parents[2]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{rest}
"""
CHOICES = 'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"'
ROLLING = 'doc_to_text: ""\ndoc_to_target: "{{context}}"\nmetric_list: [{metric: bits_per_byte}]'
GENERATE = (
    'doc_to_text: "{{context}}"\ndoc_to_target: "x"\ngeneration_kwargs: {until: ["\\x1c", "z"], max_gen_toks: 12}'
)
TARGET = 'doc_to_text: "{{context}}"\ndoc_to_target: "{{target}}"\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]'
ITEMS = [{"id": str(n), "context": "The zebra that you saw" * (1 + n % 3), "choices": [f"ran {n}", "é", "jumped far"],
          "answer": n % 3} for n in range(6)]  # fmt: skip


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Return the model, the folder of items, and the harness's results on them."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        import lm_eval
        from lm_eval.tasks import TaskManager

        import stlm.evals.lm_eval  # noqa: F401 (registers the model)

        for name, kind, rest in [("choose", "multiple_choice", CHOICES), ("roll", "loglikelihood_rolling", ROLLING),
                                 ("write", "generate_until", GENERATE), ("last", "loglikelihood", TARGET)]:  # fmt: skip
            task = TASK.format(name=name, file=folder / "hellaswag.jsonl", kind=kind, rest=rest)
            (folder / f"{name}.yaml").write_text(task)
        model = tiny_model()
        for number, item in enumerate(ITEMS):  # one of the three targets is the model's own continuation
            said = model.generate(item["context"], temperature=0.0, max_new_ids=2)
            item["target"] = said if number % 3 == 1 else said[0] + "a"
        (folder / "hellaswag.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
        model.save(folder / "model")
        found = lm_eval.simple_evaluate(
            model="stlm", model_args=f"checkpoint={folder / 'model'}", tasks=["choose", "roll", "write", "last"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0,
        )  # fmt: skip
    return model, folder, found


def test_choices_equal_evaluate_py_item_by_item(judged):
    model, folder, found = judged
    scored, values = LoadedTask.read("hellaswag", folder, 0).score(model)
    assert found["results"]["choose"]["acc,none"] == values["accuracy"]["value"]
    theirs = {sample["doc"]["id"]: [answer[0] for answer in sample["filtered_resps"]] for sample in
              found["samples"]["choose"]}  # fmt: skip
    for one in scored:
        assert theirs[one.item.id] == pytest.approx(one.log_probabilities, abs=1e-4)
    assert values["contexts_cut"] == 4, "contexts longer than the model are among them"


def test_the_documented_command_gives_the_same_results(judged, tmp_path):
    """The command of docs/evals.md, offline, writes the same result for each item as evaluate.py."""
    _, folder, _ = judged
    arguments = f"run --model stlm --model_args checkpoint={folder / 'model'} --tasks choose --include_path {folder}"
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stlm.evals.lm_eval", *arguments.split(), "--output_path", tmp_path,
               "--log_samples"]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    (file,) = tmp_path.rglob("samples_choose_*.jsonl")
    theirs = {sample["doc"]["id"]: sample["acc"] for sample in map(json.loads, file.read_text().splitlines())}
    scored, _ = LoadedTask.read("hellaswag", folder, 0).score(judged[0])
    assert theirs == {one.item.id: one.measures.accuracy for one in scored}
    assert f"|{sum(theirs.values()) / len(ITEMS):.4f}|" in finished.stdout


def test_rolling_likelihoods_equal_log_likelihood(judged):
    model, _, found = judged
    texts = [item["context"] for item in ITEMS]
    bits = -sum(map(model.log_likelihood, texts)) / math.log(2)
    assert found["results"]["roll"]["bits_per_byte,none"] == pytest.approx(bits / sum(map(len, texts)), rel=1e-5)


def test_generated_text_ends_at_the_stop_string(judged):
    model, _, found = judged
    told = [sample["resps"][0][0] for sample in found["samples"]["write"]]
    whole = [model.generate(item["context"], temperature=0.0, max_new_ids=12) for item in ITEMS]
    assert told == [text.split("\x1c")[0] for text in whole] != whole


def test_a_target_is_right_if_greedy_decoding_gives_it(judged):
    _, _, found = judged
    right = {sample["doc"]["id"]: sample["acc"] for sample in found["samples"]["last"]}
    assert [bool(right[item["id"]]) for item in ITEMS] == [False, True, False] * 2


def test_unknown_settings_are_refused(judged):
    from stlm.evals.lm_eval import HarnessModel

    _, folder, _ = judged
    with pytest.raises(StlmError, match="got 'dtype'"):
        HarnessModel(str(folder / "model"), dtype="float16")
    with pytest.raises(StlmError, match="precision=half"):
        HarnessModel(str(folder / "model"), precision="half")
    with pytest.raises(StlmError, match="got 'num_beams'"):
        HarnessModel(str(folder / "model"))._generated("a", {"num_beams": 2})
    assert HarnessModel(str(folder / "model"), precision="bf16", batch_size=1)._scored([]) == []
    assert not torch.is_autocast_enabled("cpu")
