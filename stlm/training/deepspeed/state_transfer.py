"""Transfer of the whole state between an engine of any ZeRO stage and plain tensors. All ranks call every function.

Each tensor is gathered from the ranks, or scattered to them, one at a time, so that a rank never holds the state twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stlm.errors import CheckpointError
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.internals import link_moments
from stlm.training.distributed.watchdog import watched
from stlm.training.optim.averaging import AVERAGE
from stlm.training.run.state import State


@watched("gathering the state")
def full_state(engine: Engine, reused: State | None = None) -> State:
    """Copy the whole state to rank 0; the other ranks take part and get empty dicts.

    The copies overwrite the tensors of `reused`, an earlier state that is no longer needed: several times faster than
    allocating new memory.
    """
    _link_moments(engine)
    keep = engine.distributed.rank == 0
    parameters: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in engine.parameters.items():
        for key in (None, *_moment_names(engine, parameter)):
            tensor = _gather(engine, parameter, key)
            if keep:
                target = parameters if key is None else moments.setdefault(key, {})
                used = {} if reused is None else reused.parameters if key is None else reused.moments.get(key, {})
                room = used.get(name)
                target[name] = torch.empty(tensor.shape, dtype=torch.float32) if room is None else room
                target[name].copy_(tensor.detach())
    updates = int(next(iter(_entries(engine)), {"step": 0})["step"])
    return State(parameters, moments, updates)


@watched("loading the state")
def load_state(engine: Engine, state: State, example: Sequence[Tensor]) -> None:
    """Load `state`, which every rank has whole. `example`: inputs that the model's forward accepts.

    A state without moments leaves the optimizer's state new. Raises CheckpointError where the moments are those of
    another optimizer.
    """
    _make_optimizer_state(engine, example)
    _link_moments(engine)
    moments = state.moments or ({AVERAGE: state.parameters} if engine.keeps_average else {})
    with torch.no_grad():
        for name, parameter in engine.parameters.items():
            _scatter(engine, parameter, None, state.parameters[name])
            kept = _moment_names(engine, parameter)
            saved = sorted(key for key in moments if name in moments[key] and parameter.requires_grad)
            if state.moments and kept != saved:
                raise CheckpointError(
                    f"{name}: the checkpoint holds {' and '.join(saved) or 'no moments'}, but this optimizer keeps "
                    f"{' and '.join(kept) or 'none'}; use the optimizer that wrote the checkpoint"
                )
            for key in saved:
                _scatter(engine, parameter, key, moments[key][name])
    for entry in _entries(engine):
        entry["step"].fill_(state.updates)


def whole_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter with its name, whole and in fp32, on every rank.

    Where an average of the weights is kept, yields the average, which checkpoints store as their model.
    """
    averages = engine.keeps_average and bool(_entries(engine))
    if averages:
        _link_moments(engine)
    for name, parameter in engine.parameters.items():
        yield name, _gather(engine, parameter, AVERAGE if averages and parameter.requires_grad else None).detach()


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Let forward read the average of the weights inside this context, where one is kept. For evaluation only."""
    if not engine.keeps_average or not _entries(engine):
        yield
        return
    _link_moments(engine)
    trained = [parameter for parameter in engine.parameters.values() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained] if engine.stage == 0 else None
    _set_weights(engine, trained, (_gather(engine, parameter, AVERAGE) for parameter in trained))
    try:
        yield
    finally:
        _set_weights(engine, trained, kept or (_gather(engine, parameter, None) for parameter in trained))


# ---------------------------------------------------------------------- one tensor


def _gather(engine: Engine, parameter: nn.Parameter, key: str | None) -> Tensor:
    """Return the fp32 parameter (key None) or one of its moments, whole. Frozen parameters have no moments."""
    if not parameter.requires_grad:
        with _whole(engine, parameter):
            return parameter.detach().clone()
    if engine.stage == 0:
        return parameter if key is None else engine.optimizer.state[parameter][key]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)


def _scatter(engine: Engine, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    """Set the fp32 parameter and the copy that forward reads (key None), or one of its moments."""
    value = value.to(engine.device)
    if not parameter.requires_grad:
        with _whole(engine, parameter):
            parameter.copy_(value)
        return
    if engine.stage == 0:
        (parameter if key is None else engine.optimizer.state[parameter][key]).copy_(value)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if key is not None:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    safe_set_full_fp32_param(parameter, value)
    with _whole(engine, parameter):
        parameter.copy_(value)


@torch.no_grad()
def _set_weights(engine: Engine, parameters: Sequence[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Set the weights that forward reads, without changing the optimizer's copy."""
    for parameter, value in zip(parameters, values, strict=True):
        with _whole(engine, parameter):
            parameter.copy_(value)


@contextmanager
def _whole(engine: Engine, parameter: nn.Parameter) -> Iterator[None]:
    """Give the parameter its full shape inside this context. What rank 0 writes to it is kept."""
    if engine.stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


# ---------------------------------------------------------------------- the optimizer's state


def _make_optimizer_state(engine: Engine, example: Sequence[Tensor]) -> None:
    """Create the optimizer's state, which exists only after a step, by a step that changes nothing."""
    if _entries(engine):
        return
    engine.train()
    with engine.accumulate():
        engine.backward(engine.forward(*example)[0].float().sum() * 0.0, last=True)
    engine.step(0.0)


def _link_moments(engine: Engine) -> None:
    if engine.stage in (1, 2):
        link_moments(engine.native.optimizer)


def _entries(engine: Engine) -> list[dict[str, Any]]:
    """Return the optimizer's state entries: of each parameter at stage 0, of this rank's flat parts above."""
    return [entry for entry in engine.optimizer.state.values() if entry]


def _moment_names(engine: Engine, parameter: nn.Parameter) -> list[str]:
    """Return the names of a parameter's moments; none for a frozen one."""
    entry = engine.optimizer.state.get(engine.held_in.get(parameter, parameter), {})
    return sorted(key for key, value in entry.items() if isinstance(value, Tensor) and value.ndim)
