"""The README.md of an exported folder: what the model is, how to use it, what was verified."""

from typing import Any


def model_card(config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the README.md, with the results of the verification.

    Args:
        config: content of config.json.
        facts: content of esolm_export.json.
    """
    checked, objective = facts["verification"], facts["objective"]
    lines = [f"| {name} | {value:.3g} |" for name, value in checked.items()] if checked else []
    table = (
        "\n".join(["| check | found |", "|---|---|", *lines])
        if lines
        else "Not verified (--no-verify)."
    )
    is_next_token = objective["name"] == "ar"
    if is_next_token:
        begin = _LEADING_MASK if objective["leading_mask"] else _NO_LEADING_MASK
        usage = _STOCK_BEGIN + begin + _STOCK_END
    else:
        usage = _BACKBONE if facts["format"] == "backbone" else _USAGE
    return _CARD.format(
        tag="autoregressive" if is_next_token else "diffusion",
        kind="backbone" if facts["format"] == "backbone" else config["model_type"],
        title="Next-token model" if is_next_token else "Eso-LM",
        what=_WHAT_AR if is_next_token else _WHAT.format(alpha_0=objective["alpha_0"]),
        parameters=f"{facts['num_parameters']:,}",
        step=facts["step"],
        weights=facts["weights"],
        dtype=config["dtype"],
        mask=config["mask_token_id"],
        usage=usage.format(mask=config["mask_token_id"]),
        table=table,
    )


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tag}, {kind}]
---
# {title}, {parameters} parameters

{what}: step {step}, {weights} weights, stored in {dtype}. The mask token is id {mask}.

{usage}
## Verified when exported

Against an independent forward pass over the source checkpoint, in float32 (limits: relative logit
difference 1e-4, KL 1e-8, the same most likely token everywhere, generated tokens within 1e-3 nats):

{table}
"""
_WHAT = """An Eso-LM ("Esoteric Language Models", arXiv 2506.01928; alpha_0 = {alpha_0}) trained with
megatron_eso"""
_WHAT_AR = """An autoregressive model (objective.name=ar) trained with megatron_eso"""
_USAGE = """    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    prompt = tokenizer("def ", return_tensors="pt")
    rows = model.generate(**prompt, max_new_tokens=64, alpha_0=0.5, do_sample=True, top_p=0.9, seed=1)
    scores = model.log_likelihood([[1, 2]], [[3, 4]], order="left-to-right")

`model(input_ids)` takes a canvas with mask tokens in place and returns logits AT each mask: nothing is
shifted by one. It is no next-token model: stock servers must not load it as one.
"""
_BACKBONE = """These are stock Llama or Qwen3 weights. Two traps:

1. The model predicts the token AT a mask token from entries in prediction order. Read as a next-token
   model the same weights give garbage, without an error.
2. Permuted rows need gathered rotary angles. Given `position_ids` that do not count up, transformers
   builds a block-diagonal mask (packed sequences) silently, also with FlashAttention at batch 1: pass
   `position_embeddings` to the layers and a 4-d causal mask of your own.

Use `--format esolm` (the default) unless you know why not.
"""
_STOCK_BEGIN = """These are stock Llama or Qwen3 weights of a next-token model: the logits at a token are
those of the token behind it. """
_STOCK_END = """
The mask token is no prediction: training left its logit out of the softmax. So does generation_config.json
(`suppress_tokens`); in likelihoods set `logits[..., {mask}]` to -inf.
"""
_LEADING_MASK = """Every row was trained with the mask token in front, which is
`bos_token_id`: prompts start with it. The tokenizer does not know it, so put it there:

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = tokenizer("def ", return_tensors="pt").input_ids
    first = torch.full_like(prompt[:, :1], model.config.bos_token_id)
    rows = model.generate(torch.cat([first, prompt], dim=1), max_new_tokens=64)
"""
_NO_LEADING_MASK = """Rows were trained from their first token on, with nothing in front: a prompt
has at least one token.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = tokenizer("def ", return_tensors="pt")
    rows = model.generate(**prompt, max_new_tokens=64)
"""
