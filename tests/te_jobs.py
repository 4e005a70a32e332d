"""Jobs of ranks that use Transformer Engine on a CPU (tests/stand_in); see rank_jobs.py.

The real rules refuse Transformer Engine on a CPU, so these jobs describe an H100 to the session.
Everything else is the real path.
"""

import importlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.config.precision_rules import FUSED_ATTENTION, Machine, process_environment
from megatron_eso.errors import ConfigError
from megatron_eso.eval.evaluate import evaluate
from megatron_eso.eval.sequence_log_probability import (
    accumulate_gradients,
    sequence_log_probability,
)
from megatron_eso.model import eso_model, megatron_config
from megatron_eso.model.attention.dense import dense_attention
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.parallel import te_adapter
from megatron_eso.parallel.optimizer import whole_weights
from megatron_eso.parallel.te_adapter import require_fused_attention
from megatron_eso.sample.plan import DecodingPlan
from megatron_eso.sample.sampler import Choice, fill_rows
from megatron_eso.train import session as session_module
from megatron_eso.train.session import Session
from megatron_eso.train.step import Quality, train_step
from tests import rank_jobs
from tests.replaced import replaced

H100 = Machine(
    gpu="NVIDIA H100",
    capability=(9, 0),
    te=(2, 11, 0),
    cudnn=(9, 14, 0),
    dpa_recipe="DelayedScaling",
)
MEGATRON_TE = "megatron.core.extensions.transformer_engine"
FP8_WEIGHTS = ["precision.fp8_params=true", "eval.use_ema=false"]


def on_h100(job: str, overrides: list[str], *args: Any) -> Any:
    """Return what a job of rank_jobs.py returns if the session takes this machine for an H100."""
    for name in FUSED_ATTENTION:
        os.environ.pop(name, None)
    os.environ.update(process_environment(rank_jobs.small_config(overrides)))
    with replaced([(session_module, "describe_machine", lambda: H100)]):
        return getattr(rank_jobs, job)(overrides, *args)


def layers(overrides: list[str]) -> dict[str, str]:
    """Return Megatron's class for every Transformer Engine part of the first layer."""
    session = on_h100("make_session", overrides)
    found = {}
    for name, module in session.chunks[0].module.decoder.layers[0].named_modules():
        classes = [c for c in type(module).__mro__ if c.__module__ == MEGATRON_TE]
        if classes:
            found[name] = classes[0].__name__
    return found


def attention_of_a_slice(overrides: list[str]) -> float:
    """Return the largest error of attention whose D and X rows are slices with equal memory layout."""
    session = on_h100("make_session", overrides)
    core: Any = session.chunks[0].module.decoder.layers[-1].self_attention.core_attention
    groups, size = (
        core.fused.num_gqa_groups_per_partition,
        core.fused.hidden_size_per_attention_head_k,
    )
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(8, 3, groups, size, generator=generator).bfloat16() for _ in range(3)]
    told = AttentionRows(num_pairs=1)
    found = core.attend_rotated(rows[0].repeat_interleave(2, 2), *rows[1:], told)
    query, key, value = (x.double().permute(1, 2, 0, 3) for x in rows)
    exact = dense_attention(
        query.repeat_interleave(2, 1), key, value, num_pairs=1, scale=core.scale
    )
    return float((found - exact.permute(2, 0, 1, 3).flatten(2)).abs().max())


def with_buffers(overrides: list[str]) -> dict[str, Any]:
    """Train a step and evaluate; return the losses, the scores and how the user buffers were used."""
    base = _module_base()
    base.destroy_ub()
    session = on_h100("make_session", overrides)
    losses = [train_step(session, rank_jobs.read_rows).loss]
    used_by_step = _uses(base)
    scores = evaluate(
        session.replica, lambda rows: rank_jobs.read_rows(7, rows), num_rows=6, bytes_per_token=4.0
    )
    tokens = rank_jobs.read_rows(7, [0, 1, 2]).tokens[:, : rank_jobs.LENGTH]
    order = torch.arange(rank_jobs.LENGTH).expand_as(tokens)
    one_row = sequence_log_probability(session.replica, tokens[:1], order[:1])
    refusal = ""
    try:
        sequence_log_probability(session.replica, tokens, order)
    except ConfigError as error:
        refusal = str(error)
    uses = _uses(base)
    shapes = {
        (tuple(buffer.shape), buffer.size) for buffer in (base._ub_communicators or {}).values()
    }
    base.destroy_ub()
    return {
        "losses": losses,
        "log_probability": float(one_row.detach()),
        "refusal": refusal,
        "scores": [score.nats_per_token for score in scores],
        "shapes": shapes,
        "used_by_step": used_by_step,
        "uses": uses,
    }


