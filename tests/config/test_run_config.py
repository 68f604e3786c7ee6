"""RunConfig from presets, files and overrides: accepted settings, and the exact messages for refused ones."""

import dataclasses

import pytest

from stlm.config import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    DataConfig,
    FixedPatchingConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    RoPEConfig,
    RunConfig,
    TokenEmbedderConfig,
    TrainingConfig,
    TransformerCoreConfig,
    changed_keys,
    dump_run_config,
    from_dict,
    list_presets,
    load_run_config,
    preset_names,
    to_dict,
)
from stlm.config.yaml.fields import Component, FreeSection
from stlm.errors import ConfigError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Read the text as run.yaml."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_run_config("run.yaml", overrides)

    return load


@pytest.fixture
def problems(load):
    """Return a function (text, *overrides) that returns the lines of the ConfigError."""

    def problems(text, *overrides):
        with pytest.raises(ConfigError) as error:
            load(text, *overrides)
        return [line.strip() for line in str(error.value).splitlines() if not line.endswith("in the configuration:")]

    return problems


# Accepted.


def test_defaults_then_file_then_overrides(load):
    config = load(
        "training:\n  learning_rate: 3e-4\n  max_steps: 500\nmodel:\n", "training.max_steps=700", "model.width=64"
    )
    assert config == RunConfig(model=ModelConfig(width=64), training=TrainingConfig(learning_rate=3e-4, max_steps=700))


def test_an_empty_file_is_the_defaults(load):
    assert load("") == load("# nothing\n") == RunConfig()


def test_a_file_holds_only_what_differs_from_its_base(load, tmp_path):
    """A file overrides its base file, which overrides a preset; a component of another kind replaces the whole one."""
    (tmp_path / "middle.yaml").write_text("base: quickstart\nmodel:\n  width: 96\n  core:\n    num_layers: 2\n")
    config = load("base: middle.yaml\nmodel:\n  core: {num_layers: 3}\ntraining:\n", "training.max_steps=700")
    quickstart = load_run_config("quickstart")
    core = dataclasses.replace(quickstart.model.core, num_layers=3)
    assert config.model == dataclasses.replace(quickstart.model, width=96, core=core)
    assert config.training == dataclasses.replace(quickstart.training, max_steps=700)
    other = load("base: middle.yaml\nmodel:\n  embedder: {kind: byte}\n  head: {kind: linear, tied: false}\n").model
    assert (other.embedder, other.head) == (ByteEmbedderConfig(), LinearHeadConfig(tied=False))


def test_invalid_bases_are_refused(problems, tmp_path):
    (tmp_path / "other.yaml").write_text("base: run.yaml\nseed: x\n")
    assert problems("seed: 1\nbase: 3") == [
        "run.yaml:2: base: got 3, expected the name of a preset, or a file in the same folder"
    ]
    assert problems("base: quickstrat")[0] == (
        "run.yaml:1: base: unknown preset 'quickstrat'; nearest: quickstart; expected a path, or one of"
    )
    assert problems("base: other.yaml") == [
        "other.yaml:1: base: got 'run.yaml', which is based on this file itself, expected another",
        "other.yaml:2: seed: got the text 'x', expected an integer at least 0",
    ]


def test_integers_serve_as_floats(load):
    rate = load("training:\n  learning_rate: 1\n").training.learning_rate
    assert rate == 1.0 and isinstance(rate, float)


def test_kind_chooses_the_component_and_the_default_kind_needs_no_name(load):
    config = load(
        "model:\n  embedder: {kind: byte_patch, patching: {patch_size: 8}}\n  head: {kind: byte_patch}\n"
        "  core: {attention: {num_heads: 2}}\n",
        "model.core.positions.theta=5e4",
    )
    assert config.model.embedder == BytePatchEmbedderConfig(FixedPatchingConfig(8))
    assert config.model.core == TransformerCoreConfig(
        attention=GroupedQueryConfig(num_heads=2), positions=RoPEConfig(theta=5e4)
    )


