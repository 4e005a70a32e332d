"""Every setting of a run: its type, its default, and under it what it means and in which unit.

These dataclasses are OmegaConf structured configurations: frozen, and closed (an unknown key is an
error). A *row* is one sequence of ``train.sequence_length`` tokens; a *stack row* is a row as it runs
through the transformer, where a sequential row of the Eso-LM objective counts twice (its true tokens
and its mask copies). ``docs/config.md`` is generated from the fields, their ranges and the strings
below them. Fields that hold paths are marked (``paths.py``); rules between settings are in ``check.py``.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_eso.config.paths import Place, mark, path_to
from megatron_eso.config.ranges import within


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer."""

    hidden_size: int = within(256, at_least=1)
    """Width of the residual stream."""
    num_layers: int = within(4, at_least=1)
    """Number of transformer layers over all pipeline stages."""
    num_heads: int = within(4, at_least=1)
    """Number of query heads of a layer."""
    num_kv_heads: int | None = within(None, at_least=1)
    """Number of key/value heads (grouped-query attention); null: as many as query heads."""
    head_size: int | None = within(None, at_least=1)
    """Width of one head; null: hidden_size / num_heads, which must divide exactly."""
    ffn_size: int | None = within(None, at_least=1)
    """Inner width of the MLP; null: for swiglu 8/3 hidden_size rounded up to a multiple of 64 (its three
    matrices then cost what two of width 4 hidden_size do), for gelu 4 hidden_size."""
    vocab_size: int = within(8192, at_least=3, hint="two tokens and the mask token")
    """Number of token ids including the mask token, whose id is vocab_size - 1. Must equal the
    vocabulary of the data set's manifest."""
    vocab_padding_multiple: int = within(128, at_least=1)
    """The embedding and the head are padded to a multiple of this; padded ids get no probability.
    It does not depend on the layout, so checkpoints fit any."""
    max_length: int = within(1024, at_least=1)
    """Longest row the rotary table covers, in tokens."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization before attention, before the MLP and before the head."""
    norm_eps: float = within(1e-5, above=0, below=math.inf)
    """Added to the variance inside the normalization."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """MLP: gated SiLU (Llama) or GELU in its tanh form (the official Eso-LM code)."""
    attention_bias: bool = False
    """Biases in the query/key/value and output projections of attention."""
    mlp_bias: bool = False
    """Biases in both MLP matrices."""
    head_bias: bool = False
    """A bias per vocabulary entry in the output head."""
    qk_norm: bool = False
    """Normalize queries and keys per head before the rotary rotation (Qwen3)."""
    rotary_base: float = within(10000.0, above=0, below=math.inf)
    """Base of the rotary position frequencies."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    dropout: float = within(0.0, at_least=0, below=1)
    """Dropout probability on the residual branches."""
    init_std: float = within(0.02, at_least=0, below=math.inf)
    """Standard deviation of the initial weights; output projections of attention and MLP get
    init_std / sqrt(2 num_layers)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what."""

    name: Literal["eso", "ar", "mdlm", "bd3lm"] = "eso"
    """eso: Eso-LM; ar: left to right; mdlm: bidirectional masked diffusion; bd3lm: block diffusion."""
    alpha_0: float = within(1.0, at_least=0, at_most=1)
    """Eso-LM: expected share of tokens made by diffusion, in [0, 1]. 1 is pure masked diffusion,
    0 pure left to right. The other objectives do not use it."""
    diffusion_fraction: float | None = within(None, at_least=0, at_most=1)
    """Eso-LM: share of rows that take the diffusion pass (kappa); null: 0.5 for 0 < alpha_0 < 1, 1 for
    alpha_0 = 1, 0 for alpha_0 = 0. In the paper training diverged at or below 0.25."""
    loss_weight: Literal["elbo", "constant"] = "elbo"
    """Weight of the diffusion loss: alpha_0 / (1 - alpha_t), a bound on the likelihood, or 1 (lower
    variance; only for alpha_0 = 1, mdlm and bd3lm). Evaluation always uses the bound."""
    noise_eps: float = within(1e-3, at_least=0, below=1)
    """Training times run over [noise_eps, 1] and alpha_t = alpha_0 (1 - (1 - noise_eps) t), as in the
    official code. Evaluation has its own (eval.noise_eps)."""
    block_size: int = within(16, at_least=1)
    """bd3lm: tokens per block, which must divide train.sequence_length."""
    leading_mask: bool = True
    """ar: feed a mask token first, so that every token of the row is predicted, as in the other
    objectives; false: the first token is given and the row's last target is the next row's first
    token."""


