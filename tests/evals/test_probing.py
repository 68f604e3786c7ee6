"""Probing: the protocol with known methods, and each method on labels that can be read off the text."""

import json
import random

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.tokenizers import build_tokenizer
from stlm.config import GroupedQueryConfig, LoRAConfig, ModelConfig, TransformerCoreConfig
from stlm.errors import StlmError
from stlm.evals import METHODS, ProbeOptions, load_glue, probe, probe_markdown, probe_text
from stlm.evals.probing.fine_tuning import Classifier, FineTuning, shuffled_batches
from stlm.evals.probing.glue import GLUE_TASKS, Example, GlueData, labels_of
from stlm.evals.probing.linear_probe import STRENGTHS, LinearProbe, pair_features
from stlm.evals.probing.protocol import MethodResult, inner_split, mean_score
from stlm.stlm import STLM

MODEL = ModelConfig(
    context_length=32,
    width=32,
    core=TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2)),
)
WORDS = {0: ("bad", "awful", "dull"), 1: ("good", "great", "fine")}


@pytest.fixture
def model():
    return STLM.from_config(MODEL, build_tokenizer("byte"), seed=1)


def examples(number, seed, part="train"):
    """Return sentences with a good or a bad word; a tenth of the labels are wrong."""
    rng, found = random.Random(seed), []
    for place in range(number):
        label = rng.randrange(2)
        text = f"{rng.choice('abc')}{place} is {rng.choice(WORDS[label])}"
        found.append(Example(f"{part}-{place}", (text,), 1 - label if rng.random() < 0.1 else label))
    return found


def data(num_train=120, num_dev=60, name="sst2"):
    return GlueData(name, GLUE_TASKS[name], examples(num_train, 1), examples(num_dev, 2, "dev"), {})


class Told:
    """A method that returns given predictions, seed by seed."""

    def __init__(self, *predictions):
        self.predictions, self.trained_on = predictions, []

    def __call__(self, task, train, dev, seed):
        self.trained_on.append(train)
        return MethodResult(np.array(self.predictions[seed], float), {"validation": 0.5})

    def is_cut(self, texts):
        return len(texts[0]) > 9


def of_labels(name, train, dev):
    parts = ([Example(f"{part}{n}", (f"text {n}",), label) for n, label in enumerate(labels)]
             for part, labels in (("train", train), ("dev", dev)))  # fmt: skip
    return GlueData(name, GLUE_TASKS[name], *parts, {})


# --- the protocol


def test_means_spread_and_majority_by_hand(monkeypatch):
    monkeypatch.setattr("stlm.evals.measures._RESAMPLES", 10)  # without their intervals
    task = of_labels("mrpc", [1] * 6 + [0] * 5, [1, 1, 0, 0])
    found = probe(task, Told([1, 1, 0, 0], [1, 0, 0, 0]), ProbeOptions(seeds=2))["measures"]
    assert found["accuracy"]["seeds"] == [1, 3 / 4] and found["accuracy"]["value"] == 7 / 8
    assert found["accuracy"]["std"] == pytest.approx((2 * (1 / 8) ** 2) ** 0.5)  # sample variance: divided by 2 - 1
    assert found["f1"]["seeds"] == pytest.approx([1, 2 / 3])
    assert (found["accuracy"]["majority"], found["f1"]["majority"]) == (1 / 2, pytest.approx(2 / 3))
    assert probe(task, Told([1, 1, 0, 0]), ProbeOptions(seeds=1))["measures"]["accuracy"]["std"] is None


def test_constant_answers_have_a_correlation_of_zero(monkeypatch):
    monkeypatch.setattr("stlm.evals.measures._RESAMPLES", 10)  # without their intervals
    cola = probe(of_labels("cola", [1] * 5 + [0] * 5, [1, 0]), Told([1, 1]), ProbeOptions(1))["measures"]["matthews"]
    assert cola["value"] == cola["majority"] == 0
    scores = of_labels("stsb", [0.5, 1, 2.5, 4, 5], [1, 3, 2])
    found = probe(scores, Told([1.5, 3.5, 2]), ProbeOptions(1))["measures"]
    assert found["spearman"]["value"] == pytest.approx(1) and found["pearson"]["majority"] == 0


