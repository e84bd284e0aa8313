"""NESSA: two small networks that bring two frozen models' embeddings into one space, trained with a contrastive loss.

Of the paper (Gao et al. 2024, *Post-Training Embedding Alignment for Decoupling Enrollment and Runtime Speaker
Recognition Models*, arXiv 2401.12440) only the abstract and summaries were at hand: the networks, the loss and the way
they are fitted are this project's own. A network is a linear map plus a hidden layer. The linear map starts where a
closed form puts it, the hidden layer at zero; held-out alignment speakers choose the closed form and the number of
training steps, so that with few speakers, where training would only learn those by heart, the fit stays at the closed
form.
"""

import itertools

import torch
from torch.nn import functional
from tqdm import tqdm

from nessa_modules.alignment import Alignment
from nessa_modules.linear_alignment import LinearAlignment, choose_ridge, least_squares_matrices, procrustes_matrices
from nessa_modules.paired_embeddings import speaker_folds, speaker_means

_PARTS = ("matrix", "offset", "hidden_matrix", "hidden_offset", "output_matrix")

# Of the closed forms, see CrossSpaceMaps.
_SHRINKAGES = (0.1, 0.3, 0.6)
_POWERS = (0.5, 1.0)
_SESSION_SHARES = (0.0, 0.5, 1.0)
_WITHOUT_CHOICE = ("cross_space", 0.3, 0.3, 1.0, 1.0)

_NUM_FOLDS = 5
_MIN_SPEAKERS_TO_CHOOSE = 10
# Held-out speakers from which more folds would change little, in the choice of a closed form and of the steps.
_CHOICE_SPEAKERS, _STEPS_SPEAKERS = 250, 120
_MAX_HELD_OUT = 150  # of a fold: their square is the number of trials
_MIN_TARGETS = 120  # of a fold: with fewer speakers, several profiles of each

_INTERVAL = 20  # steps between two looks at the held-out speakers
_PATIENCE = 8  # looks without a better cost, after which training ends
_AVERAGE_STEPS = 20  # over which the weights are averaged


def network(tensors, side, embeddings, dropout=0.0, generator=None):
    """One side's network: a linear map and, added to it, a hidden layer of rectified units.

    Arguments
    ---------
    tensors : dict
        ``{side}_matrix`` [D, Dz], ``{side}_offset`` [Dz], ``{side}_hidden_matrix`` [D, H], ``{side}_hidden_offset``
        [H] and ``{side}_output_matrix`` [H, Dz].
    side : str
        ``enroll`` or ``runtime``. A side without tensors is the identity.
    embeddings : Tensor
        [.., D], of length 1.
    dropout : float
        Share of the hidden units that are left out, in training.
    generator : torch.Generator, optional
        Draws them.

    Returns
    -------
    Tensor
        [.., Dz], of length 1.

    Example
    -------
    >>> tensors = {"runtime_matrix": torch.eye(2), "runtime_offset": torch.tensor([0.0, -1.0])}
    >>> tensors |= {"runtime_hidden_matrix": torch.ones(2, 3), "runtime_hidden_offset": torch.zeros(3)}
    >>> tensors |= {"runtime_output_matrix": torch.zeros(3, 2)}
    >>> network(tensors, "runtime", torch.tensor([[0.8, 0.6]]))
    tensor([[ 0.8944, -0.4472]])
    """
    if f"{side}_matrix" not in tensors:
        return embeddings
    matrix, offset, hidden_matrix, hidden_offset, output_matrix = (tensors[f"{side}_{part}"] for part in _PARTS)
    rows = embeddings.reshape(-1, embeddings.shape[-1])  # (.., D) -> (K, D): addmm is one operation
    hidden = torch.addmm(hidden_offset, rows, hidden_matrix).relu()  # (K, H)
    if dropout:
        kept = torch.rand(hidden.shape, generator=generator) >= dropout
        hidden = hidden * kept / (1 - dropout)
    mapped = torch.addmm(torch.addmm(offset, rows, matrix), hidden, output_matrix)  # (K, Dz)
    mapped = mapped / torch.linalg.vector_norm(mapped, dim=-1, keepdim=True).clamp_min(1e-12)
    return mapped.reshape(*embeddings.shape[:-1], -1)


