"""A checkpoint's facts (esolm.json): what its tensors are, according to the writer."""

import json
from dataclasses import asdict
from typing import Any

from megatron_eso.checkpoint.folder import FORMAT_VERSION
from megatron_eso.config.schema import RunConfig


def facts_of(
    config: RunConfig,
    *,
    step: int,
    has_ema: bool,
    data: dict[str, Any],
    tokenizer: str | None,
    **more: Any,
) -> dict[str, Any]:
    """Return the facts as plain JSON values, a snapshot of what they were made from.

    Args:
        config: model, objective, row length and layout of the run.
        step: optimizer steps done.
        has_ema: averaged weights are among the tensors.
        data: fingerprint of the training data.
        tokenizer: the tokenizer's file; None if none is known.
        more: further facts of this kind of checkpoint.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "has_ema": has_ema,
        "model": asdict(config.model),
        "objective": asdict(config.objective),
        "sequence_length": config.train.sequence_length,
        "mask_token_id": config.model.vocab_size - 1,
        "data": data,
        "tokenizer": tokenizer,
        "parallel": asdict(config.parallel),
        **more,
    }
    return json.loads(json.dumps(facts))
