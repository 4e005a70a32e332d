"""What is predicted from what, as pure tensors: no ranks, no devices, no Megatron.

One batch's way: global rows are dealt to micro-batches (``deal``), each row gets its time, mask and
order from (seed, step, row) (``randomness``, ``noise``, ``order``), and becomes one or two stack rows
(``rows``); the model returns log-probabilities of the entries with loss, which become sums and counts
(``losses``).
"""
