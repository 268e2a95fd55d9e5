"""Units and channels: `channels_of`, `fold` and `spread` tell the same story."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.models.anatomy import (
    LayerShape,
    channels_of,
    fold,
    segments,
    spread,
)
from slimvlm.models.families import BACKBONES

PROJECTIONS = sorted(
    {p for row in BACKBONES.values() for p in (*row.attention, *row.mlp)},
    key=lambda p: (p.path, p.dim, p.segments),
)
projection_rows = st.sampled_from(PROJECTIONS)
shapes = st.builds(
    LayerShape,
    num_kv_heads=st.integers(1, 5),
    queries_per_group=st.integers(1, 4),
    head_dim=st.sampled_from([1, 2, 4, 6]),
    intermediate_size=st.integers(1, 12),
    kv_group_params=st.just(0),
    neuron_params=st.just(0),
    fixed_params=st.just(0),
)


def num_units(projection, shape):
    return shape.block(projection.segments[0])[0]


def num_channels(projection, shape):
    return sum(units * width for _, _, units, width in segments(projection, shape))


@given(projection_rows, shapes)
def test_units_own_all_channels_in_order_fold_adds_them_up_and_spread_is_its_transpose(
    projection, shape
):
    everything = channels_of(projection, shape, range(num_units(projection, shape)))
    assert everything.tolist() == list(range(num_channels(projection, shape)))
    values = torch.rand(num_channels(projection, shape), dtype=torch.float64)
    per_unit = torch.stack(fold(projection, shape, values)).sum(0)
    for unit in range(num_units(projection, shape)):
        expected = values[channels_of(projection, shape, [unit])].sum()
        torch.testing.assert_close(per_unit[unit], expected)
    per_unit = torch.rand(num_units(projection, shape), dtype=torch.float64)
    per_channel = torch.rand(num_channels(projection, shape), dtype=torch.float64)
    folded = torch.stack(fold(projection, shape, per_channel)).sum(0)
    spread_out = spread(projection, shape, per_unit)
    torch.testing.assert_close(per_unit @ folded, spread_out @ per_channel)
    several = spread(projection, shape, per_unit.expand(2, 3, -1))  # leading dimensions are kept
    assert torch.equal(several[1, 2], spread_out)


@given(projection_rows, shapes, st.data())
def test_units_share_no_channel(projection, shape, data):
    units = range(num_units(projection, shape))
    kept = sorted(data.draw(st.sets(st.sampled_from(units))))
    gone = [unit for unit in units if unit not in kept]
    kept_channels = channels_of(projection, shape, kept).tolist()
    gone_channels = channels_of(projection, shape, gone).tolist()
    assert kept_channels == sorted(kept_channels)
    assert sorted(kept_channels + gone_channels) == list(range(num_channels(projection, shape)))


def test_query_heads_of_a_group_are_neighbours_and_fused_matrices_cut_inside_blocks():
    shape = LayerShape(2, 3, 2, 5, 0, 0, 0)
    query = BACKBONES["llama"].attention[0]
    assert channels_of(query, shape, [1]).tolist() == [6, 7, 8, 9, 10, 11]
    stripes = torch.arange(12).view(3, 4)[:, 2:].flatten().tolist()
    assert channels_of(query, shape, [1]).tolist() != stripes
    shape = LayerShape(2, 2, 2, 3, 0, 0, 0)
    row = BACKBONES["phi3"]
    fused, gate_up = row.attention[0], row.mlp[0]
    # rows 0-7 are four query heads, 8-11 two keys, 12-15 two values
    assert channels_of(fused, shape, [1]).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert channels_of(gate_up, shape, [0, 2]).tolist() == [0, 2, 3, 5]
    assert [part.tolist() for part in fold(fused, shape, torch.arange(16.0))] == [
        [6.0, 22.0],
        [17.0, 21.0],
        [25.0, 29.0],
    ]