def _uses(base: Any) -> dict[tuple[str, str], int]:
    """Return how often each buffer was used, by its layer and pass, and by what it holds."""
    buffers = base._ub_communicators or {}
    return {(name, mode.value): buffer.uses for (name, mode), buffer in buffers.items()}


def _module_base() -> Any:
    return importlib.import_module("transformer_engine.pytorch.module.base")


def refused_buffers(overrides: list[str]) -> str:
    """Return the error message where Transformer Engine cannot have the buffers."""
    base = _module_base()
    base.destroy_ub()
    with replaced([(base.tex, "device_supports_multicast", lambda: False)]):
        try:
            on_h100("make_session", overrides)
        except ConfigError as error:
            return str(error)
    return ""


def passes(overrides: list[str], dtype: str) -> dict[str, Any]:
    """Return log-probabilities and gradients of the first step's rows, computed in ``dtype``."""
    session = on_h100("_replica_session", overrides, dtype)
    weights = list(session.chunks[0].parameters())
    for weight in weights:  # where Transformer Engine itself adds up gradients
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    found = []
    for rows in rank_jobs.stack_of_step(session, 0):
        log_probs = session.chunks[0](rows)
        log_probs.double().sum().backward()
        found.append(log_probs.detach().double())
    for weight in weights:
        if weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
            weight.grad = weight.main_grad.to(weight.dtype)  # type: ignore[attr-defined]
    return {
        "log_probs": torch.cat(found).numpy(),
        "gradients": rank_jobs._gradient_pieces(session),
    }


def without_fp8_state(folder: str) -> None:
    """Remove the FP8 state from a checkpoint's index, as if it came from a run in bf16."""
    path = Path(folder) / ".metadata"
    if int(os.environ["RANK"]) == 0:
        content = pickle.loads(path.read_bytes())
        kept = content.state_dict_metadata
        content.state_dict_metadata = {k: v for k, v in kept.items() if not k.startswith("fp8.")}
        assert len(kept) > len(content.state_dict_metadata)
        path.write_bytes(pickle.dumps(content))
        CheckpointFolder(Path(folder)).commit()


def put_hostile_fp8_state(folder: str, trace: str) -> None:
    """Replace every FP8 state with a pickle that creates a folder."""
    if int(os.environ["RANK"]) > 0:
        return
    path = Path(folder)
    torch.save(
        [_Hostile(trace)], path / "hostile.distcp"
    )  # Megatron wraps what it writes in a list
    size = (path / "hostile.distcp").stat().st_size
    content = pickle.loads((path / ".metadata").read_bytes())
    states = [place for key, place in content.storage_data.items() if key.fqn.startswith("fp8.")]
    assert states
    for place in states:
        place.relative_path, place.offset, place.length = "hostile.distcp", 0, size
    (path / ".metadata").write_bytes(pickle.dumps(content))
    CheckpointFolder(path).commit()


