"""Speed against quality of samplers: what a set of samples costs and what a judge thinks of it.

Quality has two numbers that must be read together: perplexity under a judge model also falls when
samples become dull, and the entropy of the tokens shows that.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.eval.evaluate import evaluate
from megatron_eso.files import write_figure
from megatron_eso.log_axis import make_logarithmic
from megatron_eso.model.replica import Replica
from megatron_eso.parallel.exchange import Rows
from megatron_eso.sample.generate import generate
from megatron_eso.sample.prompt import rows_with_prompts
from megatron_eso.sample.sampler import Choice
from megatron_eso.sample.settings import PlanSettings

# Returns (nats, number of judged tokens) of rows, given as ids [B, L] and as texts.
Judge = Callable[[Tensor, list[str]], tuple[float, int]]


@dataclass(frozen=True)
class Point:
    """One sampler at one setting."""

    method: str
    """Objective, and for Eso-LM its alpha_0."""
    num_steps: int | None
    """Diffusion steps asked for; None: one per token."""
    evaluations: float
    """Passes through the model per batch (NFE)."""
    seconds: float
    """For all rows."""
    tokens_per_second: float
    entropy: float
    """Entropy of a row's token frequencies, nats, averaged over rows."""
    judge_perplexity: float | None
    """exp(nats per token of the judge)."""
    num_rows: int
    batch_rows: int

    def as_dict(self) -> dict:
        """Return the fields as a dictionary."""
        return asdict(self)


def measure(
    replica: Replica,
    decode: Callable[[list[int]], str],
    settings: PlanSettings,
    choice: Choice,
    *,
    num_rows: int,
    batch_rows: int,
    length: int,
    judge: Judge | None,
) -> Point:
    """Return cost and quality of rows sampled without a prompt.

    The first batch is sampled once before the clock starts, so that no point pays for the first use of
    a shape. The judge's time is not counted.

    Args:
        replica: the model.
        decode: token ids to text, for judges with a tokenizer of their own.
        settings: how rows are decided.
        choice: temperature, nucleus, seed.
        num_rows: rows to sample.
        batch_rows: rows at once.
        length: tokens of a row.
        judge: scores the rows; None: perplexity is left out.
    """
    canvas = rows_with_prompts([[]] * num_rows, length, replica.config.model)
    warm = rows_with_prompts([[]] * min(batch_rows, num_rows), length, replica.config.model)
    for _ in generate(replica, warm, settings, choice, batch_rows=batch_rows):
        pass
    begin, rows, steps = time.perf_counter(), [], []
    for batch in generate(replica, canvas, settings, choice, batch_rows=batch_rows):
        rows.append(batch.sampled.tokens.cpu())
        steps.append(batch.sampled.num_steps)
    seconds = time.perf_counter() - begin
    tokens = torch.cat(rows)
    perplexity = None
    if judge is not None:
        nats, count = judge(tokens, [decode(row) for row in tokens.tolist()])
        perplexity = float(torch.tensor(nats / count, dtype=torch.float64).exp())
    objective = replica.config.objective
    alpha_0 = objective.alpha_0 if settings.alpha_0 is None else settings.alpha_0
    return Point(
        method=f"eso alpha_0={alpha_0:g}" if objective.name == "eso" else objective.name,
        num_steps=settings.num_steps,
        evaluations=sum(steps) / len(steps),
        seconds=seconds,
        tokens_per_second=num_rows * length / seconds,
        entropy=sum(token_entropy(row) for row in tokens) / num_rows,
        judge_perplexity=perplexity,
        num_rows=num_rows,
        batch_rows=batch_rows,
    )


def token_entropy(row: Tensor) -> float:
    """Return the entropy of a row's token frequencies, in nats."""
    counts = row.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


