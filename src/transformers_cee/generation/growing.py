# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Texts of one batch that grow by different numbers of tokens, for stopping criteria and streamers that know only
batches which grow by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import StoppingCriteriaList


if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


class KeptScores:
    """Scores (rows, vocabulary) of every new column, each row's as far as it has come and 0 behind that."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def put(self, places: Tensor, rows: Tensor, scores: Tensor, batch: int) -> None:
        """Keeps scores (entries, vocabulary) of columns (entries,) and rows (entries,) of a batch of so many rows."""
        known = 0 if self.held is None else len(self.held)
        needed = int(places.max()) + 1 if len(places) else 0
        if needed > known:
            room = scores.new_zeros(max(needed, 2 * known) - known, batch, scores.shape[-1])
            self.held = room if self.held is None else torch.cat((self.held, room))
        if self.held is not None:
            self.held[places, rows] = scores

    def first(self, columns: int) -> tuple[Tensor, ...]:
        """Of the first columns, (rows, vocabulary) each."""
        return () if self.held is None else self.held[:columns].unbind()


class GrowingTexts:
    """Rows of tokens, each with a length of its own.

    What stands behind a row's length means nothing. A row stops growing where it ends or is full; the batch is told to
    stopping criteria and the streamer column by column, as soon as every row that grows has one.

    Args:
        prompt (`LongTensor` of shape `(rows, prompt)`): all tokens before.
        most (`int`): columns that a row may have.
        spare (`int`): columns behind them, for drafts that are thrown away.
        criteria (`StoppingCriteriaList`): end rows.
        pad_token_id (`int`, *optional*): stands behind a row's end.
        streamer (`BaseStreamer`, *optional*): gets each column.
    """

    def __init__(
        self,
        prompt: Tensor,
        most: int,
        spare: int,
        criteria: StoppingCriteriaList,
        pad_token_id: int | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        rows, self.told = prompt.shape
        self.prompt, self.most, self.pad = prompt.shape[1], most, pad_token_id or 0
        self.criteria, self.streamer = criteria, streamer
        # Criteria that know the token which ends a row have it padded behind that.
        ends = [one.eos_token_id.to(prompt.device).flatten() for one in criteria if hasattr(one, "eos_token_id")]
        self.ends = torch.cat(ends) if ends else None
        self.tokens = prompt.new_full((rows, max(most, self.told) + 1 + spare), self.pad)
        self.tokens[:, : self.told] = prompt
        self.lengths = torch.full((rows,), self.told, device=prompt.device)
        self.grows = torch.ones(rows, dtype=torch.bool, device=prompt.device)
        self.goes_on = self.grows.clone()
        self._columns = torch.arange(self.tokens.shape[1], device=prompt.device)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> Tensor:
        """Drafts (rows,) that a row may get: one more token follows them."""
        return torch.where(self.grows, (self.most - self.lengths - 1).clamp_min(0), 0)

    @property
    def behind(self) -> Tensor:
        """The growing rows (rows,) that have come least far. A batch is done when its last row is: what others gain is
        no time gained."""
        lengths = self.lengths.masked_fill(~self.grows, self.tokens.shape[1])
        return self.grows & (lengths == lengths.min())

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values (rows, …) over the rows that are behind."""
        behind = self.behind
        return torch.tensordot(behind.to(torch.float), values.to(torch.float), 1) / behind.sum().clamp_min(1)

    def reach(self, counts: Tensor, most: int, chances: Tensor | None = None) -> list[float]:
        """Share of the rows behind that a first, second, … draft reaches, where rows can have so many (rows,), or
        tokens that such a row gets by it where it is accepted with such chances (rows, most)."""
        reached = counts.unsqueeze(1) > torch.arange(most, device=counts.device)
        shares: list[float] = self.mean(reached if chances is None else reached * chances).tolist()
        # The further, the fewer.
        return [share for share in shares if share > 0]

    def at(self, offsets: Tensor) -> Tensor:
        """Tokens (rows, columns) at offsets (rows, columns) from each row's length."""
        return self.tokens.gather(1, self.lengths.unsqueeze(1) + offsets)

    def last(self, columns: int) -> Tensor:
        """The last token of each row and what stands behind it, (rows, columns) in all."""
        return self.at(torch.arange(-1, columns - 1, device=self.tokens.device).expand(len(self), columns))

    def draft(self, tokens: Tensor) -> None:
        """Puts drafts (rows, columns) behind the rows that grow."""
        columns = tokens.shape[1]
        places = self.lengths.unsqueeze(1) + torch.arange(columns, device=tokens.device)
        self.tokens.scatter_(1, places, torch.where(self.grows.unsqueeze(1), tokens, self.tokens.gather(1, places)))

    def extend(self, accepted: Tensor, chosen: Tensor) -> None:
        """Rows that grow get so many of their drafts (rows,) and one chosen token (rows,)."""
        places = (self.lengths + accepted).unsqueeze(1)
        token = torch.where(self.grows.unsqueeze(1), chosen.unsqueeze(1), self.tokens.gather(1, places))
        self.tokens.scatter_(1, places, token)
        grown, ends = accepted + 1, torch.zeros_like(self.grows)
        if self.ends is not None:
            columns = torch.arange(int(accepted.max()) + 1, device=token.device).expand(len(self), -1)
            is_end = torch.isin(self.at(columns), self.ends) & (columns <= accepted.unsqueeze(1))
            ends = is_end.any(1) & self.grows
            grown = torch.where(ends, is_end.int().argmax(1) + 1, grown)
        self.lengths = torch.where(self.grows, self.lengths + grown, self.lengths)
        self._stop(ends, self.lengths)
        self.grows = self.grows & (self.lengths < self.most)

    def tell(self, scores: KeptScores | None = None) -> bool:
        """Tells criteria and streamer of new columns; are there rows that go on?

        Args:
            scores (`KeptScores`, *optional*): of new columns, as criteria get them.
        """
        while bool(self.goes_on.any()):
            # Rows that do not grow are padded as far as the others come.
            growing = self.lengths[self.grows]
            ready = int(growing.min() if len(growing) else self.lengths.max())
            if self.told >= ready:
                return True
            self.told += 1
            so_far = self.tokens[:, : self.told]
            if self.streamer is not None:
                self.streamer.put(so_far[:, -1].cpu())
            ends = self.criteria(so_far, None if scores is None else scores.first(self.told - self.prompt))
            self.goes_on = self.goes_on & ~ends
            if self.ends is not None:
                # Some rows may have come further than where they were to end.
                self._stop(ends & (self.lengths >= self.told), self.lengths.clamp_max(self.told))
        return False

    def _stop(self, rows: Tensor, lengths: Tensor) -> None:
        """Ends rows (rows,) at lengths (rows,), with padding behind."""
        self.lengths = torch.where(rows, lengths, self.lengths)
        self.grows = self.grows & ~rows
        self.tokens.masked_fill_(rows.unsqueeze(1) & (self._columns >= self.lengths.unsqueeze(1)), self.pad)

    @property
    def sequences(self) -> Tensor:
        """All columns that have been told."""
        return self.tokens[:, : self.told].clone()

    @property
    def ended(self) -> Tensor:
        """Length (rows,) of each row, as far as has been told."""
        return self.lengths.clamp_max(self.told)


__all__ = ["GrowingTexts", "KeptScores"]
