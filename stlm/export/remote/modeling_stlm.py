"""A super tiny language model for transformers: its config, its decoding state as a cache, and the model.

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from stlm.config import ModelConfig, from_dict
from stlm.model import Context, DecodingState, Network, PublishedHead, Vocabulary, initialize
from stlm.model.core.recomputation import Layers

BYTES = range(0x100)
UNUSED = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not use, which serve as symbols


class StlmConfig(PreTrainedConfig):
    """The settings of a network, under `network` as in its config.json, and its vocabulary.

    `spellings`: the bytes of each id, in hex, where the network reads them. None: ids are only numbers, or bytes where
    there are 256.
    """

    model_type = "stlm"
    keys_to_ignore_at_inference: ClassVar = ["cache"]

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        vocab_size: int = 256,
        start_id: int = 0xFC,
        spellings: list[str] | None = None,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        self.network = network or {}
        self.vocab_size = vocab_size
        self.start_id = start_id
        self.spellings = spellings
        self.use_cache = use_cache
        settings = self.settings()
        self.hidden_size = settings.width
        self.num_hidden_layers = getattr(settings.core, "num_layers", 1)
        self.max_position_embeddings = settings.context_length
        others.setdefault("tie_word_embeddings", True)  # transformers requires it for any tying
        super().__init__(**others)

    def settings(self) -> ModelConfig:
        """Return the settings as dataclasses."""
        return from_dict(ModelConfig, self.network, source="config.json, network")

    def build(self) -> Network:
        """Build a network with these settings and initial values."""
        if self.spellings is not None:
            spelt = [bytes.fromhex(spelling) for spelling in self.spellings]
        elif self.vocab_size == len(BYTES):
            spelt = [b"" if byte in UNUSED else bytes([byte]) for byte in BYTES]
        else:
            spelt = [b""] * self.vocab_size
        return Network(self.settings(), Vocabulary(tuple(spelt)), self.start_id)


class Mark(NamedTuple):
    """A state to which a cache can return."""

    read: int
    state: DecodingState
    last: Tensor


class StlmCache(Cache):
    """The inputs that a network has read of a batch, and its decoding state.

    `crop` does not remove positions from the state: the state returns to a mark, or to the beginning, and the next call
    reads the positions from there to the end again.
    """

    is_compileable = False
    is_linear: ClassVar = [False]  # presented as one layer
    is_sliding: ClassVar = [False]
    is_dummy: ClassVar = [False]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: DecodingState | None = None  # has read the first `read` of all positions
        self.read = 0
        self.last: Tensor | None = None  # logits [B, V] after the last id that the state has read
        self.inputs: Tensor | None = None  # all positions: ids [B, T] or vectors [B, T, D], padding included
        self.real: Tensor | None = None  # bool [B, T]: which positions are not padding
        self.marks: list[Mark] = []
        self.recording = False

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return f"StlmCache(length={self.get_seq_length()})"

    @property
    def batch_size(self) -> int:
        return -1 if self.inputs is None else self.inputs.size(0)

    @property
    def is_initialized(self) -> bool:
        return self.inputs is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.inputs is None else self.inputs.size(1)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.recording = True

    def append(self, inputs: Tensor, real_BN: Tensor) -> None:
        """Append the inputs that are read next."""
        if self.inputs is None or self.real is None:
            self.inputs, self.real = inputs, real_BN
            return
        if inputs.size(0) != self.inputs.size(0):
            raise ValueError(f"cache: it has read {self.inputs.size(0)} rows, but got inputs of {inputs.size(0)}")
        self.inputs, self.real = torch.cat((self.inputs, inputs), 1), torch.cat((self.real, real_BN), 1)

    def mark(self) -> None:
        """Keep a snapshot of the state to return to, if recording is on."""
        if self.recording and self.state is not None and self.last is not None:
            self.marks = [*self.marks[1 - MARKS :], Mark(self.read, self.state.snapshot(), self.last)]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; their number is given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: got {tokens_to_remove}, expected a negative number: of positions to forget")
        if not tokens_to_remove or self.inputs is None or self.real is None:
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if not length:
            self.reset()
            return
        self.inputs, self.real = self.inputs[:, :length], self.real[:, :length]
        if self.read > length:
            self.marks = [mark for mark in self.marks if mark.read <= length]
            if self.marks:
                self.read, self.last = self.marks[-1].read, self.marks[-1].last
                self.state = self.marks[-1].state.snapshot()
            else:
                self.read, self.state, self.last = 0, None, None

    def reset(self) -> None:
        self.state = self.last = self.inputs = self.real = None
        self.read, self.marks = 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.inputs is None or self.real is None:
            return
        beam_idx = beam_idx.to(self.inputs.device)
        self.inputs, self.real, self.marks = self.inputs[beam_idx], self.real[beam_idx], []
        if self.state is not None and self.last is not None:
            self.state, self.last = self.state.select(beam_idx.cpu()), self.last[beam_idx.to(self.last.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))

    def update(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("StlmCache: the model reads ids into it; keys and values cannot be added")


MARKS = 32  # that a cache keeps
OF_GENERATE = ("tokenizer", "assistant_tokenizer", "assistant_model", "inputs_tensor")


class StlmForCausalLM(PreTrainedModel, GenerationMixin):
    """The network for `AutoModelForCausalLM`: reads ids that begin with the start symbol, returns logits of the next.

    Positions masked by the attention mask, anywhere in a row, are not read: a row's results are the same without them.
    The logits at a masked position are those after the previous id, and zeros before the first one.
    """

    config_class = StlmConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: StlmConfig) -> None:
        super().__init__(config)
        self.network = config.build()
        self._tied_weights_keys = tied(self)
        # For trainers that compute logits from the last states: see `Backbone`.
        config.logit_scale, config.final_logit_softcapping = self.network.head.logit_scale, self.network.head.logit_cap
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Set what the files do not hold: tables computed from the config and, in a new model, initial values."""
        named = [*self.network.named_parameters(remove_duplicate=False), *self.network.named_buffers()]
        missing = {name: tensor for name, tensor in named if not getattr(tensor, "_is_hf_initialized", False)}
        if all(tensor.is_meta for tensor in missing.values()):
            return
        with torch.device("cpu"), init.no_init_weights():
            fresh = self.config.build()
        if any(isinstance(tensor, nn.Parameter) for tensor in missing.values()):
            initialize(fresh, seed=0)
        source = dict([*fresh.named_parameters(remove_duplicate=False), *fresh.named_buffers()])
        for name, tensor in missing.items():
            tensor.copy_(source[name])

    @property
    def base_model(self) -> Backbone:
        """The model without the last matrix, for trainers that apply it themselves."""
        return Backbone(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedder.table

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("StlmForCausalLM: the table of ids belongs to the architecture and stays as it is")

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("StlmForCausalLM: the head belongs to the architecture and stays as it is")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *given: Any, **named: Any) -> nn.Module:
        if new_num_tokens not in (None, self.config.vocab_size):
            raise NotImplementedError(
                f"resize_token_embeddings: got {new_num_tokens}, but the vocabulary is fixed at "
                f"{self.config.vocab_size} ids; add no tokens to the tokenizer"
            )
        return self.get_input_embeddings()

    @property
    def gradient_checkpointing(self) -> bool:
        """Flag: recompute the layers' activations in the backward pass instead of storing them."""
        return any(module.recomputes for module in self._stacks())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        for module in self._stacks():
            module.recomputes = enabled

    def _stacks(self) -> list[Layers]:
        return [module for module in self.network.modules() if isinstance(module, Layers)]

    def _set_gradient_checkpointing(self, *given: Any, every_n_layers: int = 1, **named: Any) -> None:
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers: got {every_n_layers}, but either all layers recompute or none does")
        super()._set_gradient_checkpointing(*given, **named)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *given: Any, **named: Any
    ) -> None:
        """Create an StlmCache for `generate`, unless one is given or none is wanted."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation: got {generation_config.cache_implementation!r}, but this model has a cache of "
                "its own; leave it out"
            )
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ValueError("assistant_early_exit: the exits of this model are not there for it; leave it out")
        cache = model_kwargs.get("cache")
        if cache is not None:
            _checked(cache)._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = cache = StlmCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("generate_batch: this model has no paged cache; call generate with a padded batch")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        return self.generate_batch()

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads which arguments it has
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Drop arguments that `generate` passes on and the model does not take."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in OF_GENERATE}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StlmCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        past_key_values: StlmCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] and, with `labels`, the mean nats of the next ids; labels of -100 are not counted.

        In training the network's own loss terms, such as the balance of experts, are added. `past_key_values` is an
        older name of `cache`. Hidden states are the outputs of the core's layers, the embedded input first and the
        normed output last; with patches they have one position for each patch.
        """
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("got both cache and past_key_values, which are the same; give one")
            cache = past_key_values
        shift_labels = others.pop("shift_labels", None)
        position_ids = others.pop("position_ids", None)  # not in the signature, or `generate` would pass some
        self._refuse(others)
        inputs = self._inputs(input_ids, inputs_embeds)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        patched = self.network.embedder.patches
        recomputing = self.gradient_checkpointing and torch.is_grad_enabled()
        if use_cache and recomputing:
            raise ValueError("use_cache: layers that recompute for the gradient keep no cache; give use_cache=False")
        if output_hidden_states and patched and (use_cache or cache is not None):
            raise ValueError(
                "output_hidden_states: beside a cache, rows of a model with patches differ in how many positions they "
                "have; give use_cache=False"
            )
        if use_cache is None:
            unasked = self.training or recomputing or (output_hidden_states and patched)
            use_cache = self.config.use_cache and not unasked
        if cache is not None:
            _checked(cache)
        elif use_cache:
            cache = StlmCache()

        past = cache.get_seq_length() if cache is not None else 0
        real_BT = _real(attention_mask, inputs, past, cache)
        _check_positions(position_ids, real_BT, cache)
        if output_hidden_states and patched and not bool(real_BT.all()):
            raise ValueError("output_hidden_states: the patches of rows with padding do not fit together; leave it out")
        keep = _kept(logits_to_keep, inputs.size(1), labels)
        auxiliary: dict[str, Tensor] = {}
        with _recorded(self.network, output_hidden_states) as hidden:
            if cache is not None:
                logits_BTV = self._read_on(cache, inputs, real_BT, keep, hidden)
            else:
                logits_BTV, auxiliary = self._read_whole(inputs, real_BT, keep, hidden)
        loss = None
        if labels is not None:
            options = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            options |= {} if shift_labels is None else {"shift_labels": shift_labels}
            if past == 0:  # the first id after padding follows none
                labels = labels.masked_fill(real_BT.long().cumsum(1).to(labels.device) <= 1, -100)
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **options)
            if self.training and auxiliary:
                ids = real_BT.sum() if num_items_in_batch is None else num_items_in_batch
                loss = loss + sum(auxiliary.values()) / ids
        states = tuple(hidden.states) if output_hidden_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, cache=cache, hidden_states=states)

    def _refuse(self, others: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for arguments that this model does not support."""
        others = {name: value for name, value in others.items() if value is not None and value is not False}
        if others.pop("output_attentions", False) or self.config.output_attentions:
            raise ValueError("output_attentions: this model gives out no attention weights; leave it out")
        types = others.pop("token_type_ids", None)
        if types is not None and bool(types.any()):
            raise ValueError("token_type_ids: this model knows no types of ids; leave them out")
        if others:
            raise TypeError(f"StlmForCausalLM.forward: it knows nothing of {', '.join(sorted(others))}; leave it out")

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return the inputs: ids [B, T] or their vectors [B, T, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids: got the shape {list(input_ids.shape)}, expected [batch, length]")
            return input_ids
        embedder = self.network.embedder
        if embedder.patches or embedder.ngrams is not None or self.config.spellings is not None:
            raise ValueError(
                "inputs_embeds: this model reads more of an id than its vector (patches, n-grams or its bytes); give "
                "input_ids"
            )
        return inputs_embeds

    def _vectors(self, inputs: Tensor) -> Tensor:
        return self.network.embedder.table(inputs) if inputs.ndim == 2 else inputs

    def _network_reads(
        self, inputs: Tensor, state: DecodingState | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits [B, N, V], or only the wanted ones, and loss terms. `state`, if given, is advanced."""
        ids_BN, table = inputs, self.network.embedder.table
        with ExitStack() as stack:
            if inputs.ndim == 3:  # use these vectors instead of the table's
                ids_BN = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
                replaced = table.register_forward_hook(lambda module, given, found: inputs)
                stack.callback(replaced.remove)
            output = self.network.read(ids_BN, Context(wanted=wanted), state)
        if state is not None:
            state.read(ids_BN.size(1))
        return output.logits, output.auxiliary

    def _read_whole(
        self, inputs: Tensor, real_BT: Tensor, keep: Tensor | None, hidden: Hidden
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits of texts read from their beginning in one pass, and loss terms."""
        if bool(real_BT.all()):
            if keep is None:
                logits_BTV, auxiliary = self._network_reads(inputs)
            else:
                kept, order = keep.unique(return_inverse=True)
                wanted_BT = torch.zeros_like(real_BT)
                wanted_BT[:, kept] = True
                logits, auxiliary = self._network_reads(inputs, wanted=wanted_BT)
                logits_BTV = logits.unflatten(0, (inputs.size(0), len(kept)))[:, order]
            hidden.finish(lambda states_BTD: states_BTD)
            return logits_BTV, auxiliary
        front_BT = (~real_BT).long().argsort(dim=1, stable=True)  # positions without padding first
        place_BT = real_BT.long().cumsum(1) - 1
        logits_BTV, auxiliary = self._network_reads(_taken(inputs, front_BT))
        hidden.finish(lambda states_BTD: _at(states_BTD, place_BT))
        place_BT = place_BT if keep is None else place_BT[:, keep]
        return _at(logits_BTV, place_BT), auxiliary

    def _read_on(
        self, cache: StlmCache, inputs: Tensor, real_BN: Tensor, keep: Tensor | None, hidden: Hidden
    ) -> Tensor:
        """Return logits of inputs that follow a cache; positions that `crop` left unread are read again."""
        cache.mark()
        if cache.inputs is not None and cache.inputs.ndim != inputs.ndim:  # ids before, vectors now, or the reverse
            cache.inputs, inputs = self._vectors(cache.inputs), self._vectors(inputs)
        cache.append(inputs, real_BN)
        assert cache.inputs is not None and cache.real is not None
        again = cache.inputs.size(1) - inputs.size(1) - cache.read
        pending, real = cache.inputs[:, cache.read :], cache.real[:, cache.read :]
        if bool(real.all()):
            if cache.state is None:
                cache.state = self.network.new_state(pending.size(0))
            logits_BNV, _ = self._network_reads(pending, cache.state)
            hidden.finish(lambda states_BND: states_BND[:, again:])
        else:
            logits_BNV = self._read_apart(cache, pending, real)
            hidden.finish(lambda states_BND: states_BND[:, again:], real)
        cache.last, cache.read = logits_BNV[:, -1].detach(), cache.inputs.size(1)
        logits_BNV = logits_BNV[:, again:]
        return logits_BNV if keep is None else logits_BNV[:, keep]

    def _read_apart(self, cache: StlmCache, inputs: Tensor, real_BN: Tensor) -> Tensor:
        """Return logits as `_read_on`, one row at a time, for rows with different numbers of ids."""
        before, zero = cache.state, torch.zeros(1, dtype=torch.long)
        states, logits = [], []
        for row, own_N in enumerate(real_BN):
            state = self.network.new_state(1) if before is None else before.select(torch.tensor([row]))
            own = inputs[row : row + 1, own_N]
            read_NV = inputs.new_zeros((0, self.config.vocab_size), dtype=self.dtype)
            if own.size(1):
                read_NV = self._network_reads(own, state)[0][0]
            elif before is None:
                raise ValueError(f"attention_mask: all of row {row} is masked; expected at least one id in every row")
            first_V = read_NV.new_zeros(self.config.vocab_size) if cache.last is None else cache.last[row]
            logits.append(torch.cat((first_V[None], read_NV))[own_N.long().cumsum(0)])
            states.append(state)
        cache.state = self.network.join([(state, zero) for state in states])
        return torch.stack(logits)


class Backbone:
    """A model without its last matrix, returning the vectors before it, as TRL's trainers need it."""

    def __init__(self, model: StlmForCausalLM) -> None:
        self.model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        model = self.model
        if isinstance(model.network.head, PublishedHead):
            raise ValueError("StlmForCausalLM: the head of this model spells ids; no matrix has a row for each")
        if use_cache:
            raise ValueError("use_cache: the model without its head keeps no cache; give use_cache=False")
        position_ids = others.pop("position_ids", None)
        model._refuse(others)
        inputs = model._inputs(input_ids, inputs_embeds)
        real_BT = _real(attention_mask, inputs, 0, None)
        _check_positions(position_ids, real_BT, None)
        found: list[Tensor] = []
        hook = model.network.head.output.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        try:
            _, auxiliary = model._network_reads(_taken(inputs, (~real_BT).long().argsort(dim=1, stable=True)))
        finally:
            hook.remove()
        if model.training and auxiliary:
            raise ValueError(
                f"StlmForCausalLM: its loss has terms of its own ({', '.join(auxiliary)}), which a trainer that makes "
                "the loss by itself would leave out; train it with transformers.Trainer"
            )
        return BaseModelOutputWithPast(last_hidden_state=_at(found[0], real_BT.long().cumsum(1) - 1))


class Hidden:
    """Hidden states of the core: one record for each of its runs, with the states before the first layer and after each
    layer, the last replaced by the core's output."""

    def __init__(self) -> None:
        self.records: list[list[Tensor]] = []
        self.states: list[Tensor] = []

    def finish(self, place: Callable[[Tensor], Tensor], real_BN: Tensor | None = None) -> None:
        """Set `states`, [B, T, D] each, from the records; with `real_BN`, each record is of one row."""
        for layer in zip(*(record[:-2] + record[-1:] for record in self.records), strict=True):
            if real_BN is None:
                (states_BND,) = layer
            else:
                rows, place_BN = iter(layer), real_BN.long().cumsum(1) - 1
                empty = layer[0][0, :0]
                found = [next(rows)[0] if bool(own_N.any()) else empty for own_N in real_BN]
                states_BND = _at(pad_sequence(found, batch_first=True), place_BN)
            self.states.append(place(states_BND))


@contextmanager
def _recorded(network: Network, wanted: bool) -> Iterator[Hidden]:
    """Record the core's states inside the `with` block, if wanted."""
    hidden = Hidden()
    with ExitStack() as stack:
        if wanted:

            def begin(module: nn.Module, given: tuple[Any, ...]) -> None:
                hidden.records.append([given[0]])

            def note(module: nn.Module, given: tuple[Any, ...], found: Tensor) -> None:
                hidden.records[-1].append(found)

            hooks = [network.core.register_forward_pre_hook(begin), network.core.register_forward_hook(note)]
            blocks: Any = network.core.get_submodule("stack.blocks")
            hooks += [block.register_forward_hook(note) for block in blocks]
            for hook in hooks:
                stack.callback(hook.remove)
        yield hidden


def tied(model: nn.Module) -> dict[str, str]:
    """Return the names of tied parameters: {other name: first name}."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            names[name] = first[id(parameter)]
    return names


def _checked(cache: Any) -> StlmCache:
    if not isinstance(cache, StlmCache):
        raise TypeError(
            f"cache: got a {type(cache).__name__}, expected the StlmCache that this model returned, or None"
        )
    return cache


def _real(mask: Tensor | None, inputs: Tensor, past: int, cache: StlmCache | None) -> Tensor:
    """Return bool [B, T], False for padding, from a mask over the inputs and those that the cache has read."""
    batch, length = inputs.shape[:2]
    if mask is None:
        return torch.ones((batch, length), dtype=torch.bool, device=inputs.device)
    if mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask: got the shape {list(mask.shape)}, expected {[batch, past + length]}: a row of zeros and "
            "ones for each text, over what the cache has read as well"
        )
    real = mask.bool().to(inputs.device)
    if cache is not None and cache.real is not None and not torch.equal(real[:, :past], cache.real):
        raise ValueError("attention_mask: it masks other positions than those that the cache was filled with")
    return real[:, past:]


def _check_positions(position_ids: Tensor | None, real_BT: Tensor, cache: StlmCache | None) -> None:
    """Raise ValueError for positions other than the network's own, which count ids from 0."""
    if position_ids is None:
        return
    counted_B1: Tensor | int = 0
    if cache is not None and cache.real is not None:
        counted_B1 = cache.real.sum(1, keepdim=True)
    expected_BT = counted_B1 + real_BT.long().cumsum(1) - 1
    got_BT = position_ids.to(real_BT.device).expand(expected_BT.shape)
    if not torch.equal(got_BT[real_BT], expected_BT[real_BT]):
        raise ValueError("position_ids: this model counts positions by itself, from 0 on in every row; leave them out")


def _kept(logits_to_keep: int | Tensor, length: int, labels: Tensor | None) -> Tensor | None:
    """Return the positions whose logits are wanted; None: all."""
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return None
    if labels is not None:
        raise ValueError("logits_to_keep: the loss needs the logits of all positions; leave it out, or labels")
    if isinstance(logits_to_keep, Tensor):
        kept = logits_to_keep.long()
        return torch.where(kept < 0, kept + length, kept)
    return torch.arange(max(0, length - logits_to_keep), length)


def _taken(inputs: Tensor, place_BT: Tensor) -> Tensor:
    """Return ids or vectors at the given places of their rows."""
    return inputs.gather(1, place_BT if inputs.ndim == 2 else place_BT[..., None].expand_as(inputs))


def _at(x_BND: Tensor, place_BT: Tensor) -> Tensor:
    """Return vectors at the given places of their rows, [B, T, D]; zeros where a place is below 0."""
    found_BTD = x_BND.gather(1, place_BT.clamp(min=0)[..., None].expand(-1, -1, x_BND.size(2)))
    return found_BTD * (place_BT >= 0)[..., None]
