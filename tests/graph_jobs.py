"""Jobs of ranks that use the stand-in for CUDA graphs (tests/cpu_graphs.py); see rank_jobs.py."""

import contextlib
import gc
import weakref
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_eso.eval.evaluate import evaluate
from megatron_eso.model import megatron_config
from megatron_eso.model.attention import dense, store
from megatron_eso.parallel import optimizer as optimizer_module
from megatron_eso.parallel.finish import finish
from megatron_eso.sample import graphs as step_graphs
from megatron_eso.sample import stages
from megatron_eso.train import session as session_module
from megatron_eso.train.session import Session
from megatron_eso.train.step import train_step
from tests import cpu_graphs, rank_jobs, te_jobs
from tests.replaced import replaced

GRAPHS = "parallel.cuda_graphs=true"


@contextlib.contextmanager
def _as_on_a_gpu():
    """Capture graphs, and gather and reduce in buckets of about one layer, as a large model does."""

    def in_small_buckets(*args: Any, **kwargs: Any) -> Any:
        return replace(settings(*args, **kwargs), bucket_size=8000)

    settings = optimizer_module.buffer_settings
    stand_ins = (
        (optimizer_module, "buffer_settings", in_small_buckets),
        (session_module, "can_capture", lambda device: True),
    )
    with replaced(stand_ins), cpu_graphs.instead_of_cuda_graphs():
        yield


def train(overrides: list[str], *, te: bool = False) -> dict[str, Any]:
    """Train three steps with an evaluation after the second.

    Returns:
        Losses, scores, final weights, number of replayed graphs; by model chunk, the kinds of micro-batch
        and places in flight for which graphs were captured; how many of Megatron's buffers each set keeps.
    """
    with _as_on_a_gpu():
        make = te_jobs.on_h100 if te else lambda job, *args: getattr(rank_jobs, job)(*args)
        session: Session = make("make_session", overrides)
        cpu_graphs.CpuGraph.num_replays = 0
        losses, scores = [], []
        for step in range(3):
            losses.append(train_step(session, rank_jobs.read_rows).loss)
            if step == 1:
                found = evaluate(
                    session.replica, lambda rows: rank_jobs.read_rows(7, rows), num_rows=4,
                    bytes_per_token=4.0,
                )  # fmt: skip
                scores = [score.nats_per_token for score in found]
        graphs: list[Any] = [chunk.module._graphs for chunk in session.chunks]
        return {
            "losses": losses,
            "scores": scores,
            "weights": rank_jobs._weights(session),
            "replays": cpu_graphs.CpuGraph.num_replays,
            "sets": [
                sorted((found.kind[1], found.place) for found in chunk._sets) if chunk else []
                for chunk in graphs
            ],
            "kept_buffers": [
                len(found.keeps) for chunk in graphs if chunk for found in chunk._sets
            ],
        }


def sample_rows(*arguments: Any) -> dict[str, Any]:
    """Do what rank_jobs.sample_rows does, with steps from graphs and windows of at least 8 entries.

    Returns:
        Its result, the graphs captured and replayed, and those that outlived the decoder.
    """
    made: list[Any] = []
    make = step_graphs._StepGraph

    def counted(*args: Any) -> Any:
        graph = make(*args)
        made.append(weakref.ref(graph))
        return graph

    stand_ins = (
        (stages, "can_capture", lambda device: True), (step_graphs, "_SMALLEST_WINDOW", 8),
        (step_graphs, "_StepGraph", counted),
        (store, "scaled_dot_product_attention", _laid_out_as_on_a_gpu),
        (dense, "scaled_dot_product_attention", _laid_out_as_on_a_gpu),
    )  # fmt: skip
    with replaced(stand_ins), cpu_graphs.instead_of_cuda_graphs():
        cpu_graphs.CpuGraph.num_replays = 0
        gc.collect()
        gc.disable()  # what only a collection would free keeps a GPU's memory
        try:
            found = rank_jobs.sample_rows(*arguments)
            left = sum(graph() is not None for graph in made)
        finally:
            gc.enable()
    replayed = cpu_graphs.CpuGraph.num_replays
    return found | {"captured": len(made), "replayed": replayed, "left": left}


