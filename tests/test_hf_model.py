"""The exported model in transformers' hands: canvas, generation, likelihood, training, tools."""

import importlib.util
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TextStreamer,
)

from megatron_eso.export.exporter import export
from megatron_eso.export.hf import register
from tests.rank_jobs import VOCAB
from tests.test_export import small_tokenizer

MASK = VOCAB - 1
NATIVE = ["model.qk_norm=true"]


@pytest.fixture(scope="module")
def folder(two_ranks, tmp_path_factory):
    """Return an exported folder with a tokenizer."""
    root = tmp_path_factory.mktemp("model")
    two_ranks.run("export_checkpoint", NATIVE, str(root / "checkpoint"))
    tokenizer = small_tokenizer(root / "t.json", 60)
    export(root / "checkpoint", root / "out", use_ema=False, tokenizer=tokenizer)
    return root / "out"


@pytest.fixture(scope="module")
def model(folder):
    register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def rows(count=3, length=12, seed=0):
    return torch.randint(
        0, VOCAB - 1, (count, length), generator=torch.Generator().manual_seed(seed)
    )


def chain_rule(model, tokens, order, given):
    """Return [B] log p from one canvas pass per token, which shows everything earlier in the order."""
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for step in range(given, tokens.shape[1]):
        place = order[step]
        canvas = torch.full_like(tokens, MASK)
        seen = order[:step]
        canvas[:, seen] = tokens[:, seen]
        full = [*seen, place, *[p for p in range(tokens.shape[1]) if p not in (*seen, place)]]
        order_now = torch.tensor(full).expand(len(tokens), -1)
        with torch.no_grad():
            logits = model(input_ids=canvas, order=order_now).logits[:, place]
        total += torch.log_softmax(logits, 1).gather(1, tokens[:, place, None])[:, 0]
    return total


def test_remote_code_and_package_give_the_same_logits(folder, model):
    remote = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64
    ).eval()
    canvas = rows()
    canvas[:, 5:9] = MASK
    with torch.no_grad():
        assert torch.equal(remote(input_ids=canvas).logits, model(input_ids=canvas).logits)


@pytest.mark.slow
def test_the_model_card_s_code_runs_without_our_package_and_asks_nothing(folder):
    """If trust_remote_code is left out, transformers asks on the terminal for 15 s."""
    card = (folder / "README.md").read_text()
    lines = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    script = "import sys\nsys.modules['megatron_eso'] = None\n" + "\n".join(lines)
    done = subprocess.run(
        [sys.executable, "-c", script.replace("FOLDER", repr(str(folder))).replace("=64", "=8")],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder.parent,
    )  # fmt: skip
    assert len(lines) == 6 and done.returncode == 0, done.stderr
    assert "Do you wish" not in done.stdout + done.stderr


def test_the_mask_is_never_predicted(model):
    canvas = rows()
    canvas[:, 3] = MASK
    logits = model(input_ids=canvas).logits
    assert torch.isneginf(logits[..., MASK]).all()
    assert torch.isfinite(logits[..., :MASK]).all()


@pytest.mark.parametrize("order", ["left-to-right", "given"])
def test_the_likelihood_is_the_chain_rule(model, order):
    tokens = rows()
    if order == "given":
        local = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        found = model.log_likelihood(tokens[:, :4], tokens[:, 4:], order=local.expand(3, -1))
        full = [0, 1, 2, 3, *(4 + local).tolist()]
    else:
        found, full = model.log_likelihood(tokens[:, :4], tokens[:, 4:]), list(range(12))
    expected = chain_rule(model, tokens, full, 4)
    assert torch.allclose(found.log_likelihood, expected, atol=1e-10)
    assert torch.allclose(found.token_log_probs.sum(1), expected, atol=1e-10)


