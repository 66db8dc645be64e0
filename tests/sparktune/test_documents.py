"""Documents by themselves: what is read out of masks, positions and lengths, and what is refused."""

import itertools

import pytest
import torch
from sparktune.models.documents import Documents

HOST = torch.device("cpu")


def of(mask=None, positions=None, batch=2, length=6, **kwargs):
    mask = None if mask is None else torch.tensor(mask)
    positions = None if positions is None else torch.tensor(positions)
    return Documents.of(batch, length, HOST, mask, positions, kwargs)


def runs(documents, batch=2, length=6):
    """Each token's document, row by row, with empty documents left out."""
    edges = documents.cu_seqlens.tolist()
    assert edges[0] == 0 and edges[-1] == batch * length and edges == sorted(edges)
    named = [i for i, (a, b) in enumerate(itertools.pairwise(edges)) for _ in range(b - a)]
    order = {name: i for i, name in enumerate(dict.fromkeys(named))}
    return [[order[n] for n in named[r * length : (r + 1) * length]] for r in range(batch)]


def test_rows_that_are_one_sequence_each_need_nothing():
    assert of() is None
    assert of(mask=[[1] * 6] * 2) is None
    assert of(positions=[[0, 1, 2, 3, 4, 5]]) is None
    assert of(positions=[[3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5]]) is None


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_is_documents_of_its_own(kind):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).to(kind)
    found = Documents.of(2, 6, HOST, mask, None, {})
    assert runs(found) == [[0, 0, 1, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    assert not found.packed
    assert found.longest >= 4
    assert found.cu_seqlens.dtype == torch.int32


def test_padding_on_both_sides_and_rows_of_padding_alone():
    found = of(mask=[[0, 1, 1, 1, 0, 0], [0] * 6])
    assert runs(found) == [[0, 1, 1, 1, 2, 2], [3] * 6]


def test_a_mask_with_gaps_is_refused():
    with pytest.raises(ValueError, match="gaps between the tokens of a row"):
        of(mask=[[1, 0, 1, 1, 1, 1], [1] * 6])


def test_positions_that_start_again_begin_a_document_and_a_row_begins_one_anyway():
    found = of(positions=[[0, 1, 2, 0, 1, 0], [1, 2, 3, 4, 0, 1]])
    assert runs(found) == [[0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 4, 4]]
    assert found.packed and found.longest == 4
    assert found.positions(2, 6).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]


def test_lengths_run_over_rows_and_may_be_nothing():
    for lengths in ([4, 0, 8], torch.tensor([4, 0, 8]), torch.tensor([[4, 0, 8]], dtype=torch.int32)):
        kwargs = {"packed_seq_lengths": lengths, "other": 1}
        found = Documents.of(2, 6, HOST, None, None, kwargs)
        assert found.cu_seqlens.tolist() == [0, 4, 4, 12]
        assert (found.longest, found.packed) == (8, True)
        assert kwargs == {"other": 1}, "the model's own forward does not know these"


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        of(packed_seq_lengths=[13, -1])


@pytest.mark.parametrize("lengths", [[4, 7], [4, 9], []])
def test_lengths_that_do_not_add_up_are_refused(lengths):
    with pytest.raises(ValueError, match=r"packed_seq_lengths add up to \d+, but the batch has 12 tokens"):
        of(packed_seq_lengths=lengths)


def test_cumulative_lengths_are_taken_as_they_are():
    cu = torch.tensor([0, 5, 12])
    found = of(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=7, max_length_k=7)
    assert (found.cu_seqlens.tolist(), found.longest, found.packed) == ([0, 5, 12], 7, True)
    assert found.cu_seqlens.dtype == torch.int32
    assert of(cu_seq_lens_q=cu).longest >= 7, "a bound where nothing is said"


def test_a_mask_that_hides_goes_before_lengths_and_lengths_before_positions():
    mask = [[0, 1, 1, 1, 1, 1], [1] * 6]
    assert not of(mask=mask, packed_seq_lengths=[6, 6]).packed
    positions = [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]]
    assert of(positions=positions, packed_seq_lengths=[2, 10]).cu_seqlens.tolist() == [0, 2, 12]


def test_no_document_predicts_the_next_ones_first_token():
    labels = torch.arange(12).view(2, 6)
    found = of(packed_seq_lengths=[2, 0, 3, 7, 0])
    expected = labels.clone()
    for at in (0, 2, 5):
        expected.view(-1)[at] = -100
    assert torch.equal(found.without_first(labels), expected)
    assert torch.equal(labels, torch.arange(12).view(2, 6)), "a copy"
