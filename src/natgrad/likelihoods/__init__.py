"""Output likelihoods: what a model's output means, and the curvature that follows from it.

One file per likelihood; :mod:`natgrad.likelihoods.base` holds the interface a new one implements.
"""

from natgrad.likelihoods.base import Likelihood
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.binary_probabilities import BinaryProbabilities
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.class_probabilities import ClassProbabilities
from natgrad.likelihoods.conversion import LikelihoodLike, as_likelihood, from_loss
from natgrad.likelihoods.gaussian import Gaussian
from natgrad.likelihoods.heads import Heads
from natgrad.likelihoods.huber import Huber
from natgrad.likelihoods.mean_and_scale import MeanAndScale
from natgrad.likelihoods.poisson import Poisson
from natgrad.likelihoods.poisson_rates import PoissonRates

__all__ = [
    "Bernoulli",
    "BinaryProbabilities",
    "Categorical",
    "ClassProbabilities",
    "Gaussian",
    "Heads",
    "Huber",
    "Likelihood",
    "LikelihoodLike",
    "MeanAndScale",
    "Poisson",
    "PoissonRates",
    "as_likelihood",
    "from_loss",
]
