"""A plan's tokens in models of every family and in complete folders with tokenizers."""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf

import slimvlm as sv
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import new_numbers, token_ids_of, trimmed_processor
from slimvlm.scoring.layerwise import open_checkpoint
from tests import tiny, tiny_folder, tiny_words
from tests.handmade import assert_equal, assert_untouched, logits, random_scores, snapshot
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close

STAY = {
    "gemma3n_text": "layers have embeddings",
    "gemma3n": "layers have embeddings",
    "mllama": "other rows",
    "molmo2": "other rows",
}
"""Tiny models that cannot lose tokens, and why."""
CAN = [name for name in tiny.CONFIGS if name not in STAY]
MIXED = ("llama", "qwen2", "llava-llama", "qwen3_vl", "phi", "gemma3", "gemma4")


def plan_for(model):
    """Every third token goes, but for those that the model names."""
    anatomy = read_anatomy(model)
    named = token_ids_of(model.config, model.generation_config)
    forbidden = set(model.generation_config.suppress_tokens[::2])
    kept = [i for i in range(anatomy.vocab_size) if (i % 3 and i not in forbidden) or i in named]
    return replace(Plan.everything(anatomy), tokens=tuple(kept))


def kept_batch(model, plan):
    """A batch with kept tokens only."""
    batch = tiny.batch(model, 24)
    del batch["labels"]
    is_kept = torch.isin(batch["input_ids"], torch.tensor(plan.tokens))
    return {**batch, "input_ids": torch.where(is_kept, batch["input_ids"], 4)}


def renumbered(batch, plan):
    """The same batch by the tokens' new numbers."""
    new = new_numbers(plan)
    ids = [[new[token] for token in row] for row in batch["input_ids"].tolist()]
    return {**batch, "input_ids": torch.tensor(ids)}


@pytest.mark.parametrize("name", tiered(CAN))
def test_what_is_left_says_the_same_and_a_masked_model_is_the_sliced_one(name, tmp_path):
    model = tiny.build(name)
    plan = plan_for(model)
    batch = kept_batch(model, plan)
    expected = logits(model, batch)[..., list(plan.tokens or ())]
    tied = Parts(model).token_matrices()[0].weight is Parts(model).token_matrices()[1].weight
    sv.prune_(model, plan)
    assert torch.equal(logits(model, renumbered(batch, plan)), expected)
    embedding, head = Parts(model).token_matrices()
    assert (embedding.weight is head.weight) == tied
    assert read_anatomy(model) == plan.after
    sv.save(model, None, tmp_path / "out", plan)
    again, _ = sv.load(tmp_path / "out", device="cpu")
    assert_close(logits(again, renumbered(batch, plan)), expected, FORWARD)
    assert sv.anatomy(tmp_path / "out") == plan.after
    masked = tiny.build(name)
    sv.mask_(masked, plan)
    said = logits(masked, batch)
    assert torch.equal(said[..., list(plan.tokens or ())], expected)
    gone = sorted({*range(plan.before.vocab_size)} - {*(plan.tokens or ())})
    assert said[..., gone].max() < said[..., list(plan.tokens or ())].min()
    assert not Parts(masked).token_matrices()[0].weight[gone].any()


def test_a_padding_token_that_is_no_token_stays_none(tmp_path):
    """Configurations on the hub have -1, which torch takes for the last row."""
    model = tiny.build("llama")
    model.config.pad_token_id = -1
    model.save_pretrained(tmp_path)
    model, _ = sv.load(tmp_path, device="cpu")
    everything = Plan.everything(read_anatomy(model))
    plan = replace(everything, tokens=tuple(range(everything.before.vocab_size - 8)))
    batch = kept_batch(model, plan)
    expected = logits(model, batch)[..., list(plan.tokens or ())]
    sv.prune_(model, plan)
    assert torch.equal(logits(model, renumbered(batch, plan)), expected)


