"""The theory of wide networks: kernels, predicted training, isotropy, conditions and spectra.

It works on the Jacobian rows and structures that optimizers use, so what it says of a model is said
of its training.
"""

from natgrad.ntk.activations import ACTIVATIONS, Activation
from natgrad.ntk.coefficients import Isotropy, isotropic_constant, isotropy
from natgrad.ntk.conditions import JacobianConditions, jacobian_conditions
from natgrad.ntk.convergence import ConvergenceBounds, convergence_bounds, generalization_bound
from natgrad.ntk.dynamics import NetworkInFunctionSpace, Prediction, predict
from natgrad.ntk.empirical import empirical_kernel
from natgrad.ntk.infinite import InfiniteKernel, infinite_kernel
from natgrad.ntk.infinite_network import InfiniteNetwork
from natgrad.ntk.inputs import forster_transform
from natgrad.ntk.linearized import LinearizedNetwork
from natgrad.ntk.networks import MLP, Architecture
from natgrad.ntk.scaling import NTKLinear, Parameterization, parameterization, to_ntk
from natgrad.ntk.spectrum import (
    FisherSpectrum,
    SpectrumPrediction,
    fisher_spectrum,
    infinite_spectrum,
    predict_spectrum,
)
from natgrad.ntk.stability import JacobianStability, StabilityMeasurement
from natgrad.ntk.two_layer import TwoLayerNetwork, two_layer_kernel

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Activation",
    "Architecture",
    "ConvergenceBounds",
    "FisherSpectrum",
    "InfiniteKernel",
    "InfiniteNetwork",
    "Isotropy",
    "JacobianConditions",
    "JacobianStability",
    "LinearizedNetwork",
    "NTKLinear",
    "NetworkInFunctionSpace",
    "Parameterization",
    "Prediction",
    "SpectrumPrediction",
    "StabilityMeasurement",
    "TwoLayerNetwork",
    "convergence_bounds",
    "empirical_kernel",
    "fisher_spectrum",
    "forster_transform",
    "generalization_bound",
    "infinite_kernel",
    "infinite_spectrum",
    "isotropic_constant",
    "isotropy",
    "jacobian_conditions",
    "parameterization",
    "predict",
    "predict_spectrum",
    "to_ntk",
    "two_layer_kernel",
]
