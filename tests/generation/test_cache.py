# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The cache into which single rows write, and the tokens that wait in it, against plain lists."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.generation.cache import EarlyExitCache, ExitCacheLayer, RowView, WaitingTokens


HEADS, SIZE = 2, 3


def states(numbers):
    """Keys (rows, heads, columns, size) of which each element is told by its number, head and place."""
    numbers = torch.tensor(numbers, dtype=torch.float32)
    return numbers[:, None, :, None] * 100 + torch.arange(HEADS)[:, None, None] * 10 + torch.arange(SIZE)


def check(layer, rows):
    """The layer holds these numbers, and values of their negatives."""
    assert layer.get_seq_length() == len(rows[0]) == layer.length
    assert torch.equal(layer.keys, states(rows))
    assert torch.equal(layer.values, -states(rows))


def waiting_of(numbers, done):
    tensor = torch.tensor(numbers, dtype=torch.float32)
    return WaitingTokens(tensor[..., None] + torch.arange(SIZE), tensor.long(), torch.tensor(done))


def check_waiting(waiting, numbers, done):
    if not numbers[0]:
        assert waiting is None
        return
    assert len(waiting) == len(numbers[0])
    assert waiting.positions.tolist() == numbers and waiting.layers_done.tolist() == done
    assert torch.equal(waiting.states[..., 0].long(), waiting.positions)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 5, 70])),
        st.tuples(st.just("write"), st.integers(0, 99)),
        st.tuples(st.just("crop"), st.integers(0, 4)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 99)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=10,
)


class Numbers:
    """A number that has not been used."""

    def __init__(self):
        self.last = 0

    def take(self, rows, columns):
        self.last += rows * columns
        return (torch.arange(rows * columns) + self.last).view(rows, columns).tolist()


class Pair:
    """A cache of two layers with tokens that wait, and the lists that it must be equal to."""

    def __init__(self, rows):
        self.cache, self.numbers = EarlyExitCache(2), Numbers()
        self.fill(self.numbers.take(rows, 3))
        self.waits, self.done = self.numbers.take(rows, 2), [[1, 0]] * rows
        self.cache.waiting = waiting_of(self.waits, self.done)

    def fill(self, columns):
        """Columns for all rows."""
        for index in range(2):
            keys, values = self.cache.update(states(columns), -states(columns), index)
            layer = self.cache.layers[index]
            assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
        self.plain = [
            row + more for row, more in zip(getattr(self, "plain", [[]] * len(columns)), columns, strict=True)
        ]

    def append(self, value, generator):
        self.fill(self.numbers.take(len(self.plain), value))

    def write(self, value, generator):
        """One more column, which some rows write together with some of the columns before, and the others alone."""
        if not self.plain[0]:
            return
        self.cache.reserve()
        chosen = torch.randperm(len(self.plain), generator=generator)[: 1 + value % len(self.plain)]
        rest = [row for row in range(len(self.plain)) if row not in chosen.tolist()]
        width = min(1 + value % 3, len(self.plain[0]) + 1)
        writes = torch.rand(len(chosen), width, generator=generator) < 0.5
        writes[:, -1] = True
        new, alone = self.numbers.take(len(chosen), width), self.numbers.take(len(rest), 1)
        for index in range(2):
            keys, _ = RowView(self.cache, chosen, writes).update(states(new), -states(new), index)
            if rest:
                self.cache.layers[index].put(states(alone), -states(alone), torch.tensor(rest))
        self.plain = [[*row, None] for row in self.plain]
        for row, more in zip(rest, alone, strict=True):
            self.plain[row][-1] = more[0]
        for place, row in enumerate(chosen.tolist()):
            for column in range(width):
                if writes[place, column]:
                    self.plain[row][len(self.plain[row]) - width + column] = new[place][column]
        assert torch.equal(keys, states([self.plain[row] for row in chosen.tolist()]))

    def crop(self, value, generator):
        # 0 means another thing to older releases.
        value = max(1, value)
        self.cache.crop(-value)
        self.plain = [row[: max(0, len(row) - value)] for row in self.plain]
        self.waits, self.done = ([row[: max(0, len(row) - value)] for row in one] for one in (self.waits, self.done))

    def reorder(self, value, generator, size=None):
        order = torch.randint(0, len(self.plain), (size or len(self.plain),), generator=generator)
        (self.cache.batch_select_indices if size else self.cache.reorder_cache)(order)
        tables = (self.plain, self.waits, self.done)
        self.plain, self.waits, self.done = ([table[row] for row in order.tolist()] for table in tables)

    def select(self, value, generator):
        self.reorder(value, generator, size=1 + value % len(self.plain))

    def repeat(self, value, generator):
        self.cache.batch_repeat_interleave(value)
        tables = (self.plain, self.waits, self.done)
        self.plain, self.waits, self.done = ([row for row in table for _ in range(value)] for table in tables)

    def reset(self, value, generator):
        self.cache.reset()
        assert self.cache.get_seq_length() == 0 and self.cache.waiting is None
        self.waits = self.done = self.plain = [[] for _ in self.plain]
        self.fill(self.numbers.take(len(self.plain), 2))

    def check(self):
        for layer in self.cache.layers:
            check(layer, self.plain)
        check_waiting(self.cache.waiting, self.waits, self.done)


