"""CUDA graphs: a layer's forward pass, and its backward pass, launched as one piece of work each.

Small layers wait for the CPU, which launches some eighty kernels for each of them. A graph records the
launches with the addresses they read and write; every micro-batch of the same kind replays them. Three
things get fixed addresses: the rotary angles, each layer's input (the output of the layer before) and one
gradient of hidden states, which each layer reads and then overwrites. Weights and gradient buffers
(``main_grad``) have fixed addresses already, so the backward graph itself adds weight gradients to their
buffers and keeps none.

The first micro-batch of a kind captures its graphs, one set for each micro-batch in flight at a time (1
without a pipeline). A set is free again when the backward pass has reached its first layer, or when no
backward pass can be asked for any more. Sets that are never in flight together share their memory.
Evaluations, which keep no gradients, run without graphs.

Megatron's graphs (``cuda_graph_impl="local"``) are not used: version 0.16.1 puts the last layer's output
gradient into the memory of the first layer's input, which that layer's norm needs in its backward pass
(tests/test_cuda_graphs.py shows it). Letters: L = tokens, R = rows, H = hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.parallel.finish import before_finish
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.parameters import await_gathered

with importing_megatron():
    from megatron.core import parallel_state
    from megatron.core.transformer import cuda_graphs as megatron_graphs
    from megatron.core.transformer.transformer_layer import TransformerLayer

_WARM_UP_PASSES = 3
_in_use: "WeakSet[LayerGraphs]" = WeakSet()
# Other threads (NCCL's watchdog, the data reader) may go on calling CUDA during a capture.
_CAPTURE_MODE = "thread_local"


def can_capture(device: torch.device) -> bool:
    """Return whether work on this device can be captured."""
    return device.type == "cuda"


@cache
def _side_stream() -> Any:
    """Return the stream of all captures of this process."""
    return torch.cuda.Stream()


@contextmanager
def capture_into(graph: Any, pool: Any) -> Iterator[None]:
    """Capture the work of a ``with`` block into a graph, with memory of a pool, without doing it."""
    with torch.cuda.graph(
        graph, pool=pool, stream=_side_stream(), capture_error_mode=_CAPTURE_MODE
    ):
        yield


@contextmanager
def gradients_for_graphs() -> Iterator[None]:
    """Wrap gradient buffers inside this ``with`` block around a model whose layers will run from graphs.

    A parameter's gradient is handed on in the stream in which its hooks were registered. If that is the
    default stream, no backward pass can be captured: PyTorch would make it wait for the capturing stream.
    """
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    # In every other backward pass PyTorch then waits for one more stream, and warns about it.
    silence = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if silence is not None:
        silence(False)


def release_graphs() -> None:
    """Free all graphs of this process: NCCL ends no communicator while a graph refers to it."""
    if _in_use:
        torch.cuda.synchronize()
    for graphs in _in_use:
        graphs.release()
    _in_use.clear()


class GraphedLayer(TransformerLayer):
    """Megatron's layer; it replays a graph if the rows carry graphs, as those of training passes may."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return (hidden states [L, R, H], None), as Megatron's block expects."""
        rows = kwargs.get("packed_seq_params")
        if rows is None or rows.graphs is None:
            return super().__call__(*args, **kwargs)
        return rows.graphs.replay(self, kwargs["hidden_states"], rows), None


class LayerGraphs:
    """The graphs of one model chunk."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._sets: list[_GraphSet] = []
        self._pools: list[Any] = []
        _in_use.add(self)
        before_finish(release_graphs)

    def release(self) -> None:
        """Free the graphs; the next micro-batches capture new ones."""
        for found in self._sets:
            for graph in found.layers:
                graph.forward.reset()
                graph.backward.reset()
        self._sets.clear()

    def replay(self, layer: nn.Module, hidden: Tensor, rows: AttentionRows) -> Tensor:
        """Return a layer's output for [L, R, H]; a micro-batch must call its layers in order.

        The result lies in memory that the same micro-batch of the next step overwrites.
        """
        number = self._layers.index(layer)
        if number == 0:
            rows.graph_use = _Use(self._take(hidden, rows))
        use: _Use = rows.graph_use
        graph = use.graph_set.layers[number]
        for module in graph.with_parameters:
            await_gathered(module)
        return _Replay.apply(hidden, use, number, *graph.parameters)

    def _take(self, hidden: Tensor, rows: AttentionRows) -> "_GraphSet":
        """Return a set of graphs for this kind of micro-batch that no other one in flight uses."""
        if rows.is_valid is not None:
            raise ValueError("rows with a mask of their own cannot be captured")
        kind = (hidden.shape, rows.num_pairs, rows.pattern, rows.block_size)
        busy = {found.place for found in self._sets if found.is_in_flight()}
        taken = next((s for s in self._sets if s.kind == kind and s.place not in busy), None)
        if taken is None:
            place = next(i for i in range(len(busy) + 1) if i not in busy)
            if place == len(self._pools):
                self._pools.append(torch.cuda.graph_pool_handle())
            taken = _GraphSet(kind, place, _static_copy(rows))
            taken.take_in(rows)
            taken.layers = _capture(self._layers, hidden, taken, self._pools[place])
            self._sets.append(taken)
        taken.take_in(rows)
        return taken


