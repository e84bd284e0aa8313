"""What comes of comparing a recording with voice profiles."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verification:
    """Whether a recording was accepted as somebody's.

    Attributes
    ----------
    name : str
        Of the profile.
    score : float
        Cosine of the profile and the recording in the space that they are compared in, -1 to 1.
    accepted : bool
        Whether the score reaches the threshold.
    threshold : float
    false_accept_rate : float
        The share of recordings of other speakers that reach the threshold, on the development set that it was
        calibrated on.

    Example
    -------
    >>> Verification("Ada", score=0.7, accepted=True, threshold=0.4, false_accept_rate=0.01).accepted
    True
    """

    name: str
    score: float
    accepted: bool
    threshold: float
    false_accept_rate: float


@dataclass(frozen=True)
class Candidate:
    """A profile that a recording was compared with, and the cosine, -1 to 1.

    Example
    -------
    >>> Candidate("Ada", 0.7)
    Candidate(name='Ada', score=0.7)
    """

    name: str
    score: float


@dataclass(frozen=True)
class Identification:
    """Whose a recording is.

    Attributes
    ----------
    name : str or None
        Of the best profile, None where none reaches the threshold: nobody known.
    candidates : list of Candidate
        The best profiles, whether they reach the threshold or not, best first.
    threshold : float
    false_accept_rate : float
        Of one comparison. That a recording of a stranger reaches the threshold of any of N profiles is up to N times
        as likely.
    num_profiles : int
        N, the number of profiles that were compared.

    Example
    -------
    >>> Identification(None, [Candidate("Ada", 0.1)], 0.4, 0.01, num_profiles=1).name is None
    True
    """

    name: str | None
    candidates: list
    threshold: float
    false_accept_rate: float
    num_profiles: int


@dataclass(frozen=True)
class MixtureVoice:
    """A voice of a mixture.

    Attributes
    ----------
    number : int
        From 1, in the separator's order.
    level_db : float
        Its root mean square relative to the mixture's loudest voice, dB; minus infinity where there is nothing.
    identification : Identification or None
        None where the voice is silent: fewer speak than the separator looks for.

    Example
    -------
    >>> MixtureVoice(2, level_db=-61.0, identification=None).is_silent
    True
    """

    number: int
    level_db: float
    identification: Identification | None

    @property
    def is_silent(self):
        """Whether there was nothing to identify."""
        return self.identification is None
