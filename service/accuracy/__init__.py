"""Live accuracy: a share of real traffic is scored against the original, in a process of its own.

event loop                                       scorer process (nice 19, one thread)
scorer.py  --token ids, one JSON line each--> process.py  original and artifact read the same tokens
           <--KL and agreement per token---              -> onebit_core.evaluation.divergence

No request waits for it: what a scorer cannot keep up with is dropped and counted. No text crosses the pipe, only token
ids, and nothing of them is logged or kept.
"""
