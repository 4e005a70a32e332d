"""Eso-LM for transformers 4.57 and 5: Llama's layers (Qwen3's with ``qk_norm``) over a permuted row.

The model predicts the token AT each mask, from the clean tokens and the masks before it in prediction
order. Nothing is shifted by one. The layers get our cosines, sines and mask, and never ``position_ids``:
where these do not count up, transformers takes them for packed sequences and silently builds a
block-diagonal mask. The file goes beside the weights, so it imports nothing of the package.

Letters: B = rows, L = tokens of a row, Q = queries, K = keys, N = entries, H = hidden size, V = vocabulary.
"""

import inspect
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_esolm import EsoLMConfig, EsoLMDiTConfig
from .decoding_esolm import likelihood_orders, pad_lists, sort_order
from .generation_esolm import generate_rows, valid_entries

# What callers pass to forward() of other models, and what changes nothing here.
_IGNORED = {"use_cache", "return_dict"}
_IS_V5 = int(transformers.__version__.split(".")[0]) >= 5
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
# transformers 5.24 renamed the argument; its layers ignore names that they do not know.
(_CACHE,) = {"cache", "past_key_values"} & set(
    inspect.signature(LlamaDecoderLayer.forward).parameters
)


@dataclass
class EsoLMLikelihood(ModelOutput):
    """Exact log-probabilities of continuations, in nats."""

    log_likelihood: torch.Tensor | None = None
    """[B] float64; of several orders, log of the mean probability: a lower bound in expectation."""
    token_log_probs: torch.Tensor | None = None
    """[B, N] float64, of the continuation's tokens under the last order; 0 for padding."""
    is_greedy: torch.Tensor | None = None
    """[B] True where every token of the continuation was the most likely one under the last order."""
    order: str | None = None
    """Name of the orders, for reports."""


class EsoLMPreTrainedModel(PreTrainedModel):
    """What transformers must know about the models."""

    config_class = EsoLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # it takes no mask: right where all is causal, else silently wrong
    _supports_flash_attn_2 = False
    # No _init_weights: that of the base class serves these layers. One that fills `weight.data` would
    # silently overwrite loaded weights in transformers 5.0.


class _GeluMLP(nn.Module):
    """The MLP of the official code: two matrices with GELU between."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias
        )
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.up_proj(hidden)))


def _is_official(config):
    # By name, since a configuration that is loaded as remote code may be of a copy of the class.
    return config.model_type == EsoLMDiTConfig.model_type


def _norm(config):
    if _is_official(config):
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _layer(config, index):
    layer = LlamaDecoderLayer(config, index)
    if config.qk_norm:
        layer.self_attn = Qwen3Attention(config, index)
    if _is_official(config):
        layer.mlp = _GeluMLP(config)
        layer.input_layernorm, layer.post_attention_layernorm = _norm(config), _norm(config)
    return layer


class EsoLMModel(EsoLMPreTrainedModel):
    """Embedding, layers and last norm, for entries in prediction order with their positions."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, tokens, positions, visible=None, cache=None):
        """Return hidden states [B, Q, H] after the last norm.

        Args:
            tokens: [B, Q] ids in prediction order.
            positions: [B, Q] place of each in reading order.
            visible: [B, Q, K] True where a query sees a key; None: it sees itself and those before it.
            cache: keys and values of earlier segments, with ``update`` as in the caches of transformers.
        """
        hidden = self.embed_tokens(tokens)
        angles = self._angles(positions, hidden.dtype)
        mask = self._mask(visible, tokens, hidden.dtype)
        for layer in self.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=angles, **{_CACHE: cache}
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.norm(hidden)

    def _angles(self, positions, dtype):
        # In float64, since at position 1000 float32 angles are off by 6e-5.
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        size = self.config.head_dim
        exponent = torch.arange(0, size, 2, dtype=exact, device=positions.device) / size
        angles = positions[..., None].to(exact) * self.config.rope_theta**-exponent
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _mask(self, visible, tokens, dtype):
        """Return what is added to the scores, [B, 1, Q, K]; None for sdpa's causal; flex's block mask."""
        if visible is None:
            if self.config._attn_implementation == "sdpa":
                return None  # it has a causal kernel
            length = tokens.shape[1]
            visible = torch.ones(
                len(tokens), length, length, dtype=torch.bool, device=tokens.device
            )
            visible = visible.tril()
        if self.config._attn_implementation == "flex_attention":
            # No mask of scores: the CPU kernel reads past its end where a row is not whole blocks.
            shape = (len(visible), None, *visible.shape[1:])
            return create_block_mask(lambda b, h, q, k: visible[b, q, k], *shape, visible.device)
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=tokens.device)
        return torch.where(visible[:, None], torch.zeros_like(hidden), hidden)


