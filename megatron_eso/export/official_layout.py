"""Names and shapes in an official Eso-LM checkpoint (github.com/s-sahoo/Eso-LMs, models/dit.py).

Letters: V = vocabulary with the mask token, H = hidden size, F = inner size of the MLP, C = size of
the condition, E = size of the time embedding.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from megatron_eso.errors import CheckpointError

PREFIX = "backbone."
ROTARY = "rotary_emb.inv_freq"  # a buffer: not among the averaged parameters
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors without their prefix.

    Raises:
        CheckpointError: if there are other tensors, or entries that are not tensors.
    """
    strange = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"not tensors in state_dict: {', '.join(map(str, strange))}")
    others = [name for name in state_dict if not name.startswith(PREFIX)]
    if others:
        raise CheckpointError(f"unknown tensors in state_dict: {', '.join(sorted(others))}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}


def num_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of transformer blocks."""
    return 1 + max((int(m[1]) for name in tensors if (m := _BLOCK.match(name))), default=-1)


def require_layout(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless exactly the format's tensors are there, with the right shapes.

    Raises:
        CheckpointError: naming all missing and unknown tensors and all wrong shapes.
    """
    sizes = ("vocab_embed.embedding", "sigma_map.mlp.0.weight", "blocks.0.mlp.0.weight")
    lacking = [name for name in sizes if name not in tensors or tensors[name].dim() != 2]
    if lacking:
        raise CheckpointError(
            f"missing tensors: {', '.join(lacking)}; is this an Eso-LM checkpoint with the DiT backbone?"
        )
    expected = _shapes(tensors)
    found = [f"{name} is missing" for name in expected if name not in tensors]
    found += [f"{name} is unknown" for name in tensors if name not in expected and name != ROTARY]
    found += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if found:
        raise CheckpointError(
            "the tensors are not those of the official format:\n  - " + "\n  - ".join(found)
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    vocab, hidden = tensors["vocab_embed.embedding"].shape
    condition, embedding = tensors["sigma_map.mlp.0.weight"].shape
    inner = tensors["blocks.0.mlp.0.weight"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (vocab, hidden),
        "sigma_map.mlp.0.weight": (condition, embedding),
        "sigma_map.mlp.0.bias": (condition,),
        "sigma_map.mlp.2.weight": (condition, condition),
        "sigma_map.mlp.2.bias": (condition,),
        "output_layer.norm_final.weight": (hidden,),
        "output_layer.linear.weight": (vocab, hidden),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * hidden, condition),
        "output_layer.adaLN_modulation.bias": (2 * hidden,),
    }
    for block in range(num_blocks(tensors)):
        of_block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (hidden,),
            "attn_qkv.weight": (3 * hidden, hidden),
            "attn_out.weight": (hidden, hidden),
            "norm2.weight": (hidden,),
            "mlp.0.weight": (inner, hidden),
            "mlp.0.bias": (inner,),
            "mlp.2.weight": (hidden, inner),
            "mlp.2.bias": (hidden,),
            "adaLN_modulation.weight": (6 * hidden, condition),
            "adaLN_modulation.bias": (6 * hidden,),
        }
        shapes.update({f"blocks.{block}.{name}": shape for name, shape in of_block.items()})
    return shapes