def test_an_override_replaces_a_whole_component(load):
    patches = "model:\n  embedder: {kind: byte_patch, patching: {patch_size: 8}}\n  head: {kind: byte_patch}\n"
    config = load(patches, "model.embedder={kind: token}", "model.head={kind: linear, tied: false}")
    assert config.model.embedder == TokenEmbedderConfig()
    assert config.model.head == LinearHeadConfig(tied=False)


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_survives_dumping(name, tmp_path):
    config = load_run_config(name)
    (tmp_path / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(tmp_path) == config  # a run directory
    assert load_run_config(tmp_path / "config.yaml") == config


def test_presets_are_few_and_described():
    sizes = [f"{size}m-{kind}" for size in (10, 50, 100) for kind in ("byte", "byte-patch", "token")]
    assert preset_names() == ["quickstart", *sizes, "paper-50m"]
    lines = list_presets().splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert lines[0].startswith("  quickstart       Patches of four bytes, 2 million parameters: two laptop cores train")
    assert all(len(line) <= 120 and line.endswith(".") and "#" not in line for line in lines)
    assert isinstance(load_run_config("quickstart").model.embedder, BytePatchEmbedderConfig)


def test_dump_writes_every_field_and_loads_back_equal(load):
    config = RunConfig(
        seed=7,
        data=DataConfig(dir="no", tokenizer="sentencepiece:4096"),
        model=ModelConfig(
            embedder=TokenEmbedderConfig(),
            core=TransformerCoreConfig(attention=GroupedQueryConfig(num_kv_heads=2), positions=RoPEConfig(theta=1e5)),
        ),
        training=TrainingConfig(learning_rate=0.1 + 0.2, epsilon=1e-12, micro_batch_size=4, schedule="constant"),
    )
    text = dump_run_config(config)
    assert load(text) == config
    for section in (config, config.data, config.model, config.model.core, config.model.core.positions, config.training):
        for field in dataclasses.fields(section):
            assert f"{field.name}:" in text


def test_to_dict_from_dict(tmp_path):
    model = ModelConfig(embedder=BytePatchEmbedderConfig(), head=BytePatchHeadConfig(tied=False))
    mapping = to_dict(model)
    assert mapping["embedder"]["kind"] == "byte_patch"
    assert from_dict(ModelConfig, mapping) == model
    mapping["embedder"]["patching"]["patch_sise"] = 3
    mapping["width"] = "wide"
    with pytest.raises(ConfigError) as error:
        from_dict(ModelConfig, mapping, "model/config.json")
    assert str(error.value).splitlines() == [
        "2 problems in the configuration:",
        "  model/config.json: width: got the text 'wide', expected an integer at least 2",
        "  model/config.json: embedder.patching.patch_sise: unknown key; nearest: embedder.patching.patch_size",
    ]


def test_every_setting_has_help_and_every_count_a_unit():
    def walk(cls):
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], f"{cls.__name__}.{field.name}"
            if str(field.type).startswith("int") and field.name not in ("seed", "first", "last"):
                assert field.metadata["unit"], f"{cls.__name__}.{field.name}"
            default = field.default
            if isinstance(default, Component):
                for member in default.kinds.values():
                    walk(member)
            elif dataclasses.is_dataclass(default) and not isinstance(default, FreeSection):
                walk(type(default))

    walk(RunConfig)


def test_changed_keys_names_only_fixed_settings():
    old = RunConfig()
    training = dataclasses.replace(
        old.training,
        max_steps=9,
        micro_batch_size=1,
        precision="fp32",
        keep_last=1,
        learning_rate=1.0,
        log_every_steps=1,
    )
    attention = dataclasses.replace(old.model.core.attention, num_kv_heads=1)
    core = dataclasses.replace(old.model.core, num_layers=1, attention=attention)
    model = dataclasses.replace(old.model, embedder=TokenEmbedderConfig(), core=core)
    new = RunConfig(seed=2, data=DataConfig(dir="elsewhere"), model=model, training=training)
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == [
        "seed",
        "model.embedder.kind",
        "model.core.num_layers",
        "model.core.attention.num_kv_heads",
        "training.learning_rate",
    ]


