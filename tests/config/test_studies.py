"""Study configs load by path; those of weight tying have the sizes stated in the study."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stlm.config import dump_run_config, load_run_config
from stlm.model import CORES, EMBEDDERS, HEADS, Vocabulary, count_parameters

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
# Millions of parameters: stated in the preregistration, and with sharing between all layers that it names.
SIZES = {
    "tying-baseline": (49, 49.37),
    "tying-untied": (76, 75.90),
    "tying-ffn-all-wide": (50, 46.31),
    "tying-ffn-interior1-wide": (49, 46.54),
    "tying-ffn-interior2-wide": (49, 46.56),
    "tying-ffn-all-long": (49, 46.37),
    "tying-lora-all-deep": (50, 47.87),
    "tying-lora-all-wide": (50, 47.05),
    "tying-lora-interior1-wide": (50, 47.35),
    "tying-lora-interior2-deep": (50, 47.67),
    "tying-attention-output-long": (50, 50.21),
}


def model_of(config):
    """Build embedder, core and head of a config on the meta device."""
    vocabulary = Vocabulary((b"",) * int(config.data.tokenizer.removeprefix("sentencepiece:")))
    model = config.model
    with torch.device("meta"):
        embedder = EMBEDDERS[model.embedder.kind](model.embedder, model, vocabulary)
        head = HEADS[model.head.kind](model.head, model, vocabulary)
        core = CORES[model.core.kind](model.core, model)
    if model.head.tied:
        head.tie(embedder)
    return nn.ModuleList([embedder, core, head])


def load(name):
    return load_run_config(STUDIES / f"{name}.yaml")


def test_every_config_has_a_twin_and_its_line_on_the_page(tmp_path):
    """A run needs no file but its own: its saved config loads equal in a folder without the bases."""
    names = {path.stem for path in STUDIES.glob("*.yaml")}
    assert names == set(SIZES) | {f"{name}-small" for name in SIZES}
    page = (STUDIES / "README.md").read_text(encoding="utf-8")
    others = {path.stem for path in (STUDIES / "architectures").glob("*.yaml")}
    assert set(SIZES) | others == {name for name in set(SIZES) | others if f"| `{name}` |" in page}
    for path in STUDIES.rglob("*.yaml"):
        config = load_run_config(path)
        (tmp_path / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
        assert load_run_config(tmp_path) == config


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_study(name):
    """The preregistration counts one shared feed-forward more, and corrections for one layer fewer."""
    stated, size = SIZES[name]
    config = load(name)
    parameters = count_parameters(model_of(config))
    assert parameters / 1e6 == pytest.approx(size, abs=0.005)
    sharing, width = config.model.core.sharing, config.model.width
    hidden_width, rank = config.model.core.feed_forward.hidden_width, sharing.lora_rank or 0
    if "feed_forward" in sharing.groups(config.model.core.num_layers):
        parameters += 3 * width * hidden_width - 3 * rank * (width + hidden_width)
    assert parameters / 1e6 == pytest.approx(stated, abs=0.5)  # the page rounds it to millions


@pytest.mark.parametrize("name", SIZES)
def test_twins_differ_only_in_size(name):
    large, small = load(name), load(f"{name}-small")
    assert small.model.core.sharing.modules == large.model.core.sharing.modules
    assert small.model.core.num_layers == large.model.core.num_layers
    assert small.model.head == large.model.head
    parameters = count_parameters(model_of(small))
    baseline = load("tying-baseline-small")
    expected = count_parameters(model_of(baseline)) + (8192 * baseline.model.width if name == "tying-untied" else 0)
    assert parameters == pytest.approx(expected, rel=0.01)
