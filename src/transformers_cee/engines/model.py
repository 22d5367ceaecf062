# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""An exported classifier: the same walk, over blocks that an engine runs."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_cee.calibration.cost_table import CostTable
from transformers_cee.calibration.exit_plans import ExitRates, known_plan, rates_at
from transformers_cee.engines.engine import Engine, Run
from transformers_cee.engines.graphs import (
    ALPHA,
    HIDDEN,
    HISTORY,
    LOGITS,
    MARGIN,
    MASK,
    PREDICTIONS,
    SCORE,
    STATE,
    Cut,
    token_inputs,
)
from transformers_cee.engines.record import EXITS, GRAPHS
from transformers_cee.engines.serving import save_serving
from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.outputs import ExitClassifierOutput
from transformers_cee.exits.recording import wants_states
from transformers_cee.exits.row_batch import AtExit, RowBatch
from transformers_cee.files import replacing
from transformers_cee.modeling.classification import Asked, Stack
from transformers_cee.modeling.flops import ItemFlops
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier


# Numbers of columns, and prices of a layer, are planned alike within this part of a doubling, at its middle.
PLANNED_PARTS = 4
# Exits are asked where they are expected to save this share of the time, and this share of what they would cost if
# nobody left. Costs and rates are measured, and not of the rows that come: plans that promise less are as often a
# loss.
LEAST_GAIN, LEAST_RETURN = 0.05, 1 / 3
_OF_PUSHING = ("commit_message", "private", "token", "revision", "create_pr", "commit_description", "tags")


