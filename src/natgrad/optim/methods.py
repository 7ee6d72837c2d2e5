"""The named methods: compositions of a structure, a Fisher type and a step rule.

All take the arguments of :class:`natgrad.NaturalGradient`; their defaults are in ``method``, and in
the signature that ``help`` shows.
"""

from __future__ import annotations

from typing import ClassVar

from natgrad.curvature import (
    BlockDiagonal,
    BlockTridiagonal,
    Diagonal,
    EigenKronecker,
    Full,
    InverseFactors,
    KroneckerFactors,
    KroneckerProducts,
    TraceEigenKronecker,
    TraceKronecker,
    TwoLevelKronecker,
    UnitWise,
)
from natgrad.fisher import ImprovedFisher
from natgrad.optim.method import Method
from natgrad.optim.natural_gradient import NaturalGradient
from natgrad.optim.options import Refresh, StepRule
from natgrad.optim.step.damping import LevenbergMarquardt, RelativeDamping
from natgrad.optim.step.line_search import LineSearch
from natgrad.optim.step.measured_length import MeasuredLength
from natgrad.solvers import ConjugateGradient, Thermodynamic

#: Curvature now and then, averaged over many batches.
_AMORTISED = Refresh(factors=10, inverses=20, decay=0.95, early=True)
#: Steps whose length is measured, damped in units of the curvature.
_MEASURED = StepRule(length=MeasuredLength())
_RELATIVE = RelativeDamping()


# Kronecker-factored.


