"""Folds over the speakers of paired embeddings; what cannot be paired is in the tests of the alignments."""

import torch
from test_nessa_alignment import paired

from nessa_modules.paired_embeddings import pair_embeddings, speaker_folds, speaker_means


def test_folds_share_no_speaker_and_are_equal_parts():
    folds = speaker_folds(23, 5, seed=1)
    assert sorted(folds.bincount().tolist()) == [4, 4, 5, 5, 5]
    assert not torch.equal(folds, speaker_folds(23, 5, seed=2))
    pairs = pair_embeddings(*paired(num_speakers=23))
    kept, held_out = pairs.of_speakers(folds != 0), pairs.of_speakers(folds == 0)
    assert kept.num_speakers + held_out.num_speakers == 23
    assert len(kept.enroll) + len(held_out.enroll) == len(pairs.enroll)
    expected = speaker_means(pairs.enroll, pairs.speaker_indices)[folds == 0]
    torch.testing.assert_close(speaker_means(held_out.enroll, held_out.speaker_indices), expected)
