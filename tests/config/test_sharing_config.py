"""Share maps and loops: their expansion, and the exact messages for maps that do not fit."""

import pytest

from stlm.config import LoopsConfig, SharingConfig, changed_keys, dump_run_config, load_run_config
from stlm.config.model.core.sharing import groups_of
from stlm.config.yaml.fields import FreeSection
from stlm.errors import ConfigError

CORE = "model:\n  core:\n    num_layers: 6\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the overrides on top of a core of six layers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CORE)
    return lambda *overrides: load_run_config("run.yaml", [f"model.core.{override}" for override in overrides])


def test_both_bounds_of_the_interior_are_alike():
    assert groups_of("all", 6) == ((0, 1, 2, 3, 4, 5),)
    assert groups_of("interior:1", 6) == ((1, 2, 3, 4),)
    assert groups_of("interior:2", 6) == ((2, 3),)
    assert groups_of(((0, 5), (1, 2)), 6) == ((0, 5), (1, 2))


def test_the_order_of_loops():
    assert [layer for layer, _ in LoopsConfig().order(3)] == [0, 1, 2]
    loops = LoopsConfig(count=3, first=1, last=2)
    assert [layer for layer, _ in loops.order(4)] == [0, 1, 2, 1, 2, 1, 2, 3]
    assert [number for _, number in loops.order(4)] == [None, 0, None, 1, None, 2, None, None]
    assert [layer for layer, _ in LoopsConfig(count=2).order(3)] == [0, 1, 2, 0, 1, 2]


def test_sections_and_dotted_names_are_the_same(load, tmp_path):
    """An override replaces a key in either spelling; a dumped config loads back equal."""
    (tmp_path / "run.yaml").write_text(
        CORE + "    sharing:\n      modules: {attention.output: all, attention: {key: all}}\n"
    )
    modules = load("sharing.modules.attention.output=[[0, 1]]").model.core.sharing.modules
    assert modules == FreeSection.of({"attention.output": [[0, 1]], "attention.key": "all"})
    config = load()
    (tmp_path / "run.yaml").write_text(dump_run_config(config))
    assert load() == config
    changed = load("sharing.modules.attention.output=[[0, 1]]", "sharing.modules.feed_forward=all", "loops.count=2")
    assert changed_keys(config, changed) == ["model.core.sharing.modules", "model.core.loops.count"]
    assert changed.model.core.sharing.groups(6)["attention.output"] == ((0, 1),)


FORMS = "expected all, interior:K (all but K layers at either end), or groups of layers such as [[0, 1], [2, 3]]"
NO_MATRIX = (
    "got 4 where no matrix is shared, expected null, or a module that layers share; "
    "model.core.sharing.modules.feed_forward=all would work"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sharing.modules.feed_foward=all"],
            "no module of a block has this name; nearest: feed_forward, feed_forward.up, feed_forward_norm",
        ),
        (["sharing.modules.feed_forward=interior:0"], f"got 'interior:0', {FORMS}"),
        (
            ["sharing.modules.feed_forward=interior:3"],
            "got 'interior:3', which leaves 0 of 6 layers, expected at least 2 that share; interior:2 would work",
        ),
        (
            ["num_layers=3", "sharing.modules.feed_forward=interior:1"],
            "got 'interior:1', which leaves 1 of 3 layers, expected at least 2 that share; all would work",
        ),
        (
            ["num_layers=1", "sharing.modules.feed_forward=all"],
            "got 'all' in a core of one layer, expected at least 2; model.core.num_layers=2 would work",
        ),
        (["sharing.modules.attention=[0, 1]"], f"got a list that holds no groups, {FORMS}"),
        (
            ["sharing.modules.attention=[[0, 1], [1, 2]]"],
            "got the layer 1 twice, expected groups that do not overlap",
        ),
        (
            ["sharing.modules.attention=[[5, 6]]"],
            "got the layer 6, expected layers from 0 to 5 as model.core.num_layers = 6",
        ),
        (
            ["sharing.modules.attention=[[true, 0]]"],
            "got the layer True, expected layers from 0 to 5 as model.core.num_layers = 6",
        ),
        (
            ["sharing.modules.attention=[[0, 1], [4]]"],
            "got the group [4], expected at least 2 layers that share; leave the others out",
        ),
        (
            ["sharing.modules.block=[[0, 1]]", "sharing.modules.attention.key=[[1, 2]]"],
            "shares attention.key of layer 1, which model.core.sharing.modules.block shares already; "
            "expected each matrix of a layer in one group at most",
        ),
        (["sharing.lora_rank=4"], NO_MATRIX),
        (["sharing.modules.attention_norm=all", "sharing.lora_rank=4"], NO_MATRIX),
        (
            ["sharing.lora_alpha=4"],
            "got 4, which has no effect without lora_rank; expected null, or model.core.sharing.lora_rank=8",
        ),
        (["loops.count=2", "loops.last=6"], "got 6 in a core of 6 layers, expected at most 5"),
        (
            ["loops.count=2", "loops.last=2", "loops.first=3"],
            "got 3, expected at most 2, the last layer of the loop",
        ),
    ],
)
def test_maps_that_do_not_fit_are_named(load, overrides, message):
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    key = overrides[-1].partition("=")[0]
    assert str(error.value) == f"--set model.core.{overrides[-1]}: model.core.{key}: {message}"


def test_a_loop_of_one_pass_needs_no_settings(load):
    with pytest.raises(ConfigError, match=r"model\.core\.loops\.count: got 1, with which embeddings has no effect"):
        load("loops.embeddings=true")


def test_forms_of_a_section_with_free_keys(load, tmp_path):
    for text, problem in [
        ("all", "run.yaml:5: model.core.sharing.modules: got the text 'all', expected a section of keys"),
        (
            "{attention: {key: all}, attention.key: all}",
            "run.yaml:5: model.core.sharing.modules.attention.key: repeated key; it is already set at run.yaml:5",
        ),
    ]:
        (tmp_path / "run.yaml").write_text(CORE + f"    sharing:\n      modules: {text}\n")
        with pytest.raises(ConfigError) as error:
            load()
        assert str(error.value) == problem
    (tmp_path / "run.yaml").write_text(CORE + "    sharing:\n      modules:\n")
    assert load().model.core.sharing == SharingConfig()


def test_one_matrix_may_be_in_different_groups_by_different_names(load):
    config = load(
        "sharing.modules.block=[[0, 1]]", "sharing.modules.attention.key=[[2, 3]]", "sharing.modules.attention_norm=all"
    )
    groups = config.model.core.sharing.groups(6)
    assert groups == {"block": ((0, 1),), "attention.key": ((2, 3),), "attention_norm": ((0, 1, 2, 3, 4, 5),)}
