"""A super tiny language model for transformers.

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from stlm.export.remote.cache import StlmCache, checked_cache
from stlm.export.remote.configuration import StlmConfig
from stlm.export.remote.hidden_states import HiddenStates, record_hidden_states
from stlm.export.remote.positions import check_position_ids, kept_positions, real_positions, take_inputs, take_states
from stlm.model import Context, DecodingState, PublishedHead, initialize
from stlm.model.core.recomputation import Layers

GENERATE_ARGUMENTS = ("tokenizer", "assistant_tokenizer", "assistant_model", "inputs_tensor")


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
        self._tied_weights_keys = tied_names(self)
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
        raise NotImplementedError(
            "StlmForCausalLM: the embedding table cannot be replaced, as it is part of the architecture"
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("StlmForCausalLM: the head cannot be replaced, as it is part of the architecture")

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
            raise ValueError("assistant_early_exit: not supported by this model; leave it out")
        cache = model_kwargs.get("cache")
        if cache is not None:
            checked_cache(cache)._is_user_defined = True
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
        return {name: value for name, value in inputs.items() if name not in GENERATE_ARGUMENTS}

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
        self._check_arguments(others)
        inputs = self._inputs(input_ids, inputs_embeds)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        patched = self.network.embedder.patches
        recomputing = self.gradient_checkpointing and torch.is_grad_enabled()
        if use_cache and recomputing:
            raise ValueError("use_cache: layers that recompute activations keep no cache; give use_cache=False")
        if output_hidden_states and patched and (use_cache or cache is not None):
            raise ValueError(
                "output_hidden_states: with a cache, the rows of a model with patches have different numbers of "
                "positions; give use_cache=False"
            )
        if use_cache is None:
            default_off = self.training or recomputing or (output_hidden_states and patched)
            use_cache = self.config.use_cache and not default_off
        if cache is not None:
            checked_cache(cache)
        elif use_cache:
            cache = StlmCache()

        past = cache.get_seq_length() if cache is not None else 0
        real_BT = real_positions(attention_mask, inputs, past, cache)
        check_position_ids(position_ids, real_BT, cache)
        if output_hidden_states and patched and not bool(real_BT.all()):
            raise ValueError("output_hidden_states: rows with padding have different patches; leave it out")
        keep = kept_positions(logits_to_keep, inputs.size(1), labels)
        auxiliary: dict[str, Tensor] = {}
        with record_hidden_states(self.network, output_hidden_states) as hidden:
            if cache is not None:
                logits_BTV = self._read_with_cache(cache, inputs, real_BT, keep, hidden)
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

    def _check_arguments(self, others: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for arguments that this model does not support."""
        others = {name: value for name, value in others.items() if value is not None and value is not False}
        if others.pop("output_attentions", False) or self.config.output_attentions:
            raise ValueError("output_attentions: this model does not return attention weights; leave it out")
        types = others.pop("token_type_ids", None)
        if types is not None and bool(types.any()):
            raise ValueError("token_type_ids: this model has no token types; leave them out")
        if others:
            raise TypeError(f"StlmForCausalLM.forward: unknown argument {', '.join(sorted(others))}; leave it out")

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
                "inputs_embeds: this model also reads the ids themselves (patches, n-grams or bytes); give input_ids"
            )
        return inputs_embeds

    def _vectors(self, inputs: Tensor) -> Tensor:
        return self.network.embedder.table(inputs) if inputs.ndim == 2 else inputs

    def _run_network(
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
        self, inputs: Tensor, real_BT: Tensor, keep: Tensor | None, hidden: HiddenStates
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits of texts read from their beginning in one pass, and loss terms."""
        if bool(real_BT.all()):
            if keep is None:
                logits_BTV, auxiliary = self._run_network(inputs)
            else:
                kept, order = keep.unique(return_inverse=True)
                wanted_BT = torch.zeros_like(real_BT)
                wanted_BT[:, kept] = True
                logits, auxiliary = self._run_network(inputs, wanted=wanted_BT)
                logits_BTV = logits.unflatten(0, (inputs.size(0), len(kept)))[:, order]
            hidden.finish(lambda states_BTD: states_BTD)
            return logits_BTV, auxiliary
        front_BT = (~real_BT).long().argsort(dim=1, stable=True)  # positions without padding first
        place_BT = real_BT.long().cumsum(1) - 1
        logits_BTV, auxiliary = self._run_network(take_inputs(inputs, front_BT))
        hidden.finish(lambda states_BTD: take_states(states_BTD, place_BT))
        place_BT = place_BT if keep is None else place_BT[:, keep]
        return take_states(logits_BTV, place_BT), auxiliary

    def _read_with_cache(
        self, cache: StlmCache, inputs: Tensor, real_BN: Tensor, keep: Tensor | None, hidden: HiddenStates
    ) -> Tensor:
        """Return logits of inputs that follow a cache; positions that `crop` left unread are read again."""
        cache.record_snapshot()
        if cache.inputs is not None and cache.inputs.ndim != inputs.ndim:  # ids before, vectors now, or the reverse
            cache.inputs, inputs = self._vectors(cache.inputs), self._vectors(inputs)
        cache.append(inputs, real_BN)
        assert cache.inputs is not None and cache.real is not None
        again = cache.inputs.size(1) - inputs.size(1) - cache.read
        pending, real = cache.inputs[:, cache.read :], cache.real[:, cache.read :]
        if bool(real.all()):
            if cache.state is None:
                cache.state = self.network.new_state(pending.size(0))
            logits_BNV, _ = self._run_network(pending, cache.state)
            hidden.finish(lambda states_BND: states_BND[:, again:])
        else:
            logits_BNV = self._read_row_by_row(cache, pending, real)
            hidden.finish(lambda states_BND: states_BND[:, again:], real)
        cache.last, cache.read = logits_BNV[:, -1].detach(), cache.inputs.size(1)
        logits_BNV = logits_BNV[:, again:]
        return logits_BNV if keep is None else logits_BNV[:, keep]

    def _read_row_by_row(self, cache: StlmCache, inputs: Tensor, real_BN: Tensor) -> Tensor:
        """Return logits as `_read_with_cache`, one row at a time, for rows with different numbers of ids."""
        before, zero = cache.state, torch.zeros(1, dtype=torch.long)
        states, logits = [], []
        for row, own_N in enumerate(real_BN):
            state = self.network.new_state(1) if before is None else before.select(torch.tensor([row]))
            own = inputs[row : row + 1, own_N]
            read_NV = inputs.new_zeros((0, self.config.vocab_size), dtype=self.dtype)
            if own.size(1):
                read_NV = self._run_network(own, state)[0][0]
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
            raise ValueError("StlmForCausalLM: the head of this model spells ids, so no matrix has one row for each id")
        if use_cache:
            raise ValueError("use_cache: the base model keeps no cache; give use_cache=False")
        position_ids = others.pop("position_ids", None)
        model._check_arguments(others)
        inputs = model._inputs(input_ids, inputs_embeds)
        real_BT = real_positions(attention_mask, inputs, 0, None)
        check_position_ids(position_ids, real_BT, None)
        found: list[Tensor] = []
        hook = model.network.head.output.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        try:
            _, auxiliary = model._run_network(take_inputs(inputs, (~real_BT).long().argsort(dim=1, stable=True)))
        finally:
            hook.remove()
        if model.training and auxiliary:
            raise ValueError(
                f"StlmForCausalLM: its loss has further terms ({', '.join(auxiliary)}), which a trainer that computes "
                "the loss itself would omit; train it with transformers.Trainer"
            )
        return BaseModelOutputWithPast(last_hidden_state=take_states(found[0], real_BT.long().cumsum(1) - 1))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the names of tied parameters: {other name: first name}."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            names[name] = first[id(parameter)]
    return names