def test_random_orders_are_averaged_and_do_not_depend_on_the_batch(model):
    tokens = rows()
    context, continuation = tokens[:, :4], tokens[:, 4:]
    four = model.log_likelihood(context, continuation, order=4, alpha_0=0.7, seed=3)
    assert "4 random" in four.order
    alone = model.log_likelihood(
        context[2:], continuation[2:], order=4, alpha_0=0.7, seed=3, row_numbers=[2]
    )
    assert torch.allclose(alone.log_likelihood, four.log_likelihood[2:], atol=1e-10)
    reading = model.log_likelihood(context, continuation)
    zero = model.log_likelihood(context, continuation, order=3, alpha_0=0.0)
    assert torch.allclose(zero.log_likelihood, reading.log_likelihood, atol=1e-10)


def test_numbers_of_rows_may_be_a_tensor(model):
    found = [
        model.log_likelihood([[]] * 2, rows(2, 6), order=2, alpha_0=0.5, row_numbers=numbers)
        for numbers in ([7, 8], torch.tensor([7, 8]), None)
    ]
    first, second, default = (one.log_likelihood for one in found)
    assert torch.equal(first, second) and not torch.equal(first, default)


def test_ragged_rows_equal_single_rows(model):
    tokens = rows()
    contexts, continuations = [tokens[0, :2].tolist(), []], [tokens[0, 2:9].tolist(), [4, 5]]
    both = model.log_likelihood(contexts, continuations).log_likelihood
    for row in range(2):
        one = model.log_likelihood(contexts[row : row + 1], continuations[row : row + 1])
        assert torch.allclose(one.log_likelihood, both[row : row + 1], atol=1e-10)


def test_greedy_says_whether_every_token_is_the_likeliest(model):
    prompt = rows(1, 4)
    text = model.generate(prompt, max_new_tokens=5, alpha_0=0.0, eos_token_id=None, do_sample=False)
    found = model.log_likelihood(prompt, text[:, 4:])
    assert bool(found.is_greedy[0])
    text[0, -1] = (text[0, -1] + 1) % MASK
    assert not bool(model.log_likelihood(prompt, text[:, 4:]).is_greedy[0])


PLANS = {
    "left-to-right": {"alpha_0": 0.0},
    "diffusion": {"alpha_0": 1.0, "num_steps": 3},
    "mixed": {"alpha_0": 0.5},
    "strided": {"plan": "strided", "num_steps": 3},
    "fixed": {"plan": "fixed", "num_steps": 2, "alpha_0": 0.7},
}


@pytest.mark.parametrize("plan", PLANS)
def test_cached_equals_uncached(model, plan):
    def run(use_cache):
        return model.generate(
            rows(3, 4), max_new_tokens=8, seed=3, do_sample=True, eos_token_id=None,
            use_cache=use_cache, return_dict_in_generate=True, **PLANS[plan],
        )  # fmt: skip

    cached, full = run(True), run(False)
    assert torch.equal(cached.sequences, full.sequences)
    assert torch.allclose(cached.log_probs, full.log_probs, atol=1e-12)
    assert cached.num_evaluations == full.num_evaluations