def contrastive_loss(profiles, utterances, log_scale):
    """Cross-entropy of telling whose profile an utterance matches, and whose utterance a profile matches.

    Arguments
    ---------
    profiles, utterances : Tensor
        [P, Dz], of length 1; row by row of the same P different speakers.
    log_scale : Tensor
        Logarithm of the factor of the cosines, learned: the inverse temperature.

    Returns
    -------
    Tensor
        The mean of both, a scalar.

    Example
    -------
    >>> contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(0.0))
    tensor(0.3133)
    """
    logits = log_scale.exp() * profiles @ utterances.T  # (P, P)
    labels = torch.arange(len(logits))
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def calibrated_cost(targets, nontargets):
    """How well scores tell targets from others: the logistic cost after the best scaling and shift, in bits.

    Cllr (Brummer and du Preez 2006) after an affine calibration on the same scores: between 0 and 1. It looks at all
    operating points and varies less than the EER over few trials.

    Arguments
    ---------
    targets, nontargets : Tensor
        Scores, 1-D.

    Returns
    -------
    float

    Example
    -------
    >>> round(calibrated_cost(torch.tensor([0.3, 0.3]), torch.tensor([0.3, 0.3])), 6)
    1.0
    """
    scores = torch.cat([targets, nontargets]).double()
    scores = (scores - scores.mean()) / scores.std().clamp_min(1e-12)
    is_target = torch.zeros_like(scores)
    is_target[: len(targets)] = 1
    # Targets and others weigh alike, whatever their numbers.
    weights = torch.where(is_target == 1, 0.5 / len(targets), 0.5 / len(nontargets))
    inputs = torch.stack([scores, torch.ones_like(scores)], dim=1)  # (N, 2)
    line = torch.zeros(2, dtype=torch.float64)
    for _ in range(10):  # Newton's steps; the small ridge keeps separable scores from infinite slopes
        probabilities = torch.sigmoid(inputs @ line)
        gradient = inputs.T @ (weights * (probabilities - is_target)) + 1e-4 * line
        curvature = (weights * probabilities * (1 - probabilities))[:, None] * inputs
        line = line - torch.linalg.solve(inputs.T @ curvature + 1e-4 * torch.eye(2, dtype=torch.float64), gradient)
    logits = inputs @ line
    return float((weights * (functional.softplus(logits) - is_target * logits)).sum() / torch.log(torch.tensor(2.0)))


