"""GLM computes what was published, and reads rows with blanks that were filled in as published."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.cli import main
from orchestrator.models.architecture import CATALOG, make_architecture, num_parameters
from orchestrator.models.decoder import Decoder, initial_weights
from orchestrator.models.formats import config_of_architecture
from orchestrator.models.weights import write_folder
from orchestrator.models.workloads import workload
from orchestrator.training.blanks import (
    IGNORED,
    Specials,
    arranged,
    blank_row,
    document_span,
    open_blanks,
    sentence_ends,
    sentence_spans,
    specials_of,
)
from orchestrator.training.data import DataError, TokenDataset
from orchestrator.training.generate import fill
from orchestrator.training.inputs import Request, given_tokenizer
from orchestrator.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from tests.unit.test_models import filled
from tests.unit.test_training import JOB, assignment, prepared, run

__all__ = ["assignment"]

SHAPE = {"family": "glm", "num_layers": 3, "hidden_size": 32, "num_heads": 4, "vocab_size": 96, "max_position": 24}
GLM_10B = make_architecture(**SHAPE, variant="10b")
GLM_130B = make_architecture(**SHAPE, ffn_size=88)
FORMS = {"10b": GLM_10B, "130b": GLM_130B}
every_form = pytest.mark.parametrize("arch", FORMS.values(), ids=FORMS)
SPECIALS = Specials(90, 91, 92, 93)


# The published models, in NumPy ----------------------------------------------------------------------------------------


def normed(x, weights, name, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def turned(x_SD, positions):
    """Rotary positions: x cos + rotate_half(x) sin, with the frequencies twice side by side."""
    dim = x_SD.shape[-1]
    angles = np.outer(positions, 10000.0 ** (-np.arange(0, dim, 2) / dim))
    angles = np.concatenate([angles, angles], -1)
    half = np.concatenate([-x_SD[:, dim // 2 :], x_SD[:, : dim // 2]], -1)
    return x_SD * np.cos(angles) + half * np.sin(angles)


def attention(x, weights, name, num_heads, masked, positions=None):
    q, k, v = (linear(x, weights, f"{name}.{part}") for part in "qkv")
    heads = []
    for head in np.split(np.arange(x.shape[-1]), num_heads):
        query, key = q[:, head], k[:, head]
        if positions is not None:
            query, key = turned(query, positions), turned(key, positions)
        scores = np.where(masked, -1e30, query @ key.T / math.sqrt(len(head)))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head])
    return linear(np.concatenate(heads, -1), weights, f"{name}.out")


def masked_by(prefix_length, length):
    """GLM's mask: part A is seen by all, of part B what comes later is not."""
    masked = np.triu(np.ones((length, length), dtype=bool), 1)
    masked[:, :prefix_length] = False
    return masked


def glm_10b(weights, ids, prefix_length, positions, epsilon=1e-5):
    """Pre-norm, two tables of positions, GELU by tanh, a tied head (arXiv:2103.10360, sections 2.1 to 2.3)."""
    x = weights["embed.tokens.weight"][ids]
    x = x + weights["embed.positions.weight"][positions[0]] + weights["embed.block_positions.weight"][positions[1]]
    masked = masked_by(prefix_length, len(ids))
    for layer in range(3):
        block = f"blocks.{layer}"
        x = x + attention(
            normed(x, weights, f"{block}.attention_norm", epsilon), weights, f"{block}.attention", 4, masked
        )
        y = linear(normed(x, weights, f"{block}.mlp_norm", epsilon), weights, f"{block}.mlp.up")
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, weights, f"{block}.mlp.down")
    return normed(x, weights, "head.norm", epsilon) @ weights["embed.tokens.weight"].T


