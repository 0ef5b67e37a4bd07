"""What one call of a loss measured, as sums and extremes that several calls can be put together by.

A mean of means is not the mean; a sum of sums is the sum. So a call keeps sums and maxima, from
which its numbers are derived when somebody reads them: those of micro-batches (`merge`) and of
ranks (`all_reduce`) are then what one call over everything gives.

    class LossMetrics(Metrics):
        kl = Mean("active_tokens")
        ratio_min = Minimum(otherwise=1.0)
        active_tokens = Total()
        _ratio_square = Total()

        @property
        def effective_sample_size(self) -> Tensor: ...  # from self.sum_of("_ratio_square")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed
from torch import Tensor

_Own = TypeVar("_Own", bound="Metrics")


class Number:
    """Stands in the body of a `Metrics` class for a number, which instances have as a property."""

    #: -1 and 1 for a number that is kept as an extreme, 0 for one that is kept as a sum.
    sign = 0.0

    def reader(self, name: str) -> Callable[[Any], Tensor]:
        """How metrics read the number of this name."""
        raise NotImplementedError

    if TYPE_CHECKING:

        def __get__(self, metrics: Metrics, owner: type[Metrics]) -> Tensor: ...


class Total(Number):
    """A sum, or a count."""

    def reader(self, name: str) -> Callable[[Metrics], Tensor]:
        """The sum as it is."""
        return lambda metrics: as_scalar(metrics.sum_of(name))


class Mean(Number):
    """A sum divided by the `Total` called `over`; 0 where that is 0."""

    def __init__(self, over: str) -> None:
        self.over = over

    def reader(self, name: str) -> Callable[[Metrics], Tensor]:
        """The quotient."""
        over = self.over
        return lambda metrics: metrics.mean_of(name, over)


class Maximum(Number):
    """The largest value of all; `otherwise` where there was none."""

    sign = 1.0

    def __init__(self, otherwise: float) -> None:
        self.otherwise = otherwise

    def reader(self, name: str) -> Callable[[Metrics], Tensor]:
        """The extreme, or `otherwise`."""
        sign, otherwise = self.sign, self.otherwise
        return lambda metrics: metrics.extreme_of(name, sign, otherwise)


class Minimum(Maximum):
    """The smallest value of all; `otherwise` where there was none."""

    sign = -1.0


class Metrics:
    """Base class: a subclass names its numbers as `Total`, `Mean`, `Minimum` and `Maximum`.

    Each is a detached fp32 scalar on the device of the loss, derived when it is read, without
    waiting for the device; a finite number too large for fp32, or an infinite one, reads as the
    largest of fp32, and a NaN stays a NaN.

    Attributes:
        SUMS: names of the numbers that are kept as sums, in the order of the class.
        EXTREMES: names of the others.
    """

    SUMS: ClassVar[tuple[str, ...]]
    EXTREMES: ClassVar[tuple[str, ...]]
    _signs: ClassVar[tuple[float, ...]]

    def __init_subclass__(cls) -> None:
        numbers = {name: kept for name, kept in vars(cls).items() if isinstance(kept, Number)}
        cls.SUMS = tuple(name for name, kept in numbers.items() if not kept.sign)
        cls.EXTREMES = tuple(name for name, kept in numbers.items() if kept.sign)
        cls._signs = tuple(kept.sign for kept in numbers.values() if kept.sign)
        for name, kept in numbers.items():  # torch.compile knows properties
            setattr(cls, name, property(kept.reader(name)))

    def __init__(self, sums: Tensor, extremes: Tensor | None = None) -> None:
        """From sums and extremes, or from one tensor that has both, sums first."""
        self._sums, self._extremes = sums, extremes

    @property
    def sums(self) -> Tensor:
        """[len(SUMS)] fp64: those of `Mean` and `Total`, in the order of `SUMS`."""
        return self._sums[: len(self.SUMS)]

    @property
    def extremes(self) -> Tensor:
        """[len(EXTREMES)] fp64, in the order of `EXTREMES`.

        Maxima, and minima with the sign turned; -inf where there was no value.
        """
        return self._sums[len(self.SUMS) :] if self._extremes is None else self._extremes

    @classmethod
    def of(cls: type[_Own], values: Mapping[str, Tensor]) -> _Own:
        """From the sums and extremes of one call by name, minima as they are; inf for none."""
        with torch.no_grad():
            sums = torch.stack([values[name].double() for name in cls.SUMS])
            kept = zip(cls.EXTREMES, cls._signs, strict=True)
            extremes = [sign * values[name].double() for name, sign in kept]
            return cls(sums, torch.stack(extremes) if extremes else sums[:0])

    @classmethod
    def merge(cls: type[_Own], parts: Iterable[_Own]) -> _Own:
        """The metrics of several calls, micro-batches say, as of one call over all of them.

        Raises:
            ValueError: there are no parts.
        """
        parts = list(parts)
        if not parts:
            raise ValueError(f"{cls.__name__}: merge got no parts, expected at least one")
        return cls(
            torch.stack([part.sums for part in parts]).sum(dim=0),
            torch.stack([part.extremes for part in parts]).amax(dim=0),
        )

    def all_reduce(self: _Own, group: torch.distributed.ProcessGroup | None = None) -> _Own:
        """The metrics of all ranks of `group`, on each of them; every rank has to call it.

        Args:
            group: the ranks; None for all. It has to serve the device of the metrics.
        """
        sums, extremes = self.sums.clone(), self.extremes.clone()
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group)
        return type(self)(sums, extremes)

    def as_dict(self) -> dict[str, Tensor]:
        """Every public number by its name."""
        public = [name for name, kept in vars(type(self)).items() if isinstance(kept, property)]
        return {name: getattr(self, name) for name in public if not name.startswith("_")}

    def sum_of(self, name: str) -> Tensor:
        """[] fp64: the sum of this name."""
        return self.sums[self.SUMS.index(name)]

    def mean_of(self, name: str, over: str) -> Tensor:
        """[] fp32: one sum divided by another; 0 where that is 0."""
        count = self.sum_of(over)
        return as_scalar(torch.where(count == 0, 0.0, self.sum_of(name) / count))

    def extreme_of(self, name: str, sign: float, otherwise: float) -> Tensor:
        """[] fp32: sign -1 for a minimum, and what to read where there was no value."""
        kept = self.extremes[self.EXTREMES.index(name)]
        return as_scalar(torch.where(kept == -torch.inf, otherwise, sign * kept))

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={float(value):.4g}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({numbers})"


def as_scalar(value: Tensor) -> Tensor:
    """A number of metrics as it is read: fp32, and finite unless it is NaN."""
    largest = torch.finfo(torch.float32).max
    return value.clamp(-largest, largest).float()
