"""Settings of an exported Eso-LM, for transformers 4.57 and 5.

The file goes beside the weights (``trust_remote_code``), so it imports nothing of the package. Sizes and
parameters have Llama's names, so tools for Llama's weights (LoRA, quantization, converters) work on them.
"""

from transformers import PretrainedConfig


class EsoLMConfig(PretrainedConfig):
    """The settings of Llama and those below.

    qk_norm             normalize queries and keys, as Qwen3 does
    head_bias           the head has a bias
    mask_token_id       unless given, the last of the ``vocab_size`` ids
    alpha_0             expected share of tokens that diffusion decides, in [0, 1]
    diffusion_fraction  share of rows that train on the diffusion loss; None: ``alpha_0`` if that is 0 or 1,
                        else 0.5
    noise_eps           training times t are in [noise_eps, 1]; alpha_t = alpha_0 (1 - (1 - noise_eps) t)

    ``layer_types`` is ignored, since all layers have full attention.
    """

    model_type = "esolm"
    default_activation = "silu"

    def __init__(
        self,
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=None,
        rope_parameters=None,
        hidden_act=None,
        attention_bias=False,
        mlp_bias=False,
        head_bias=False,
        qk_norm=False,
        alpha_0=1.0,
        diffusion_fraction=None,
        noise_eps=1e-3,
        mask_token_id=None,
        initializer_range=0.02,
        tie_word_embeddings=False,
        layer_types=None,
        **kwargs,
    ):
        """Keep the settings; see the class.

        ``rope_theta`` and ``rope_parameters`` are two spellings of one number (transformers 4 and 5; 10000
        unless given). Both are written.

        Raises:
            ValueError: if the two spellings disagree, or the rotary positions are scaled.
        """
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = _rope_theta(rope_theta, rope_parameters)
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        self.hidden_act = hidden_act or self.default_activation
        self.attention_bias, self.mlp_bias, self.head_bias = attention_bias, mlp_bias, head_bias
        self.qk_norm = qk_norm
        self.attention_dropout = 0.0
        self.sliding_window = None
        del layer_types  # always these
        self.layer_types = [
            "full_attention"
        ] * num_hidden_layers  # Qwen3's layers of 4.57 want them
        self.alpha_0 = alpha_0
        self.diffusion_fraction = diffusion_fraction
        self.noise_eps = noise_eps
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class EsoLMDiTConfig(EsoLMConfig):
    """The shape of the official Eso-LM code: LayerNorm with bias, an MLP with GELU (tanh), head bias."""

    model_type = "esolm_dit"
    default_activation = "gelu_pytorch_tanh"

    def __init__(self, **kwargs):
        """Keep the settings; transformers 5 turns a class without its own ``__init__`` into a dataclass."""
        super().__init__(**kwargs)


def _rope_theta(theta, parameters):
    parameters = parameters or {}
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_type={parameters['rope_type']!r}: Eso-LM has plain rotary positions"
        )
    other = parameters.get("rope_theta")
    if theta is not None and other is not None and theta != other:
        raise ValueError(f"rope_theta={theta} and rope_parameters={parameters} disagree")
    return float(theta or other or 10000.0)