def glm_130b(weights, ids, prefix_length, positions, epsilon=1e-5):
    """Rotary positions, DeepNorm as the released code orders it (each half norms its input and scales the normed one in the
    residual, a last norm behind all layers), GeGLU with exact GELU (arXiv:2210.02414, section 2.1)."""
    norms = ["embed.norm"]
    for layer in range(3):
        norms += [f"blocks.{layer}.attention_norm", f"blocks.{layer}.mlp_norm"]
    alpha, masked = (2 * 3) ** 0.5, masked_by(prefix_length, len(ids))
    hidden = weights["embed.tokens.weight"][ids]
    for layer in range(3):
        block = f"blocks.{layer}"
        x = normed(hidden, weights, norms.pop(0), epsilon)
        hidden = alpha * x + attention(x, weights, f"{block}.attention", 4, masked, positions[0])
        x = normed(hidden, weights, norms.pop(0), epsilon)
        gate = linear(x, weights, f"{block}.mlp.gate")
        gate = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
        hidden = alpha * x + linear(gate * linear(x, weights, f"{block}.mlp.up"), weights, f"{block}.mlp.down")
    (final,) = norms
    return normed(hidden, weights, final, epsilon) @ weights["embed.tokens.weight"].T


def rows_of(arch, count=6, length=24):
    texts = np.random.default_rng(0).integers(0, 90, (count, length - 2))
    return [
        blank_row(
            text,
            seed=3,
            sample=sample,
            specials=SPECIALS,
            ends_V=np.arange(96) % 4 == 0,
            positions_run_on=not arch.traits.block_positions,
        )
        for sample, text in enumerate(texts)
    ]


def together(rows):
    """(input ids, what the module's context takes) of rows in one micro batch."""
    inputs = {
        "prefix_lengths_B": torch.tensor([row.prefix_length for row in rows]),
        "positions_B2S": torch.from_numpy(np.stack([row.positions_2S for row in rows])),
    }
    return torch.from_numpy(np.stack([row.input_ids_S for row in rows])), inputs


@every_form
@pytest.mark.parametrize("kind", ["flash", "math"])
def test_logits_are_those_of_the_published_model_written_in_numpy(arch, kind):
    module, rows = filled(arch, kind), rows_of(arch)
    assert {row.prefix_length > 12 for row in rows} == {True, False}, "rows of both objectives"
    weights = {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}
    input_ids, inputs = together(rows)
    with torch.no_grad():
        ours = module(input_ids, module.context(**inputs)).double().numpy()
    published = glm_10b if arch.variant == "10b" else glm_130b
    for row, logits in zip(rows, ours, strict=True):
        wanted = published(weights, row.input_ids_S, row.prefix_length, row.positions_2S)
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()


@every_form
def test_part_a_is_read_in_both_directions_and_part_b_in_one(arch):
    module, (row, *_) = filled(arch), rows_of(arch)
    input_ids, inputs = together([row])
    seen = []
    for place in range(24):
        changed = input_ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 90
        with torch.no_grad():
            both = [module(ids, module.context(**inputs))[0] for ids in (input_ids, changed)]
        seen.append((both[0] - both[1]).abs().amax(-1) > 1e-6)
    for place, by in enumerate(seen):
        wanted = torch.ones(24, dtype=torch.bool) if place < row.prefix_length else torch.arange(24) >= place
        assert torch.equal(by, wanted), place


# Counts ----------------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_as_the_papers_shapes_have_them():
    """GLM-10B: 48 layers of 12 h^2 + 13 h, 50,304 tokens, two tables of 1,025 positions, a norm. GLM-130B: 70 layers whose
    feed-forward of 8 h / 3 has three matrices, 150,528 tokens, a norm more."""
    h = 4096
    assert num_parameters(CATALOG["glm-10b"]) == 48 * (12 * h * h + 13 * h) + 50304 * h + 2 * 1025 * h + 2 * h
    assert num_parameters(CATALOG["glm-10b"]) == 9_880_682_496
    h, f = 12288, 32768
    layer = 4 * h * h + 4 * h + 3 * h * f + 2 * f + h + 4 * h
    assert num_parameters(CATALOG["glm-130b"]) == 70 * layer + 150528 * h + 2 * h


