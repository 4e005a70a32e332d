"""lm-eval on exported models: ``python -m megatron_eso.eval.lm_eval run --model esolm ...``.

lm-eval scans no entry points, so this module registers the model and hands over to lm-eval's own command
line. Log-likelihoods are exact: one pass per order, instead of many Monte-Carlo passes. They depend on
the order, so the results name it (``config.esolm_order``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.export.hf import register

_Harness: Any = HFLM  # lm-eval's registry hides its type


class EsoLM(_Harness):
    """An exported folder as an lm-eval model.

    Model arguments beyond HFLM's: ``order`` (``left-to-right`` or a number K of random orders of the
    alpha_0 family), ``alpha_0`` (of random orders and of generation; the model's by default), ``num_steps``
    (diffusion steps of generation), ``seed``.
    """

    def __init__(
        self,
        pretrained: str,
        order: str | int = "left-to-right",
        alpha_0: float | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        batch_size: int | str = 8,
        **settings: Any,
    ) -> None:
        if not str(batch_size).isdigit():
            raise ConfigError(
                f"--batch_size {batch_size}: give a number of rows; there is no auto here"
            )
        if order != "left-to-right" and not (isinstance(order, int) and order >= 1):
            raise ConfigError(
                f"order={order!r}: 'left-to-right' or a number of random orders (order=8, say)"
            )
        register()
        super().__init__(pretrained=pretrained, batch_size=int(batch_size), **settings)
        self.order, self.alpha_0, self.num_steps, self.seed = order, alpha_0, num_steps, seed

    @property
    def max_length(self) -> int:
        """Tokens of a row minus one: lm-eval's rolling windows put one token before the row."""
        return self._max_length or self.model.config.max_position_embeddings - 1

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's facts and the order in which the log-likelihoods are computed."""
        alpha_0 = self.model.config.alpha_0 if self.alpha_0 is None else self.alpha_0
        name = self.order
        if isinstance(name, int):
            name = f"log mean of {name} random order(s), alpha_0={alpha_0:g}, seed {self.seed}"
        facts = {"esolm_order": name, "esolm_alpha_0": alpha_0, "esolm_num_steps": self.num_steps}
        return {**super().get_model_info(), **facts}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return (log p(continuation | context), whether all its tokens are the likeliest)."""
        from tqdm import tqdm

        found: dict[int, tuple[float, bool]] = {}
        # Longest first: a batch needs little padding, and a lack of memory shows immediately.
        by_length = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        size = override_bs or int(self.batch_size)
        for begin in tqdm(range(0, len(requests), size), disable=disable_tqdm or self.rank != 0):
            numbers = by_length[begin : begin + size]
            pairs = [self._fitted(*requests[i][1:]) for i in numbers]
            scores = self.model.log_likelihood(
                [context for context, _ in pairs],
                [continuation for _, continuation in pairs],
                order=self.order,
                alpha_0=self.alpha_0,
                seed=self.seed,
                row_numbers=numbers,
            )
            values = zip(scores.log_likelihood.tolist(), scores.is_greedy.tolist(), strict=True)
            found |= dict(zip(numbers, values, strict=True))
        for number, request in enumerate(requests):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], found[number])
        return [found[number] for number in range(len(requests))]

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return the pair; a context that does not fit the row loses its beginning."""
        room = self.max_length + 1 - len(continuation)
        if room < 0:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens is longer than the model's rows "
                f"({self.max_length + 1})"
            )
        return context[len(context) - room :] if len(context) > room else context, continuation

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        """Return context and generated tokens; lm-eval cuts at the stop strings itself."""
        if settings.get("temperature", 0.0) == 0.0:
            settings.pop("temperature", None)
            settings["do_sample"] = False
        with torch.no_grad():
            return self.model.generate(
                context,
                max_new_tokens=max_length - context.shape[1],
                alpha_0=self.alpha_0,
                num_steps=self.num_steps,
                seed=self.seed,
                eos_token_id=self.eot_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                **settings,
            )


def main() -> None:
    """Register the model and run lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("esolm")(EsoLM)
    cli_evaluate()


if __name__ == "__main__":
    main()
