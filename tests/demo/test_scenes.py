"""The demo's pictures: determinism, separation of the sides, contents."""

import numpy as np
import pytest

from slimvlm.demo import scenes as s
from slimvlm_tools.demo_training.patches import patch_classes, patch_coverage, patch_labels


@pytest.mark.parametrize("kind", s.SCENE_KINDS)
def test_a_seed_gives_the_same_picture_and_sides_share_no_composition(kind):
    first, second = (s.make_scene(kind, np.random.default_rng(3)) for _ in range(2))
    assert first == second
    drawn = s.render(first)
    assert drawn.tobytes() == s.render(second).tobytes()
    assert (drawn.size, drawn.mode) == ((64, 64), "RGB")
    rng = np.random.default_rng(0)
    train = {s.make_scene(kind, rng, "train").key for _ in range(300)}
    test = {s.make_scene(kind, rng, "test").key for _ in range(300)}
    assert not train & test


def test_sides_share_no_digit_picture_and_art_is_complete_without_sharealike_style():
    labels = s.load_digits()[1]
    train, test = (set(s.digit_sources(side)) for side in ("train", "test"))
    assert not train & test
    assert train | test == set(range(len(labels)))
    counts = np.bincount(labels[s.digit_sources("test")], minlength=10)
    assert counts.min() > 0.05 * counts.sum()
    art = s.load_art()
    assert set(art.styles) == {"noto", "twemoji", "fluent"}
    assert all(x.shape == (len(art.names), 64, 64, 4) for x in art.styles.values())
    assert len(set(art.names)) == len(art.names) == len(art.categories)
    with np.load(s.ASSETS / "emoji64.npz") as z:
        assert "openmoji" not in z
    rng = np.random.default_rng(2)
    for _ in range(20):  # scenes have the styles that are asked for
        scene = s.make_scene("multi", rng, styles=(s.UNSEEN_STYLE,))
        assert {o.style for o in scene.objects} == {"fluent"}
    assert s.UNSEEN_STYLE not in s.SEEN_STYLES


@pytest.mark.parametrize("kind", ["multi", "count", "digits", "shapes"])
def test_every_object_stands_in_its_own_cell(kind):
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = s.make_scene(kind, rng)
        cover = patch_coverage(scene)
        cells = [o.cell for o in scene.objects]
        assert cells == sorted(set(cells))
        for item, share in zip(scene.objects, cover, strict=True):
            row, col = divmod(item.cell, 2)
            inside = share[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].sum()
            assert inside > 0
            assert np.isclose(share.sum(), inside)


def test_patch_labels_name_what_covers_the_patch():
    scene = s.make_scene("multi", np.random.default_rng(5), names=["cat", "bus"])
    labels = patch_labels(scene)
    shown = {patch_classes()[i] for i in labels if i > 0}
    assert shown == {"cat", "bus"}
    assert labels.shape == (16,)
