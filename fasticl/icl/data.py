"""Prompts of the in-context learning theory: binary classification by which of two patterns an input carries.

Follows Li et al., "How Do Nonlinear Transformers Learn and Generalize in In-Context Learning?", ICML 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Patterns:
    """The directions that inputs are made of; rows are orthogonal, and orthogonal between the two sets, of norm beta.

    Attributes:
        relevant: ``[J, d_x]``, mu_j: decide the label.
        irrelevant: ``[K, d_x]``, nu_k: carry nothing about it.
        coefficients: ``[J, M1]``, ``relevant = coefficients @ mu`` over the in-domain mu; its row sums are S1.
    """

    relevant: Tensor
    irrelevant: Tensor
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts ``P = [[x_1 ... x_L, x_query], [y_1 ... y_L, 0]]``, stored by column; ``d = d_x + d_y``.

    Attributes:
        context: ``[B, L, d]``, columns ``p_i = [x_i; y_i]`` with ``y_i = +q`` or ``-q``.
        query: ``[B, d]``, ``[x_query; 0]``.
        target: ``[B]``, z, the query's label, +1 or -1.
        same_pattern: ``[B, L]`` bool, the context column carries the query's relevant pattern.
    """

    context: Tensor
    query: Tensor
    target: Tensor
    same_pattern: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prompts:
        """The same prompts on ``device``, floating-point fields in ``dtype``; None leaves either as it is."""
        return Prompts(
            context=self.context.to(device=device, dtype=dtype),
            query=self.query.to(device=device, dtype=dtype),
            target=self.target.to(device=device, dtype=dtype),
            same_pattern=self.same_pattern.to(device=device),
        )


