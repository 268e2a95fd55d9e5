"""General text is prose that any chat template takes, and stands among what calibrates alone."""

import re

import pytest

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import PruneConfig
from slimvlm.core.progress import silent
from slimvlm.data.chat import encode_samples
from slimvlm.data.general import PASSAGE, general_samples
from slimvlm.runs import stages
from slimvlm.runs.request import Request, resolved
from tests import tiny_folder as folders


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


def test_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"general_text: 1000000 passages are needed, and"):
        general_samples(10**6, 0)


def test_it_is_a_share_of_what_calibrates_and_nothing_else(tmp_path):
    data = str(folders.write_llava_data(tmp_path))

    def read(share):
        config = PruneConfig(ratio=0.2, data=data, samples=8, general_text=share)
        request = Request(model=str(folders.folder("llava")), prune=config, training_samples=2)
        return stages.read_split(resolved(request), silent)

    plain, mixed = read(0.0), read(0.2)
    added = [place for place, s in enumerate(mixed.calibration) if s not in plain.calibration]
    assert added == [2, 7]  # evenly
    assert [s for s in mixed.calibration if s in plain.calibration] == list(plain.calibration)
    assert (mixed.training, mixed.report) == (plain.training, plain.report)
