"""Owns links between threads of one process, in the place of messages between ranks."""
from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

DEADLINE_SECONDS = 20.0


class _Sent:
    def wait(self) -> None:
        """Delivered at once: the other end has a copy."""


class _Coming:
    def __init__(self, box: queue.Queue[Tensor], into: Tensor) -> None:
        self._box, self._into = box, into

    def wait(self) -> None:
        message = self._box.get(timeout=DEADLINE_SECONDS)
        assert (message.shape, message.dtype) == (self._into.shape, self._into.dtype), "both sides speak of the same message"
        self._into.copy_(message)


class MemoryLinks:
    """A rank's links to all others. `post`: one dictionary shared by all ranks."""

    def __init__(self, rank: int, post: dict[Any, queue.Queue[Tensor]]) -> None:
        self._rank, self._post = rank, post

    def to(self, peer: int) -> MemoryLink:
        return MemoryLink(self._rank, peer, self._post)


class MemoryLink:
    """Keeps order per direction and kind, as real links do."""

    def __init__(self, rank: int, peer: int, post: dict[Any, queue.Queue[Tensor]]) -> None:
        self._rank, self._peer, self._post = rank, peer, post

    def send(self, tensor: Tensor, kind: str) -> _Sent:
        assert tensor.is_contiguous()
        self._post.setdefault((self._rank, self._peer, kind), queue.Queue()).put(tensor.clone())
        return _Sent()

    def recv(self, tensor: Tensor, kind: str) -> _Coming:
        assert tensor.is_contiguous()
        return _Coming(self._post.setdefault((self._peer, self._rank, kind), queue.Queue()), tensor)


def in_threads(ranks: int, body: Callable[[int, MemoryLinks], Any]) -> list[Any]:
    """`body(rank, links)` for every rank, side by side; the results in rank order. Raises what a rank raised."""
    post: dict[Any, queue.Queue[Tensor]] = {}
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank, MemoryLinks(rank, post))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
    return results