@pytest.mark.parametrize("name", ["glm-10b", "glm-130b"])
def test_the_module_holds_what_is_counted_and_priced(name):
    with torch.device("meta"):
        parameters = dict(Decoder(CATALOG[name]).named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == workload(CATALOG[name]).num_parameters
    shapes = [(parameter.shape[0], parameter.numel()) for key, parameter in parameters.items() if "embed" in key]
    assert [(tensor.rows, tensor.num_elements) for tensor in workload(CATALOG[name]).embedding_tensors] == shapes


def test_deep_norm_begins_with_xaviers_weights():
    value = initial_weights(CATALOG["glm-130b"], seed=3)
    wide, ffn = torch.Size((768, 768)), torch.Size((2048, 768))
    xavier, scale = math.sqrt(2 / (768 + 768)), 140**-0.5
    assert float(value("blocks.0.attention.q.weight", wide).std()) == pytest.approx(xavier, rel=0.01)
    for name in ("attention.v", "attention.out"):
        assert float(value(f"blocks.0.{name}.weight", wide).std()) == pytest.approx(xavier * scale, rel=0.01)
    std = math.sqrt(2 / (768 + 2048)) * scale
    assert float(value("blocks.0.mlp.gate.weight", ffn).std()) == pytest.approx(std, rel=0.01)
    assert float(value("embed.tokens.weight", ffn).std()) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "glm", "variant": "7b"}, "variant '7b' is not one of family glm: choose one of 10b, 130b"),
        ({"family": "opt", "variant": "10b"}, "variant '10b' is not one of family opt: only family glm has variants"),
    ],
)
def test_a_variant_that_is_not_there_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(num_layers=1, hidden_size=64, num_heads=4, **fields)


@every_form
def test_no_hugging_face_folder_is_written_and_the_reason_is_told(arch, tmp_path):
    told = r"no class that computes family glm, .* \(its GlmForCausalLM is GLM-4, another model\)"
    with pytest.raises(ValueError, match=told):
        config_of_architecture(arch)
    with pytest.raises(ValueError, match=told):
        write_folder(tmp_path / "hf", arch, [])
    assert not list(tmp_path.iterdir())


# Blanks ----------------------------------------------------------------------------------------------------------------

M, G, SOP, EOP, X = SPECIALS.mask, SPECIALS.document_mask, SPECIALS.start, SPECIALS.end, IGNORED


def test_spans_are_written_behind_the_text_as_figure_2_of_the_paper_has_them():
    """x1 to x6 with x3 and x5 x6 masked, the second span first; positions from 0, where the figure counts from 1."""
    row = arranged(np.arange(1, 7), [(4, 6), (2, 3)], mask=M, specials=SPECIALS, length=12)
    assert row.prefix_length == 5
    assert row.input_ids_S.tolist() == [1, 2, M, 4, M, SOP, 5, 6, SOP, 3, EOP, EOP]
    assert row.target_ids_S.tolist() == [X, X, X, X, X, 5, 6, EOP, 3, EOP, X, X]
    assert row.positions_2S.tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 2, 2, 0, 0],
        [0, 0, 0, 0, 0, 1, 2, 3, 1, 2, 0, 0],
    ]


