"""Samples of ``|ψ|²`` by many Markov chains at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_integer
from natgrad.wave_functions.hamiltonian import Edges, checked_edges


class Metropolis:
    r"""Draws configurations of spins from ``|ψ|²``, every chain going on from where it is.

    A proposal σ' is taken with probability ``min(1, |ψ(σ')/ψ(σ)|²)``.

    Args:
        model: Returns ``log ψ``, ``(N,)``, real or complex.
        sites: Number of spins.
        chains: Chains that run side by side, one model evaluation per proposal of all.
        move: ``"flip"`` turns one spin; ``"exchange"`` swaps two opposite neighbours, which keeps
            the sum of spins.
        edges: Which sites are neighbours, for ``"exchange"``; a periodic chain by default.
        magnetization: Sum of spins of the first configurations, for ``"exchange"``.
        sweep: Proposals between two samples; the number of sites by default.
        burn_in: Sweeps before the first sample.
        seed: Seed of the random numbers; the global state is never used.
        dtype: Type of the configurations; that of the model's first parameter by default.

    Attributes:
        configurations: Where the chains are, ``(chains, sites)``.
        acceptance: Share of the proposals of the last :meth:`sample` that were taken and moved
            something; NaN before the first.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: int,
        chains: int = 64,
        *,
        move: Literal["flip", "exchange"] = "flip",
        edges: Edges | None = None,
        magnetization: int = 0,
        sweep: int | None = None,
        burn_in: int = 50,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("sites", sites)
        check_integer("chains", chains)
        check_choice("move", move, "flip", "exchange")
        if sweep is not None:
            check_integer("sweep", sweep)
        check_integer("burn_in", burn_in, 0)
        if abs(magnetization) > sites or (sites + magnetization) % 2 and move == "exchange":
            raise ValueError(f"{sites} spins cannot have the sum {magnetization}")
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.model: nn.Module = model
        self.sites: int = sites
        self.chains: int = chains
        self.move = move
        self.sweep: int = sweep or sites
        self.burn_in: int = burn_in
        self.edges: Tensor | None = (
            checked_edges(sites, edges).to(like.device) if move == "exchange" else None
        )
        self.generator: torch.Generator = torch.Generator(like.device)
        self.generator.manual_seed(seed)
        self.configurations: Tensor = self._start(magnetization, dtype or like.dtype)
        self.acceptance: float = float("nan")
        self._is_thermal = False

    def _start(self, magnetization: int, dtype: torch.dtype) -> Tensor:
        noise = self._uniform(self.chains, self.sites)
        if self.move == "flip":
            return torch.where(noise < 0.5, 1.0, -1.0).to(dtype)
        up = (self.sites + magnetization) // 2
        return torch.where(noise.argsort(1).argsort(1) < up, 1.0, -1.0).to(dtype)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Return ``count`` configurations of every chain, ``(chains, count, sites)``.

        They are one sweep apart; the first call runs ``burn_in`` sweeps before.

        Raises:
            ValueError: If the count is below 1.
        """
        check_integer("count", count)
        if not self._is_thermal:
            self._run(self.burn_in * self.sweep)
            self._is_thermal = True
        found, accepted = [], 0.0
        for _ in range(count):
            accepted += self._run(self.sweep)
            found.append(self.configurations)
        self.acceptance = accepted / (count * self.sweep)
        return torch.stack(found, 1)

    def _run(self, proposals: int) -> float:
        """Try so many proposals in every chain; return the mean number that moved something."""
        present = self.configurations
        logs, moved = self._logs(present), torch.zeros((), device=present.device)
        for _ in range(proposals):
            proposed, differs = self._proposal(present)
            others = self._logs(proposed)
            threshold = self._uniform(self.chains).log()
            # Where the present amplitude vanishes everything is better.
            taken = (threshold < 2 * (others - logs)) | logs.isneginf()
            present = torch.where(taken.unsqueeze(1), proposed, present)
            logs = torch.where(taken, others, logs)
            moved += (taken & differs).float().mean()
        self.configurations = present
        return float(moved)

    def _proposal(self, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return proposals, and which of them differ from the present."""
        if self.edges is None:
            chosen = self._integers(self.sites).unsqueeze(1)
            turned = present.scatter(1, chosen, -present.gather(1, chosen))
            return turned, torch.ones(self.chains, dtype=torch.bool, device=present.device)
        chosen = self.edges[self._integers(len(self.edges))]
        pair = present.gather(1, chosen)
        return present.scatter(1, chosen, pair.flip(1)), pair[:, 0] != pair[:, 1]

    def _logs(self, configurations: Tensor) -> Tensor:
        """Return ``log |ψ|``."""
        logs: Tensor = self.model(configurations).reshape(-1).real
        return logs

    def _uniform(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=device)

    def _integers(self, below: int) -> Tensor:
        generator = self.generator
        return torch.randint(below, (self.chains,), generator=generator, device=generator.device)

    def state_dict(self) -> dict[str, Any]:
        """Return where the chains are and the state of the noise."""
        return {
            "configurations": self.configurations,
            "generator": self.generator.get_state(),
            "is_thermal": self._is_thermal,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: If it is of other chains.
        """
        found = state["configurations"]
        if found.shape != self.configurations.shape:
            raise ValueError(
                f"the state is of configurations {tuple(found.shape)}, and these are "
                f"{tuple(self.configurations.shape)}"
            )
        self.configurations = found.to(self.configurations)
        self.generator.set_state(state["generator"].cpu())
        self._is_thermal = state["is_thermal"]