class _Hostile:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def questions(overrides: list[str]) -> dict[str, tuple[Any, Any]]:
    """Train a step; return where a layer's question about attention differs from the one at the start."""
    dpa = importlib.import_module(f"{te_adapter._DPA}.dot_product_attention")
    utils, asked = dpa.dpa_utils, []

    def note(parameters: Any) -> Any:
        asked.append(parameters)
        return choose(parameters)

    choose = utils.get_attention_backend
    dpa._attention_backends["attention_params"] = None
    is_deterministic = rank_jobs.small_config(overrides).precision.deterministic
    with replaced([(utils, "get_attention_backend", note)]):
        if is_deterministic:  # on a GPU, be_deterministic sets it
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        on_h100("train", overrides, 1)
        os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)
    ours, *layers_ = asked
    assert layers_
    of_a_pass = ("batch_size", "fp8_meta", "qkv_type")  # number of rows, state, class
    names = [field.name for field in fields(ours) if field.name not in of_a_pass]
    return {
        name: (getattr(ours, name), getattr(theirs, name))
        for theirs in layers_
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    }


def kernels(asked: list[tuple[str, int, int]]) -> list[str | None]:
    """Return the kernel for causal rows in training, for each format, head size and row length."""
    tex = importlib.import_module("transformer_engine_torch")
    formats = {"bf16": tex.DType.kBFloat16, "fp8": tex.DType.kFloat8E4M3}
    layout, mask = tex.NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD, tex.NVTE_Mask_Type.NVTE_CAUSAL_MASK
    plain = tex.NVTE_Bias_Type.NVTE_NO_BIAS, mask, tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
    found = []
    for name, head_size, length in asked:
        kinds = formats[name], formats[name], layout, *plain
        shapes = 32, 8, length, length, head_size, head_size
        answer = tex.get_fused_attn_backend(True, *kinds, 0.0, *shapes, -1, 0, False, False)
        found.append(None if answer < 0 else answer.name.removeprefix("NVTE_"))
    return found


def attention_choices() -> tuple[str, str]:
    """Return the backend chosen for a legal run, and the refusal of one that would fall back."""
    legal = ["precision.attention=te", "precision.dtype=bf16", "model.head_size=128"]
    config = rank_jobs.small_config(legal)
    for name, value in process_environment(config).items():
        os.environ[name] = value
    choice = require_fused_attention(config)
    os.environ["NVTE_UNFUSED_ATTN"] = "1"  # as a user's shell may have it
    try:
        require_fused_attention(rank_jobs.small_config([*legal[:2], "model.head_size=512"]))
    except ConfigError as error:
        return choice.chosen if choice else "", str(error)
    return choice.chosen if choice else "", ""


class _Done:
    def wait(self) -> None:
        pass


@contextmanager
def _gathers_each_format() -> Iterator[None]:
    """Gather weights one by one: of several together, gloo treats all as having the first one's format."""
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    group: Any = buffers._ParamAndGradBucketGroup
    start, gather = group.start_param_sync, buffers.dist_all_gather_func

    def at_once(*args: Any, async_op: bool = False, **settings: Any) -> None:
        gather(*args, **settings)

    @contextmanager
    def one_by_one(group: Any, async_ops: bool = False) -> Iterator[Any]:
        yield _Done()

    def start_one_by_one(self: Any, force_sync: bool = False) -> None:
        stand_ins = (
            (buffers, "dist_all_gather_func", at_once),
            (buffers, "_coalescing_manager", one_by_one),
        )
        with replaced(stand_ins):
            start(self, force_sync)

    with replaced([(group, "start_param_sync", start_one_by_one)]):
        yield


@contextmanager
def _initialised_as_on_a_gpu() -> Iterator[None]:
    """Make Transformer Engine initialize its layers, as Megatron does on a GPU."""

    def as_on_a_gpu(*args: Any, **settings: Any) -> Any:
        return plain(*args, **{**settings, "use_cpu_initialization": False})

    plain = megatron_config.TransformerConfig
    stand_ins = (
        (megatron_config, "TransformerConfig", as_on_a_gpu),
        (eso_model, "_device", lambda config: torch.device("cpu")),
    )
    with replaced(stand_ins):
        yield


def _session_with_fp8_weights(overrides: list[str]) -> Session:
    with _initialised_as_on_a_gpu():
        return on_h100("make_session", [*overrides, *FP8_WEIGHTS])


