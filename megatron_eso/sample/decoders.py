"""How each objective predicts the tokens of a step: what it feeds, what it keeps, what it sees.

A decoder gets the rows so far, the entries decided since its last call and the entries open now, and
returns logits of the open ones. Eso-LM, AR and block diffusion keep keys and values of clean tokens.
Masked diffusion sees both ways, so every step is a whole pass. (The plan has no steps that decide
nothing, which replaces its "skip if unchanged" cache.)

Letters: B = rows, n = fresh entries, k = open entries, L = tokens of a row, V = vocabulary without mask.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron_eso.config.schema import ObjectiveConfig
from megatron_eso.errors import ConfigError
from megatron_eso.model.replica import Replica
from megatron_eso.objective.rows import Pattern
from megatron_eso.sample.cache import Cache
from megatron_eso.sample.plan import DecodingPlan
from megatron_eso.sample.stages import Stages


class Decoder(Protocol):
    """Predicts the open entries of one step."""

    def logits(self, tokens: Tensor, fresh: Tensor, open_: Tensor) -> Tensor:
        """Return [B, k, V].

        Args:
            tokens: [B, L] rows so far, the mask token where nothing is decided.
            fresh: [B, n] columns decided since the last call (at first: the given ones).
            open_: [B, k] columns to predict.
        """
        ...


def make_decoder(
    replica: Replica, plan: DecodingPlan, padding: Tensor, *, cuda_graphs: bool = True
) -> Decoder:
    """Return the decoder of the model's objective.

    Args:
        replica: model without sequence parallelism.
        plan: what will be decided in which step.
        padding: [B] columns of padding at the left of each row, on the host.
        cuda_graphs: steps may run from CUDA graphs.

    Raises:
        ConfigError: if the objective cannot follow the plan or begin with the prompts.
    """
    check_prompts(replica.config.objective, plan.num_given, padding)
    name = replica.config.objective.name
    stages = Stages(replica, cuda_graphs=cuda_graphs)
    if name == "eso":
        return EsoDecoder(replica, stages, plan, padding)
    if name == "ar":
        return AutoregressiveDecoder(replica, stages, plan, padding)
    if name == "mdlm":
        return MaskedDecoder(replica, stages, padding)
    return BlockDecoder(replica, stages, plan, padding)


def check_prompts(objective: ObjectiveConfig, num_given: int, padding: Tensor) -> None:
    """Refuse prompts that an objective cannot begin with; ``num_given`` columns include the padding [B].

    Raises:
        ConfigError: naming what to change.
    """
    if objective.name == "bd3lm" and bool(padding.any()):
        raise ConfigError(
            "block diffusion cannot take prompts of different lengths in one batch: its blocks would "
            "not line up; sample them one after the other"
        )
    if objective.name == "ar" and not objective.leading_mask and num_given <= int(padding.max()):
        raise ConfigError(
            "this ar model was trained with objective.leading_mask=false: its first token must be "
            "given; start with a prompt"
        )


class _Cached:
    """What cached decoders share: the model, the cache, and which kept entries are padding."""

    def __init__(self, replica: Replica, stages: Stages, padding: Tensor, capacity: int) -> None:
        self.stages = stages
        self.padding = padding.to(replica.device)
        self.cache = Cache(capacity)
        self._is_valid: Tensor | None = None
        if bool(padding.any()):
            shape = (len(padding), self.cache.capacity)
            self._is_valid = torch.ones(shape, dtype=torch.bool, device=replica.device)

    def positions(self, columns: Tensor) -> Tensor:
        """Return rotary positions of columns, counted from the first one that is not padding."""
        return (columns - self.padding[:, None]).clamp(min=0)

    def visible(self, columns: Tensor) -> Tensor | None:
        """Note the padding in a new segment; return [B, kept + n] keys that may be seen; None: all."""
        if self._is_valid is None:
            return None
        end = self.cache.num_kept + columns.shape[1]
        self._is_valid[:, self.cache.num_kept : end] = columns >= self.padding[:, None]
        return self._is_valid[:, :end]


class EsoDecoder(_Cached):
    """Feeds [fresh clean tokens; masks of this step], causal inside; keeps the clean ones."""

    def __init__(
        self, replica: Replica, stages: Stages, plan: DecodingPlan, padding: Tensor
    ) -> None:
        capacity = plan.order.shape[1] + max(plan.counts, default=0)
        super().__init__(replica, stages, padding, capacity)
        self._mask_id = replica.config.model.vocab_size - 1

    def logits(self, tokens: Tensor, fresh: Tensor, open_: Tensor) -> Tensor:
        """Return the logits of the step's masks; see Decoder."""
        columns = torch.cat([fresh, open_], dim=1)
        masks = torch.full_like(open_, self._mask_id)
        slots = torch.arange(fresh.shape[1], columns.shape[1], device=tokens.device)
        found = self.stages.logits(
            torch.cat([tokens.gather(1, fresh), masks], dim=1),
            self.positions(columns),
            slots.expand_as(open_),
            store=self.cache,
            is_valid=self.visible(columns),
        )
        self.cache.keep(fresh.shape[1])
        return found


