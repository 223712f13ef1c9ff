"""Where weights live and how they are read: Linear-like layers and the model around them.

layer.py: sizes, the dense weight, and `Base`, the frozen product that a method's forward is lent. model.py: paths, wrappers and
block numbers. quantised.py and sharded.py are the only places that know packed formats and processes. Nothing here knows an
adapter, and nothing here writes a weight. A variant's author needs none of it.
"""