def our_judge(replica: Replica, *, longest: int) -> Judge:
    """Return a judge that is an AR checkpoint of ours with the samples' own tokenizer.

    Args:
        replica: the judge's model.
        longest: tokens of the longest rows it will get.

    Raises:
        ConfigError: if the checkpoint is not autoregressive, or has no positions for such rows.
    """
    if replica.config.objective.name != "ar":
        raise ConfigError(
            f"the judge was trained with objective.name={replica.config.objective.name}; only ar has "
            "one exact likelihood that all samplers can be held to"
        )
    if longest > (most := replica.config.model.max_length):
        raise ConfigError(
            f"rows of {longest} tokens are longer than the judge's rotary table (model.max_length="
            f"{most}); lower --length or take another judge"
        )

    def judge(tokens: Tensor, texts: list[str]) -> tuple[float, int]:
        del texts
        number, length = tokens.shape
        longer = torch.cat([tokens, tokens[:, :1]], dim=1)
        is_valid = (torch.arange(length + 1) < length).expand(number, -1)
        train = replace(replica.config.train, sequence_length=length)
        sized = replace(replica, config=replace(replica.config, train=train))

        def read(rows: list[int]) -> Rows:
            return Rows(longer[rows], is_valid[rows])

        found = evaluate(sized, read, num_rows=number, bytes_per_token=1.0)[0]
        return found.nats_per_token * found.num_tokens, found.num_tokens

    return judge


def hugging_face_judge(model: Any, tokenizer: Any) -> Judge:
    """Return a judge that is any causal language model of `transformers`, with its own tokens.

    A text of more tokens than the model has positions is scored in windows that overlap by half.
    """
    longest = getattr(model.config, "max_position_embeddings", None)

    def judge(tokens: Tensor, texts: list[str]) -> tuple[float, int]:
        del tokens
        nats, count = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
            if ids.shape[1] < 2:
                continue
            for begin, first, end in windows(ids.shape[1], longest or ids.shape[1]):
                with torch.no_grad():
                    logits = model(ids[:, begin:end]).logits[0, first - begin - 1 : -1].float()
                targets = ids[0, first:end]
                nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += ids.shape[1] - 1
        if not count:
            raise ConfigError("the judge's tokenizer finds no token in any sample")
        return nats, count

    return judge


def windows(number: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end) of windows in which tokens ``first`` to ``end`` of a text are scored.

    Every token but the text's first is scored once, with at least half a window before it where the text
    has that.

    Args:
        number: tokens of the text.
        longest: tokens of a window, at least 2.
    """
    begin, first = 0, 1
    while first < number:
        end = min(begin + longest, number)
        yield begin, first, end
        begin, first = end - longest // 2, end


def table(points: Sequence[Point]) -> str:
    """Return the points as Markdown."""
    lines = [
        "| method | steps | NFE | seconds | tokens/s | entropy (nats) | judge perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in points:
        perplexity = "-" if p.judge_perplexity is None else f"{p.judge_perplexity:.1f}"
        steps = "one per token" if p.num_steps is None else str(p.num_steps)
        lines.append(
            f"| {p.method} | {steps} | {p.evaluations:.0f} | {p.seconds:.2f} | {p.tokens_per_second:,.0f} "
            f"| {p.entropy:.2f} | {perplexity} |"
        )
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Any) -> None:
    """Draw perplexity over seconds per row, a line per method; each point is labeled with its NFE."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(p.method for p in points):
        mine = [p for p in points if p.method == method and p.judge_perplexity is not None]
        mine.sort(key=lambda p: p.seconds)
        seconds = [p.seconds / p.num_rows for p in mine]
        heights = [p.judge_perplexity for p in mine]
        axes.plot(seconds, heights, "o-", label=method)  # type: ignore[arg-type]
        for p, x, y in zip(mine, seconds, heights, strict=True):
            axes.annotate(f"{p.evaluations:.0f}", (x, y), fontsize=7, xytext=(3, 3),
                          textcoords="offset points")  # type: ignore[arg-type]  # fmt: skip
    make_logarithmic(axes.xaxis)
    make_logarithmic(axes.yaxis)
    axes.set_xlabel("seconds per row (numbers: passes through the model)")
    axes.set_ylabel("perplexity under the judge")
    axes.legend(frameon=False)
    figure.tight_layout()
    write_figure(path, figure, dpi=150)
    pyplot.close(figure)