def test_the_interval_is_over_dev():
    truth = [0, 1] * 200
    wrong = [1 - label if place < 100 else label for place, label in enumerate(truth)]
    found = probe(of_labels("rte", truth, truth), Told(wrong), ProbeOptions(1))["measures"]["accuracy"]
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)


def test_smaller_training_sets_are_drawn_by_seed_and_reported():
    task, method = data(), Told(*[[0] * 60] * 2)
    values = probe(task, method, ProbeOptions(2, 40))
    assert (values["train_examples"], values["train_available"], values["dev_examples"]) == (40, 120, 60)
    first, second = method.trained_on
    assert len(first) == len(second) == 40 and first != second and set(first) < set(task.train)
    assert len({draw["train_sha256"] for draw in values["draws"]}) == 2
    assert values["draws"][0]["train_cut"] == sum(len(one.texts[0]) > 9 for one in first)
    assert "40 of 120" in probe_text({"sst2": values})
    assert len(probe(task, method, ProbeOptions(1, 1000))["draws"]) == 1 and method.trained_on[-1] == task.train


def test_too_few_examples_are_refused():
    with pytest.raises(StlmError, match=r"of 14 training examples, 4 have label 1; expected two labels"):
        probe(of_labels("rte", [0] * 10 + [1] * 4, [0]), Told([0]), ProbeOptions(1))
    with pytest.raises(StlmError, match=r"glue_sst2\.train: of 3 training examples.*raise --max-train-examples"):
        probe(data(), Told([0]), ProbeOptions(1, 3))
    with pytest.raises(StlmError, match="4 have a score; expected"):
        probe(of_labels("stsb", [0, 1, 2, 3], [0]), Told([0]), ProbeOptions(1))
    for options, message in [((0,), "--seeds: got 0"), ((1, 0), "--max-train-examples: got 0")]:
        with pytest.raises(StlmError, match=message):
            ProbeOptions(*options)


def test_the_inner_split_parts_train_by_class():
    train = [Example(str(n), (f"text {n}",), n % 4 == 0) for n in range(100)]
    learned, held_back = inner_split(GLUE_TASKS["sst2"], train, 0)
    assert sorted(learned + held_back) == sorted(train) and len(held_back) == 20
    assert labels_of(held_back).sum() == 5
    assert inner_split(GLUE_TASKS["sst2"], train, 0) == (learned, held_back)
    assert inner_split(GLUE_TASKS["sst2"], train, 1) != (learned, held_back)


class Leaking(LinearProbe):
    """Chooses its settings by the labels of dev."""

    def __init__(self, model, dev):
        super().__init__(model)
        self.dev = dev

    def __call__(self, task, train, dev, seed):
        features, truth = self._features(dev), labels_of(self.dev)
        by_strength = {one: self._fit(task, train, one).predict(features) for one in STRENGTHS}
        best = max(STRENGTHS, key=lambda one: mean_score(task, truth, by_strength[one]))
        return MethodResult(by_strength[best], {"strength": best})


def require_blindness(method_for):
    """Check that the labels of dev do not change the choice."""
    task, chosen = data(), []
    for seed in range(4):
        labels = labels_of(task.dev)
        if seed:
            labels = np.random.default_rng(seed).permutation(labels)
        dev = [one._replace(label=int(label)) for one, label in zip(task.dev, labels, strict=True)]
        other = GlueData(task.name, task.task, task.train, dev, {})
        chosen.append(probe(other, method_for(dev), ProbeOptions(1))["draws"])
    assert all(one == chosen[0] for one in chosen)


def test_nothing_is_chosen_by_dev(model):
    require_blindness(lambda dev: LinearProbe(model))
    require_blindness(lambda dev: FineTuning(model, (1e-3, 1e-2), epochs=2))
    with pytest.raises(AssertionError):
        require_blindness(lambda dev: Leaking(model, dev))


# --- the methods


def methods(model):
    return {
        "linear": LinearProbe(model),
        "finetune": FineTuning(model, (3e-3, 1e-2), epochs=8),
        "lora": FineTuning(model, (1e-2, 3e-2), lora_rank=4, epochs=8),
    }