def test_positions_run_on_where_there_is_no_second_dimension():
    row = arranged(np.arange(4), [(2, 4)], mask=G, specials=SPECIALS, length=6, positions_run_on=True)
    assert row.input_ids_S.tolist() == [0, 1, G, SOP, 2, 3]
    assert row.target_ids_S.tolist() == [X, X, X, 2, 3, EOP]
    assert row.positions_2S[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_document_loses_50_to_100_percent_uniformly():
    lengths = [end - start for start, end in (document_span(10, draw / 600) for draw in range(600))]
    assert {length: lengths.count(length) for length in sorted(set(lengths))} == dict.fromkeys(range(5, 11), 100)
    assert {end for _, end in (document_span(10, draw / 6) for draw in range(6))} == {10}


@pytest.mark.parametrize(
    ("ends", "draws", "wanted"),
    [
        ("...x....x...x...x..", [9] * 4 + [2, 9, 9, 9, 9, 1, 9, 9, 9, 3] + [9] * 5, [(9, 13)]),
        ("...x....x.x.......x.x...............", [9] * 9 + [1, 9] + [2] + [9] * 24, [(9, 11), (11, 19)]),
        ("..xxx..x.......", [5] * 15, [(5, 8)]),
        ("..........", [5] * 10, [(0, 10)]),
        ("...x......", [5, 9, 9, 9, 1] + [9] * 5, [(4, 10)]),
        (".........x", [5] * 10, [(0, 10)]),
    ],
    ids=["one is enough", "until 15 %", "ends in a row", "no end", "only cut ones", "one whole"],
)
def test_whole_sentences_are_masked_until_15_percent(ends, draws, wanted):
    assert sentence_spans(np.array([mark == "x" for mark in ends]), np.array(draws, dtype=float)) == wanted


def test_rows_hold_both_objectives_half_and_half_and_lose_no_token():
    ends_V, rng = np.arange(96) % 7 == 0, np.random.default_rng(1)
    masks, shares = [], []
    for sample in range(400):
        text = rng.integers(0, 90, 62)
        row = blank_row(text, seed=1, sample=sample, specials=SPECIALS, ends_V=ends_V)
        counted = row.target_ids_S != IGNORED
        part_a = row.input_ids_S[: row.prefix_length]
        assert not counted[: row.prefix_length].any()
        assert len(row.input_ids_S) == 64
        num_spans = int((row.input_ids_S == SOP).sum())
        masks.append(int(part_a[part_a >= 90][0]))
        assert (part_a >= 90).sum() == num_spans == (row.target_ids_S == EOP).sum()
        # Put together again, part A and the spans are the text.
        spans = {}
        for place in np.flatnonzero(row.input_ids_S == SOP):
            end = place + int(np.flatnonzero(row.target_ids_S[place:] == EOP)[0])
            spans[int(row.positions_2S[0, place])] = row.target_ids_S[place:end]
            assert row.positions_2S[1, place : end + 1].tolist() == list(range(1, end - place + 2))
        whole = np.concatenate([spans.get(place, [token]) for place, token in enumerate(part_a)])
        assert whole.tolist() == text[: len(whole)].tolist()
        assert len(whole) >= 62 - 2 * num_spans
        masked = sum(map(len, spans.values())) / len(whole)
        if masks[-1] == G:
            assert len(whole) == 62
            assert 0.5 <= masked <= 1
        else:
            shares.append(masked)
    assert masks.count(G) == pytest.approx(200, abs=30)
    assert masks.count(M) == 400 - masks.count(G)
    assert min(shares) >= 0.15


def test_a_row_is_a_function_of_seed_and_sample_alone():
    text, ends_V = np.arange(12), np.arange(96) % 5 == 0

    def made(seed, sample):
        row = blank_row(text, seed=seed, sample=sample, specials=SPECIALS, ends_V=ends_V)
        return row.input_ids_S.tolist(), row.positions_2S.tolist()

    assert made(1, 2) == made(1, 2)
    assert len({str(made(seed, sample)) for seed in range(3) for sample in range(5)}) > 7
    # The draw itself, so that no library's next version makes other rows of a run that goes on.
    assert [made(1, sample)[0] for sample in (0, 3)] == [
        [0, 91, 92, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 90, 6, 7, 8, 9, 10, 11, 92, 1, 2, 3, 4, 5],
    ]


def test_special_tokens_are_the_tokenizers_or_the_ids_behind_it():
    assert specials_of(ByteTokenizer(), 264) == Specials(257, 258, 259, 260)
    inner = tokenizer("a", "b", "[MASK]", "<|startofpiece|>")
    assert specials_of(inner, 8) == Specials(2, 5, 3, 6)
    assert specials_of(tokenizer("[gMASK]", "[MASK]", "<sop>", "<eop>"), 5) == Specials(1, 0, 2, 3)
    with pytest.raises(
        DataError, match=r"an id for each of \[gMASK\], <\|endofpiece\|> beside the 5 tokens .*at least 7"
    ):
        specials_of(inner, 6)


def tokenizer(*words):
    import tokenizers

    vocab = {word: place for place, word in enumerate((*words, "<|endoftext|>"))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    return HuggingFaceTokenizer(inner, vocab["<|endoftext|>"])


def test_a_token_ends_a_sentence_by_its_last_character():
    words = {
        "a": False,
        "end.": True,
        "why?": True,
        'he said."': True,
        "3.14": False,
        "。": True,
        "\n": True,
        "x\n": True,
    }
    assert sentence_ends(tokenizer(*words)).tolist() == [*words.values(), True]
    assert [chr(token) for token in np.flatnonzero(sentence_ends(ByteTokenizer())[:256])] == list("\n!.:;?")


# A run -----------------------------------------------------------------------------------------------------------------


def of_glm(assignment, variant, **model):
    shape = {**JOB["model"], "family": "glm", "variant": variant, **model}
    training = {**JOB["training"], "steps": 8}
    return replace(assignment, job={**JOB, "model": shape, "training": training})


@pytest.mark.parametrize("variant", FORMS)
def test_a_worker_learns_to_fill_blanks_and_its_checkpoint_goes_on_with_a_text(assignment, variant, capsys):
    outcome, reports, _ = run(of_glm(assignment, variant))
    assert (outcome.kind, outcome.step) == ("finished", 8)
    assert reports[-1].loss < reports[0].loss - 0.3
    arguments = ["generate", outcome.checkpoint, "--prompt", "abc", "--json", "--max-tokens"]
    assert main([*arguments, "9", "--temperature", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_tokens"] == 9 or told["ended"] == "end_of_text"
    assert main([*arguments, "20"]) == 2
    assert "20 new tokens leave no room for a prompt among 16 positions: ask for at most 13" in capsys.readouterr().err
    assert main(["chat", outcome.checkpoint]) == 2
    assert "family glm fills blanks and holds no conversation: `shardwise generate`" in capsys.readouterr().err
    assert main(["convert", outcome.checkpoint, str(Path(assignment.run_directory) / "hf")]) == 2
    assert "transformers has no class that computes family glm" in capsys.readouterr().err


def test_a_worker_refuses_a_model_without_rows_for_the_special_tokens(assignment):
    outcome, *_ = run(of_glm(assignment, "10b", vocab_size=260))
    assert outcome.kind == "failed"
    assert "[MASK], [gMASK], <|startofpiece|>, <|endofpiece|> beside the 257 tokens" in outcome.cause
    assert "set model.vocab_size to at least 261 (264 divides by 8)" in outcome.cause


@pytest.mark.parametrize(("tokenizer", "size", "fits"), [("byte", 260, False), ("byte", 261, True), (300, 303, False)])
def test_prepare_refuses_it_before_any_text_is_read(tmp_path, tokenizer, size, fits):
    request = Request(base=tmp_path, train=("a.txt",), tokenizer=tokenizer, vocab_size=size, blank_filling=True)
    if fits:
        given_tokenizer(request)
        return
    with pytest.raises(DataError, match="family glm needs an id for each of"):
        given_tokenizer(request)


def test_the_rows_of_a_run_are_those_of_its_text_and_count_their_targets(tmp_path):
    train, validation = open_blanks(prepared(tmp_path / "data"), 12, replace(GLM_10B, vocab_size=264), seed=5)
    assert validation is not None
    assert (len(train), train.sequence_length) == (399, 12)
    indices = np.array([3, 398, 0])
    (ids, targets), inputs = train.sequences(indices), train.inputs(indices)
    assert ids.shape == targets.shape == (3, 12)
    assert train.num_targets(indices) == (targets != IGNORED).sum()
    assert inputs["prefix_lengths_B"].shape == (3,)
    assert inputs["positions_B2S"].shape == (3, 2, 12)
    text = TokenDataset(tmp_path / "data", "train", 10).sequences(indices)[0]
    row = blank_row(
        text[1], seed=5, sample=398, specials=Specials(257, 258, 259, 260), ends_V=sentence_ends(ByteTokenizer())
    )
    assert ids[1].tolist() == row.input_ids_S.tolist()
    with pytest.raises(DataError, match="sequence_length is 7: a row with a blank takes 8 tokens at least"):
        open_blanks(tmp_path / "data", 7, GLM_10B, seed=5)


@every_form
def test_a_span_is_written_token_by_token_as_the_whole_row_is_read(arch):
    model, prompt = filled(arch).requires_grad_(False), [5, 61, 17]
    written = list(fill(model, prompt, max_tokens=12, vocab_size=80, specials=SPECIALS, temperature=0))
    wanted: list[int] = []
    for _ in range(12):
        count = len(wanted) + 1
        ids = torch.tensor([[*prompt, SPECIALS.document_mask, SPECIALS.start, *wanted]])
        place = [3] * count if arch.variant == "10b" else list(range(4, 4 + count))
        positions = torch.tensor([[[0, 1, 2, 3, *place], [0, 0, 0, 0, *range(1, count + 1)]]])
        context = model.context(prefix_lengths_B=torch.tensor([4]), positions_B2S=positions)
        logits = model(ids, context)[0, -1]
        logits[80:93], logits[94:] = -torch.inf, -torch.inf
        if (token := int(logits.argmax())) == SPECIALS.end:
            break
        wanted.append(token)
    assert written == wanted
    assert len(written) > 2
