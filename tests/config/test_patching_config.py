"""Patching rules in a config: conflicting settings, and the number of slots."""

from __future__ import annotations

import pytest

from stlm.config import EntropyPatchingConfig, FixedPatchingConfig, SpacePatchingConfig, load_run_config
from stlm.errors import ConfigError

KEY = "model.embedder.patching"


def load(*settings):
    """Load the quickstart preset, with windows of 512 bytes, and overrides."""
    return load_run_config("quickstart", settings)


def test_each_kind_has_its_slots():
    assert FixedPatchingConfig(4).num_slots(512) == 128
    assert SpacePatchingConfig(patch_length=5.0).num_slots(512) == 128  # a quarter more than 102.4
    assert EntropyPatchingConfig(patch_length=1.1).num_slots(512) == 512  # never more than bytes
    assert FixedPatchingConfig(6).span == 6 and SpacePatchingConfig(span=3).span == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            KEY + "={kind: space, patch_length: 300}",
            f"{KEY}.patch_length: got 300, expected at most half of model.context_length = 512, or a window is one "
            "patch; 4 would work",
        ),
        (KEY + "={kind: entropy, patch_length: 1}", f"{KEY}.patch_length: got 1, expected a number above 1.0"),
        (KEY + "={kind: spaces}", f"{KEY}.kind: got the text 'spaces', expected one of fixed, space,"),
        (KEY + ".patch_size=1024", f"{KEY}.patch_size: got 1024, expected at most half of model.context_length = 512"),
        (KEY + ".patch_size=5", f"got 512, expected a multiple of {KEY}.patch_size = 5; 515 would work"),
        (
            "model={context_length: 3, embedder: {kind: byte_patch, patching: {kind: space}}}",
            f"{KEY}.patch_length: got 6, expected at most half of model.context_length = 3, or a window is one patch; "
            "model.context_length=12 would work",
        ),
        (
            KEY + "={kind: entropy, width: 30, core: {attention: {num_heads: 4}}}",
            f"{KEY}.core.attention.num_heads: got 4, expected a divisor of {KEY}.width = 30 that leaves",
        ),
    ],
)
def test_conflicting_settings_are_named(setting, message):
    with pytest.raises(ConfigError) as error:
        load(setting)
    assert message in str(error.value)


def test_the_suggested_value_works():
    assert load(KEY + "={kind: space, patch_length: 4}").model.embedder.patching == SpacePatchingConfig(4.0)
    load(KEY + ".patch_size=5", "model.context_length=515")
    load(KEY + "={kind: entropy, width: 30, core: {attention: {num_heads: 3}}}")
