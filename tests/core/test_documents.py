"""Work goes on for the very request that began it, and for no other."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slimvlm.core.documents import (
    comparable,
    digest,
    identity_of_files,
    is_begun_for,
    note_request,
    noted_request,
    require_same,
)
from slimvlm.core.errors import ConfigError

NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=6,
)
REQUESTS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=4)


def refusal_of(noted, request):
    try:
        if noted is not None:
            require_same(noted, comparable(request), "work in 'here' belongs to a run", "Go away")
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("work") / "request.json"


@given(request=REQUESTS)
def test_the_same_request_goes_on(request, file):
    note_request(file, request)
    assert is_begun_for(file, request)
    assert refusal_of(noted_request(file), request) is None
    stored = json.loads(file.read_text())
    assert stored.pop("version").startswith("slimvlm ")
    assert stored == json.loads(json.dumps(request))


@given(request=REQUESTS, data=st.data())
def test_another_request_is_refused_and_told_what_differs(request, data, file):
    note_request(file, request)
    name = data.draw(st.sampled_from(sorted(request)) | NAMES)
    value = data.draw(VALUES)
    before, after = (json.loads(json.dumps(v)) for v in (request.get(name, ()), value))
    assume(before != after)
    assume(not (isinstance(before, dict) and isinstance(after, dict)))
    other = {**request, name: value}
    assert not is_begun_for(file, other)
    told = refusal_of(noted_request(file), other)
    assert told == f"work in 'here' belongs to a run with another {name}. Go away"


def test_values_inside_others_are_named_by_their_place(file):
    note_request(file, {"config": {"steps": 3, "seed": 0}, "model": "a", "gone": 1})
    told = refusal_of(noted_request(file), {"config": {"steps": 4, "seed": 0}, "model": "b"})
    assert "with another config.steps and another model and another gone. Go away" in told


@given(request=REQUESTS, data=st.data())
def test_a_half_written_request_counts_as_none(request, data, file):
    note_request(file, request)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])  # the last is a line end
    assert noted_request(file) is None
    assert not is_begun_for(file, request)
    assert refusal_of(noted_request(file), request) is None


@given(first=VALUES, second=VALUES)
def test_a_digest_tells_values_apart_and_not_their_order(first, second):
    one, other = (json.dumps(v, sort_keys=True) for v in (first, second))
    assert (digest([first]) == digest([second])) == (one == other)
    assert digest([{"a": first, "b": second}]) == digest([{"b": second, "a": first}])
    assert digest([b"raw", first]) == digest(iter([memoryview(b"raw"), first]))


def test_files_of_linked_folders_count(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    before = identity_of_files("b", str(tmp_path / "b"))
    (tmp_path / "a" / "file").touch()
    assert identity_of_files("b", str(tmp_path / "b")) != before
