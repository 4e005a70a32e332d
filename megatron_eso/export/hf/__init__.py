"""The files that go beside exported weights; they can also be imported from the package."""


def register() -> None:
    """Make transformers' Auto classes know the Eso-LM model types, without ``trust_remote_code``.

    It may be called again.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_eso.export.hf.configuration_esolm import EsoLMConfig, EsoLMDiTConfig
    from megatron_eso.export.hf.modeling_esolm import EsoLMDiTForCausalLM, EsoLMForCausalLM

    for config, model in ((EsoLMConfig, EsoLMForCausalLM), (EsoLMDiTConfig, EsoLMDiTForCausalLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModelForCausalLM")