class _GraphSet:
    """The graphs of all layers, from which one micro-batch in flight runs."""

    def __init__(self, kind: tuple[Any, ...], place: int, rows: AttentionRows) -> None:
        self.kind, self.place, self.rows = kind, place, rows
        self.layers: list[_GraphOfLayer] = []
        self.use: Callable[[], _Use | None] = lambda: None
        self.keeps: tuple[Tensor, ...] = ()

    def take_in(self, rows: AttentionRows) -> None:
        """Copy the rotary angles of a micro-batch to their fixed addresses."""
        for fixed, values in ((self.rows.cos, rows.cos), (self.rows.sin, rows.sin)):
            assert fixed is not None and values is not None
            fixed.copy_(values)

    def is_in_flight(self) -> bool:
        """Return whether a micro-batch may still ask for its backward pass."""
        use = self.use()
        return use is not None and use.layers_left > 0


class _Use:
    """One micro-batch's use of a set; kept alive by whatever can ask for its backward pass."""

    def __init__(self, graph_set: _GraphSet) -> None:
        self.graph_set = graph_set
        self.layers_left = len(graph_set.layers)
        """Layers that have yet to run backwards."""
        graph_set.use = ref(self)


class _GraphOfLayer:
    """A layer's two graphs and the memory that they read and write."""

    def __init__(self, layer: nn.Module, hidden: Tensor, gradient: Tensor) -> None:
        self.parameters = tuple(layer.parameters())
        self.with_parameters = [
            module
            for module in layer.modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        self.hidden = hidden
        self.gradient = gradient
        """Of the layer's output, before its backward pass; of its input, after."""
        self.forward: Any = torch.cuda.CUDAGraph()
        self.backward: Any = torch.cuda.CUDAGraph()
        self.out = hidden  # until captured


class _Replay(torch.autograd.Function):
    """Runs a layer's graphs; weights are inputs, so that Megatron's hooks run for their gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, use: _Use, number: int, *parameters: Tensor) -> Tensor:
        graph = use.graph_set.layers[number]
        _bring(hidden, graph.hidden)
        graph.forward.replay()
        ctx.use, ctx.number = use, number
        return graph.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        use: _Use = ctx.use
        if ctx.number != use.layers_left - 1:
            raise RuntimeError(
                "layers run from CUDA graphs can be differentiated once, from the last to the first: what "
                "they had kept is overwritten (parallel.cuda_graphs)"
            )
        use.layers_left -= 1
        graph = use.graph_set.layers[ctx.number]
        _bring(grads[0], graph.gradient)
        graph.backward.replay()
        d_hidden = graph.gradient.detach()
        if ctx.number == 0:
            # A pipeline may still be sending it when the next micro-batch overwrites it.
            d_hidden = d_hidden.clone()
        for parameter in graph.parameters:
            # Megatron's hooks then only note that the gradient is there; they do not read it.
            parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return d_hidden, None, None, *(_not_read(p) for p in graph.parameters)


_never_read: dict[tuple[Any, ...], Tensor] = {}


def _not_read(parameter: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape, the same each time, as a gradient that nobody reads."""
    kind = (parameter.shape, parameter.dtype, parameter.device)
    if kind not in _never_read:
        _never_read[kind] = torch.zeros_like(parameter)
    return _never_read[kind].detach()


def _bring(values: Tensor, to: Tensor) -> None:
    """Copy values to a fixed address unless the layer before has written them there."""
    if values.data_ptr() != to.data_ptr():
        to.copy_(values)


def _static_copy(rows: AttentionRows) -> AttentionRows:
    assert rows.cos is not None and rows.sin is not None
    cos, sin = torch.empty_like(rows.cos), torch.empty_like(rows.sin)
    return replace(rows, cos=cos, sin=sin, graphs=None, graph_use=None)


def _capture(
    layers: Sequence[nn.Module], like: Tensor, graph_set: _GraphSet, pool: Any
) -> list[_GraphOfLayer]:
    """Return graphs of all layers, captured in the order in which they will run.

    Args:
        layers: of the chunk.
        like: [L, R, H], a tensor with the shape and dtype of the hidden states.
        graph_set: the set of these graphs; its rows lie at their fixed addresses.
        pool: of memory. Later captures use again what a capture frees; so do replays.
    """
    graphs: list[_GraphOfLayer] = []
    with _capturing():
        hidden = torch.zeros_like(like, requires_grad=True)
        gradient = torch.zeros_like(like)
        for layer in layers:
            graph = _GraphOfLayer(layer, hidden, gradient)
            _warm_up(layer, like, graph_set.rows)
            with capture_into(graph.forward, pool):
                graph.out = _run(layer, hidden, graph_set.rows)
            graphs.append(graph)
            hidden = graph.out.detach().requires_grad_()
        for layer, graph in reversed(list(zip(layers, graphs, strict=True))):
            with capture_into(graph.backward, pool):
                gradient.copy_(_backward(layer, graph.hidden, graph.out, gradient))
            graph.out = graph.out.detach()  # frees what the backward pass needed
    # A larger evaluation replaces Megatron's buffer for gathered activations; a graph goes on using the one
    # that it was captured with.
    graph_set.keeps = tuple(parallel_state.get_global_memory_buffer().buffer.values())
    return graphs


def _warm_up(layer: nn.Module, like: Tensor, rows: AttentionRows) -> None:
    """Run a layer outside the graph: libraries choose kernels and compile in their first calls.

    It runs on zeros: its products may add weight gradients to their buffers, and those of zeros change
    nothing. (The output of a graph that was only captured still holds arbitrary numbers.)
    """
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_PASSES):
            hidden = torch.zeros_like(like, requires_grad=True)
            out = _run(layer, hidden, rows)
            _backward(layer, hidden, out, torch.zeros_like(out))
    torch.cuda.current_stream().wait_stream(stream)


