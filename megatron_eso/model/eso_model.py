"""The Eso-LM on one pipeline stage: embedding, Megatron's transformer block, head on masked entries.

Megatron's layout is [L, R, H]; StackRows come as [R, L]. Letters: R = stack rows, L = tokens, H =
hidden size, N = entries with loss, V = padded vocabulary, T = tensor ranks.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.model.layer_graphs import LayerGraphs
from megatron_eso.model.rotary import gather_angles, rotary_tables
from megatron_eso.model.specs import block_spec
from megatron_eso.objective.rows import StackRows
from megatron_eso.parallel.megatron_patches import importing_megatron, without_cuda_names
from megatron_eso.parallel.norms import select_entries
from megatron_eso.parallel.parameters import await_gathered
from megatron_eso.parallel.vocabulary_loss import Head, target_log_probs

with importing_megatron():
    from megatron.core import tensor_parallel
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import ModelType
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig


class EsoModel(LanguageModule):
    """One pipeline stage (or chunk of one) of the model."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        attention: str = "split",
        backend: str = "torch",
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.model_shape = model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model.tie_embeddings
        padded_vocab = derive.padded_vocab_size(model)
        if pre_process:
            of_embedding = copy(config)
            of_embedding.hidden_dropout = 0.0  # dropout is for residual branches alone
            self.embedding = LanguageModelEmbedding(
                of_embedding,
                vocab_size=padded_vocab,
                max_sequence_length=model.max_length,
                position_embedding_type="none",
            )
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
        self.decoder = TransformerBlock(
            config,
            block_spec(model, num_layers=num_layers, attention=attention, backend=backend),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            of_head = copy(config)
            of_head.gradient_accumulation_fusion = False  # Megatron's own layers need Apex for it
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded_vocab,
                config=of_head,
                init_method=config.init_method,  # type: ignore[arg-type]
                bias=model.head_bias,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and model.tie_embeddings,
                # With sequence parallelism the gather in `_entries` sums the gradients over ranks.
                disable_grad_reduce=config.sequence_parallel,
            )
            # The entries with loss are gathered before the head, so the head never splits the row.
            self.output_layer.sequence_parallel = False
        tables = rotary_tables(model.max_length, derive.head_size(model), model.rotary_base)
        # Not buffers: they follow from the configuration and do not belong in a checkpoint.
        self._cos, self._sin = (t.to(_device(config), config.params_dtype) for t in tables)
        self.setup_embeddings_and_output_layer()
        self._graphs: LayerGraphs | None = None

    def use_cuda_graphs(self) -> None:
        """Run the layers of training passes from CUDA graphs; gradient buffers must already exist."""
        self._graphs = LayerGraphs(self.decoder.layers)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous stage's output; called by Megatron's schedules."""
        self.decoder.set_input_tensor(input_tensor[0])  # type: ignore[arg-type]

    def forward(self, rows: StackRows) -> Tensor:
        """Return log-probabilities [N] on the last stage, hidden states [L, R, H] on the others."""
        with without_cuda_names():
            return self._forward(rows)

    def _forward(self, rows: StackRows) -> Tensor:
        hidden = self.hidden_states(
            rows.tokens,
            self.attention_rows(
                rows.positions,
                num_pairs=rows.num_pairs,
                pattern=rows.pattern,
                block_size=rows.block_size,
                is_valid=rows.is_valid,
                graphs=self._graphs if torch.is_grad_enabled() else None,
            ),
        )
        if not self.post_process:
            return hidden
        return target_log_probs(
            self._entries(hidden, rows.loss_entries),
            rows.loss_targets,
            Head(
                weight=self.head_weight(),
                bias=self.output_layer.bias,
                num_real_tokens=self.model_shape.vocab_size - 1,
                group=self.decoder.tp_group,
                sums_inputs=not self.config.sequence_parallel,
            ),
            loss_gradient=rows.loss_gradient,
        )

    def attention_rows(self, positions: Tensor, **rows: Any) -> AttentionRows:
        """Return what attention must know, with the rotary angles of ``positions`` [R, L]."""
        cos, sin = gather_angles(self._cos, positions), gather_angles(self._sin, positions)
        return AttentionRows(cos=cos, sin=sin, **rows)

    def hidden_states(self, tokens: Tensor, rows: AttentionRows) -> Tensor:
        """Return the final hidden states of the stage, [L, R, H] (L/T with sequence parallelism)."""
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens, position_ids=None)
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=rows)

    def logits(self, hidden: Tensor, entries: Tensor) -> Tensor:
        """Return [N, V/T]: the head applied to only the flat entries row * L + slot."""
        weight = self.head_weight()
        return self.output_layer(self._entries(hidden, entries), weight=weight)[0]

    def _entries(self, hidden: Tensor, entries: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            # The gather's backward pass sums the gradient over ranks.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        return select_entries(hidden, entries)

    def head_weight(self) -> Tensor:
        """Return the head's weight [V/T, H], the embedding's if they are tied."""
        await_gathered(self.output_layer)
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None
        return weight


def _device(config: TransformerConfig) -> torch.device:
    on_cpu = config.use_cpu_initialization
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