@pytest.mark.parametrize("name", tiered(MIXED, lambda name: name in ("llava-llama", "gemma4")))
def test_tokens_go_with_layers_and_widths_in_one_plan(name, tmp_path):
    model = tiny.build(name)
    anatomy = read_anatomy(model)
    tokens = plan_for(model).tokens
    plan = sv.make_plan(anatomy, random_scores(anatomy), 0.5, "both", tokens=tokens)
    assert len(plan.layers) < anatomy.num_layers
    assert len(plan.neurons[plan.layers[0]]) < anatomy.layers[0].intermediate_size
    before = read_anatomy(model).backbone_params
    batch, masked = kept_batch(model, plan), copy.deepcopy(model)
    sv.mask_(masked, plan)
    sv.prune_(model, plan)
    said = logits(masked, batch)[..., list(tokens or ())]
    assert_close(logits(model, renumbered(batch, plan)), said, FORWARD)
    assert plan.ratio == pytest.approx(1 - read_anatomy(model).backbone_params / before)
    assert plan.ratio == pytest.approx(0.5, abs=0.05)
    sv.save(model, None, tmp_path / "out", plan)
    assert sv.Plan.load(tmp_path / "out" / "slimvlm_plan.json") == plan
    sv.save(tiny.build(name), None, tmp_path / "whole")
    sv.prune_checkpoint(tmp_path / "whole", plan, tmp_path / "of-files")
    of_files, _ = sv.load(tmp_path / "of-files", device="cpu")
    assert_equal(of_files.state_dict(), model.state_dict())


@pytest.mark.parametrize(("name", "why"), STAY.items())
def test_tokens_that_cannot_go_are_refused_by_name(name, why):
    anatomy = read_anatomy(tiny.build(name))
    with pytest.raises(sv.SlimError, match=f"'{anatomy.model_type}' cannot be removed.*{why}"):
        sv.make_plan(anatomy, [], 0.0, tokens=range(4, 60))
    anatomy = read_anatomy(tiny.build("llama"))
    for tokens in ([], [3, 128], [-1, 3]):
        with pytest.raises(sv.SlimError, match=r"tokens must be at least one, sorted.*below 128"):
            sv.make_plan(anatomy, [], 0.0, tokens=tokens)


@pytest.mark.parametrize("name", ["llama", "gemma4_text"])
def test_where_tokens_alone_reach_the_ratio_nothing_else_goes(name):
    anatomy = read_anatomy(tiny.build(name))
    tokens = range(16, 40)
    alone = sv.make_plan(anatomy, [], 0.0, tokens=tokens)
    reached = sv.make_plan(anatomy, random_scores(anatomy), alone.ratio - 1e-4, tokens=tokens)
    assert reached.ratio == alone.ratio
    left = alone.after.backbone_params / anatomy.backbone_params
    assert alone.ratio == pytest.approx(1 - left)
    assert reached.kv_groups == Plan.everything(anatomy).kv_groups
    assert reached.layers == tuple(range(anatomy.num_layers))
    more = sv.make_plan(anatomy, random_scores(anatomy), alone.ratio + 0.2, "width", tokens=tokens)
    assert more.tokens == tuple(tokens)
    assert more.ratio == pytest.approx(alone.ratio + 0.2, abs=0.02)
    deeper = sv.make_plan(
        anatomy, random_scores(anatomy), alone.ratio + 0.2, "depth", tokens=tokens
    )
    assert deeper.ratio == pytest.approx(alone.ratio + 0.2, abs=0.12)
    assert len(deeper.layers) < anatomy.num_layers


@pytest.mark.parametrize(
    ("field", "lost"), [("image_token_index", 120), ("text_config.eos_token_id", 2)]
)
def test_a_token_that_the_model_names_must_stay(field, lost):
    model = tiny.build("llava-llama")
    before = snapshot(model)
    plan = sv.make_plan(read_anatomy(model), [], 0.0, tokens=set(range(128)) - {lost})
    with pytest.raises(sv.SlimError, match=f"tokens must contain {lost}, .* {field} {lost}"):
        sv.prune_(model, plan)
    assert_untouched(model, before)


# Complete folders, with tokenizers whose special tokens have high numbers.

KINDS = list(tiny_words.FOLDERS)


def samples(kind):
    return tiny_folder.short_samples(8, sees=kind == "llava")


@cache
def trimmed(kind):
    """The folder of a kind, the same with fewer tokens, and the plan."""
    whole = tiny_words.folder(kind)
    model, processor = sv.load(whole, device="cpu")
    named = token_ids_of(model.config, model.generation_config)
    tokens = sv.choose_tokens(processor, samples(kind), texts=tiny_words.CORPUS[:2], keep=named)
    plan = sv.make_plan(read_anatomy(model), [], 0.0, tokens=tokens)
    sv.prune_(model, plan)
    out = tiny_folder.root() / f"trimmed-{kind}"
    sv.save(model, processor, out, plan)
    return whole, out, plan


