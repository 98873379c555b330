"""What attention remembers while a text is continued."""

from __future__ import annotations

import torch

from moe_train.model import attention_core


def test_a_cache_grows_by_more_than_it_is_asked_for_and_forgets_nothing(monkeypatch):
    monkeypatch.setattr(attention_core, "CACHE_STEP", 3)
    keys, values = torch.randn(2, 14, 2, 4, 8)
    cache, rooms = attention_core.LayerCache(), set()
    for begin, end in [(0, 5), *((at, at + 1) for at in range(5, 14))]:
        seen = cache.extend(keys[begin:end], values[begin:end])
        assert cache.length == end
        assert torch.equal(seen[0], keys[:end]) and torch.equal(seen[1], values[:end])
        rooms.add(seen[0].untyped_storage().data_ptr())
    assert len(rooms) <= 3  # for 5, for 9 and for 13 tokens