@dataclass
class TokenBatch(RowBatch):
    """Rows before the first block, which takes tokens.

    Args:
        tokens (`dict[str, Tensor]`): what the first block takes beside the mask, each (rows, time).
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)


class ExportedSequenceClassifier(EarlyExitSequenceClassifier, PreTrainedModel):
    """A classifier with exits on an engine, as [`~EarlyExitSequenceClassifier.export`] writes it. Arguments and
    results of `forward` are those of the model it was made of, in evaluation; it cannot be trained, has no embeddings,
    and gives neither hidden states nor attentions. It stays on its engine's device, which `from_pretrained` is told,
    and in its precision; inputs come to it, and results lie there.

    Args:
        config (`PreTrainedConfig`): that of the model, with the record `exit_engine`.
        engine ([`Engine`]): runs the blocks.
    """

    config_class = PreTrainedConfig
    # What layers and checks cost here, and how many rows come past the exits: with both, exits that cannot pay for
    # the size of a batch are not asked.
    costs: CostTable | None = None
    rates: Sequence[ExitRates] = ()
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: Any, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine
        # Blocks are made when they are first run.
        self.blocks: dict[Cut, Run] = {}
        self.inputs = token_inputs(config)
        super().to(self.device)
        self.eval()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the engine runs, and with it policies and estimators."""
        return torch.device(self.engine.device)

    def to(self, *args: Any, **kwargs: Any) -> ExportedSequenceClassifier:
        """The model as it is: pipelines and trainers move what they are given."""
        return self

    def add_stock(self, config: Any) -> None:
        """Nothing: the layers are the engine's."""

    def add_heads(self, config: Any) -> None:
        """Nothing: heads are part of the engine's graphs."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: weights are loaded."""

    @property
    def most_tokens(self) -> int | None:
        most: int | None = self.record["most_tokens"]
        return most

    @property
    def record(self) -> dict[str, Any]:
        """What the export has noted, see `exit_engine` of the config."""
        record: dict[str, Any] = self.config.exit_engine
        return record

    def train(self, mode: bool = True) -> ExportedSequenceClassifier:
        """Raises `ValueError` for the training mode."""
        if mode:
            raise ValueError(f"A model exported to {self.record['engine']!r} cannot be trained; train the original.")
        return super().train(False)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves the exported model with all that was fitted on it since: a copy of the engine's files, the policies
        and estimators, the costs, and the config.

        Args:
            save_directory (`str` or `os.PathLike`): folder, made when missing.
            push_to_hub (`bool`, *optional*, defaults to `False`): also publish it, as `push_to_hub` does.
            kwargs: those of `push_to_hub`, `repo_id` by default the folder's name. Others of
                `PreTrainedModel.save_pretrained` are about weights, which are the engine's, and have no effect.
        """
        self.config.exit_layers = list(self.layer_numbers)
        self.config.check_exits()
        folder, source = Path(save_directory), self.engine.folder.parent
        (folder / GRAPHS).mkdir(parents=True, exist_ok=True)
        graphs = [name for name in self.record["files"] if name.startswith(f"{GRAPHS}/")]
        if folder.resolve() != source.resolve():
            for name in graphs:
                # Whoever has the old one open keeps it.
                with replacing(folder / name) as beside:
                    shutil.copyfile(source / name, beside)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with replacing(folder / EXITS) as beside:
            save_file(tensors, beside)
        self.config.exit_engine = {**self.record, "files": [*graphs, *save_serving(self, folder)]}
        self.config.save_pretrained(folder)
        if push_to_hub:
            asked = {name: kwargs[name] for name in _OF_PUSHING if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or folder.name, **asked)

    def save_exits(self, *args: Any, **kwargs: Any) -> None:
        """Raises `ValueError`: exits are part of the engine's graphs."""
        raise ValueError(
            f"Exits that were exported to {self.record['engine']!r} are part of its graphs: `save_pretrained` saves "
            "them, `save_exits` those of the original."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedSequenceClassifier:
        """A model with a config, policies and estimators of its own, on the same engine, whose blocks never change."""
        made = memo[id(self)] = type(self)(copy.deepcopy(self.config, memo), self.engine)
        made.load_state_dict(self.state_dict())
        made.blocks, made.costs, made.rates = self.blocks, self.costs, self.rates
        made.name_or_path = self.name_or_path
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises `TypeError`: an engine belongs to its process."""
        raise TypeError(
            "An exported model cannot be pickled: its engine belongs to this process. Load it by its folder in the "
            "other one."
        )

    def estimator_changed(self, name: str) -> None:
        # The graphs have the old one: from now on the criterion is asked outside of them.
        if self.record["criterion"] == name:
            self.config.exit_engine = {**self.record, "criterion": None}
            self.costs, self.rates = None, ()

    def item_flops(self, length: int) -> ItemFlops:
        raise ValueError("FLOPs of an exported model are not counted; ask the model that it was exported from.")

    def check_walk(self, rows_leave: bool) -> None:
        """Blocks run for any rows."""

    def walked(self, walk: Any, layers: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        asked = [name for name, wanted in wants_states(self.config, arguments).items() if wanted]
        if asked:
            raise ValueError(f"`{asked[0]}`=True: an exported model does not give them; ask the original.")
        return {"run": walk(layers)}

    def classified(
        self, asked: Asked, embed: Callable[[], RowBatch], arguments: dict[str, Any]
    ) -> ExitClassifierOutput:
        given = {name: getattr(asked, name) for name in ("labels", "input_ids", "attention_mask")}
        here = {name: value.to(self.device) for name, value in given.items() if value is not None}
        return super().classified(replace(asked, **here), embed, arguments)

    def embed(self, attention_mask: Tensor | None, **given: Tensor | None) -> RowBatch:
        given = {name: None if value is None else value.to(self.device) for name, value in given.items()}
        ids = given.pop("input_ids")
        for name in ("inputs_embeds", "position_ids"):
            if given[name] is not None:
                raise ValueError(f"`{name}` is not taken by an exported model; give `input_ids` alone.")
        assert ids is not None
        self._check_tokens(ids)
        # Graphs take one type of numbers.
        tokens = {"input_ids": ids.long()}
        if "token_type_ids" in self.inputs:
            types = given["token_type_ids"]
            tokens["token_type_ids"] = torch.zeros_like(tokens["input_ids"]) if types is None else types.long()
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        return TokenBatch(ids, padding_mask=attention_mask, tokens=tokens)

    def _check_tokens(self, ids: Tensor) -> None:
        """Raises `ValueError` for what a graph may look up outside of its tables, without an error of its own."""
        most, columns = self.most_tokens, ids.shape[1]
        if most is not None and columns > most and not self.record.get("reads_longer", True):
            raise ValueError(
                f"`input_ids` has {columns} tokens in a row, and the model reads {most} at most: tokenize with "
                "`truncation=True`."
            )
        # On a GPU it would wait for the look.
        if self.device.type == "cpu" and ids.numel():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.config.vocab_size:
                wrong = int(low if low < 0 else high)
                raise ValueError(
                    f"`input_ids` holds {wrong}, and the model knows the tokens 0 to {self.config.vocab_size - 1}: is "
                    "it another model's tokenizer?"
                )

    def masked(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> RowBatch:
        # Blocks make of it what their layers take.
        return RowBatch(hidden_states, padding_mask=attention_mask)

    def stack(
        self, batch: RowBatch, arguments: dict[str, Any], criterion: ExitCriterion | None = None, first_exit: int = 0
    ) -> Stack:
        if criterion is None:
            return self._stack(range(self.last_exit), None, {STATE, LOGITS}, {STATE, LOGITS})
        asked = self.asked(batch, criterion, first_exit)
        gives, at_last = {STATE, LOGITS}, {LOGITS}
        in_graph = criterion.name == self.record["criterion"]
        if in_graph:
            gives = {LOGITS, SCORE}
            if criterion.has_memory:
                gives |= set(HISTORY)
        return self._stack(asked, criterion if in_graph else None, gives, at_last)

    def asked(self, batch: RowBatch, criterion: ExitCriterion, first_exit: int) -> Sequence[int]:
        """Internal exits (0-based) that a walk asks: those where rows may leave, and where the criterion remembers
        what it saw there; none where they would hardly save time."""
        if criterion.is_off or first_exit >= self.last_exit:
            return ()
        asked = [
            index
            for index in range(self.last_exit)
            if criterion.has_memory or (index >= first_exit and criterion.can_exit(index))
        ]
        rates = self._rates_of(criterion)
        if self.costs is None or rates is None or criterion.settings.asks_all:
            return asked
        limits = (*[criterion.off] * first_exit, *criterion.thresholds[first_exit:])
        rows, columns = batch.hidden_states.shape[:2]
        length = 2 ** (round(PLANNED_PARTS * math.log2(columns)) / PLANNED_PARTS)
        plan = known_plan(rates, limits, self.costs, rows, length)
        if plan.full_seconds - plan.seconds < max(LEAST_GAIN * plan.full_seconds, LEAST_RETURN * plan.in_vain):
            return ()
        return [index for index in asked if self.layer_numbers[index] in plan.exit_layers]

    def _rates_of(self, criterion: ExitCriterion) -> ExitRates | None:
        """Rates of a criterion, at its own price of a layer."""
        found = [rates for rates in self.rates if rates.criterion == criterion.name]
        alpha = criterion.settings.alpha
        if alpha is None and self.exit_policies.is_conditioned:
            alpha = self.exit_policies.default_alpha
        if alpha is None or len(found) < 2:
            return found[0] if found else None
        prices = tuple(sorted(found, key=lambda rates: rates.alpha or 0.0))
        if all(rates.alpha != alpha for rates in prices):
            # Nearby prices have one plan.
            alpha = 2 ** (round(PLANNED_PARTS * math.log2(alpha)) / PLANNED_PARTS)
        return rates_at(prices, alpha)

    def _stack(
        self, asked: Sequence[int], criterion: ExitCriterion | None, gives: set[str], at_last: set[str]
    ) -> Stack:
        blocks: list[Callable[[RowBatch], RowBatch]] = []
        start = 0
        for index in (*asked, self.last_exit):
            stop = self.layer_numbers[index]
            is_last = index == self.last_exit
            looks_back = criterion is not None and criterion.has_memory and bool(blocks) and not is_last
            cut = Cut(start, stop, frozenset(at_last if is_last else {HIDDEN, *gives}), looks_back)
            blocks.append(_Step(self.block(cut), cut, None if is_last else criterion))
            start = stop
        return Stack(blocks, [*(self.layer_numbers[index] for index in asked), start])

    def block(self, cut: Cut) -> Run:
        """A block, made when it is first asked for."""
        run = self.blocks.get(cut)
        if run is None:
            run = self.blocks[cut] = self.engine.block(cut)
        return run


class _Step:
    """One block of one walk.

    Args:
        run: the block.
        cut (`Cut`): what it is.
        criterion (`ExitCriterion`, *optional*): whose score its graph gives, and which remembers what was seen.
    """

    def __init__(self, run: Run, cut: Cut, criterion: ExitCriterion | None) -> None:
        self.run, self.cut, self.criterion = run, cut, criterion

    def __call__(self, batch: RowBatch) -> RowBatch:
        mask = batch.padding_mask
        if mask is None:
            mask = torch.ones(batch.hidden_states.shape[:2], dtype=torch.bool, device=batch.hidden_states.device)
        given = {MASK: mask}
        if isinstance(batch, TokenBatch) and self.cut.start == 0:
            given |= batch.tokens
        else:
            given[HIDDEN] = batch.hidden_states
        criterion: Any = self.criterion
        if criterion is not None and criterion.name == "policy":
            if criterion.networks.is_conditioned:
                alpha = criterion.networks.default_alpha if criterion.alpha is None else criterion.alpha
                given[ALPHA] = torch.tensor([alpha], dtype=torch.float32, device=mask.device)
            if self.cut.has_history:
                given[MARGIN], given[PREDICTIONS] = criterion.history.margin, criterion.history.predictions
        found = self.run(given)
        if MARGIN in found:
            criterion.history.margin, criterion.history.predictions = found[MARGIN], found[PREDICTIONS]
        at_exit = AtExit(found[LOGITS], found.get(STATE), found.get(SCORE))
        return replace(batch, hidden_states=found.get(HIDDEN, batch.hidden_states), at_exit=at_exit)
