"""A run configuration placed on a number of GPUs: the counts that memory and time need.

Letters: t tensor, p pipeline, v virtual pipeline, c context, d data-parallel ranks.
"""

from dataclasses import dataclass

from megatron_eso.config.check import check
from megatron_eso.config.derive import head_size, num_kv_heads
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.plan.flops import Shares, shares


@dataclass(frozen=True)
class Job:
    """A run on ``num_gpus`` GPUs."""

    config: RunConfig
    num_gpus: int

    @property
    def data_parallel(self) -> int:
        """Copies of the model, d."""
        parallel = self.config.parallel
        return self.num_gpus // (parallel.tensor * parallel.pipeline * parallel.context)

    @property
    def _shares(self) -> Shares:
        return shares(self.config.objective, self.config.train.sequence_length)

    @property
    def num_stack_rows(self) -> float:
        """Rows through the stack in one step."""
        # It is whole in any run that trains, but in floating point 1.4 x 90 is a little less than 126.
        return round(self._shares.stack_rows * self.config.train.global_batch_rows, 6)

    @property
    def num_micro_batches(self) -> float:
        """Micro-batches of one step on one rank."""
        return self.num_stack_rows / (self.config.train.micro_batch_rows * self.data_parallel)

    @property
    def tokens_per_micro_batch(self) -> float:
        """Tokens of a micro-batch on one rank (context parallelism splits them)."""
        train = self.config.train
        return train.micro_batch_rows * train.sequence_length / self.config.parallel.context

    @property
    def head_share(self) -> float:
        """Entries with loss per stack token."""
        return self._shares.head_rows / self._shares.stack_rows

    @property
    def stage_layers(self) -> list[int]:
        """Layers of each pipeline stage.

        Where the layers do not divide, embedding and head count as a layer each (as for Llama 3 405B:
        126 layers on 16 stages). The trainer itself does not offer that.
        """
        layers, stages = self.config.model.num_layers, self.config.parallel.pipeline
        if layers % stages == 0:
            return [layers // stages] * stages
        if (layers + 2) % stages == 0 and stages > 1:
            each = (layers + 2) // stages
            return [each - 1, *[each] * (stages - 2), each - 1]
        raise ConfigError(
            f"model.num_layers={layers} does not divide over parallel.pipeline={stages} stages; change one"
        )

    @property
    def kv_width(self) -> int:
        """Width of keys (or values) of all heads."""
        return num_kv_heads(self.config.model) * head_size(self.config.model)


def require_trainable(job: Job) -> None:
    """Raise a :class:`ConfigError` for whatever the trainer would refuse.

    It is not for published runs, which another trainer ran.
    """
    check(job.config)
    require_placeable(job)
    check(job.config, job.num_gpus)


def require_placeable(job: Job) -> None:
    """Raise a :class:`ConfigError` unless the ranks and rows divide as the layout needs."""
    parallel, train = job.config.parallel, job.config.train
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if job.num_gpus < 1 or job.num_gpus % replica:
        raise ConfigError(
            f"{job.num_gpus} GPUs cannot hold copies of the model that take tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {replica} GPUs each; change "
            "--gpus or the layout"
        )
    per_round = train.micro_batch_rows * job.data_parallel
    if job.num_stack_rows % per_round:
        raise ConfigError(
            f"{job.num_stack_rows:g} stack rows (train.global_batch_rows={train.global_batch_rows}) do "
            f"not divide into micro-batches of {train.micro_batch_rows} on {job.data_parallel} "
            f"data-parallel ranks: their number must be a multiple of {per_round}"
        )
    job.stage_layers  # noqa: B018  raises if the layers do not divide