# Refused.


def test_a_misspelt_limit_of_time_suggests_the_key_in_seconds():
    with pytest.raises(ConfigError, match=r"training.max_seconds: unknown key; .*training.limits.wall_time_s"):
        load_run_config("quickstart", ["training.max_seconds=60"])


def test_misspelt_override_golden():
    with pytest.raises(ConfigError) as error:
        load_run_config("quickstart", ["training.lerning_rate=1"])
    assert str(error.value) == (
        "--set training.lerning_rate=1: training.lerning_rate: unknown key; "
        "nearest: training.learning_rate, training.final_learning_rate_fraction"
    )
    assert error.value.exit_code == 2


def test_all_problems_in_one_report(problems):
    text = """\
seed: 1.0
training:
  max_steps: ten
  tied: no
  warmup: 3
  beta2: 1
  precision: fp33
model:
  core: {kind: transfomer}
  head: {tied: no}
  width: -1
max_steps: 3
zzz: 1
"""
    assert problems(text, "data.tokenizer=3", "nothing", ".=1") == [
        "--set nothing: got 'nothing', expected section.key=value",
        "--set .=1: got '.=1', expected section.key=value",
        "run.yaml:1: seed: got 1.0, expected an integer at least 0, written 1",
        "run.yaml:3: training.max_steps: got the text 'ten', expected an integer at least 1",
        "run.yaml:4: training.tied: unknown key; nearest: model.head.tied",
        "run.yaml:5: training.warmup: unknown key; nearest: training.warmup_steps",
        "run.yaml:6: training.beta2: got 1, expected a number at least 0.0 and below 1.0",
        "run.yaml:7: training.precision: got the text 'fp33', expected one of auto, fp32, bf16, fp16; nearest: fp32",
        "run.yaml:9: model.core.kind: got the text 'transfomer', expected one of transformer; nearest: transformer",
        "run.yaml:10: model.head.tied: got the text 'no', expected true or false",
        "run.yaml:11: model.width: got -1, expected an integer at least 2",
        "run.yaml:12: max_steps: unknown key; nearest: training.max_steps",
        "run.yaml:13: zzz: unknown key; expected one of seed, data, model, training, evals",
        "--set data.tokenizer=3: data.tokenizer: got 3, expected text",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: true", "run.yaml:1: seed: got true, expected an integer at least 0"),
        (
            "training: {micro_batch_size: 2.5}",
            "run.yaml:1: training.micro_batch_size: got 2.5, expected an integer at least 1 or null",
        ),
        (
            "training: {learning_rate: true}",
            "run.yaml:1: training.learning_rate: got true, expected a number above 0.0",
        ),
        ("training: {learning_rate: .inf}", "run.yaml:1: training.learning_rate: got inf, expected a number above 0.0"),
        ("training: {learning_rate: 0}", "run.yaml:1: training.learning_rate: got 0, expected a number above 0.0"),
        (
            "training: {weight_decay: .nan}",
            "run.yaml:1: training.weight_decay: got nan, expected a number at least 0.0",
        ),
        ("training: 3", "run.yaml:1: training: got 3, expected a section of keys"),
        (
            "model: {core: transformer}",
            "run.yaml:1: model.core: got the text 'transformer', expected a section such as {kind: transformer}",
        ),
        (
            "model: {core: {attention: {num_kv_heads: [1]}}}",
            "run.yaml:1: model.core.attention.num_kv_heads: got a list, expected an integer at least 1 or null",
        ),
        (
            "model: {embedder: {kind: byte, window: 4}}",
            "run.yaml:1: model.embedder.window: kind 'byte' has no such key, only 'byte_patch'; "
            "to replace the whole component: --set 'model.embedder={kind: byte}'",
        ),
        (
            "model: {core: {num_heads: 2}}",
            "run.yaml:1: model.core.num_heads: unknown key; nearest: model.core.attention.num_heads",
        ),
        (
            "model:\n  core:\n    positions: {kind: rop}",
            "run.yaml:3: model.core.positions.kind: got the text 'rop', expected one of rope, learned, none, alibi; "
            "nearest: rope",
        ),
        (
            "model:\n  core:\n    norm: rms_norm",
            "run.yaml:3: model.core.norm: got the text 'rms_norm', expected a section such as {kind: rms_norm}",
        ),
        ("- 1", "run.yaml:1: the file: got a list, expected a section of keys"),
        ("seed: 1\nseed: 2", "run.yaml:2: seed: repeated key; it is already set in line 1"),
        ("data: {dir: 5}", "run.yaml:1: data.dir: got 5, expected text or null"),
    ],
)
def test_refused_value(problems, text, problem):
    assert problems(text) == [problem]