class AutoregressiveDecoder(_Cached):
    """Feeds the newest token, predicts the next; begins with a mask if the model was trained so."""

    def __init__(
        self, replica: Replica, stages: Stages, plan: DecodingPlan, padding: Tensor
    ) -> None:
        super().__init__(replica, stages, padding, plan.order.shape[1] + 1)
        self._mask_id = replica.config.model.vocab_size - 1
        self._has_leading_mask = replica.config.objective.leading_mask
        reading = torch.arange(plan.order.shape[1]).expand_as(plan.order)
        if any(count > 1 for count in plan.counts) or not torch.equal(plan.order, reading):
            raise ConfigError(
                "a model of objective.name=ar decides one token at a time from left to right; ask for "
                "the left-to-right plan and no gaps"
            )

    def logits(self, tokens: Tensor, fresh: Tensor, open_: Tensor) -> Tensor:
        """Return the logits of the next token; see Decoder."""
        inputs, columns = tokens.gather(1, fresh), fresh
        if self._has_leading_mask:
            columns = columns + 1  # the mask takes the place of the row's first token
            if not self.cache.num_kept:
                inputs = torch.cat([tokens[:, :1], inputs], dim=1)
                inputs.scatter_(1, self.padding[:, None], self._mask_id)
                columns = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
        positions = self.positions(columns)
        last = torch.full_like(open_, inputs.shape[1] - 1)
        is_valid = self.visible(columns)
        found = self.stages.logits(inputs, positions, last, store=self.cache, is_valid=is_valid)
        self.cache.keep(inputs.shape[1])
        return found


class MaskedDecoder:
    """Feeds the whole row in every step; every entry sees every other."""

    def __init__(self, replica: Replica, stages: Stages, padding: Tensor) -> None:
        self.stages = stages
        self.padding = padding.to(replica.device)
        self._has_padding = bool(padding.any())

    def logits(self, tokens: Tensor, fresh: Tensor, open_: Tensor) -> Tensor:
        """Return the logits of the step's entries; see Decoder."""
        del fresh
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        is_valid = columns >= self.padding[:, None] if self._has_padding else None
        positions = (columns - self.padding[:, None]).clamp(min=0)
        return self.stages.logits(
            tokens, positions, open_, pattern=Pattern.BIDIRECTIONAL, is_valid=is_valid
        )


class BlockDecoder(_Cached):
    """Feeds the current block with masks in place, seen both ways; keeps finished blocks."""

    def __init__(
        self, replica: Replica, stages: Stages, plan: DecodingPlan, padding: Tensor
    ) -> None:
        super().__init__(replica, stages, padding, plan.order.shape[1])
        self._size = replica.config.objective.block_size
        blocks = plan.order[:, plan.num_given :] // self._size
        is_in_turn = bool((blocks[:, 1:] >= blocks[:, :-1]).all())
        steps = blocks.split(plan.counts, dim=1) if plan.counts else ()
        in_one_block = all(bool((step == step[:, :1]).all()) for step in steps)
        if not (is_in_turn and in_one_block):
            raise ConfigError(
                f"a model of objective.name=bd3lm decides blocks of {self._size} one after the other; "
                "make its plan with make_block_plan"
            )
        # Read here, so that no step waits for the GPU to say which block it is in.
        self._blocks = iter([int(step[0, 0]) for step in steps])

    def logits(self, tokens: Tensor, fresh: Tensor, open_: Tensor) -> Tensor:
        """Return the logits of the step's entries; see Decoder."""
        del fresh
        first = next(self._blocks) * self._size
        while self.cache.num_kept < first:
            done = self._segment(tokens, self.cache.num_kept)
            self.stages.hidden(*done, store=self.cache, pattern=Pattern.BLOCK)
            self.cache.keep(self._size)
        inputs, positions = self._segment(tokens, first)
        return self.stages.logits(
            inputs, positions, open_ - first, store=self.cache, pattern=Pattern.BLOCK
        )

    def _segment(self, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        columns = torch.arange(first, first + self._size, device=tokens.device)
        return tokens[:, first : first + self._size], columns.expand(len(tokens), -1)
