"""What is predicted from what, as pure tensors: no ranks, no devices, no Megatron.

The path of a batch: its rows are dealt to micro-batches (``deal``). Each row gets its time, mask and
order from (seed, step, row) (``randomness``, ``noise``, ``order``) and becomes one or two stack rows
(``rows``). The model returns log-probabilities of the entries with loss, which become sums and counts
(``losses``).
"""
