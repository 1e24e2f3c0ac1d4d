"""Owns how acting runs its forward pass: at few shapes, with compiled blocks, replayed from CUDA graphs; each proved before it is used.

Learning never comes here: `VLAPolicy.evaluate` runs the plain blocks, on prompts padded alike, and what acting computed is held against it
(`equip`).
Legend: B batch, L prompt tokens.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vlarl.policies.base import PolicyModule

PROMPT_MULTIPLE = 8  # prompts are padded to a multiple of it where shapes should be few
SHAPES = 64  # compiled variants of one block's code, above which torch would fall back to the plain code


class Inputs(NamedTuple):
    """What a forward pass of acting reads, on the device. As in `PolicyModule.forward`; noise_BN float64, None: greedy."""

    image_BVHWC: Tensor
    ids_BL: Tensor
    mask_BL: Tensor | None
    state_BD: Tensor | None
    noise_BN: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """With every tensor changed."""
        return Inputs(change(self[0]), change(self[1]), *(None if tensor is None else change(tensor) for tensor in self[2:]))


class Outputs(NamedTuple):
    """What acting computes on the device, as in `ActionChunk`."""

    action_BKA: Tensor
    token_BN: Tensor
    logprob_BN: Tensor
    value_BJ: Tensor
    feature_BPF: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """With every tensor changed."""
        feature_BPF = None if self.feature_BPF is None else change(self.feature_BPF)
        return Outputs(change(self.action_BKA), change(self.token_BN), change(self.logprob_BN), change(self.value_BJ), feature_BPF)


Choose = Callable[[Inputs, float, int], Outputs]  # temperature, top-k


def padded_sizes(slots: int) -> tuple[int, ...]:
    """Batch sizes to pad to. A batch has one row per slot that has an episode, and, for a critic, one per episode that just ended."""
    below = [2**n for n in range(slots.bit_length()) if 2**n < slots]
    return (*below, slots, *sorted({slots + max(1, slots // 8), slots + slots // 2, 2 * slots} - {slots}))


class Engine:
    """Runs forward passes. sizes: batch sizes that smaller batches are padded to; none: batches are run as they come."""

    def __init__(self, sizes: tuple[int, ...] = (), compiled: Compiled | None = None, graphs: Graphs | None = None) -> None:
        self.sizes = tuple(sorted(sizes))
        self.compiled = compiled
        self.graphs = graphs

    @property
    def prompt_multiple(self) -> int:
        """What the length of a batch's prompts is a multiple of; then pads are masked even where there are none."""
        return PROMPT_MULTIPLE if self.sizes else 1

    def __call__(self, choose: Choose, inputs: Inputs, temperature: float, top_k: int) -> Outputs:
        """`choose` of the inputs, whose batch may be padded meanwhile; outputs are owned by the caller."""
        rows = len(inputs.ids_BL)
        inputs = self._pad(inputs, rows)
        if self.compiled is not None:
            choose = self.compiled(choose)
        if self.graphs is not None:
            outputs = self.graphs(choose, inputs, temperature, top_k)
        else:
            outputs = choose(inputs, temperature, top_k)
        return outputs.each(lambda tensor: tensor[:rows])

    def _pad(self, inputs: Inputs, rows: int) -> Inputs:
        """Repeat the first row up to the next size. Beyond the largest, batches are run as they come."""
        extra = next((size for size in self.sizes if size >= rows), rows) - rows
        if extra == 0:
            return inputs
        return inputs.each(lambda t: torch.cat([t, t[:1].expand(extra, *t.shape[1:])]))

    def forget(self) -> None:
        """Free what captured graphs hold: before the memory of acting is wanted for learning."""
        if self.graphs is not None:
            self.graphs.clear()


class Compiled:
    """The module's transformer blocks through torch.compile, in place only while it acts.

    Block by block: all blocks of a kind share one compiled code, FSDP's hooks stay outside it, and the weights are inputs. Passes of one
    position (steps with a KV cache) stay plain: launching is what they cost, and that is what CUDA graphs are for.
    """

    def __init__(self, module: PolicyModule) -> None:
        self._blocks = module.fsdp_units()
        self._forwards = [_long_passes(block) for block in self._blocks]

    def __call__(self, choose: Choose) -> Choose:
        """`choose` with compiled blocks."""

        @functools.wraps(choose)
        def run(inputs: Inputs, temperature: float, top_k: int) -> Outputs:
            # Without the latter, the number of each layer (which names its place in a cache) would be compiled in.
            settings = {"recompile_limit": SHAPES, "allow_unspec_int_on_nn_module": True}
            with torch._dynamo.config.patch(settings), self._in_place():
                return choose(inputs, temperature, top_k)

        return run

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        before = [block.__dict__.get("forward") for block in self._blocks]  # activation checkpointing sets one, too
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            block.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, old in zip(self._blocks, before, strict=True):
                if old is None:
                    del block.forward
                else:
                    block.forward = old


def _long_passes(block: nn.Module) -> Callable[..., Any]:
    plain = type(block).forward.__get__(block)
    compiled = torch.compile(plain)
    return lambda x_BSD, *args, **named: (compiled if x_BSD.shape[1] > 1 else plain)(x_BSD, *args, **named)


class Graphs:
    """Forward passes captured as CUDA graphs, one for each shape and way of sampling; a new one where weights have moved.

    A graph reads weights where they lay when it was captured. Weights that are updated in place stay there; those that FSDP gathers may
    get other memory every time, so addresses are compared at every call (1,000 numbers on the host, no waiting).
    before_capture: called before each.
    """

    def __init__(self, module: PolicyModule, before_capture: Callable[[], None]) -> None:
        self._module = module
        self._before_capture = before_capture
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Inputs, Outputs]] = {}
        self._warm: set[object] = set()
        self._addresses: tuple[int, ...] = ()

    def __call__(self, choose: Choose, inputs: Inputs, temperature: float, top_k: int) -> Outputs:
        """As `choose` does, replayed."""
        addresses = tuple(p.data_ptr() for p in self._module.parameters())
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses
        key = (*(None if t is None else (t.shape, t.dtype) for t in inputs), temperature, top_k)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key, choose, inputs.each(torch.clone), temperature, top_k)
        graph, read, written = self._graphs[key]
        for static, fresh in zip(read, inputs, strict=True):
            if static is not None and fresh is not None:
                static.copy_(fresh)
        graph.replay()
        return written.each(torch.clone)

    def clear(self) -> None:
        """Drop every graph, and the memory that it keeps."""
        self._graphs.clear()

    def _capture(
        self, key: object, choose: Choose, inputs: Inputs, temperature: float, top_k: int
    ) -> tuple[torch.cuda.CUDAGraph, Inputs, Outputs]:
        if key not in self._warm:  # libraries allocate and choose kernels in the first passes, which cannot be captured
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    choose(inputs, temperature, top_k)
            torch.cuda.current_stream().wait_stream(side)
            self._warm.add(key)
        self._before_capture()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        # Other threads of the process, such as a simulator's, may go on using the device.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = choose(inputs, temperature, top_k)
        return graph, inputs, outputs