class EsoLMForCausalLM(EsoLMPreTrainedModel, GenerationMixin):
    """The model with its head: canvas pass, training loss, exact likelihood, generation."""

    _tied_weights_keys = _TIED if _IS_V5 else list(_TIED)

    def __init__(self, config):
        super().__init__(config)
        self.model = EsoLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_input_embeddings(self):
        """Return the embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Replace the head."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, labels=None, order=None, generator=None, **kwargs
    ):
        """Return the logits of a canvas (a row with masks), or the training loss of a row without.

        Args:
            input_ids: [B, L] tokens with mask tokens where a prediction is wanted.
            attention_mask: [B, L] 0 for padding, on either side; None: there is none.
            labels: [B, L] tokens, not shifted; -100: no loss, though it is seen unless it is padding.
            order: [B, L] prediction order of a canvas, a permutation of each row; None: clean tokens,
                then masks, then padding, each in reading order.
            generator: of the draws of the training loss; None: torch's own.
            kwargs: refused, except what changes nothing.

        Returns:
            Of a canvas ``logits`` [B, L, V] in reading order, with the mask token at -inf. A mask sees the
            masks before it in the order. Logits of clean entries mean nothing. With ``labels`` also
            ``loss``: the mean cross-entropy of the masks in nats. Of rows without masks ``loss`` alone:
            the Eso-LM loss in nats per token, with times, masks and orders as drawn.

        Raises:
            ValueError: for other arguments, wrong shapes, or neither masks nor labels.
        """
        wrong = [
            k for k, v in kwargs.items() if k not in _IGNORED and v is not None and v is not False
        ]
        if wrong:
            raise ValueError(
                "Eso-LM's forward takes input_ids, attention_mask, labels, order and generator, not "
                f"{', '.join(wrong)}; it permutes rows itself, so no positions, caches or embeddings"
            )
        if input_ids is None:
            raise ValueError(
                "give input_ids: [rows, tokens], with mask tokens to predict or with labels"
            )
        is_mask = input_ids == self.config.mask_token_id
        is_canvas, pad = bool(is_mask.any()), self.generation_config.pad_token_id
        valid = valid_entries(input_ids, attention_mask, pad, None if is_canvas else labels)
        if not is_canvas:
            if labels is not None:
                return CausalLMOutput(loss=self._loss(input_ids, valid, labels, generator))
            raise ValueError(
                f"input_ids hold no mask token (id {self.config.mask_token_id}), so nothing is predicted: "
                "logits stand AT masks, not before the next token; see generate() and log_likelihood()"
            )
        order = sort_order(is_mask, valid) if order is None else order
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.model(input_ids.gather(1, order), positions.gather(1, order))
        back = order.argsort(dim=1)[:, :, None].expand_as(hidden)
        logits = self.real_logits(hidden.gather(1, back))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[is_mask].float(), labels[is_mask])
        return CausalLMOutput(loss=loss, logits=logits)

    def real_logits(self, hidden):
        """Return logits [..., V] of hidden states [..., H], with the mask token at -inf."""
        logits = self.lm_head(hidden)
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.config.mask_token_id
        return logits.masked_fill(is_mask, -torch.inf)

    def predict_in_order(self, tokens, is_predicted, order, valid):
        """Return logits of entries that see the true tokens before them in prediction order.

        One pass over a doubled row: the true tokens, then a mask for each entry to predict.

        Args:
            tokens: [B, L] true tokens.
            is_predicted: [B, L] True for entries to predict, in reading order.
            order: [B, L] prediction order, padding last.
            valid: [B, L] False for padding.

        Returns:
            Logits [N, V] of the predicted entries, and their rows [N] and places [N].
        """
        num_rows, length = tokens.shape
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        wanted = is_predicted.gather(1, order)
        most = int(wanted.sum(1).max())
        slots = (~wanted).int().argsort(dim=1, stable=True)[:, :most]  # of the copies
        is_copy = wanted.gather(1, slots)
        places = order.gather(1, slots)
        inputs = torch.cat(
            [tokens.gather(1, order), torch.full_like(places, self.config.mask_token_id)], dim=1
        )
        entries = torch.cat([positions.gather(1, order), positions.gather(1, places)], dim=1)
        slot = torch.arange(length, device=tokens.device)
        of_true = (slot[:, None] >= slot[None]).expand(num_rows, -1, -1)
        of_copies = slots[:, :, None] > slot
        own = torch.eye(most, dtype=torch.bool, device=tokens.device).expand(num_rows, -1, -1)
        none = torch.zeros(num_rows, length, most, dtype=torch.bool, device=tokens.device)
        visible = torch.cat(
            [torch.cat([of_true, none], dim=2), torch.cat([of_copies, own], dim=2)], dim=1
        )
        hidden = self.model(inputs, entries, visible)[:, length:]
        row = torch.arange(num_rows, device=tokens.device)[:, None].expand_as(places)
        return self.real_logits(hidden[is_copy]), row[is_copy], places[is_copy]

    def _loss(self, tokens, valid, labels, generator):
        """Return the Eso-LM loss (arXiv 2506.01928, section 3) in nats per token, one draw for each row.

        A row takes the diffusion pass with probability kappa, else the sequential one. Each term is
        divided by the probability of its pass, so both are right in expectation.
        """
        config, device = self.config, tokens.device
        has_loss = (labels != -100) & valid
        if not torch.equal(tokens[has_loss], labels[has_loss]):
            raise ValueError(
                "labels must equal input_ids where they are not -100: nothing is shifted"
            )
        kappa = config.diffusion_fraction
        if kappa is None:
            kappa = {0.0: 0.0, 1.0: 1.0}.get(config.alpha_0, 0.5)
        num_rows, eps = len(tokens), config.noise_eps

        def uniform(*shape):
            return torch.rand(*shape, generator=generator, device=device, dtype=torch.float64)

        is_diffusion = uniform(num_rows) < kappa
        keep = config.alpha_0 * (1 - (1 - eps) * (eps + (1 - eps) * uniform(num_rows)))
        weight = config.alpha_0 * (1 - eps) / (1 - keep).clamp(min=1e-9)
        keep = torch.where(is_diffusion, keep, config.alpha_0)
        masked = has_loss & (uniform(*tokens.shape) >= keep[:, None])
        # Prompts (no loss) come first, in reading order, as in generation.
        order = sort_order(masked, valid, uniform(*tokens.shape), is_diffusion, valid & ~has_loss)

        def idle_pass():  # ranks that share weights or gradients wait for each other in every pass
            hidden = self.model(tokens[:, :1], torch.zeros_like(tokens[:, :1]))
            return self.lm_head(hidden).sum() * 0.0

        total = 0.0
        rows = is_diffusion.nonzero()[:, 0]
        if bool(masked[rows].any()):
            kept, place = masked[rows], order[rows]
            inputs = tokens[rows].masked_fill(kept, config.mask_token_id).gather(1, place)
            positions = (valid[rows].long().cumsum(1) - 1).clamp(min=0).gather(1, place)
            wanted = kept.gather(1, place)
            logits = self.real_logits(self.model(inputs, positions)[wanted])
            nats = _nats(logits, tokens[rows].gather(1, place)[wanted])
            total = total + (nats * weight[rows][wanted.nonzero()[:, 0]]).sum() / kappa
        elif kappa > 0:
            total = total + idle_pass()
        rows = (~is_diffusion).nonzero()[:, 0]
        if bool(masked[rows].any()):
            logits, row, place = self.predict_in_order(
                tokens[rows], masked[rows], order[rows], valid[rows]
            )
            total = total + _nats(logits, tokens[rows][row, place]).sum() / (1 - kappa)
        elif kappa < 1:
            total = total + idle_pass()
        return (total / has_loss.sum().clamp(min=1)).to(torch.float32)

    @torch.no_grad()
    def log_likelihood(
        self, context, continuation, order="left-to-right", alpha_0=None, seed=0, row_numbers=None
    ):
        """Return exact log p(continuation | context) as :class:`EsoLMLikelihood`, one pass for each order.

        Args:
            context: B sequences of ids; always visible.
            continuation: B sequences of ids, which follow the contexts.
            order: ``left-to-right``; a number of random orders of the alpha_0 family; or for each row a
                permutation of its continuation, counted from 0.
            alpha_0: of the random orders, in [0, 1]; None: the model's.
            seed: of the random orders.
            row_numbers: B numbers of the rows, which choose their random orders; None: 0, 1, ...

        Raises:
            ValueError: if the numbers of rows differ, or ``order`` is none of these.
        """
        tokens, predicted, valid = pad_lists(context, continuation, self.device)
        orders, name = likelihood_orders(
            predicted,
            valid,
            order,
            self.config.alpha_0 if alpha_0 is None else alpha_0,
            seed,
            range(len(tokens)) if row_numbers is None else list(map(int, row_numbers)),
        )
        width = max(int(predicted.sum(1).max()), 1)
        starts = predicted.int().argmax(dim=1)
        total = torch.full((len(tokens),), -torch.inf, dtype=torch.float64, device=self.device)
        for one in orders:
            logits, row, place = self.predict_in_order(tokens, predicted, one, valid)
            nats = _nats(logits, tokens[row, place])
            found = torch.zeros(len(tokens), width, dtype=torch.float64, device=self.device)
            found[row, place - starts[row]] = -nats
            miss = torch.zeros(len(tokens), dtype=torch.int64, device=self.device)
            miss.index_add_(0, row, (logits.argmax(1) != tokens[row, place]).long())
            total = torch.logaddexp(total, found.sum(1))
        total = total - torch.log(torch.tensor(float(len(orders)), dtype=torch.float64))
        return EsoLMLikelihood(
            log_likelihood=total, token_log_probs=found, is_greedy=miss == 0, order=name
        )

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, streamer=None, **kwargs):
        """Return filled rows; ``generation_esolm.generate_rows`` describes the arguments."""
        return generate_rows(self, inputs, generation_config, streamer, **kwargs)


class EsoLMDiTForCausalLM(EsoLMForCausalLM):
    """The model in the shape of the official code; see :class:`EsoLMDiTConfig`."""

    config_class = EsoLMDiTConfig


def _nats(logits, targets):
    """Return [N] negative log-probabilities, float64."""
    log_probs = torch.log_softmax(logits.double(), dim=1)
    return -log_probs.gather(1, targets[:, None])[:, 0]