def _laid_out_as_on_a_gpu(*args: Any, **settings: Any) -> torch.Tensor:
    """Return attention [R, h, L, d] as the memory-efficient kernel does: tokens before heads in memory."""
    out = torch.nn.functional.scaled_dot_product_attention(*args, **settings)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def said_on_a_cpu(overrides: list[str]) -> list[str]:
    """Return what a run says about its machine if there is no GPU."""
    return session_module.choices(rank_jobs.make_session(overrides))


def said_on_a_gpu(overrides: list[str]) -> list[str]:
    """Return the same where there seems to be a GPU, with Transformer Engine."""
    with _as_on_a_gpu():
        session = te_jobs.on_h100("make_session", overrides)
        with replaced([(session_module, "describe_machine", lambda: te_jobs.H100)]):
            return session_module.choices(session)


def uses(overrides: list[str]) -> dict[str, Any]:
    """Return how passes outside a training step take and free sets of graphs.

    Returns:
        Sets captured after three successive forward passes that nobody differentiates; after two that are
        kept; what a second backward pass raises; and graphs left after the end of the process group.
    """
    with _as_on_a_gpu():
        session = rank_jobs.make_session(["objective.alpha_0=1", *overrides, GRAPHS])
        model: Any = session.chunks[0]
        stack = rank_jobs.stack_of_step(session, 0)
        for _ in range(3):
            model(stack[0])
        sets = model.module._graphs._sets
        dropped = len(sets)
        kept = [model(stack[0]), model(stack[0])]
        raised = ""
        kept[0].sum().backward(retain_graph=True)
        try:
            kept[0].sum().backward()
        except RuntimeError as error:
            raised = str(error)
        held = len(sets)
        finish()
        return {"dropped": dropped, "held": held, "raised": raised, "left": len(sets)}


def losses(overrides: list[str]) -> list[float]:
    """Return the losses of some steps, with an evaluation in between, on the available device."""
    session = rank_jobs.make_session(overrides)
    found = []
    for _ in range(4):
        found.append(train_step(session, rank_jobs.read_rows).loss)
        evaluate(
            session.replica,
            lambda rows: rank_jobs.read_rows(7, rows),
            num_rows=4,
            bytes_per_token=4.0,
        )
    return found


def gradients_with_megatrons_graphs(is_graphed: bool) -> dict[str, np.ndarray]:
    """Return the gradients of the second step, with Megatron's own graphs or without graphs."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import cuda_graphs

    def settings(*args: Any, **kwargs: Any) -> Any:
        if is_graphed:
            tracker: Any = megatron_random._CUDA_RNG_STATE_TRACKER
            tracker.use_cudagraphable_rng = True  # Megatron requires it; nothing is drawn here
            kwargs["cuda_graph_impl"] = "local"
        return plain(*args, **kwargs)

    plain = megatron_config.TransformerConfig
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (megatron_config, "TransformerConfig", settings),
        (cuda_graphs, "get_all_rng_states", dict),
        (cuda_graphs, "_check_supported_type", lambda meta: None),  # our rows hold an enumeration
        (torch.cuda, "set_stream", lambda stream: None),
        (torch.cuda, "get_device_capability", lambda: (9, 0)),
        (torch.cuda, "memory_stats", lambda: defaultdict(int)),
    )
    with replaced(stand_ins), cpu_graphs.instead_of_cuda_graphs():
        session = rank_jobs.make_session(["parallel.overlap=false"])
        for _ in range(2):
            rank_jobs.passes_of_step(session, 0)
        return {
            name: parameter.main_grad.numpy().copy()  # type: ignore[union-attr]
            for name, parameter in session.chunks[0].named_parameters()
        }


def train_te(overrides: list[str]) -> dict[str, Any]:
    """Run :func:`train` with the layers of Transformer Engine."""
    return train(overrides, te=True)