@dataclass(frozen=True)
class DataSourceConfig:
    """One data set of a mixture."""

    path: str = path_to(Place.DATA, "")
    """Folder or object-store address of one split written by ``megatron-eso data prepare``."""
    weight: float = within(1.0, above=0, below=math.inf)
    """Share of the mixture, relative to the other sources' weights."""


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and in which order."""

    sources: list[DataSourceConfig] = field(default_factory=list)
    """Training data; several sources are mixed by weight."""
    validation: dict[str, str] = field(default_factory=dict, metadata=mark(Place.DATA))
    """Held-out data sets: name -> folder or address."""
    cache_dir: str | None = path_to(Place.NODE, None)
    """Local folder for shards of remote data sets; null: a folder under the system's cache folder."""
    cache_limit_gib: float | None = within(None, above=0, hint="null sets no bound")
    """Largest size of data.cache_dir, in GiB; null: no limit. The least recently used shards are removed
    first."""
    shuffle: bool = True
    """Permute the samples of every epoch; false: the order in which they were written."""
    shuffle_block_size: int = within(262144, at_least=1)
    """Number of samples of neighboring shards that are shuffled together."""
    shuffle_canonical_nodes: int = within(1, at_least=1)
    """Number of independent sequences of shards that an epoch's order is cut into; fixed for a run, on
    any number of nodes."""
    prefetch_shards: int = within(2, at_least=0)
    """Number of shards of each source that are fetched ahead every 16 steps; raise it if as many steps need
    more new ones."""
    num_workers: int = within(1, at_least=0)
    """Threads that read ahead of the training loop; 0: read in the loop."""
    verify_hashes: bool = True
    """Check each shard's hash when a process first opens it; its size is always checked."""
    retries: int = within(5, at_least=1)
    """Attempts to fetch one remote shard before the run stops with an error that names it."""
    timeout_seconds: float = within(60.0, above=0)
    """Limit for one attempt to fetch a shard, in seconds."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of the run."""

    sequence_length: int = within(512, at_least=1)
    """Tokens per row; must be that of the data set's manifest."""
    steps: int | None = within(None, at_least=1)
    """Optimizer steps; null: as many as train.tokens gives. Set this or train.tokens."""
    tokens: int | None = within(None, at_least=1)
    """Token budget of the run, in data tokens; null: train.steps sets it. It must be a whole number of
    global batches."""
    global_batch_rows: int = within(32, at_least=1)
    """Rows of one optimizer step over all ranks."""
    micro_batch_rows: int = within(4, at_least=1)
    """Stack rows that run through the model at once on one rank."""
    seed: int = within(1, at_least=0, below=2**53)
    """Seed of weights, data order, times, masks and orders. Everything random is a function of
    (seed, step, row); no generator state is saved."""
    log_every_steps: int = within(10, at_least=1)
    """Steps between progress lines; TensorBoard gets every step that is logged."""
    eval_every_steps: int | None = within(None, at_least=1, hint="null evaluates only at the end")
    """Steps between evaluations; null: only at the end."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps to profile, numbered as in the log; the run's folder gets a trace and a table of phases of
    each."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks on which these steps are profiled. A profiled step is slower."""
    save_every_steps: int | None = within(
        None, at_least=1, hint="null saves only at the end and on a signal"
    )
    """Steps between checkpoints; null: only at the end and on a signal."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate and its guards."""

    learning_rate: float = within(3e-4, above=0, below=math.inf)
    """Peak learning rate."""
    min_learning_rate: float = within(0.0, at_least=0, below=math.inf)
    """Learning rate at the end of a decay."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up: constant; cosine decay to the end; warm-up-stable-decay (constant, then linear
    over the last decay_steps)."""
    warmup_steps: int = within(0, at_least=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int | None = within(
        None, at_least=1, hint="null takes the default, schedule=constant has no decay"
    )
    """Length of the decay, in steps; null: cosine decays from the warm-up to the end, wsd over the last
    tenth of the steps."""
    beta1: float = within(0.9, at_least=0, below=1)
    """Decay of the first moment."""
    beta2: float = within(0.95, at_least=0, below=1)
    """Decay of the second moment."""
    eps: float = within(1e-8, above=0, below=math.inf)
    """Added to the root of the second moment."""
    weight_decay: float = within(0.1, at_least=0, below=math.inf)
    """Decoupled weight decay of matrices and embeddings; norms and biases get none."""
    clip_grad_norm: float = within(1.0, at_least=0, hint="0 sets no bound")
    """Upper bound on the global gradient norm; 0: none."""
    ema_decay: float = within(0.0, at_least=0, below=1)
    """Decay of the moving average of the weights used for evaluation and sampling, with warm-up
    min(ema_decay, (1 + step) / (10 + step)); 0: no average."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor: int = within(1, at_least=1)
    """Ranks that share every layer's matrices (tensor parallelism)."""
    pipeline: int = within(1, at_least=1)
    """Ranks that hold consecutive layers (pipeline parallelism)."""
    virtual_pipeline: int = within(1, at_least=1)
    """Model chunks per pipeline rank; more than 1 is the interleaved schedule."""
    context: int = within(1, at_least=1)
    """Ranks that share every row's tokens (context parallelism). Around the attention they swap tokens
    for heads, so tensor x context must divide model.num_heads. For rows too long for one rank's memory."""
    sequence: bool = True
    """Split activations between tensor ranks along the row where matrices are not split (sequence
    parallelism); no effect at tensor = 1."""
    recompute: Literal["none", "attention", "full"] = "none"
    """Activations to recompute in the backward pass instead of keeping them: none, those of the attention
    kernel, or those of whole layers."""
    overlap: bool | None = None
    """Overlap gradient reduction, parameter gathering and, in the interleaved schedule, the exchange
    between pipeline stages with computation; null: on GPUs. On CPUs there is nothing to hide it behind."""
    tensor_overlap: bool = False
    """Overlap the exchange between tensor ranks with the matrix products beside it, through Transformer
    Engine's user buffers. Needs its layers, tensor > 1, sequence parallelism, and NVLink between the
    tensor ranks. No effect where precision.backend=auto takes plain layers."""
    cuda_graphs: bool = False
    """Launch each layer's forward and backward pass as one CUDA graph: speeds up small layers, which wait
    for their kernels to be launched. No effect on a CPU. Costs memory: docs/gpu.md."""
    local_ranks: int = within(1, at_least=1)
    """Ranks that ``megatron-eso train`` starts on this machine when no launcher (torchrun, Slurm) did."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and kernels."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of weights and activations; auto: bf16 on a GPU, on a CPU the one that is faster in a matmul
    measured at start. Master weights, gradients, moments and losses are always fp32."""
    backend: Literal["auto", "te", "torch"] = "auto"
    """Layers of Transformer Engine or of plain Megatron-Core; auto: Transformer Engine where it works,
    but not in fp32, whose products it computes in TF32."""
    fp8: Literal["off", "delayed", "tensorwise"] = "off"
    """FP8 of the linear layers (Transformer Engine, Hopper or newer; the head stays bf16): delayed scales
    come from earlier steps, tensorwise ones from the tensor itself. Forward e4m3, backward e5m2."""
    fp8_amax_history: int = within(1024, at_least=1)
    """delayed: number of steps whose largest value sets the scale of the next."""
    fp8_attention: bool = False
    """FP8 attention for diffusion and true-token rows (Transformer Engine, head size 128)."""
    fp8_params: bool = False
    """Keep and gather the weights of FP8 layers in FP8 only; master weights stay fp32."""
    bf16_first_layers: int = within(0, at_least=0)
    """tensorwise: number of first layers that compute in bf16."""
    bf16_last_layers: int = within(0, at_least=0)
    """tensorwise: number of last layers that compute in bf16."""
    attention: Literal["auto", "split", "dense", "flex", "te"] = "auto"
    """Attention kernel: split (fused causal call and analytic self term), dense (mask, the oracle),
    flex (FlexAttention, CUDA), te (Transformer Engine's cuDNN kernel for diffusion and true-token rows,
    split for mask copies; CUDA); auto: te with fp8_attention, else split."""
    deterministic: bool = False
    """On GPUs: the same run on the same GPUs gives the same numbers, bit by bit. Slower: attention takes
    another kernel, and NCCL sums in rings or trees. Runs on CPUs always repeat bit by bit."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run, and where."""

    keep_last: int = within(2, at_least=1)
    """Newest checkpoints to keep; older ones are removed once a newer one is complete."""
    keep_every_steps: int | None = within(None, at_least=1, hint="null keeps no milestones")
    """Checkpoints at multiples of this many steps are kept forever; null: none."""
    asynchronous: bool = True
    """Write while training goes on; the stall is reported for each save."""
    timeout_seconds: float = within(1800.0, above=0)
    """Limit for one save, in seconds. One that is not committed by then has failed: its writers are ended,
    training goes on. Removing older checkpoints afterwards does not count."""
    local_folder: str | None = path_to(Place.NODE, None)
    """Folder on this node, in memory (/dev/shm) or on a local disk, for frequent copies of each rank's
    own state; a restart at the same layout takes the newest valid of these and the shared checkpoints.
    null: none."""
    local_every_steps: int = within(50, at_least=1)
    """Steps between node-local copies, if there is a local_folder."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest valid checkpoint in the run folder; never: refuse a folder that
    has one."""
    verify_hashes: bool = True
    """Compare the manifest's hashes before loading."""
    init_from: str | None = path_to(Place.SHARED, None)
    """Folder of a checkpoint, or of a run, whose weights start this run (new optimizer, step 0); null:
    random weights."""


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about hangs, crashes and steps that go wrong."""

    setup_timeout_seconds: float = within(600.0, above=0)
    """Limit from a rank's start to its first step, and for any section that has not been timed yet."""
    min_timeout_seconds: float = within(30.0, above=0)
    """The limit for a step, an evaluation or a checkpoint is never below this."""
    timeout_factor: float = within(
        3.0, at_least=1, hint="a step may take as long as the longest so far"
    )
    """A step, an evaluation or a checkpoint may take this many times the longest so far."""
    max_restarts_without_progress: int = within(3, at_least=0)
    """The launcher gives up after this many faults in a row without a newer checkpoint."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do if a loss or gradient is not finite, also when the step is run again: stop with exit
    code 5; skip the step's batch; or go back to the newest checkpoint and leave the batch out."""
    on_spike: Literal["warn", "stop", "skip", "rollback"] = "warn"
    """What to do if a loss is far above those before, also when the step is run again; warn applies the
    step."""
    spike_window: int = within(100, at_least=0)
    """Number of losses that a new one is compared with; 0: no spike detection."""
    spike_deviations: float = within(8.0, above=0)
    """A spike is this many standard deviations above the mean of the window."""
    max_skipped_steps: int = within(10, at_least=0)
    """Batches that may be left out; one more stops the run with exit code 5."""
    straggler_every_steps: int = within(100, at_least=0)
    """Steps between reports of each rank's step times; 0: none."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    num_rows: int = within(64, at_least=1)
    """Held-out rows per validation set; fewer if the set has fewer."""
    micro_batch_rows: int | None = within(
        None, at_least=1, hint="null takes train.micro_batch_rows"
    )
    """Stack rows that are evaluated at once; null: train.micro_batch_rows."""
    likelihood_orders: int = within(1, at_least=0)
    """Orders K of the likelihood bound - log mean_k p(x | order_k); 0: do not compute it."""
    nelbo_repeats: int = within(1, at_least=1)
    """Times, masks and orders drawn per row for the NELBO."""
    noise_eps: float = within(0.0, at_least=0, below=1)
    """Lowest time of the evaluation; 0 is unbiased."""
    alpha_0: float | None = within(None, at_least=0, at_most=1)
    """alpha_0 of the evaluation; null: objective.alpha_0."""
    use_ema: bool = True
    """Evaluate and sample the averaged weights, if the run keeps them."""


@dataclass(frozen=True)
class RunConfig:
    """A run: everything that ``megatron-eso train`` needs to know."""

    name: str = "run"
    """Name of the run."""
    folder: str = path_to(Place.RUN, "runs/${name}")
    """Folder that receives the resolved configuration, log, TensorBoard files and checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the transformer."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is predicted from what."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where tokens come from."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and batch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and learning rate."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats and kernels."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    """Hangs, crashes, bad steps."""
