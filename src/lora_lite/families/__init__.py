"""Parents and starts that several methods share; each file says which formula it holds.

twin.py: a low-rank change whose start is subtracted. subspace.py: a core between the leading directions of the layer's output.
basis.py, orientation.py, principal.py, seeding.py: where such directions come from (W, covariance, inputs, labelled data).
They promise an exact start. A variant's author takes a class of this room as parent: `from ..families.twin import Twin`.
"""