def _run(layer: nn.Module, hidden: Tensor, rows: AttentionRows) -> Tensor:
    with torch.enable_grad():
        out, _ = layer.forward(hidden_states=hidden, attention_mask=None, packed_seq_params=rows)
    return out


def _backward(layer: nn.Module, hidden: Tensor, out: Tensor, of_out: Tensor) -> Tensor:
    """Return the gradient of a layer's input; add those of its weights to their buffers.

    Transformer Engine's products add theirs themselves, and say so in ``grad_added_to_main_grad``.
    """
    parameters = list(layer.parameters())
    for parameter in parameters:
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    d_hidden, *d_parameters = torch.autograd.grad([out], [hidden, *parameters], [of_out])
    for parameter, part in zip(parameters, d_parameters, strict=True):
        if not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
            parameter.main_grad.add_(part)  # type: ignore[attr-defined]
    return d_hidden


@contextmanager
def _capturing() -> Iterator[None]:
    """Tell Megatron, and through it Transformer Engine, to launch nothing of their own in a capture."""
    with_te = megatron_graphs.HAVE_TE_GRAPHS
    megatron_graphs._set_capture_start()
    if with_te:
        megatron_graphs.te_set_capture_start()
    try:
        yield
    finally:
        megatron_graphs._set_capture_end()
        if with_te:
            megatron_graphs.te_set_capture_end()