class CrossSpaceMaps:
    """Linear maps of both sides, in closed form, to the directions in which speakers agree across the spaces.

    A canonical correlation analysis of speakers instead of utterances. Their cross-covariance C is that of a
    profile in one space and *another* utterance of the speaker in the other; a share of what the two embeddings of one
    utterance have in common beyond that may be added: it is the session's, not the speaker's, but tells how the
    spaces lie to each other, which few speakers alone do not. T_x and T_y are the covariances of profiles and of
    utterances, shrunk towards multiples of the identity. With T_x^-1/2 C T_y^-1/2 = U S V^T, the maps are
    T_x^-1/2 U S^power and T_y^-1/2 V S^power: whitened, then weighted by how well a direction agrees.

    What several settings have in common is computed once.

    Arguments
    ---------
    pairs : PairedEmbeddings
    profile_utterances : int
        In a profile.

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> X = torch.randn(40, 8)
    >>> maps = CrossSpaceMaps(pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)]))(0.3, 0.3, 1.0, 0.5)
    >>> {side: list(matrix.shape) for side, (matrix, offset) in maps.items()}
    {'enroll': [8, 5], 'runtime': [5, 5]}
    """

    def __init__(self, pairs, profile_utterances=2):
        speakers, num_speakers = pairs.speaker_indices, pairs.num_speakers
        freedom = max(len(speakers) - num_speakers, 1)
        self._means = {"enroll": pairs.enroll.mean(0), "runtime": pairs.runtime.mean(0)}
        centered = {side: getattr(pairs, side) - mean for side, mean in self._means.items()}
        centroids = {side: speaker_means(values, speakers) for side, values in centered.items()}
        residuals = {side: values - centroids[side][speakers] for side, values in centered.items()}
        # The centroid of n utterances varies by the covariance of speakers and an n-th of that within speakers.
        inverse_count = (1 / torch.bincount(speakers).double()).mean()

        def covariances(left, right):
            within = residuals[left].T @ residuals[right] / freedom
            return within, centroids[left].T @ centroids[right] / num_speakers - inverse_count * within

        self._cross_within, self._cross_between = covariances("enroll", "runtime")
        self._totals = {}
        for side, count in (("enroll", profile_utterances), ("runtime", 1)):
            within, between = covariances(side, side)
            self._totals[side] = between + within / count
        self._roots, self._directions = {}, {}

    def __call__(self, enroll_shrinkage, runtime_shrinkage, power, session_share):
        """The maps for some settings.

        Arguments
        ---------
        enroll_shrinkage, runtime_shrinkage : float
            From 0 to 1.
        power : float
            0: all directions alike.
        session_share : float
            From 0 to 1.

        Returns
        -------
        dict
            Of the side ``enroll`` and of ``runtime`` the matrix [D, Dz] and the offset [Dz], Dz = min(Dx, Dy), float64.
        """
        enroll_root, runtime_root = self._root("enroll", enroll_shrinkage), self._root("runtime", runtime_shrinkage)
        key = enroll_shrinkage, runtime_shrinkage, session_share
        if key not in self._directions:
            cross = self._cross_between + session_share * self._cross_within  # (Dx, Dy)
            self._directions[key] = torch.linalg.svd(enroll_root @ cross @ runtime_root, full_matrices=False)
        left, agreement, right = self._directions[key]
        maps = {}
        for side, root, directions in (("enroll", enroll_root, left), ("runtime", runtime_root, right.T)):
            matrix = root @ directions * agreement.pow(power)  # (D, Dz)
            maps[side] = (matrix, -self._means[side] @ matrix)
        return maps

    def _root(self, side, shrinkage):
        if (side, shrinkage) not in self._roots:
            self._roots[side, shrinkage] = _inverse_root(self._totals[side], shrinkage)
        return self._roots[side, shrinkage]


def _inverse_root(covariance, shrinkage):
    """The inverse square root of a covariance matrix [D, D] shrunk towards a multiple of the identity."""
    size = len(covariance)
    level = covariance.trace() / size
    shrunk = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(size, dtype=covariance.dtype)
    eigenvalues, vectors = torch.linalg.eigh(shrunk)
    # What is left of the speakers after taking the within-speaker part off may be negative in a direction.
    return vectors * eigenvalues.clamp_min(1e-3 * level).rsqrt() @ vectors.T


def closed_forms(pairs):
    """Linear maps that training may start from.

    Arguments
    ---------
    pairs : PairedEmbeddings

    Yields
    ------
    key : tuple
        Names the closed form and its settings.
    maps : dict
        As :class:`CrossSpaceMaps` gives them.

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> X = torch.randn(40, 8)
    >>> keys = [key for key, maps in closed_forms(pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)]))]
    >>> sorted({key[0] for key in keys})
    ['cross_space', 'least_squares', 'procrustes']
    """
    cross_space_maps = CrossSpaceMaps(pairs)
    for settings in itertools.product(_SHRINKAGES, _SHRINKAGES, _POWERS, _SESSION_SHARES):
        yield ("cross_space", *settings), cross_space_maps(*settings)
    for key in (("procrustes",), ("least_squares",)):
        yield key, closed_form(pairs, key)


def closed_form(pairs, key):
    """The linear maps of one key of :func:`closed_forms`.

    Arguments
    ---------
    pairs : PairedEmbeddings
    key : tuple

    Returns
    -------
    dict
        As :class:`CrossSpaceMaps` gives them.

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> X = torch.randn(40, 8)
    >>> maps = closed_form(pair_embeddings(X, X[:, :5], [row // 2 for row in range(40)]), ("procrustes",))
    >>> bool(torch.allclose(maps["runtime"][0] @ maps["runtime"][0].T, torch.eye(5, dtype=torch.float64)))
    True
    """
    if key[0] == "cross_space":
        return CrossSpaceMaps(pairs)(*key[1:])
    is_rotation = key[0] == "procrustes"
    matrices = procrustes_matrices(pairs) if is_rotation else least_squares_matrices(pairs, choose_ridge(pairs))
    maps = {}
    for side in ("enroll", "runtime"):
        embeddings = getattr(pairs, side)
        matrix = matrices.get(side, torch.eye(embeddings.shape[1], dtype=embeddings.dtype))
        maps[side] = (matrix, -embeddings.mean(0) @ matrix)
    return maps


