"""Looking at a model from outside while it runs: hidden states, attention maps, geometry, and terms of a loss on them.

capturing.py and seen.py record calls within a block and let go of them; attention.py reads maps and traces; geometry.py reports
figures; objectives/ holds the terms. It promises that padding changes nothing and that outside the block nothing is left on the
model. A variant's author needs none of it.
"""
