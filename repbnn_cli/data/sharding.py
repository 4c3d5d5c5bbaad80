"""How an epoch is cut into batches and each batch among processes: as even as it goes, in order, nothing twice."""

from __future__ import annotations

from dataclasses import dataclass

from repbnn_cli.errors import UsageError


@dataclass(frozen=True)
class Sharding:
    """The part of an epoch that one of `world` processes gets.

    count: images of the epoch; batch_size: the global one, of which rank r gets the r-th part, so that the ranks see
    together what one process would. Without drop_last the last batch is the smaller rest, of which a rank can get one
    image more than another, or none. Raises UsageError for sizes that give no batch or cannot be divided.
    """

    count: int
    batch_size: int
    drop_last: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        size, world = self.batch_size, self.world
        if size < 1:
            raise UsageError(f"batch size {size}: has to be at least 1")
        if self.drop_last and size > self.count:
            raise UsageError(
                f"batch size {size}: the data set has only {self.count} images; choose {self.count} at most"
            )
        if not 0 <= self.rank < world:
            raise UsageError(f"rank {self.rank}: expected 0 to {world - 1}")
        if size % world:
            below = size // world * world
            near = f"{below} or {below + world}" if below else f"{world}"
            raise UsageError(f"batch size {size}: not divisible among {world} processes; possible here: {near}")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return batches_in(self.count, self.batch_size, self.drop_last)

    def parts(self, start: int = 0) -> list[slice]:
        """This rank's positions in each batch from batch `start` on."""
        firsts = [number * self.batch_size for number in range(start, len(self))]
        return [self._share(first, min(first + self.batch_size, self.count)) for first in firsts]

    def _share(self, first: int, last: int) -> slice:
        count = last - first
        return slice(first + count * self.rank // self.world, first + count * (self.rank + 1) // self.world)


def batches_in(count: int, batch_size: int, drop_last: bool) -> int:
    """How many batches an epoch of `count` images has."""
    return count // batch_size if drop_last else -(-count // batch_size)