class SpeakerTable:
    """The rows of each speaker's utterances, to draw profiles and queries from.

    Arguments
    ---------
    speaker_indices : Tensor
        [K], from 0 to S - 1, each of which occurs.

    Example
    -------
    >>> table = SpeakerTable(torch.tensor([0, 1, 1, 0]))
    >>> query, rows, weights = table.draw(torch.tensor([1]), 3, torch.Generator().manual_seed(0))
    >>> sorted([int(query), int(rows[0, 0])]), weights[0, 0]
    ([1, 2], tensor(1.))
    """

    def __init__(self, speaker_indices):
        order = speaker_indices.argsort(stable=True)
        self._counts = torch.bincount(speaker_indices)  # (S)
        starts = self._counts.cumsum(0) - self._counts
        slots = torch.arange(int(self._counts.max()))
        self._is_row = slots < self._counts[:, None]  # (S, M)
        self._rows = order[(starts[:, None] + slots).clamp_max(len(order) - 1)]  # (S, M)

    def draw(self, speakers, max_profile, generator):
        """Draw of each speaker an utterance as the query and some of the others as the profile.

        Arguments
        ---------
        speakers : Tensor
            [P].
        max_profile : int
            Most utterances in a profile; how many is drawn as well, from 1. A speaker with a single utterance is
            enrolled with the one that is the query, too.
        generator : torch.Generator

        Returns
        -------
        query : Tensor
            Rows [P].
        rows : Tensor
            Of the profiles [P, N].
        weights : Tensor
            Of these [P, N], which sum to 1; 0: no part of the profile.
        """
        keys = torch.rand(len(speakers), self._rows.shape[1], generator=generator)
        order = keys.masked_fill(~self._is_row[speakers], 2.0).argsort(1)[:, : max_profile + 1]
        drawn = self._rows[speakers].gather(1, order)  # (P, 1 + N), the speaker's own rows first
        most = (self._counts[speakers] - 1).clamp_max(max_profile)  # (P)
        sizes = 1 + (torch.rand(len(speakers), generator=generator) * most).long()
        sizes = torch.minimum(sizes, most.clamp_min(1))
        query = drawn[:, 0]
        rows = drawn[:, 1:] if drawn.shape[1] > 1 else drawn
        rows = torch.where((most == 0)[:, None], query[:, None], rows)
        weights = (torch.arange(rows.shape[1]) < sizes[:, None]).float() / sizes[:, None]
        return query, rows, weights


def _profiles(embeddings, rows, weights):
    """Profiles [P, D] of length 1, from embeddings [K, D] and what SpeakerTable.draw gave."""
    return functional.normalize((embeddings[rows] * weights[..., None]).sum(1), dim=-1)