def read(folder):
    """A tokenizer and a processor (the same, for text) as anyone reads them."""
    sees = (folder / "processor_config.json").exists()
    processor = (hf.AutoProcessor if sees else hf.AutoTokenizer).from_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder), processor


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_old_one_with_fewer_tokens(kind):
    whole, small, plan = trimmed(kind)
    (before, _), (after, _) = read(whole), read(small)
    tokens = plan.tokens or ()
    assert len(after) == len(tokens) < len(before)
    assert after.convert_ids_to_tokens(range(len(after))) == before.convert_ids_to_tokens(tokens)
    assert after.special_tokens_map == before.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_in_every_file_is_the_new_one(kind):
    whole, small, plan = trimmed(kind)
    (before, _), (after, _) = read(whole), read(small)
    configs = []
    for folder, words in ((whole, before), (small, after)):
        config = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        text = config.get("text_config", config)
        assert text["bos_token_id"] == words.bos_token_id
        assert text["eos_token_id"] == words.eos_token_id
        assert text["pad_token_id"] == words.pad_token_id
        if kind == "llava":
            assert config["image_token_index"] == words.convert_tokens_to_ids("<image>")
        configs.append((text, generation))
    (old, old_generation), (new, new_generation) = configs
    numbers = new_numbers(plan)
    assert new["vocab_size"] == len(numbers) == len(after)
    assert new_generation["eos_token_id"] == [numbers[i] for i in old_generation["eos_token_id"]]
    assert old["eos_token_id"] != new["eos_token_id"] or kind == "llava"
    forbidden = [numbers[i] for i in old_generation["suppress_tokens"] if i in numbers]
    assert new_generation["suppress_tokens"] == forbidden


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_back_model_says_the_same_and_is_the_one_written_piece_by_piece(kind, tmp_path):
    whole, small, plan = trimmed(kind)
    model, processor = sv.load(whole, device="cpu")
    less, its_processor = sv.load(small, device="cpu")
    (batch,) = sv.calibration_batches(processor, samples(kind)[:1])
    (fewer,) = sv.calibration_batches(its_processor, samples(kind)[:1])
    if set(batch["input_ids"].flatten().tolist()) <= set(plan.tokens or ()):
        assert renumbered(batch, plan)["input_ids"].equal(fewer["input_ids"])
    original_ids = torch.tensor(plan.tokens)[fewer["input_ids"]]
    said = logits(model, {**fewer, "input_ids": original_ids})[..., list(plan.tokens or ())]
    assert_close(logits(less, fewer), said, FORWARD)
    length = {"max_new_tokens": 6, "do_sample": False}
    inputs = {k: v for k, v in fewer.items() if k != "labels"}
    assert less.generate(**inputs, **length).shape[1] > fewer["input_ids"].shape[1]
    assert read_anatomy(open_checkpoint(whole).model) == plan.before
    sv.prune_checkpoint(whole, plan, tmp_path / "out")
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (small / name).read_text()
    at_once, by_piece = (sv.load(f, device="cpu")[0] for f in (small, tmp_path / "out"))
    assert_equal(by_piece.state_dict(), at_once.state_dict())


def test_a_tokenizer_is_trimmed_in_place_once_and_by_its_own_plan():
    whole, _, plan = trimmed("llava")
    _, processor = read(whole)
    untouched = copy.deepcopy(processor)
    copied = trimmed_processor(processor, plan)
    assert processor.tokenizer.get_vocab() == untouched.tokenizer.get_vocab()
    sv.trim_tokenizer_(processor, plan)
    assert processor.tokenizer.get_vocab() == copied.tokenizer.get_vocab()
    assert len(processor.tokenizer) == len(plan.tokens or ())
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    once = processor.tokenizer.get_vocab()
    sv.trim_tokenizer_(processor, plan)
    assert processor.tokenizer.get_vocab() == once
    _, _, plan = trimmed("text")
    _, processor = read(tiny_folder.folder("text"))
    with pytest.raises(sv.SlimError, match="tokens: TokenizersBackend has no token"):
        sv.trim_tokenizer_(processor, plan)
