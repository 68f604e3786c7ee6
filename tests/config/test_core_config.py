"""Settings of a transformer core that conflict: each error names the key and a value that works."""

import pytest

from stlm.config import load_run_config
from stlm.errors import ConfigError

CONFLICTS = [
    (
        ["width=100", "core.attention.num_heads=3", "core.positions.kind=alibi"],
        "core.attention.num_heads: got 3, expected a divisor of model.width = 100; 2 would work",
        ["width=100", "core.attention.num_heads=2", "core.positions.kind=alibi"],
    ),
    (
        ["width=99", "core.attention.num_heads=9", "core.attention.head_width=11"],
        "core.attention.head_width: got 11, expected an even number (rotary positions rotate pairs); 12 would work",
        ["width=99", "core.attention.num_heads=9", "core.attention.head_width=12"],
    ),
    (
        ["core.attention.num_heads=6", "core.attention.head_width=8", "core.attention.num_kv_heads=4"],
        "core.attention.num_kv_heads: got 4, expected a divisor of model.core.attention.num_heads = 6; 3 would work",
        ["core.attention.num_heads=6", "core.attention.head_width=8", "core.attention.num_kv_heads=3"],
    ),
    (
        ["core.positions.fraction=0.3"],
        "core.positions.fraction: got 0.3, which rotates 19 elements of a head of 64, expected an even number, as they "
        "are rotated in pairs; 0.28125 would work",
        ["core.positions.fraction=0.28125"],
    ),
    (
        ["core.positions.fraction=1e-3"],
        "core.positions.fraction: got 0.001, which rotates 0 elements of a head of 64, expected an even number, as "
        "they are rotated in pairs; 0.03125 would work",
        ["core.positions.fraction=0.03125"],
    ),
    (
        ["core.attention.full_every=6"],
        "core.attention.full_every: got 6, which has no effect without a window; expected null, or "
        "model.core.attention.window=128",
        ["core.attention.full_every=6", "core.attention.window=128"],
    ),
    (
        ["core.attention.window=64", "core.attention.full_every=1"],
        "core.attention.full_every: got 1, which leaves no layer with a window; expected 2 or more, or "
        "model.core.attention.window=null",
        ["core.attention.window=64", "core.attention.full_every=2"],
    ),
    (
        ["core.num_layers=1", "core.attention.value_residual=true"],
        "core.attention.value_residual: got true in a core of one layer, which has no later layer; expected false, or "
        "model.core.num_layers=2",
        ["core.num_layers=2", "core.attention.value_residual=true"],
    ),
    (
        ["core.feed_forward={kind: moe, num_experts: 4, experts_per_token: 5}"],
        "core.feed_forward.experts_per_token: got 5, expected at most model.core.feed_forward.num_experts = 4; "
        "2 would work",
        ["core.feed_forward={kind: moe, num_experts: 4, experts_per_token: 2}"],
    ),
    (
        ["core.attention.window=0"],
        "core.attention.window: got 0, expected an integer at least 1 or null",
        ["core.attention.window=1"],
    ),
    (
        ["core.attention.logit_cap=0"],
        "core.attention.logit_cap: got 0, expected a number above 0.0 or null",
        ["core.attention.logit_cap=50"],
    ),
    (
        ["core.positions={kind: learned, theta: 500}"],
        "core.positions.theta: kind 'learned' has no such key, only 'rope'; to replace the whole component: "
        "--set 'model.core.positions={kind: learned}'",
        ["core.positions={kind: rope, theta: 500}"],
    ),
    (
        ["core.feed_forward={kind: relu_square}"],
        "core.feed_forward.kind: got the text 'relu_square', expected one of swiglu, gelu, relu_squared, moe; "
        "nearest: relu_squared",
        ["core.feed_forward={kind: relu_squared}"],
    ),
]


@pytest.mark.parametrize("overrides, message, working", CONFLICTS, ids=lambda value: str(value)[:60])
def test_the_message_names_the_key_and_a_value_that_works(tmp_path, overrides, message, working):
    (tmp_path / "run.yaml").write_text("model: {context_length: 512, width: 256}\n")
    with pytest.raises(ConfigError) as error:
        load_run_config(tmp_path / "run.yaml", [f"model.{override}" for override in overrides])
    assert str(error.value).partition(": model.")[2] == message
    load_run_config(tmp_path / "run.yaml", [f"model.{override}" for override in working])