@given(actions=ACTIONS, rows=st.integers(1, 4))
def test_any_sequence_of_operations(actions, rows):
    """All that `generate` and its users do to a cache."""
    pair = Pair(rows)
    for action, value in actions:
        getattr(pair, action)(value, torch.Generator().manual_seed(value or 0))
        pair.check()


class TestLayer:
    def layer(self, rows=((1, 2), (3, 4))):
        layer = ExitCacheLayer()
        layer.update(states([list(row) for row in rows]), -states([list(row) for row in rows]))
        return layer

    def test_empty(self):
        layer = ExitCacheLayer()
        assert layer.get_seq_length() == 0 and layer.keys is None and layer.values is None
        assert not layer.is_initialized
        for action in (
            lambda: layer.reorder_cache(torch.tensor([0])),
            lambda: layer.batch_repeat_interleave(2),
            lambda: layer.reset(),
        ):
            action()
        assert layer.get_seq_length() == 0

    def test_sizes_for_masks(self):
        layer = self.layer()
        assert layer.get_mask_sizes(3) == (5, 0) and layer.get_mask_sizes(1) == (3, 0)
        assert layer.get_max_length() == layer.get_max_cache_shape() == -1
        assert not layer.is_sliding and layer.is_croppable

    def test_buffers_are_written_in_place(self):
        """A new column costs no copy of the old ones, but for now and then."""
        layer = self.layer()
        moves, place = 0, layer._keys.data_ptr()
        for number in range(200):
            layer.update(states([[number], [number]]), -states([[number], [number]]))
            moves += layer._keys.data_ptr() != place
            place = layer._keys.data_ptr()
        assert layer.get_seq_length() == 202 and moves <= 4
        check(layer, [[1, 2, *range(200)], [3, 4, *range(200)]])

    def test_reserved_columns_are_finite(self):
        """Attention multiplies what it masks by 0."""
        layer = self.layer()
        layer.reserve(100)
        assert layer.keys.shape[2] == 102 and layer.keys.isfinite().all() and layer.values.isfinite().all()

    def test_keeps_dtype(self):
        layer = ExitCacheLayer()
        layer.update(torch.ones(1, 2, 3, 4, dtype=torch.bfloat16), torch.ones(1, 2, 3, 4, dtype=torch.bfloat16))
        layer.reserve(200)
        assert layer.keys.dtype == layer.values.dtype == layer.dtype == torch.bfloat16
        assert layer.device == torch.device("cpu")

    def test_different_sizes_of_keys_and_values(self):
        layer = ExitCacheLayer()
        layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5))
        layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 5))
        assert layer.keys.shape == (1, 2, 4, 4) and layer.values.shape == (1, 2, 4, 5)

    def test_set_from_outside(self):
        """Code that knows other caches assigns `keys` and `values`."""
        layer = self.layer()
        layer.keys, layer.values = layer.keys[..., :1, :], layer.values[..., :1, :]
        check(layer, [[1], [3]])
        layer.update(states([[7], [8]]), -states([[7], [8]]))
        check(layer, [[1, 7], [3, 8]])

    def test_crop(self):
        layer = self.layer()
        layer.crop(-1)
        check(layer, [[1], [3]])
        layer.crop(-9)
        assert layer.get_seq_length() == 0

    def test_write_to_some_rows(self):
        layer = self.layer(((1, 2), (3, 4), (5, 6)))
        keys, values = layer.write(states([[8], [9]]), -states([[8], [9]]), torch.tensor([2, 0]))
        assert torch.equal(keys, states([[5, 8], [1, 9]])) and torch.equal(values, -states([[5, 8], [1, 9]]))
        check(layer, [[1, 9], [3, 4], [5, 8]])
        layer.put(states([[20, 21]] * 3), -states([[20, 21]] * 3), only=torch.tensor([[True, False]] * 3))
        check(layer, [[20, 9], [20, 4], [20, 8]])


