"""Which rows of the global batch run in which micro-batch of which data-parallel rank.

A micro-batch is made of slots. Without mask copies a slot is one stack row. Otherwise it is two: two
diffusion rows, or one sequential row with its copies. Slots are dealt like cards, diffusion slots
first, to ranks and then to micro-batches. So every rank and every micro-batch gets the same number of
slots and, as nearly as possible, the same mix.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Row numbers of the global batch that one micro-batch computes."""

    diffusion_rows: list[int]
    sequential_rows: list[int]

    @property
    def rows(self) -> list[int]:
        """All data rows, diffusion rows first."""
        return [*self.diffusion_rows, *self.sequential_rows]


def deal(
    *,
    num_diffusion_rows: int,
    num_sequential_rows: int,
    micro_batch_rows: int,
    rank: int,
    num_ranks: int,
) -> list[MicroBatch]:
    """Return the micro-batches of one data-parallel rank.

    Args:
        num_diffusion_rows: rows 0.. of the global batch; each is one stack row.
        num_sequential_rows: the rows after them; each is two stack rows.
        micro_batch_rows: stack rows of a micro-batch.
        rank: data-parallel rank.
        num_ranks: data-parallel size.

    Raises:
        ValueError: if the rows do not divide (``config.check`` refuses that earlier, with advice).
    """
    slots = _slots(num_diffusion_rows, num_sequential_rows)
    rows_per_slot = 2 if num_sequential_rows else 1
    num_micro_batches, rest = divmod(len(slots) * rows_per_slot, micro_batch_rows * num_ranks)
    if rest or micro_batch_rows % rows_per_slot:
        raise ValueError(
            f"{len(slots)} slots of {rows_per_slot} stack rows do not divide into micro-batches of "
            f"{micro_batch_rows} on {num_ranks} ranks"
        )
    mine = slots[rank::num_ranks]
    return [_collect(mine[index::num_micro_batches]) for index in range(num_micro_batches)]


def _slots(num_diffusion: int, num_sequential: int) -> list[tuple[list[int], list[int]]]:
    if num_sequential == 0:
        return [([row], []) for row in range(num_diffusion)]
    if num_diffusion % 2:
        raise ValueError(f"{num_diffusion} diffusion rows beside sequential ones must be even")
    pairs = [([row, row + 1], []) for row in range(0, num_diffusion, 2)]
    return pairs + [([], [num_diffusion + row]) for row in range(num_sequential)]


def _collect(slots: list[tuple[list[int], list[int]]]) -> MicroBatch:
    diffusion = [row for first, _ in slots for row in first]
    return MicroBatch(diffusion, [row for _, second in slots for row in second])
