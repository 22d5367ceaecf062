# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`generate` with exits, by the hooks of transformers' own `GenerationMixin`."""

import copy
import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.utils import ModelOutput, logging

from transformers_cee.exits.arguments import check_exit_names
from transformers_cee.exits.cache_name import CACHE_NAME, PEFT_CACHE_NAME, rename_cache
from transformers_cee.exits.configuration import check_min_exit_layer, check_skipped_kv
from transformers_cee.exits.criteria import CRITERIA, ExitCriterion
from transformers_cee.exits.deciding import ExitDecision, model_criterion, resolve_decision
from transformers_cee.exits.numbers import plain
from transformers_cee.generation.account import ExitAccount, open_account
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.decay import check_decay, decayed
from transformers_cee.generation.decoding import complete_waiting
from transformers_cee.generation.drafters import EARLY_EXIT, LOOKUP, check_exit_verify, open_verification
from transformers_cee.generation.ways import asked_in, check_caches, check_way_to_generate


logger = logging.get_logger(__name__)

EXIT_ARGUMENTS = (
    "exit_threshold",
    "exit_criterion",
    "exit_budget",
    "min_exit_layer",
    "skipped_kv",
    "exit_threshold_decay",
    "exits_must_pay",
    "exit_verify",
)


@dataclass
class ExitTrace:
    """What one call of `generate` carries from step to step.

    Args:
        settings (`dict`, *optional*):
            Exit arguments of the decode steps, with what was decided as `exit_threshold`; None if no token may leave.
        decay (`float`, *optional*): `exit_threshold_decay`.
        exit_layers (`list[Tensor]`): exit layers (rows · beams,) of each new token; the first is the prompt's pass.
        ended (`list[Tensor]`): per new token, which rows (rows,) it ended.
        prompt_length, max_length (`int`): tokens of the prompt, and at most in all.
        pads_ended (`bool`): does a row that ended get padding?
        cache (`EarlyExitCache`, *optional*): the cache in use.
        account (`ExitAccount`, *optional*): what exits cost and save, where they must pay.
    """

    settings: dict[str, Any] | None = None
    decay: float | None = None
    exit_layers: list[Tensor] = field(default_factory=list)
    ended: list[Tensor] = field(default_factory=list)
    prompt_length: int = 0
    max_length: int = 0
    pads_ended: bool = False
    cache: EarlyExitCache | None = None
    account: ExitAccount | None = None
    # Of a verified call, which transformers does not hand on to stopping criteria.
    tokenizer: Any = None


# Of the innermost call of `generate`. As an argument it would also reach models that assist this one and know nothing
# of it; on the model it would outlive the call and be shared by threads.
_TRACE: ContextVar[ExitTrace | None] = ContextVar("exit_trace", default=None)


# What `generate` hands on to every step for ways to decode, and layers have no use for.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")