class _HeldOut:
    """Trials among held-out speakers, drawn once."""

    def __init__(self, pairs, max_profile, seed):
        generator = torch.Generator().manual_seed(seed)
        self._pairs = pairs
        self._speakers = torch.randperm(pairs.num_speakers, generator=generator)[:_MAX_HELD_OUT]
        table = SpeakerTable(pairs.speaker_indices)
        self._draws = [
            table.draw(self._speakers, max_profile, generator) for _ in range(-(-_MIN_TARGETS // len(self._speakers)))
        ]
        self._is_target = torch.eye(len(self._speakers), dtype=torch.bool)

    @torch.no_grad()
    def cost(self, tensors):
        enroll, runtime = self._pairs.enroll.float(), self._pairs.runtime.float()
        targets, nontargets = [], []
        for query, rows, weights in self._draws:
            profiles = network(tensors, "enroll", _profiles(enroll, rows, weights))
            scores = profiles @ network(tensors, "runtime", runtime[query]).T  # (P, P)
            targets.append(scores[self._is_target])
            nontargets.append(scores[~self._is_target])
        return calibrated_cost(torch.cat(targets), torch.cat(nontargets))


class _Training:
    """The state of one training: weights, their running average, the optimizer and what it draws from."""

    def __init__(self, pairs, maps, options, seed):
        self._options = options
        self._generator = torch.Generator().manual_seed(seed)
        self._enroll, self._runtime = pairs.enroll.float(), pairs.runtime.float()
        self._table, self._num_speakers = SpeakerTable(pairs.speaker_indices), pairs.num_speakers
        self.averaged = start_tensors(pairs, maps, options["hidden_size"], self._generator)
        self._tensors = {name: tensor.clone().requires_grad_() for name, tensor in self.averaged.items()}
        self._log_scale = torch.tensor(12.0).log().requires_grad_()
        groups = [
            {"params": list(self._tensors.values()), "lr": options["lr"]},
            {"params": [self._log_scale], "lr": 1e-2},
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._step = 0

    def advance(self, num_steps, bar):
        """Train for some steps."""
        dropout, generator = self._options["dropout"], self._generator
        num_speakers = min(self._num_speakers, self._options["speakers_per_batch"])
        for _ in range(num_steps):
            speakers = torch.randperm(self._num_speakers, generator=generator)[:num_speakers]
            query, rows, weights = self._table.draw(speakers, self._options["max_profile"], generator)
            profiles = network(self._tensors, "enroll", _profiles(self._enroll, rows, weights), dropout, generator)
            utterances = network(self._tensors, "runtime", self._runtime[query], dropout, generator)
            loss = contrastive_loss(profiles, utterances, self._log_scale)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._step += 1
            with torch.no_grad():
                share = max(1 / _AVERAGE_STEPS, 10 / (self._step + 10))
                for name, tensor in self._tensors.items():
                    self.averaged[name].lerp_(tensor, share)
            bar.update()


def start_tensors(pairs, maps, hidden_size, generator):
    """The networks before training: the linear maps, and hidden layers that add nothing yet.

    Arguments
    ---------
    pairs : PairedEmbeddings
        The maps are scaled so that what they make of these has the length 1 on average.
    maps : dict
        As :class:`CrossSpaceMaps` gives them; a side that is missing has no network.
    hidden_size : int
        H.
    generator : torch.Generator
        Draws the hidden layers.

    Returns
    -------
    dict
        As :func:`network` takes them.

    Example
    -------
    >>> from nessa_modules.paired_embeddings import pair_embeddings
    >>> pairs = pair_embeddings(torch.randn(40, 8), torch.randn(40, 8), [row // 2 for row in range(40)])
    >>> maps = {"runtime": (3 * torch.eye(8).double(), torch.zeros(8).double())}
    >>> tensors = start_tensors(pairs, maps, 16, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(tensors["runtime_matrix"], torch.eye(8)))
    True
    """
    tensors = {}
    for side, (matrix, offset) in maps.items():
        mapped = getattr(pairs, side) @ matrix + offset
        scale = torch.linalg.vector_norm(mapped, dim=-1).mean().clamp_min(1e-12)
        size, mapped_size = matrix.shape
        tensors |= {
            f"{side}_matrix": (matrix / scale).float(),
            f"{side}_offset": (offset / scale).float(),
            # Units of the size 1, as the inputs have the length 1.
            f"{side}_hidden_matrix": 2**0.5 * torch.randn(size, hidden_size, generator=generator),
            f"{side}_hidden_offset": torch.zeros(hidden_size),
            f"{side}_output_matrix": torch.zeros(hidden_size, mapped_size),
        }
    return tensors


class Nessa(Alignment):
    """Two small networks into a shared space, trained so that profiles meet utterances of the same speaker.

    A network is a linear map plus a hidden layer, :func:`network`; the loss, between profiles of one model and
    utterances of the other, is :func:`contrastive_loss` over the speakers of a batch. The fit holds speakers out, in
    up to five folds, first to choose the linear maps to start from (:func:`closed_forms`), then the number of steps,
    by the mean :func:`calibrated_cost` on profiles and utterances of theirs; then it trains on all speakers. With
    fewer than ten speakers nothing can be chosen, and the fit ends at a closed form. Everything is drawn from
    the seed; the global random state is not touched.

    Arguments
    ---------
    hidden_size : int
        H, units of a hidden layer.
    max_profile : int
        Most utterances in a profile while training.
    speakers_per_batch : int
        P; fewer where there are fewer.
    max_steps : int
        Most steps; 0: the closed form, with hidden layers that add nothing.
    lr : float
        Learning rate of Adam.
    dropout : float
        Share of hidden units that are left out in a step.
    seed : int
    progressbar : bool
        Whether to show one over the closed forms and the steps.

    Raises
    ------
    ValueError
        If an option is out of range.

    Example
    -------
    >>> X = torch.randn(60, 8)
    >>> alignment = Nessa(hidden_size=16, max_steps=20).fit(X, X.flip(1)[:, :5], [row // 3 for row in range(60)])
    >>> alignment.score(X[:2], X.flip(1)[:4, :5]).shape
    torch.Size([2, 4])
    """

    name = "nessa"
    sides = ("enroll", "runtime")
    _default_start = "both"

    def __init__(
        self,
        hidden_size=256,
        max_profile=5,
        speakers_per_batch=256,
        max_steps=400,
        lr=2e-4,
        dropout=0.5,
        seed=0,
        progressbar=False,
    ):
        super().__init__()
        integers = {"hidden_size": (hidden_size, 1), "max_profile": (max_profile, 1), "max_steps": (max_steps, 0)}
        integers["speakers_per_batch"] = (speakers_per_batch, 2)
        for name, (value, least) in integers.items():
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} can only be a whole number from {least}, but got {value}.")
        if not lr > 0:
            raise ValueError(f"lr can only be more than 0, but got {lr}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout can only be from 0 to less than 1, but got {dropout}.")
        self.max_steps = max_steps
        self.seed = seed
        self.progressbar = progressbar
        self._options = {
            "hidden_size": hidden_size,
            "max_profile": max_profile,
            "speakers_per_batch": speakers_per_batch,
            "lr": lr,
            "dropout": dropout,
        }

    def _map(self, side, embeddings):
        return network(self._tensors, side, embeddings.float())

    def _expected_shapes(self):
        shapes = {}
        for side, size in (("enroll", self.enroll_size), ("runtime", self.runtime_size)):
            if side in self.sides:
                hidden_size = self._tensors.get(f"{side}_hidden_offset", torch.empty(0)).numel()
                shapes |= {
                    f"{side}_matrix": (size, self.size),
                    f"{side}_offset": (self.size,),
                    f"{side}_hidden_matrix": (size, hidden_size),
                    f"{side}_hidden_offset": (hidden_size,),
                    f"{side}_output_matrix": (hidden_size, self.size),
                }
        return shapes

    def _starts(self, maps, pairs):
        """Of linear maps of both sides, by name, the maps of the sides that this kind has."""
        return {"both": maps}

    def _fit(self, pairs):
        self.history = []
        folds = self._folds(pairs)
        start, cost = self._choose_start(folds[: _needed_folds(_CHOICE_SPEAKERS, pairs)])
        details = {"start": [*start[0], start[1]], "start_cost": cost, "steps": 0, "cost": cost}
        with self._bar("alignment", "step") as bar:
            if folds and self.max_steps:
                details |= self._choose_steps(folds[: _needed_folds(_STEPS_SPEAKERS, pairs)], start, bar)
            training = _Training(pairs, self._start(pairs, start), self._options, self.seed)
            training.advance(details["steps"], bar)
        return training.averaged, details

    def _bar(self, what, unit):
        return tqdm(desc=what, unit=unit, disable=not self.progressbar, leave=False)

    def _folds(self, pairs):
        """Kept embeddings and held-out trials, of each fold; none where speakers are too few."""
        if pairs.num_speakers < _MIN_SPEAKERS_TO_CHOOSE:
            return []
        folds = speaker_folds(pairs.num_speakers, _NUM_FOLDS, self.seed)
        return [
            (
                pairs.of_speakers(folds != fold),
                _HeldOut(pairs.of_speakers(folds == fold), self._options["max_profile"], self.seed),
            )
            for fold in range(_NUM_FOLDS)
        ]

    def _start(self, pairs, start):
        key, name = start
        return self._starts(closed_form(pairs, key), pairs)[name]

    def _choose_start(self, folds):
        """The best closed form, as its key and the name of the start, and its mean cost on held-out speakers."""
        if not folds:
            return (_WITHOUT_CHOICE, self._default_start), None
        costs = {}
        with self._bar("closed forms", "form") as bar:
            for kept, held_out in folds:
                for key, both_maps in closed_forms(kept):
                    for name, maps in self._starts(both_maps, kept).items():
                        tensors = start_tensors(kept, maps, 1, torch.Generator().manual_seed(self.seed))
                        costs[key, name] = costs.get((key, name), 0) + held_out.cost(tensors) / len(folds)
                    bar.update()
        start = min(costs, key=costs.get)
        return start, costs[start]

    def _choose_steps(self, folds, start, bar):
        """The number of steps with the least mean cost on held-out speakers."""
        trainings = [_Training(kept, self._start(kept, start), self._options, self.seed) for kept, _ in folds]
        costs = []
        for steps in range(0, self.max_steps + 1, _INTERVAL):
            if steps:
                for training in trainings:
                    training.advance(_INTERVAL, bar)
            each = [held_out.cost(training.averaged) for training, (_, held_out) in zip(trainings, folds, strict=True)]
            costs.append(sum(each) / len(each))
            if len(costs) - 1 - costs.index(min(costs)) >= _PATIENCE:
                break
        best = costs.index(min(costs))
        self.history = [{"step": number * _INTERVAL, "held_out_cost": cost} for number, cost in enumerate(costs)]
        return {"steps": best * _INTERVAL, "start_cost": costs[0], "cost": costs[best]}


def _needed_folds(num_speakers, pairs):
    """How many folds hold out about so many speakers together."""
    return max(1, min(_NUM_FOLDS, round(_NUM_FOLDS * num_speakers / pairs.num_speakers)))


class NessaRuntime(Nessa):
    """One network: the runtime model's embeddings are brought into the space of the enrollment model.

    As :class:`Nessa`, but the enrollment side is only length-normalised: stored profiles stay as they are.

    Example
    -------
    >>> X = torch.randn(60, 8)
    >>> alignment = NessaRuntime(hidden_size=16, max_steps=20).fit(X, X[:, :5], [row // 3 for row in range(60)])
    >>> alignment.enroll([[0.0, 0, 0, 3, 0, 0, 0, 4]])
    tensor([[0.0000, 0.0000, 0.0000, 0.6000, 0.0000, 0.0000, 0.0000, 0.8000]])
    """

    name = "nessa_runtime"
    sides = ("runtime",)
    _default_start = "with_mean"

    def _starts(self, maps, pairs):
        (enroll_matrix, _), (runtime_matrix, runtime_offset) = maps["enroll"], maps["runtime"]
        # The inner product of both sides' mapped vectors, as one of the enrollment embedding with a mapped vector.
        back = enroll_matrix.T
        # Embeddings of the enrollment side keep their mean: where it is large, it should have no effect.
        mean = functional.normalize(pairs.enroll.mean(0), dim=0)
        starts = {"with_mean": back, "without_mean": back - torch.outer(back @ mean, mean)}
        return {name: {"runtime": (runtime_matrix @ each, runtime_offset @ each)} for name, each in starts.items()}


class NessaStart(LinearAlignment):
    """What :class:`Nessa` starts from, without any training: the closed form that is best on held-out speakers.

    Where NESSA is better than the other alignments, this tells what its training adds.

    Arguments
    ---------
    max_profile : int
        Most utterances in a profile of a held-out speaker.
    seed : int
        Of the folds over speakers, and of their profiles.
    progressbar : bool
        Whether to show one over the closed forms.

    Example
    -------
    >>> X = torch.randn(60, 8)
    >>> alignment = NessaStart().fit(X, X[:, :5], [row // 3 for row in range(60)])
    >>> alignment.num_parameters < Nessa(max_steps=0).fit(X, X[:, :5], [row // 3 for row in range(60)]).num_parameters
    True
    """

    name = "nessa_start"

    def __init__(self, max_profile=5, seed=0, progressbar=False):
        super().__init__()
        self._nessa = Nessa(1, max_profile, max_steps=0, seed=seed, progressbar=progressbar)

    def _fit(self, pairs):
        tensors, details = self._nessa._fit(pairs)
        linear = [f"{side}_{part}" for side in Nessa.sides for part in ("matrix", "offset")]
        return {name: tensors[name] for name in linear}, {name: details[name] for name in ("start", "cost")}