class TestFromCache:
    def test_shares_layers(self):
        other = DynamicCache()
        for index in range(2):
            other.update(states([[1, 2]]), -states([[1, 2]]), index)
        cache = EarlyExitCache.from_cache(other, 3)
        check(cache.layers[1], [[1, 2]])
        assert not cache.layers[2].is_initialized
        cache.layers[0].update(states([[3]]), -states([[3]]))
        assert other.get_seq_length() == 3 and len(other.layers) == 3
        assert EarlyExitCache.from_cache(cache, 3) is cache
        again = EarlyExitCache.from_cache(other, 3)
        assert again.layers is other.layers and again.layers[0] is cache.layers[0]

    def test_copies_are_independent(self):
        cache = EarlyExitCache(1)
        cache.update(states([[1]]), -states([[1]]), 0)
        cache.waiting = waiting_of([[4]], [[0]])
        other = copy.deepcopy(cache)
        cache.update(states([[2]]), -states([[2]]), 0)
        cache.waiting.states.zero_()
        check(other.layers[0], [[1]])
        check_waiting(other.waiting, [[4]], [[0]])

    def test_refused(self, tmp_path):
        from tiny import tiny_llama_config

        config = tiny_llama_config()
        for other, kind in (
            (StaticCache(config=config, max_cache_len=8), "StaticLayer"),
            (DynamicCache(offloading=True), "DynamicCache"),
            (DynamicCache(config=config), "DynamicCache"),
        ):
            with pytest.raises(ValueError, match=rf"`{CACHE_NAME}` of layers {kind}.*EarlyExitCache"):
                EarlyExitCache.from_cache(other, 3)
        assert not EarlyExitCache.from_cache(DynamicCache(config=config), 4).is_initialized

    def test_empty_caches_have_no_room(self):
        with pytest.raises(ValueError, match=f"`{CACHE_NAME}` is empty"):
            EarlyExitCache(2).reserve()


class TestWaitingTokens:
    def test_columns(self):
        waiting = waiting_of([[1, 2, 3], [4, 5, 6]], [[3, 1, 1], [3, 3, 0]])
        check_waiting(waiting.last(2), [[2, 3], [5, 6]], [[1, 1], [3, 0]])
        check_waiting(waiting.last(9), [[1, 2, 3], [4, 5, 6]], [[3, 1, 1], [3, 3, 0]])
        check_waiting(waiting.first(1), [[1], [4]], [[3], [3]])
        assert len(waiting.first(0)) == 0
        check_waiting(
            waiting.append(waiting_of([[7], [8]], [[0], [3]])),
            [[1, 2, 3, 7], [4, 5, 6, 8]],
            [[3, 1, 1, 0], [3, 3, 0, 3]],
        )
        check_waiting(waiting.select(torch.tensor([1, 1])), [[4, 5, 6]] * 2, [[3, 3, 0]] * 2)

    def test_what_is_done_is_dropped(self):
        """From the left only, where all rows are done."""
        waiting = waiting_of([[1, 2, 3], [4, 5, 6]], [[3, 1, 1], [3, 3, 3]])
        check_waiting(waiting.without_done(3), [[2, 3], [5, 6]], [[1, 1], [3, 3]])
        assert len(waiting_of([[1, 2]], [[3, 3]]).without_done(3)) == 0
        check_waiting(waiting_of([[1, 2]], [[0, 3]]).without_done(3), [[1, 2]], [[0, 3]])


def test_is_a_cache():
    cache = EarlyExitCache(3)
    assert isinstance(cache, Cache) and len(cache.layers) == 3
    assert not cache.is_compileable and cache.get_seq_length() == 0


def test_exit_layers_follow_their_tokens():
    """Against plain tensors, through whatever happens to a cache."""
    cache, draw = EarlyExitCache(3), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="is empty"):
        _ = cache.exit_layers
    expected = torch.empty(2, 0, dtype=torch.long)

    def more(columns, early):
        nonlocal expected
        states = torch.zeros(len(expected), 1, columns, 4)
        for index in range(3):
            cache.update(states, states, index)
        layers = torch.full((len(expected), columns), 3)
        if early:
            layers = torch.randint(1, 4, layers.shape, generator=draw)
            cache.note_exits(layers)
        expected = torch.cat((expected, layers), 1)

    def check():
        assert torch.equal(cache.exit_layers, expected)

    more(4, early=False)
    check()
    for _ in range(3):
        more(2, early=True)
        more(70, early=False)
        more(1, early=True)
        check()
    cache.crop(-72)
    expected = expected[:, :-72]
    more(3, early=False)
    check()
    cache.batch_repeat_interleave(2)
    expected = expected.repeat_interleave(2, 0)
    more(1, early=True)
    check()
    for rows in (torch.tensor([3, 3, 0, 1]), torch.tensor([1, 2])):
        cache.reorder_cache(rows) if len(rows) == 4 else cache.batch_select_indices(rows)
        expected = expected[rows]
        more(1, early=True)
        check()
    assert len(expected.unique()) == 3
    cache.reset()
    expected = expected[:, :0]
    more(2, early=False)
    check()