class EarlyExitGenerationMixin(GenerationMixin):
    """[`~transformers.GenerationMixin`] whose decode steps leave early. The prompt always runs at full depth.

    `generate` takes, as arguments, in a `GenerationConfig`, or from the model's saved defaults (generation config
    first, then config):

    - `exit_threshold`, `exit_criterion`, `exit_budget`, `min_exit_layer`, `skipped_kv`: see `DecoderExitConfigMixin`;
      `exit_threshold` may also be the name of one of `config.exit_operating_points`.
    - `exit_threshold_decay` (`float`): τ of CALM's decaying threshold `0.9·λ + 0.1·exp(−τ·t/N)`, clipped to [0, 1], at
      the t-th of at most N new tokens: the first tokens leave later, since errors there spoil all that follows.
    - `exits_must_pay` (`bool`, defaults to False): a step runs without exits while asking them has cost this call more
      layers than it saved, see [`ExitAccount`]. The call is then slower than without exits by what they cost in two
      steps and a hundredth at most; but where a token leaves depends on the rows beside it and the tokens before it,
      and a promise, which is about walks that ask every exit, does not hold.
    - `exit_verify` (`bool`, defaults to False): nothing leaves, but tokens are drafted, and the whole model verifies
      several at a time: the text is the one that it writes without exits. Who drafts is said as in transformers:
      `prompt_lookup_num_tokens` (what followed the same tokens before, of up to `max_matching_ngram_size`), and
      `assistant_early_exit` (the layer whose exit drafts up to `num_assistant_tokens`, while `exit_threshold` lets
      them leave there). The output then has `proposed_drafts` and `accepted_drafts` (rows, passes), −1 where a row had
      stopped; other choices of a first draft count as that draft. It also has `tokens_per_pass`, and
      `expected_speedup`, what the measured costs say of these passes.

    With `return_dict_in_generate=True` the output also has `exit_layers` (rows, new tokens): the layer (1-based) of
    each new token; the first comes from the prompt's pass at full depth; 0 behind the end of a row.
    """

    @classmethod
    def can_generate(cls) -> bool:
        """Transformers looks for its own mixin among a class's direct bases."""
        return True

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, with the arguments named above.

        Raises:
            ValueError: an exit argument is out of range, or exits meet a way to generate that does not support them:
                drafting assistants, static or quantized caches, `use_cache=False`.
        """
        rename_cache(kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # Transformers counts positions by adding it up.
            kwargs["attention_mask"] = (mask != 0).long()
        for config in (generation_config, self.generation_config):
            if config is not None:
                check_exit_names(config, EXIT_ARGUMENTS)
        asked = {name: kwargs.pop(name, None) for name in EXIT_ARGUMENTS}
        settings = self._exit_settings(asked, generation_config, self.generation_config)
        trace = ExitTrace()
        decision = self._decision(settings)
        if check_exit_verify(settings.get("exit_verify")):
            return self._generate_verified(decision, settings, inputs, generation_config, *args, **kwargs)
        if decision is not None:
            self.check_walk(rows_leave=True)
            trace.decay = settings.get("exit_threshold_decay")
            trace.settings = {name: settings.get(name) for name in ("min_exit_layer", "skipped_kv")}
            trace.settings["exit_threshold"] = replace(decision, is_checked=True)
            if settings.get("exits_must_pay"):
                if decision.asks_all:
                    logger.warning_once(
                        "`exits_must_pay`=True skips exits where asking them has not paid, and the promise of the "
                        "operating point is about walks that ask all."
                    )
                trace.account = self._open_account(decision, settings.get("min_exit_layer"))
            given = inspect.signature(GenerationMixin.generate).bind(self, inputs, generation_config, *args, **kwargs)
            check_way_to_generate(asked_in({**given.arguments, **kwargs}, generation_config, self.generation_config))
        outer = _TRACE.set(trace)
        try:
            output = super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            _TRACE.reset(outer)
        if trace.cache is not None and (isinstance(output, ModelOutput) or kwargs.get(CACHE_NAME) is not None):
            # Whoever looks at the cache next expects all keys and values.
            complete_waiting(self.as_decoder, trace.cache)
        if isinstance(output, ModelOutput) and trace.exit_layers:
            output["exit_layers"] = _layers_of_tokens(trace, output)
        return output

    def _generate_verified(
        self,
        decision: ExitDecision | None,
        settings: dict[str, Any],
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.check_walk(rows_leave=True)
        given = inspect.signature(GenerationMixin.generate).bind(self, inputs, generation_config, *args, **kwargs)
        ask = asked_in({**given.arguments, **kwargs}, generation_config, self.generation_config)
        check_caches(ask)
        verification = open_verification(self, ask, decision, settings, ask("streamer"))
        # Transformers would take them for its own way to draft.
        for name in (LOOKUP, EARLY_EXIT):
            kwargs.pop(name, None)
            if getattr(generation_config or self.generation_config, name, None) is not None:
                generation_config = copy.deepcopy(generation_config or self.generation_config)
                setattr(generation_config, name, None)
        kwargs["custom_generate"] = verification
        outer = _TRACE.set(ExitTrace(tokenizer=kwargs.pop("tokenizer", None)))
        try:
            output = super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            _TRACE.reset(outer)
        return verification.noted(output) if isinstance(output, ModelOutput) else output

    # The two hooks of transformers that are no part of its public interface.

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> StoppingCriteriaList:
        trace = _TRACE.get()
        if trace is not None and trace.tokenizer is not None:
            kwargs["tokenizer"] = trace.tokenizer
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if trace is None:
            return criteria
        trace.max_length = generation_config.max_length
        trace.pads_ended = generation_config.eos_token_id is not None
        return _NotedCriteria(criteria, trace)

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        trace = _TRACE.get()
        if trace is not None and outputs.get("exit_layers") is not None:
            if trace.account is not None:
                trace.account.note(outputs["exit_layers"][:, -1])
            # Several at once where drafts were checked.
            trace.exit_layers += [outputs["exit_layers"][:, -1]] * int(num_new_tokens)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step; those of the prompt's pass, in one or many chunks, have no exits."""
        # `generate` takes `inputs_embeds` only where it finds it named here.
        rename_cache(kwargs)
        for name in _OF_GENERATE:
            kwargs.pop(name, None)
        trace = _TRACE.get()
        if trace is not None and trace.settings is not None and not trace.exit_layers:
            self.check_length(input_ids.shape[1], trace.max_length)
        if trace is not None and trace.settings is not None and kwargs.get(CACHE_NAME) is not None:
            layers = self.config.num_hidden_layers
            trace.cache = EarlyExitCache.from_cache(kwargs[CACHE_NAME], layers, self.layer_types)
            kwargs[CACHE_NAME] = trace.cache
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration:
            for name in EXIT_ARGUMENTS:
                inputs.pop(name, None)
        # Older versions of transformers do not tell chunks of a prompt from decode steps.
        elif trace is not None and trace.settings is not None and trace.exit_layers:
            inputs.update(trace.settings)
            if trace.account is not None and not trace.account.ask():
                decision = trace.settings["exit_threshold"]
                inputs["exit_threshold"] = replace(decision, threshold=CRITERIA[decision.criterion].off)
            elif trace.decay is not None:
                new = len(trace.exit_layers)
                most = max(1, trace.max_length - trace.prompt_length)
                decision = trace.settings["exit_threshold"]
                threshold = decayed(decision.threshold, trace.decay, new / most)
                inputs["exit_threshold"] = replace(decision, threshold=threshold)
        # PEFT wraps this method and looks at what it gives.
        rename_cache(inputs, PEFT_CACHE_NAME)
        return inputs

    def _exit_settings(self, *sources: Any) -> dict[str, Any]:
        """Exit arguments from mappings and configs, first come first; the model's config comes last.

        The first source that has a threshold or a budget settles both, and, unless it is a number, the criterion. A
        threshold beside a criterion is that criterion's alone.
        """
        settings: dict[str, Any] = {}
        for source in (*sources, self.config):
            get = source.get if isinstance(source, dict) else partial(getattr, source)
            found = {name: value for name in EXIT_ARGUMENTS if (value := get(name, None)) is not None}
            for name in self._settled(settings, found, source is self.config):
                found.pop(name, None)
            for name, value in found.items():
                settings.setdefault(name, plain(value))
        return settings

    def _settled(self, settings: dict[str, Any], found: dict[str, Any], is_default: bool) -> list[str]:
        """Names that a source has no say in, after what earlier sources said."""
        names = []
        criterion = settings.get("exit_criterion")
        if criterion is not None and found.get("exit_criterion", criterion) != criterion:
            names.append("exit_threshold")
        if "exit_threshold" in settings or "exit_budget" in settings:
            names += ["exit_threshold", "exit_budget"]
        elif settings.get("exit_criterion", "policy") != "policy":
            # A budget is the policy's.
            names.append("exit_budget")
        elif is_default and "exit_budget" in found:
            names.append("exit_threshold")
        if is_default or "exit_budget" in settings or isinstance(settings.get("exit_threshold"), str):
            # The config's own criterion is what `forward` takes where none is given.
            names.append("exit_criterion")
        return names

    def _decision(self, settings: dict[str, Any]) -> ExitDecision | None:
        """Checks the settings, before any layer runs, and decides for all steps; None if no token could leave."""
        asked = {name: settings.get(name) for name in ("exit_threshold", "exit_criterion", "exit_budget")}
        decision = resolve_decision(self.config, **asked)
        criterion = self._criterion(decision)
        must_pay = settings.get("exits_must_pay", False)
        if not isinstance(must_pay, bool):
            raise ValueError(f"`exits_must_pay`={must_pay!r} must be True or False.")
        check_skipped_kv(settings["skipped_kv"])
        check_min_exit_layer(settings.get("min_exit_layer"), self.config.num_hidden_layers)
        decay = settings.get("exit_threshold_decay")
        if decay is not None:
            check_decay(decay, criterion.name)
            if asked["exit_budget"] is not None or isinstance(asked["exit_threshold"], str):
                raise ValueError("`exit_threshold_decay` needs `exit_threshold` as a number or a list of numbers.")
        return None if criterion.is_off else decision

    def _criterion(self, decision: ExitDecision) -> ExitCriterion:
        # The tokens of the steps are not known yet.
        no_tokens = torch.empty(0, 1, dtype=torch.long, device=self.device)
        return model_criterion(self, decision, input_ids=no_tokens)

    def _open_account(self, decision: ExitDecision, min_exit_layer: int | None) -> ExitAccount:
        return open_account(self, self._criterion(decision), self.first_exit(min_exit_layer))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; exit arguments in the generation config are saved with it."""
        if any(getattr(self.generation_config, name, None) is not None for name in EXIT_ARGUMENTS):
            # Entries of a generation config that was only made from the config are dropped when it is read back.
            self.generation_config._from_model_config = False
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    # Continuous batching packs the tokens of all requests into one row and knows nothing of exits.

    def generate_batch(
        self, inputs: Any, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `GenerationMixin.generate_batch`. Raises `ValueError` unless exits are off."""
        self._refuse_continuous_batching(generation_config, kwargs)
        return super().generate_batch(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `GenerationMixin.init_continuous_batching`. Raises `ValueError` unless exits are off."""
        self._refuse_continuous_batching(generation_config, kwargs)
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _refuse_continuous_batching(self, given: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        settings = self._exit_settings(
            {name: kwargs.pop(name, None) for name in EXIT_ARGUMENTS}, given, self.generation_config
        )
        if self._decision(settings) is not None:
            name = "exit_budget" if "exit_budget" in settings else "exit_threshold"
            raise ValueError(
                f"`{name}`={settings[name]!r} has no effect in continuous batching; set `exit_threshold`=1.0, or use "
                "`generate` on a padded batch."
            )


class _NotedCriteria(StoppingCriteriaList):
    """Stopping criteria that note which rows they end."""

    def __init__(self, criteria: StoppingCriteriaList, trace: ExitTrace) -> None:
        super().__init__(criteria)
        self.trace = trace

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ends: Tensor = super().__call__(input_ids, *args, **kwargs)
        if not self.trace.exit_layers:
            # Older versions of transformers ask about drafts before a first pass has checked them.
            return ends
        if not self.trace.ended:
            self.trace.prompt_length = input_ids.shape[1] - len(self.trace.exit_layers)
        self.trace.ended.append(ends)
        return ends


def _layers_of_tokens(trace: ExitTrace, output: ModelOutput) -> Tensor:
    """Exit layers (rows, new tokens) of the sequences that are returned."""
    new = output["sequences"][:, trace.prompt_length :]
    layers = torch.stack(trace.exit_layers, dim=1)[:, : new.shape[1]]
    beams = output.get("beam_indices")
    if beams is not None:
        # A returned sequence passed through one beam after the other.
        return layers.gather(0, beams.clamp_min(0).long()) * (beams >= 0)
    # One row alone ends with its last token, also where several come at once.
    if len(new) == 1 or not trace.pads_ended:
        return layers
    ended = torch.stack(trace.ended[: new.shape[1]], dim=1).long()
    return layers.masked_fill(ended.cumsum(1) - ended > 0, 0)
