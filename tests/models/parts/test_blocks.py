"""Rows in blocks: any piece across them, any number from a checkpoint, and passed on in the order in which they lie."""

import pytest
import torch

from models.parts.blocks import Blocks, passed_on


def made(*counts: int) -> tuple[Blocks, torch.Tensor]:
    blocks = Blocks(2, 3)
    rows = torch.randn(sum(counts), 2, 3)
    for count, some in zip(counts, rows.split(counts), strict=True):
        blocks.append(count, iter(some.double()))
    return blocks, rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 20])
def test_pieces_go_over_the_blocks_borders(size):
    blocks, rows = made(3, 1, 5, 2)
    assert len(blocks) == 11 and torch.equal(blocks.dense(), rows)
    for piece, expected in zip(blocks.in_turn(size), rows.split(size), strict=True):
        assert torch.equal(piece, expected)
    places = torch.empty(2, size, 2, 3)
    for piece, expected in zip(passed_on(blocks.pieces(size), places), rows.split(size), strict=True):
        assert torch.equal(piece, expected)


def test_none_has_no_pieces():
    blocks = Blocks(2)
    assert len(blocks) == 0 and not list(blocks.in_turn(4)) and not list(passed_on([], torch.empty(2, 4, 2)))
    assert blocks.dense().shape == (0, 2)


def test_rows_that_lie_are_not_copied_when_more_come():
    blocks, _ = made(2)
    where = blocks.all()[0].data_ptr()
    blocks.append(1, [torch.zeros(2, 3)])
    assert blocks.all()[0].data_ptr() == where


@pytest.mark.parametrize("saved", [(), (4,), (1, 2, 3), tuple([1] * 12)])
@pytest.mark.parametrize("there", [(), (5, 5)])
def test_any_number_of_blocks_comes_back(saved, there):
    (blocks, rows), (other, _) = made(*saved), made(*there)
    other.load_state_dict(blocks.state_dict())
    assert torch.equal(other.dense(), rows)
    assert [len(block) for block in other.all()] == list(saved)


def test_on_the_host_they_stay_where_the_module_goes():
    blocks, rows = made(2, 3)
    blocks.on_host = True
    blocks.to("meta")
    assert blocks.like.device.type == "meta"
    assert {block.device.type for block in blocks.all()} == {"cpu"}
    back = Blocks(2, 3)
    back.load_state_dict(blocks.state_dict())
    assert torch.equal(back.dense(), rows)
