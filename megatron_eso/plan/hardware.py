"""What a GPU and its links can do, with the few constants that are fitted to measured runs.

A profile is a YAML file: one of configs/hardware by name, or any path. Its optional ``constants``
section holds the result of ``megatron-eso plan --calibrate``.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_eso.config.load import load_config
from megatron_eso.config.ranges import out_of_range, within
from megatron_eso.errors import ConfigError

PROFILES = Path(__file__).parents[2] / "configs" / "hardware"


@dataclass(frozen=True)
class Constants:
    """Fitted constants. They do not transfer between software stacks: calibrate per stack."""

    gemm_efficiency: float = within(0.80, above=0)
    """Share of the 16-bit peak that an infinitely wide matrix product reaches."""
    fp8_efficiency: float = within(0.65, above=0)
    """The same of the FP8 peak, casts included."""
    half_width: float = within(250.0, above=0)
    """Width of a product's narrow side, per tensor rank, at which it reaches half of ``gemm_efficiency``;
    an FP8 product needs twice this width for half of its own."""
    attention_efficiency: float = within(0.50, above=0)
    """Share of the 16-bit peak that the attention kernel reaches, forward and backward together."""
    memory_efficiency: float = within(0.60, above=0)
    """Share of the memory bandwidth that element-wise kernels reach."""
    tensor_exposed: float = within(0.35, at_least=0)
    """Share of tensor (and context) parallel communication that computation does not hide."""
    network_exposed: float = within(0.30, at_least=0)
    """Share of pipeline and data parallel communication that computation does not hide."""
    straggler: float = within(0.010, at_least=0)
    """Slow-down per doubling of the number of nodes."""
    layer_seconds: float = within(5e-5, at_least=0)
    """Fixed time of one layer's forward and backward for one micro-batch (kernel launches)."""


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU node."""

    name: str = "h100"
    """Name of the profile."""
    gpus_per_node: int = within(8, at_least=1)
    """GPUs that share the fast links."""
    bf16_tflops: float = within(989.0, above=0)
    """Dense 16-bit matrix peak of a GPU."""
    fp8_tflops: float = within(1979.0, at_least=0)
    """Dense 8-bit matrix peak of a GPU; 0: none."""
    memory_gb: float = within(80.0, above=0)
    """Memory of a GPU, 1e9 bytes."""
    memory_tb_per_second: float = within(3.35, above=0)
    """Memory bandwidth of a GPU."""
    node_link_gb_per_second: float = within(450.0, above=0)
    """Bandwidth of a GPU to the others of its node, one way."""
    network_gb_per_second: float = within(50.0, above=0)
    """Bandwidth of a GPU to other nodes, one way."""
    dollars_per_gpu_hour: float = within(2.5, at_least=0)
    """Price."""
    workspace_gb: float = within(8.0, at_least=0)
    """Memory taken by contexts, communication buffers and fragmentation."""
    sampling_layer_seconds: float = within(9.5e-5, at_least=0)
    """Fixed time of one layer in one call of a sampler: its kernels, launched as a CUDA graph."""
    host_copy_gb_per_second: float = within(10.0, above=0)
    """Speed at which a GPU's share of a checkpoint is copied to the host; training stalls meanwhile."""
    constants: Constants = field(default_factory=Constants)
    """Fitted constants."""
    prior: Constants = field(default_factory=Constants)
    """Where a calibration starts. Never the result of one: leave-one-out errors would look too small."""


def load_hardware(name_or_path: str) -> Hardware:
    """Return a hardware profile.

    Raises:
        ConfigError: if there is no profile of that name (the message names those there are), or a value
            is out of range.
    """
    for path in (Path(name_or_path), PROFILES / f"{name_or_path}.yaml"):
        if path.is_file():
            hardware = load_config(path, schema=Hardware)
            beyond = [message for _, message in out_of_range(hardware)]
            if beyond:
                raise ConfigError(f"hardware {hardware.name}: {'; '.join(beyond)}")
            return hardware
    known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml"))) or "none found"
    raise ConfigError(
        f"hardware profile '{name_or_path}' is neither a file nor one of configs/hardware: {known}"
    )


def constants_dict(constants: Constants) -> dict[str, float]:
    """Return the constants as a plain dictionary."""
    return asdict(constants)
