"""Roles cover every valid token once, and weights follow them."""

from types import SimpleNamespace

import pytest
import torch

from slimvlm.core.errors import ConfigError
from slimvlm.data.roles import ROLES, parse_token_weights, role_masks, token_weights
from slimvlm.scoring.batches import labels_of
from tests import tiny

IMAGE = 9
CONFIG = SimpleNamespace(image_token_id=IMAGE)


def batch():
    return {
        "input_ids": torch.tensor([[1, IMAGE, IMAGE, 5, 6, 7], [1, 5, 6, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 6, 7], [-100, -100, 6, -100, -100, -100]]),
    }


def test_every_valid_token_has_one_role_and_a_weight():
    masks = role_masks(CONFIG, batch())
    assert torch.equal(sum(masks[role].long() for role in ROLES), batch()["attention_mask"])
    assert masks["image"].tolist()[0] == [False, True, True, False, False, False]
    assert masks["answer"].sum(1).tolist() == [2, 1]
    weights = token_weights(CONFIG, batch(), {"image": 0.25, "answer": 2})
    assert weights.tolist() == [[1, 0.25, 0.25, 1, 2, 2], [1, 1, 2, 0, 0, 0]]
    assert torch.equal(token_weights(CONFIG, batch()), batch()["attention_mask"].float())
    given = batch()
    embedded = {**given, "inputs_embeds": torch.zeros(2, 6, 4)}
    del embedded["input_ids"]
    assert not role_masks(CONFIG, embedded)["image"].any()
    assert role_masks(CONFIG, embedded)["answer"].sum() == 3


def test_placeholders_are_found_in_every_family_and_never_predicted():
    parts = tiny.CONFIGS["phi4_multimodal"]()
    ids = torch.tensor([[5, tiny.IMAGE_TOKEN, tiny.IMAGE_TOKEN, 6, 121]])
    by_id = role_masks(parts, {"input_ids": ids})["image"]
    assert by_id.tolist() == [[False, True, True, False, True]]  # 121 stands for sound
    assert labels_of(parts, {"input_ids": ids}).tolist() == [[5, -100, -100, 6, -100]]
    marked = {"input_ids": ids, "image_embeds_position_mask": torch.tensor([[0, -1, 1, 1, 0]])}
    found = role_masks(tiny.CONFIGS["kosmos2_5"](), marked)["image"]
    assert found.tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("text", ["", "image", "image=x", "sky=1", "image=-1", "image=1,image=2"])
def test_bad_weights_are_refused_by_name(text):
    with pytest.raises(ConfigError, match="token_weights"):
        parse_token_weights(text)


def test_weights_are_read():
    assert parse_token_weights("image=0.1, prompt=1") == {"image": 0.1, "prompt": 1.0}
    with pytest.raises(ConfigError, match="above 0"):
        parse_token_weights("image=0,prompt=0,answer=0")
    with pytest.raises(ConfigError, match="sky"):
        token_weights(CONFIG, batch(), {"sky": 1.0})