class KFAC(NaturalGradient):
    """Natural gradient descent with one Kronecker product per layer (Martens & Grosse 2015).

    The method for networks of ordinary size: a step without refresh costs SGD plus two matrix
    products per layer. ``structure`` is a :class:`natgrad.curvature.KroneckerFactors`.

    Example:
        >>> optimizer = natgrad.KFAC(model)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     cross_entropy(model(x), y).backward()
        ...     optimizer.step()
    """

    method: ClassVar[Method] = Method(
        KroneckerFactors(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=_AMORTISED, step_rule=_MEASURED,
    )  # fmt: skip


class EKFAC(NaturalGradient):
    """Natural gradient descent in the eigenbases of K-FAC's factors (George et al. 2018).

    Second moments are measured in the eigenbases with every update of the curvature, eigenbases
    renewed more rarely. Damping is added to the moments. A step costs four matrix products per
    layer, twice what K-FAC's take. ``structure`` is a :class:`natgrad.curvature.EigenKronecker`.

    Example:
        >>> optimizer = natgrad.EKFAC(model, damping=1e-2, refresh=natgrad.Refresh(inverses=100))
        >>> cross_entropy(model(x), y).backward()
        >>> optimizer.step()
    """

    method: ClassVar[Method] = Method(
        EigenKronecker(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=_AMORTISED, step_rule=_MEASURED,
    )  # fmt: skip


class TKFAC(NaturalGradient):
    """Natural gradient descent with a trace-restricted Kronecker product (Gao et al. 2021).

    K-FAC with factors that weigh each sample's inputs by the size of its output gradients and the
    other way round, scaled to the exact trace of the layer. A step costs what K-FAC's does.
    ``structure`` is a :class:`natgrad.curvature.TraceKronecker`.
    """

    method: ClassVar[Method] = Method(
        TraceKronecker(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=_AMORTISED, step_rule=_MEASURED,
    )  # fmt: skip


class TEKFAC(NaturalGradient):
    """Natural gradient descent in the eigenbases of TKFAC's factors (Gao et al. 2020).

    ``structure`` is a :class:`natgrad.curvature.TraceEigenKronecker`.
    """

    method: ClassVar[Method] = Method(
        TraceEigenKronecker(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=_AMORTISED, step_rule=_MEASURED,
    )  # fmt: skip


class KPSVD(NaturalGradient):
    """Natural gradient descent with the nearest Kronecker products (Koroko et al. 2022).

    The curvature of each update is decomposed by a few products with its rows. Where the damped
    sum of two products is not positive definite, the first alone is inverted, and a warning says
    so once per layer. ``structure`` is a :class:`natgrad.curvature.KroneckerProducts`.
    """

    method: ClassVar[Method] = Method(
        KroneckerProducts(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=_AMORTISED, step_rule=_MEASURED,
    )  # fmt: skip


class TwoLevelKFAC(NaturalGradient):
    """K-FAC with a coarse correction that couples layers (Tselepidis et al. 2020).

    The correction is exact for the rows of the last curvature update, so these want to be recent
    and many: by default every step updates. They are kept as the inputs and output gradients of
    every layer, or as one gradient per row where that is smaller, and are not averaged, while the
    factors are. A step costs that of K-FAC, and for the coarse space ``"krylov"`` four products
    with the rows and a second one with K-FAC's inverse; a bound ``kl_clip`` takes one product more.
    ``structure`` is a :class:`natgrad.curvature.TwoLevelKronecker`.
    """

    method: ClassVar[Method] = Method(
        TwoLevelKronecker(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=Refresh(factors=1, inverses=20, decay=0.95, early=True), step_rule=_MEASURED,
    )  # fmt: skip


class SINGD(NaturalGradient):
    """Natural gradient descent with structured factors and without inversion (Lin et al. 2024).

    As K-FAC, but factors of the inverse are kept up to date by products alone. So it runs in
    bfloat16 throughout, and the factors may be structured: block-diagonal ones, say, take memory
    proportional to the layer's width. Damping must be positive, or factors grow without bound in
    directions no batch has; uncoupled (IKFAC) it is that of each factor, in units of its own: give
    a number there, about 1e-2. The factors take a step at every refresh of the inverses; with a
    warm-up ``refresh.decay`` weighs batches that no step of theirs has used yet. ``structure`` is a
    :class:`natgrad.curvature.InverseFactors`.

    Source: Lin et al., Structured inverse-free natural gradient descent (2024), arXiv 2312.05705.

    Example:
        >>> optimizer = natgrad.SINGD(model.bfloat16())
        >>> cross_entropy(model(x.bfloat16()), y).backward()
        >>> optimizer.step()
    """

    method: ClassVar[Method] = Method(
        InverseFactors(),
        lr=1.5, damping=_RELATIVE, momentum=0.5, fisher="mc",
        refresh=Refresh(factors=10, inverses=10, early=True), step_rule=_MEASURED,
    )  # fmt: skip


# With the exact rows of the batch, or of every layer or unit.


class ExactNGD(NaturalGradient):
    """Natural gradient descent with the exact Fisher matrix of the batch.

    Solved in sample space: ``R = N·C`` rows cost ``R³/3`` multiplications per step, whatever the
    number of parameters. For small data sets and few outputs (physics, regression) nothing else
    takes fewer steps. ``structure`` is a :class:`natgrad.curvature.Full`.

    Example:
        >>> model, x = nn.Linear(3, 1), torch.randn(20, 3)
        >>> y = x.sum(1, keepdim=True)
        >>> optimizer = natgrad.ExactNGD(model, "gaussian", damping=1e-8, kl_clip=None)
        >>> (0.5 * (model(x) - y).square().mean()).backward()
        >>> optimizer.step()  # Newton's step: all the way to the least squares
        >>> torch.allclose(model(x), y, atol=1e-4)
        True
    """

    method: ClassVar[Method] = Method(Full(), lr=1.0, damping=1e-2, kl_clip=0.1)


class BlockDiagonalNGD(NaturalGradient):
    """Natural gradient descent with the exact Fisher block of every layer.

    In wide networks it follows exact NGD in function space at learning rate ``1/L`` (Karakida &
    Osawa 2020). ``structure`` is a :class:`natgrad.curvature.BlockDiagonal`.
    """

    method: ClassVar[Method] = Method(BlockDiagonal(), lr=0.3, damping=1e-2, kl_clip=0.1)


class BlockTridiagonalNGD(NaturalGradient):
    """Natural gradient descent with the Fisher blocks of layers and their neighbours.

    The matrix is indefinite from three layers on, so it needs damping well chosen; see
    :class:`natgrad.curvature.BlockTridiagonal`.
    """

    method: ClassVar[Method] = Method(BlockTridiagonal(), lr=0.5, damping=0.1, kl_clip=1e-2)


class UnitWiseNGD(NaturalGradient):
    """Natural gradient descent with one dense block per unit.

    It needs some damping: a unit whose gradients nearly vanish moves far without. With
    ``lr="isotropic"`` about 1e-6 of the mean eigenvalue of the blocks is enough.
    """

    method: ClassVar[Method] = Method(
        UnitWise(), lr=0.05, damping=1e-3, kl_clip=1e-2, refresh=Refresh(decay=0.9)
    )


class DiagonalNGD(NaturalGradient):
    """Natural gradient descent with the diagonal of the Fisher matrix.

    Cheap, but not isotropic in function space at any width: expect it to need more steps.
    """

    method: ClassVar[Method] = Method(
        Diagonal(), lr=0.05, damping=1e-2, momentum=0.9, kl_clip=1e-3, refresh=Refresh(decay=0.95)
    )


class ConjugateGradientNGD(NaturalGradient):
    """Exact natural gradient descent by conjugate gradients (Hessian-free style).

    Each iteration takes two products with the factored Jacobian rows; neither the Gram matrix of
    the rows nor any matrix of parameters is formed, so that memory stays that of one backward pass
    per output. For batches whose ``N·C`` rows are too many for :class:`natgrad.ExactNGD`.
    ``structure=Full(solver=ConjugateGradient(...))`` sets tolerance and iterations.

    Source: Martens, Deep learning via Hessian-free optimization (2010), with the Fisher matrix.
    """

    method: ClassVar[Method] = Method(
        Full(solver=ConjugateGradient()), lr=1.0, damping=1e-2, kl_clip=0.1
    )


class ThermodynamicNGD(NaturalGradient):
    """Natural gradient descent with the natural gradient as a thermal equilibrium.

    The Ornstein-Uhlenbeck process ``dx = −((F + λI)x − ∇L)dt + √(2T)dW`` is simulated for some time
    and its state is the step. For long times that is the damped natural gradient; started from the
    gradient and for no time at all it is gradient descent.
    ``structure=Full(solver=Thermodynamic(...))`` sets time, temperature and start.

    Source: Donatella et al., Thermodynamic natural gradient descent (2024).
    """

    method: ClassVar[Method] = Method(
        Full(solver=Thermodynamic()), lr=1.0, damping=0.1, kl_clip=0.1
    )


class ImprovedEmpiricalNGD(NaturalGradient):
    r"""Natural gradient descent with the improved empirical Fisher matrix of the batch (iEF).

    With ``s_n`` the squared norm of a sample's loss gradient at the output, its step is
    ``(F* + λI)⁻¹∇L = Gᵀ(GGᵀ + Nλ diag(s))⁻¹ s``: at zero damping every sample's linearised loss
    falls by its own ``s_n``, as under the Gauss-Newton step, and not, as with the empirical Fisher
    matrix, all by the same amount. One row per sample, whatever the number of outputs: ``N³/3``
    multiplications per step. ``fisher=ImprovedFisher(damping_on="gram")`` damps as the source does.

    Source: Wu et al., An improved empirical Fisher approximation for natural gradient descent
    (2024).
    """

    method: ClassVar[Method] = Method(
        Full(), lr=1.0, damping=1e-2, kl_clip=0.1, fisher=ImprovedFisher()
    )


class EGN(NaturalGradient):
    r"""Exact Gauss-Newton steps of a mini-batch or full batch, in sample space.

    The direction ``d = (JᵀΛJ/N + λI)⁻¹∇L`` is the damped natural gradient of
    :class:`natgrad.ExactNGD`: for exponential families the Gauss-Newton matrix is the Fisher
    matrix, and the Duncan-Guttman identity is the push-through that turns ``P × P`` into
    ``N·C × N·C``. What comes on top is the choice of the step: momentum as an average, a
    backtracking line search along it, and damping by the reduction ratio, halved where it is above
    ¾ and doubled where it is below ¼ or the search failed. ``step`` takes a closure.

    A batch with fewer outputs than the network has parameters can be fitted whole, so that the
    ratio lets λ fall although the next batch is another: give a number there, ``damping=1e-2``
    (on digits in batches of 64 a test accuracy of 0.96 where the default ends at 0.73).

    Source: Korbit et al., Exact Gauss-Newton optimization for training deep neural networks (2024).

    Example:
        >>> optimizer = natgrad.EGN(model, "categorical")
        >>> for x, y in loader:
        ...     loss = optimizer.step(lambda: cross_entropy(model(x), y))
    """

    method: ClassVar[Method] = Method(
        Full(),
        lr=1.0,
        damping=LevenbergMarquardt(initial=1e-2, interval=1, decay=0.5),
        step_rule=StepRule(length=LineSearch(), averaged_momentum=True),
    )