@pytest.mark.parametrize("name", METHODS)
def test_separable_labels_are_learned_reproducibly_without_changing_the_model(model, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = data(240, 100)
    values = probe(task, methods(model)[name], ProbeOptions(2))
    found = values["measures"]["accuracy"]
    assert found["value"] > 0.8 > found["majority"] + 0.2  # nine tenths of the labels are right
    assert probe(task, methods(model)[name], ProbeOptions(2)) == values
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    page = probe_markdown({"method": name}, {"sst2": values})
    assert f"| sst2 | 240 | 100 | accuracy | {100 * found['value']:.1f} |" in page and values["dev_sha256"] in page


@pytest.mark.parametrize("name", METHODS)
def test_pairs_and_scores_can_be_learned(model, name):
    def pairs(number, seed):
        rng = random.Random(seed)
        grades = [rng.randrange(6) for _ in range(number)]
        texts = [(f"{rng.choice('xyz')} so", "!" * grade + "?" * (5 - grade)) for grade in grades]
        return [Example(str(n), *of) for n, of in enumerate(zip(texts, map(float, grades), strict=True))]

    task = GlueData("stsb", GLUE_TASKS["stsb"], pairs(120, 1), pairs(40, 2), {})
    values = probe(task, methods(model)[name], ProbeOptions(1))
    assert values["measures"]["pearson"]["value"] > 0.8 and values["measures"]["spearman"]["value"] > 0.8


def test_features_of_pairs_by_hand():
    u, v = np.array([[1.0, 2.0]], np.float32), np.array([[3.0, -1.0]], np.float32)
    assert pair_features([u, v]).tolist() == [[1, 2, 3, -1, 2, 3, 3, -2]]
    assert pair_features([u]) is u


def trained(model, **options):
    """Return the names of the parameters that training changes."""
    task, train = GLUE_TASKS["sst2"], examples(64, 1)
    method = FineTuning(model, epochs=1, **options)
    classifier = method._classifier(task, train, seed=0)
    before = {name: parameter.clone() for name, parameter in classifier.named_parameters()}
    assert list(method._learn(classifier, train, 1e-2, seed=0)) == [1]
    return {name for name, parameter in classifier.named_parameters() if not torch.equal(parameter, before[name])}


def test_all_weights_learn_or_corrections_and_the_head_alone(model):
    whole, low_rank = trained(model), trained(model, lora_rank=2)
    assert {f"model.{name}" for name, _ in model.named_parameters()} - whole == set()
    head = {"head.weight", "head.bias"}
    assert head < low_rank and all(".lora." in name for name in low_rank - head)
    assert len(low_rank) > 10


def test_a_corrected_model_is_merged_first(model):
    corrected = STLM.from_config(ModelConfig(**{**vars(MODEL), "lora": LoRAConfig(3)}), model.tokenizer)
    with torch.no_grad():
        for name, parameter in corrected.named_parameters():
            if ".lora.b." in name:
                parameter.normal_()
    classifier = FineTuning(corrected)._classifier(GLUE_TASKS["sst2"], examples(20, 1), seed=0)
    np.testing.assert_allclose(classifier.model.embed(["a text"]), corrected.embed(["a text"]), atol=1e-4)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_the_weights_of_the_best_epoch_are_used(model):
    """The chosen weights reach the best score on held-back examples; at this learning rate the last are worse."""
    task, train, rate = GLUE_TASKS["sst2"], examples(60, 4), 0.1
    learned, held_back = inner_split(task, train, seed=0)
    texts, truth = [one.texts for one in held_back], labels_of(held_back)
    method = FineTuning(model, (rate,), epochs=6)
    classifier = method._classifier(task, learned, 0)
    scores = [mean_score(task, truth, classifier.predict(texts)) for _ in method._learn(classifier, learned, rate, 0)]
    assert scores[-1] < max(scores)
    found = method(task, train, texts, 0)
    assert mean_score(task, truth, found.predicted_N) == found.chosen["validation"] == max(scores)
    assert found.chosen["epochs"] == 1 + scores.index(max(scores))


def test_pairs_that_do_not_fit_lose_the_end_of_the_longer_text(model):
    classifier = Classifier(model, GLUE_TASKS["rte"], np.zeros(1))
    assert model.longest_text == 31

    def read(*texts):
        return model.tokenizer.decode(classifier.encode(texts).tolist())

    for first, second, expected in [
        (10, 20, "a" * 10 + "\n" + "b" * 20),
        (40, 6, "a" * 24 + "\n" + "b" * 6),
        (6, 40, "a" * 6 + "\n" + "b" * 24),
        (40, 40, "a" * 15 + "\n" + "b" * 15),
    ]:
        assert read("a" * first, "b" * second) == expected
        assert FineTuning(model).is_cut(("a" * first, "b" * second)) == (first + second > 30)
    assert read("a" * 40) == "a" * 31
    linear = LinearProbe(model)
    assert [linear.is_cut(("a" * n, "b")) for n in (31, 32)] == [False, True]


def test_batches_cover_each_example_once_per_epoch_with_similar_lengths():
    lengths = [n % 50 for n in range(1000)]
    batches = shuffled_batches(lengths, np.random.default_rng(0))
    assert sorted(place for batch in batches for place in batch) == list(range(1000))
    assert np.mean([np.ptp([lengths[place] for place in batch]) for batch in batches]) < 15
    assert batches != shuffled_batches(lengths, np.random.default_rng(1))


def test_a_learning_rate_that_diverges_is_left_out(model):
    with torch.no_grad():
        model.core.norm.weight.fill_(float("inf"))
    with pytest.raises(StlmError, match="infinite at each learning rate"):
        FineTuning(model, (1e-3,), epochs=1)(GLUE_TASKS["sst2"], examples(40, 1), [("a",)], 0)


# --- the files


def write(folder, name, *records):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cola", {"label": 2}, "glue_cola.dev.jsonl:2: label: got 2, expected 0 or 1"),
        ("cola", {"label": True}, "label: got True, expected 0 or 1"),
        ("cola", {"label": "1"}, "label: got '1', expected 0 or 1"),
        ("mnli", {"label": 3}, "label: got 3, expected 0, 1 or 2"),
        ("stsb", {"label": 5.5}, "label: got 5.5, expected a number from 0 to 5"),
        ("cola", {"sentence": " "}, "glue_cola.dev.jsonl:2: sentence: expected a text that is not empty"),
        ("rte", {"sentence2": ""}, "sentence2: expected a text that is not empty"),
        ("cola", {"id": "0"}, "id: got '0' again"),
    ],
)
def test_schema_violations_are_named(tmp_path, name, change, message):
    texts = {"sentence": "a"} if name == "cola" else {"sentence1": "a", "sentence2": "b"}
    lines = [{"id": str(label), **texts, "label": label} for label in (0, 1)]
    write(tmp_path, f"glue_{name}.train.jsonl", *lines)
    write(tmp_path, f"glue_{name}.dev.jsonl", *lines)
    (loaded,) = load_glue(f"glue_{name}", tmp_path)
    assert [one.label for one in loaded.dev] == [0, 1] and loaded.overlap == 2
    write(tmp_path, f"glue_{name}.dev.jsonl", lines[0], {**lines[1], **change})
    with pytest.raises(DataError) as error:
        load_glue(name, tmp_path)
    assert message in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(StlmError, match=r"'colla' \(nearest: cola\)"):
        load_glue("colla", tmp_path)
    line = {"id": "0", "sentence": "a", "label": 1}
    write(tmp_path, "glue_cola.train.jsonl", line)
    with pytest.raises(DataError, match=r"glue_cola\.dev: no items; put them into .*/glue_cola\.dev\.jsonl"):
        load_glue("cola", tmp_path)
    write(tmp_path, "glue_cola.dev.jsonl", line)
    with pytest.raises(DataError, match=r"glue_cola\.train: every label is 1; expected two labels or more"):
        load_glue("cola", tmp_path)


def test_examples_come_from_the_hub_too(monkeypatch):
    from datasets import Dataset

    asked = []

    def load(repository, name, split):
        asked.append((repository, name, split))
        fields = {"premise": "a", "hypothesis": "b"}
        return Dataset.from_list([{**fields, "label": label, "idx": label} for label in (0, 1, 2)])

    monkeypatch.setattr("datasets.load_dataset", load)
    (found,) = load_glue("mnli", None, hub=True)
    assert asked == [("nyu-mll/glue", "mnli", split) for split in ("train", "validation_matched")]
    assert found.dev[2] == Example("2", ("a", "b"), 2)
