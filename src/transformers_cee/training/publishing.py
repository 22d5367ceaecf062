# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""🤗 Trainer that publishes the model and its card, and nothing else that lies in the folder of a run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from transformers_cee.hub.publishing import upload
from transformers_cee.stalls import stalls_end


class PublishingTrainer(Trainer):
    """🤗 Trainer whose `push_to_hub` uploads what `published_files` lists. Saved checkpoints are not published: of
    `hub_strategy`, "every_save" (Trainer's default) does what "end" does.

    Raises:
        ValueError: a `hub_strategy` that publishes checkpoints, which hold the states of optimizers and a token.
    """

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy`='{args.hub_strategy.value}' would publish what a resumed training needs; accepted "
                "are 'end' and 'every_save'. To resume elsewhere, copy `output_dir`."
            )
        # Asks for the repository.
        with stalls_end() if args.push_to_hub else nullcontext():
            super().__init__(model=model, args=args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the model, its tokenizer and its card in `output_dir` and uploads these, and the pictures of the card.
        Arguments and result as in `Trainer.push_to_hub`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        with stalls_end():
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, **({} if private is None else {"private": private}))
            self.save_model(_internal_call=True)
            if not self.is_world_process_zero():
                return None
            named = kwargs.pop("model_name", None) or (self.args.hub_model_id or "").split("/")[-1]
            tags = kwargs.pop("tags", None) or []
            tags = [tags] if isinstance(tags, str) else list(tags)
            tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
            self.create_model_card(
                model_name=named or Path(self.args.output_dir).absolute().name,
                **({"tags": tags} if tags else {}),
                **kwargs,
            )
        return self._upload(self.args.output_dir, commit_message, not blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint is of one phase, and Trainer would upload `training_args.bin` with it."""

    def _upload(self, folder: str, message: str | None, in_background: bool, token: Any, revision: str | None) -> Any:
        return upload(
            folder,
            self.hub_model_id,
            processing_class=self.processing_class,
            token=token,
            commit_message=message,
            run_as_future=in_background,
            revision=self.args.hub_revision if revision is None else revision,
        )
