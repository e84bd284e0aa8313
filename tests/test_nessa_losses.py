"""The losses of the embedding models against the papers' sums, written out in plain Python."""

import math

import pytest
import torch

from nessa_modules.losses import (
    LOSSES,
    AdditiveMarginSoftmax,
    ContrastiveLoss,
    ge2e_cosines,
    make_loss,
    prototypical_cosines,
)

SHAPES = [(2, 2, 3), (3, 2, 4), (4, 3, 5), (3, 5, 2)]


def batch(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def mean(vectors):
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]


def unit(x):
    norm = math.sqrt(sum(a * a for a in x))
    return [a / norm for a in x]


def nats(scores, own):
    return math.log(sum(math.exp(score) for score in scores)) - scores[own]


def prototypical_by_hand(embeddings, scale, bias):
    speakers = embeddings.tolist()
    prototypes = [mean(utterances[:-1]) for utterances in speakers]
    losses = [
        nats([scale * cosine(utterances[-1], prototype) + bias for prototype in prototypes], own)
        for own, utterances in enumerate(speakers)
    ]
    return sum(losses) / len(losses)


def ge2e_by_hand(embeddings, scale, bias):
    speakers = [[unit(utterance) for utterance in utterances] for utterances in embeddings.tolist()]
    losses = []
    for j, utterances in enumerate(speakers):
        for i, utterance in enumerate(utterances):
            centroids = [
                mean([other for h, other in enumerate(others) if (k, h) != (j, i)]) for k, others in enumerate(speakers)
            ]
            losses.append(nats([scale * cosine(utterance, centroid) + bias for centroid in centroids], j))
    return sum(losses) / len(losses)


def am_softmax_by_hand(embeddings, speakers, weight, margin, scale):
    losses = []
    for own, utterances in zip(speakers.tolist(), embeddings.tolist(), strict=True):
        for utterance in utterances:
            cosines = [cosine(utterance, row) for row in weight.tolist()]
            cosines[own] -= margin
            losses.append(nats([scale * value for value in cosines], own))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "by_hand"), [("prototypical", prototypical_by_hand), ("ge2e", ge2e_by_hand)])
