"""What a stage keeps on a device of every running sequence, so that no step has to say it again.

Legend: T tokens, S slots, W blocks per table.
"""

import numpy as np
import torch

from model.batch import Batch
from model.transfer import all_to_device, to_device


class Slots:
    """The newest sampled token and the block table of each running sequence, by its slot.

    Steps are computed in order, and a slot's next owner overwrites what the last one left: nothing is ever cleared. One
    slot more than there are sequences is for what pads a captured step: its table has the block that nobody owns.
    """

    def __init__(self, num_slots: int, max_blocks: int, block_size: int, padding_block: int, device: torch.device):
        self.block_size, self.padding_slot = block_size, num_slots
        self.newest = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        # In 64 bits: from 32 Triton makes other layouts, with which decode attention takes 2 to 7% longer on an H200.
        self.tables = torch.zeros(num_slots + 1, max_blocks, dtype=torch.int64, device=device)
        self.tables[num_slots] = padding_block

    @property
    def device(self) -> torch.device:
        return self.tables.device

    def extend(self, batch: Batch) -> None:
        """Append to the tables what this batch is the first to use."""
        counts = batch.num_new_blocks
        if not len(batch.new_blocks):
            return
        stops = batch.slots.astype(np.int64) * self.tables.shape[1] + batch.num_blocks(self.block_size)
        places = np.repeat(stops - np.cumsum(counts), counts) + np.arange(len(batch.new_blocks))
        on_device = all_to_device([places, batch.new_blocks], torch.int64, self.device)
        self.tables.view(-1).index_copy_(0, on_device[0], on_device[1])

    def feed(self, batch: Batch, token_ids: torch.Tensor) -> None:
        """These tokens [R], on this device, were sampled in `batch`."""
        self.newest[to_device(batch.slots[batch.sample_rows], torch.int64, self.device)] = token_ids