PATCHES = "model:\n  embedder: {kind: byte_patch}\n  head: {kind: byte_patch}\n"


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (
            ["model.width=100", "model.core.attention.num_heads=4"],
            "model.core.attention.num_heads",
            "got 4, expected a divisor of model.width = 100 that leaves each head an even width; 5 would work",
        ),
        (
            ["model.core.attention.num_heads=3"],
            "model.core.attention.num_heads",
            "got 3, expected a divisor of model.width = 256 that leaves each head an even width; 2 would work",
        ),
        (
            ["model.width=99"],
            "model.width",
            "got 99, expected an even number (rotary positions rotate pairs); 100 would work",
        ),
        (
            ["model.core.attention.num_kv_heads=3"],
            "model.core.attention.num_kv_heads",
            "got 3, expected a divisor of model.core.attention.num_heads = 4; 2 would work",
        ),
        (
            ["model.embedder.patching.patch_size=5"],
            "model.context_length",
            "got 512, expected a multiple of model.embedder.patching.patch_size = 5; 515 would work",
        ),
        (
            ["model.embedder.num_heads=3"],
            "model.embedder.num_heads",
            "got 3, expected a divisor of model.embedder.width = 128 that leaves each head an even width; 2 would work",
        ),
        (
            ["model.head.num_heads=128"],
            "model.head.num_heads",
            "got 128, expected a divisor of model.embedder.width = 128 that leaves each head an even width; "
            "64 would work",
        ),
        (
            ["model.head={kind: linear}"],
            "model.head.kind",
            "got 'linear', which predicts one id per vector, expected a head that predicts patches for the embedder "
            "'byte_patch'; model.head={kind: byte_patch} would work",
        ),
        (
            ["model.embedder={kind: byte}"],
            "model.head.kind",
            "got 'byte_patch', which needs patches, expected a head for the embedder 'byte'; "
            "model.head={kind: linear} would work",
        ),
        (
            ["training.max_steps=50", "training.schedule=wsd", "training.decay_steps=20"],
            "training.warmup_steps",
            "got 100, expected warm-up and decay (20 steps) to fit into training.max_steps = 50; 30 would work",
        ),
        (
            ["training.schedule=wsd"],
            "training.decay_steps",
            "got 0, expected 1 or more with training.schedule = wsd, which ends in a decay; 200 would work",
        ),
        (
            ["training.schedule=wsd", "training.decay_steps=2000"],
            "training.warmup_steps",
            "got 100, expected warm-up and decay (2,000 steps) to fit into training.max_steps = 1000; "
            "training.max_steps=2100 would work",
        ),
        (
            ["training.decay_steps=20"],
            "training.decay_steps",
            "got 20, which has no effect with training.schedule = cosine; expected 0, or training.schedule = wsd",
        ),
        (
            ["training.micro_batch_size=5"],
            "training.micro_batch_size",
            "got 5, expected a divisor of training.batch_size = 32; 4 would work",
        ),
        (
            ["data.tokenizer=sentencepiece:4096"],
            "data.tokenizer",
            "got 'sentencepiece:4096', expected 'byte' for model.embedder.kind = byte_patch; "
            "or model.embedder={kind: token} with model.head={kind: linear}",
        ),
    ],
)
def test_settings_that_do_not_go_together(problems, load, overrides, key, message):
    load(PATCHES)
    assert problems(PATCHES, *overrides) == [f"--set {overrides[-1]}: {key}: {message}"]


