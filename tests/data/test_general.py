"""General text is prose that any chat template takes, and stands among what calibrates alone."""

import re
from dataclasses import replace
from statistics import median

import pytest
import torch
from PIL import Image

from slimvlm.core.options import PruneConfig
from slimvlm.core.progress import silent
from slimvlm.data.chat import encode_samples
from slimvlm.data.general import PASSAGE, general_samples
from slimvlm.data.samples import Sample
from slimvlm.models.hidden import as_inputs
from slimvlm.runs import stages
from slimvlm.runs.recipe import decide, read_split
from tests import tiny_folder as folders
from tests import tiny_pictures


def passages(*how):
    return [sample.messages[-1]["content"][0]["text"] for sample in general_samples(*how)]


@pytest.mark.parametrize("longest", [None, 200])
def test_passages_are_short_plain_prose_drawn_by_seed(longest):
    most = longest or PASSAGE
    drawn = passages(20, 3, longest)
    assert drawn == passages(20, 3, longest)
    assert len({*drawn, *passages(20, 4, longest)}) > 20
    for text in drawn:
        assert most // 3 < len(text) <= most
        assert re.fullmatch(r"[^<>{}\[\]|`#=]+", text)
        assert text.isascii()
        assert text.replace("\n", " ").isprintable()
    read = encode_samples(folders.processor("llava"), general_samples(20, 3, longest))
    assert read["input_ids"].shape[0] == 20
    assert longest is None or read["input_ids"].shape[1] <= longest
    assert len(passages(10**6, 0)) == len({*passages(10**6, 0)}) > 100


def test_it_is_a_share_of_what_calibrates_and_nothing_else(tmp_path):
    data, words = str(folders.write_llava_data(tmp_path)), folders.processor("llava")

    def read(share, say=silent):
        config = PruneConfig(ratio=0.2, data=data, samples=8, general_text=share)
        return read_split(decide(str(folders.folder("llava")), config), say)

    said = []
    plain, mixed = read(0.0), read(0.2, said.append)
    assert [s for s in mixed.calibration if not s.is_general] == list(plain.calibration)
    texts = [s for s in mixed.calibration if s.is_general]
    assert len(texts) == 2
    usual = median(encode_samples(words, [s])["input_ids"].numel() for s in plain.calibration)
    assert all(len(s.messages[-1]["content"][0]["text"]) <= 6 * usual for s in texts)
    assert (mixed.training, mixed.test) == (plain.training, plain.test)
    assert said[-1] == "added 2 general-text passages to the calibration set (general_text)"


@pytest.mark.parametrize(
    ("data", "repair", "share"), [("d", "auto", 0.2), ("d", "none", 0.0), (None, "auto", 0.0)]
)
def test_by_default_a_fifth_where_weights_are_repaired(data, repair, share):
    config = PruneConfig(ratio=0.2, data=data, repair=repair, criterion=("magnitude",))
    assert decide("m", config).general_text == share
    asked = replace(config, general_text=0.1)
    assert decide("m", asked).general_text == 0.1


@pytest.mark.parametrize("name", tiny_pictures.BY_DEFAULT)
@torch.no_grad()
def test_every_family_reads_it_beside_pictures(name):
    model, processor = tiny_pictures.made(name)
    shown = Image.linear_gradient("L").resize(tiny_pictures.FAMILIES[name].size).convert("RGB")
    turns = folders.turn("user", None, "What is it?"), folders.turn("assistant", "It is red.")
    samples = [*general_samples(3, 0, 120), *(Sample(f"{n}", turns, (shown,)) for n in range(3))]
    batches = stages.Calibration(processor, samples, hold_out=False).fitted
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3]  # apart
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        assert model(**as_inputs(model, inputs)).logits.isfinite().all()