@dataclass(frozen=True)
class ICLData:
    """The data model ``x = mu_j + k * nu_i`` with ``k ~ U[-kappa, kappa]``, and its split into tasks.

    A task is an ordered pair (a, b) of relevant patterns: inputs with mu_a are labelled +1, with mu_b -1, with any
    other pattern by a fair coin. ``seed`` draws the patterns and the split; tensors are float32 or int64 on the CPU.

    Attributes:
        M1: relevant patterns in the domain.
        M2: irrelevant patterns in the domain.
        d_x: input dimension, at least ``M1 + M2``, for all patterns are orthogonal.
        d_y: label dimension.
        beta: norm of every pattern.
        kappa: the largest coefficient of the irrelevant pattern.
        label_noise: probability, below 1/2, that a context column of the task's two patterns carries the other label;
            the paper has none. The query's label is never flipped.
        tasks_per_pattern: training tasks in which a given pattern is labelled +1, and in which it is labelled -1: the
            training set covers all patterns and labels evenly, as the theory asks. ``M1 * tasks_per_pattern`` tasks; 1
            is a minimal cover.
        patterns: the in-domain patterns, J = M1 and K = M2.
        q: ``[d_y]``, the label embedding, e_1.
        training_tasks: ``[M1 * tasks_per_pattern, 2]``, pairs (a, b).
        unseen_tasks: ``[M1 * (M1 - 1 - tasks_per_pattern), 2]``, the other ordered pairs.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a parameter is out of its range.
    """

    M1: int = 6
    M2: int = 24
    d_x: int = 30
    d_y: int = 30
    beta: float = 2.0
    kappa: float = 0.5
    label_noise: float = 0.0
    tasks_per_pattern: int = 3
    seed: int = 0
    patterns: Patterns = field(init=False, repr=False, compare=False)
    q: Tensor = field(init=False, repr=False, compare=False)
    training_tasks: Tensor = field(init=False, repr=False, compare=False)
    unseen_tasks: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("M1", self.M1, least=2)
        check_integer("M2", self.M2, least=1)
        check_integer("d_y", self.d_y, least=1)
        check_integer("d_x", self.d_x, least=1)
        check_integer("tasks_per_pattern", self.tasks_per_pattern, least=1)
        if self.d_x < self.M1 + self.M2:
            raise ValueError(
                f"d_x: expected at least M1 + M2 = {self.M1 + self.M2} (orthogonal patterns), got {self.d_x}"
            )
        if self.tasks_per_pattern > self.M1 - 1:
            raise ValueError(f"tasks_per_pattern: expected 1 to M1 - 1 = {self.M1 - 1}, got {self.tasks_per_pattern}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta: expected finite and positive, got {self.beta}")
        if not (math.isfinite(self.kappa) and self.kappa >= 0):
            raise ValueError(f"kappa: expected finite and not negative, got {self.kappa}")
        if not 0 <= self.label_noise < 0.5:
            raise ValueError(f"label_noise: expected in [0, 0.5), got {self.label_noise}")

        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.linalg.qr(_normal(self.d_x, self.d_x, generator=generator)).Q.T * self.beta
        patterns = Patterns(
            relevant=directions[: self.M1].float(),
            irrelevant=directions[self.M1 : self.M1 + self.M2].float(),
            coefficients=torch.eye(self.M1),
        )
        # A shift s makes the M1 tasks (o[i], o[i + s]), each pattern once on either side. Shift 1 is always a training
        # shift: it chains all patterns, where e.g. M1 / 2 alone would leave disjoint pairs.
        order = torch.randperm(self.M1, generator=generator)
        shifts = torch.cat([torch.tensor([1]), 2 + torch.randperm(self.M1 - 2, generator=generator)])
        tasks = torch.stack([torch.stack([order, order.roll(-int(shift))], dim=1) for shift in shifts])  # [M1-1, M1, 2]
        derived = {
            "patterns": patterns,
            "q": torch.eye(self.d_y)[0],
            "training_tasks": tasks[: self.tasks_per_pattern].reshape(-1, 2),
            "unseen_tasks": tasks[self.tasks_per_pattern :].reshape(-1, 2),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def d(self) -> int:
        """Dimension of a prompt's columns, ``d_x + d_y``."""
        return self.d_x + self.d_y

    def out_of_domain(self, count: int = 3, S1: float = 1.2, *, generator: torch.Generator | None = None) -> Patterns:
        """Patterns that training never saw: ``mu'_j = sum_i k_ji mu_i`` with ``sum_i k_ji = S1``, and nu' in span(nu).

        The theory promises generalisation for ``S1 >= 1``; a smaller one is a control. The rows k_j are random
        otherwise; nu' is nu rotated at random.

        Args:
            count: relevant patterns, J = M1'.
            S1: sum of each row of coefficients.
            generator: None takes torch's default one.

        Raises:
            ValueError: no such orthonormal rows k_j exist. Their span contains a vector at distance
                ``sqrt(M1 - count * S1**2)`` from the vector of ones, so ``count * S1**2 <= M1``; and ``count = M1``
                rows span everything, so that equality must hold there.
        """
        check_integer("count", count, least=2)
        if count > self.M1:
            raise ValueError(f"count: expected at most M1 = {self.M1} orthogonal patterns in span(mu), got {count}")
        energy = count * S1 * S1
        if not energy <= self.M1 * (1 + 1e-9):  # the negation refuses NaN too
            raise ValueError(
                f"S1: orthogonal patterns of norm beta need count * S1**2 <= M1 = {self.M1}, "
                f"got {count} * {S1}**2 = {energy:.4g}"
            )
        if count == self.M1 and not math.isclose(abs(S1), 1.0):
            raise ValueError(f"S1: count = M1 = {count} orthogonal patterns need S1 = 1 or -1, got {S1}")

        # K = E Fᵀ with orthonormal columns in E [J, J] and F [M1, J] has orthonormal rows. With e_1 = 1/sqrt(J), f_1 at
        # cosine c to u = 1/sqrt(M1), and the other f_i orthogonal to u, K u = c e_1: every row sums to S1.
        cosine = max(-1.0, min(1.0, S1 * math.sqrt(count / self.M1)))
        left = _orthonormal_basis_from_ones(count, generator)
        right = _orthonormal_basis_from_ones(self.M1, generator)
        first = cosine * right[:, :1] + math.sqrt(1 - cosine * cosine) * right[:, -1:]
        coefficients = left @ torch.cat([first, right[:, 1:count]], dim=1).T  # [J, M1]
        rotation = torch.linalg.qr(_normal(self.M2, self.M2, generator=generator)).Q
        return Patterns(
            relevant=(coefficients @ self.patterns.relevant.double()).float(),
            irrelevant=(rotation @ self.patterns.irrelevant.double()).float(),
            coefficients=coefficients.float(),
        )

    def sample(
        self,
        batch: int,
        length: int,
        alpha: float,
        *,
        tasks: Tensor | None = None,
        patterns: Patterns | None = None,
        generator: torch.Generator | None = None,
    ) -> Prompts:
        """Prompts of ``length`` context columns, each for a task drawn uniformly from ``tasks``.

        A column carries mu_a with probability alpha/2, mu_b with alpha/2, each other pattern with
        ``(1 - alpha) / (J - 2)``; the query carries mu_a or mu_b, evenly. Every x adds an irrelevant pattern, uniform.

        Args:
            batch: B prompts; 0 is an empty batch.
            length: L >= 1.
            alpha: in (0, 1], the fraction of context columns that tell about the task; 1 if there are but 2 patterns.
            tasks: ``[T, 2]`` integer pairs (a, b) of rows of ``patterns.relevant``; None is all ordered pairs.
            patterns: None is the in-domain ones.
            generator: on the CPU; None takes torch's default one.

        Raises:
            TypeError: a size is not an integer, or tasks are not integers.
            ValueError: a parameter is out of its range.
        """
        patterns = self.patterns if patterns is None else patterns
        J, K = len(patterns.relevant), len(patterns.irrelevant)
        check_integer("batch", batch, least=0)
        check_integer("length", length, least=1)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: expected in (0, 1], got {alpha}")
        if J == 2 and alpha != 1:
            raise ValueError(f"alpha: expected 1 with 2 relevant patterns (no other to carry the rest), got {alpha}")
        for name, rows in (("relevant", patterns.relevant), ("irrelevant", patterns.irrelevant)):
            if rows.dim() != 2 or rows.shape[1] != self.d_x:
                raise ValueError(f"patterns.{name}: expected [*, d_x={self.d_x}], got {list(rows.shape)}")
        tasks = _ordered_pairs(J) if tasks is None else tasks
        _check_tasks(tasks, J)

        def coins(*shape: int) -> Tensor:
            return 2 * torch.randint(2, shape, generator=generator) - 1

        task = tasks[torch.randint(len(tasks), (batch,), generator=generator)]  # [B, 2]
        a, b = task[:, :1], task[:, 1:]  # [B, 1]
        other = torch.randint(max(J - 2, 1), (batch, length), generator=generator)
        other += other >= torch.minimum(a, b)  # skips a and b
        other += other >= torch.maximum(a, b)
        u = torch.rand(batch, length, generator=generator)
        pattern = torch.where(u < alpha / 2, a, torch.where(u < alpha, b, other))  # [B, L]
        label = torch.where(pattern == a, 1, torch.where(pattern == b, -1, coins(batch, length)))
        if self.label_noise:  # of another pattern's label, a fair coin, a flip changes nothing
            label = torch.where(torch.rand(batch, length, generator=generator) < self.label_noise, -label, label)
        target = coins(batch, 1)
        query_pattern = torch.where(target > 0, a, b)  # [B, 1]

        pattern_or_query = torch.cat([pattern, query_pattern], dim=1)  # [B, L+1]
        k = self.kappa * (2 * torch.rand(batch, length + 1, 1, generator=generator) - 1)
        distractor = torch.randint(K, (batch, length + 1), generator=generator)
        x = patterns.relevant[pattern_or_query] + k * patterns.irrelevant[distractor]  # [B, L+1, d_x]
        label_or_none = torch.cat([label, torch.zeros_like(target)], dim=1)
        columns = torch.cat([x, label_or_none.unsqueeze(-1) * self.q], dim=-1)  # [B, L+1, d]
        return Prompts(
            context=columns[:, :length].contiguous(),
            query=columns[:, length].contiguous(),
            target=target.squeeze(1).to(columns.dtype),
            same_pattern=pattern == query_pattern,
        )


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _orthonormal_basis_from_ones(n: int, generator: torch.Generator | None) -> Tensor:
    """``[n, n]`` float64, orthonormal columns: ``1/sqrt(n)`` first, the others random."""
    columns = _normal(n, n, generator=generator)
    columns[:, 0] = 1
    basis = torch.linalg.qr(columns).Q
    basis[:, 0] = 1 / math.sqrt(n)  # QR leaves its sign open
    return basis


def _ordered_pairs(n: int) -> Tensor:
    """``[n * (n - 1), 2]``, every (a, b) with a != b."""
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _check_tasks(tasks: Tensor, J: int) -> None:
    if tasks.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tasks: expected int64 or int32, got {tasks.dtype}")
    if tasks.dim() != 2 or tasks.shape[1] != 2 or len(tasks) == 0:
        raise ValueError(f"tasks: expected at least one pair, [T, 2], got {list(tasks.shape)}")
    low, high = int(tasks.min()), int(tasks.max())
    if low < 0 or high >= J:
        raise ValueError(f"tasks: expected patterns in 0..{J - 1}, got {low}..{high}")
    if bool((tasks[:, 0] == tasks[:, 1]).any()):
        raise ValueError("tasks: expected a != b in every pair (a, b), got a pair with a == b")