def test_the_suggested_value_works(load):
    load(PATCHES, "model.core.attention.num_heads=2")
    load(PATCHES, "model.width=100", "model.core.attention.num_heads=5")
    load(PATCHES, "model.embedder.patching.patch_size=5", "model.context_length=515")
    load(PATCHES, "model.head.num_heads=64")
    load(PATCHES, "training.schedule=wsd", "training.decay_steps=2000", "training.max_steps=2100")
    short = ["training.max_steps=50", "training.schedule=wsd", "training.decay_steps=20"]
    load(PATCHES, *short, "training.warmup_steps=30")
    load(PATCHES, "training.max_steps=50")  # the first steps of a recipe, all of them warm-up


def test_a_conflict_is_blamed_on_its_line_unless_a_key_in_it_is_in_doubt(problems):
    assert problems("model:\n  width: 90\n  core:\n    attention: {num_heads: 4}\n") == [
        "run.yaml:4: model.core.attention.num_heads: got 4, expected a divisor of model.width = 90 "
        "that leaves each head an even width; 3 would work"
    ]
    # The intended width is unknown, so no conflict with the heads is reported.
    assert problems("model:\n  widht: 90\n  core:\n    attention: {num_heads: 3}\n") == [
        "run.yaml:2: model.widht: unknown key; nearest: model.width"
    ]


def test_an_override_below_a_plain_value_is_refused(problems):
    assert problems("training: 3\n", "training.max_steps=5") == [
        "--set training.max_steps=5: training: got 3, expected a section of keys",
        "run.yaml:1: training: got 3, expected a section of keys",
    ]
    assert problems("", "seed=[1") == [
        "--set seed=[1: not readable as YAML: expected ',' or ']', but got '<stream end>'"
    ]


def test_invalid_sources_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    (tmp_path / "quickstart").mkdir()
    load_run_config("quickstart")  # a preset's name wins over a folder
    for source, message in [
        (
            "quickstrat",
            f"unknown preset 'quickstrat'; nearest: quickstart; expected a path, or one of\n{list_presets()}",
        ),
        ("runs/none", "runs/none: no such file; expected a YAML file, a run directory, or a preset: "),
        ("none.yaml", "none.yaml: no such file; "),
        (tmp_path, "a directory without config.yaml"),
        ("latin.yaml", "latin.yaml: got a byte that is not UTF-8 at offset 3"),
    ]:
        with pytest.raises(ConfigError) as error:
            load_run_config(source)
        assert message in str(error.value)


def test_byte_embedder_is_the_default():
    assert RunConfig().model.embedder == ByteEmbedderConfig()


IDLE = """
evals: {tasks: blimp, items: 100, at_start: true}
training:
  init_parts: core
  recovery: {spike_steps: 10}
model:
  embedder: {kind: byte, ngrams: {longest: 4}}
"""


def test_an_override_without_a_value_does_not_take_a_section_back(problems):
    (found,) = problems("training: {batch_size: 8}", "training=")
    assert found == "--set training=: training: got nothing, expected section.key=value"


