"""torch.compile for training: what it needs, whether it pays, and blocks that fall back to eager execution."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stlm.errors import ConfigError, EngineError
from stlm.model.core.blocks import Block
from stlm.training.distributed.connection import Distributed

GAIN = 0.12  # of the time of a step, by benchmarks/training.py
FACTOR = 120.0  # cost of a program, forward and backward, in compilations of SOURCE; see `compilation_seconds`
MARGIN = 3.0  # the gain must exceed the cost by this factor
SHORTEST_S = 900.0  # shorter runs are not compiled
MOST_KINDS = 8  # of blocks: torch keeps as many programs of one function

SOURCE = """
#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>
std::map<std::string, std::vector<float>> rows;
extern "C" void kernel(float *x, long n) {
    for (long i = 0; i < n; ++i) x[i] = std::exp(x[i]) / (1 + std::abs(x[i]));
    std::sort(x, x + n);
    rows["x"].assign(x, x + n);
}
"""


class Choice(NamedTuple):
    """Whether blocks are compiled, and why."""

    compiles: bool
    reason: str


def choose(seconds: float, model: nn.Module, stage: int) -> Choice:
    """Decide for training.compile=auto whether compilation pays in a run of about `seconds` under this ZeRO stage.

    The cost is measured only where everything else speaks for compilation.
    """
    if seconds < SHORTEST_S:
        return Choice(False, f"training takes about {seconds:.0f} s, too short to gain by it")
    if (obstacle := _obstacle(stage)) is not None:
        return Choice(False, obstacle.args[0])
    kinds = len({_kind(block) for block in blocks_of(model)})
    if not 0 < kinds <= MOST_KINDS:
        return Choice(False, f"the model has {kinds} kinds of blocks, and torch keeps {MOST_KINDS} programs")
    cost = compilation_seconds(kinds)
    if cost is None:
        return Choice(False, "the C++ compiler fails on a small program")
    saved = GAIN * seconds
    figures = f"it takes about {cost:.0f} s, and saves about {saved:.0f} s of {seconds:.0f} s"
    return Choice(saved > MARGIN * cost, figures)


def compilation_seconds(kinds: int) -> float | None:
    """Estimate how long it takes to compile this many kinds of blocks; None if the compiler does not work.

    One small fixed source is compiled, and its time multiplied by FACTOR for each kind. Measured on two cores, in
    seconds of processor time, forward and backward: the source takes 0.47; quickstart's two kinds take 55, and 3.2
    where torch has them on disk; 10m-token's one kind takes 58, which is FACTOR times the source.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = [get_cpp_compiler(), "-O3", "-x", "c++", "-c", "-", "-o", os.devnull]
    started = time.perf_counter()
    try:
        subprocess.run(command, input=SOURCE, text=True, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return kinds * FACTOR * (time.perf_counter() - started)


def refuse_uncompilable(stage: int, cause: str) -> None:
    """Raise ConfigError or EngineError where compilation cannot work, or would have no use. `cause`: why it has to."""
    if (obstacle := _obstacle(stage)) is not None:
        raise type(obstacle)(f"training.compile: {cause}, but {obstacle}; training.compile=false trains without")


def _obstacle(stage: int) -> ConfigError | EngineError | None:
    """Return what prevents compilation here; None if nothing is known to."""
    if stage == 3:
        return ConfigError(
            "ZeRO stage 3 fetches weights between all modules, so that no two of them become one program (another "
            "--ds_config would work)"
        )
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return EngineError("TORCHDYNAMO_DISABLE=1 in the environment turns it off (unset it)")
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes a while, and makes the cache folder

        get_cpp_compiler()
    except OSError as error:
        return EngineError(f"torch cannot use its cache folder ({error}): name another in TORCHINDUCTOR_CACHE_DIR")
    except Exception as error:  # inductor's own classes
        return EngineError(
            f"there is no C++ compiler ({' '.join(str(error).split())}): install g++, or name one in CXX"
        )
    from torch.utils._triton import has_triton

    if torch.cuda.is_available() and not has_triton():
        return EngineError("triton, which it needs on a GPU, is not installed")
    return None


def blocks_of(model: nn.Module) -> list[Block]:
    """Return the transformer blocks of a model."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _kind(block: Block) -> tuple[Any, ...]:
    """Return what blocks that share one program have in common."""
    shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
    return str(block), shapes, getattr(block.attention, "window", None)


class CompiledBlocks:
    """The blocks of a model, compiled at their first call once `start` was called.

    Blocks of equal shape share one program, so the time this takes does not grow with the number of layers; torch keeps
    programs on disk, so the next start takes seconds. Without gradients, as in validation, blocks run eagerly.

    If torch fails to compile, all blocks run eagerly from then on, and `take_warning` returns why; under auto also if
    the shape of the inputs changes. Where compilation is required, EngineError is raised instead.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = blocks_of(model)
        self._shapes: dict[Block, torch.Size] = {}
        self._required: str | None = None
        self._failure: str | None = None  # on this rank, not yet reported
        self._is_settled = False
        self.on = False

    def start(self, required: str | None = None) -> None:
        """Compile from the next forward pass on. `required`: why failures are errors; None: they are warnings."""
        import torch._functorch.config as functorch

        self.on, self._required = True, required
        if hasattr(functorch, "force_non_lazy_backward_lowering"):  # so that failures of both occur in forward
            functorch.force_non_lazy_backward_lowering = True
        for block in self._blocks:
            block._compiled_call_impl = self._calling(block)

    def _calling(self, block: Block) -> Any:
        program: Any = None

        def call(x_BTD: Tensor, *inputs: Any, **named: Any) -> Any:
            nonlocal program
            if self.on and torch.is_grad_enabled():
                if self._required is None and self._shapes.setdefault(block, x_BTD.shape) != x_BTD.shape:
                    self._fail(f"inputs of {list(x_BTD.shape)} follow {list(self._shapes[block])}")
                else:
                    try:
                        program = program or torch.compile(block._call_impl, dynamic=False)
                        return program(x_BTD, *inputs, **named)
                    except Exception as error:  # at first of any class; an error of the block itself comes again
                        if self._is_settled and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                            raise
                        self._fail(_describe(error))
            return block._call_impl(x_BTD, *inputs, **named)

        return call

    def _fail(self, failure: str) -> None:
        self.on, self._failure = False, failure
        if self._is_settled and self._required:
            raise self._error(failure)

    def _error(self, failure: str) -> EngineError:
        return EngineError(
            f"training.compile: {self._required}, but torch cannot compile this model here ({failure}); "
            "training.compile=false trains without"
        )

    def settle(self, distributed: Distributed) -> bool:
        """Agree with all ranks after the first forward pass. Returns False if it has to be made again, eagerly.

        Raises EngineError on all ranks where compilation is required and failed on one.
        """
        failures = [failure for failure in distributed.gather(self._failure) if failure is not None]
        self._is_settled = True
        if not failures:
            return True
        self.on, self._failure = False, failures[0]
        if self._required:
            error = self._error(failures[0])

            def report() -> None:
                raise error

            distributed.on_rank_zero(report)
        return False

    def take_warning(self) -> str | None:
        """Return why compilation was given up since the last call, if it was."""
        failure, self._failure = self._failure, None
        return failure and f"blocks are no longer compiled, and run eagerly: {failure}"


def _describe(error: BaseException) -> str:
    """Return the class and the first line of the error that torch's compiler wraps."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