def test_a_contrastive_loss_is_the_papers_sum(kind, by_hand, shape):
    embeddings = batch(shape)
    for scale, bias in ((10.0, -5.0), (2.5, 1.0)):
        loss = ContrastiveLoss(kind, scale, bias).double()
        assert float(loss(embeddings).loss.detach()) == pytest.approx(by_hand(embeddings, scale, bias), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_am_softmax_is_the_papers_sum(shape):
    embeddings, speakers = batch(shape), torch.tensor([6, 0, 3, 2][: shape[0]])
    loss = AdditiveMarginSoftmax(shape[-1], num_speakers=7, margin=0.3, scale=12.0).double()
    expected = am_softmax_by_hand(embeddings, speakers, loss.classifier.weight, 0.3, 12.0)
    assert float(loss(embeddings, speakers).loss.detach()) == pytest.approx(expected, rel=1e-5)  # SpeechBrain: float32


@pytest.mark.parametrize("kind", ["prototypical", "ge2e"])
def test_the_gradient_is_right(kind):
    loss = ContrastiveLoss(kind).double()
    embeddings = batch((3, 3, 4)).requires_grad_()

    def forward(embeddings, scale, bias):
        parameters = {"scale": scale, "bias": bias}
        return torch.func.functional_call(loss, parameters, (embeddings,)).loss

    inputs = (embeddings, torch.tensor(3.0).double().requires_grad_(), torch.tensor(-1.0).double().requires_grad_())
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_scale_of_an_embedding_does_not_matter(kind):
    """Cosines: of one utterance per prototype even each embedding's own scale."""
    torch.manual_seed(0)
    loss, embeddings, speakers = make_loss(kind, 4, 5), batch((3, 2, 4)).float(), torch.tensor([4, 1, 2])
    scales = torch.tensor([[1.0, 3.0], [0.2, 5.0], [7.0, 0.5]])[..., None]
    expected = float(loss(embeddings, speakers).loss.detach())
    assert float(loss(embeddings * scales, speakers).loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_an_utterance_has_no_part_in_the_centroid_that_it_is_compared_with():
    embeddings = batch((3, 3, 4))
    moved = embeddings.clone()
    moved[1, 2] = batch((4,), seed=1)
    before, after = ge2e_cosines(embeddings), ge2e_cosines(moved)
    assert torch.allclose(before[1, :2, [0, 2]], after[1, :2, [0, 2]])  # other speakers' centroids
    assert not torch.allclose(before[1, :2, 1], after[1, :2, 1])  # its own speaker's, of which it is a part
    others = torch.nn.functional.normalize(embeddings[1, :2], dim=-1).mean(0)
    expected = torch.cosine_similarity(moved[1, 2], others, dim=0)  # of the others alone
    assert after[1, 2, 1] == pytest.approx(float(expected))


def test_the_last_utterance_is_the_query():
    embeddings = batch((4, 3, 5))
    swapped = embeddings[:, [1, 0, 2]]
    assert torch.allclose(prototypical_cosines(embeddings), prototypical_cosines(swapped))
    assert not torch.allclose(prototypical_cosines(embeddings), prototypical_cosines(embeddings.flip(1)))


@pytest.mark.parametrize("kind", ["prototypical", "ge2e"])
def test_in_closed_form(kind):
    """Speakers at right angles: the own cosine is 1, the others are 0; with all alike, nothing can be told."""
    num_speakers, scale = 5, 4.0
    loss = ContrastiveLoss(kind, init_scale=scale)
    apart = torch.eye(num_speakers)[:, None].repeat(1, 3, 1)
    expected = math.log(1 + (num_speakers - 1) * math.exp(-scale))
    result = loss(apart)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert result.accuracy.mean() == 1
    alike = torch.ones(num_speakers, 3, 6)
    assert float(loss(alike).loss.detach()) == pytest.approx(math.log(num_speakers), rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_accuracy_is_the_share_of_right_answers(kind):
    torch.manual_seed(1)
    embeddings, speakers = torch.randn(6, 3, 4), torch.tensor([5, 0, 1, 4, 2, 3])
    loss = make_loss(kind, 4, 6)
    with torch.no_grad():
        if kind == "am_softmax":
            cosines = loss.classifier(embeddings.flatten(0, 1)[:, None])[:, 0]
            own = speakers.repeat_interleave(3)
        else:
            cosines = (ge2e_cosines if kind == "ge2e" else prototypical_cosines)(embeddings)
            own = torch.arange(6) if cosines.dim() == 2 else torch.arange(6).repeat_interleave(3)
    right = [int(row.argmax()) == int(who) for row, who in zip(cosines.flatten(0, -2), own, strict=True)]
    assert loss(embeddings, speakers).accuracy.tolist() == right
    assert 0 < sum(right) < len(right)


def test_the_scale_stays_positive():
    loss = ContrastiveLoss("ge2e")
    with torch.no_grad():
        loss.scale.fill_(-3.0)
    apart = torch.eye(4)[:, None].repeat(1, 2, 1)
    assert float(loss(apart).loss.detach()) == pytest.approx(math.log(4), abs=1e-4)  # not an inverted order


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_descent_tells_speakers_apart(kind):
    torch.manual_seed(0)
    embeddings = torch.nn.Parameter(torch.randn(4, 3, 6))
    loss, speakers = make_loss(kind, 6, 4), torch.arange(4)
    optimizer = torch.optim.Adam([embeddings, *loss.parameters()], lr=0.1)
    first = float(loss(embeddings, speakers).loss.detach())
    for _ in range(100):
        optimizer.zero_grad()
        result = loss(embeddings, speakers)
        result.loss.backward()
        optimizer.step()
    assert float(result.loss.detach()) < first / 10
    assert loss(embeddings, speakers).accuracy.mean() == 1


def test_the_learned_parameters_are_saved_and_loaded(tmp_path):
    loss = ContrastiveLoss("prototypical")
    with torch.no_grad():
        loss.scale.fill_(3.5)
    torch.save(loss.state_dict(), tmp_path / "loss.ckpt")
    again = ContrastiveLoss("prototypical")
    again.load_state_dict(torch.load(tmp_path / "loss.ckpt", weights_only=True))
    assert set(loss.state_dict()) == {"scale", "bias"}
    assert float(again.scale.detach()) == 3.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: prototypical_cosines(torch.randn(3, 1, 4)), r"at least 2 utterances each, but got shape \[3, 1, 4\]"),
        (lambda: ge2e_cosines(torch.randn(1, 2, 4)), r"at least 2 speakers .* got shape \[1, 2, 4\]"),
        (lambda: ge2e_cosines(torch.randn(2, 4)), r"got shape \[2, 4\]"),
        (lambda: ContrastiveLoss("triplet"), "one of prototypical, ge2e, but got 'triplet'"),
        (lambda: ContrastiveLoss("ge2e", init_scale=0.0), "init_scale can only be positive, but got 0.0"),
        (lambda: make_loss("triplet", 4, 5), "one of prototypical, ge2e, am_softmax, but got 'triplet'"),
        (lambda: AdditiveMarginSoftmax(4, 1), "at least 2 training speakers, but got 1"),
        (lambda: AdditiveMarginSoftmax(4, None), "at least 2 training speakers, but got None"),
        (lambda: AdditiveMarginSoftmax(4, 5, margin=2.0), "margin can only be 0 to 1"),
    ],
)
def test_mistakes_are_told(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
