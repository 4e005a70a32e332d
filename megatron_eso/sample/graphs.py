"""A sampler's steps as CUDA graphs: each one piece of work, instead of some three hundred kernels.

With a model that fits one GPU, decoding a token waits for the CPU, which launches these kernels. A graph
records the launches, with all addresses and shapes. So whatever changes from step to step lies at fixed
addresses: token ids, positions, the entries that reach the head, and the number of kept entries, which
decides where keys are written and who sees whom. Keys are read up to the end of a *window*, those beyond
the segment with weight 0, so that one graph serves all steps of a window.

A causal segment is filled up to a power of two with entries that no other entry sees and nobody reads. So a
plan whose steps all differ in size needs few graphs. A graph is captured when a step of its kind comes for
the second time.

Letters as in ``sample.stages``; m = entries of the filled segment, W = window.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eso.model.attention.store import segment_mask
from megatron_eso.model.layer_graphs import capture_into
from megatron_eso.objective.rows import Pattern
from megatron_eso.sample.cache import Cache

Pass = Callable[..., Tensor | None]
"""``(inputs [B, n], positions [B, n], entries [B, k], **rows) -> logits [B k, V]``; see Stages."""

_MOST_ENTRIES = 8192  # of a step, all rows together: with more the GPU has enough to do
_SMALLEST_WINDOW = 256


class StepGraphs:
    """The graphs of one decoder: they read and write its cache."""

    def __init__(self, dtype: torch.dtype, num_logits: int) -> None:
        """Begin without graphs.

        Args:
            dtype: of the model's numbers.
            num_logits: V, the head's outputs.
        """
        self._dtype, self._num_logits = dtype, num_logits
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._graphs: dict[tuple[Any, ...], _StepGraph] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        """By rows and entries; graphs share this memory, because a result is read immediately."""

    def logits(
        self,
        run: Pass,
        inputs: Tensor,
        positions: Tensor,
        entries: Tensor,
        *,
        store: Cache | None = None,
        pattern: Pattern = Pattern.CAUSAL,
        is_valid: Tensor | None = None,
    ) -> Tensor | None:
        """Return logits [B k, V] from a graph, or None if this step must run without one.

        Args:
            run: the pass, captured if there is no graph yet. (As an attribute it would keep its owner,
                and with it the graphs and the cache, alive until Python looks for cycles.)
            inputs: [B, n] token ids.
            positions: [B, n] rotary positions.
            entries: [B, k] slots of the segment that reach the head.
            store: the decoder's cache.
            pattern: who sees whom in the segment.
            is_valid: [B, kept + n], False for keys of padding; None: no padding.
        """
        num_rows, new = inputs.shape
        is_filled = store is not None and pattern is Pattern.CAUSAL
        size = _power_of_two(new) if is_filled else new
        if num_rows * size > _MOST_ENTRIES:
            return None
        window = new
        if store is not None:
            if store.num_kept + size > store.capacity:
                return None
            window = window_of(store.num_kept + size, store.capacity)
        kind = (num_rows, size, _power_of_two(entries.shape[1]), pattern, is_valid is not None)
        place = (*kind, window)
        graph = self._graphs.get(place)
        if graph is not None:
            graph.take_in(inputs, positions, entries, is_valid)
            return graph.replay(entries.shape[1])
        self._seen[place] += 1
        if self._seen[place] < 2:
            return None
        graph = _StepGraph(kind, window, store, self._output(kind, inputs.device))
        graph.take_in(inputs, positions, entries, is_valid)
        graph.capture(run, self._pool)
        self._graphs[place] = graph
        return graph.replay(entries.shape[1])

    def _output(self, kind: tuple[Any, ...], device: torch.device) -> Tensor:
        """Return memory [B, k, V] for a kind's logits."""
        num_rows, _, num_entries, *_ = kind
        shape = num_rows, num_entries
        if shape not in self._outputs:
            self._outputs[shape] = torch.empty(
                *shape, self._num_logits, dtype=self._dtype, device=device
            )
        return self._outputs[shape]


def window_of(total: int, capacity: int) -> int:
    """Return how many entries a step that sees ``total`` reads: at most a fourth, or 256, more."""
    grain = max(_SMALLEST_WINDOW, 1 << max(total.bit_length() - 3, 0))
    return min(-(-total // grain) * grain, capacity)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class _StepGraph:
    """One graph and the memory it reads; also the store of its segment's keys."""

    def __init__(
        self,
        kind: tuple[Any, ...],
        window: int,
        cache: Cache | None,
        out: Tensor,
    ) -> None:
        num_rows, size, num_entries, self._pattern, has_padding = kind
        self._window, self._cache, self._out, device = window, cache, out, out.device
        self._inputs, self._positions = (
            torch.zeros(num_rows, size, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._entries = torch.zeros(num_rows, num_entries, dtype=torch.int64, device=device)
        self._num_kept = torch.zeros((), dtype=torch.int64, device=device)
        self._is_valid: Tensor | None = None
        if has_padding:
            self._is_valid = torch.zeros(num_rows, window, dtype=torch.bool, device=device)
        self._places: Tensor | None = None
        self._graph: Any = torch.cuda.CUDAGraph()

    def take_in(
        self, inputs: Tensor, positions: Tensor, entries: Tensor, is_valid: Tensor | None
    ) -> None:
        """Copy a step's values to the fixed addresses; what fills up the segment stays as it was."""
        pairs = ((self._inputs, inputs), (self._positions, positions), (self._entries, entries))
        for fixed, values in pairs:
            fixed[:, : values.shape[1]] = values
        if self._cache is not None:
            self._num_kept.fill_(self._cache.num_kept)
        if self._is_valid is not None:
            assert is_valid is not None
            self._is_valid[:, : is_valid.shape[1]] = is_valid

    def capture(self, run: Pass, pool: Any) -> None:
        """Capture the pass; a pass of the same kind must have run before."""
        with capture_into(self._graph, pool):
            rows: dict[str, Any] = {"pattern": self._pattern, "is_valid": self._is_valid}
            if self._cache is not None:
                size = self._inputs.shape[1]
                self._places = self._num_kept + torch.arange(size, device=self._num_kept.device)
                mask = segment_mask(
                    self._places, self._window, self._out.dtype,
                    is_causal=self._pattern is Pattern.CAUSAL, is_valid=self._is_valid,
                )  # fmt: skip
                rows |= {"store": self, "mask": mask}
            out = run(self._inputs, self._positions, self._entries, **rows)
            assert out is not None
            self._out.copy_(out.view(self._out.shape))

    def replay(self, num_entries: int) -> Tensor:
        """Return logits [B k, V] of the first k entries, in memory of their own."""
        self._graph.replay()
        return self._out[:, :num_entries].flatten(0, 1).clone()

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the window's keys and values: the kept ones, then the segment's; see KeyValueStore."""
        assert self._cache is not None and self._places is not None
        whole = self._cache.buffers(layer, key, value)
        for buffer, new in zip(whole, (key, value), strict=True):
            buffer.index_copy_(2, self._places, new.permute(1, 2, 0, 3))
        keys, values = (buffer[:, :, : self._window] for buffer in whole)
        return keys, values