def test_settings_without_effect_are_refused_together(problems):
    """Both in a file and as overrides, and also where the value is the default; each message has a line that works."""
    found = problems(IDLE, "evals.tasks_dir=items", "training.recovery.spike_window=50", "training.warmup_stpes=3")
    found = "\n".join(found)
    for expected in (
        "evals.tasks: got 'blimp', which has no effect while evals.every_steps is null; leave it out, or set "
        "evals.every_steps=500 as well",
        "evals.items: got 100, which",
        "evals.at_start: got true, which",
        "evals.tasks_dir: got 'items', which",
        "training.init_parts: got 'core', which has no effect while training.init_from is null",
        "training.recovery.spike_steps: got 10, which has no effect while training.recovery.spike_factor is null",
        "--set training.recovery.spike_window=50: training.recovery.spike_window: got 50, which",
        "model.embedder.ngrams.longest: got 4, which has no effect while model.embedder.ngrams.table_size is 0",
        "training.warmup_stpes: unknown key",
    ):
        assert expected in found, found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evals.tasks=minimal_pairs"], "evals.tasks: got 'minimal_pairs', which has no effect"),
        (["training.schedule=constant", "training.final_learning_rate_fraction=0.2"], "no effect with training.sch"),
        (["training.recovery.spike_factor=2", "training.recovery.max_rollbacks=0"], "factor: got 2, which has no"),
        (["evals.every_steps=9", "evals.tasks=bits_per_byte", "evals.items=9"], "evals.items: got 9, which has no eff"),
        (
            ["model.embedder={kind: byte_patch, num_layers: 0, window: 9}", "model.head={kind: byte_patch}"],
            "model.embedder.window: got 9, which has no effect while model.embedder.num_layers is 0",
        ),
        (["model.core.attention.window=128", "model.context_length=128"], "got 128, which has no effect on"),
        (["data.mixture=[{dir: a, weight: 2}]"], "got the weight 2 of a single folder, which has no effect"),
        (["evals.every_steps=9", "evals.tasks_dir=d"], "evals.tasks_dir: got 'd', which has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(problems, overrides, message):
    (found,) = problems("", *overrides)
    assert message in found


def test_a_value_reset_to_its_default_is_not_refused(load):
    text = "training: {recovery: {spike_factor: 1.5, spike_steps: 5}}\nevals: {every_steps: 9, tasks: blimp}\n"
    off = ("training.recovery.spike_factor=null", "training.recovery.spike_steps=10", "evals.every_steps=null",
           "evals.tasks=minimal_pairs")  # fmt: skip
    assert load(text, *off) == RunConfig()


def test_a_saved_run_keeps_settings_without_effect(load, tmp_path):
    """Refusing them would lose runs of earlier versions; overriding them is refused as usual."""
    (tmp_path / "run").mkdir()
    text = dump_run_config(RunConfig()).replace("tasks: minimal_pairs", "tasks: blimp")
    text = text.replace("schedule: cosine", "schedule: constant").replace("_fraction: 0.1", "_fraction: 0.0")
    (tmp_path / "run/config.yaml").write_text(text)
    config = load_run_config(tmp_path / "run")
    assert config.evals.tasks == "blimp" and config.training.final_learning_rate_fraction == 0.0
    for override in ("evals.items=9", "training.final_learning_rate_fraction=0.5"):
        with pytest.raises(ConfigError, match="has no effect"):
            load_run_config(tmp_path / "run", [override])


def test_tasks_without_items_or_files_are_those_of_the_evaluation():
    from stlm.config.evals import OWN_ITEMS, WHOLE_TEXT
    from stlm.evals import CHOICE_TASKS, DATA_TASKS, TASKS

    assert set(WHOLE_TEXT) == set(DATA_TASKS) - {"corruptions", "robustness"}
    assert set(OWN_ITEMS) == set(TASKS) - set(CHOICE_TASKS) - {"robustness", "similarity", "retrieval"}