def test_the_cached_log_probs_are_the_models(model):
    """With one token per step, their sum is the exact likelihood of the row in reading order."""
    out = model.generate(
        rows(2, 4), max_new_tokens=6, alpha_0=0.0, seed=1, do_sample=True, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    exact = model.log_likelihood(out.sequences[:, :4], out.sequences[:, 4:]).log_likelihood
    assert torch.allclose(out.log_probs.sum(1), exact, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS)
def test_a_left_padded_batch_equals_single_rows(model, plan):
    prompts = [rows(1, n, seed=n)[0] for n in (2, 5, 3)]
    width = max(map(len, prompts))
    batch = torch.stack([torch.cat([torch.full((width - len(p),), 7), p]) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    settings = {
        "max_new_tokens": 8,
        "seed": 5,
        "do_sample": True,
        "eos_token_id": None,
        **PLANS[plan],
    }
    together = model.generate(batch, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], first_row=row, **settings)
        assert torch.equal(together[row, width - len(prompt) :], alone[0])


def test_padding_on_either_side_changes_no_logits(model):
    canvas = rows(1, 6)
    canvas[0, 2:4] = MASK
    pad = torch.full((1, 3), 9)
    plain = model(input_ids=canvas).logits
    ones, zeros = torch.ones(1, 6), torch.zeros(1, 3)
    left = model(input_ids=torch.cat([pad, canvas], 1), attention_mask=torch.cat([zeros, ones], 1))
    right = model(input_ids=torch.cat([canvas, pad], 1), attention_mask=torch.cat([ones, zeros], 1))
    masked = canvas[0] == MASK
    assert torch.allclose(left.logits[:, 3:][:, masked], plain[:, masked], atol=1e-12)
    assert torch.allclose(right.logits[:, :6][:, masked], plain[:, masked], atol=1e-12)


def test_infilling_keeps_what_is_given(model):
    canvas = rows(2, 10)
    canvas[0, 2:5] = MASK
    canvas[1, 6] = MASK
    filled = model.generate(canvas, alpha_0=1.0, num_steps=2, seed=1, eos_token_id=None)
    assert filled.shape == canvas.shape
    given = canvas != MASK
    assert torch.equal(filled[given], canvas[given])
    assert not (filled == MASK).any()


def test_a_generation_config_counts_like_the_call(model):
    canvas = rows(1, 6)
    canvas[0, 2:4] = MASK
    asked = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    filled = model.generate(canvas, generation_config=asked, alpha_0=1.0, seed=1)
    assert filled.shape == (1, 9)
    assert torch.equal(
        filled, model.generate(canvas, max_new_tokens=3, alpha_0=1.0, seed=1, eos_token_id=None)
    )
    filled = model.generate(canvas, generation_config=GenerationConfig(max_length=8), seed=1)
    assert filled.shape == (1, 8)
    with pytest.raises(ValueError, match="max_time"):
        model.generate(canvas, generation_config=GenerationConfig(max_time=2.5, max_new_tokens=3))
    with pytest.raises(ValueError, match="num_beams=4"):
        model.generate(canvas, generation_config=GenerationConfig(num_beams=4, max_new_tokens=3))


def test_what_a_generation_config_leaves_open_is_the_models(model, monkeypatch):
    """transformers completes it from generation_config.json: the end token, the number of tokens."""
    free = model.generate(rows(1, 4), max_new_tokens=10, alpha_0=0.0, eos_token_id=None)
    end = int(free[0, 6])
    for name, value in {"eos_token_id": end, "pad_token_id": 3, "max_new_tokens": 10}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    ended = model.generate(rows(1, 4), alpha_0=0.0)
    assert (ended[0, 4:] == end).any() and (ended[0, 7:] == 3).all()
    for asked in (GenerationConfig(do_sample=False), GenerationConfig(max_new_tokens=10)):
        assert torch.equal(model.generate(rows(1, 4), generation_config=asked, alpha_0=0.0), ended)
    monkeypatch.setattr(model.generation_config, "max_time", 2.5)
    with pytest.raises(ValueError, match="max_time"):
        model.generate(rows(1, 4))


PREFIX, GAPS = (0, 1, 2, 3), (0, 2, 3, 11)
NUCLEUS = {"temperature": 0.8, "top_p": 0.9}
SAME_TEXT = {
    "binomial": ({"alpha_0": 0.6, "num_steps": 5}, PREFIX, NUCLEUS),
    "binomial-gaps": ({"alpha_0": 0.7, "num_steps": 3}, GAPS, {"temperature": 1.0, "top_p": 1.0}),
    "one-token-a-step": ({"alpha_0": 1.0}, (), NUCLEUS),
    "fixed": ({"method": "fixed", "alpha_0": 0.7, "num_steps": 3}, PREFIX, NUCLEUS),
    "strided": ({"method": "strided", "alpha_0": 1.0, "num_steps": 5}, GAPS, NUCLEUS),
    "left-to-right": ({"method": "left-to-right", "alpha_0": 0.0}, PREFIX, NUCLEUS),
    "greedy": ({"alpha_0": 0.5, "num_steps": 4}, PREFIX, {"temperature": 0.0}),
}


@pytest.fixture(scope="module")
def native_text(one_rank, folder):
    """Return the text of megatron-eso's own sampler, by case."""
    import numpy as np

    cases = []
    for settings, given, choice in SAME_TEXT.values():
        is_given = np.zeros((2, 16), dtype=bool)
        is_given[:, list(given)] = True
        common = {"seed": 11, "first_row": 5}
        cases.append((is_given, rows(2, 16).numpy(), settings | common, choice | common))
    replies = one_rank.run("sample_rows_of", str(folder.parent / "checkpoint"), cases)[0]
    return dict(zip(SAME_TEXT, replies, strict=True))


@pytest.mark.parametrize("case", SAME_TEXT)
def test_text_equals_that_of_the_native_sampler(model, native_text, case):
    """Same seed, same plan, same numbers: token for token what megatron-eso sample gives."""
    plan, given, choice = SAME_TEXT[case]
    canvas = torch.full((2, 16), MASK)
    canvas[:, list(given)] = rows(2, 16)[:, list(given)]
    settings = {"plan" if name == "method" else name: value for name, value in plan.items()}
    greedy = choice["temperature"] == 0
    found = model.generate(
        canvas, seed=11, first_row=5, do_sample=not greedy, eos_token_id=None,
        return_dict_in_generate=True, **settings, **({} if greedy else choice),
    )  # fmt: skip
    assert torch.equal(found.sequences, torch.from_numpy(native_text[case]["tokens"]))
    expected = torch.from_numpy(native_text[case]["log_probs"])
    # transformers' RMSNorm computes in float32, also in a float64 model.
    torch.testing.assert_close(found.log_probs, expected, atol=1e-6, rtol=0)


def test_one_rank_imports_an_exported_folder_for_all(folder, one_rank, two_ranks):
    whole = one_rank.run("load_exported", str(folder), 1)[0]
    (first, part), (second, other) = two_ranks.run("load_exported", str(folder), 2)
    assert (whole[0], first, second) == (1, 1, 0)
    assert part != other


def test_what_one_rank_cannot_import_is_an_error_on_all(folder, two_ranks, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*'gpt2'.*rank 1.*'gpt2'"):
        two_ranks.run("load_exported", str(tmp_path), 2)


def test_rows_end_at_the_end_token(model):
    free = model.generate(rows(1, 4), max_new_tokens=10, alpha_0=0.0, eos_token_id=None)
    end = int(free[0, 6])
    cut = model.generate(
        rows(1, 4), max_new_tokens=10, alpha_0=0.0, eos_token_id=end, pad_token_id=3,
        return_dict_in_generate=True,
    )  # fmt: skip
    first = 4 + (free[0, 4:] == end).nonzero()[0, 0]
    assert torch.equal(cut.sequences[0, : first + 1], free[0, : first + 1])
    assert (cut.sequences[0, first + 1 :] == 3).all()
    assert cut.num_evaluations == first - 3
    several = torch.tensor([end, MASK])  # as transformers' own settings hold them
    again = model.generate(
        rows(1, 4), max_new_tokens=10, alpha_0=0.0, eos_token_id=several, pad_token_id=3
    )
    assert torch.equal(again, cut.sequences)


def test_a_streamer_shows_the_text_once_and_in_order(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = []

    class Recorder(TextStreamer):
        def put(self, value):
            shown.append(value.reshape(-1).tolist())

        def end(self):
            shown.append("end")

    out = model.generate(
        rows(1, 4), max_new_tokens=6, alpha_0=0.7, num_steps=3, seed=2, eos_token_id=None,
        streamer=Recorder(tokenizer),
    )  # fmt: skip
    assert shown[-1] == "end"
    assert shown[0] == out[0, :4].tolist()
    assert [t for part in shown[:-1] for t in part] == out[0].tolist()


def test_a_streamer_ends_where_the_text_does(model, folder):
    """Diffusion may have decided tokens behind the end token before the end token itself."""
    tokenizer, shown = AutoTokenizer.from_pretrained(folder), []

    class Recorder(TextStreamer):
        def put(self, value):
            shown.extend(value.reshape(-1).tolist())

        def end(self):
            pass

    settings = {"max_new_tokens": 10, "alpha_0": 1.0, "num_steps": 2, "seed": 2}
    free = model.generate(rows(1, 4), **settings, eos_token_id=None)
    end = int(free[0, 6])
    out = model.generate(
        rows(1, 4), **settings, eos_token_id=end, pad_token_id=3, streamer=Recorder(tokenizer),
        return_dict_in_generate=True,
    )  # fmt: skip
    last = 4 + int((free[0, 4:] == end).nonzero()[0, 0])
    assert shown == out.sequences[0, : last + 1].tolist()
    assert not out.log_probs[0, last + 1 :].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_new_tokns": 3}, "max_new_tokns"),
        ({"max_new_tokens": 5000}, "max_position_embeddings"),
        ({"max_new_tokens": 0}, "nothing to generate"),
        ({"alpha_0": 2.0, "max_new_tokens": 4}, "alpha_0=2.0"),
        ({"num_steps": 5, "max_new_tokens": 4}, "num_steps=5 must be between 1 and the 4 open"),
        ({"plan": "stride", "max_new_tokens": 4}, "plan='stride' is not one of binomial"),
        ({"plan": "strided", "alpha_0": 0.5, "max_new_tokens": 4}, "strided.*alpha_0=0.5"),
        ({"do_sample": True, "temperature": 0.0, "max_new_tokens": 4}, "temperature"),
        ({"top_p": 0.0, "max_new_tokens": 4}, r"top_p=0\.0 in \(0, 1\]"),
        ({"top_k": 50, "do_sample": True, "max_new_tokens": 4}, "top_k=50 .use top_p"),
        (
            {"stopping_criteria": [len], "max_new_tokens": 4},
            "stopping_criteria=.* .use eos_token_id",
        ),
        ({"output_scores": True, "max_new_tokens": 4}, "output_scores=True .use .*log_probs"),
        (
            {"num_return_sequences": 0, "max_new_tokens": 4},
            "num_return_sequences=0 must be at least 1",
        ),
        (
            {"plan": "left-to-right", "num_steps": 2, "max_new_tokens": 4},
            "left-to-right.*num_steps=2 do not",
        ),
        ({"alpha_0": 0.0, "num_steps": 2, "max_new_tokens": 4}, r"num_steps=2.*alpha_0=0\b"),
    ],
)
def test_a_setting_without_effect_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(rows(1, 4), **settings)


def test_flags_that_are_off_are_no_settings(model):
    off = {"output_scores": False, "output_attentions": False, "max_new_tokens": 2}
    assert model.generate(rows(1, 4), **off).shape == (1, 6)


@pytest.fixture
def warnings_of(model, monkeypatch):
    """Return a function that returns the warnings of a call of generate()."""

    def call(*arguments, **settings):
        said = []
        log = SimpleNamespace(warning_once=said.append)
        monkeypatch.setattr("megatron_eso.export.hf.generation_esolm.log", log)
        model.generate(*arguments, max_new_tokens=2, **settings)
        return said

    return call


def test_a_temperature_without_sampling_is_remarked(warnings_of):
    said = warnings_of(rows(1, 4), temperature=0.7, top_p=0.9)
    assert (
        len(said) == 1 and "temperature=0.7, top_p=0.9" in said[0] and "do_sample=True" in said[0]
    )
    assert not warnings_of(rows(1, 4), temperature=0.7, do_sample=True)
    assert not warnings_of(rows(1, 4), temperature=1.0, do_sample=False)


def test_padding_without_a_mask_is_remarked(warnings_of):
    """The padding token is text elsewhere, so only the mask can tell."""
    batch = rows(2, 5)
    batch[1, :2] = 3
    said = warnings_of(batch, pad_token_id=3)
    assert len(said) == 1 and "attention_mask" in said[0] and "pad_token_id=3" in said[0]
    assert not warnings_of(batch, pad_token_id=3, attention_mask=(batch != 3).long())
    assert not warnings_of(batch[:1], pad_token_id=3)


def test_a_tuple_is_returned_where_one_is_asked_for(model):
    """Unpacking an output object would give the names of its fields."""
    canvas, tokens = rows(), rows()
    canvas[:, 3] = MASK
    loss, logits = model(canvas, labels=tokens, return_dict=False)
    whole = model(canvas, labels=tokens)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)


def test_a_canvas_without_masks_is_refused(model):
    """A next-token harness would silently take the logits for those of the next token."""
    with pytest.raises(ValueError, match=f"no mask token .*{MASK}.*log_likelihood"):
        model(input_ids=rows())


def test_rows_without_a_prompt_are_generated_and_the_message_says_how(model):
    with pytest.raises(ValueError, match=r"torch\.empty\(1, 0"):
        model.generate(max_new_tokens=4)
    text = model.generate(torch.empty(2, 0, dtype=torch.long), max_new_tokens=4, seed=1)
    assert text.shape == (2, 4) and not (text == MASK).any()


def test_prompts_of_one_dimension_are_called_so(model):
    with pytest.raises(ValueError, match=r"\[rows, tokens\].*\(4,\)"):
        model.generate(rows(1, 4)[0], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"attention_mask.*\(1, 3\).*\(1, 4\)"):
        model.generate(rows(1, 4), attention_mask=torch.ones(1, 3), max_new_tokens=4)


def test_positions_and_caches_are_refused(model):
    with pytest.raises(ValueError, match="not position_ids; it permutes"):
        model(input_ids=rows(), position_ids=torch.arange(12)[None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_the_packed_positions_trap_is_not_ours(folder, attention):
    """Stock Llama misreads permuted positions as packed rows without a warning; our class cannot."""
    if attention == "flex_attention":
        pytest.importorskip("torch.nn.attention.flex_attention")
    register()
    ours = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    canvas = rows(2)
    canvas[:, ::2] = MASK
    order = torch.stack(
        [torch.randperm(12, generator=torch.Generator().manual_seed(r)) for r in (1, 2)]
    )
    with torch.no_grad():
        found = ours(input_ids=canvas, order=order).logits[..., :MASK]
        expected = plain(input_ids=canvas, order=order).logits[..., :MASK]
        assert torch.allclose(found, expected, atol=1e-4)
        score = ours.log_likelihood(rows(2, 4), rows(2, 6, seed=1)).log_likelihood
        assert torch.allclose(
            score, plain.log_likelihood(rows(2, 4), rows(2, 6, seed=1)).log_likelihood, atol=1e-3
        )
    if attention != "flex_attention":
        assert_stock_falls_into_the_trap(attention)


def assert_stock_falls_into_the_trap(attention):
    """If transformers ever changes this, the reason for our own rotary angles can be dropped."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, attn_implementation=attention,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    tokens, order = rows(1), torch.randperm(12, generator=torch.Generator().manual_seed(1))[None]
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    additive = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        right = stock(
            input_ids=tokens, position_ids=order, attention_mask=additive, use_cache=False
        ).logits
        trapped = stock(input_ids=tokens, position_ids=order, use_cache=False).logits
    assert (right - trapped).abs().max() > 0.1 * right.abs().max()


@pytest.fixture
def with_alpha_0(model):
    """Set the model's alpha_0 for one test."""
    before = model.config.alpha_0

    def set_to(alpha_0):
        model.config.alpha_0 = alpha_0
        return model

    yield set_to
    model.config.alpha_0 = before


def test_the_sequential_loss_is_the_exact_likelihood(with_alpha_0):
    model, tokens = with_alpha_0(0.0), rows(2, 8)
    exact = model.log_likelihood([[]] * 2, tokens).log_likelihood
    loss = model(input_ids=tokens, labels=tokens).loss
    assert float(loss.detach()) == pytest.approx(float(-exact.sum() / 16), rel=1e-5)


def test_the_diffusion_loss_is_the_weighted_sum_of_what_the_masks_predict(with_alpha_0):
    """The draws repeated by hand: weight alpha_0 / (1 - alpha_t) = 1/t up to noise_eps."""
    model, tokens = with_alpha_0(1.0), rows(3, 8)
    loss = model(input_ids=tokens, labels=tokens, generator=torch.Generator().manual_seed(5)).loss
    draws = torch.Generator().manual_seed(5)
    _, u, mask_key, key = (
        torch.rand(*shape, generator=draws, dtype=torch.float64)
        for shape in ((3,), (3,), (3, 8), (3, 8))
    )
    eps = model.config.noise_eps
    keep = 1 - (1 - eps) * (eps + (1 - eps) * u)
    masked = mask_key >= keep[:, None]
    order = (key + masked.double()).argsort(dim=1)
    with torch.no_grad():
        logits = model(input_ids=tokens.masked_fill(masked, MASK), order=order).logits
    nats = -torch.log_softmax(logits, 2).gather(2, tokens[:, :, None])[:, :, 0]
    total = ((1 - eps) / (1 - keep) * torch.where(masked, nats, 0).sum(1)).sum() / 24
    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-6)


def test_the_two_terms_keep_their_balance(with_alpha_0):
    """Over many draws the mixed loss is the diffusion term plus the sequential term, each per token."""
    model, tokens = with_alpha_0(0.5), rows(1, 6).repeat(256, 1)
    means = {}
    for kappa in (0.5, 0.25):
        model.config.diffusion_fraction = kappa
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            losses = [
                float(model(input_ids=tokens, labels=tokens, generator=generator).loss)
                for _ in range(4)
            ]
        means[kappa] = sum(losses) / len(losses)
    model.config.diffusion_fraction = None
    assert means[0.25] == pytest.approx(means[0.5], rel=0.1)


def test_prompt_labels_give_no_loss_but_are_seen(with_alpha_0):
    model, tokens = with_alpha_0(0.0), rows(2, 8)
    labels = tokens.clone()
    labels[:, :5] = -100
    loss = model(input_ids=tokens, labels=labels).loss
    exact = model.log_likelihood(tokens[:, :5], tokens[:, 5:]).log_likelihood
    assert float(loss.detach()) == pytest.approx(float(-exact.sum() / 6), rel=1e-5)


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_every_weight_gets_a_gradient_whatever_is_drawn(with_alpha_0, alpha_0):
    """DistributedDataParallel ends a run in which one gets none; short rows often draw no mask."""
    model, tokens = with_alpha_0(alpha_0), rows(1, 3)
    losses = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        loss = model(input_ids=tokens, labels=tokens, generator=generator).loss
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        lacking = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert not lacking, (seed, lacking)
    assert 0 < losses.count(0.0) < 20


@pytest.mark.parametrize(("alpha_0", "passes"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_the_passes_of_the_loss_do_not_depend_on_the_draws(with_alpha_0, alpha_0, passes):
    """Under FSDP and ZeRO-3 the ranks gather the weights in every pass, so all must make as many."""
    model, tokens = with_alpha_0(alpha_0), rows(2, 3)
    made = []
    hook = model.model.register_forward_hook(lambda *_: made.append(1))
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        model(input_ids=tokens, labels=tokens, generator=generator)
    hook.remove()
    assert len(made) == 12 * passes


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_padding_that_labels_alone_tell_of_is_refused(with_alpha_0, alpha_0):
    """It would be given text, which all tokens see: the loss of the same rows is another one then."""
    model, tokens = with_alpha_0(alpha_0), rows(2, 8)
    padded = torch.nn.functional.pad(tokens, (0, 3), value=3)
    labels = torch.nn.functional.pad(tokens, (0, 3), value=-100)
    draws = dict(generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"labels of -100 and no attention_mask .* 0 at padding"):
        model(input_ids=padded, labels=labels, **draws)
    for given in (0, 1):  # padding; text that is given behind an open place
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3), value=given)
        loss = model(input_ids=padded, labels=labels, attention_mask=mask, **draws).loss
        assert bool(loss.isfinite())
    if alpha_0 == 0:
        right = model(input_ids=tokens, labels=tokens).loss
        mask = (labels != -100).long()
        found = model(input_ids=padded, labels=labels, attention_mask=mask).loss
        assert float(found.detach()) == pytest.approx(float(right.detach()), rel=1e-6)
        assert float(loss.detach()) != pytest.approx(float(right.detach()), rel=1e-3)


def test_rows_that_are_given_as_a_whole_may_stand_beside_others(with_alpha_0):
    model, tokens = with_alpha_0(0.0), rows(2, 8)
    labels = tokens.clone()
    labels[1] = -100
    with torch.no_grad():
        one = model(input_ids=tokens[:1], labels=tokens[:1]).loss
        assert float(model(input_ids=tokens, labels=labels).loss) == pytest.approx(float(one))


def test_the_collators_of_transformers_tell_padding(with_alpha_0, folder):
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    model = with_alpha_0(0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.decode([3])
    texts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    nats = [
        -model.log_likelihood([[]], torch.tensor([text])).log_likelihood.item() for text in texts
    ]
    plain = [{"input_ids": text} for text in texts]
    for collate, data in (
        (DataCollatorForLanguageModeling(tokenizer, mlm=False), plain),
        (DataCollatorForSeq2Seq(tokenizer), [d | {"labels": d["input_ids"]} for d in plain]),
    ):
        batch = collate(data)
        assert (batch["labels"] == -100).sum() == 3 and batch["attention_mask"].sum() == 9
        loss = model(**batch).loss
        assert float(loss.detach()) == pytest.approx(sum(nats) / 9, rel=1e-5)


def test_padding_without_a_mask_is_remarked_of_a_canvas_too(model, monkeypatch):
    said = []
    log = SimpleNamespace(warning_once=said.append)
    monkeypatch.setattr("megatron_eso.export.hf.generation_esolm.log", log)
    monkeypatch.setattr(model.generation_config, "pad_token_id", 3)
    canvas = rows(2, 5)
    canvas[:, 3], canvas[1, :2] = MASK, 3
    model(input_ids=canvas, attention_mask=(canvas != 3).long())
    assert not said
    model(input_ids=canvas)
    labels = torch.full_like(canvas, -100)  # as a canvas has them wherever something is given
    model(input_ids=canvas, labels=labels.masked_fill(canvas == MASK, 7))
    assert len(said) == 2 and "pad_token_id=3" in said[0]


def test_shifted_labels_are_refused(model):
    with pytest.raises(ValueError, match="shifted"):
        model(input_ids=rows(), labels=rows().roll(-1, 1))


def gradients(folder, checkpointing):
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    generator = torch.Generator().manual_seed(4)
    model(input_ids=rows(4), labels=rows(4), generator=generator).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(folder):
    plain, checkpointed = gradients(folder, False), gradients(folder, True)
    assert all(g is not None for g in plain.values())
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-12) for name in plain)


def test_save_and_reload(folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.float64
    )
    canvas = rows()
    canvas[:, 4] = MASK
    assert (tmp_path / "modeling_esolm.py").exists()
    with torch.no_grad():
        assert torch.equal(again(input_ids=canvas).logits, model(input_ids=canvas).logits)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft 0.21 asks for it
def test_lora_adapts_and_generates(folder):
    peft = pytest.importorskip("peft")
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    )
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(input_ids=rows(), labels=rows()).loss.backward()
    optimizer.step()
    out = adapted.generate(input_ids=rows(1, 4), max_new_tokens=3, eos_token_id=None)
    assert out.shape == (1, 7)


def test_a_pipeline_writes_text(folder):
    from transformers import pipeline

    register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = pipeline("text-generation", model=str(folder), tokenizer=str(folder), device="cpu")
        found = writer("w1 w2", max_new_tokens=4, do_sample=False)
    assert found[0]["generated_text"].startswith("w1 w2")


@pytest.mark.filterwarnings("ignore")
def test_trainer_lowers_the_loss_of_one_row(folder, tmp_path):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed: transformers' Trainer needs it")
    from transformers import Trainer, TrainingArguments

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.alpha_0 = 0.0  # exact loss: no noise hides what training does
    data = [{"input_ids": rows(1)[0], "labels": rows(1)[0]}] * 16
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