def train_with_fp8_weights(overrides: list[str], *args: Any) -> Any:
    """Run :func:`rank_jobs.train` with FP8 parameters."""
    with _gathers_each_format(), _initialised_as_on_a_gpu():
        return on_h100("train", [*overrides, *FP8_WEIGHTS], *args)


def looked_at(overrides: list[str], looks: bool) -> list[tuple[float, float]]:
    """Return losses and gradient norms of steps; if ``looks``, FP8 weights are made whole in between."""
    with _gathers_each_format():
        session = _session_with_fp8_weights(overrides)
        found = []
        for _ in range(3):
            report = train_step(session, rank_jobs.read_rows)
            found.append((report.loss, report.grad_norm))
            with whole_weights(session.chunks) if looks else nullcontext():
                pass
        return found


def losses_after_a_step_not_applied(overrides: list[str], times: int) -> list[float]:
    """Return losses of three steps, the second of which was first found bad ``times`` times."""
    session = on_h100("make_session", overrides)
    found = []
    for number in range(3):
        for _ in range(times if number == 1 else 0):
            train_step(session, rank_jobs.read_rows, lambda loss, norm: Quality.NOT_FINITE)
        found.append(train_step(session, rank_jobs.read_rows).loss)
    return found


def largest_weight_in_history(overrides: list[str]) -> float:
    """Return the largest weight value that the FP8 state of a new model has seen."""
    modules: list[Any] = list(_session_with_fp8_weights(overrides).chunks[0].modules())
    histories = [m.fp8_meta["scaling_fwd"].amax_history for m in modules if hasattr(m, "fp8_meta")]
    assert histories
    return max(
        float(history[:, 1].max()) for history in histories
    )  # 0: inputs, 1: weights, 2: outputs


def log_probability_passes(overrides: list[str]) -> dict[str, Any]:
    """Return the results of passes outside training: values as weights change, and summed gradients."""
    session = on_h100("make_session", overrides)
    train_step(session, rank_jobs.read_rows)
    tokens = rank_jobs.read_rows(7, [0, 1]).tokens[:, : rank_jobs.LENGTH]
    order = torch.arange(rank_jobs.LENGTH).expand_as(tokens)
    chunk: Any = session.chunks[0]

    def gradients(times: int) -> torch.Tensor:
        chunk.zero_grad_buffer()
        for _ in range(times):
            accumulate_gradients(
                session.replica, tokens, order, lambda found, rows: found.sum(), micro_batch_rows=1
            )
        return torch.cat([p.main_grad.flatten().clone() for p in chunk.parameters()])

    once, twice = gradients(1), gradients(2)
    values = []
    for _ in range(2):
        values.append(sequence_log_probability(session.replica, tokens, order).tolist())
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if name.endswith("linear_fc2.weight"):
                    parameter.mul_(-1.0)
    chunk.zero_grad_buffer()
    sequence_log_probability(session.replica, tokens, order).sum().backward()
    after = torch.cat([p.main_grad.flatten().clone() for p in chunk.parameters()])
    return {"values": values, "once": once, "twice": twice, "after": after}


def refused_sampling(overrides: list[str]) -> str:
    """Return the sampler's error message for layers in FP8."""
    session = on_h100("make_session", [*overrides, "parallel.sequence=false"])
    rows = rank_jobs.read_rows(7, [0]).tokens[:, : rank_jobs.LENGTH]
    order = torch.arange(rank_jobs.LENGTH).expand_as(rows)
    plan = DecodingPlan(order, 1, [1] * (rank_jobs.LENGTH - 1))
    try:
        fill_rows(session.replica, rows, plan, Choice())
    except ConfigError as error:
        return str(error)
    return ""


def beside_evaluations(overrides: list[str], evaluates: bool) -> list[float]:
    """Return losses of steps; if ``evaluates``, an evaluation precedes each."""
    session = on_h100("make_session", overrides)
    found = []
    for _ in range(3):
        if evaluates:
            evaluate(
                session.replica,
                lambda rows: rank_jobs.read_rows(7, rows),
                num_rows=4,
                bytes_per_token=4.0,
            )
        found.append(train_step(session, rank_jobs.read_rows).loss)
    return found
