"""Which requests are computed when, and together with which others.

job.py            one row of work: a prompt, a text, an image, at a preference
queue.py          bounded, and fair to every preference
costs.py          which rows share a batch: merged, or mixed by engine.batched
modules.py        the modules that a plan needs: replicas, and the mixed one
worker.py         the thread that computes
forward.py        batches of rows that take one forward pass each
generation.py     batches of rows that take a step for each token; cache.py, sampling.py and text.py help it
"""
